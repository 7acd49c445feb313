//! Promise A5: a disk whose writes could come to wait for themselves is refused, and nothing else is.

use std::{fs, path::PathBuf, process::Command};

use crate::harness::{BINARY, Outcome, Room};

#[expect(clippy::print_stdout, reason = "a test that is skipped says why")]
fn skipped(why: &str) {
    println!("skipped: {why}");
}

/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE`, what `PR_SET_IO_FLUSHER` sets.
const SPARED: u64 = 0x0018_0000;

/// A version 1 memory group with a limit, for as long as it lives.
struct Group(PathBuf);

impl Group {
    /// `None`, with the reason printed, where none can be made.
    fn new() -> Option<Self> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/memory/aquifer-test-{}", std::process::id()));
        let made = fs::create_dir(&path).and_then(|()| fs::write(path.join("memory.limit_in_bytes"), "268435456"));
        match made {
            Ok(()) => Some(Self(path)),
            Err(e) => {
                skipped(&format!("no version 1 memory group can be made here: {e}"));
                None
            }
        }
    }

    /// Runs `mount` with these words inside the group, without the right to be spared.
    fn mount(&self, room: &Room, words: &[&str]) -> Outcome {
        let enter =
            format!("echo $$ > {}/cgroup.procs && exec setpriv --bounding-set=-sys_resource \"$@\"", self.0.display());
        let mut command = Command::new("sh");
        command.args(["-c", &enter, "sh", BINARY, "mount"]).args(words).env("AQUIFER_HOME", room.path("home"));
        command.env("XDG_RUNTIME_DIR", room.dir.path()).current_dir(room.dir.path());
        Outcome::of(command.output().expect("a shell"))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes have ended; the kernel may need a moment to notice.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn disk(room: &Room) {
    fs::File::create(room.path("disk.raw")).and_then(|f| f.set_len(4 << 20)).expect("disk");
}

#[test]
fn a_loop_device_whose_writes_could_wait_for_themselves_is_refused() {
    let Some(group) = Group::new() else { return };
    let room = Room::new();
    disk(&room);
    let refused = group.mount(&room, &["raw:disk.raw", "--loop", "--writable", "--run", "true"]);
    assert_eq!(refused.code, 3, "{}{}", refused.stdout, refused.stderr);
    assert!(refused.stderr.contains("E_REFUSED") && refused.stderr.contains("CAP_SYS_RESOURCE"), "{}", refused.stderr);
    let served = group.mount(&room, &["raw:disk.raw", "--writable", "--run", "true"]);
    assert_eq!(served.code, 0, "over NBD nothing waits for itself: {}", served.stderr);
}

#[test]
fn only_who_serves_files_of_this_computer_is_spared_from_reclaim() {
    let room = Room::new();
    disk(&room);
    let flags = |more: &[&str]| -> u64 {
        let words = [&["mount", "raw:disk.raw", "--run", "cut -d' ' -f9 /proc/$PPID/stat"], more].concat();
        let out = room.ok(words);
        out.stdout.lines().find_map(|line| line.trim().parse().ok()).expect("flags")
    };
    assert_eq!(flags(&[]) & SPARED, 0);
    let fuse = flags(&["--fuse", "m"]) & SPARED;
    if fuse == 0 {
        skipped("without CAP_SYS_RESOURCE nobody is spared");
    } else {
        assert_eq!(fuse, SPARED);
    }
}
