//! Where the distribution keeps OVMF.
//!
//! QEMU's own descriptors say it (`firmware/*.json`, read in the order of their names, the administrator's folder
//! first); two well-known places are tried after them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::host::{Error, Result};

const DESCRIPTORS: [&str; 2] = ["/etc/qemu/firmware", "/usr/share/qemu/firmware"];

const KNOWN: [(&str, &str); 2] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];

/// OVMF: its code, and the empty variables a machine starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FirmwareFiles {
    pub(super) code: PathBuf,
    pub(super) variables: PathBuf,
}

impl FirmwareFiles {
    /// The first that is there; for a machine that brings variables along, the first whose own have that length.
    pub(super) fn find(variables: Option<u64>) -> Result<Self> {
        let described = DESCRIPTORS.iter().flat_map(|dir| descriptors(Path::new(dir)));
        let described = described.filter_map(|path| from_descriptor(&fs::read_to_string(path).ok()?));
        let known = KNOWN.iter().map(|(code, vars)| Self { code: code.into(), variables: vars.into() });
        let mut all = described.chain(known);
        let length = |files: &Self| fs::metadata(&files.variables).ok().filter(fs::Metadata::is_file).map(|m| m.len());
        let there = |files: &Self| length(files).filter(|_| files.code.is_file());
        let found = all.find(|files| there(files).is_some_and(|len| variables.is_none_or(|own| own == len)));
        found.ok_or_else(|| match variables {
            Some(bytes) if Self::find(None).is_ok() => Error::Variables { bytes },
            _ => Error::Missing { what: "UEFI firmware (OVMF)", looked: DESCRIPTORS.join(", ") },
        })
    }
}

fn descriptors(dir: &Path) -> Vec<PathBuf> {
    let mut out: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    out.retain(|path| path.extension().is_some_and(|e| e == "json"));
    out.sort();
    out
}

/// The files of a descriptor, if they start a q35 machine from flash without secure boot (which needs SMM and would
/// refuse what the original's own keys signed).
fn from_descriptor(text: &str) -> Option<FirmwareFiles> {
    let json: Value = serde_json::from_str(text).ok()?;
    let has = |list: &Value, word: &str| list.as_array().is_some_and(|l| l.iter().any(|v| v == word));
    let mapping = json.get("mapping")?;
    let raw_flash = mapping.get("device")? == "flash" && mapping.pointer("/executable/format")? == "raw";
    let q35 = json.get("targets")?.as_array()?.iter().any(|target| {
        let machines = target.get("machines").and_then(Value::as_array);
        target.get("architecture").is_some_and(|a| a == "x86_64")
            && machines.is_some_and(|m| m.iter().filter_map(Value::as_str).any(|m| m.starts_with("pc-q35")))
    });
    let features = json.get("features")?;
    let plain = !has(features, "requires-smm") && !has(features, "enrolled-keys");
    if !(has(json.get("interface-types")?, "uefi") && raw_flash && q35 && plain) {
        return None;
    }
    let file = |at: &str| mapping.pointer(at).and_then(Value::as_str).map(PathBuf::from);
    Some(FirmwareFiles { code: file("/executable/filename")?, variables: file("/nvram-template/filename")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(features: &str, machine: &str) -> String {
        format!(
            r#"{{"interface-types": ["uefi"], "mapping": {{"device": "flash",
            "executable": {{"filename": "/code", "format": "raw"}}, "nvram-template": {{"filename": "/vars", "format": "raw"}}}},
            "targets": [{{"architecture": "x86_64", "machines": ["{machine}"]}}], "features": [{features}]}}"#
        )
    }

    #[test]
    fn only_plain_firmware_for_the_board_is_taken() {
        let found = from_descriptor(&descriptor("\"acpi-s3\"", "pc-q35-*"));
        assert_eq!(found, Some(FirmwareFiles { code: "/code".into(), variables: "/vars".into() }));
        assert_eq!(from_descriptor(&descriptor("\"requires-smm\", \"secure-boot\"", "pc-q35-*")), None);
        assert_eq!(from_descriptor(&descriptor("\"enrolled-keys\"", "pc-q35-*")), None);
        assert_eq!(from_descriptor(&descriptor("", "pc-i440fx-*")), None);
        assert_eq!(from_descriptor("{"), None);
    }

    #[test]
    fn the_machine_that_runs_the_tests_has_some() {
        let found = FirmwareFiles::find(None).expect("ovmf is installed by scripts/setup.sh");
        assert!(found.code.is_file());
        let own = fs::metadata(&found.variables).expect("variables").len();
        assert!(FirmwareFiles::find(Some(own)).is_ok());
        assert!(matches!(FirmwareFiles::find(Some(own + 1)), Err(Error::Variables { .. })));
    }
}
