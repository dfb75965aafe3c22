//! Compiles the XDP program and writes the skeleton that `src/lib.rs` includes.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use libbpf_cargo::SkeletonBuilder;

const SOURCE: &str = "src/bpf/steer.bpf.c";

fn main() {
    println!("cargo:rerun-if-changed={SOURCE}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    // Where Debian keeps the architecture's part of the kernel's headers.
    let headers = format!("/usr/include/{arch}-linux-gnu");
    let arguments = ["-I", &headers, "-Wall", "-Wextra", "-Werror"].map(OsString::from);
    if let Err(error) = SkeletonBuilder::new()
        .source(SOURCE)
        .clang_args(arguments)
        .build_and_generate(out.join("steer.skel.rs"))
    {
        eprintln!("{error:?}");
        eprintln!(
            "building the XDP program needs clang, libelf and zlib headers: apt-get install clang libelf-dev zlib1g-dev pkg-config"
        );
        std::process::exit(1);
    }
}
