//! Promise: a replica takes over, its writes come home, and each step is taken back or made final, from the command line,
//! with machines that really run; what a state forbids is refused without an effect.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use aquifer_runner::{
    host::{Host, Network, Power, Rooms, placed::Placed, qemu::Qemu, qmp::Qmp},
    recover::shape::Wishes,
    replica::{
        desk::Desk,
        model::ReplicaRecord,
        run::{Ran, ReplicaSpec, RunOptions, replicate},
    },
    verb::demo::guest::{DISK_BYTES_MIN, put_on},
};
use serde_json::{Value, json};

use crate::{
    carrier::as_worker,
    harness::{Outcome, Room},
};

const WAIT: Duration = Duration::from_secs(20);
pub(crate) const REPLICA: &str = "db01_replica";

/// Two hosts, a repository, a machine with a guest, and its replica. Ends what runs in it.
pub(crate) struct Site {
    pub(crate) room: Room,
    points: Vec<String>,
}

fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Site {
    /// A machine that was backed up `points` times, with changes between, each point replicated.
    pub(crate) fn new(points: usize) -> Self {
        let mut site = Self { room: Room::new(), points: Vec::new() };
        let room = &site.room;
        fs::create_dir_all(room.path("prod/db01")).expect("folder");
        fs::create_dir_all(room.path("dr")).expect("folder");
        let mut disk = vec![0; DISK_BYTES_MIN.max(24 << 20)];
        disk[12 << 20..13 << 20].fill(7);
        put_on(&mut disk, "READY\r\n");
        fs::write(room.path("guest.raw"), disk).expect("disk");
        tool("qemu-img", &["convert", "-O", "qcow2", "-f", "raw", &room.text("guest.raw"), &site.production()]);
        let description = "version = 1\nname = \"db01\"\ncpus = 1\nmemory = \"64MiB\"\nfirmware = \"bios\"\n[[disk]]\nname = \"vda\"\n";
        fs::write(room.path("prod/db01/machine.toml"), description).expect("description");
        let text = format!(
            "version = 1\n[repository]\nnas = {{ url = \"{0}/repo\", default = true }}\n[host]\nprod = {{ kind = \"qemu\", images = \"{0}/prod\", runtime = \"{0}/rp\" }}\n\
             dr = {{ kind = \"qemu\", images = \"{0}/dr\", runtime = \"{0}/rd\" }}\n[machine]\ndb01 = {{ from = \"prod:db01\" }}\n\
             [job.dr]\nkind = \"replication\"\nmachines = [\"db01\"]\nsource = {{ from = \"backup\", repositories = [\"nas\"] }}\n\
             target = {{ host = \"dr\" }}\nschedule = {{ on_new_point = true }}\n\
             [job.night]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"nas\"\nretry = {{ count = 0 }}\n\
             [plan.all]\nentries = [{{ machine = \"db01\", gate = \"{0}/gate\", timeout = \"20s\" }}]\npre = [\"{0}/pre\"]\n",
            room.dir.path().display()
        );
        room.write_site(&text);
        for (name, script) in [("gate", "grep -q READY \"$AQUIFER_CONSOLE_LOG\""), ("pre", "touch \"$0.done\"")] {
            fs::write(room.path(name), format!("#!/bin/sh\n{script}\n")).expect("program");
            tool("chmod", &["755", &room.text(name)]);
        }
        room.ok(["init"]);
        for number in 0..points {
            let change = format!("write -P {} 14M {}k", 40 + number, 64 * (number + 1));
            tool("qemu-io", &["-f", "qcow2", "-c", &change, &site.production()]);
            let vda = format!("vda={}", site.production());
            let machine = room.text("prod/db01/machine.toml");
            room.ok(["backup", "db01", "--disk", &vda, "--machine", &machine]);
            let id = site.replicate();
            site.points.push(id);
        }
        site
    }

    pub(crate) fn production(&self) -> String {
        self.room.text("prod/db01/vda.qcow2")
    }

    /// One run of the job, as a worker does it; the point's id.
    fn replicate(&self) -> String {
        let room = &self.room;
        let home: Value = serde_json::from_slice(&fs::read(room.path("home/installation.json")).expect("installation"))
            .expect("json");
        let id = home["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
        let me = aquifer_formats::repo::record::Owner { id, name: "here".into() };
        let cache = std::sync::Arc::new(aquifer_vdisk::BlockCache::new(8 << 20));
        let rooms = Rooms::only(room.path("rd"));
        let spec = ReplicaSpec {
            name: REPLICA.into(),
            machine: "db01".into(),
            job: Some("dr".into()),
            host: "dr".into(),
            folder: room.path("dr").join(REPLICA),
            metadata: room.path("home/replicas"),
            repositories: vec![room.repo()],
            options: RunOptions::default(),
            rules: Default::default(),
        };
        let ran = as_worker(room, |catalogue, fence| {
            let desk = Desk {
                catalogue,
                fence,
                host: &Qemu,
                rooms: &rooms,
                me: &me,
                cache: &cache,
                pace: &|_| Ok(()),
                warn: &|_, _| {},
                network: Network::None,
                grace: Duration::ZERO,
                alive: &|| Ok(()),
            };
            replicate(&desk, &spec).expect("a run")
        });
        let Ran::Made(points) = ran else { panic!("{ran:?}") };
        points.last().expect("a point").id.to_string()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Outcome {
        self.room.json(["-c", "site.toml"].iter().chain(args).copied())
    }

    /// Runs with machines without a network that need not be waited for.
    pub(crate) fn does(&self, args: &[&str]) -> Value {
        let more: &[&str] = match args.first() {
            Some(&"failover" | &"failback") => &["--grace", "1s", "--network", "none"],
            Some(&"undo" | &"replicas") => &["--network", "none"],
            _ => &[],
        };
        let outcome = self.json(&[args, more].concat());
        assert!(outcome.code <= 1, "{args:?}: {}\n{}", outcome.stdout, outcome.stderr);
        outcome.one("replica")
    }

    pub(crate) fn refused(&self, args: &[&str], code: &str) -> Value {
        let outcome = self.json(args);
        let error = outcome.one("error");
        assert_eq!(error["code"], code, "{args:?}: {}", outcome.stdout);
        error
    }

    pub(crate) fn record(&self) -> ReplicaRecord {
        self.room.catalogue().replica::<ReplicaRecord>(REPLICA).expect("read").expect("a replica").record
    }

    pub(crate) fn state(&self) -> String {
        self.record().state.name().to_owned()
    }

    pub(crate) fn rooms(&self) -> Rooms {
        let host = |images: &str, run: &str| (self.room.path(images), self.room.path(run));
        Rooms { hosts: vec![host("prod", "rp"), host("dr", "rd")], others: self.room.path("none") }
    }

    fn folder(&self, side: &str) -> PathBuf {
        self.room.path(if side == "prod" { "prod/db01" } else { "dr/db01_replica" })
    }

    pub(crate) fn running(&self, side: &str) -> Option<aquifer_runner::host::Running> {
        Qemu.find(&self.rooms().places(&self.folder(side))).filter(|r| Qemu.power(r).is_ok_and(|p| p != Power::Off))
    }

    /// Starts production's machine, as whoever works there does.
    pub(crate) fn start_production(&self) {
        let folder = self.folder("prod");
        let placed = Placed::read(&folder).expect("a machine");
        let wishes = Wishes { network: Network::None, ..Wishes::default() };
        let shape = placed.shape("db01", &wishes, &[]).expect("a shape");
        let places = self.rooms().places(&folder);
        fs::create_dir_all(&places.runtime_dir).expect("folder");
        Qemu.start(&shape, &placed.attachments(), &places).expect("it starts");
    }

    /// Writes to a running machine's disk, as its guest would.
    pub(crate) fn write(&self, side: &str, pattern: u8, at: &str, len: &str) {
        let running = self.running(side).expect("it runs");
        let mut qmp = Qmp::connect(&running.orders, WAIT).expect("monitor");
        // Flushed, so that whoever looks at the file sees it.
        for order in [format!("write -P {pattern} {at} {len}"), "flush".to_owned()] {
            let line = format!("qemu-io -d /machine/peripheral/dev0/virtio-backend \"{order}\"");
            let said = qmp.execute("human-monitor-command", json!({ "command-line": line }), WAIT).expect("write");
            assert!(said.as_str().unwrap_or_default().trim().is_empty(), "{said}");
        }
    }

    /// Whether what a machine has said is in the replica's folder.
    fn has_logs(&self) -> bool {
        let names = fs::read_dir(self.folder("dr")).expect("a folder").flatten().map(|entry| entry.file_name());
        names.into_iter().any(|name| name.to_string_lossy().ends_with(".log"))
    }

    /// What the replica serves from, or served from last, against production, by QEMU's own tool.
    pub(crate) fn assert_same(&self, file: &str) {
        let top = self.folder("dr").join(file);
        tool(
            "qemu-img",
            &["compare", "-U", "-f", "qcow2", "-F", "qcow2", &top.display().to_string(), &self.production()],
        );
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for side in ["prod", "dr"] {
            if let Some(running) = self.running(side) {
                let _ = Qemu.power_off(&running);
            }
        }
    }
}

#[test]
fn a_takeover_at_an_older_point_comes_home_and_is_made_final() {
    let site = Site::new(2);
    let none = site.refused(&["failover", "nobody"], "E_NOT_FOUND");
    assert_eq!(none["exit"], 2);
    site.refused(&["commit", REPLICA, "--yes"], "E_STATE");
    site.refused(&["failback", REPLICA, "--yes"], "E_STATE");
    site.refused(&["failover", REPLICA, "--to", "2001-01-01T00:00:00Z"], "E_NOT_FOUND");
    assert_eq!(site.json(&["failover", REPLICA, "-n"]).one("plan")["to"], "failover");
    assert_eq!(site.state(), "ready", "who only looks changes nothing");

    let report = site.does(&["failover", REPLICA, "--to", "latest~1", "--reason", "fire"]);
    assert_eq!((&report["state"], &report["point"]), (&json!("failover"), &json!(site.points[0])));
    assert!(site.running("dr").is_some() && site.running("prod").is_none() && site.has_logs());
    let again = site.refused(&["failover", REPLICA], "E_STATE");
    assert_eq!(again["exit"], 3);
    assert!(again["at"]["cause"].as_str().is_some_and(|now| now.contains("undo")), "{again}");
    site.write("dr", 0x55, "16M", "300k");

    site.refused(&["failback", REPLICA], "E_CONFIRM");
    // A home that nothing describes, and one that is not there.
    let (folder, away) = (site.room.path("prod/db01"), site.room.path("away"));
    let description = folder.join("machine.toml");
    fs::rename(&description, &away).expect("away");
    let lost = site.refused(&["failback", REPLICA, "--yes"], "E_NOT_FOUND");
    assert_eq!(lost["at"]["path"], description.to_str().expect("text"), "{lost}");
    let copied = format!("cp {} ", site.room.text("dr/db01_replica/machine.toml"));
    assert!(lost["do"].as_str().is_some_and(|help| help.starts_with(&copied)), "{lost}");
    fs::rename(&away, &description).expect("back");
    fs::rename(&folder, &away).expect("away");
    let lost = site.refused(&["failback", REPLICA, "--yes"], "E_NOT_FOUND");
    let anew = format!("failback {REPLICA} --new prod:db01");
    assert!(lost["do"].as_str().is_some_and(|help| help.ends_with(&anew)), "{lost}");
    fs::rename(&away, &folder).expect("back");
    // Production comes back diverged.
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x99 18M 128k", &site.production()]);
    let first = site.does(&["failback", REPLICA, "--yes"]);
    assert_eq!(first["state"], "ready_to_switch");
    assert!(site.running("dr").is_some(), "it serves while the first pass is made");
    let moved = first["first"]["bytes_written"].as_u64().expect("bytes");
    assert!((300 << 10..1 << 20).contains(&moved), "{first}");
    site.refused(&["failback", REPLICA, "--yes"], "E_STATE");
    site.write("dr", 0x66, "17M", "100k");
    let second = site.json(&["failback", REPLICA, "--switch", "now", "--no-start", "--grace", "1s", "--yes"]);
    assert_eq!(second.code, 0, "{}", second.stdout);
    assert!(second.one("estimate")["bytes"].as_u64().is_some_and(|bytes| bytes >= 100 << 10));
    let second = second.one("replica");
    let moved = second["second"]["bytes_written"].as_u64().expect("bytes");
    // What the guest itself copies meanwhile is written to both sides alike.
    assert!((100 << 10..900 << 10).contains(&moved), "{second}");
    assert!(site.running("dr").is_none() && site.running("prod").is_none());
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    site.assert_same(&top);

    assert_eq!(site.refused(&["commit", REPLICA, "--yes"], "E_STATE")["exit"], 3);
    let done = site.does(&["commit", REPLICA, "--force", "--yes"]);
    assert_eq!(done["state"], "ready");
    assert_eq!(done["allowed_operations"][0], "replicate");
    assert!(!site.has_logs());
}

#[test]
fn a_takeover_is_taken_back_and_so_is_the_way_home() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA]);
    site.write("dr", 0x55, "16M", "64k");
    site.does(&["failback", REPLICA, "--switch", "now", "--yes"]);
    assert_eq!(site.state(), "failback");
    assert!(site.running("prod").is_some() && site.running("dr").is_none());
    let back = site.does(&["undo", REPLICA, "--yes"]);
    assert_eq!(back["state"], "failover");
    assert!(site.running("dr").is_some() && site.running("prod").is_none());
    let lost = site.json(&["undo", REPLICA, "-n"]).one("plan");
    assert!(lost["loss"].as_str().is_some_and(|loss| loss.contains("has written")), "{lost}");
    let undone = site.does(&["undo", REPLICA, "--yes"]);
    assert_eq!(undone["state"], "ready");
    assert!(site.running("dr").is_none());
    assert!(!site.has_logs());
}

