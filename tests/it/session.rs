//! Promise: a recovery session outlives whatever happens to its processes. One process serves it, what
//! it says is so, what it acknowledged stays, and nothing it is told or shown makes it hang.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::{
        fs::{FileExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use aquifer_formats::probe::Format;
use aquifer_mount::session::{
    Access, Client, Confine, DiskSpec, Error, Folder, Hydrate, NoHooks, Options, Policy, Serving, Spec, State, Status,
    control::{Clients, Setting},
    hexadecimal, inherited_listener, serve,
    status::{Door, Phase},
    supervise,
};
use aquifer_tests::{
    door::{nbd_layer, pattern, scale},
    rng::Rng,
};
use aquifer_vdisk::{BlockCache, ChainSpec, open_chain};
use nbd::client::{NbdClient, handshake};

/// A source image and a session on it that nobody serves yet.
pub(super) struct Site {
    _tmp: tempfile::TempDir,
    pub(super) source: PathBuf,
    pub(super) bytes: Vec<u8>,
    pub(super) folder: Folder,
}

impl Site {
    pub(super) fn new(size: usize, options: Options) -> Self {
        Self::over(size, options, Self::image)
    }

    /// A chain that is this raw image.
    pub(super) fn image(source: &Path) -> ChainSpec {
        let (path, format) = (source.to_path_buf(), Some(Format::Raw));
        ChainSpec::Image { path, format, allow_backing: Vec::new(), snapshot: None }
    }

    /// A session on whatever `chain` makes of an image.
    pub(super) fn over(size: usize, options: Options, chain: impl FnOnce(&Path) -> ChainSpec) -> Self {
        Self::within(tempfile::tempdir().expect("tempdir"), size, options, chain)
    }

    /// The same, all of it in this folder.
    pub(super) fn within(
        tmp: tempfile::TempDir,
        size: usize,
        options: Options,
        chain: impl FnOnce(&Path) -> ChainSpec,
    ) -> Self {
        let root = fs::canonicalize(tmp.path()).expect("path");
        fs::create_dir(root.join("source")).expect("folder");
        let source = root.join("source/vda.img");
        let bytes = pattern(size, 1);
        fs::write(&source, &bytes).expect("source");
        let chain = chain(&source);
        let opened = open_chain(&chain, Arc::new(BlockCache::new(0)), &nbd_layer).expect("chain");
        let fingerprint = hexadecimal(&opened.fingerprint().expect("fingerprint"));
        let disk = DiskSpec { name: "vda".into(), chain, size: opened.size(), fingerprint };
        let now = "2026-11-21T00:00:00Z".parse().expect("time");
        let spec = Spec::new("db01", &root.join("session"), &root.join("run"), vec![disk], options, now).expect("spec");
        let folder = Folder::create(&spec).expect("create");
        for state in [State::Preparing, State::Mounting] {
            folder.transition(state, "test", None).expect("legal");
        }
        Self { _tmp: tmp, source, bytes, folder }
    }

    pub(super) fn client(&self) -> Client {
        Client::of(self.folder.clone())
    }

    /// Serves in another process until it is killed or told to stop.
    pub(super) fn door(&self) -> Child {
        door_process(self.folder.dir(), Stdio::null())
    }

    pub(super) fn spec(&self) -> Spec {
        self.folder.load().expect("record")
    }

    fn image_opts(&self) -> String {
        let socket = self.spec().nbd_socket();
        let nbd = "file.driver=nbd,file.server.type=unix,file.export=vda,file.reconnect-delay=30";
        format!("driver=raw,{nbd},file.server.path={}", socket.display())
    }
}

fn door_process(dir: &Path, input: Stdio) -> Child {
    Command::new(std::env::current_exe().expect("self"))
        .args(["--exact", "session::door_for_another_process", "--ignored", "--nocapture"])
        .env("AQUIFER_TEST_SESSION", dir)
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("spawn")
}

/// The other process of these tests; does nothing when run by itself.
#[test]
#[ignore = "run by the other tests here"]
fn door_for_another_process() {
    let Ok(dir) = std::env::var("AQUIFER_TEST_SESSION") else { return };
    let folder = Folder::open(Path::new(&dir)).expect("folder");
    serve_here(&folder, &|| false).expect("serve");
}

fn serve_here(folder: &Folder, stop: &(dyn Fn() -> bool + Sync)) -> Result<(), Error> {
    let confine = Confine::Reading(Vec::new());
    let listener = inherited_listener().expect("standard input");
    let hooks = Arc::new(NoHooks);
    serve(folder, &Serving { connect: nbd_layer, hooks, confine, listener, supervisor: None, stop })
}

/// Kills a process that a failing test leaves behind.
pub(super) struct Reap(pub(super) Child);

impl Drop for Reap {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Raises flags when it goes.
pub(super) struct Raise<'a>(pub(super) &'a [&'a AtomicBool]);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|flag| flag.store(true, Ordering::SeqCst));
    }
}

pub(super) fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(super) fn connect(site: &Site) -> NbdClient<UnixStream> {
    let mut stream = UnixStream::connect(site.spec().nbd_socket()).expect("connect");
    let export = handshake(&mut stream, b"vda").expect("handshake");
    NbdClient::new(stream, &export)
}

pub(super) fn status(site: &Site) -> Status {
    site.client().status().expect("status")
}

#[test]
fn a_session_from_the_first_byte_to_the_last() {
    let site = Site::new(1 << 20, Options { hydrate: Hydrate::Off, ..Options::default() });
    let before = status(&site);
    assert_eq!((before.state, &before.door), (State::Mounting, &Door::NotRunning));
    let mut door = Reap(site.door());
    let ready = site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    assert!(matches!(ready.door, Door::Running { pid, .. } if pid == door.0.id()), "{:?}", ready.door);
    let mode = |p: &Path| fs::metadata(p).expect("stat").permissions().mode() & 0o777;
    assert_eq!(mode(&site.spec().nbd_socket()), 0o600);
    assert_eq!(mode(&site.spec().control_socket()), 0o600);
    assert_eq!(mode(&site.spec().runtime_dir), 0o700);
    site.folder.transition(State::Mounted, "test", None).expect("legal");

    let overlay = ready.disks[0].overlay.expect("writable");
    assert_eq!((overlay.absent, overlay.written), (1 << 20, 0), "nothing is local yet");
    assert_eq!((ready.disks[0].size, ready.disks[0].hydration.is_none()), (1 << 20, true));
    let mut client = connect(&site);
    let mut all = vec![0; 1 << 20];
    client.read_exact(&mut all).expect("read");
    assert!(all == site.bytes);
    client.seek(SeekFrom::Start(8192)).expect("seek");
    client.write_all(&[0x5A; 12_288]).expect("write");
    client.flush().expect("flush");
    all[8192..20_480].fill(0x5A);
    let written = status(&site);
    assert_eq!(written.disks[0].overlay.expect("writable").written, 12_288);
    assert!(!written.is_local());
    let Door::Running { connections, bytes_read, bytes_written, .. } = written.door else { panic!("runs") };
    assert_eq!((connections, bytes_read, bytes_written), (1, 1 << 20, 12_288));
    let refused = site.client().drain(None).expect_err("blocks are absent");
    assert_eq!(refused.code(), "E_STATE", "{refused}");
    assert_eq!(site.client().detach_source().expect_err("absent").code(), "E_STATE");

    site.client().resume().expect("hydrate");
    wait_until("all becomes local", || status(&site).is_local());
    let local = status(&site);
    let overlay = local.disks[0].overlay.expect("writable");
    assert_eq!((overlay.absent, overlay.written), (0, 12_288), "{overlay:?}");
    wait_until("hydration says so", || {
        status(&site).disks[0].hydration.as_ref().is_some_and(|h| h.phase == Phase::Done)
    });
    site.client().drain(Some("vda")).expect("drain");
    let raw = site.spec().disk_dir("vda").join("disk.raw");
    assert!(fs::read(&raw).expect("raw") == all, "disk.raw is the whole truth");
    client.seek(SeekFrom::Start(0)).expect("seek");
    client.write_all(&[0x77; 512]).expect("write");
    all[..512].fill(0x77);
    assert!(fs::read(&raw).expect("raw") == all, "and stays it, without a flush");
    assert_eq!(site.client().drain(Some("vdb")).expect_err("no such disk").code(), "E_NOT_FOUND");

    wait_until("the state follows", || {
        status(&site).state == State::Migrating || status(&site).state == State::Mounted
    });
    if status(&site).state == State::Mounted {
        site.folder.transition(State::Migrating, "test", None).expect("legal");
    }
    site.client().detach_source().expect("all is local");
    assert_eq!(status(&site).state, State::Migrated);
    fs::remove_file(&site.source).expect("remove");
    client.seek(SeekFrom::Start(0)).expect("seek");
    let mut again = vec![0; 1 << 20];
    client.read_exact(&mut again).expect("read");
    assert!(again == all, "without the source");

    assert_eq!(site.client().stop(Clients::Respect).expect_err("connected").code(), "E_BUSY");
    let start = Instant::now();
    site.client().stop(Clients::Disconnect).expect("stop");
    assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
    assert!(door.0.wait().expect("wait").success());
    assert_eq!(fs::read_dir(&site.spec().runtime_dir).expect("list").count(), 0, "no sockets are left");
    assert_eq!(status(&site).door, Door::NotRunning);
    let ops: Vec<_> = site.folder.events().expect("events").into_iter().map(|e| e.op).collect();
    for op in ["door_ready", "all_local", "source_detached", "detach_source", "door_ending"] {
        assert!(ops.iter().any(|o| o == op), "{op} in {ops:?}");
    }
}

/// The door is a prisoner of its own, and says so.
#[test]
fn the_door_is_confined() {
    let site = Site::new(1 << 16, Options::default());
    let _door = Reap(site.door());
    let ready = site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    let Door::Running { confinement, .. } = ready.door else { panic!("runs") };
    assert!(confinement.seccomp && confinement.no_new_privs, "{confinement:?}");
    if confinement.landlock_abi == 0 {
        assert!(!confinement.missing.is_empty(), "what is missing is said");
        assert!(ready.warnings.iter().any(|w| w.contains("landlock")));
    }
}

#[test]
fn one_process_serves_a_session_that_is_to_be_served() {
    let site = Site::new(1 << 16, Options::default());
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| serve_here(&site.folder, &|| ended.load(Ordering::SeqCst)));
        site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
        let second = scope.spawn(|| serve_here(&site.folder, &|| true)).join().expect("join");
        assert!(matches!(second, Err(Error::Busy { .. })), "{second:?}");
        assert!(matches!(status(&site).door, Door::Running { .. }), "the first goes on");
        ended.store(true, Ordering::SeqCst);
        first.join().expect("join").expect("ended in order");
    });
    site.folder.transition(State::Failed, "test", None).expect("legal");
    let refused = std::thread::scope(|s| s.spawn(|| serve_here(&site.folder, &|| true)).join().expect("join"));
    assert!(matches!(refused, Err(Error::State { have: State::Failed, .. })), "{refused:?}");
}

