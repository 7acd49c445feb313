//! The jail a door locks itself into before it looks at anything a stranger may have written.
//!
//! Landlock bounds the files (the session's own folders for reading and writing, sources for reading,
//! nothing to execute), a system-call allow-list bounds everything else, and neither can be undone.
//!
//! Invariants
//! - What is in force is what is reported: each layer that a kernel lacks is named in
//!   [`Confinement::missing`], and the others hold all the same.
//! - A refused call fails with `EPERM`; it does not kill the process, so one request fails and the
//!   machine goes on.
//! - Paths stay allowed, not descriptors: a source that went away can be opened again.
//! - It holds for the calling thread and for every thread made by it later. Threads made before stay
//!   free; the only one a session makes before is the one that unmounts.
//!
//! Not here: which folders a session needs (`session`), limits of memory and processes (the service
//! manager's cgroup).

mod calls;

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};
use serde::{Deserialize, Serialize};

/// What the confined threads may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Jail {
    /// Folders and files to read and write, with all below.
    pub read_write: Vec<PathBuf>,
    /// Folders and files to read, with all below.
    pub read_only: Vec<PathBuf>,
}

/// What a process may still do, as told in its status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Landlock ABI in force; 0 where the kernel has none.
    pub landlock_abi: u32,
    /// Whether the system-call filter is in force.
    pub seccomp: bool,
    /// Whether no new privileges can be gained.
    pub no_new_privs: bool,
    /// What is missing, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

impl Confinement {
    /// A process that was not confined, and why.
    pub fn none(why: &str) -> Self {
        Self { missing: vec![why.to_owned()], ..Self::default() }
    }
}

/// Rights asked for. A newer kernel's further ones are left alone: among them is the right to connect to
/// sockets, which reach sources and hypervisors outside the session's folders.
const RIGHTS: ABI = ABI::V6;

/// Confines the calling thread, and every thread it makes from now on, as far as the kernel can.
/// Paths of `jail` that do not exist are passed over.
pub fn enter(jail: &Jail) -> Confinement {
    let mut out = Confinement::default();
    match restrict_files(jail) {
        Ok(status) => {
            out.no_new_privs = status.no_new_privs;
            out.landlock_abi = match status.landlock {
                LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
                LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
            };
            match status.ruleset {
                RulesetStatus::FullyEnforced => {}
                RulesetStatus::PartiallyEnforced => {
                    out.missing.push(format!("landlock: this kernel has only ABI {}", out.landlock_abi));
                }
                RulesetStatus::NotEnforced => out.missing.push("landlock: not in this kernel".to_owned()),
            }
        }
        Err(e) => out.missing.push(format!("landlock: {e}")),
    }
    match calls::filter() {
        Ok(()) => (out.seccomp, out.no_new_privs) = (true, true),
        Err(what) => out.missing.push(format!("seccomp: {what}")),
    }
    out
}

fn restrict_files(jail: &Jail) -> Result<landlock::RestrictionStatus, landlock::RulesetError> {
    let all = AccessFs::from_all(RIGHTS);
    let never: BitFlags<AccessFs> = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(RIGHTS))?
        .create()?
        .add_rules(path_beneath_rules(&jail.read_write, all & !never))?
        .add_rules(path_beneath_rules(&jail.read_only, read))?
        .restrict_self()
}
