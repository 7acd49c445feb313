//! Promise: what would be refused is refused to whoever only looks as well, with the same words; options that are typed are
//! heeded or refused, for one replica and for a plan; what was changed from outside is told in every state.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use crate::{
    harness::Outcome,
    takeover::{REPLICA, Site},
};

const PLAIN: [&str; 2] = ["--network", "none"];

/// Refused with that code with `-n`, and without it.
fn refused_both_ways(site: &Site, args: &[&str], code: &str) -> String {
    let before = site.state();
    let foreseen = site.refused(&[args, &["-n"]].concat(), code);
    let real = site.refused(&[args, &PLAIN].concat(), code);
    assert_eq!((&foreseen["what"], site.state()), (&real["what"], before), "{args:?}");
    foreseen["what"].as_str().unwrap_or_default().to_owned()
}

/// A program that has an image open to write.
struct Held(Child, PathBuf);

impl Held {
    fn open(site: &Site) -> Self {
        let socket = site.room.path("held");
        let mut door = Command::new("qemu-nbd");
        let door = door.args(["-t", "-f", "qcow2", "-k"]).arg(&socket).arg(site.production()).spawn();
        let held = Self(door.expect("qemu-nbd"), socket);
        let free = || Command::new("qemu-img").arg("info").arg(site.production()).output().expect("info");
        while !held.1.exists() || free().status.success() {
            std::thread::sleep(Duration::from_millis(10));
        }
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = fs::remove_file(&self.1);
    }
}

/// A small file system of its own, gone with the test.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).expect("folder");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).status();
        assert!(done.expect("mount").success(), "this test needs root");
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn who_only_looks_is_refused_what_is_refused() {
    let site = Site::new(1);
    let held = Held::open(&site);
    let busy = refused_both_ways(&site, &["failover", REPLICA, "--planned"], "E_BUSY");
    assert!(busy.contains("qemu-nbd"), "{busy}");
    drop(held);
    site.does(&["failover", REPLICA, "--no-start"]);

    let taken = site.room.path("prod/taken");
    fs::create_dir_all(&taken).expect("folder");
    fs::write(taken.join("vda.qcow2"), "precious").expect("file");
    refused_both_ways(&site, &["failback", REPLICA, "--new", "prod:taken", "--yes"], "E_EXISTS");
    let own = format!("dr:{REPLICA}");
    refused_both_ways(&site, &["failback", REPLICA, "--to", &own, "--yes"], "E_REFUSED");
    let small = Small::mount(site.room.path("prod/small"), "size=32k");
    let full = refused_both_ways(&site, &["failback", REPLICA, "--new", "prod:small", "--yes"], "E_CAPACITY");
    assert!(full.contains("32"), "{full}");
    drop(small);
    let held = Held::open(&site);
    refused_both_ways(&site, &["failback", REPLICA, "--yes"], "E_BUSY");
    drop(held);

    site.does(&["failback", REPLICA, "--yes", "--full"]);
    let change = ["-f", "qcow2", "-c", "write -P 0x99 2M 64k"];
    assert!(Command::new("qemu-io").args(change).arg(site.production()).status().expect("qemu-io").success());
    let args = ["failback", REPLICA, "--switch", "now", "--no-start", "--yes"];
    let moved = refused_both_ways(&site, &args, "E_STATE");
    assert!(moved.contains("was written to"), "{moved}");
    site.does(&["undo", REPLICA]);
    site.does(&["failback", REPLICA, "--yes", "--full", "--switch", "now", "--no-start"]);
    let foreseen = site.refused(&["commit", REPLICA, "-n"], "E_STATE");
    assert_eq!(foreseen["what"], site.refused(&["commit", REPLICA, "--yes"], "E_STATE")["what"]);
    assert_eq!(site.json(&["commit", REPLICA, "--force", "-n"]).code, 0);
}

