//! The program itself, as its users run it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The binary `aquifer` of this very source, in the profile of the tests. Built if it is not there or is old.
///
/// # Panics
/// It cannot be built.
pub fn aquifer() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let deps = std::env::current_exe().expect("the test knows itself");
        let profile = deps.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--offline", "-p", "aquifer", "--bin", "aquifer"]);
        if profile.file_name().is_some_and(|name| name == "release") {
            build.arg("--release");
        }
        // What cargo sets for a test would make another build of it, and then another for the next test.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            let cargos = name.starts_with("CARGO") && !["CARGO_HOME", "CARGO_TARGET_DIR"].contains(&&*name);
            if cargos || name == "LD_LIBRARY_PATH" || name == "RUST_RECURSION_COUNT" {
                build.env_remove(name);
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let built = build.current_dir(root).status().expect("cargo");
        assert!(built.success(), "aquifer cannot be built");
        profile.join("aquifer")
    })
}
