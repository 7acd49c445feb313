//! Promise D6: the copy in the background leaves room for what the machine writes, says so, and goes on by itself when
//! there is more.

use std::{
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use aquifer_mount::session::{
    Options,
    control::Clients,
    space::{self, KEPT_BYTES},
    status::Phase,
};

use super::session::{Reap, Site, connect, status};

const MIB: u64 = 1 << 20;

/// A file system of so many MiB in memory, mounted for as long as this lives.
struct Small(PathBuf);

impl Small {
    fn on(dir: &Path, mib: u64) -> Self {
        mount(&["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"], dir);
        Self(dir.to_path_buf())
    }

    fn grow(&self, mib: u64) {
        mount(&["-o", &format!("remount,size={mib}m")], &self.0);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _status = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(args: &[&str], dir: &Path) {
    let done = Command::new("mount").args(args).arg(dir).status().expect("mount");
    assert!(done.success(), "mount {args:?}");
}

fn wait_for(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_copy_leaves_room_for_the_machine() {
    let tmp = tempfile::tempdir().expect("folder");
    let root = tmp.path().to_path_buf();
    let mounted = Small::on(&root, 440);
    let size = 96 << 20;
    let options = Options { journal_bytes: Some(8 << 20), ..Options::default() };
    let site = Site::within(tmp, size, options, Site::image);
    // Unmounted before its folder is removed.
    let small = mounted;
    let mut door = Reap(site.door());
    site.client().wait_for_door(Duration::from_secs(20)).expect("ready");
    let copy = || status(&site).disks[0].hydration.clone().expect("a copy");
    wait_for("the copy stops", || copy().phase == Phase::NoSpace);
    let free = space::free(&root).expect("free");
    assert!((KEPT_BYTES - 16 * MIB..=KEPT_BYTES + 16 * MIB).contains(&free), "{} MiB are left", free / MIB);
    assert!(copy().done > 0 && copy().error.is_some_and(|why| why.contains("kept")));

    // The machine writes where nothing is local, and reads what is not.
    let mut model = site.bytes.clone();
    let mut client = connect(&site);
    let at = 80 << 20;
    client.seek(SeekFrom::Start(at as u64)).expect("seek");
    client.write_all(&vec![0x5A; 4 << 20]).expect("write");
    client.flush().expect("flush");
    model[at..at + (4 << 20)].fill(0x5A);
    let mut found = vec![0; 8 << 20];
    client.seek(SeekFrom::Start((at - (2 << 20)) as u64)).expect("seek");
    client.read_exact(&mut found).expect("read");
    assert!(found == model[at - (2 << 20)..at + (6 << 20)]);
    drop(client);
    let told = |event: &str| site.folder.events().expect("events").iter().any(|e| e.op == event);
    wait_for("that is told", || told("space_short"));
    assert!(!told("space_back"));

    small.grow(640);
    wait_for("the copy ends", || status(&site).is_local());
    wait_for("that is told too", || told("space_back"));
    let mut client = connect(&site);
    let mut all = vec![0; size];
    all.chunks_mut(8 << 20).for_each(|part| client.read_exact(part).expect("read"));
    assert!(all == model);
    drop(client);
    site.client().stop(Clients::Disconnect).expect("stop");
    assert!(door.0.wait().expect("wait").success());
}
