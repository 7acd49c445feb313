//! Programs of others that write and read their own formats: Benji from PyPI, Xen Orchestra's VHD library from npm, each
//! part by version and SHA-256.
//!
//! They are kept beside the build's other products. Where they cannot be had (no network, no Python or Node of a fitting
//! release), the caller is told, and has to say so.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

/// Benji and what it needs.
const BENJI: &str = include_str!("benji.txt");

/// Packages of npm: name, version, SHA-256 of what is fetched.
const VHD_LIB: [(&str, &str, &str); 10] = [
    ("vhd-lib", "4.15.0", "f17eff4831b7e81a2bfab9add8b31d8982b12bd1cc76bf506b711485181e5138"),
    ("@xen-orchestra/async-map", "0.1.4", "6dcc7a54d5391f7c2d298b6f1cea71c8f376b34a78069b41c9eb7315d834d970"),
    ("@xen-orchestra/log", "0.7.2", "18bdbb9a1c9801b159a607be55d42d4b549ec3231a241af77d5cc53296835215"),
    ("async-iterator-to-stream", "1.2.0", "b652885bdc18684ae4299c7b534431a6cb15ab16441d1e39ab40c99172fd310b"),
    ("decorator-synchronized", "0.6.0", "1883d9369b2afb505bf19a4822fade693a0cf18944292c71026ac130e70dd2ca"),
    ("lodash", "4.18.1", "696942c2a488c9d7428e9ca5f12ccf03b52de01dcdbfe4d4751d392f0491ae16"),
    ("make-error", "1.3.6", "6a1b1f4375e7d775be9443e8a4f7782ae8b6523eda3831fd25fc4da2f20fce1a"),
    ("promise-toolbox", "0.21.0", "b6d7ebeef3130b34f47b70296361cb697a7877af19362f7be52fefb4541a650d"),
    ("struct-fu", "1.2.1", "ef2a8e3d4f694e00837500e37d548c78758d25c91c4f4491f14a13867cb56150"),
    ("uuid", "9.0.1", "9fa6f415a7d9f7f8ea48e45beeb567686261da85cd395901c54c3515589e3f7e"),
];

/// What the library is driven by.
const VHD_LIB_PROGRAM: &str = include_str!("vhd_lib.js");

/// Fetches into `target/peers/NAME` once; `None` where it cannot be had, which is said.
fn fetched(name: &str, fetch: impl FnOnce(&Path) -> Option<()>) -> Option<PathBuf> {
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("target/peers");
    let place = peers.join(name);
    if place.is_dir() {
        return Some(place);
    }
    fs::create_dir_all(&peers).ok()?;
    let draft = tempfile::tempdir_in(&peers).ok()?;
    if fetch(draft.path()).is_none() {
        #[expect(clippy::print_stderr, reason = "what is not compared has to be said, and the test goes on")]
        {
            eprintln!("NOT COMPARED: {name} cannot be had here");
        }
        return None;
    }
    // Another test may have been quicker.
    let _ = fs::rename(draft.keep(), &place);
    place.is_dir().then_some(place)
}

fn run<A: AsRef<OsStr>>(dir: &Path, program: &str, args: &[A]) -> Option<()> {
    let done = Command::new(program).args(args).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).status();
    done.ok()?.success().then_some(())
}

/// Xen Orchestra's library for VHDs.
#[derive(Clone, Debug)]
pub struct VhdLib(PathBuf);

