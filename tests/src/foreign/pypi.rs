//! Readers and samples of others, from PyPI, by version and SHA-256: an oracle that shares nothing with ours.
//!
//! They are kept beside the build's other products. Where they cannot be had (no network, no Python), the caller
//! is told, and has to say so.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

/// The readers, built and pure Python, with what they need.
const READERS: &str = "\
dissect.archive==1.8 --hash=sha256:b0d81d81591fc0485eeacc98a81f1888640892b6cbbed1fd19fa946c4365229c
dissect.cstruct==4.7 --hash=sha256:0427621ce67baa3106df2dc63a320d0a7f5c2da88ba3faf2ef5886a1a6b458fd
dissect.util==3.24 --hash=sha256:edca81239873a3bd6b5f0a702fc0fde453e9b3c2cce37f2c166cdd5e235ccd20
";

/// The same with its samples.
const SAMPLES: &str =
    "dissect.archive==1.8 --hash=sha256:62faef53897e44f4279236c5c9c9ee2cec345b4741cbbd7987e47a333bca7146\n";

/// Dissect's readers and samples.
#[derive(Clone, Debug)]
pub struct Dissect {
    readers: PathBuf,
    samples: PathBuf,
}

/// Dissect, fetched once; `None`, with the reason on standard error, where it cannot be had.
pub fn dissect() -> Option<&'static Dissect> {
    static FETCHED: OnceLock<Option<Dissect>> = OnceLock::new();
    FETCHED.get_or_init(fetch).as_ref()
}

fn fetch() -> Option<Dissect> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let place = workspace.join("target/peers/dissect-1.8");
    let found = Dissect { readers: place.join("readers"), samples: place.join("dissect_archive-1.8/tests/_data") };
    if found.readers.is_dir() && found.samples.is_dir() {
        return Some(found);
    }
    let draft = tempfile::tempdir_in(
        fs::create_dir_all(workspace.join("target/peers")).map(|()| workspace.join("target/peers")).ok()?,
    )
    .ok()?;
    let dir = draft.path();
    fs::write(dir.join("readers.txt"), READERS).ok()?;
    fs::write(dir.join("samples.txt"), SAMPLES).ok()?;
    let pip = ["-m", "pip", "-q", "--disable-pip-version-check", "--no-input"];
    let readers =
        ["install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "-t", "readers", "-r", "readers.txt"];
    let samples = ["download", "--require-hashes", "--no-deps", "--no-binary", ":all:", "-r", "samples.txt"];
    let done = run(dir, "python3", &[&pip[..], &readers].concat())
        && run(dir, "python3", &[&pip[..], &samples].concat())
        && run(dir, "tar", &["-xzf", "dissect_archive-1.8.tar.gz"]);
    if !done {
        #[expect(clippy::print_stderr, reason = "what is not compared has to be said, and the test goes on")]
        {
            eprintln!("NOT COMPARED: dissect.archive 1.8 cannot be had from PyPI here");
        }
        return None;
    }
    // Another test may have been quicker.
    let _ = fs::rename(draft.keep(), &place);
    (found.readers.is_dir() && found.samples.is_dir()).then_some(found)
}

fn run(dir: &Path, program: &str, args: &[&str]) -> bool {
    let done = Command::new(program).args(args).current_dir(dir).stdin(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}

impl Dissect {
    /// Unpacks a sample to `to`.
    ///
    /// # Panics
    /// There is no such sample.
    pub fn sample(&self, name: &str, to: &Path) {
        let packed = fs::File::open(self.samples.join(name)).expect("the sample");
        let mut plain = flate2::read::GzDecoder::new(packed);
        std::io::copy(&mut plain, &mut fs::File::create(to).expect("create")).expect("unpacks");
    }

    /// Writes what Dissect reads from the file `inside` of a backup file to `to`.
    ///
    /// # Panics
    /// It fails.
    pub fn vbk(&self, backup: &Path, inside: &str, to: &Path) {
        let program = "import sys, shutil\nfrom dissect.archive.vbk import VBK\n\
            v = VBK(open(sys.argv[1], 'rb'))\n\
            found = [f for d in v.root.iterdir() if d.is_dir() for f in d.iterdir() if f.name == sys.argv[2]]\n\
            shutil.copyfileobj(found[0].open(), open(sys.argv[3], 'wb'))\n";
        self.python(program, &[backup.as_os_str(), inside.as_ref(), to.as_os_str()]);
    }

    /// Writes what Dissect reads of the disk `reference` (`Ref:10`) of an export of XenServer to `to`.
    ///
    /// # Panics
    /// It fails.
    pub fn xva(&self, export: &Path, reference: &str, to: &Path) {
        let program = "import sys, shutil\nfrom dissect.archive.xva import XVA\n\
            shutil.copyfileobj(XVA(open(sys.argv[1], 'rb')).open(sys.argv[2]), open(sys.argv[3], 'wb'))\n";
        self.python(program, &[export.as_os_str(), reference.as_ref(), to.as_os_str()]);
    }

    /// Writes what Dissect reads of the disk `name` of a Proxmox archive to `to`.
    ///
    /// # Panics
    /// It fails.
    pub fn vma(&self, archive: &Path, name: &str, to: &Path) {
        let program = "import sys, shutil\nfrom dissect.archive.vma import VMA\n\
            found = [d for d in VMA(open(sys.argv[1], 'rb')).devices() if d.name == sys.argv[2]]\n\
            shutil.copyfileobj(found[0].open(), open(sys.argv[3], 'wb'))\n";
        self.python(program, &[archive.as_os_str(), name.as_ref(), to.as_os_str()]);
    }

    fn python(&self, program: &str, args: &[&std::ffi::OsStr]) {
        let done = Command::new("python3")
            .env("PYTHONPATH", &self.readers)
            .args(["-c", program])
            .args(args)
            .output()
            .expect("python3 runs");
        assert!(done.status.success(), "dissect: {}", String::from_utf8_lossy(&done.stderr));
    }
}