#[test]
fn another_chain_is_refused_before_anything_is_served() {
    for first in [true, false] {
        let site = Site::new(1 << 16, Options { hydrate: Hydrate::Off, ..Options::default() });
        let serve_once =
            || std::thread::scope(|s| s.spawn(|| serve_here(&site.folder, &|| true)).join().expect("join"));
        if !first {
            serve_once().expect("the right chain");
        }
        let image = File::options().write(true).open(&site.source).expect("open");
        image.write_all_at(b"another disk", 0).expect("write");
        let refused = serve_once().expect_err("another chain");
        assert!(matches!(refused, Error::OtherChain { .. }), "{refused}");
        assert_eq!(site.spec().disk_dir("vda").exists(), !first, "nothing is made for it");
    }
}

/// What is hydrated and written stays so over a door that is killed, and nothing is fetched twice.
#[test]
fn a_killed_door_is_followed_by_one_that_goes_on() {
    let site = Site::new(4 << 20, Options { hydrate: Hydrate::Off, ..Options::default() });
    let mut door = Reap(site.door());
    site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    let mut model = site.bytes.clone();
    let mut rng = Rng::new(5);
    for round in 0..4 * scale() {
        let mut client = connect(&site);
        for _ in 0..20 {
            let at = rng.below((4 << 20) / 512) * 512;
            let len = (512 * (1 + rng.below(40))).min((4 << 20) - at);
            let (from, to) = (usize::try_from(at).expect("small"), usize::try_from(at + len).expect("small"));
            let bytes = pattern(to - from, rng.next_u64());
            client.seek(SeekFrom::Start(at)).expect("seek");
            client.write_all(&bytes).expect("write");
            model[from..to].copy_from_slice(&bytes);
        }
        client.flush().expect("flush");
        let written = status(&site).disks[0].overlay.expect("writable").written;
        door.0.kill().expect("kill");
        door.0.wait().expect("wait");
        let dead = status(&site);
        assert_eq!((&dead.door, dead.disks[0].size), (&Door::NotRunning, 4 << 20));
        let found = dead.disks[0].overlay.expect("read from the session's files");
        assert_eq!((found.written, found.absent), (written, (4 << 20) - written), "without a door");
        door = Reap(site.door());
        let ready = site.client().wait_for_door(Duration::from_secs(10)).expect("ready again");
        assert!(ready.disks[0].overlay.expect("writable").written >= written, "round {round}");
        let mut got = vec![0; model.len()];
        connect(&site).read_exact(&mut got).expect("read");
        assert!(got == model, "round {round}");
    }
    site.client().stop(Clients::Disconnect).expect("stop");
}