#[test]
fn a_plan_heeds_what_is_typed_or_refuses_it() {
    let site = Site::new(1);
    for how in [["failover", "plan/all", "--planned"], ["failover", "plan/all", "--force"]] {
        for look in [&["-n"][..], &[]] {
            let refused = site.refused(&[&how[..], look].concat(), "E_USAGE");
            assert!(refused["what"].as_str().is_some_and(|what| what.contains(how[2])), "{refused}");
            let help = refused["do"].as_str().unwrap_or_default();
            assert!(help.ends_with(&format!("failover {REPLICA} {}", how[2])), "{refused}");
        }
    }
    assert_eq!(site.refused(&["failback", "plan/all", "--new", "prod:x", "--yes"], "E_USAGE")["exit"], 4);
    let two = site.refused(&["failback", REPLICA, "other", "--to", "prod:db01", "--yes"], "E_USAGE");
    assert!(two["do"].as_str().is_some_and(|help| help.ends_with("--to prod:db01")), "{two}");

    site.start_production();
    let ran = site.json(&["failover", "--plan", "all", "--fence", "force", "--no-start", "--network", "none"]);
    assert_eq!((ran.code, site.state().as_str()), (0, "failover"), "{}", ran.stdout);
    assert!(site.running("prod").is_none(), "it was fenced");
    assert!(site.running("dr").is_none(), "it was not to be started, and nothing waits at its gate");
    let home = site.json(&["failback", "plan/all", "--switch", "now", "--no-start", "--yes", "--network", "none"]);
    assert!(home.code <= 1 && site.state() == "failback", "{}", home.stdout);
}

#[test]
fn a_plan_stops_a_run_that_is_in_its_way_where_that_is_wanted() {
    let site = Site::new(1);
    let room = &site.room;
    let change = ["-f", "qcow2", "-c", "write -P 0x77 15M 4M"];
    assert!(Command::new("qemu-io").args(change).arg(site.production()).status().expect("qemu-io").success());
    room.ok(["backup", "db01", "--disk", &format!("vda={}", site.production())]);
    let text = fs::read_to_string(room.path("site.toml")).expect("site");
    let slow = text.replace("[job.dr]\n", "[job.dr]\nlimits = { read = \"256KiB/s\" }\n");
    fs::write(room.path("site.toml"), slow).expect("site");
    let mut run = crate::carrier::Process::start(room.command(["-c", "site.toml", "run", "dr"]));
    crate::carrier::wait("the run writes", || site.state() == "processing");
    let stops = ["failover", "--plan", "all", "--cancel-job", "--no-start", "--network", "none"];
    let foreseen = room.run(["-c", "site.toml"].iter().chain(&stops).chain(&["-n"]).copied());
    assert!(
        foreseen.stdout.contains("is stopped") && foreseen.stderr.contains("--cancel-job"),
        "{}{}",
        foreseen.stdout,
        foreseen.stderr
    );
    let ran = site.json(&stops);
    assert!(ran.code <= 1, "{}", ran.stdout);
    assert_eq!(site.state(), "failover", "{}", ran.stdout);
    assert!(run.ends().is_some_and(|code| code != 0), "the run has ended without its point");
}

/// The warning of layers that were changed from outside, with what to do about it.
fn told(outcome: &Outcome) -> String {
    let warnings = outcome.kind("warning").into_iter();
    let told: Vec<_> = warnings.filter(|warning| warning["code"] == "W_RESYNC").collect();
    assert_eq!(told.len(), 1, "{}", outcome.stdout);
    told[0]["do"].as_str().expect("what to do").to_owned()
}

#[test]
fn what_was_changed_from_outside_is_told_in_every_state() {
    let site = Site::new(1);
    let touch = |file: &str| {
        let layer = site.room.path("dr").join(REPLICA).join(file);
        let image = fs::read(&layer).expect("a layer");
        fs::write(&layer, image).expect("a layer");
    };
    touch("vda/1.qcow2");
    assert!(told(&site.json(&["failover", REPLICA, "-n"])).contains("explain W_RESYNC"));
    site.does(&["failover", REPLICA, "--no-start"]);
    // What its digests proved is as good as untouched; below a machine that serves it is touched once more.
    touch("vda/1.qcow2");
    for look in [&["replicas"][..], &["replicas", REPLICA], &["failback", REPLICA, "-n"], &["undo", REPLICA, "-n"]] {
        assert!(told(&site.json(look)).contains("explain W_RESYNC"), "{look:?}");
    }
    site.does(&["failback", REPLICA, "--yes"]);
    let sent = site.record().failback.expect("a way home").sent[0].file.clone();
    touch(&sent);
    assert_eq!(site.state(), "ready_to_switch");
    for look in [&["replicas", REPLICA][..], &["undo", REPLICA, "-n"]] {
        assert!(told(&site.json(look)).contains(&format!("undo {REPLICA}")), "{look:?}");
    }
}