#[test]
fn a_machine_that_ended_while_it_serves_is_started_by_a_word() {
    let site = Site::new(1);
    site.refused(&["replicas", REPLICA, "--start"], "E_STATE");
    site.does(&["failover", REPLICA]);
    site.write("dr", 0x55, "16M", "64k");
    let running = site.running("dr").expect("it runs");
    let refused = site.refused(&["failover", REPLICA], "E_STATE").to_string();
    let shown = site.json(&["replicas", REPLICA]).one("replica")["allowed_operations"].to_string();
    assert!(
        !refused.contains("--start") && !shown.contains("start"),
        "one that runs is not started: {refused} {shown}"
    );
    Qemu.power_off(&running).expect("it ends");
    let refused = site.refused(&["failover", REPLICA], "E_STATE");
    assert!(refused["do"].as_str().is_some_and(|help| help.contains("--start")), "{refused}");
    let report = site.does(&["replicas", REPLICA, "--start"]);
    assert_eq!((&report["state"], &report["op"]), (&json!("failover"), &json!("start")));
    let again = site.running("dr").expect("it runs again");
    assert_ne!(again.process, running.process);
    site.does(&["replicas", REPLICA, "--start"]);
    assert_eq!(site.running("dr").expect("and was left alone").process, again.process);
    let mut qmp = Qmp::connect(&again.orders, WAIT).expect("monitor");
    let line = "qemu-io -d /machine/peripheral/dev0/virtio-backend \"read -P 85 16M 64k\"";
    let said = qmp.execute("human-monitor-command", json!({ "command-line": line }), WAIT).expect("read");
    assert!(said.as_str().unwrap_or_default().trim().is_empty(), "what it wrote is there: {said}");
}

