//! The `qemu` host, on doors of another server: a machine starts, is steered, moved and turned off, and every step is
//! seen on the machine itself.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

use aquifer_runner::host::{
    Bus, Disk, Door, Error, Happening, Host, Network, Places, Power, Running, Shape, firmware::Firmware, qemu::Qemu,
};
use aquifer_tests::boot_sector;

const SOON: Duration = Duration::from_secs(30);

/// A machine's folder with a disk and a peer's server for it. Ends what it started.
struct Stage {
    dir: tempfile::TempDir,
    server: Option<Child>,
    running: Option<Running>,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("folder");
        fs::write(dir.path().join("source.raw"), boot_sector::disk(16, 8)).expect("disk");
        let mut stage = Self { dir, server: None, running: None };
        stage.serve();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn serve(&mut self) {
        let (socket, disk) = (self.path("nbd.sock"), self.path("source.raw"));
        let _ = fs::remove_file(&socket);
        let server = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=8", "--format=raw", "--export-name=vda", "--socket"])
            .arg(&socket)
            .arg(&disk)
            .spawn();
        self.server = Some(server.expect("qemu-nbd"));
        eventually("the server listens", || socket.exists().then_some(()));
    }

    fn kill_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().expect("kill");
            server.wait().expect("reap");
        }
    }

    fn places(&self) -> Places {
        Places { dir: self.dir.path().into(), runtime_dir: self.dir.path().into() }
    }

    fn door(&self) -> Door {
        Door { socket: self.path("nbd.sock"), export: "vda".into(), reconnect_s: 30 }
    }

    fn start(&mut self) -> Running {
        let running = Qemu.start(&shape(), &[self.door().into()], &self.places()).expect("start");
        self.running = Some(running.clone());
        running
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            let _ = Qemu.power_off(running);
        }
        self.kill_server();
    }
}

