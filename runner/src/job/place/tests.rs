//! Which images of a folder are a machine's disks.

use std::fs;

use super::{Place, images_in};
use crate::fail::Code;

#[test]
fn images_are_disks_by_their_names_and_two_of_one_name_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let put = |name: &str| fs::write(folder.path().join(name), b"").expect("an image");
    for name in ["vdb.raw", "vda.qcow2", "notes.txt", ".hidden.img"] {
        put(name);
    }
    let names: Vec<_> =
        images_in(folder.path()).expect("disks").into_iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(names, ["vda", "vdb"]);
    put("vda.raw");
    let refused = images_in(folder.path()).expect_err("two disks of one name");
    assert_eq!(refused.code, Code::Refused);
    assert!(refused.what.contains("vda.qcow2 and vda.raw"), "{}", refused.what);
    let help = refused.do_.expect("a command").to_string();
    assert!(help.starts_with(&format!("ls -l {}", folder.path().display())), "{help}");
}

#[test]
fn an_image_that_is_called_like_a_copy_of_another_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["vda.qcow2", "vda-old.qcow2", "vda.bak.raw", "vdab.raw", "data.img"] {
        fs::write(folder.path().join(name), b"").expect("an image");
    }
    let place = |description| Place {
        folder: folder.path().to_path_buf(),
        runtime: folder.path().to_path_buf(),
        description,
        variables: None,
        disks: images_in(folder.path()).expect("disks"),
    };
    let told = place(None).doubtful(&[]);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].starts_with("vda-old.qcow2 beside vda.qcow2 is taken for a disk of its own"), "{told:?}");
    assert!(told[1].starts_with("vda.bak.raw beside vda.qcow2"), "{told:?}");
    assert_eq!(place(None).doubtful(&["vda-old".into()]).len(), 1, "one that is left out is no question");
    assert!(place(Some("machine.toml".into())).doubtful(&[]).is_empty(), "somebody has said which are its disks");
}
