//! The jail a door locks itself into once it has opened what it needs.

use serde::{Deserialize, Serialize};

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
