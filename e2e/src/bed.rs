//! What a test runs in: two namespaces joined by a link, a folder, and a place for shared buffers.

use std::fs::{self, DirBuilder, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use penstock_process::text::escape;
use penstock_testbed::command::run;
use penstock_testbed::netns::{self, Net};
use penstock_testbed::settings::Profile;

use crate::cleanup;

/// Address of the broker's end of the link, and of the broker.
pub const BROKER_ADDRESS: &str = "10.214.0.2";
/// Where a broker listens that was started without `--listen`.
pub const BROKER: &str = "10.214.0.2:1214";
/// Lines of each file of a failed test that its report quotes.
const TAIL_LINES: usize = 25;

static BEDS: AtomicUsize = AtomicUsize::new(0);

/// Everything that a test makes; removed when dropped, with the processes in its namespaces.
#[derive(Debug)]
pub struct Bed {
    net: Option<Net>,
    name: String,
    test: String,
    folder: PathBuf,
    buffers: PathBuf,
    files: AtomicUsize,
}

impl Bed {
    /// A bed with links to this number of brokers, without offloads and with an MTU of 1500.
    pub fn new(test: &str, brokers: usize) -> Result<Self> {
        let name = cleanup::name_of_bed(BEDS.fetch_add(1, Ordering::Relaxed));
        let folder = PathBuf::from(format!("/tmp/{name}-{test}"));
        let mut bed = Self {
            net: None,
            buffers: PathBuf::from(format!("/dev/shm/{name}-{test}")),
            folder,
            name,
            test: test.to_owned(),
            files: AtomicUsize::new(0),
        };
        let made = DirBuilder::new().mode(0o700).create(&bed.folder);
        made.with_context(|| format!("cannot create {}", bed.folder.display()))?;
        bed.net = Some(Net::create_as(&bed.name, brokers, Profile::Wire, 1500)?);
        Ok(bed)
    }

    fn net(&self) -> &Net {
        self.net
            .as_ref()
            .expect("it is there until the bed is dropped")
    }

    /// Beginning of the names of what the test makes outside of its folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the test.
    pub fn test(&self) -> &str {
        &self.test
    }

    /// Namespace of the broker, with [`netns::BROKER_END`].
    pub fn broker_ns(&self) -> &str {
        self.namespace_of(0)
    }

    /// Namespace of broker `index`, with [`netns::BROKER_END`].
    pub fn namespace_of(&self, index: usize) -> &str {
        self.net().broker(index)
    }

    /// Namespace of the publisher; `b0` there leads to the broker.
    pub fn publisher_ns(&self) -> &str {
        self.net().publisher()
    }

    /// A folder of the test's own, for root only.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A new file of lines of different lengths, empty ones among them.
    pub fn file_of_lines(&self, count: u64) -> Result<PathBuf> {
        let mut rng = fastrand::Rng::with_seed(1);
        let path = self.new_file("input", "lines");
        let mut file = BufWriter::new(File::create(&path)?);
        for _ in 0..count {
            let line: Vec<u8> = (0..rng.usize(..160))
                .map(|_| rng.alphanumeric() as u8)
                .collect();
            file.write_all(&line)?;
            file.write_all(b"\n")?;
        }
        file.flush()?;
        Ok(path)
    }

    /// A path in the folder that no earlier call returned.
    pub(crate) fn new_file(&self, name: &str, extension: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        self.folder.join(format!("{number:02}-{name}.{extension}"))
    }

    /// A folder in memory that does not exist yet; brokers keep their logs below it.
    pub fn buffers(&self) -> &Path {
        &self.buffers
    }

    /// Where a broker keeps its logs unless told otherwise.
    pub fn buffer_dir(&self) -> PathBuf {
        self.buffer_dir_of(0)
    }

    /// Where broker `index` keeps its logs unless told otherwise.
    pub fn buffer_dir_of(&self, index: usize) -> PathBuf {
        self.buffers.join(format!("b{index}"))
    }

    /// The log of a topic.
    pub fn log_of(&self, topic: &str) -> PathBuf {
        self.buffer_dir().join(format!("{topic}.log"))
    }

    /// Lets other users enter the folder.
    pub fn open_to_others(&self) -> Result<()> {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&self.folder, mode).context("cannot open the folder to others")
    }

    /// ip(8) in the broker's namespace.
    pub fn broker_ip(&self, words: &[&str]) -> Result<String> {
        run(&[&["ip", "-n", self.broker_ns()], words].concat())
    }

    /// ip(8) in the publisher's namespace.
    pub fn publisher_ip(&self, words: &[&str]) -> Result<String> {
        run(&[&["ip", "-n", self.publisher_ns()], words].concat())
    }

    /// Number of interfaces `eth0` of the broker that have Penstock's program: 1 while a broker runs.
    pub fn programs_attached(&self) -> Result<usize> {
        let link = self.broker_ip(&["-d", "link", "show", netns::BROKER_END])?;
        Ok(link.matches("penstock_steer").count())
    }

    /// The ends of what programs of the test printed, for the report of its failure.
    pub(crate) fn output(&self) -> String {
        let mut names = netns::file_names(&self.folder).unwrap_or_default();
        names.sort();
        let mut text = String::new();
        for name in names {
            let is_printed = [".log", ".json", ".out"]
                .iter()
                .any(|end| name.ends_with(end));
            let Some(content) = is_printed
                .then(|| fs::read(self.file(&name)).ok())
                .flatten()
            else {
                continue;
            };
            let content = String::from_utf8_lossy(&content);
            let lines: Vec<_> = content.lines().filter(|line| !line.is_empty()).collect();
            if !lines.is_empty() {
                text += &format!("--- {name}\n");
            }
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                let line: String = line.chars().take(2000).collect();
                text += &format!("    {}\n", escape(&line));
            }
        }
        text
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for namespace in self.net.iter().flat_map(Net::namespaces) {
            report(cleanup::end_processes_in(namespace));
        }
        // Mounts in the folder may be in use by a process that has just ended.
        self.net = None;
        report(cleanup::remove_folder(&self.folder));
        report(cleanup::remove_folder(&self.buffers));
    }
}

fn report(outcome: Result<()>) {
    if let Err(error) = outcome {
        crate::say(&format!("{error:#}"));
    }
}

/// Where the programs are that are tested: `PENSTOCK_BIN`, or what `cargo build --release` made.
pub fn binaries() -> Result<PathBuf> {
    let target = || match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => root().join("target"),
    };
    let dir =
        std::env::var_os("PENSTOCK_BIN").map_or_else(|| target().join("release"), PathBuf::from);
    for program in ["broker", "publisher", "subscriber", "lab"] {
        let is_there = dir.join(format!("penstock-{program}")).is_file();
        ensure!(
            is_there,
            "penstock-{program} is not in {}; cargo build --release",
            dir.display()
        );
    }
    Ok(dir)
}

/// One of the programs: `broker`, `publisher`, `subscriber` or `lab`.
pub fn program(name: &str) -> PathBuf {
    let dir = binaries().expect("no test runs without them");
    dir.join(format!("penstock-{name}"))
}

/// Root of the repository.
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent()
        .expect("the crate is in the workspace")
        .to_owned()
}