/// QEMU writes on while the door is killed again and again under a supervisor; it notices only the wait.
#[test]
fn a_connected_qemu_does_not_notice_a_killed_door() {
    let site = Site::new(4 << 20, Options::default());
    let stop = AtomicBool::new(false);
    let current = std::sync::Mutex::new(None::<u32>);
    let kills_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // However the test ends, the supervisor and the killer do.
        let _end = Raise(&[&stop, &kills_over]);
        let supervisor = scope.spawn(|| {
            let mut start = |input| {
                let door = door_process(site.folder.dir(), input);
                *current.lock().expect("lock") = Some(door.id());
                Ok(door)
            };
            let policy = Policy { deaths_max: 1000, ..Policy::default() };
            supervise(&site.folder, policy, &mut start, &|| stop.load(Ordering::SeqCst))
        });
        site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
        site.folder.transition(State::Mounted, "test", None).expect("legal");
        let mut qemu = Reap(
            Command::new("qemu-io")
                .args(["--image-opts", &site.image_opts()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("qemu-io"),
        );
        let mut orders = qemu.0.stdin.take().expect("stdin");
        let mut answers = BufReader::new(qemu.0.stdout.take().expect("stdout")).lines();
        // A connection that is lost while it is being made is the client's to make again, and qemu-io does not.
        writeln!(orders, "read 0 512").expect("order");
        while !answers.next().expect("qemu-io lives").expect("line").contains("bytes at offset") {}
        let mut rng = Rng::new(6);
        let killer = scope.spawn(|| {
            let (mut killed, mut rng) = (0, Rng::new(7));
            while !kills_over.load(Ordering::SeqCst) {
                if site.client().wait_for_door(Duration::from_secs(10)).is_err() {
                    continue;
                }
                std::thread::sleep(Duration::from_millis(rng.below(100)));
                if let Some(pid) = current.lock().expect("lock").take() {
                    kill(pid);
                    killed += 1;
                }
            }
            killed
        });
        let mut values = vec![None; 64];
        let began = Instant::now();
        let mut done = 0;
        while began.elapsed() < Duration::from_secs(3 * scale()) {
            let place = usize::try_from(rng.below(64)).expect("small");
            let value = rng.below(255) + 1;
            let offset = place * 65_536 + 4096;
            if let (Some(old), true) = (values[place], rng.once_in(2)) {
                writeln!(orders, "read -P {old} {offset} 8192").expect("order");
            } else {
                writeln!(orders, "write -f -P {value} {offset} 8192").expect("order");
                values[place] = Some(value);
            }
            let answer = loop {
                let line = answers.next().expect("qemu-io lives").expect("line");
                if line.contains("bytes at offset") || line.contains("fail") || line.contains("rror") {
                    break line;
                }
            };
            assert!(answer.contains("8192/8192 bytes at offset"), "{answer}");
            done += 1;
        }
        kills_over.store(true, Ordering::SeqCst);
        let killed = killer.join().expect("killer");
        assert!(killed >= 3 && done >= 10, "{killed} kills, {done} orders");
        for (place, value) in values.iter().enumerate().filter_map(|(p, v)| Some((p, (*v)?))) {
            writeln!(orders, "read -P {value} {} 8192", place * 65_536 + 4096).expect("order");
        }
        drop(orders);
        let rest: Vec<_> = answers.map(|l| l.expect("line")).collect();
        assert!(!rest.iter().any(|l| l.contains("fail") || l.contains("rror")), "{rest:#?}");
        assert!(qemu.0.wait().expect("wait").success());
        site.client().wait_for_door(Duration::from_secs(10)).expect("serves");
        site.client().stop(Clients::Disconnect).expect("stop");
        stop.store(true, Ordering::SeqCst);
        supervisor.join().expect("join").expect("ended in order");
    });
    let states: Vec<_> = site.folder.events().expect("events").into_iter().filter_map(|e| e.to).collect();
    assert!(states.contains(&State::Interrupted), "deaths are on record: {states:?}");
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("pid")).expect("pid");
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