fn shape() -> Shape {
    Shape {
        name: "test".into(),
        uuid: uuid::Uuid::nil(),
        firmware: Firmware::Bios,
        machine_type: None,
        variables: None,
        memory: 64 << 20,
        cpus: 1,
        disks: vec![Disk { name: "vda".into(), bus: Bus::Virtio, boot_order: None }],
        nics: Vec::new(),
        network: Network::None,
    }
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn said(running: &Running) -> String {
    fs::read_to_string(&running.console_log).unwrap_or_default()
}

/// What it said about sectors.
fn seen(running: &Running) -> String {
    said(running).split_once("READY").map(|(_, seen)| seen.to_owned()).unwrap_or_default()
}

/// Waits until the guest has gone through `more` further sectors.
fn goes_on(running: &Running, more: usize) {
    let before = seen(running).matches('.').count();
    eventually("the guest goes on", || (seen(running).matches('.').count() >= before + more).then_some(()));
    assert!(!seen(running).contains(['X', 'E']), "the guest saw wrong bytes or an error: {}", seen(running));
}

fn type_at_console(running: &Running, text: &str) {
    use std::io::Write;
    let mut console = std::os::unix::net::UnixStream::connect(&running.console).expect("console");
    console.write_all(text.as_bytes()).expect("type");
    console.shutdown(std::net::Shutdown::Write).expect("end");
}

#[test]
fn a_machine_outlives_its_door_and_moves_to_its_own_file() {
    let mut stage = Stage::new();
    let running = stage.start();
    assert_eq!(Qemu.power(&running).expect("power"), Power::Running);
    eventually("the guest speaks", || said(&running).contains("READY").then_some(()));
    goes_on(&running, 3);

    // The door goes and comes back: the guest waits and never knows.
    stage.kill_server();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(Qemu.power(&running).expect("power"), Power::Running, "it waits inside a request");
    stage.serve();
    goes_on(&running, 3);

    // A full copy of what the door holds, then the move; from there on the door may go.
    eventually("one whole round", || seen(&running).contains('R').then_some(()));
    let local = stage.path("local.raw");
    fs::copy(stage.path("source.raw"), &local).expect("copy");
    let pivot = Qemu.pivot(&running, 0, &local).expect("pivot");
    assert!(pivot.pause_us > 0 && pivot.pause_us < 5_000_000, "{pivot:?}");
    assert_eq!(Qemu.pivot(&running, 0, &local).expect("again").pause_us, 0, "it is there already");
    stage.kill_server();
    fs::remove_file(stage.path("source.raw")).expect("the source is gone");
    goes_on(&running, 40);

    type_at_console(&running, "q");
    eventually("it turns itself off", || (Qemu.power(&running).expect("power") == Power::Off).then_some(()));
    let disk = fs::read(&local).expect("disk");
    assert!(disk == boot_sector::after_a_round(&boot_sector::disk(16, 8)), "the guest's own copies, nothing else");
}

#[test]
fn a_failed_start_names_the_cause_and_leaves_nothing() {
    let mut stage = Stage::new();
    stage.kill_server();
    let error = Qemu.start(&shape(), &[stage.door().into()], &stage.places()).expect_err("no door");
    match &error {
        Error::Start { said, .. } => assert!(said.contains("nbd.sock"), "{said}"),
        other => panic!("{other}"),
    }
    let left: Vec<_> = fs::read_dir(stage.dir.path()).expect("list").flatten().map(|e| e.file_name()).collect();
    let sockets = left.iter().filter(|n| n.to_string_lossy().ends_with(".sock") && *n != "nbd.sock").count();
    assert_eq!(sockets, 0, "{left:?}");
}

#[test]
fn what_happens_is_told_until_it_is_gone() {
    let mut stage = Stage::new();
    let running = stage.start();
    let followed = running.clone();
    let (tell, told) = crossbeam_channel::unbounded();
    let follower = std::thread::spawn(move || {
        Qemu.follow(&followed, Duration::from_millis(50), &mut |happening| {
            happening.is_none_or(|h| tell.send(h).is_ok())
        })
    });
    eventually("the guest speaks", || seen(&running).contains('.').then_some(()));
    type_at_console(&running, "q");
    let all: Vec<_> = told.iter().collect();
    assert!(all.contains(&Happening::PoweredOff), "{all:?}");
    assert_eq!(all.last(), Some(&Happening::Gone));
    follower.join().expect("thread").expect("followed");
    assert_eq!(Qemu.power(&running).expect("power"), Power::Off);
}

#[test]
fn a_failing_disk_stops_the_machine_and_it_can_go_on() {
    let mut stage = Stage::new();
    let door = Door { reconnect_s: 1, ..stage.door() };
    let running = Qemu.start(&shape(), &[door.into()], &stage.places()).expect("start");
    stage.running = Some(running.clone());
    eventually("the guest works", || seen(&running).contains('.').then_some(()));
    stage.kill_server();
    eventually("it is stopped", || (Qemu.power(&running).expect("power") == Power::IoError).then_some(()));
    stage.serve();
    eventually("it goes on", || Qemu.resume(&running).ok());
    goes_on(&running, 3);
}

#[test]
fn a_machine_is_never_started_beside_itself() {
    let mut stage = Stage::new();
    // Several at once, as two commands that bring a session back; and once more, as after one that was killed before
    // it could write down what it had started.
    let started: Vec<Running> = std::thread::scope(|scope| {
        let start = || Qemu.start(&shape(), &[stage.door().into()], &stage.places()).expect("start");
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().expect("thread")).collect()
    });
    stage.running = started.first().cloned();
    let again = stage.start();
    assert!(started.iter().all(|running| *running == again), "{started:?}");
    eventually("the guest works", || seen(&again).contains('.').then_some(()));
    Qemu.power_off(&again).expect("off");
    assert_ne!(stage.start().process, again.process, "one that is gone is no hindrance");
}

#[test]
fn files_and_sockets_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let mut stage = Stage::new();
    let running = stage.start();
    for path in [&running.orders, &running.events, &running.console, &running.console_log] {
        let mode = fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
    }
    let own = fs::read_to_string(format!("/proc/{}/status", running.process.pid)).expect("status");
    assert!(own.lines().any(|l| l.starts_with("Seccomp:") && l.ends_with('2')), "QEMU runs in its sandbox");
}
