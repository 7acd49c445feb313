//! The firmware rule, case by case.

use super::*;
use crate::host::partition::tests::{BIOS_BOOT, ESP, disk, sfdisk};

fn gpt(types: &[&str]) -> Vec<u8> {
    let parts: String = types.iter().map(|t| format!("size=2MiB, type={t}\n")).collect();
    sfdisk(32, &format!("label: gpt\n{parts}"))
}

fn mbr(script: &str) -> Vec<u8> {
    sfdisk(32, &format!("label: dos\n{script}"))
}

fn decided(described: Option<Firmware>, disks: Vec<Vec<u8>>) -> Decision {
    let disks: Vec<_> = disks.into_iter().zip(["vda", "vdb", "vdc"]).map(|(bytes, name)| disk(name, bytes)).collect();
    decide(described, &disks).expect("decide")
}

/// Name, description, disks; then firmware, rule, deciding disk.
type Case = (&'static str, Option<Firmware>, Vec<Vec<u8>>, Firmware, Rule, Option<&'static str>);

#[test]
fn the_matrix() {
    use Firmware::{Bios, Uefi};
    let empty = || vec![0u8; 1 << 20];
    let cases: Vec<Case> = vec![
        ("described wins over the disks", Some(Bios), vec![gpt(&[ESP])], Bios, Rule::Described, None),
        ("described UEFI over MBR", Some(Uefi), vec![mbr("type=83")], Uefi, Rule::Described, None),
        ("ESP on GPT", None, vec![gpt(&[ESP])], Uefi, Rule::EfiSystemPartition, Some("vda")),
        ("ESP on MBR, type 0xEF", None, vec![mbr("type=ef")], Uefi, Rule::EfiSystemPartition, Some("vda")),
        ("hybrid: ESP and BIOS boot", None, vec![gpt(&[BIOS_BOOT, ESP])], Uefi, Rule::EfiSystemPartition, Some("vda")),
        ("BIOS boot partition", None, vec![gpt(&[BIOS_BOOT])], Bios, Rule::BiosBootPartition, Some("vda")),
        ("GPT with neither", None, vec![gpt(&[])], Uefi, Rule::GptDisk, Some("vda")),
        ("plain MBR", None, vec![mbr("type=83")], Bios, Rule::Otherwise, None),
        ("empty disks", None, vec![empty(), empty()], Bios, Rule::Otherwise, None),
        ("no disks", None, vec![], Bios, Rule::Otherwise, None),
        ("GPT on a data disk only", None, vec![mbr("type=83"), gpt(&[])], Uefi, Rule::GptDisk, Some("vdb")),
        (
            "ESP on the second disk",
            None,
            vec![gpt(&[BIOS_BOOT]), gpt(&[ESP])],
            Uefi,
            Rule::EfiSystemPartition,
            Some("vdb"),
        ),
        (
            "BIOS boot beside a GPT data disk",
            None,
            vec![gpt(&[]), gpt(&[BIOS_BOOT])],
            Bios,
            Rule::BiosBootPartition,
            Some("vdb"),
        ),
    ];
    for (case, described, disks, firmware, rule, by) in cases {
        let decision = decided(described, disks);
        assert_eq!((decision.firmware, decision.rule, decision.disk.as_deref()), (firmware, rule, by), "{case}");
    }
}

#[test]
fn doubts_are_said() {
    let data_disk = decided(None, vec![mbr("type=83"), gpt(&[])]);
    assert!(data_disk.hints[0].contains("only vdb has GPT"), "{:?}", data_disk.hints);
    let hybrid = decided(None, vec![gpt(&[BIOS_BOOT, ESP])]);
    assert!(hybrid.hints[0].contains("also start by BIOS"), "{:?}", hybrid.hints);
    let mut damaged = gpt(&[ESP]);
    let last = damaged.len() - 512;
    damaged[512 + 16] ^= 1;
    damaged[last + 16] ^= 1;
    let decision = decided(None, vec![damaged]);
    assert_eq!(decision.firmware, Firmware::Uefi, "it was partitioned by GPT");
    assert!(decision.hints[0].contains("cannot be read"), "{:?}", decision.hints);
}

#[test]
fn the_rule_is_named_in_the_output() {
    assert_eq!(decided(None, vec![gpt(&[ESP])]).to_string(), "UEFI (vda has an EFI system partition)");
    assert_eq!(decided(None, vec![]).to_string(), "BIOS (no disk has GPT or an EFI system partition)");
}