#[test]
fn rates_pauses_and_deadlines_are_kept() {
    let site = Site::new(8 << 20, Options { rate: Some(1 << 20), ..Options::default() });
    let mut door = Reap(site.door());
    site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    site.client().pause().expect("pause");
    wait_until("it pauses", || status(&site).disks[0].hydration.as_ref().is_some_and(|h| h.phase == Phase::Paused));
    let local = status(&site).disks[0].overlay.expect("writable").local();
    assert!(local < 8 << 20, "held back by its rate: {local}");
    let by = "2026-12-24T18:00:00Z".parse().expect("time");
    site.client().set(Setting::To(2 << 20), Setting::To(by)).expect("set");
    door.0.kill().expect("kill");
    door.0.wait().expect("wait");
    let dead = status(&site);
    assert_eq!((dead.rate, dead.ready_by), (Some(2 << 20), Some(by)), "without a door");
    // What was copied within the last seconds may be copied again.
    let overlay = dead.disks[0].overlay.expect("read from the session's files");
    assert!(overlay.local() <= local && overlay.absent >= (8 << 20) - local, "{overlay:?}");
    door = Reap(site.door());
    let again = site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    assert_eq!((again.rate, again.ready_by), (Some(2 << 20), Some(by)));
    assert_eq!(again.disks[0].hydration.as_ref().map(|h| h.phase), Some(Phase::Paused), "still paused");
    site.client().set(Setting::Clear, Setting::Clear).expect("set");
    site.client().resume().expect("resume");
    wait_until("it ends", || status(&site).is_local());
    let end = status(&site);
    assert_eq!((end.rate, end.ready_by), (None, None));
    site.client().stop(Clients::Respect).expect("nobody is connected");
    drop(door);
}

