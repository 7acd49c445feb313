//! Promise: names, files and values that nobody should have chosen give one clear error, and nothing that
//! is printed is obeyed by a terminal.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::{Command, Stdio},
};

use crate::{
    harness::{BINARY, Outcome, Room},
    images,
};

const EVIL: &str = "ev\nil\x1b[31m\u{202e}'\".qcow2";

fn evil_room() -> Room {
    let room = Room::new();
    let raw = room.text("plain.raw");
    images::write(&room.path("plain.raw"), &images::disk(1));
    images::must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &room.text(EVIL)]);
    room
}

#[test]
fn names_are_printed_not_obeyed() {
    let room = evil_room();
    let missing = format!("./no-{EVIL}");
    let out = format!("out-{EVIL}");
    let table: [&[&str]; 12] = [
        &["info", EVIL],
        &["map", EVIL],
        &["diff", EVIL, EVIL],
        &["verify", EVIL],
        &["export", EVIL, &out],
        &["export", EVIL, &out],
        &["info", &missing],
        &["mount", EVIL, "--nbd", &format!("unix:s-{}", "\x1b[2J\n"), "--run", "true"],
        &["mount", EVIL, "-n", "--fuse", "plain.raw\n/x"],
        &["points", "x\n\x1b[2Jy@latest"],
        &["explain", "E_\x1b[2J\nE_BUSY: x"],
        &["-c", "no\n\x1b[2J.toml", "config", "check"],
    ];
    for args in table {
        for outcome in [room.run(args), room.json(args)] {
            for text in [&outcome.stdout, &outcome.stderr] {
                assert!(!text.contains(['\x1b', '\u{202e}', '\r']), "{args:?}: {text:?}");
                assert!(
                    !text.lines().any(|line| line.starts_with("il") || line.starts_with("E_BUSY")),
                    "{args:?}: {text}"
                );
            }
        }
    }
}

/// What is advised can be typed as it is printed.
#[test]
fn advice_about_evil_names_can_be_typed() {
    let room = evil_room();
    fs::create_dir(room.path("bin")).expect("folder");
    std::os::unix::fs::symlink(BINARY, room.path("bin/aquifer")).expect("link");
    let advised = |outcome: &Outcome, mark: &str| {
        let line = outcome.stderr.lines().find_map(|line| line.trim_start().strip_prefix(mark).map(str::to_owned));
        line.unwrap_or_else(|| panic!("no {mark} in {}", outcome.stderr))
    };
    let typed = |line: &str| {
        let mut shell = Command::new("bash");
        shell.args(["-c", line]).env_clear().current_dir(room.dir.path()).stdin(Stdio::null());
        shell.env("PATH", format!("{}:/usr/bin:/bin", room.text("bin"))).env("AQUIFER_HOME", room.path("home"));
        Outcome::of(shell.env("XDG_RUNTIME_DIR", room.dir.path()).output().expect("bash"))
    };
    let next = advised(&room.ok(["info", EVIL]), "next: ");
    let done = typed(&next);
    assert!(done.code == 0 && done.stdout.contains("virtual size"), "{next}: {}", done.stderr);
    fs::rename(room.path("plain.raw"), room.path("a 'b\n.img")).expect("rename");
    let help = advised(&room.run(["info", "a 'b\n.img"]), "do: ");
    let done = typed(&help);
    assert!(done.code == 0 && done.stdout.contains("format      raw"), "{help}: {}", done.stderr);
}