impl VhdLib {
    /// The library, fetched once.
    pub fn get() -> Option<&'static Self> {
        static FETCHED: OnceLock<Option<VhdLib>> = OnceLock::new();
        FETCHED.get_or_init(|| fetched("vhd-lib-4.15.0", Self::fetch).map(Self)).as_ref()
    }

    fn fetch(dir: &Path) -> Option<()> {
        use sha2::{Digest as _, Sha256};
        for (name, version, sum) in VHD_LIB {
            run(dir, "npm", &["pack", "--silent", &format!("{name}@{version}")])?;
            let file = format!("{}-{version}.tgz", name.trim_start_matches('@').replace('/', "-"));
            let found = Sha256::digest(fs::read(dir.join(&file)).ok()?);
            let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, sum, "{name} of npm is another one");
            let to = format!("node_modules/{name}");
            fs::create_dir_all(dir.join(&to)).ok()?;
            run(dir, "tar", &["-xzf", &file, "-C", &to, "--strip-components=1"])?;
        }
        // Node has it itself by now.
        fs::create_dir_all(dir.join("node_modules/readable-stream")).ok()?;
        fs::write(dir.join("node_modules/readable-stream/index.js"), "module.exports = require('stream')\n").ok()?;
        run(dir, "node", &["--version"])
    }

    /// Runs the program with `words`, its verb first.
    ///
    /// # Panics
    /// It fails.
    pub fn run(&self, words: &[&OsStr]) {
        fs::write(self.0.join("vhd_lib.js"), VHD_LIB_PROGRAM).expect("write");
        let done = Command::new("node").current_dir(&self.0).arg("vhd_lib.js").args(words).output().expect("it runs");
        assert!(done.status.success(), "vhd-lib: {}", String::from_utf8_lossy(&done.stderr));
    }
}

/// Benji.
#[derive(Clone, Debug)]
pub struct Benji(PathBuf);

impl Benji {
    /// The program, fetched once.
    pub fn get() -> Option<&'static Self> {
        static FETCHED: OnceLock<Option<Benji>> = OnceLock::new();
        FETCHED.get_or_init(|| fetched("benji-0.17.0", Self::fetch).map(Self)).as_ref()
    }

    fn fetch(dir: &Path) -> Option<()> {
        fs::write(dir.join("benji.txt"), BENJI).ok()?;
        let pip = ["-m", "pip", "-q", "--disable-pip-version-check", "--no-input", "install", "--require-hashes"];
        run(dir, "python3", &[&pip[..], &["--no-deps", "-t", "site", "-r", "benji.txt"]].concat())?;
        Command::new("python3")
            .env("PYTHONPATH", dir.join("site"))
            .args(["-c", "import benji.scripts.benji"])
            .status()
            .ok()?
            .success()
            .then_some(())
    }

    /// A configuration for a storage in `folder`, whose objects are compressed if `zstd` says so, with an empty database.
    ///
    /// # Panics
    /// A file cannot be written, or Benji fails.
    pub fn begin(&self, folder: &Path, transform: Option<&str>) {
        let place = folder.display();
        let (active, named) = match transform {
            None => (String::new(), String::new()),
            Some(module) => {
                let more = match module {
                    "zstd" => "level: 1",
                    _ => "masterKey: AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
                };
                let named = format!("transforms:\n- name: t\n  module: {module}\n  configuration:\n    {more}\n");
                ("      activeTransforms: [t]\n".to_owned(), named)
            }
        };
        let text = format!(
            "configurationVersion: '1'\ndatabaseEngine: sqlite:///{place}/benji.sqlite\ndefaultStorage: s\nstorages:\n- name: s\n  \
             module: file\n  storageId: 1\n  configuration:\n      path: {place}/data\n{active}{named}ios:\n- name: file\n  module: file\n"
        );
        fs::create_dir_all(folder.join("data")).expect("a folder");
        fs::write(folder.join("benji.yaml"), text).expect("write");
        self.run(folder, &["database-init"]);
    }

    /// Runs a command with the configuration of `folder`.
    ///
    /// # Panics
    /// It fails.
    pub fn run(&self, folder: &Path, words: &[&str]) {
        let program = "import sys\nfrom benji.scripts.benji import main\nsys.exit(main())\n";
        let done = Command::new("python3")
            .env("PYTHONPATH", self.0.join("site"))
            .args(["-c", program, "-c"])
            .arg(folder.join("benji.yaml"))
            .args(words)
            .output()
            .expect("python3 runs");
        assert!(done.status.success(), "benji {words:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
}
