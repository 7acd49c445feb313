//! Promise: a replica that catalogue and folder disagree about is taken back or dropped by a word, a takeover at a point that
//! was changed from outside is had by force; what none of these words is for is refused, without an effect, and the way out
//! that is printed is one.

use std::{fs, path::Path, process::Command};

use aquifer_runner::{
    catalogue::{End, NewSession},
    host::{Host, Process, qemu::Qemu},
    job::give_up::{self, Act},
    replica::{
        model::{PointRecord, ReplicaRecord},
        state::State,
    },
};
use serde_json::{Value, json};

use crate::{
    carrier::as_worker,
    harness::{BINARY, Outcome, Room},
    takeover::{REPLICA, Site},
};

/// Runs the way out of a refusal, as it is printed.
pub(crate) fn as_printed(room: &Room, error: &Value) -> Outcome {
    let printed = error["do"].as_str().unwrap_or_else(|| panic!("no way out: {error}"));
    let aquifer = Path::new(BINARY).parent().and_then(Path::to_str).expect("utf-8");
    let line = printed.split('#').next().unwrap_or_default().trim();
    assert!(line.starts_with("aquifer "), "{printed}");
    let mut command = Command::new("sh");
    command.env_clear().env("PATH", format!("{aquifer}:/usr/bin:/bin:/usr/sbin:/sbin"));
    command.env("AQUIFER_HOME", room.path("home")).env("XDG_RUNTIME_DIR", room.dir.path());
    command.env("AQUIFER_REPO", room.repo()).env("AQUIFER_CONFIG", room.path("site.toml"));
    command.current_dir(room.dir.path()).args(["-c", &format!("{line} --json")]);
    Outcome::of(command.output().expect("it runs"))
}

/// Files, with their bytes.
type Files = Vec<(String, Vec<u8>)>;

/// What would tell of an effect: the record, its points, and every file of its folder with its bytes.
fn as_it_is(site: &Site) -> (String, Vec<Value>, Files) {
    let catalogue = site.room.catalogue();
    let points = catalogue.points_of::<PointRecord>(REPLICA).expect("points");
    let points = points.into_iter().map(|row| serde_json::to_value(row.record).expect("json")).collect();
    (format!("{:?}", site.record()), points, files(&site.room.path("dr").join(REPLICA)))
}

fn files(folder: &Path) -> Files {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => all.push((path.display().to_string(), fs::read(&path).expect("read"))),
        }
    }
    all.sort();
    all
}

fn tool(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{program} {args:?}: {said}");
}

/// The catalogue loses a replica, as one that was made anew.
fn lose(site: &Site) {
    as_worker(&site.room, |catalogue, fence| {
        for row in catalogue.points_of::<PointRecord>(REPLICA).expect("points") {
            catalogue.drop_point(fence, REPLICA, &row.id).expect("drop");
        }
        let row = catalogue.replica::<Value>(REPLICA).expect("read").expect("a replica");
        catalogue.drop_replica(fence, REPLICA, row.revision).expect("drop");
    });
}

/// A machine was started, and whoever did that died before it was recorded.
fn unrecorded(site: &Site, epoch: u64) {
    as_worker(&site.room, |catalogue, fence| {
        let mut row = catalogue.replica::<ReplicaRecord>(REPLICA).expect("read").expect("a replica");
        (row.record.state, row.record.failover, row.record.epoch) = (State::Ready, None, epoch);
        row.state = row.record.state.name().to_owned();
        catalogue.put_replica(fence, &row).expect("put");
    });
}

/// Somebody else takes the folder over.
fn give_to_another(site: &Site) -> Vec<u8> {
    let stamp = site.room.path("dr").join(REPLICA).join("replica.json");
    let mut text: Value = serde_json::from_slice(&fs::read(&stamp).expect("stamp")).expect("json");
    let epoch = text["epoch"].as_u64().expect("an epoch");
    text["epoch"] = json!(epoch + 3);
    text["owner"] = json!("01890000-0000-7000-8000-000000000001");
    text["owner_name"] = json!("elsewhere");
    let theirs = text.to_string().into_bytes();
    fs::write(&stamp, &theirs).expect("a stamp");
    theirs
}