#[test]
fn nonsense_on_the_control_socket_harms_nobody() {
    let site = Site::new(1 << 16, Options::default());
    let _door = Reap(site.door());
    site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    let socket = site.spec().control_socket();
    // Silent ones that hold places, then every kind of noise.
    let silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&socket).expect("connect")).collect();
    drop(silent);
    for noise in
        [&b"\0\0\0\0"[..], b"{}\n", b"GET / HTTP/1.1\r\n\r\n", &[b'['; 200_000], b"{\"version\":9,\"body\":1}\n"]
    {
        let mut stream = UnixStream::connect(&socket).expect("connect");
        let _ = stream.write_all(noise);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || text.contains("E_USAGE"), "{text}");
    }
    wait_until("places are free again", || site.client().status().is_ok());
    let refused = site.client().call("dance", serde_json::Value::Null).expect_err("unknown");
    assert_eq!(refused.code(), "E_USAGE");
    site.client().stop(Clients::Respect).expect("stop");
}

#[test]
fn a_read_only_session_serves_the_restore_point_itself() {
    let site = Site::new(1 << 20, Options { access: Access::ReadOnly, ..Options::default() });
    let _door = Reap(site.door());
    let ready = site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    assert!(ready.disks[0].overlay.is_none() && !ready.is_local());
    let mut all = vec![0; 1 << 20];
    let mut client = connect(&site);
    client.read_exact(&mut all).expect("read");
    assert!(all == site.bytes);
    client.seek(SeekFrom::Start(0)).expect("seek");
    assert!(client.write_all(&[1; 512]).is_err(), "read-only");
    assert!(!site.spec().disk_dir("vda").exists(), "nothing is made");
    site.client().stop(Clients::Disconnect).expect("stop");
}