#[test]
fn what_is_no_image_is_refused_at_once() {
    let room = Room::new();
    images::must("mkfifo", &[&room.text("fifo")]);
    fs::create_dir(room.path("folder")).expect("folder");
    File::create(room.path("empty")).expect("file");
    for (word, code, exit) in [
        ("./fifo", "E_REFUSED", 3),
        ("raw:fifo", "E_REFUSED", 3),
        ("/dev/zero", "E_REFUSED", 3),
        ("raw:/dev/zero", "E_REFUSED", 3),
        ("raw:/dev/tty", "E_REFUSED", 3),
        ("/proc/self/mem", "E_REFUSED", 3),
        ("folder/", "E_SOURCE", 4),
        ("raw:folder", "E_SOURCE", 4),
        ("empty", "E_REFUSED", 3),
        ("fifo/x", "E_NOT_FOUND", 2),
        ("raw:nothing", "E_NOT_FOUND", 2),
    ] {
        for verb in [&["info"][..], &["map"], &["verify"], &["mount", "--run", "true"], &["mount", "-n"]] {
            let json = room.json(verb.iter().chain([&word]));
            let error = json.one("error");
            assert_eq!((error["code"].as_str(), json.code), (Some(code), exit), "{verb:?} {word}: {error}");
            assert!(error["do"].is_string(), "{error}");
            assert!(!error["do"].as_str().unwrap_or_default().contains("allow-backing"), "{word}: {error}");
        }
    }
}

#[test]
fn huge_values_are_usage_errors() {
    let room = Room::new();
    images::write(&room.path("a.raw"), &[1; 4096]);
    for (args, code) in [
        (&["info", "m@latest~4294967296"][..], "E_SOURCE"),
        (&["info", "m@latest~18446744073709551616"], "E_SOURCE"),
        (&["init", "--block", "99999999999999999999TiB"], "E_UNIT"),
        (&["init", "--block", "8MiB"], "E_USAGE"),
        (&["init", "--block", "3KiB"], "E_USAGE"),
        (&["wait", "x", "--timeout", "99999999999999999999d"], "E_UNIT"),
        (&["wait", "x", "--timeout", "-1s"], "E_USAGE"),
        (&["session", "set", "x", "--rate", "99999999999999999GiB/s"], "E_UNIT"),
        (&["mount", "raw:a.raw", "--nbd", "tcp:127.0.0.1:65536"], "E_USAGE"),
        (&["recover", "raw:a.raw", "--into", "r", "-n", "--cpus", "4096"], "E_USAGE"),
        (&["recover", "raw:a.raw", "--into", "r", "-n", "--memory", "18446744073709551616KiB"], "E_UNIT"),
    ] {
        let error = room.json(args).one("error");
        assert_eq!((error["code"].as_str(), error["exit"].as_u64()), (Some(code), Some(4)), "{args:?}: {error}");
    }
    let long = format!("unix:{}", "s".repeat(300));
    assert_eq!(room.run(["mount", "raw:a.raw", "--nbd", &long]).code, 4);
    let far = room.text(&"d".repeat(300));
    assert_eq!(room.run(["info", &far]).code, 4, "a name that no file system holds");
}

