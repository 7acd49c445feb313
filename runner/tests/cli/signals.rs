//! Promise: signals, pipes and terminals are met as their users expect: a stop is orderly and gone on with,
//! progress and colour are for terminals, and a reader that leaves is no fault.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    harness::{BINARY, Outcome, Room},
    images,
};

/// A disk of 64 MiB that takes its time, as a file: behind a slow NBD server and a mount of ours.
struct Slow {
    room: Room,
    server: Child,
    mount: i64,
}

const SIZE: u64 = 64 << 20;

impl Slow {
    fn new() -> Self {
        let room = Room::new();
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args(["-f", "-r", "-U", &room.text("slow"), "--filter=delay", "pattern", "64M", "rdelay=100ms"]);
        let server = nbdkit.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("nbdkit");
        until("the server is there", || room.path("slow").exists());
        let uri = format!("nbd+unix:///?socket={}", room.text("slow"));
        let started = room.json(["mount", &uri, "--fuse", "m", "--detach"]);
        let mount = started.one("done")["pid"].as_i64().expect("a process");
        Self { room, server, mount }
    }

    /// A check of it, under way.
    fn verify(&self, more: &[&str]) -> Child {
        let mut command = self.room.command(["verify", "raw:m/disk"]);
        command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("verify")
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        kill("-TERM", self.mount);
        until("the mount is gone", || !fs::exists(self.room.path("m/disk")).unwrap_or(false));
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn kill(signal: &str, pid: i64) {
    Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill");
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_interrupted_check_is_gone_on_with() {
    let slow = Slow::new();
    let mut before = 0;
    for (signal, exit, code) in [("-INT", 130, "E_INTERRUPTED"), ("-TERM", 143, "E_TERMINATED")] {
        let child = slow.verify(&["--json"]);
        std::thread::sleep(Duration::from_millis(1500));
        kill(signal, child.id().into());
        let asked = Instant::now();
        let outcome = Outcome::of(child.wait_with_output().expect("wait"));
        assert!(asked.elapsed() < Duration::from_secs(20), "it takes its time to stop: {:?}", asked.elapsed());
        assert_eq!(outcome.code, exit, "{}", outcome.stderr);
        let error = outcome.one("error");
        assert_eq!((error["code"].as_str(), error["retryable"].as_bool()), (Some(code), Some(true)));
        assert!(error["do"].as_str().is_some_and(|d| d.starts_with("aquifer verify raw:m/disk --json ")), "{error}");
        let resumed = outcome.kind("resumed").first().and_then(|r| r["bytes_checked"].as_u64());
        assert_eq!(resumed.is_some(), before > 0, "{}", outcome.stdout);
        before = resumed.unwrap_or(1);
    }
    let last = slow.room.json(["verify", "raw:m/disk"]);
    assert_eq!(last.code, 0, "{}", last.stderr);
    let resumed = last.one("resumed")["bytes_checked"].as_u64().expect("bytes");
    assert!(resumed >= before && resumed > 1 << 20 && resumed < SIZE, "{resumed} after {before}");
    assert_eq!(last.one("verified")["bytes_checked"], SIZE);
    // What has reached its end is not gone on with.
    let kept = fs::read_dir(slow.room.path("home/verify")).map_or(0, Iterator::count);
    assert_eq!(kept, 0, "a memory of a check that has ended");
}

#[test]
fn a_killed_check_is_gone_on_with_unless_the_files_have_changed() {
    let slow = Slow::new();
    let memory = || fs::read_dir(slow.room.path("home/verify")).ok().and_then(|mut d| Some(d.next()?.ok()?.path()));
    let mut child = slow.verify(&[]);
    until("it has written down how far it is", || {
        memory().is_some_and(|path| path.extension().is_some_and(|e| e == "json"))
    });
    child.kill().expect("kill");
    child.wait().expect("wait");
    let path = memory().expect("a memory");
    let text = fs::read_to_string(&path).expect("read");
    // Of a file with another time, nothing is believed; nor of a memory that is no memory.
    for bad in [text.replace("\"inode\":", "\"inode\":9"), text[..text.len() / 2].to_owned()] {
        fs::write(&path, bad).expect("write");
        let child = slow.verify(&["--json"]);
        std::thread::sleep(Duration::from_millis(700));
        kill("-INT", child.id().into());
        let outcome = Outcome::of(child.wait_with_output().expect("wait"));
        assert_eq!((outcome.code, outcome.kind("resumed").len()), (130, 0), "{}", outcome.stdout);
    }
    fs::write(&path, &text).expect("write");
    let child = slow.verify(&["--json", "--afresh"]);
    std::thread::sleep(Duration::from_millis(700));
    kill("-INT", child.id().into());
    let outcome = Outcome::of(child.wait_with_output().expect("wait"));
    assert_eq!((outcome.code, outcome.kind("resumed").len()), (130, 0), "{}", outcome.stdout);
}

#[test]
fn progress_is_truthful_and_asked_for_by_a_signal() {
    let slow = Slow::new();
    let child = slow.verify(&[]);
    std::thread::sleep(Duration::from_millis(700));
    kill("-USR1", child.id().into());
    std::thread::sleep(Duration::from_millis(500));
    kill("-INT", child.id().into());
    let outcome = Outcome::of(child.wait_with_output().expect("wait"));
    assert!(
        outcome.stderr.contains("of 64.0 MiB, ") && outcome.stderr.contains("time left unknown"),
        "{}",
        outcome.stderr
    );
    assert!(!outcome.stderr.contains(['\r', '\x1b']), "a log gets no bar: {:?}", outcome.stderr);
    let records = slow.verify(&["--json"]);
    std::thread::sleep(Duration::from_millis(2500));
    kill("-INT", records.id().into());
    let records = Outcome::of(records.wait_with_output().expect("wait")).kind("progress");
    assert!(!records.is_empty());
    let done: Vec<u64> = records.iter().map(|r| r["bytes_done"].as_u64().expect("bytes")).collect();
    assert!(done.is_sorted() && done.iter().all(|d| *d < SIZE), "{done:?}");
}

/// Runs a line of shell on a terminal of its own; what the terminal saw.
fn on_a_terminal(room: &Room, line: &str) -> String {
    let mut script = Command::new("script");
    script.args(["-qec", line, "/dev/null"]).env_clear().stdin(Stdio::null()).current_dir(room.dir.path());
    script.env("PATH", "/usr/bin:/bin").env("TERM", "xterm").env("AQUIFER_HOME", room.path("home"));
    let output = script.output().expect("script");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn colour_and_bars_are_for_terminals_only() {
    let room = Room::new();
    images::write(&room.path("a.raw"), &images::disk(3));
    let coloured = on_a_terminal(&room, &format!("{BINARY} explain E_NONSENSE"));
    assert!(coloured.contains("\x1b[1;31mE_NOT_FOUND\x1b[0m: "), "{coloured:?}");
    for line in [
        format!("NO_COLOR=1 {BINARY} explain E_NONSENSE"),
        format!("{BINARY} explain E_NONSENSE 2>said; cat said"),
        format!("{BINARY} --help"),
        format!("{BINARY} export raw:a.raw b.raw 2>said; cat said"),
        format!("{BINARY} export raw:a.raw c.raw --json"),
    ] {
        let seen = on_a_terminal(&room, &line);
        assert!(!seen.is_empty() && !seen.contains('\x1b'), "{line}: {seen:?}");
    }
    let bar = on_a_terminal(&room, &format!("{BINARY} export raw:a.raw d.raw"));
    assert!(bar.contains('\x1b') && bar.contains("export"), "{bar:?}");
    let quiet = on_a_terminal(&room, &format!("{BINARY} -q export raw:a.raw e.raw"));
    assert!(!quiet.contains('\x1b'), "{quiet:?}");
}

#[test]
fn a_reader_that_leaves_ends_nothing() {
    let room = Room::new();
    images::write(&room.path("a.raw"), &images::disk(4));
    for line in ["explain --json", "map raw:a.raw", "man", "completions bash", "--help"] {
        let script = format!("{BINARY} {line} | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}");
        let mut shell = Command::new("bash");
        let output = shell.args(["-c", &script]).current_dir(room.dir.path()).output().expect("bash");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0", "{line}");
        assert!(output.stderr.is_empty(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // The work is done although nobody listens any more.
    let script = format!("{BINARY} export raw:a.raw b.raw --json 2>&1 | true");
    Command::new("bash").args(["-c", &script]).current_dir(room.dir.path()).status().expect("bash");
    until("the export", || room.path("b.raw").exists());
    assert_eq!(fs::read(room.path("b.raw")).expect("read"), images::disk(4));
}

#[test]
fn an_interrupted_export_leaves_nothing() {
    let slow = Slow::new();
    let mut command = slow.room.command(["export", "raw:m/disk", "out.qcow2"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("export");
    std::thread::sleep(Duration::from_millis(600));
    kill("-TERM", child.id().into());
    let output = child.wait_with_output().expect("wait");
    assert_eq!((output.status.code(), output.status.signal()), (Some(143), None));
    let names: Vec<String> = fs::read_dir(slow.room.dir.path())
        .expect("list")
        .map(|e| e.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.iter().all(|name| !name.contains("out")), "{names:?}");
}
