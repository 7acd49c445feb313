//! Promise: a backup of a running machine holds its disks of one moment, counts what changes from there on, and
//! leaves nothing behind, however it ends.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use aquifer_runner::host::qmp::Qmp;
use serde_json::{Value, json};

use crate::{
    carrier::{Carrier, goes_on, kill_all, newest_run},
    harness::Room,
    ledger::Ledger,
    storm::{Dice, moment, rounds},
};

/// A QEMU without a guest: its processors stand still, its disks are written through the monitor.
struct Machine {
    room: Room,
    child: Option<Child>,
}

const WAIT: Duration = Duration::from_secs(20);

impl Machine {
    fn new(disks: &[&str]) -> Self {
        let machine = Self { room: Room::new(), child: None };
        fs::create_dir_all(machine.folder()).expect("folder");
        fs::create_dir_all(machine.runtime()).expect("folder");
        let mut description = String::from("version = 1\nname = \"db01\"\n");
        for name in disks {
            description += &format!("[[disk]]\nname = \"{name}\"\n");
            let file = machine.folder().join(format!("{name}.qcow2"));
            tool("qemu-img", &["create", "-q", "-f", "qcow2", &file.display().to_string(), "64M"]);
        }
        fs::write(machine.folder().join("machine.toml"), description).expect("write");
        machine.room.write_site(
            &format!(
                "version = 1\nhome = \"{0}/home\"\n[repository]\nnas = {{ url = \"{0}/repo\" }}\n[host]\nprod = {{ kind = \"qemu\", images = \"{0}/images\", runtime = \"{0}/run\" }}\n[machine]\ndb01 = {{ from = \"prod:db01\" }}\n[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"nas\"\nretry = {{ count = 0 }}\n",
                machine.room.dir.path().display()
            ),
        );
        machine.room.ok(["init"]);
        machine
    }

    fn folder(&self) -> PathBuf {
        self.room.path("images/db01")
    }

    fn runtime(&self) -> PathBuf {
        self.room.path("run/db01")
    }

