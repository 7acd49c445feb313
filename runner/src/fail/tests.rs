//! Codes are unique, explained, and map to the exit codes of the contract.

use std::{collections::HashSet, io};

use super::*;

#[test]
fn codes_are_unique_and_explained() {
    let mut seen = HashSet::new();
    for code in Code::ALL {
        assert!(seen.insert(code.name()), "{} twice", code.name());
        assert!(code.text().len() > 40, "{} is not explained", code.name());
        assert_eq!(Code::find(code.name()), Some(*code));
        let allowed: &[u8] = if code.is_warning() { &[1] } else { &[2, 3, 4, 10, 11, 12, 13, 14, 130, 143] };
        assert!(allowed.contains(&code.exit()), "{} exits {}", code.name(), code.exit());
    }
    assert_eq!(Code::find("block_corrupt"), Some(Code::BlockCorrupt));
    assert_eq!(Code::find("E_NONSENSE"), None);
}

#[test]
fn what_where_and_cure_are_printed() {
    let error = io::Error::from_raw_os_error(libc::ENOSPC);
    let fail = Fail::from(aquifer_formats::Error::io("/r/a.aql", "write", 4096, error)).help("df -h /r");
    let text = fail.to_string();
    assert_eq!(fail.exit(), 2);
    assert!(text.starts_with("E_CAPACITY: no space left to write /r/a.aql\n"), "{text}");
    assert!(text.contains("\n  at: /r/a.aql, offset 4096, ENOSPC: No space left on device\n"), "{text}");
    assert!(text.ends_with("\n  do: df -h /r"), "{text}");
}

#[test]
fn damage_exits_fourteen_with_file_and_offset() {
    let bad = aquifer_formats::Error::BadBlock { path: "p".into(), offset: 7, len: 9, what: "checksum".into() };
    let fail = Fail::from(aquifer_vdisk::Error::from(bad));
    assert_eq!((fail.code, fail.exit()), (Code::BlockCorrupt, 14));
    let json = serde_json::to_value(FailRecord::from(&fail)).expect("json");
    assert_eq!(json["at"]["path"], "p");
    assert_eq!(json["at"]["offset"], 7);
    assert_eq!(json["retryable"], false);
}
