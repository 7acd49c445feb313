//! Promise: what an operation on a replica would do is told before, what it leaves to be done is told after, and what is
//! advised can be typed.

use std::{
    fs,
    process::{Command, Stdio},
};

use aquifer_runner::catalogue::EventFilter;
use serde_json::json;

use crate::{
    carrier::{Process, wait},
    takeover::{REPLICA, Site},
};

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
}

#[test]
fn what_a_takeover_would_do_is_told_and_so_is_who_serves_after_it_was_taken_back() {
    let site = Site::new(1);
    site.start_production();
    let foreseen = |more: &[&str]| {
        let said = site.json(&[&["failover", REPLICA, "-n"], more].concat());
        assert_eq!(said.code, 0, "{}", said.stdout);
        said.one("plan")["notes"].to_string()
    };
    let notes = foreseen(&[]);
    let point = site.json(&["replicas", REPLICA]).one("point")["id"].as_str().expect("an id").to_owned();
    assert!(notes.contains(&format!("at the point {point} of 20")), "{notes}");
    assert!(notes.contains("db01 on prod runs: it is left alone"), "{notes}");
    assert!(foreseen(&["--fence", "force"]).contains("runs: it is turned off at once"));
    assert!(foreseen(&["--planned"]).contains("its guest is asked to turn itself off"));

    // A plan warns as its takeovers do, and with the same end.
    let ran = site.json(&["plan", "run", "all", "--network", "none"]);
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    let warned = &ran.one("plan")["run"]["record"]["entries"][0]["warnings"][0];
    assert_eq!(warned["code"], "W_HOST", "{warned}");
    site.does(&["undo", REPLICA, "--yes"]);

    site.does(&["failover", REPLICA, "--planned", "--no-start"]);
    let off = site.json(&["replicas", REPLICA]).one("replica");
    assert_eq!(off["runs"], json!(false));
    let line = site.room.run(["-c", "site.toml", "replicas"]).stdout;
    assert!(line.contains("failover (its machine is off"), "{line}");
    let undone = site.json(&["undo", REPLICA, "--yes", "--network", "none"]);
    let warned = undone.one("warning");
    assert_eq!((undone.code, warned["code"].as_str()), (1, Some("W_HOST")), "{}", undone.stdout);
    assert!(warned["what"].as_str().is_some_and(|what| what.contains("db01 on prod is off")), "{warned}");
    assert!(site.running("prod").is_none());

    site.does(&["failover", REPLICA, "--planned", "--no-start"]);
    let notes = site.json(&["undo", REPLICA, "-n"]).one("plan")["notes"].to_string();
    assert!(notes.contains("--restart"), "{notes}");
    let undone = site.json(&["undo", REPLICA, "--restart", "--yes", "--network", "none"]);
    assert_eq!(undone.code, 0, "{}", undone.stdout);
    assert!(site.running("prod").is_some() && site.state() == "ready");
}

#[test]
fn what_is_refused_says_what_there_is_and_what_is_typed() {
    let site = Site::new(1);
    let cause = |error: &serde_json::Value| error["at"]["cause"].as_str().unwrap_or_default().to_owned();
    let machine = site.refused(&["failover", "db01"], "E_NOT_FOUND");
    assert!(cause(&machine).contains(REPLICA), "{machine}");
    let near = site.refused(&["replicas", "db01_replca"], "E_NOT_FOUND");
    assert!(cause(&near).contains(&format!("did you mean `{REPLICA}`")), "{near}");
    let early = site.refused(&["failover", REPLICA, "--to", "2001-01-01T00:00:00Z"], "E_NOT_FOUND");
    assert!(early["what"].as_str().is_some_and(|what| what.contains("2001-01-01")), "{early}");
    assert!(cause(&early).contains("it has 1 point, of 20"), "{early}");

    site.does(&["failover", REPLICA, "--no-start"]);
    site.does(&["failback", REPLICA, "--yes"]);
    let again = site.refused(&["permanent", REPLICA, "--yes"], "E_STATE");
    assert!(cause(&again).contains("failback --switch now, undo"), "{again}");
    site.does(&["failback", REPLICA, "--switch", "now", "--no-start", "--yes"]);
    let untried = site.refused(&["commit", REPLICA, "--yes"], "E_STATE");
    let help = untried["do"].as_str().unwrap_or_default();
    assert!(help.contains(&format!("commit {REPLICA} --yes")) && help.ends_with("--force"), "{untried}");
    site.does(&["commit", REPLICA, "--force", "--yes"]);

    // A layer that is gone.
    let layer = site.room.path("dr").join(REPLICA).join("vda/1.qcow2");
    fs::remove_file(layer).expect("remove");
    let broken = site.json(&["failover", REPLICA, "--no-start", "--to", &first(&site)]);
    let error = broken.one("error");
    assert!(error["do"].as_str().is_some_and(|help| help.contains("--to latest~1")), "{error}");

    fs::rename(site.room.repo(), site.room.path("elsewhere")).expect("away");
    assert_eq!(site.refused(&["run", "night"], "E_NO_REPOSITORY")["exit"], 10);
}