/// A disk as a file in a confined session: readable, writable, and gone with the door, killed or stopped.
#[test]
fn a_session_serves_files_and_takes_them_down() {
    let mnt = tempfile::tempdir().expect("tempdir");
    let dir = mnt.path().join("disks");
    let site = Site::new(1 << 20, Options { fuse_dir: Some(dir.clone()), ..Options::default() });
    let mut door = Reap(site.door());
    let ready = site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    let file = PathBuf::from(ready.disks[0].file.as_deref().expect("a file"));
    assert_eq!(file, dir.join("vda"));
    assert!(fs::read(&file).expect("read") == site.bytes);
    let open = File::options().write(true).open(&file).expect("open");
    open.write_all_at(&[0x33; 4096], 4096).expect("write");
    open.sync_all().expect("sync");
    assert_eq!(site.client().stop(Clients::Respect).expect_err("open").code(), "E_BUSY");
    drop(open);
    door.0.kill().expect("kill");
    door.0.wait().expect("wait");
    let _second = Reap(site.door());
    site.client().wait_for_door(Duration::from_secs(10)).expect("ready again");
    let mut want = site.bytes.clone();
    want[4096..8192].fill(0x33);
    assert!(fs::read(&file).expect("read") == want, "after a kill");
    let mut got = vec![0; 1 << 20];
    connect(&site).read_exact(&mut got).expect("read");
    assert!(got == want, "both doors agree");
    let held = File::open(&file).expect("open");
    let start = Instant::now();
    site.client().stop(Clients::Disconnect).expect("stop");
    assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
    assert_eq!(fs::read_dir(&dir).expect("list").count(), 0, "unmounted by the confined process");
    drop(held);
}

/// The hypervisor moves onto `disk.raw` at some moment after the hand over, and doors may die before and after that
/// moment: neither what a later door acknowledged is missing from the file, nor does one undo what went there directly.
#[test]
fn whoever_dies_between_the_hand_over_and_the_move_nothing_is_lost() {
    let site = Site::new(4 << 20, Options::default());
    let mut door = Reap(site.door());
    site.client().wait_for_door(Duration::from_secs(10)).expect("ready");
    wait_until("all becomes local", || status(&site).is_local());
    let mut model = site.bytes.clone();
    let mut put = |client: &mut NbdClient<UnixStream>, at: usize, len: usize, value: u8| {
        client.seek(SeekFrom::Start(at as u64)).expect("seek");
        client.write_all(&vec![value; len]).expect("write");
        model[at..at + len].fill(value);
        model.clone()
    };
    put(&mut connect(&site), 1 << 20, 40_000, 1);
    site.client().hand_over("vda").expect("hand over");
    let raw = site.spec().disk_dir("vda").join("disk.raw");
    for life in 2..5u8 {
        door.0.kill().expect("kill");
        door.0.wait().expect("wait");
        door = Reap(site.door());
        site.client().wait_for_door(Duration::from_secs(10)).expect("ready again");
        // Not moved yet: the guest is served by the new door. Moved a moment later: it sees the file.
        let mut client = connect(&site);
        put(&mut client, 8192, 12_288, life);
        let now = put(&mut client, (2 << 20) + 512, 1024, life);
        assert!(fs::read(&raw).expect("raw") == now, "life {life}: the file lacks what was acknowledged");
    }
    let file = File::options().write(true).open(&raw).expect("open");
    file.write_all_at(&[9; 70_000], 8192).expect("the guest has moved and writes");
    let mut want = fs::read(&raw).expect("raw");
    door.0.kill().expect("kill");
    door.0.wait().expect("wait");
    let _door = Reap(site.door());
    site.client().wait_for_door(Duration::from_secs(10)).expect("ready again");
    file.write_all_at(&[10; 700], 1 << 20).expect("and again");
    want[1 << 20..(1 << 20) + 700].fill(10);
    let mut got = vec![0; 4 << 20];
    connect(&site).read_exact(&mut got).expect("read");
    assert!(got == want, "a door shows what is in the file");
    site.client().drain(None).expect("drain");
    site.client().detach_source().expect("detach");
    site.client().stop(Clients::Disconnect).expect("stop");
    assert!(fs::read(&raw).expect("raw") == want, "and no door undid it");
}
