//! Names that lead elsewhere, and objects that are none.

use std::{fs, os::unix::fs::symlink};

use super::*;

#[test]
fn names_lead_beneath_the_folder_and_to_files_only() {
    let dir = tempfile::tempdir().expect("a folder");
    let inside = dir.path().join("store");
    fs::create_dir_all(inside.join("a/b")).expect("folders");
    fs::write(dir.path().join("secret"), b"s").expect("write");
    fs::write(inside.join("a/b/c"), b"abc").expect("write");
    symlink(dir.path().join("secret"), inside.join("link")).expect("a link");
    let folder = Folder::open(&inside).expect("opens");
    let found = folder.find("a/b/c").expect("looks").expect("is there");
    assert_eq!(whole(&found, 3, |bytes| Ok(bytes.to_vec())).expect("reads"), b"abc");
    assert!(matches!(whole(&found, 2, |_| Ok(())), Err(Error::BadBlock { .. })), "longer than it may be");
    for name in ["../secret", "link", "/etc/passwd", "a/../../secret"] {
        assert!(matches!(folder.find(name), Err(Error::Io { .. })), "{name}");
    }
    assert!(matches!(folder.find("a/b"), Err(Error::Refused { .. })), "a folder is no object");
    assert!(folder.find("a/none").expect("looks").is_none());
    assert!(matches!(folder.object("none", "x"), Err(Error::ChainBroken { .. })));
}

#[test]
fn digits_go_both_ways() {
    assert_eq!(from_hexadecimal(&hexadecimal(&[0, 0x7f, 0xff])), Some([0, 0x7f, 0xff]));
    for text in ["", "0", "001", "0g", "zz", "00ff0"] {
        assert_eq!(from_hexadecimal::<1>(text), None, "{text}");
    }
}
