//! `recover` to `finalize`, as a user types them, on guests that say what they read.

use std::{fs, path::Path, process::Command, time::Duration};

use aquifer_tests::{
    boot_sector,
    site::{Guest, Site, eventually},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const SMALL: [&str; 4] = ["--memory", "64MiB", "--network", "none"];

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A compressed qcow2 with the guest, and two increments on it; returns the newest state.
fn chain(site: &Site) -> Vec<u8> {
    fs::create_dir(site.path("chain")).expect("folder");
    fs::write(site.path("source.raw"), boot_sector::disk(24, 20)).expect("disk");
    let (base, one, two) = (site.word("chain/base.qcow2"), site.word("chain/one.qcow2"), site.word("chain/two.qcow2"));
    let zstd = "compression_type=zstd";
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", zstd, &site.word("source.raw"), &base]);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &one]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 9M 300k", "-c", "write -z 12M 1M", &one]);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "one.qcow2", "-F", "qcow2", &two]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0xa5 9100k 70k", &two]);
    let flat = site.word("flat.raw");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &two, &flat]);
    fs::remove_file(site.path("source.raw")).expect("gone");
    let bytes = fs::read(&flat).expect("flat");
    fs::remove_file(flat).expect("gone");
    bytes
}

fn recover(site: &Site, source: &str, name: &str, more: &[&str]) -> Guest {
    let into = site.word(name);
    let said = site.json(&[&["recover", source, "--into", &into], &SMALL[..], more].concat());
    let machine = said.record("machine");
    assert_eq!((&machine["name"], &machine["result"]), (&name.into(), &"running".into()));
    let session = site.session(name);
    assert_eq!(session["machine"]["power"], "running");
    let guest = Guest::of(&session);
    eventually("the guest speaks", || (guest.starts() == 1).then_some(()));
    guest
}

fn pid(value: &Value) -> Pid {
    let number = value.as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a process");
    Pid::from_raw(number).expect("a process")
}

fn missing(session: &Value) -> u64 {
    session["disks"].as_array().expect("disks").iter().filter_map(|d| d["overlay"]["absent"].as_u64()).sum()
}