#[test]
fn a_catalogue_that_lost_a_replica_is_told_of_it_by_a_word() {
    let site = Site::new(2);
    let before = as_it_is(&site);
    let known = site.refused(&["replicas", REPLICA, "--take-back", "--yes"], "E_EXISTS");
    let looked = as_printed(&site.room, &known);
    assert_eq!((looked.code, looked.one("replica")["state"].as_str()), (0, Some("ready")), "{}", looked.stdout);
    assert!(as_it_is(&site) == before, "refused without an effect");
    let nobody = site.refused(&["replicas", "nobody", "--take-back", "--yes"], "E_NOT_FOUND");
    assert_eq!(as_printed(&site.room, &nobody).code, 0, "{nobody}");

    // It serves, and the catalogue is lost.
    site.does(&["failover", REPLICA, "--to", "latest~1"]);
    site.write("dr", 0x55, "16M", "300k");
    let process = site.running("dr").expect("it runs").process;
    let (record, points) = (site.record(), as_it_is(&site).1);
    lose(&site);
    assert_eq!(site.json(&["replicas"]).kind("replica").len(), 0);
    let stands_in_the_way = site.json(&["run", "dr"]).one("error");
    assert_eq!(stands_in_the_way["code"], "E_EXISTS", "{stands_in_the_way}");
    let asks = as_printed(&site.room, &stands_in_the_way).one("error");
    assert_eq!(asks["code"], "E_CONFIRM", "it says what it is and asks: {asks}");
    let foreseen = site.json(&["replicas", REPLICA, "--take-back", "-n"]);
    assert_eq!((foreseen.code, &foreseen.one("plan")["act"]), (0, &json!("take_back")), "{}", foreseen.stdout);
    assert_eq!(site.json(&["replicas"]).kind("replica").len(), 0, "neither has an effect");

    let taken = site.json(&["replicas", REPLICA, "--take-back", "--yes"]);
    assert_eq!(taken.code, 0, "{}{}", taken.stdout, taken.stderr);
    let now = site.record();
    assert_eq!((now.state, &now.failover, now.epoch), (record.state, &record.failover, record.epoch + 1));
    assert_eq!(as_it_is(&site).1, points);
    assert_eq!(site.running("dr").expect("it never stopped").process, process);
    site.does(&["undo", REPLICA, "--yes"]);
    let again = site.json(&["run", "dr"]);
    assert!(again.code <= 1, "its job goes on with it: {}", again.stdout);
    assert_eq!(site.state(), "ready");

    // What somebody else has taken over since is not taken back.
    give_to_another(&site);
    lose(&site);
    let theirs = site.json(&["replicas", REPLICA, "--take-back", "--yes"]).one("error");
    assert_eq!((&theirs["code"], &theirs["exit"]), (&json!("E_FOREIGN_OWNER"), &json!(3)), "{theirs}");
    assert_eq!(site.json(&["replicas"]).kind("replica").len(), 0);
    assert_eq!(as_printed(&site.room, &theirs).code, 0, "{theirs}");
}