#[test]
fn production_that_another_program_has_open_is_neither_read_nor_written() {
    let site = Site::new(1);
    let hold = |mode: &[&str]| {
        let socket = site.room.path("held");
        let mut door = Command::new("qemu-nbd");
        let door = door.args(mode).args(["-t", "-f", "qcow2", "-k"]).arg(&socket).arg(site.production());
        let door = Held(door.spawn().expect("qemu-nbd"), socket.clone());
        while !socket.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        // It listens a moment before it has the image open.
        std::thread::sleep(Duration::from_millis(500));
        door
    };
    let writer = hold(&[]);
    let busy = site.refused(&["failover", REPLICA, "--planned", "--network", "none"], "E_BUSY");
    assert!(busy["what"].as_str().is_some_and(|what| what.contains("qemu-nbd")), "{busy}");
    assert_eq!(site.state(), "ready");
    drop(writer);
    site.does(&["failover", REPLICA, "--no-start"]);
    let reader = hold(&["-r"]);
    site.refused(&["failback", REPLICA, "--yes"], "E_BUSY");
    assert_eq!(site.state(), "failover");
    drop(reader);
    site.does(&["failback", REPLICA, "--yes"]);
    let reader = hold(&["-r"]);
    site.refused(&["failback", REPLICA, "--switch", "now", "--no-start", "--yes"], "E_BUSY");
    assert_eq!(site.state(), "ready_to_switch");
    drop(reader);
    site.does(&["failback", REPLICA, "--switch", "now", "--no-start", "--yes"]);
}

