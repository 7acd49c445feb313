//! Promise: a site file that names what is not there, or what nobody else may read, is told so before it matters.

use std::{fs, io::Write, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use serde_json::Value;

use crate::harness::{Outcome, Room};

const JOB: &str = "[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"nas\"\nretry = { count = 0 }\n";

/// A site with one repository, made, and this below its head. What `checked` runs is `config check`.
fn site(text: &str) -> Room {
    let room = Room::new();
    let dir = room.dir.path().display().to_string();
    let head = format!("version = 1\nhome = \"{dir}/home\"\n");
    let tables = text.replace("DIR", &dir);
    // The catalogue is what the text says, also where the tests run on PostgreSQL.
    fs::write(room.path("site.toml"), format!("{head}{tables}\n[repository]\nnas = {{ url = \"{dir}/repo\" }}\n"))
        .expect("a site file");
    room.ok(["init"]);
    room
}

fn checked(room: &Room) -> Outcome {
    room.json(["-c", &room.text("site.toml"), "config", "check"])
}

fn texts(outcome: &Outcome) -> String {
    let warnings = outcome.kind("warning");
    let text = |warning: &Value| {
        assert_eq!(warning["code"], "W_CHECK", "{warning}");
        format!("{} do: {}", warning["what"].as_str().unwrap_or_default(), warning["do"].as_str().unwrap_or_default())
    };
    warnings.iter().map(text).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_secret_that_others_may_read_is_refused() {
    let room = site("catalogue = { url = \"postgres://aquifer@127.0.0.1:1/none\", password = { file = \"DIR/pw\" } }");
    fs::write(room.path("pw"), "hunter2\n").expect("a password");
    for mode in [0o644, 0o640, 0o602] {
        fs::set_permissions(room.path("pw"), fs::Permissions::from_mode(mode)).expect("mode");
        let refused = room.json(["-c", &room.text("site.toml"), "jobs"]);
        let error = refused.one("error");
        assert_eq!((refused.code, error["code"].as_str()), (12, Some("E_KEY")), "{mode:o}: {}", refused.stdout);
        let what = error["what"].as_str().expect("text");
        assert!(what.contains(&room.text("pw")) && what.contains(&format!("mode {mode:04o}")), "{what}");
        assert_eq!(error["do"], format!("chmod 600 {}", room.text("pw")));
        let warned = checked(&room);
        assert_eq!(warned.code, 1, "{}", warned.stdout);
        assert!(texts(&warned).contains("do: chmod 600"), "{}", warned.stdout);
        assert!(!(warned.stdout + &refused.stdout + &refused.stderr).contains("hunter2"));
    }
    fs::set_permissions(room.path("pw"), fs::Permissions::from_mode(0o600)).expect("mode");
    assert_eq!(checked(&room).code, 0);
    let away = room.json(["-c", &room.text("site.toml"), "jobs"]);
    assert_ne!(away.one("error")["code"], "E_KEY", "the password is read, and nobody answers: {}", away.stdout);
    fs::remove_file(room.path("pw")).expect("remove");
    assert!(texts(&checked(&room)).contains("the file of a secret cannot be read"));
}

#[test]
fn a_secret_in_a_variable_that_is_not_set_is_told() {
    let room =
        site("catalogue = { url = \"postgres://aquifer@127.0.0.1:1/none\", password = { env = \"PGPASS_OF_US\" } }");
    let warned = checked(&room);
    assert_eq!(warned.code, 1, "{}", warned.stdout);
    assert!(texts(&warned).contains("PGPASS_OF_US"), "{}", warned.stdout);
    let mut command = room.command(["-c", &room.text("site.toml"), "config", "check", "--json"]);
    let set = Outcome::of(command.env("PGPASS_OF_US", "x").output().expect("it runs"));
    assert_eq!(set.code, 0, "{}", set.stdout);
}

fn with_host() -> (Room, PathBuf) {
    let room = site(&format!(
        "[host]\nprod = {{ kind = \"qemu\", images = \"DIR/images\" }}\n[machine]\ndb01 = {{ from = \"prod:db01\" }}\n{JOB}"
    ));
    let folder = room.path("images/db01");
    (room, folder)
}

#[test]
fn what_is_not_on_its_host_is_told() {
    let (room, folder) = with_host();
    let told = |part: &str| {
        let warned = checked(&room);
        assert_eq!(warned.code, 1, "{}", warned.stdout);
        let text = texts(&warned);
        assert!(text.contains(part), "{part}: {text}");
        assert_eq!(warned.kind("warning").len(), 1, "said once: {text}");
    };
    told("host.prod: the folder of its machines");
    fs::create_dir_all(room.path("images")).expect("folder");
    told("the host prod has no machine `db01`");
    fs::create_dir_all(&folder).expect("folder");
    told("db01 has no disks");
    fs::write(folder.join("vda.raw"), [0; 4096]).expect("a disk");
    fs::write(folder.join("machine.toml"), "foo = 1\n").expect("a description");
    told("unknown key `foo`");
    // Without a description it is told what that means, which is no fault.
    fs::remove_file(folder.join("machine.toml")).expect("remove");
    let noted = checked(&room);
    assert_eq!(noted.code, 0, "{}", noted.stdout);
    let note = noted.one("undescribed");
    assert_eq!(
        (&note["machine"], &note["cpus"], &note["memory_bytes"]),
        (&"db01".into(), &2.into(), &(4u64 << 30).into())
    );
    assert!(noted.stderr.contains("failback needs one"), "{}", noted.stderr);
    fs::write(folder.join("machine.toml"), "version = 1\n[[disk]]\nname = \"vda\"\n").expect("a description");
    let fine = checked(&room);
    assert!(fine.code == 0 && fine.kind("undescribed").is_empty(), "{}", fine.stdout);
}

#[test]
fn places_that_lie_in_each_others_way_are_told() {
    let room = site("");
    let dir = room.dir.path().display().to_string();
    for folder in ["a/one", "b", "run"] {
        fs::create_dir_all(room.path(folder)).expect("folder");
    }
    let with = |text: &str| {
        let head = format!("version = 1\nhome = \"{dir}/home\"\n");
        fs::write(room.path("site.toml"), format!("{head}{text}")).expect("a site file");
        let checked = checked(&room);
        let told = checked.kind("warning").iter().map(|w| w["what"].to_string()).collect::<Vec<_>>();
        told.into_iter().filter(|what| !what.contains("no machine") && !what.contains("there is")).collect::<Vec<_>>()
    };
    let hosts = |one: &str, other: &str| {
        let host = |name: &str, images: &str| format!("{name} = {{ kind = \"qemu\", images = \"{dir}/{images}\" }}\n");
        format!("[host]\n{}{}", host("x", one), host("y", other))
    };
    let told = |text: &str, parts: &[&str]| {
        let all = with(text);
        assert!(all.iter().any(|what| parts.iter().all(|part| what.contains(part))), "{text}: {all:?}");
    };
    told(&hosts("a", "a"), &["host.x and host.y have one folder"]);
    told(&hosts("a", "a/one"), &["host.x and host.y have one folder", "a/one"]);
    let cluster = format!("{}[cluster]\nz = {{ members = [\"x\", \"y\"] }}\n", hosts("a", "a"));
    assert!(with(&cluster).iter().all(|what| !what.contains("one folder")));
    let twice = "[machine]\nm = { from = \"x:one\" }\nn = { from = \"x:one\" }\n";
    told(&format!("{}{twice}", hosts("a", "b")), &["machine.m and machine.n are the same machine"]);
    let among = format!("[repository]\nnas = {{ url = \"{dir}/a/nas\" }}\n{}", hosts("a", "b"));
    told(&among, &["repository.nas lies among the machines of host.x"]);
    assert!(with(&hosts("a", "b")).is_empty());
}

#[test]
fn every_repository_that_is_not_made_is_in_the_next_step() {
    let room = Room::new();
    let dir = room.dir.path().display().to_string();
    room.write_site(&format!(
        "version = 1\nhome = \"{dir}/home\"\n[repository]\na = {{ url = \"{dir}/a\" }}\nb = {{ url = \"{dir}/b\" }}\n"
    ));
    let outcome = room.ok(["-c", &room.text("site.toml"), "config", "check"]);
    let next = outcome.stderr.lines().find(|line| line.starts_with("next: ")).expect("a next step");
    assert!(next.contains(&format!("{dir}/a init")) && next.contains(&format!("{dir}/b init")), "{next}");
}

#[test]
fn messages_of_the_site_file_say_what_is_wrong() {
    let room = Room::new();
    let said = |text: &str| {
        fs::write(room.path("site.toml"), format!("version = 1\n{text}")).expect("a site file");
        room.run(["-c", &room.text("site.toml"), "config", "check"])
    };
    let empty = said("[site]\nname = \"\"\n").stderr;
    assert!(empty.contains("`name` must not be empty") && !empty.contains("not a string"), "{empty}");
    let twice = said("[site]\nname = \"a\"\nname = \"b\"\n").stderr;
    assert!(twice.contains("duplicate key `name`"), "{twice}");
    let umlaut = said("[repository]\n\"m\u{e4}\" = { url = \"/srv/a\" }\n").stderr;
    assert!(umlaut.contains("a name has letters (a to z, A to Z)"), "{umlaut}");
}

#[test]
fn runs_at_seconds_are_shown_with_them() {
    let room = site(
        "[machine]\ndb01 = { disks = { vda = \"raw:/dev/null\" } }\n[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"nas\"\nschedule = { cron = \"*/20 * * * * *\" }\n",
    );
    let outcome = room.ok(["-c", &room.text("site.toml"), "config", "check"]);
    let line = outcome.stdout.lines().find(|line| line.starts_with("job b:")).expect("the job");
    let times: Vec<&str> = line.trim_start_matches("job b: backup, ").split(", ").collect();
    assert!(times.len() == 3 && times[0] != times[1] && times[1] != times[2], "{line}");
}

/// A small file system of its own, gone with the test.
struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_repository_says_what_the_unfinished_run_keeps() {
    let room = Room::new();
    fs::create_dir_all(room.repo()).expect("folder");
    let done = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(room.repo()).status();
    assert!(done.expect("mount").success(), "this test needs root");
    let _small = Small(room.repo());
    room.ok(["init"]);
    let mut bytes = vec![0; 12 << 20];
    crate::storm::Dice(7).fill(&mut bytes);
    fs::write(room.path("vm.img"), bytes).expect("an image");
    let full = room.run(["backup", "db01", "--disk", &format!("vda=raw:{}", room.text("vm.img"))]);
    assert!(full.code == 2 && full.stderr.contains("E_CAPACITY"), "{}", full.stderr);
    let order = format!("aquifer -r {} forget --interrupted db01", room.repo().display());
    assert!(full.stderr.contains(&order), "{}", full.stderr);
    // Nothing at all is left: a lease is a file, and there is no room for one.
    let mut rest = fs::File::create(room.repo().join("rest")).expect("a file");
    while rest.write_all(&[1; 512]).is_ok() {}
    let freed = room.ok(["forget", "--interrupted", "db01", "--yes"]);
    assert!(freed.stdout.contains("MiB"), "{}", freed.stdout);
    let left = room.repo().join("machines");
    let left = Command::new("find").arg(left).args(["-name", "*.aql"]).output().expect("find");
    assert!(left.stdout.is_empty(), "{}", String::from_utf8_lossy(&left.stdout));
    assert!(room.ok(["forget", "--interrupted", "db01", "--yes"]).stdout.contains("no interrupted backup"));
}
