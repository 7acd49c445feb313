//! Overlays that a mount keeps.

use std::fs;

use crate::{
    harness::Room,
    images::{must, write},
};

#[test]
fn an_overlay_whose_making_was_cut_off_is_made_anew() {
    let room = Room::new();
    write(&room.path("vm.img"), &vec![7; 1 << 20]);
    must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &room.text("vm.img"), &room.text("vm.qcow2")]);
    let mount = |what: &str| {
        let run = format!("qemu-io -f raw -c '{what}' \"$uri\"");
        room.ok(["mount", "vm.qcow2", "--writable", "--overlay", "kept/here", "--run", &run]);
    };
    mount("write -P 8 4096 4096");
    let names = || {
        let list = fs::read_dir(room.path("kept/here")).expect("a folder").flatten();
        list.map(|entry| entry.file_name().into_string().expect("utf-8")).collect::<Vec<_>>()
    };
    let [name] = &names()[..] else { panic!("one overlay and nothing else: {:?}", names()) };
    let overlay = room.path("kept/here").join(name);
    mount("read -P 8 4096 4096");
    // As a kill in the middle leaves it.
    let draft = room.path("kept/here").join(format!(".{name}.new"));
    fs::rename(&overlay, &draft).expect("rename");
    fs::write(draft.join("map"), b"").expect("an empty map");
    mount("read -P 7 4096 4096");
    assert_eq!(names(), std::slice::from_ref(name));
}
