//! Doors that die, end, or refuse to end; `sh` stands for the door.

use std::{cell::Cell, path::PathBuf};

use aquifer_vdisk::ChainSpec;
use jiff::Timestamp;

use super::*;
use crate::session::{DiskSpec, Options, Spec};

fn folder(states: &[State]) -> (tempfile::TempDir, Folder) {
    let tmp = tempfile::tempdir().expect("tempdir");
    let dir: PathBuf = fs::canonicalize(tmp.path()).expect("path").join("s");
    let chain = ChainSpec::Nbd { uri: "nbd://backup/vda".into() };
    let disk = DiskSpec { name: "vda".into(), chain, size: 4096, fingerprint: "ab".repeat(32) };
    let spec = Spec::new("db", &dir, Path::new("/run/a"), vec![disk], Options::default(), Timestamp::now());
    let folder = Folder::create(&spec.expect("spec")).expect("create");
    for state in states {
        folder.transition(*state, "test", None).expect("legal");
    }
    (tmp, folder)
}

const MOUNTED: &[State] = &[State::Preparing, State::Mounting, State::Mounted];
const QUICK: Policy = Policy {
    deaths_max: 3,
    window: Duration::from_secs(60),
    pause: Duration::from_millis(1),
    pause_max: Duration::from_millis(5),
};

fn sh(text: &str) -> io::Result<Child> {
    Command::new("sh").args(["-c", text]).spawn()
}

#[test]
fn a_door_that_dies_is_started_again() {
    let (_tmp, folder) = folder(MOUNTED);
    let starts = Cell::new(0);
    let mut start = |_: Stdio| {
        starts.set(starts.get() + 1);
        sh(if starts.get() < 3 { "kill -9 $$" } else { "exit 0" })
    };
    supervise(&folder, QUICK, &mut start, &|| false).expect("ended in order");
    assert_eq!(starts.get(), 3);
    assert_eq!(folder.load().expect("load").state, State::Interrupted, "until a door says otherwise");
    let events = folder.events().expect("events");
    let died: Vec<_> = events.iter().filter(|e| e.op == "door_died").map(|e| e.reason.as_deref()).collect();
    assert_eq!(died, [Some("signal 9"), Some("signal 9")]);
}

#[test]
fn a_door_that_keeps_dying_is_given_up() {
    let (_tmp, folder) = folder(&MOUNTED[..2]);
    let starts = Cell::new(0);
    let mut start = |_: Stdio| {
        starts.set(starts.get() + 1);
        sh("exit 7")
    };
    let given_up = supervise(&folder, QUICK, &mut start, &|| false).expect_err("given up");
    assert!(matches!(given_up, Error::KeepsDying { times: 3, ref how, .. } if how == "exit code 7"), "{given_up}");
    assert_eq!(starts.get(), 3);
    let record = folder.load().expect("load");
    assert_eq!(record.state, State::Failed, "it was never mounted");
    assert!(record.reason.is_some_and(|r| r.contains("exit code 7")));
}

#[test]
fn a_session_that_is_over_gets_no_door() {
    let (_tmp, folder) = folder(&[State::Dismounting]);
    supervise(&folder, QUICK, &mut |_| panic!("started"), &|| false).expect("nothing to do");
}

#[test]
fn a_wish_to_stop_reaches_the_door() {
    let (_tmp, folder) = folder(MOUNTED);
    let began = Instant::now();
    let stop = || began.elapsed() > Duration::from_millis(200);
    supervise(&folder, QUICK, &mut |_| sh("trap 'exit 0' TERM; while :; do sleep 0.05; done"), &stop).expect("stopped");
    assert!(began.elapsed() < Duration::from_secs(5), "took {:?}", began.elapsed());
    assert_eq!(folder.load().expect("load").state, State::Mounted, "no death");
}

#[test]
fn a_living_door_is_taken_over() {
    let (_tmp, folder) = folder(MOUNTED);
    let lock = folder.own().expect("own");
    let began = Instant::now();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(lock);
    });
    let started = Cell::new(None);
    let mut start = |_: Stdio| {
        started.set(Some(began.elapsed()));
        sh("exit 0")
    };
    supervise(&folder, QUICK, &mut start, &|| false).expect("ended in order");
    other.join().expect("join");
    assert!(started.get().is_some_and(|t| t >= Duration::from_millis(300)), "{:?}", started.get());
}

#[test]
fn a_long_log_is_set_aside() {
    let tmp = tempfile::tempdir().expect("tempdir");
    let log = tmp.path().join("door.log");
    File::create(&log).and_then(|f| f.set_len(LOG_BYTES_MAX + 1)).expect("long");
    let mut door = spawn_detached(Command::new("sh").args(["-c", "echo out; echo err >&2"]), &log).expect("spawn");
    assert!(door.wait().expect("wait").success());
    assert_eq!(fs::read_to_string(&log).expect("log"), "out\nerr\n");
    assert!(tmp.path().join("door.log.1").exists());
}

#[test]
fn nobody_waits_in_the_queue_of_a_supervisor_whose_place_was_taken() {
    use std::{io::Read, os::unix::net::UnixStream};

    let tmp = tempfile::tempdir().expect("tempdir");
    let dir: PathBuf = fs::canonicalize(tmp.path()).expect("path").join("s");
    let chain = ChainSpec::Nbd { uri: "nbd://backup/vda".into() };
    let disk = DiskSpec { name: "vda".into(), chain, size: 4096, fingerprint: "ab".repeat(32) };
    let spec = Spec::new("db", &dir, &tmp.path().join("r"), vec![disk], Options::default(), Timestamp::now());
    let spec = spec.expect("spec");
    let folder = Folder::create(&spec).expect("create");
    for state in MOUNTED {
        folder.transition(*state, "test", None).expect("legal");
    }
    let (caller, place) = (Cell::new(None), Cell::new(None));
    let mut start = |_: Stdio| {
        // A machine that reconnects; its door dies, and another one takes the place before the next is started.
        let stream = UnixStream::connect(spec.nbd_socket()).expect("connect");
        caller.set(Some(stream));
        place.set(Some(folder.own().expect("own")));
        fs::remove_file(spec.nbd_socket()).expect("the other one's");
        fs::write(spec.nbd_socket(), "").expect("the other one's");
        sh("kill -9 $$")
    };
    // Looked at while it waits: once it has ended, its queue is gone anyhow.
    let (looks, released) = (Cell::new(0), Cell::new(false));
    let stop = || {
        looks.set(looks.get() + 1);
        if let Some(mut stream) = caller.take() {
            stream.set_nonblocking(true).expect("a socket");
            released
                .set(stream.read(&mut [0; 8]).map_or_else(|e| e.kind() == io::ErrorKind::ConnectionReset, |n| n == 0));
            caller.set(Some(stream));
        }
        released.get() || looks.get() > 100
    };
    supervise(&folder, QUICK, &mut start, &stop).expect("it was told to stop");
    assert!(released.get(), "the caller still waits");
    assert!(spec.nbd_socket().exists(), "the other one's socket stays");
}
