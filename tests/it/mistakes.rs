//! What a newcomer gets wrong, and what goes wrong around one: each is one clear error with a remedy and the contract's
//! exit code, nothing half-made is left, and what others use is not touched.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use aquifer_tests::{
    boot_sector,
    program::aquifer,
    qemu,
    site::{Guest, Said, Site, eventually},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const SMALL: [&str; 4] = ["--memory", "64MiB", "--network", "none"];

/// A compressed image of a disk with the guest, of `mib` MiB full of data.
fn image(site: &Site, name: &str, mib: usize) -> String {
    fs::write(site.path("disk.tmp"), boot_sector::disk(mib, mib)).expect("disk");
    let image = site.word(name);
    qemu::img(&["convert", "-f", "raw", "-O", "qcow2", "-c", &site.word("disk.tmp"), &image]);
    fs::remove_file(site.path("disk.tmp")).expect("gone");
    image
}

fn recover<'a>(source: &'a str, into: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["recover", source, "--into", into], &SMALL[..], more].concat()
}

fn spawn(site: &Site, args: &[&str]) -> Child {
    site.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("aquifer")
}

fn end(child: Child) -> Said {
    said_by(&child.wait_with_output().expect("it ends"))
}

fn said(command: &mut Command) -> Said {
    said_by(&command.output().expect("aquifer"))
}

fn said_by(output: &std::process::Output) -> Said {
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    Said { code: output.status.code().unwrap_or(-1), out: String::new(), err }
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid"), signal).expect("signal");
}

/// One error: its code, then where, then a remedy, with this exit code.
fn refused(said: &Said, exit: i32, code: &str, remedy: &str) {
    assert_eq!(said.code, exit, "{said:#?}");
    let errors: Vec<&str> = said.err.lines().filter(|line| line.starts_with("E_")).collect();
    assert!(matches!(errors[..], [one] if one.starts_with(&format!("{code}: "))), "{said:#?}");
    let helps = said.err.lines().any(|line| line.starts_with("  do: ") && line.contains(remedy));
    assert!(helps, "no remedy with {remedy}: {said:#?}");
}

/// Processes that name a folder on their command line.
fn processes(dir: &Path) -> Vec<String> {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").expect("proc").flatten().filter(|entry| entry.file_name() != *own);
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
    lines.filter(|line| line.contains(&*dir.to_string_lossy())).collect()
}

fn nothing_left(site: &Site, dir: &str) {
    assert!(!site.path(dir).exists(), "{dir} is still there");
    assert!(site.sessions().is_empty(), "{:?}", site.sessions());
    assert_eq!(processes(&site.path(dir)), Vec::<String>::new());
}

#[test]
fn words_that_lead_nowhere_are_explained() {
    let site = Site::new();
    let db = image(&site, "db01.qcow2", 8);
    let into = site.word("vm/db01");
    let said = said(site.command(&recover("db99.qcow2", &into, &[])).env_remove("AQUIFER_REPO"));
    refused(&said, 10, "E_NO_REPOSITORY", "-r DIR");
    assert!(said.err.contains("there is no file `db99.qcow2` here"), "{}", said.err);
    site.json(&["init"]);
    refused(&site.run(&recover("db01@latest", &into, &[])), 2, "E_NOT_FOUND", "aquifer points");
    site.json(&["backup", "db01", "--disk", &format!("vda={db}")]);
    refused(&site.run(&recover("db01@latest~7", &into, &[])), 2, "E_NOT_FOUND", "aquifer points");
    refused(&site.run(&recover("db01@ffffffff", &into, &[])), 2, "E_NOT_FOUND", "aquifer points");
    for verb in [&["status"][..], &["wait"], &["finalize", "--keep"], &["session", "resume"], &["events"]] {
        refused(&site.run(&[verb, &["nobody"]].concat()), 2, "E_NOT_FOUND", "aquifer status");
    }
    let said = site.run(&["finalize", "nobody"]);
    refused(&said, 4, "E_USAGE", "aquifer finalize --help");
    assert!(said.err.contains("--discard"), "both ways are named: {}", said.err);
    // Without a hypervisor in reach: found before anything is made.
    let bare = self::said(site.command(&recover(&db, &into, &[])).env("PATH", site.path("empty")));
    refused(&bare, 2, "E_TOOL", "aquifer doctor");
    let below_a_file = format!("{db}/vm");
    assert_eq!(site.run(&recover(&db, &below_a_file, &[])).code, 4);
    nothing_left(&site, "vm");
}