/// Nothing of a recovery in the folder, in the list, or among the processes.
fn nothing_left(site: &Site, name: &str) {
    assert!(!site.path(name).exists(), "{name} is still there");
    assert!(site.sessions().is_empty(), "{:?}", site.sessions());
    let ours = site.word(name);
    let left: Vec<String> = fs::read_dir("/proc")
        .expect("proc")
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "))
        .filter(|line| line.contains(&ours))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_chain_runs_at_once_and_ends_as_an_ordinary_disk() {
    let site = Site::new();
    let expected = boot_sector::after_a_round(&chain(&site));
    let guest = recover(&site, &site.word("chain/two.qcow2"), "db01", &["--rate", "1MiB/s"]);
    guest.goes_on(3);
    let session = site.session("db01");
    assert!(missing(&session) > 0, "it runs before it is copied: {session}");
    assert_ne!(session["local_percent"], 100);

    // The door dies under it. The guest waits, and sees nothing.
    kill_process(pid(&session["door"]["pid"]), Signal::KILL).expect("kill");
    guest.goes_on(3);
    let session = eventually("a new door", || {
        let now = site.session("db01");
        (now["door"]["status"] == "running" && now["door"]["pid"] != session["door"]["pid"]).then_some(now)
    });
    assert_eq!(session["machine"]["power"], "running");

    site.json(&["session", "set", "db01", "--rate", "none"]);
    assert_eq!(site.run(&["wait", "db01", "--for", "local", "--timeout", "30s"]).code, 0);
    guest.whole_round();
    let kept = site.json(&["finalize", "db01", "--keep"]);
    let disk = kept.record("disk");
    assert!(disk["pause_us"].as_u64().is_some_and(|pause| pause > 0 && pause < 5_000_000), "{disk}");
    assert!(site.sessions().is_empty());

    // The backups may go, and everything of ours is gone already.
    fs::remove_dir_all(site.path("chain")).expect("gone");
    guest.whole_round();
    guest.turn_off();
    let path = Path::new(disk["path"].as_str().expect("a path")).to_path_buf();
    let folder: Vec<_> =
        fs::read_dir(path.parent().expect("folder")).expect("list").flatten().map(|e| e.file_name()).collect();
    assert_eq!(folder, ["disk.raw"], "an ordinary disk and nothing beside it");
    eventually("the machine is off", || Command::new("qemu-img").arg("check").arg(&path).output().ok().map(drop));
    assert!(fs::read(&path).expect("disk") == expected, "the restore point and what the guest wrote, nothing else");
    assert_eq!(site.run(&["finalize", &site.word("db01"), "--keep"]).code, 3, "it has been finalized");
    let command = fs::read_to_string(site.path("db01/qemu.command")).expect("command");
    assert!(command.contains("disk.raw") && !command.contains("nbd"), "it stands on its own disk: {command}");
}

#[test]
fn a_point_of_a_repository_is_held_while_it_runs_and_discarded_with_a_word() {
    let site = Site::new();
    let mut disk = boot_sector::disk(24, 16);
    fs::write(site.path("disk.raw"), &disk).expect("disk");
    site.json(&["init"]);
    let source = format!("vda=raw:{}", site.word("disk.raw"));
    site.json(&["backup", "db01", "--disk", &source]);
    disk[10 << 20..11 << 20].fill(0x77);
    fs::write(site.path("disk.raw"), &disk).expect("disk");
    site.json(&["backup", "db01", "--disk", &source]);
    fs::remove_file(site.path("disk.raw")).expect("gone");

    let guest = recover(&site, "db01@latest~1", "db01", &["--no-hydrate"]);
    guest.goes_on(3);
    let leases = site.json(&["leases"]).out;
    assert!(leases.contains("aquifer recover"), "the point is held: {leases}");
    let refused = site.run(&["forget", "db01@latest~1", "--yes"]);
    assert!(refused.code == 11 && refused.err.contains("E_POINT_IN_USE"), "{refused:#?}");
    site.json(&["forget", "db01@latest~1", "--even-read", "--yes"]);
    guest.goes_on(3);

    let refused = site.run(&["finalize", "db01", "--discard"]);
    assert_eq!(refused.code, 4, "nobody said yes: {refused:#?}");
    assert!(refused.err.contains("deleted"), "what is lost is said: {}", refused.err);
    guest.goes_on(1);
    assert_eq!(site.run(&["finalize", "db01", "--discard", "-n"]).code, 0);
    guest.goes_on(1);
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    nothing_left(&site, "db01");
    let leases = site.json(&["leases"]).out;
    assert!(!leases.contains("aquifer recover"), "nothing holds it any more: {leases}");
}

#[test]
fn a_recovery_whose_processes_are_dead_keeps_its_restore_point() {
    let site = Site::new();
    site.json(&["init"]);
    let source = format!("vda=raw:{}", site.word("disk.raw"));
    for _ in 0..2 {
        fs::write(site.path("disk.raw"), boot_sector::disk(24, 16)).expect("disk");
        site.json(&["backup", "db01", "--full", "--disk", &source]);
    }
    let guest = recover(&site, "db01@latest~1", "db01", &["--no-hydrate"]);
    guest.goes_on(1);
    let session = site.session("db01");
    for process in [&session["door"]["supervisor"], &session["door"]["pid"], &session["machine"]["pid"]] {
        kill_process(pid(process), Signal::KILL).expect("kill");
    }
    eventually("all of it is seen to be dead", || {
        let now = site.session("db01");
        (now["door"]["status"] == "not_running" && now["machine"]["power"] == "off").then_some(())
    });
    // Retention comes by before anybody brings it back.
    site.json(&["forget", "db01@latest~1", "--even-read", "--yes"]);
    site.json(&["session", "resume", "db01"]);
    eventually("the guest starts again", || (guest.starts() == 2).then_some(()));
    guest.whole_round();
    site.json(&["finalize", "db01", "--discard", "--yes"]);
}

#[test]
fn everything_killed_comes_back_by_one_command() {
    let site = Site::new();
    chain(&site);
    let guest = recover(&site, &site.word("chain/two.qcow2"), "db01", &["--no-hydrate"]);
    guest.whole_round();
    let session = site.session("db01");
    for process in [&session["door"]["supervisor"], &session["door"]["pid"], &session["machine"]["pid"]] {
        kill_process(pid(process), Signal::KILL).expect("kill");
    }
    let dead = eventually("all of it is seen to be dead", || {
        let now = site.session("db01");
        (now["door"]["status"] == "not_running" && now["machine"]["power"] == "off").then_some(now)
    });
    assert!(dead["allowed_operations"].as_array().expect("list").contains(&"resume".into()), "{dead}");
    let said = site.json(&["session", "resume", "db01"]).record("done");
    assert_eq!((&said["door_started"], &said["machine_started"]), (&true.into(), &true.into()));
    eventually("the guest starts again", || (guest.starts() == 2).then_some(()));
    guest.goes_on(3);
    site.json(&["finalize", "db01", "--keep", "--timeout", "60s"]);
    guest.goes_on(3);
    guest.turn_off();
}

#[test]
fn a_silent_hypervisor_hides_neither_its_session_nor_the_way_on() {
    let site = Site::new();
    chain(&site);
    let guest = recover(&site, &site.word("chain/two.qcow2"), "db01", &["--no-hydrate"]);
    let session = site.session("db01");
    let machine = pid(&session["machine"]["pid"]);
    kill_process(machine, Signal::STOP).expect("stop");
    for process in [&session["door"]["supervisor"], &session["door"]["pid"]] {
        kill_process(pid(process), Signal::KILL).expect("kill");
    }
    let now = site.session("db01");
    assert_eq!((&now["machine"]["power"], now["machine"]["silent"].is_string()), (&Value::Null, true), "{now}");
    // Its door comes up all the same: a hypervisor may be silent because it waits for just that.
    site.run(&["session", "resume", "db01"]);
    let now = site.session("db01");
    kill_process(machine, Signal::CONT).expect("go on");
    assert_eq!(now["door"]["status"], "running", "{now}");
    site.json(&["session", "resume", "db01"]);
    guest.goes_on(3);
    site.json(&["finalize", "db01", "--discard", "--yes"]);
}

#[test]
fn a_failed_start_leaves_nothing_behind() {
    let site = Site::new();
    chain(&site);
    let two = site.word("chain/two.qcow2");
    let into = site.word("vm/db01");
    let fails = |what: &str, args: &[&str], codes: &[i32]| {
        let small = if args.contains(&"--memory") { &[][..] } else { &SMALL[..] };
        let said = site.run(&[&["recover", "--into", &into], args, small].concat());
        assert!(codes.contains(&said.code), "{what}: {said:#?}");
        assert!(said.err.starts_with("E_") || said.err.contains("\nE_"), "{what} names a code: {said:#?}");
        assert!(!site.path("vm").exists(), "{what}: a folder is left");
        nothing_left(&site, "vm");
    };
    fails("no such image", &[&site.word("nothing.qcow2")], &[2]);
    fails("not an image", &["/etc/passwd"], &[2, 3]);
    fails("no such host", &[&two, "--host", "none"], &[4]);
    fails("two names for one disk", &["--disk", &format!("a={two}"), "--disk", &format!("a={two}")], &[4]);
    // The hypervisor is started, and fails: the door is up by then and has to go again.
    fails("no host has so much memory", &[&two, "--memory", "60TiB"], &[2]);
    fs::write(site.path("m.toml"), "version = 1\n[[disk]]\nname = \"a\"\n[[disk]]\nname = \"b\"\n").expect("file");
    fails("a description of another machine", &[&two, "--machine", &site.word("m.toml")], &[4]);

    // A middle file of the chain is damaged: the door may meet that only when it opens.
    fs::rename(site.path("chain/one.qcow2"), site.path("chain/one.gone")).expect("rename");
    fails("a broken chain", &[&two], &[2, 14]);
    fs::rename(site.path("chain/one.gone"), site.path("chain/one.qcow2")).expect("rename");

    fs::create_dir(site.path("full")).expect("folder");
    fs::write(site.path("full/file"), "x").expect("file");
    let said = site.run(&["recover", &two, "--into", &site.word("full")]);
    assert_eq!(said.code, 3, "a folder with something in it: {said:#?}");
    assert_eq!(fs::read(site.path("full/file")).expect("file"), b"x");
    let dry = site.json(&["recover", &two, "--into", &into, "-n"]);
    assert_eq!(dry.record("plan")["firmware"]["firmware"], "bios");
    nothing_left(&site, "vm");
}

#[test]
fn too_little_space_is_found_before_the_machine_starts() {
    let site = Site::new();
    chain(&site);
    fs::create_dir(site.path("small")).expect("folder");
    let small = site.word("small");
    tool("mount", &["-t", "tmpfs", "-o", "size=40m", "none", &small]);
    let into = site.word("small/db01");
    let said = site.run(&[&["recover", &site.word("chain/two.qcow2"), "--into", &into], &SMALL[..]].concat());
    let left = fs::read_dir(&small).expect("list").count();
    tool("umount", &[&small]);
    assert_eq!(said.code, 2, "{said:#?}");
    assert!(said.err.contains("E_CAPACITY"), "{said:#?}");
    assert_eq!(left, 0, "nothing is left");
    nothing_left(&site, "small/db01");
}

#[test]
fn of_several_machines_one_failure_stops_no_other_and_the_limit_queues() {
    let site = Site::new();
    chain(&site);
    let two = site.word("chain/two.qcow2");
    fs::copy(site.path("chain/base.qcow2"), site.path("chain/web.qcow2")).expect("copy");
    let (web, none) = (site.word("chain/web.qcow2"), site.word("chain/gone.qcow2"));
    let into = site.word("vm");
    let limit = ["--memory-limit", "100MiB"];
    let args = [&["--json", "recover", &two, &none, &web, "--into", &into, "--no-hydrate"], &SMALL[..], &limit[..]];
    let child = site.command(&args.concat()).stdout(std::process::Stdio::piped()).spawn().expect("recover");
    let runs = |s: &Value| s["name"] == "two" && s["machine"]["power"] == "running";
    let first = eventually("the first machine runs", || site.sessions().into_iter().find(runs));
    let guest = Guest::of(&first);
    guest.goes_on(1);
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(site.sessions().len(), 1, "the third waits for room");
    guest.turn_off();
    let output = child.wait_with_output().expect("recover ends");
    assert_eq!(output.status.code(), Some(2), "one of them failed");
    let lines: Vec<Value> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).expect("a JSON line"))
        .collect();
    let results: Vec<(&str, &str)> = lines
        .iter()
        .filter(|l| l["type"] == "machine")
        .filter_map(|l| Some((l["name"].as_str()?, l["result"].as_str()?)))
        .collect();
    assert_eq!(results, [("two", "running"), ("gone", "failed"), ("web", "queued"), ("web", "running")]);
    Guest::of(&site.session("web")).goes_on(1);
    assert!(!site.path("vm/gone").exists());
}

