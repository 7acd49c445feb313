//! Promise: what the verbs print, on which stream and with which exit code, is a table that changes only
//! when somebody means it to.
//!
//! Each table in `golden/` is a session at a prompt: command, stdout, lines of stderr behind `2>`, exit
//! code. `AQUIFER_BLESS=1` writes the tables anew; then read the difference.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    harness::{BINARY, Outcome, Room},
    images,
};

/// A session at a prompt: a room, and what was seen in it.
struct Session {
    room: Room,
    name: &'static str,
    seen: String,
    ids: Vec<String>,
}

impl Session {
    fn new(name: &'static str) -> Self {
        let room = Room::new();
        fs::create_dir(room.path("bin")).expect("folder");
        symlink(BINARY, room.path("bin/aquifer")).expect("link");
        Self { room, name, seen: String::new(), ids: Vec::new() }
    }

    /// Types a line.
    fn run(&mut self, line: &str) -> Outcome {
        let mut shell = Command::new("/bin/bash");
        shell.args(["-c", line]).env_clear().current_dir(self.room.dir.path()).stdin(Stdio::null());
        let bin = self.room.text("bin");
        shell.env("PATH", format!("{bin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"));
        shell.env("AQUIFER_HOME", "home").env("XDG_RUNTIME_DIR", self.room.dir.path()).env("AQUIFER_REPO", "repo");
        let outcome = Outcome::of(shell.output().expect("a shell"));
        let _ = writeln!(self.seen, "$ {line}");
        self.seen += &outcome.stdout;
        for said in outcome.stderr.lines() {
            let _ = writeln!(self.seen, "2> {said}");
        }
        let _ = writeln!(self.seen, "[{}]\n", outcome.code);
        outcome
    }

    /// Compares what was seen with the table.
    fn end(mut self) {
        let room = fs::canonicalize(self.room.dir.path()).expect("room");
        let seen = self.seen.replace(room.to_str().expect("utf-8"), "DIR");
        let seen = redacted(&seen, &mut self.ids);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/golden").join(format!("{}.txt", self.name));
        if std::env::var_os("AQUIFER_BLESS").is_some() {
            fs::write(&path, &seen).expect("write the table");
        }
        let kept = fs::read_to_string(&path).unwrap_or_default();
        let differs = kept.lines().zip(seen.lines()).position(|(a, b)| a != b);
        let at = differs.unwrap_or_else(|| kept.lines().count().min(seen.lines().count()));
        let line = |text: &str| text.lines().nth(at).unwrap_or("(the end)").to_owned();
        assert!(
            kept == seen,
            "golden/{}.txt, line {}:\n  kept {}\n  seen {}",
            self.name,
            at + 1,
            line(&kept),
            line(&seen)
        );
    }
}

/// What differs from run to run, by its shape: ids are numbered in the order they appear.
fn redacted(text: &str, ids: &mut Vec<String>) -> String {
    const SHAPES: [(&str, &str); 10] = [
        ("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", "ID"),
        ("xxxxxxxx-xxxx-xxxx", "ID"),
        ("dddd-dd-ddTdd:dd:dd", "TIME"),
        ("dd:dd:dd", "SPAN"),
        ("process d", "PID"),
        ("\"pid\":d", "PID"),
        ("kill d", "PID"),
        ("mount-d", "PID"),
        ("checksum is xxxxxxxx", "CRC"),
        ("pointer says xxxxxxxx", "CRC"),
    ];
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let before = out.chars().next_back();
        let found = SHAPES.iter().find(|(shape, _)| fits(rest, shape) && !before.is_some_and(char::is_alphanumeric));
        let Some((shape, kind)) = found else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        };
        let (word, after) = rest.split_at(shape.len());
        rest = after;
        match *kind {
            "ID" => {
                let place = ids.iter().position(|id| id.starts_with(word)).unwrap_or_else(|| {
                    ids.push(word.to_owned());
                    ids.len() - 1
                });
                let _ = write!(out, "ID{}", place + 1);
            }
            "TIME" => {
                out += "TIME";
                rest = rest.trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
            }
            "PID" => {
                out += &word[..word.len() - 1];
                out += "PID";
                rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
            }
            "CRC" => {
                out += word.rsplit_once(' ').map_or(word, |(said, _)| said);
                out += " CRC";
            }
            other => out += other,
        }
    }
    out
}