    fn start(&mut self, disks: &[&str]) {
        let socket = self.runtime().join("qmp.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-nodefaults",
            "-S",
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-m",
            "32M",
            "-display",
            "none",
            "-qmp",
        ]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        for name in disks {
            let file = self.folder().join(format!("{name}.qcow2"));
            command.args([
                "-blockdev",
                &format!("driver=qcow2,node-name={name},file.driver=file,file.filename={}", file.display()),
            ]);
            command.args(["-device", &format!("virtio-blk-pci,drive={name},id=dev-{name}")]);
        }
        self.child = Some(command.stdin(Stdio::null()).spawn().expect("qemu"));
        let until = Instant::now() + WAIT;
        while Qmp::connect(&socket, Duration::from_secs(5)).is_err() {
            assert!(Instant::now() < until, "QEMU does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.runtime().join("qmp.sock"), WAIT).expect("monitor")
    }

    fn write(&self, disk: &str, pattern: u8, offset: &str, len: &str) {
        let line =
            format!("qemu-io -d /machine/peripheral/dev-{disk}/virtio-backend \"write -P {pattern} {offset} {len}\"");
        let said = self.qmp().execute("human-monitor-command", json!({ "command-line": line }), WAIT).expect("write");
        let said = said.as_str().unwrap_or_default().to_owned();
        // What it wrote it says on its own standard output; here only what went wrong.
        assert!(said.trim().is_empty(), "{line}: {said}");
    }

    fn quit(&mut self) {
        let _ = self.qmp().execute("quit", json!({}), WAIT);
        if let Some(mut child) = self.child.take() {
            child.wait().expect("it ends");
        }
    }

    /// Nodes, jobs, exports and bitmaps of ours that are there.
    fn ours(&self) -> (Vec<String>, Vec<String>) {
        let mut qmp = self.qmp();
        let mut things = Vec::new();
        let mut marks = Vec::new();
        for (command, key) in
            [("query-named-block-nodes", "node-name"), ("query-jobs", "id"), ("query-block-exports", "id")]
        {
            let list = qmp.execute(command, json!({}), WAIT).expect(command);
            for item in list.as_array().expect("a list") {
                let name = item[key].as_str().unwrap_or_default();
                if name.starts_with("aquifer-") {
                    things.push(name.to_owned());
                }
                for bitmap in item["dirty-bitmaps"].as_array().into_iter().flatten() {
                    let name = bitmap["name"].as_str().unwrap_or_default().to_owned();
                    if name.starts_with("aquifer-mark-") { marks.push(name) } else { things.push(name) }
                }
            }
        }
        for entry in fs::read_dir(self.folder()).expect("list") {
            let name = entry.expect("entry").file_name().to_string_lossy().into_owned();
            if name.contains("scratch") {
                things.push(name);
            }
        }
        (things, marks)
    }

    /// What a disk holds now.
    fn image(&self, disk: &str) -> PathBuf {
        let line = format!("qemu-io -d /machine/peripheral/dev-{disk}/virtio-backend \"flush\"");
        self.qmp().execute("human-monitor-command", json!({ "command-line": line }), WAIT).expect("flush");
        let to = self.room.path(format!("{disk}.now.raw"));
        let from = self.folder().join(format!("{disk}.qcow2"));
        tool(
            "qemu-img",
            &["convert", "-U", "-f", "qcow2", "-O", "raw", &from.display().to_string(), &to.display().to_string()],
        );
        to
    }

    fn compare(&self, point: &str, disk: &str, with: &Path) {
        let out = self.room.text(&format!("{disk}.raw"));
        let _ = fs::remove_file(&out);
        self.room.ok(["export", &format!("db01@{point}:{disk}"), &out]);
        tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", &out, &with.display().to_string()]);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stdout));
}

/// The newest point's record.
fn newest(machine: &Machine) -> Value {
    newest_point(&machine.room)
}

/// What is written down of the newest point of a repository.
pub(crate) fn newest_point(room: &Room) -> Value {
    let points = room.path("repo/machines");
    let mut found: Vec<PathBuf> = Vec::new();
    for machine in fs::read_dir(points).expect("machines") {
        let folder = machine.expect("entry").path().join("points");
        found.extend(fs::read_dir(folder).into_iter().flatten().map(|entry| entry.expect("entry").path()));
    }
    found.retain(|folder| folder.join("point.json").exists());
    found.sort();
    let text = fs::read(found.last().expect("a point").join("point.json")).expect("read");
    serde_json::from_slice(&text).expect("json")
}

fn job(machine: &Machine, name: &str) -> Command {
    machine.room.command(["-c", &machine.room.text("site.toml"), "run", name])
}

/// One run of the job; answers its exit code and what it said.
fn run(machine: &Machine, name: &str) -> (i32, String) {
    let output = job(machine, name).output().expect("run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout) + &text(&output.stderr))
}

fn found(point: &Value, disk: usize) -> &str {
    point["disks"][disk]["found"]["by"].as_str().unwrap_or_default()
}

/// Waits for something.
fn until(what: &str, mut look: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !look() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn points_of_a_running_machine_follow_its_bitmaps_through_every_way_it_can_end() {
    let mut machine = Machine::new(&["vda", "vdb"]);
    machine.start(&["vda", "vdb"]);
    machine.write("vda", 1, "0", "24M");
    machine.write("vdb", 2, "1M", "1M");
    // The first: everything, crash-consistent, and bitmaps that count from here.
    let (code, said) = run(&machine, "b");
    assert_eq!(code, 0, "{said}");
    let (things, marks) = machine.ours();
    assert_eq!((things, marks.len()), (vec![], 2), "{said}");
    let point = newest(&machine);
    assert_eq!((found(&point, 0), point["consistency"].as_str()), ("everything", Some("crash")));
    machine.compare("latest", "vda", &machine.image("vda"));
    machine.compare("latest", "vdb", &machine.image("vdb"));
    // The next reads what the bitmap says.
    machine.write("vda", 3, "5M", "128k");
    let (code, said) = run(&machine, "b");
    assert_eq!(code, 0, "{said}");
    let point = newest(&machine);
    assert_eq!((found(&point, 0), found(&point, 1)), ("dirty_context", "dirty_context"), "{said}");
    assert!(said.contains(", 128 KiB read, "), "{said}");
    assert_eq!(machine.ours().1.len(), 2, "the bitmaps of the last point are gone, those of the new one count");
    machine.compare("latest", "vda", &machine.image("vda"));
    // Killed while it reads: nothing stays in QEMU, and the bitmap of the last point is still the truth.
    machine.write("vda", 4, "6M", "8M");
    let before = machine.image("vda");
    kill_while_it_reads(&machine);
    until("the guard takes everything down", || machine.ours().0.is_empty());
    machine.write("vda", 5, "16M", "64k");
    // What is written while it reads is not in the point.
    let kept = machine.room.path("kept.raw");
    fs::rename(machine.image("vda"), &kept).expect("rename");
    drop(before);
    write_while_it_reads(&machine);
    assert_eq!(found(&newest(&machine), 0), "dirty_context");
    machine.compare("latest", "vda", &kept);
    // Ended properly, the bitmaps come back with the image; while it is off, they are read from it.
    machine.quit();
    let (code, said) = run(&machine, "b");
    assert_eq!(code, 0, "{said}");
    let point = newest(&machine);
    assert_eq!((found(&point, 0), point["consistency"].as_str()), ("bitmap", Some("off")), "{said}");
    machine.start(&["vda", "vdb"]);
    machine.write("vda", 6, "1M", "64k");
    let (code, said) = run(&machine, "b");
    assert_eq!((code, found(&newest(&machine), 0)), (0, "dirty_context"), "{said}");
    machine.compare("latest", "vda", &machine.image("vda"));
    // Killed, QEMU leaves bitmaps that it calls inconsistent itself: everything is compared, and that is said.
    machine.write("vda", 7, "2M", "64k");
    machine.image("vda");
    let mut child = machine.child.take().expect("running");
    child.kill().expect("kill");
    child.wait().expect("gone");
    machine.start(&["vda", "vdb"]);
    let (code, said) = run(&machine, "b");
    assert_eq!((code, found(&newest(&machine), 0)), (1, "comparison"), "{said}");
    assert!(said.contains("W_COMPARED"), "{said}");
    machine.compare("latest", "vda", &machine.image("vda"));
    // And from there on bitmaps count again.
    let (code, said) = run(&machine, "b");
    assert_eq!((code, found(&newest(&machine), 0)), (0, "dirty_context"), "{said}");
    assert_eq!(machine.ours(), (vec![], machine.ours().1), "{said}");
}

/// A run that is slow, seen at its export.
fn slow_run(machine: &Machine) -> Child {
    let text = fs::read_to_string(machine.room.path("site.toml")).expect("read");
    let slow = text.replace("[job.b]", "[job.slow]\nlimits = { read = \"2MiB/s\" }");
    if !text.contains("[job.slow]") {
        let tail = &slow[slow.find("[job.slow]").expect("a job")..];
        fs::write(machine.room.path("site.toml"), format!("{text}{tail}")).expect("write");
    }
    let child = job(machine, "slow").stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run");
    until("the backup serves the disks", || machine.ours().0.iter().any(|name| name == "aquifer-export1"));
    child
}

fn kill_while_it_reads(machine: &Machine) {
    let mut child = slow_run(machine);
    child.kill().expect("kill");
    child.wait().expect("gone");
}

fn write_while_it_reads(machine: &Machine) {
    let mut child = slow_run(machine);
    machine.write("vda", 0xee, "6M", "8M");
    machine.write("vda", 0xed, "40M", "1M");
    let status = child.wait().expect("it ends");
    // The session of the run that was killed goes on, at once, and that is said.
    assert_eq!(status.code(), Some(1), "{status}");
    assert!(machine.ours().0.is_empty());
}

/// What an agent was told.
fn agent(machine: &Machine, answer: impl Fn(&str) -> Option<Value> + Send + 'static) -> Receiver<String> {
    let (send, told) = channel();
    let listener = UnixListener::bind(machine.runtime().join("agent.sock")).expect("bind");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut out = stream.try_clone().expect("clone");
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let Ok(order) = serde_json::from_str::<Value>(&line) else { continue };
                let command = order["execute"].as_str().unwrap_or_default().to_owned();
                let reply = match command.as_str() {
                    "guest-sync" => Some(json!({ "return": order["arguments"]["id"] })),
                    _ => {
                        let _ = send.send(command.clone());
                        answer(&command)
                    }
                };
                if let Some(reply) = reply
                    && writeln!(out, "{reply}").is_err()
                {
                    break;
                }
            }
        }
    });
    told
}

#[test]
fn the_guest_is_frozen_for_a_moment_and_thawed_whatever_happens() {
    let mut machine = Machine::new(&["vda"]);
    machine.start(&["vda"]);
    machine.write("vda", 1, "0", "1M");
    let told = agent(&machine, |_| Some(json!({ "return": 2 })));
    let (code, said) = run(&machine, "b");
    assert_eq!(code, 0, "{said}");
    assert_eq!(newest(&machine)["consistency"], "file_system");
    assert_eq!(told.try_iter().collect::<Vec<_>>(), ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
    // None: as after a loss of power, and that is a note.
    fs::remove_file(machine.runtime().join("agent.sock")).expect("remove");
    let bare = job(&machine, "b").arg("--json").output().expect("run");
    let noted = crate::harness::Outcome::of(bare);
    assert_eq!(noted.code, 0, "{}{}", noted.stdout, noted.stderr);
    let note = noted.one("not_frozen");
    assert_eq!((&note["machine"], &note["agent"]), (&json!("db01"), &json!(false)), "{note}");
    let id = noted.one("session")["id"].to_string();
    let site = machine.room.text("site.toml");
    let work = machine.room.json(["-c", &site, "sessions", &id]).one("work");
    assert_eq!(work["outcome"]["report"]["db01"]["not_frozen"], note["why"], "{work}");
    // One that refuses: that is said.
    let refuse = |command: &str| match command {
        "guest-fsfreeze-freeze" => Some(json!({ "error": { "class": "GenericError", "desc": "no hooks today" } })),
        _ => Some(json!({ "return": 0 })),
    };
    let told = agent(&machine, refuse);
    let (code, said) = run(&machine, "b");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("no hooks today"), "{said}");
    assert_eq!(newest(&machine)["consistency"], "crash");
    assert_eq!(told.try_iter().last().as_deref(), Some("guest-fsfreeze-thaw"));
    // Killed between freeze and thaw: the guard thaws.
    fs::remove_file(machine.runtime().join("agent.sock")).expect("remove");
    let told = agent(&machine, |command| {
        if command == "guest-fsfreeze-freeze" {
            std::thread::sleep(Duration::from_secs(3));
        }
        Some(json!({ "return": 1 }))
    });
    let mut child = job(&machine, "b").stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run");
    assert_eq!(told.recv_timeout(WAIT).as_deref(), Ok("guest-fsfreeze-freeze"));
    child.kill().expect("kill");
    child.wait().expect("gone");
    assert_eq!(told.recv_timeout(WAIT).as_deref(), Ok("guest-fsfreeze-thaw"));
    until("the guard takes everything down", || machine.ours().0.is_empty());
}

#[test]
fn a_replica_of_a_running_machine_is_its_disks_of_one_moment() {
    let disks = ["vda", "vdb"];
    let mut machine = Machine::new(&disks);
    let dr = machine.room.text("dr");
    fs::create_dir_all(&dr).expect("folder");
    let site = machine.room.path("site.toml");
    let text = fs::read_to_string(&site).expect("read");
    let more = format!(
        "[host.dr]\nkind = \"qemu\"\nimages = \"{dr}\"\n[job.r]\nkind = \"replication\"\nmachines = [\"db01\"]\n\
         source = {{ from = \"production\" }}\ntarget = {{ host = \"dr\" }}\nblock_size = \"64KiB\"\n"
    );
    fs::write(&site, text + &more).expect("write");
    machine.start(&disks);
    machine.write("vda", 7, "1M", "512k");
    machine.write("vdb", 8, "40M", "64k");
    let mut written = Vec::new();
    for round in 1..=3u8 {
        let images: Vec<PathBuf> = disks.iter().map(|disk| machine.image(disk)).collect();
        let out = machine.room.json(["-c", &machine.room.text("site.toml"), "run", "r"]);
        assert!(out.code <= 1, "{}{}", out.stdout, out.stderr);
        let report = out.one("replicated");
        written.push(report["bytes_written"].as_u64().expect("bytes"));
        assert!(report["bytes_read_production"].as_u64() > Some(0), "{report}");
        for (disk, image) in disks.iter().zip(&images) {
            let top = machine.room.path(format!("dr/db01_replica/{disk}/{round}.qcow2"));
            let (image, top) = (image.display().to_string(), top.display().to_string());
            tool("qemu-img", &["compare", "-q", "-U", "-f", "raw", "-F", "qcow2", &image, &top]);
        }
        assert_eq!(machine.ours(), (Vec::new(), Vec::new()), "nothing is left in the machine");
        // The guest has gone on meanwhile.
        machine.write("vda", 10 + round, "2M", "128k");
    }
    assert_eq!(written, [(512 + 64) << 10, 128 << 10, 128 << 10]);
    // A machine that is off is read from its files.
    machine.quit();
    let out = machine.room.json(["-c", &machine.room.text("site.toml"), "run", "r"]);
    assert!(out.code <= 1, "{}{}", out.stdout, out.stderr);
    assert_eq!(out.one("replicated")["bytes_written"], 128 << 10);
}

/// Who is killed, and who carries the run out: the carrier alone, the machine, or the command together with the guard that
/// clears up after it.
const VICTIMS: [(&str, Carrier); 5] = [
    ("commands killed", Carrier::Command),
    ("machines killed", Carrier::Command),
    ("workers killed", Carrier::Worker),
    ("services killed", Carrier::Serve),
    ("commands and guards killed", Carrier::Command),
];

/// Begins a run and kills QEMU after that time; whether the run was still at it. A run whose machine has ended ends.
fn kill_the_machine(machine: &mut Machine, after: Duration) -> bool {
    let mut process = Carrier::Command.begins(&machine.room, "b");
    std::thread::sleep(after);
    let runs = process.runs();
    let mut qemu = machine.child.take().expect("running");
    qemu.kill().expect("kill");
    qemu.wait().expect("gone");
    process.ends();
    runs
}

/// Compares a point with the disk as it was in the round whose number is in its first byte; that number.
fn compared_by_mark(machine: &Machine, id: &str, kept: &BTreeMap<u8, PathBuf>) -> u8 {
    let out = machine.room.text("vda.raw");
    let _ = fs::remove_file(&out);
    machine.room.ok(["export", &format!("db01@{id}:vda"), &out]);
    let mark = fs::read(&out).expect("read")[0];
    let oracle = kept.get(&mark).unwrap_or_else(|| panic!("{id} holds {mark}")).display().to_string();
    tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", &out, &oracle]);
    mark
}

#[test]
fn points_of_a_running_machine_survive_kills_of_the_run_and_of_qemu() {
    let mut machine = Machine::new(&["vda"]);
    machine.start(&["vda"]);
    machine.write("vda", 1, "0", "16M");
    let mut dice = Dice(0x9e30);
    let (mut kept, mut takes, mut compared) = (BTreeMap::new(), Duration::from_millis(400), 0u64);
    let mut marks = BTreeMap::new();
    let (ledger, mut counts) = (Ledger::begin("kills of a backup of a running machine"), BTreeMap::new());
    let mut round = 0;
    while goes_on(round, rounds(5), counts.values().sum()) {
        // The number of the round is in the first bytes.
        let mark = u8::try_from(2 + round % 250).expect("small");
        machine.write("vda", mark, "0", "64k");
        machine.write("vda", mark, &format!("{}k", 64 * (1 + dice.below(200))), "2M");
        let oracle = machine.room.path(format!("{round}.oracle"));
        fs::rename(machine.image("vda"), &oracle).expect("rename");
        let mut since = newest_run(&machine.room, "b");
        let after = moment(&mut dice, takes);
        let (who, carrier) = VICTIMS[round as usize % VICTIMS.len()];
        let killed = match who {
            "machines killed" => {
                let killed = kill_the_machine(&mut machine, after);
                since = newest_run(&machine.room, "b");
                machine.start(&["vda"]);
                killed
            }
            "commands and guards killed" => {
                let process = carrier.begins(&machine.room, "b");
                std::thread::sleep(after);
                let guarded = kill_all(&machine.room, "--monitor") > 0;
                process.kill();
                guarded
            }
            _ => carrier.is_killed(&machine.room, "b", after),
        };
        *counts.entry(who).or_insert(0u64) += u64::from(killed);
        // The machine's disk is whatever it was: nothing of ours is in it, and the next run finds its way.
        let now = machine.image("vda");
        tool(
            "qemu-img",
            &["compare", "-q", "-f", "raw", "-F", "raw", &oracle.display().to_string(), &now.display().to_string()],
        );
        let began = Instant::now();
        carrier.carries_through(&machine.room, "b", since);
        takes = began.elapsed().clamp(Duration::from_millis(300), Duration::from_secs(2));
        assert!(machine.ours().0.is_empty(), "round {round}: {:?}", machine.ours());
        kept.insert(mark, oracle);
        let listed = machine.room.json(["points", "db01"]).kind("point");
        let ids: Vec<&str> = listed.iter().map(|point| point["point"].as_str().expect("an id")).collect();
        assert!(marks.keys().all(|id: &String| ids.contains(&id.as_str())), "a point is lost: {ids:?}");
        // New ones, one of the others, and in the end all.
        let other = ids[dice.below(ids.len())];
        let mut seen = Vec::new();
        for id in ids {
            if !marks.contains_key(id) || id == other || round + 1 >= rounds(5) {
                marks.insert(id.to_owned(), compared_by_mark(&machine, id, &kept));
                compared += 1;
            }
            seen.push(marks[id]);
        }
        assert!(seen.is_sorted(), "{seen:?}");
        seen.dedup();
        assert_eq!(seen, kept.keys().copied().collect::<Vec<_>>(), "a point is lost");
        round += 1;
    }
    assert!(counts.values().sum::<u64>() > 0, "nobody was killed");
    let mut told = vec![("rounds", u64::from(round))];
    told.extend(counts);
    told.push(("points compared", compared));
    ledger.tell("0x9e30", &told);
}

#[test]
fn what_a_killed_run_left_at_work_is_taken_down_at_once() {
    let mut machine = Machine::new(&["vda"]);
    machine.start(&["vda"]);
    machine.write("vda", 1, "0", "1M");
    // A job that stays after its end until it is dismissed, as the one that makes a scratch file does.
    let scratch = machine.folder().join(".aquifer-scratch0.qcow2").display().to_string();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &scratch, "64M"]);
    let mut qmp = machine.qmp();
    let node = json!({ "driver": "qcow2", "node-name": "aquifer-scratch0", "file": { "driver": "file", "filename": scratch } });
    qmp.execute("blockdev-add", node, WAIT).expect("a node");
    let left = json!({ "job-id": "aquifer-create0", "device": "vda", "target": "aquifer-scratch0", "sync": "none",
        "auto-dismiss": false });
    qmp.execute("blockdev-backup", left, WAIT).expect("a job");
    drop(qmp);
    let began = Instant::now();
    let (code, said) = run(&machine, "b");
    assert_eq!(code, 0, "{said}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(machine.ours().0.is_empty(), "{:?}", machine.ours());
    machine.compare("latest", "vda", &machine.image("vda"));
}