/// A program that has an image open.
struct Held(std::process::Child, PathBuf);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = fs::remove_file(&self.1);
    }
}

#[test]
fn a_takeover_made_final_is_an_ordinary_machine_that_never_stopped() {
    let site = Site::new(2);
    site.does(&["failover", REPLICA]);
    let before = site.running("dr").expect("it runs").process;
    site.write("dr", 0x44, "15M", "64k");
    let done = site.does(&["permanent", REPLICA, "--yes"]);
    assert_eq!(done["state"], "permanent_failover");
    assert_eq!(site.running("dr").expect("it runs").process, before);
    let left = fs::read_dir(site.folder("dr").join("vda")).expect("disk").count();
    assert_eq!(left, 1, "one image, and no file of ours");
    site.refused(&["undo", REPLICA, "--yes"], "E_STATE");
}

#[test]
fn a_change_of_sides_waits_for_its_time_and_for_nobody_who_decides_otherwise() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA]);
    site.does(&["failback", REPLICA, "--switch", "2999-01-01T00:00:00Z", "--yes"]);
    let waits =
        |site: &Site| site.json(&["sessions"]).kind("session").iter().filter(|s| s["state"] == "waiting").count();
    assert_eq!((site.state().as_str(), waits(&site)), ("ready_to_switch", 1));
    assert_eq!(site.json(&["failback", REPLICA, "--switch", "2998-01-01T00:00:00Z"]).code, 0);
    assert_eq!(waits(&site), 1, "the other time in place of the first");
    assert_eq!(site.json(&["failback", REPLICA, "--switch", "manual"]).code, 0);
    assert_eq!(waits(&site), 0);
    site.does(&["undo", REPLICA, "--yes"]);
    assert_eq!(site.state(), "failover");
}