#[test]
fn of_several_recoveries_into_one_folder_one_runs_and_no_other_touches_it() {
    let site = Site::new();
    let db = image(&site, "db01.qcow2", 8);
    let into = site.word("vm/db01");
    // One that fails late, in a folder beside: the way to both was missing when they began.
    let beside = site.word("vm/beside");
    let fails = spawn(&site, &["recover", &db, "--into", &beside, "--memory", "60TiB", "--network", "none"]);
    let all = [(); 3].map(|()| spawn(&site, &recover(&db, &into, &["--no-hydrate"])));
    let ends = all.map(end);
    assert_eq!(ends.iter().filter(|said| said.code == 0).count(), 1, "{ends:#?}");
    for said in ends.iter().filter(|said| said.code != 0) {
        refused(said, 3, "E_EXISTS", "");
    }
    assert_eq!(end(fails).code, 2);
    assert!(!site.path("vm/beside").exists());
    let guest = Guest::of(&site.session("db01"));
    guest.goes_on(3);

    let folder_again = site.run(&recover(&db, &into, &["--name", "other"]));
    refused(&folder_again, 3, "E_EXISTS", "aquifer status");
    let name_again = site.run(&recover(&db, &site.word("elsewhere"), &["--name", "db01"]));
    refused(&name_again, 3, "E_EXISTS", "--name NAME");
    assert!(!site.path("elsewhere").exists());
    guest.goes_on(1);
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    nothing_left(&site, "vm/db01");
}

#[test]
fn ctrl_c_takes_an_unfinished_recovery_down_again() {
    let site = Site::new();
    let db = image(&site, "db01.qcow2", 8);
    let (into, mut interrupted) = (site.word("vm/db01"), 0);
    for millis in [20, 60, 100, 150, 250, 400] {
        let child = spawn(&site, &recover(&db, &into, &["--no-hydrate"]));
        std::thread::sleep(Duration::from_millis(millis));
        signal(child.id(), Signal::INT);
        let said = end(child);
        match said.code {
            0 => drop(site.json(&["finalize", "db01", "--discard", "--yes"])),
            // Before the first instruction of ours the system's own way of ending holds.
            -1 => {}
            _ => {
                assert!(said.code == 130 && said.err.contains("E_INTERRUPTED: "), "after {millis} ms: {said:#?}");
                interrupted += 1;
            }
        }
        let _ = fs::remove_dir(site.path("vm"));
        nothing_left(&site, "vm");
    }
    assert!(interrupted > 0, "none was interrupted on its way");
}

#[test]
fn what_a_killed_command_leaves_is_listed_and_goes_with_one_command() {
    let site = Site::new();
    let db = image(&site, "db01.qcow2", 8);
    let (into, mut halves) = (site.word("vm/db01"), 0);
    for millis in [80, 120, 180, 260, 400, 600] {
        let mut child = spawn(&site, &recover(&db, &into, &["--no-hydrate"]));
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().expect("kill");
        child.wait().expect("reap");
        if let [session] = &site.sessions()[..] {
            halves += usize::from(session["machine"]["power"] != "running");
            let able = session["allowed_operations"].as_array().expect("a list");
            assert!(able.contains(&"discard".into()), "{session}");
            site.json(&["finalize", "db01", "--discard", "--yes"]);
        } else {
            // Killed between the folder and the list: the folder says what it is.
            if site.path("vm/db01/session.json").exists() {
                site.json(&["finalize", &into, "--discard", "--yes"]);
            }
            let _ = fs::remove_dir_all(site.path("vm"));
        }
        let _ = fs::remove_dir(site.path("vm"));
        nothing_left(&site, "vm");
    }
    assert!(halves > 0, "none was caught half-way");
}

#[test]
fn a_folder_taken_away_by_hand_leaves_a_way_out() {
    let site = Site::new();
    let db = image(&site, "db01.qcow2", 8);
    let into = site.word("vm/db01");
    site.json(&recover(&db, &into, &["--no-hydrate"]));
    fs::remove_dir_all(&into).expect("taken away");
    let said = site.run(&["status"]);
    assert_eq!(said.code, 1, "{said:#?}");
    assert!(said.err.contains("db01: its folder") && said.err.contains("--discard"), "{said:#?}");
    assert!(!processes(Path::new(&into)).is_empty());
    assert_eq!(site.run(&["finalize", "db01", "--discard"]).code, 4, "nobody said yes");
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    assert_eq!(site.run(&["status"]).code, 0);
    let _ = fs::remove_dir(site.path("vm"));
    nothing_left(&site, "vm");
}