#[test]
fn a_replica_that_is_somebody_elses_is_dropped_by_force_and_only_then() {
    let site = Site::new(1);
    site.refused(&["replicas", "nobody", "--remove", "--force", "--yes"], "E_NOT_FOUND");
    let before = as_it_is(&site);
    let ours = site.refused(&["replicas", REPLICA, "--remove", "--force", "--yes"], "E_STATE");
    assert!(as_it_is(&site) == before, "refused without an effect: {ours}");
    // While it serves as well, with or without force; and the way out is one in that state, too.
    site.does(&["failover", REPLICA]);
    let process = site.running("dr").expect("it runs").process;
    for force in [&["--force"][..], &[]] {
        let args = [&["replicas", REPLICA, "--remove", "--yes"], force].concat();
        let serves = site.refused(&args, "E_STATE");
        assert_eq!(site.running("dr").expect("it runs").process, process, "{serves}");
        let out = as_printed(&site.room, &serves);
        assert_eq!(out.code, 0, "{serves}: {}", out.stdout);
    }
    site.does(&["undo", REPLICA, "--yes"]);

    let theirs = give_to_another(&site);
    let foreign = site.refused(&["failover", REPLICA, "--network", "none"], "E_FOREIGN_OWNER");
    assert_eq!(as_printed(&site.room, &foreign).code, 0, "{foreign}");
    let kept = files(&site.room.path("dr"));
    site.refused(&["replicas", REPLICA, "--remove", "--force"], "E_CONFIRM");
    assert_eq!(site.json(&["replicas", REPLICA, "--remove", "--force", "-n"]).one("plan")["act"], "drop");
    assert_eq!(site.state(), "ready", "neither has an effect");
    let dropped = site.json(&["replicas", REPLICA, "--remove", "--force", "--yes"]);
    assert_eq!(dropped.code, 0, "{}{}", dropped.stdout, dropped.stderr);
    assert_eq!((site.state().as_str(), site.json(&["replicas"]).kind("replica").len()), ("removed", 0));
    assert!(files(&site.room.path("dr")) == kept, "their folder is as it was");
    assert_eq!(fs::read(site.room.path("dr").join(REPLICA).join("replica.json")).expect("stamp"), theirs);
    let twice = site.refused(&["replicas", REPLICA, "--remove", "--force", "--yes"], "E_STATE");
    assert_eq!(as_printed(&site.room, &twice).code, 0, "{twice}");
    site.refused(&["replicas", REPLICA, "--park", "--yes"], "E_STATE");
    // Its job leaves the machine out from then on, and says so.
    let left_out = site.json(&["run", "dr"]);
    assert!(left_out.code <= 1 && files(&site.room.path("dr")) == kept, "{}", left_out.stdout);
}

#[test]
fn what_was_changed_from_outside_takes_over_by_force_and_only_then() {
    let site = Site::new(2);
    let layer = site.room.path("dr").join(REPLICA).join("vda/2.qcow2");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 18M 64k", &layer.display().to_string()]);
    let before = as_it_is(&site);
    let changed = site.refused(&["failover", REPLICA, "--network", "none", "--no-start"], "E_BLOCK_CORRUPT");
    let now = as_it_is(&site);
    assert!((&now.1, &now.0) == (&before.1, &before.0), "no effect on what is known: {changed}");
    let layers = |all: &Files| -> Files { all.iter().filter(|(name, _)| name.contains(".qcow2")).cloned().collect() };
    assert!(layers(&now.2) == layers(&before.2), "nor on what is there");
    assert!(site.running("dr").is_none());
    for args in [&["failover", REPLICA, "--planned", "--force"][..], &["failover", "--plan", "all", "--force"]] {
        site.refused(args, "E_USAGE");
    }
    // The way out that is printed stands on the point before, which nobody has changed.
    let out = as_printed(&site.room, &changed);
    assert!(out.code <= 1, "{changed}: {}", out.stdout);
    let older = before.1[0]["id"].clone();
    assert_eq!((site.state().as_str(), &out.one("replica")["point"]), ("failover", &older));
    site.does(&["undo", REPLICA, "--yes"]);

    // And whoever wants it all the same gets what is there, and is told.
    let forced = site.json(&["failover", REPLICA, "--force", "--network", "none"]);
    assert_eq!(forced.code, 1, "{}{}", forced.stdout, forced.stderr);
    assert!(
        forced.one("warning")["what"].as_str().is_some_and(|what| what.contains("vda/2.qcow2")),
        "{}",
        forced.stdout
    );
    let record = site.record();
    assert!(record.needs_resync && site.running("dr").is_some(), "{record:?}");
    let top = site.room.path("dr").join(REPLICA).join(&record.failover.expect("a takeover").tops[0].file);
    tool("qemu-io", &["-r", "-U", "-f", "qcow2", "-c", "read -P 0x5a 18M 64k", &top.display().to_string()]);
    site.refused(&["failover", REPLICA, "--force"], "E_STATE");
    site.does(&["undo", REPLICA, "--yes"]);
}

