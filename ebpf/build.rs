//! Compiles the eBPF programs and writes the skeletons that the crate includes.

#![allow(
    clippy::disallowed_macros,
    reason = "cargo reads what a build script prints"
)]

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use libbpf_cargo::SkeletonBuilder;

const PROGRAMS: [&str; 4] = ["steer", "faults", "calls", "hosts"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    for program in PROGRAMS {
        build(program, &arch, &out);
    }
}

fn build(program: &str, arch: &str, out: &Path) {
    let source = format!("src/bpf/{program}.bpf.c");
    println!("cargo:rerun-if-changed={source}");
    // Where Debian keeps the architecture's part of the kernel's headers.
    let headers = format!("/usr/include/{arch}-linux-gnu");
    let arguments = ["-I", &headers, "-Wall", "-Wextra", "-Werror"].map(OsString::from);
    if let Err(error) = SkeletonBuilder::new()
        .source(source)
        .clang_args(arguments)
        .build_and_generate(out.join(format!("{program}.skel.rs")))
    {
        eprintln!("{error:?}");
        eprintln!(
            "building the eBPF programs needs clang, libelf and zlib headers: apt-get install clang libelf-dev zlib1g-dev pkg-config"
        );
        std::process::exit(1);
    }
}