#[test]
fn a_plan_runs_its_programs_waits_at_its_gates_and_is_taken_back() {
    let site = Site::new(1);
    let ready = site.json(&["plan", "check", "all"]);
    assert_eq!(ready.code, 0, "{}{}", ready.stdout, ready.stderr);
    let run = site.json(&["failover", "--plan", "all", "--grace", "1s", "--network", "none"]);
    assert!(run.code <= 1, "{}{}", run.stdout, run.stderr);
    assert!(site.room.path("pre.done").exists(), "the program before the machines");
    let plan = run.one("plan");
    assert_eq!((&plan["state"], &plan["run"]["record"]["entries"][0]["step"]), (&json!("completed"), &json!("ready")));
    assert!(plan["run"]["record"]["entries"][0]["rto_ms"].as_i64().is_some_and(|ms| ms > 0), "{plan}");
    assert!(site.running("dr").is_some());
    assert_eq!(site.refused(&["plan", "resume", "all"], "E_STATE")["exit"], 3);
    let twice = site.json(&["plan", "run", "all", "--grace", "1s", "--network", "none"]);
    assert_eq!((twice.code, twice.one("entry")["replica"].as_str()), (1, Some(REPLICA)), "{}", twice.stdout);
    assert!(twice.one("warning")["what"].as_str().is_some_and(|what| what.contains("is failover")), "{}", twice.stdout);
    let again = site.json(&["plan", "check", "all"]);
    assert_eq!(again.code, 1, "it would be left out");
    site.does(&["undo", "plan/all", "--yes"]);
    assert_eq!(site.state(), "ready");

    // A gate that stays shut fails the machine; what is left is gone on with.
    fs::write(site.room.path("gate"), "#!/bin/sh\nexit 1\n").expect("gate");
    let text = fs::read_to_string(site.room.path("site.toml")).expect("site").replace("20s", "1s");
    fs::write(site.room.path("site.toml"), text).expect("site");
    let shut = site.json(&["plan", "run", "all", "--grace", "1s", "--network", "none"]);
    assert_eq!(shut.one("error")["code"], "E_FAILED", "{}", shut.stdout);
    fs::write(site.room.path("gate"), "#!/bin/sh\nexit 0\n").expect("gate");
    // What was told need not be told again.
    let rest = site.json(&["plan", "resume", "all", "--reason", "drill"]);
    assert!(rest.code <= 1, "{}{}", rest.stdout, rest.stderr);
    let session = rest.one("plan")["run"]["record"]["session"].as_i64().expect("a session");
    let works = site.room.catalogue().work_of(aquifer_runner::catalogue::SessionId(session)).expect("works");
    let told = &works.first().expect("the plan's").spec;
    assert_eq!((&told["network"], &told["reason"]), (&json!("none"), &json!("drill")), "{told}");
}