#[test]
fn a_machine_gets_its_own_board_and_what_its_firmware_remembers() {
    let site = Site::new();
    fs::write(site.path("disk.raw"), boot_sector::disk(24, 16)).expect("disk");
    site.json(&["init"]);
    let disk = format!("hda=raw:{}", site.word("disk.raw"));
    // An old machine: its disk on IDE, on a board of a version of its own.
    let old = "version = 1\nname = \"old\"\nmachine_type = \"pc-i440fx-7.2\"\nmemory = \"64MiB\"\n[[disk]]\nname = \"hda\"\nbus = \"ide\"\n";
    fs::write(site.path("old.toml"), old).expect("file");
    site.json(&["backup", "old", "--disk", &disk, "--machine", &site.word("old.toml")]);
    let guest = recover(&site, "old", "old", &["--no-hydrate"]);
    guest.goes_on(3);
    let command = fs::read_to_string(site.path("old/qemu.command")).expect("command");
    assert!(command.contains("-machine pc-i440fx-7.2,") && command.contains("ide.0"), "{command}");
    site.json(&["finalize", "old", "--discard", "--yes"]);

    // A newer one, with variables that its firmware wrote: a mark where firmware itself writes nothing.
    let mut variables = fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").expect("ovmf is installed by scripts/setup.sh");
    variables[0x40800..0x40804].copy_from_slice(b"MARK");
    fs::write(site.path("own.fd"), &variables).expect("variables");
    let new = "version = 1\nname = \"new\"\nfirmware = \"uefi\"\nmachine_type = \"pc-q35-foreign\"\nmemory = \"128MiB\"\nnvram = \"own.fd\"\n";
    fs::write(site.path("new.toml"), new).expect("file");
    let backup = ["backup", "new", "--disk", &disk, "--machine", "new.toml"];
    let without = site.run(&backup);
    assert_eq!(without.code, 1, "what is left out is a warning: {without:#?}");
    assert!(without.err.contains("--nvram own.fd"), "{without:#?}");
    site.json(&[&backup[..], &["--nvram", "own.fd"]].concat());
    fs::remove_file(site.path("own.fd")).expect("lost with the machine");
    let said = site.run(&["recover", "new", "--into", &site.word("new"), "--network", "none", "--no-hydrate"]);
    assert_eq!(said.code, 0, "{said:#?}");
    assert!(said.err.contains("type pc-q35-foreign") && said.err.contains("becomes q35"), "{said:#?}");
    let own = fs::read(site.path("new/nvram.fd")).expect("variables");
    assert_eq!((own.len(), &own[0x40800..0x40804]), (variables.len(), &b"MARK"[..]));
    site.json(&["finalize", "new", "--discard", "--yes"]);

    // Variables of another firmware's length do not keep it from starting; a file without any is refused.
    variables.truncate(128 << 10);
    fs::write(site.path("other.fd"), &variables).expect("variables");
    let args = ["recover", "new", "--into", &site.word("new"), "--network", "none", "-n", "--nvram"];
    let dry = site.json(&[&args[..], &["other.fd"]].concat());
    assert!(dry.record("plan")["warnings"].to_string().contains("131072 bytes"), "{dry:#?}");
    assert_eq!(site.run(&[&args[..], &["disk.raw"]].concat()).code, 2);
    nothing_left(&site, "new");
}