fn first(site: &Site) -> String {
    let points = site.json(&["replicas", REPLICA]).kind("point");
    points[0]["id"].as_str().expect("an id").to_owned()
}

#[test]
fn a_disk_that_home_has_lost_is_listed_and_made_there() {
    let site = Site::new(1);
    let home = site.room.path("prod/db01");
    let (vda, vdb) = (site.production(), site.room.text("prod/db01/vdb.qcow2"));
    let machine = home.join("machine.toml");
    let without = fs::read_to_string(&machine).expect("text");
    fs::write(&machine, format!("{without}[[disk]]\nname = \"vdb\"\n")).expect("write");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &vdb, "4M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x21 1M 64k", &vdb]);
    let text = machine.display().to_string();
    let disks = [format!("vda={vda}"), format!("vdb={vdb}")];
    site.room.ok(["backup", "db01", "--disk", &disks[0], "--disk", &disks[1], "--machine", &text]);
    let ran = site.json(&["run", "dr"]);
    assert!(ran.code <= 1, "{}{}", ran.stdout, ran.stderr);
    // It was taken out of the machine, and its old image lies there still.
    fs::write(&machine, &without).expect("write");
    site.does(&["failover", REPLICA, "--no-start"]);

    let way = ["failback", REPLICA, "--switch", "now", "--no-start", "--grace", "0s", "--network", "none"];
    let seen = site.json(&[&way[..], &["-n"]].concat());
    assert_eq!(seen.one("error")["code"], "E_CONFIG_DRIFT", "{}", seen.stdout);
    assert!(seen.one("drift")["differences"].to_string().contains("the disk vdb"), "{}", seen.stdout);
    let kept = site.refused(&[&way[..], &["--drift", "keep", "--yes"]].concat(), "E_CONFIG_DRIFT");
    assert!(kept["do"].as_str().is_some_and(|help| help.contains("--drift apply")), "{kept}");
    let top = || {
        let failover = site.record().failover.expect("a takeover");
        let top = failover.tops.into_iter().find(|top| top.disk == "vdb").expect("the disk");
        site.room.path("dr").join(REPLICA).join(top.file).display().to_string()
    };
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x42 2M 64k", &top()]);
    let apply = [&way[..], &["--drift", "apply", "--yes"]].concat();
    let applied = site.json(&apply);
    assert!(applied.code <= 1, "{}{}", applied.stdout, applied.stderr);
    let made = home.join("vdb-2.qcow2").display().to_string();
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", &top(), &made]);
    let now = fs::read_to_string(&machine).expect("text");
    assert!(now.contains("vdb-2.qcow2"), "{now}");
    tool("qemu-io", &["-r", "-f", "qcow2", "-c", "read -P 0x00 2M 64k", &vdb]);

    site.does(&["undo", REPLICA, "--yes"]);
    assert_eq!(fs::read_to_string(&machine).expect("text"), without);
    assert!(!fs::exists(&made).expect("look"), "nothing names it any more");
    let applied = site.json(&apply);
    assert!(applied.code <= 1, "{}{}", applied.stdout, applied.stderr);
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", &top(), &made]);
    // Somebody has put another image into its place: that one is not ours to remove.
    fs::rename(&made, home.join("kept")).expect("rename");
    fs::write(&made, "somebody's").expect("write");
    let undone = site.json(&["undo", REPLICA, "--yes"]);
    assert!(
        undone.kind("warning").iter().any(|warning| warning["what"].to_string().contains("stays")),
        "{}",
        undone.stdout
    );
    assert_eq!(
        (site.state().as_str(), fs::read_to_string(&made).expect("it stays")),
        ("failover", "somebody's".into())
    );
    fs::remove_file(&made).expect("remove");

    // Nor is one that comes while the guest of production is waited for.
    site.start_production();
    let waits = || {
        let events = site.room.catalogue().events(0, &EventFilter::default()).expect("events");
        events.iter().filter(|record| record.event.op == "wait").count()
    };
    let before = waits();
    let slow = ["failback", REPLICA, "--switch", "now", "--no-start", "--grace", "4s", "--network", "none"];
    let mut command = site.room.command(["-c", "site.toml"].iter().chain(&slow));
    let out = fs::File::create(site.room.path("said")).expect("a file");
    command.args(["--drift", "apply", "--yes", "--json"]).stdout(out).stderr(Stdio::null());
    let mut process = Process(command.spawn().expect("a process"));
    wait("it waits for the guest", || waits() > before);
    fs::write(&made, "somebody's").expect("write");
    process.ends();
    let said = fs::read_to_string(site.room.path("said")).expect("what was said");
    assert!(said.contains("E_EXISTS"), "{said}");
    assert_eq!(
        (site.state().as_str(), fs::read_to_string(&made).expect("it stays")),
        ("failover", "somebody's".into())
    );
    fs::remove_file(&made).expect("remove");

    let applied = site.json(&apply);
    assert!(applied.code <= 1, "{}{}", applied.stdout, applied.stderr);
    assert_eq!(site.does(&["commit", REPLICA, "--force", "--yes"])["state"], "ready");
}
