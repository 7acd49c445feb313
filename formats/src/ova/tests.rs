//! Archives made by hand. Real ones, made by tar, are compared in `tests/it/foreign/archive.rs`.

use super::*;
use crate::storage::MemoryStorage;

fn member(name: &str, kind: u8, data: &[u8]) -> Vec<u8> {
    let mut header = vec![0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    header[156] = kind;
    header[257..263].copy_from_slice(b"ustar\0");
    seal(&mut header);
    header.extend(data);
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header[..512].iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn open(parts: &[Vec<u8>]) -> Result<Ova> {
    Ova::open(Arc::new(MemoryStorage::new("made.ova", [&parts.concat()[..], &[0; 1024]].concat())))
}

#[test]
fn disks_are_found_by_their_names() {
    let long = "a".repeat(200) + ".vmdk";
    let pax = format!("{} path={long}\n", 4 + 6 + long.len());
    let ova = open(&[
        member("m.ovf", b'0', b"<x/>"),
        member("d/1.VMDK", b'0', &[1; 700]),
        member("x", b'x', pax.as_bytes()),
        member("short", b'0', b""),
        member("L", b'L', b"2.vmdk\0"),
        member("short", 0, b""),
    ])
    .expect("opens");
    assert_eq!(ova.disks().expect("disks"), ["d/1.VMDK", &long, "2.vmdk"]);
    assert!(ova.disk("d/1.VMDK").is_err(), "no disk inside");
    assert!(matches!(ova.disk("none"), Err(Error::ChainBroken { .. })));
}

#[test]
fn a_disk_that_needs_more_is_refused() {
    let text = |line: &str| {
        format!("# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{line}\n").into_bytes()
    };
    let ova = open(&[
        member("a.vmdk", b'0', &text("RW 8 FLAT \"/etc/passwd\" 0")),
        member("b.vmdk", b'0', &text("RW 8 ZERO\nparentFileNameHint=\"x\"")),
        member(
            "c.vmdk",
            b'0',
            String::from_utf8(text("RW 8 ZERO\nparentFileNameHint=\"x\""))
                .expect("text")
                .replace("ffffffff", "2")
                .as_bytes(),
        ),
    ])
    .expect("opens");
    assert!(matches!(ova.disk("a.vmdk"), Err(Error::ChainBroken { .. })));
    assert!(ova.disk("b.vmdk").is_ok());
    assert!(matches!(ova.disk("c.vmdk"), Err(Error::ChainBroken { .. })));
}

#[test]
fn hostile_archives_are_refused() {
    assert!(matches!(
        open(&[member("a.vmdk.000000000", b'0', b"")]).expect("opens").disks(),
        Err(Error::Unsupported { .. })
    ));
    assert!(matches!(open(&[member("a.vmdk.gz", b'0', b"")]).expect("opens").disks(), Err(Error::Unsupported { .. })));
    assert!(matches!(open(&[member("m.ovf", b'0', b"")]).expect("opens").disks(), Err(Error::Unsupported { .. })));
    let twice = [member("a.vmdk", b'0', b""), member("a.vmdk", b'0', b"")];
    assert!(matches!(open(&twice).expect("opens").disks(), Err(Error::Corrupt { .. })));
    let mut flipped = member("a.vmdk", b'0', b"");
    flipped[3] ^= 1;
    assert!(matches!(open(&[flipped]), Err(Error::Corrupt { .. })));
    for len in [&b"77777777777\0"[..], b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"] {
        let mut huge = member("a.vmdk", b'0', b"");
        huge[124..136].copy_from_slice(len);
        seal(&mut huge);
        assert!(matches!(open(&[huge]), Err(Error::Truncated { .. })));
    }
    for len in [b"99999999999\0", b"\x80\x01\0\0\0\0\0\0\0\0\0\0"] {
        let mut odd = member("a.vmdk", b'0', b"");
        odd[124..136].copy_from_slice(len);
        seal(&mut odd);
        assert!(matches!(open(&[odd]), Err(Error::Corrupt { .. })));
    }
    let crowd: Vec<Vec<u8>> = (0..5000).map(|_| member("a", b'0', b"")).collect();
    assert!(matches!(open(&crowd), Err(Error::Unsupported { .. })));
}