#[test]
fn two_moments_of_a_running_machine_never_become_one_point() {
    let disks = ["vda"];
    let mut machine = Machine::new(&disks);
    let dr = machine.room.text("dr");
    fs::create_dir_all(&dr).expect("folder");
    let site = machine.room.path("site.toml");
    let text = fs::read_to_string(&site).expect("read");
    let more = format!(
        "[host.dr]\nkind = \"qemu\"\nimages = \"{dr}\"\n[job.r]\nkind = \"replication\"\nmachines = [\"db01\"]\n\
         source = {{ from = \"production\" }}\ntarget = {{ host = \"dr\" }}\n"
    );
    fs::write(&site, text.clone() + &more + "limits = { read = \"4MiB/s\" }\n").expect("write");
    machine.start(&disks);
    machine.write("vda", 7, "0", "24M");
    let mut run = job(&machine, "r").stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("run");
    let mark = machine.room.path("dr/db01_replica/vda/1.qcow2.mark");
    let until = Instant::now() + WAIT * 2;
    while !mark.exists() {
        assert!(Instant::now() < until, "nothing was marked");
        std::thread::sleep(Duration::from_millis(20));
    }
    run.kill().expect("kill");
    run.wait().expect("it ends");
    // What was copied already is changed now.
    machine.write("vda", 9, "0", "1M");
    machine.write("vda", 9, "20M", "1M");
    fs::write(&site, text + &more).expect("write");
    let image = machine.image("vda");
    let (code, said) = run_until_whole(&machine);
    assert!(code <= 1, "{said}");
    let folder = machine.room.path("dr/db01_replica/vda");
    let tops: Vec<PathBuf> = fs::read_dir(folder).expect("list").map(|entry| entry.expect("entry").path()).collect();
    assert_eq!(tops.len(), 1, "{tops:?}");
    let (image, top) = (image.display().to_string(), tops[0].display().to_string());
    tool("qemu-img", &["compare", "-q", "-U", "-f", "raw", "-F", "qcow2", &image, &top]);
    machine.quit();
}

/// Runs the job; what guards the machine may need a moment after a kill.
fn run_until_whole(machine: &Machine) -> (i32, String) {
    let until = Instant::now() + WAIT;
    loop {
        let (code, said) = run(machine, "r");
        if code <= 1 || Instant::now() > until {
            return (code, said);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