#[test]
fn a_planned_takeover_tells_of_a_disk_that_production_has_lost() {
    let site = Site::new(1);
    let machine = site.room.path("prod/db01/machine.toml");
    let without = fs::read_to_string(&machine).expect("text");
    fs::write(&machine, format!("{without}[[disk]]\nname = \"vdb\"\n")).expect("write");
    let vdb = site.room.text("prod/db01/vdb.qcow2");
    let make = ["create", "-q", "-f", "qcow2", &vdb, "4M"];
    assert!(Command::new("qemu-img").args(make).status().expect("qemu-img").success());
    let disks = [format!("vda={}", site.production()), format!("vdb={vdb}")];
    let text = machine.display().to_string();
    site.room.ok(["backup", "db01", "--disk", &disks[0], "--disk", &disks[1], "--machine", &text]);
    let ran = site.json(&["run", "dr"]);
    assert!(ran.code <= 1, "{}{}", ran.stdout, ran.stderr);
    fs::write(&machine, &without).expect("write");
    let planned = ["failover", REPLICA, "--planned", "--no-start", "--network", "none"];
    let notes = site.json(&[&planned[..], &["-n"]].concat()).one("plan")["notes"].to_string();
    assert!(notes.contains("without the disk vdb"), "{notes}");
    let done = site.json(&planned);
    assert_eq!((done.code, site.state().as_str()), (1, "failover"), "{}", done.stdout);
    let gone = done.kind("warning").into_iter().find(|warning| warning["code"] == "W_DISK_GONE");
    assert!(
        gone.is_some_and(|gone| gone["what"].to_string().contains("vdb") && !gone["do"].is_null()),
        "{}",
        done.stdout
    );
}

#[test]
fn a_new_repository_names_the_job_that_fills_it() {
    let room = crate::harness::Room::new();
    let repo = room.repo();
    room.write_site(&format!(
        "version = 1\n[repository]\nnas = {{ url = \"{}\", default = true }}\n[machine]\nm = {{ disks = {{ vda = \"/x.img\" }} }}\n\
         [job.night]\nkind = \"backup\"\nmachines = [\"m\"]\nto = \"nas\"\n",
        repo.display()
    ));
    let said = room.run(["-c", "site.toml", "init"]);
    assert!(said.stderr.trim_end().ends_with("run night"), "{}", said.stderr);
}

/// Words that a command may begin with which is not ours.
const OTHERS: [&str; 14] = [
    "apt-get",
    "cat",
    "chmod",
    "cp",
    "df",
    "export",
    "fsck",
    "fuser",
    "losetup",
    "ls",
    "mount",
    "mv",
    "systemctl",
    "umount",
];

#[test]
fn what_is_advised_is_a_command_and_no_sentence() {
    let mut folders = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    let mut wrong = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).expect("list").flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).expect("source");
            for start in [".help(\"", ".help(format!(\"", "let help = \"", "let help = format!(\"", "=> \"choose "] {
                for advice in text.split(start).skip(1) {
                    let mut words = advice.split(['"', ' ', ';', ',']).take(2);
                    let word = words.next().unwrap_or_default();
                    let is_command = word == "aquifer" || word.starts_with('{') || OTHERS.contains(&word);
                    if !is_command || (word == "mount" && words.next() == Some("what")) {
                        wrong.push(format!("{}: {}", path.display(), advice.lines().next().unwrap_or_default()));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