#[test]
fn a_machine_whose_replica_is_somebody_elses_by_now_is_shown_and_parked_by_a_word() {
    let site = Site::new(1);
    let none = site.refused(&["replicas", REPLICA, "--park", "--yes"], "E_STATE");
    assert_eq!(as_printed(&site.room, &none).code, 0, "{none}");
    site.does(&["failover", REPLICA]);
    site.refused(&["replicas", REPLICA, "--park", "--yes"], "E_STATE");
    let process = site.running("dr").expect("it runs").process;
    assert!(site.json(&["replicas"]).one("replica").get("strays").is_none(), "one that serves is none");

    give_to_another(&site);
    let stray = site.json(&["replicas"]).one("replica")["strays"][0].clone();
    assert_eq!((&stray["why"], &stray["pid"]), (&json!("fenced"), &json!(process.pid)), "{stray}");
    let held = site.refused(&["replicas", REPLICA, "--remove", "--force", "--yes"], "E_STATE");
    let asks = as_printed(&site.room, &held).one("error");
    assert_eq!(asks["code"], "E_CONFIRM", "{held}: {asks}");
    assert_eq!(site.running("dr").expect("it runs").process, process, "neither has an effect");
    let seen = site.room.ok(["-c", "site.toml", "replicas", REPLICA, "--park", "-n"]).stdout;
    assert!(seen.lines().count() >= 2 && !seen.contains("\\n"), "one line each: {seen}");
    let parked = site.json(&["replicas", REPLICA, "--park", "--yes"]);
    assert_eq!(parked.code, 0, "{}", parked.stdout);
    assert!(site.running("dr").is_none());
    let events = site.json(&["events"]).kind("transition");
    let off = format!("process {} is off", process.pid);
    let told = |event: &&Value| event["op"] == "park" && event["reason"].as_str().is_some_and(|why| why.contains(&off));
    assert!(events.iter().any(|event| told(&event)), "how it ended: {events:?}");
    let dropped = site.json(&["replicas", REPLICA, "--remove", "--force", "--yes"]);
    assert_eq!(dropped.code, 0, "{}", dropped.stdout);
}

#[test]
fn a_layer_that_is_changed_below_a_machine_that_serves_is_told_before_it_comes_home() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA]);
    let quiet = site.json(&["replicas", REPLICA]);
    assert_eq!((quiet.code, quiet.kind("warning").len()), (0, 0), "{}", quiet.stdout);
    site.write("dr", 0x55, "16M", "64k");
    assert_eq!(site.json(&["replicas"]).kind("warning").len(), 0, "what its machine writes is no news");
    let layer = site.room.path("dr").join(REPLICA).join("vda/1.qcow2");
    let held = fs::read(&layer).expect("a layer");
    fs::write(&layer, &held).expect("a layer");
    let told = site.json(&["replicas"]).one("warning");
    assert_eq!(told["code"], "W_RESYNC", "{told}");
    assert!(told["what"].as_str().is_some_and(|what| what.contains("vda/1.qcow2")), "{told}");
    site.does(&["undo", REPLICA, "--yes"]);
}

#[test]
fn a_layer_that_is_changed_or_gone_is_told_while_the_replica_is_ready() {
    let site = Site::new(1);
    let listed = || site.json(&["replicas", REPLICA]);
    let quiet = listed();
    assert_eq!((quiet.code, quiet.kind("warning").len()), (0, 0), "{}", quiet.stdout);
    assert_eq!(quiet.one("point")["allowed_operations"], serde_json::json!(["failover"]), "{}", quiet.stdout);
    let layer = site.room.path("dr").join(REPLICA).join("vda/1.qcow2");
    let aside = site.room.path("aside.qcow2");
    let tells = |word: &str| {
        let told = listed();
        let warning = told.one("warning");
        assert_eq!((told.code, &warning["code"]), (1, &"W_RESYNC".into()), "{}", told.stdout);
        let point = told.one("point");
        assert_eq!(point["allowed_operations"], serde_json::json!([]), "{point}");
        for text in [&warning["what"], &point["trouble"]] {
            assert!(text.as_str().is_some_and(|text| text.contains(word)), "{text}");
        }
    };
    fs::rename(&layer, &aside).expect("rename");
    tells("cannot be read");
    fs::rename(&aside, &layer).expect("rename");
    assert_eq!(listed().code, 0, "it is there again");
    let held = fs::read(&layer).expect("a layer");
    fs::write(&layer, &held).expect("a layer");
    tells("vda/1.qcow2 was changed from outside");
}