#[test]
fn a_planned_takeover_loses_nothing() {
    let site = Site::new(1);
    site.start_production();
    site.write("prod", 0x31, "15M", "200k");
    let unplanned = site.json(&["failover", REPLICA, "--network", "none"]);
    assert_eq!(unplanned.code, 1, "production runs still, with the same addresses: {}", unplanned.stdout);
    assert!(site.running("prod").is_some(), "and is not touched");
    site.does(&["undo", REPLICA, "--yes"]);

    let report = site.does(&["failover", REPLICA, "--planned", "--no-start"]);
    assert_eq!(report["state"], "failover");
    assert!(site.running("prod").is_none());
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    site.assert_same(&top);
    assert_eq!(site.json(&["replicas", REPLICA]).code, 0);
}

#[test]
fn whoever_was_left_behind_by_a_change_of_sides_touches_nothing() {
    let site = Site::new(1);
    // A second controller with the same catalogue, as one that was brought back from a backup of its own.
    tool("cp", &["-a", &site.room.text("home"), &site.room.text("other")]);
    let catalogue = |home: &str| site.room.path(home).join("installation.json");
    let text = fs::read_to_string(catalogue("other")).expect("installation");
    let ours: Value = serde_json::from_str(&text).expect("json");
    let other = text.replace(ours["id"].as_str().expect("id"), "01890000-0000-7000-8000-000000000001");
    fs::write(catalogue("other"), other).expect("another installation");
    let (theirs, _copy) = site.room.site_of_copy("other");

    site.does(&["failover", REPLICA]);
    let before = site.running("dr").expect("it runs").process;
    let home = site.room.text("other");
    let refused = site.room.json(["-c", &theirs, "--home", &home, "failover", REPLICA, "--network", "none"]);
    let error = refused.one("error");
    assert_eq!((&error["code"], &error["exit"]), (&json!("E_FOREIGN_OWNER"), &json!(3)), "{}", refused.stdout);
    assert_eq!(site.running("dr").expect("it runs").process, before);
}

#[test]
fn production_that_noted_its_changes_is_not_read_whole() {
    let site = Site::new(1);
    site.start_production();
    for job in ["night", "dr"] {
        let run = site.json(&["run", job]);
        assert!(run.code <= 1, "{job}: {}{}", run.stdout, run.stderr);
    }
    let report = site.does(&["failover", REPLICA, "--fence", "graceful"]);
    assert_eq!(report["state"], "failover");
    assert!(site.running("prod").is_none(), "it was turned off in order, its notes are whole");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x99 18M 128k", &site.production()]);
    site.write("dr", 0x55, "16M", "64k");
    let first = site.does(&["failback", REPLICA, "--yes"])["first"].clone();
    assert_eq!(first["bytes_read_production"], 0, "{first}");
    assert!(first["bytes_read"].as_u64().is_some_and(|read| read < 4 << 20), "{first}");
    site.does(&["failback", REPLICA, "--switch", "now", "--no-start", "--yes"]);
    let top = site.record().failover.expect("a takeover").tops[0].file.clone();
    site.assert_same(&top);
}