/// A file that was cut short says so with its name and the place where it ends.
#[test]
fn a_file_that_shrinks_is_named() {
    let room = Room::new();
    images::write(&room.path("a.raw"), &images::disk(5));
    // It shrinks after it was opened: what is gone cannot be read, and whoever serves it says why.
    let cut = "truncate -s 8M a.raw; qemu-io -f raw -r -c 'read 20M 64k' \"$uri\"; qemu-io -f raw -r -c 'read 2M 64k' \"$uri\"";
    let served = room.json(["mount", "raw:a.raw", "--run", cut]);
    assert!(
        served.stderr.contains("Input/output error") && served.stderr.contains("read 65536/65536"),
        "{}",
        served.stderr
    );
    let said = served.stderr.lines().find(|line| line.starts_with("warning: request failed: "));
    let said = said.unwrap_or_else(|| panic!("{}", served.stderr));
    assert!(said.contains("a.raw") && said.contains("offset 20971520"), "{said}");
    // A copy that was cut short.
    images::qcow2_chain(room.dir.path(), "vm", 6);
    let base = room.path("vm-0.qcow2");
    let len = fs::metadata(&base).expect("stat").len();
    File::options().write(true).open(&base).and_then(|f| f.set_len(len / 2)).expect("cut");
    for args in [&["export", "vm-2.qcow2", "out.raw"][..], &["verify", "vm-2.qcow2"]] {
        let error = room.json(args).one("error");
        assert_eq!(error["exit"], 14, "{error}");
        assert!(error["at"]["path"].as_str().is_some_and(|p| p.ends_with("vm-0.qcow2")), "{error}");
        assert!(error["at"]["offset"].is_u64() && error["do"].is_string(), "{error}");
    }
    assert!(!room.path("out.raw").exists());
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs as nobody, where the tests are root's.
fn as_nobody(room: &Room, args: &[&str]) -> Outcome {
    fs::set_permissions(room.dir.path(), Permissions::from_mode(0o755)).expect("mode");
    let (binary, home) = (room.path("aquifer-copy"), room.path("nobody"));
    if !binary.exists() {
        fs::copy(BINARY, &binary).expect("copy");
        fs::create_dir(&home).expect("folder");
        std::os::unix::fs::chown(&home, Some(65534), Some(65534)).expect("owner");
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&binary).args(args).arg("--json");
    command.env_clear().env("PATH", "/usr/bin:/bin").env("AQUIFER_HOME", &home).env("XDG_RUNTIME_DIR", &home);
    command.current_dir(room.dir.path()).stdin(Stdio::null());
    Outcome::of(command.output().expect("setpriv"))
}

#[test]
fn what_may_not_be_read_is_named() {
    if !is_root() {
        return;
    }
    let room = Room::new();
    images::write(&room.path("secret.raw"), &images::disk(7));
    fs::set_permissions(room.path("secret.raw"), Permissions::from_mode(0o600)).expect("mode");
    room.ok(["init"]);
    for args in
        [&["info", "raw:secret.raw"][..], &["-r", "repo", "points"], &["export", "raw:secret.raw", "nobody/x.raw"]]
    {
        let outcome = as_nobody(&room, args);
        let error = outcome.one("error");
        assert_eq!((error["code"].as_str(), outcome.code), (Some("E_ACCESS"), 12), "{args:?}: {error}");
        assert!(error["at"]["cause"].as_str().is_some_and(|c| c.starts_with("EACCES: ")), "{error}");
    }
}

/// Nothing is ever written into a source: an immutable one serves as well, and nothing about it changes.
#[test]
fn sources_are_never_written() {
    let room = Room::new();
    let bytes = images::qcow2_chain(room.dir.path(), "vm", 8);
    let names = ["vm-0.qcow2", "vm-1.qcow2", "vm-2.qcow2"];
    let state = || {
        names.map(|name| {
            let meta = fs::metadata(room.path(name)).expect("stat");
            (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec(), fs::read(room.path(name)).expect("read"))
        })
    };
    // Where the file system knows the flag; the states are compared everywhere.
    let frozen = is_root()
        && Command::new("chattr").arg("+i").args(names.map(|n| room.text(n))).status().is_ok_and(|s| s.success());
    let before = state();
    room.ok(["init"]);
    room.ok(["info", "vm-2.qcow2"]);
    room.ok(["verify", "vm-2.qcow2"]);
    room.ok(["backup", "m", "--disk", "vda=./vm-2.qcow2"]);
    room.ok(["backup", "m", "--disk", "vda=./vm-1.qcow2"]);
    room.ok(["export", "vm-2.qcow2", "out.raw"]);
    let write = "qemu-io -f raw -c 'write -q -P 9 0 20M' -c flush \"$uri\"";
    room.ok(["mount", "vm-2.qcow2", "--writable", "--run", write]);
    room.ok(["mount", "vm-2.qcow2", "--writable", "--overlay", "kept", "--run", write]);
    let fuse = room.run([
        "mount",
        "vm-2.qcow2",
        "--writable",
        "--fuse",
        "m",
        "--run",
        "dd if=/dev/zero of=m/vm-2 bs=1M count=2 conv=notrunc status=none",
    ]);
    assert_eq!(fuse.code, 0, "{}", fuse.stderr);
    let after = state();
    if frozen {
        Command::new("chattr").arg("-i").args(names.map(|n| room.text(n))).status().expect("chattr");
    }
    assert!(before == after, "a source has changed");
    assert_eq!(fs::read(room.path("out.raw")).expect("read"), bytes);
}