#[test]
fn the_machine_that_serves_is_not_parked_because_its_stamp_cannot_be_read() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA]);
    let process = site.running("dr").expect("it runs").process;
    let folder = site.room.path("dr").join(REPLICA);
    let (stamp, ledger) = (folder.join("replica.json"), folder.join("layers.json"));
    let (held, known) = (fs::read(&stamp).expect("stamp"), fs::read(&ledger).expect("ledger"));
    let is_spared = |how: &str| {
        let listed = site.json(&["replicas"]).one("replica");
        assert!(listed.get("strays").is_none(), "{how}: {listed}");
        site.refused(&["replicas", REPLICA, "--park", "--yes"], "E_STATE");
        assert_eq!(site.running("dr").expect("it runs").process, process, "{how}");
    };
    fs::write(&stamp, "").expect("cut off");
    is_spared("a stamp that is cut off");
    fs::remove_file(&stamp).expect("gone");
    is_spared("no stamp, and a ledger");
    fs::remove_file(&ledger).expect("gone");
    is_spared("neither");
    fs::write(&ledger, known).expect("ledger");
    fs::write(&stamp, held).expect("stamp");
    site.does(&["undo", REPLICA, "--yes"]);
}

#[test]
fn nothing_is_parked_that_was_not_confirmed_or_while_an_operation_is_open() {
    let site = Site::new(1);
    site.does(&["failover", REPLICA]);
    let running = site.running("dr").expect("it runs");
    unrecorded(&site, site.record().epoch);
    let park = ["replicas", REPLICA, "--park", "--yes"];
    let mut open = None;
    as_worker(&site.room, |catalogue, fence| {
        let begun = catalogue.begin_operation(fence, &format!("replica/{REPLICA}"), "failover", &Value::Null);
        open = Some(begun.expect("an operation"));
    });
    let busy = site.refused(&park, "E_BUSY");
    assert_eq!(as_printed(&site.room, &busy).code, 0, "{busy}");
    assert!(site.running("dr").is_some(), "it may be the one that is to serve");
    as_worker(&site.room, |catalogue, fence| {
        let open = catalogue.adopt_operation(fence, open.expect("open")).expect("adopt");
        catalogue.end_operation(fence, open.id, &End::Failed("a test".into()), &[]).expect("end");
    });
    // Another machine was confirmed, which has ended since and whose number came again.
    let mut other = running.process;
    other.started += 1;
    let own = Process::of(std::process::id()).expect("a process");
    let session = NewSession { kind: "park".into(), job: None, initiator: "test".into(), reason: None, retry_of: None };
    let work = give_up::work(REPLICA, Act::Park, &[other, own]);
    site.room.catalogue().begin_work(&session, &[work]).expect("work");
    site.json(&["worker", "--until-idle"]);
    assert_eq!(site.running("dr").expect("it runs").process, running.process, "nobody confirmed that one");
    let parked = site.json(&park);
    assert!(parked.code <= 1, "{}", parked.stdout);
    assert!(site.running("dr").is_none());
}

#[test]
fn a_replica_is_not_dropped_while_a_machine_runs_that_was_started_and_not_recorded() {
    let site = Site::new(1);
    let before = site.record().epoch;
    site.does(&["failover", REPLICA]);
    let running = site.running("dr").expect("it runs");
    unrecorded(&site, before);
    give_to_another(&site);
    let drop = ["replicas", REPLICA, "--remove", "--force", "--yes"];
    let held = site.refused(&drop, "E_STATE");
    assert!(held["what"].as_str().is_some_and(|what| what.contains(&running.process.pid.to_string())), "{held}");
    assert_eq!(as_printed(&site.room, &held).code, 0, "{held}");
    assert_eq!((site.state().as_str(), site.running("dr").map(|now| now.process)), ("ready", Some(running.process)));
    Qemu.power_off(&running).expect("off");
    assert_eq!(site.json(&drop).code, 0);
}