#[test]
fn a_source_that_breaks_under_the_copy_is_told_and_waited_for_in_vain_by_nobody() {
    let site = Site::new();
    let db = image(&site, "db01.qcow2", 24);
    let into = site.word("db01");
    site.json(&["init"]);
    site.json(&["backup", "db01", "--disk", &format!("vda={db}")]);
    site.json(&recover("db01", &into, &["--rate", "1MiB/s"]));
    let guest = Guest::of(&site.session("db01"));
    guest.whole_round();
    // Somewhere among the stored blocks of the second half.
    let info = site.json(&["info", "db01"]).record("disk");
    let layer = info["layers"][0]["path"].as_str().expect("a file");
    let length = fs::metadata(layer).expect("layer").len();
    let file = OpenOptions::new().write(true).open(layer).expect("layer");
    file.write_all_at(&[0xee; 200_000], length * 3 / 4).expect("damage");
    site.json(&["session", "set", "db01", "--rate", "none"]);
    let waited = site.run(&["wait", "db01", "--timeout", "50s"]);
    refused(&waited, 14, "E_BLOCK_CORRUPT", "aquifer status");
    refused(&site.run(&["finalize", "db01", "--keep"]), 14, "E_BLOCK_CORRUPT", "aquifer status");
    let shown = site.run(&["status", "db01"]);
    assert!(shown.out.contains("the copy failed") && shown.out.contains("its source is damaged"), "{}", shown.out);
    guest.goes_on(3);
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    nothing_left(&site, "db01");
}

/// A small file system of its own, taken away with the test.
struct Small(String);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", &self.0]).status();
    }
}

#[test]
fn a_disk_that_fills_up_holds_the_copy_and_not_what_the_guest_has() {
    let site = Site::new();
    let source = site.path("disk.raw");
    fs::write(&source, boot_sector::disk(320, 320)).expect("disk");
    fs::create_dir(site.path("small")).expect("folder");
    let small = Small(site.word("small"));
    let mount = |args: &[&str]| assert!(Command::new("mount").args(args).status().expect("mount").success());
    mount(&["-t", "tmpfs", "-o", "size=330m", "none", &small.0]);
    let (word, into) = (format!("raw:{}", qemu::text(&source)), site.word("small/db01"));
    site.json(&recover(&word, &into, &["--name", "db01", "--rate", "8MiB/s"]));
    let guest = Guest::of(&site.session("db01"));
    // What it has written once needs no new space.
    guest.whole_round();
    site.json(&["session", "set", "db01", "--rate", "none"]);
    let full = |session: &Value| session["disks"][0]["hydration"]["phase"] == "no_space";
    eventually("the disk is full", || Some(site.session("db01")).filter(full));
    guest.whole_round();
    let shown = site.run(&["status", "db01"]);
    assert!(shown.out.contains("waiting for space") && shown.out.contains("last error: "), "{}", shown.out);
    refused(&site.run(&["wait", "db01", "--timeout", "1s"]), 13, "E_TIMEOUT", "aquifer status");
    // The disk, its journal, and the room that the copy leaves to the machine.
    mount(&["-o", "remount,size=760m", &small.0]);
    let waited = site.run(&["wait", "db01", "--timeout", "60s"]);
    assert_eq!(waited.code, 0, "space came, and it went on: {}{}", waited.err, site.run(&["status", "db01"]).out);
    guest.goes_on(3);
    site.json(&["finalize", "db01", "--discard", "--yes"]);
    assert_eq!(fs::read_dir(&small.0).expect("list").count(), 0);
}

#[test]
fn a_door_on_a_port_in_use_says_so() {
    let site = Site::new();
    let db = image(&site, "db01.qcow2", 8);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let place = format!("tcp:{}", taken.local_addr().expect("address"));
    let said = site.run(&["mount", &db, "--nbd", &place]);
    assert_eq!(said.code, 11, "{said:#?}");
    assert!(said.err.contains("E_BUSY: ") && said.err.contains("EADDRINUSE"), "{said:#?}");
    assert!(aquifer().exists());
}