/// Whether the text begins with a shape, where `d` is a digit and `x` a hexadecimal one.
fn fits(text: &str, shape: &str) -> bool {
    let spelt = !shape.starts_with(['x', 'd']);
    text.len() >= shape.len()
        && text.bytes().zip(shape.bytes()).enumerate().all(|(at, (c, want))| match want {
            b'd' if !spelt || at + 1 == shape.len() => c.is_ascii_digit(),
            b'x' => c.is_ascii_hexdigit(),
            _ => c == want,
        })
}

/// A raw disk of 8 MiB whose size and content are known.
fn small(room: &Room, name: &str, seed: u64) {
    let mut bytes = vec![0; 8 << 20];
    bytes[1 << 20..2 << 20].copy_from_slice(&images::noise(seed, 1 << 20));
    bytes[3 << 20..(3 << 20) + 200_000].fill(7);
    fs::write(room.path(name), bytes).expect("write");
}

fn write_at(path: &Path, at: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).expect("open");
    file.write_all_at(bytes, at).expect("write");
}

/// The file of the newest point's disk.
fn newest_layer(room: &Room) -> PathBuf {
    let machines = fs::read_dir(room.path("repo/machines")).expect("machines");
    let points =
        machines.map(|m| m.expect("machine").path().join("points")).flat_map(|p| fs::read_dir(p).expect("points"));
    let mut layers: Vec<PathBuf> = points.map(|p| p.expect("point").path().join("vda.aql")).collect();
    layers.sort();
    layers.pop().expect("a point")
}

#[test]
fn protect() {
    let mut at = Session::new("protect");
    small(&at.room, "vda.raw", 1);
    at.run("aquifer points");
    at.run("aquifer init --compression raw -n");
    at.run("aquifer init --compression raw");
    at.run("aquifer init --json");
    at.run("aquifer backup db01 --disk vda=vda.raw");
    at.run("aquifer backup db01 --disk vda=raw:vda.raw -n --json");
    at.run("aquifer backup db01 --disk vda=raw:vda.raw");
    write_at(&at.room.path("vda.raw"), 5 << 20, &[9; 100_000]);
    at.run("aquifer backup db01 --disk vda=raw:vda.raw --json | sed 's/\"seconds\":[0-9]*/\"seconds\":N/'");
    at.run("aquifer points");
    at.run("aquifer points db01@latest --json");
    at.run("aquifer points db01@latest");
    at.run("aquifer verify db01");
    at.run("aquifer verify --json");
    at.run("aquifer forget db01");
    at.run("aquifer forget db01@latest~1 -n");
    at.run("aquifer forget db01@latest~1");
    at.run("aquifer forget db01@latest~1 db01@latest --yes");
    at.run("aquifer -r repo forget db01@latest~1 db01@latest --json");
    at.run("aquifer forget db01@latest~1 --yes --json");
    at.run("aquifer forget --interrupted db01 --json");
    at.run("aquifer leases");
    let layer = newest_layer(&at.room);
    let len = fs::metadata(&layer).expect("layer").len();
    let mut bytes = fs::read(&layer).expect("layer");
    let middle = usize::try_from(len).expect("small") / 2;
    bytes[middle] ^= 0x40;
    fs::write(&layer, bytes).expect("layer");
    at.run("aquifer verify db01 --json");
    at.run("aquifer -r repo verify db01");
    at.end();
}

