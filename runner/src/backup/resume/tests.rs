//! What proves that a source has not changed.

use std::{path::Path, process::Command, sync::Arc};

use aquifer_vdisk::{BlockCache, ChainSpec, open_chain};

use super::*;

fn qemu(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_data_file_beside_an_image_is_part_of_the_source() {
    let dir = tempfile::tempdir().expect("a folder");
    let text = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    let (image, option) = (text("vm.qcow2"), format!("data_file={},data_file_raw=on", text("vm.data")));
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, &image, "1M"]);
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &image]);
    let look = || {
        let path = Path::new(&image).to_path_buf();
        let spec = ChainSpec::Image { path, format: None, allow_backing: Vec::new(), snapshot: None };
        let nobody = |uri: &str| panic!("{uri}");
        let chain = open_chain(&spec, Arc::new(BlockCache::new(0)), &nobody).expect("a chain");
        files::of_chain(&chain).expect("files")
    };
    let before = look();
    assert_eq!(before, look());
    qemu("qemu-io", &["-f", "raw", "-c", "write -P 2 4k 4k", &text("vm.data")]);
    assert_ne!(before, look(), "the data has changed, whatever the image says");
}
