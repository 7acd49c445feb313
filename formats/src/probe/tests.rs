//! Magic numbers, and what must stay unknown.

use super::*;
use crate::storage::MemoryStorage;

fn probe_bytes(bytes: &[u8]) -> Option<Format> {
    probe(&MemoryStorage::new("m", bytes.to_vec())).expect("memory reads")
}

#[test]
fn magic_numbers_are_known_and_nothing_is_called_raw() {
    for (format, at, magic) in MAGICS {
        let mut bytes = vec![0; 600];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        assert_eq!(probe_bytes(&bytes), Some(format), "{format}");
    }
    for bytes in [&b""[..], b"Q", b"QFI\xfb", b"QFI\xfb\0\0\0\x01", &[0; 512], b"conectiy"] {
        assert_eq!(probe_bytes(bytes), None, "{bytes:?}");
    }
}

#[test]
fn a_footer_at_the_end_proves_nothing() {
    let mut bytes = vec![0; 4096];
    bytes[4096 - 512..][..8].copy_from_slice(b"conectix");
    assert_eq!(probe_bytes(&bytes), None);
}

#[test]
fn names_read_back() {
    for format in Format::ALL {
        assert_eq!(format.name().parse(), Ok(format));
        assert_eq!(serde_json::to_string(&format).expect("serialises"), format!("\"{format}\""));
    }
    assert_eq!("vpc".parse(), Ok(Format::Vhd));
    assert!("qcow3".parse::<Format>().is_err());
}