#[test]
fn look() {
    let mut at = Session::new("look");
    small(&at.room, "a.raw", 1);
    small(&at.room, "b.raw", 1);
    write_at(&at.room.path("b.raw"), 4 << 20, &[5; 70_000]);
    let raw = |name: &str| {
        images::must(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                &at.room.text(&format!("{name}.raw")),
                &at.room.text(&format!("{name}.qcow2")),
            ],
        )
    };
    raw("a");
    raw("b");
    for line in [
        "aquifer info a.qcow2",
        "aquifer info ./a.qcow2 --json",
        "aquifer info a.raw",
        "aquifer -c nowhere.toml --home home info raw:a.raw",
        "aquifer info nothing.qcow2/",
        "aquifer map b.qcow2",
        "aquifer map b.qcow2 --json | head -n 2",
        "aquifer diff a.qcow2 b.qcow2",
        "aquifer diff a.qcow2 b.qcow2 --read --exit-code --json",
        "aquifer diff a.qcow2 a.qcow2 --read --exit-code",
        "aquifer export a.qcow2 out.raw -n",
        "aquifer export a.qcow2 out.raw",
        "cmp out.raw a.raw",
        "aquifer export b.qcow2 out.qcow2 --json",
        "qemu-img compare -f qcow2 -F raw out.qcow2 b.raw",
        "aquifer export a.qcow2 out.raw",
        "aquifer export a.qcow2 out.vmdk",
        "aquifer export a.qcow2 home/",
        "aquifer verify a.qcow2",
        "aquifer events",
        "aquifer events --json",
        "aquifer events nobody --json",
        "aquifer leases --json",
    ] {
        at.run(line);
    }
    at.end();
}

#[test]
fn start_here() {
    let mut at = Session::new("start");
    small(&at.room, "vda.raw", 1);
    images::must(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &at.room.text("vda.raw"), &at.room.text("vda.qcow2")],
    );
    for line in [
        "aquifer mount vda.qcow2 -n",
        "aquifer mount vda.qcow2 -n --json",
        "aquifer mount vda.qcow2 --run 'qemu-img info \"$uri\" | grep virtual'",
        "aquifer mount vda.qcow2 --nbd unix:s --json --run 'qemu-img compare \"$uri\" vda.raw; exit 3'",
        "aquifer mount vda.qcow2 --nbd unix:s --run 'aquifer status; aquifer status --json'",
        "aquifer mount vda.qcow2 -n --nbd tcp:192.0.2.1:10809",
        "aquifer mount vda.qcow2 --nbd somewhere",
        "aquifer mount vda.qcow2 -n --fuse vda.raw",
        "aquifer mount vda.qcow2 --overlay kept",
        "aquifer status",
        "aquifer status --json",
        "aquifer status nobody",
        "aquifer wait nobody --json",
        "aquifer wait nobody --for soon",
        "aquifer session",
        "aquifer session set nobody --rate 200",
        "aquifer session pause nobody -n",
        "aquifer finalize nobody --keep",
        "aquifer finalize nobody",
        "aquifer recover --into new",
        "aquifer recover nothing --into new",
        "aquifer recover vda.qcow2 --into new -n",
        "ls",
    ] {
        at.run(line);
    }
    at.end();
}

#[test]
fn tools() {
    let mut at = Session::new("tools");
    fs::write(at.room.path("site.toml"), "version = 1\n[repository]\nnas = { url = \"/srv/nas\" }\n").expect("write");
    fs::write(at.room.path("bad.toml"), "version = 1\ncahe = \"1GiB\"\nhome = 3\n").expect("write");
    for line in [
        "aquifer",
        "aquifer inof",
        "aquifer -c site.toml config check",
        "aquifer -c bad.toml config check",
        "aquifer -c bad.toml config check --json",
        "env -u AQUIFER_REPO aquifer -c site.toml config show",
        "aquifer -c site.toml -r nas points",
        "env -u AQUIFER_REPO aquifer points --json",
        "aquifer explain busy",
        "aquifer explain E_NONSENSE",
        "aquifer completions fish | head -n 1",
        "aquifer man nonsense",
        "aquifer man --out pages -n | tail -n 1; ls -d pages",
        "aquifer bench read nothing.qcow2/",
        "aquifer bench write vda.raw",
        "aquifer --version | sed 's/ .*//'",
    ] {
        at.run(line);
    }
    at.end();
}
