//! A whole site is read, and whatever is wrong with one is said with its place.

use std::{path::Path, time::Duration};

use super::{keys::Kind, keys::Shape, *};
use crate::{fail::Code, schedule::When};

/// A whole site that this build carries out.
const WHOLE: &str = include_str!("sample.toml");

/// The site file that the project set out to read, with what is not built yet.
const ENVISAGED: &str = include_str!("envisaged.toml");

fn wrong(text: &str) -> String {
    Site::parse("s.toml", text).expect_err(text).what
}

#[test]
fn the_documented_sample_is_read() {
    let sample: String = include_str!("../site.rs")
        .lines()
        .skip_while(|l| *l != "//! ```toml")
        .skip(1)
        .take_while(|l| *l != "//! ```")
        .map(|l| format!("{}\n", l.trim_start_matches("//! ")))
        .collect();
    let site = Site::parse("sample", &sample).expect("the sample is valid");
    assert_eq!(site.cache, Some(1 << 30));
    assert_eq!(site.default_repository().map(|r| r.url.as_path()), Some(Path::new("/srv/aquifer")));
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    assert!(wrong("home = \"/x\"\n").contains("s.toml:1:1: the site file has no `version`"));
    assert!(wrong("version = 2\n").contains("s.toml:1:11: `version` must be a whole number from 1 to 1"));
    assert!(
        wrong("version = 1\ncahe = \"1GiB\"\n")
            .contains("s.toml:2:1: unknown key `cahe` in the site file; did you mean `cache`?")
    );
    assert!(wrong("version = 1\ncache = \"9\"\n").contains("s.toml:2:9: `cache`: `9` is not a size"));
    assert!(wrong("version = 1\n[repository.a]\n").contains("repository.a has no `url`"));
    let two = "version = 1\n[repository]\na = { url = \"/a\", default = true }\nb = { url = \"/b\", default = true }\n";
    assert!(wrong(two).contains("s.toml:4:1: only one repository can be the default"), "{}", wrong(two));
    assert!(wrong("version = 1\n[repository\n").contains("s.toml:2:"));
}

#[test]
fn a_whole_site_is_read() {
    let site = Site::parse("s.toml", WHOLE).expect("valid");
    assert_eq!(site.zone().iana_name(), Some("Europe/Prague"));
    assert_eq!(
        site.not_carried_out,
        ["job.hourly: `ping` is not called by this build", "[notify]: nothing is sent by this build"]
    );
    let hourly = &site.jobs["hourly"];
    assert!(matches!(&hourly.schedule.when, When::Calendar(calendar) if calendar.text() == "hourly"));
    let JobKind::Backup(backup) = &hourly.kind else { panic!("a backup job") };
    assert_eq!((backup.to.as_str(), backup.freeze), ("nas", Freeze::Require));
    assert_eq!(backup.keep.and_then(|keep| keep.last), Some(24));
    let JobKind::Replication(dr) = &site.jobs["dr"].kind else { panic!("a replication job") };
    assert_eq!((dr.host.as_str(), dr.points_to_keep, dr.name_suffix.as_str()), ("dr1", 14, "_replica"));
    assert!(matches!(&dr.source, ReplicaSource::Backup { repositories, .. } if repositories.len() == 2));
    assert_eq!(site.plans["site-dr"].entries.len(), 2);
    assert_eq!(site.plans["site-dr"].entries[1].gates, [Gate::Http { port: 80, path: "/health".into() }]);
    assert_eq!(site.repositories["nas"].limits.hours.len(), 1);
    assert_eq!(site.jobs["night"].retry, Retry { count: 5, interval: Duration::from_secs(60) });
}

#[test]
fn what_is_not_built_is_refused_by_name_with_what_to_use_and_nothing_else_is_wrong_with_it() {
    let fail = Site::parse("s.toml", ENVISAGED).expect_err("not built");
    assert_eq!(fail.code, Code::Unsupported, "{}", fail.what);
    let lines: Vec<&str> = fail.what.split("; s.toml:").collect();
    let wanted = [
        "host.kvm1: the kind `libvirt`",
        "host.pve1: the kind `proxmox`",
        "host.dr1: a mover at an `address`",
        "repository.veeam-old: `foreign`",
        "repository.vault: `s3://`",
        "repository.vault: `s3`",
        "repository.vault: `key`",
        "job.drill: the kind `verification`",
    ];
    assert_eq!(lines.len(), wanted.len(), "{lines:#?}");
    for (line, wanted) in lines.iter().zip(wanted) {
        assert!(line.contains(wanted) && line.contains("not built yet; "), "{line}");
    }
    // A mistake beside it comes first: it is E_CONFIG then, with both.
    let mistaken = ENVISAGED.replace("to = \"nas\"", "to = \"nass\"");
    let fail = Site::parse("s.toml", &mistaken).expect_err("mistaken");
    assert_eq!(fail.code, Code::Config);
    assert!(
        fail.what.contains("job.hourly names the repository `nass`, which is not in this file; did you mean `nas`?")
    );
}

#[test]
fn every_name_is_proven() {
    for (from, to, problem) in [
        (
            "machines = [\"db01\"]",
            "machines = [\"db02\"]",
            "names the machine `db02`, which is not in this file; did you mean `db01`?",
        ),
        ("machines = [\"db01\"]", "machines = [\"db01\", \"db01\"]", "names `db01` twice"),
        (
            "from = \"prod:db01\"",
            "from = \"prodd:db01\"",
            "machine.db01 names the host `prodd`, which is not in this file; did you mean `prod`?",
        ),
        ("from = \"prod:db01\"", "from = \"prod:../db01\"", "`from` must be `HOST:NAME`"),
        ("after = \"hourly\"", "after = \"hurly\"", "job.copies names the job `hurly`"),
        ("after = \"hourly\"", "after = \"copies\"", "job.copies waits for itself"),
        ("host = \"dr1\"", "host = \"dr2\"", "job.dr names the host `dr2`"),
        ("metadata_repository = \"nas\"", "metadata_repository = \"nasty\"", "names the repository `nasty`"),
        ("to = \"vault\"", "to = \"nas\"", "job.copies copies `nas` to itself"),
        ("after = [\"db01\"]", "after = [\"web01\"]", "`after` names `web01`, which does not stand before it"),
        ("after = [\"db01\"]", "after = [\"nobody\"]", "`after` names `nobody`, which is not in this plan"),
        ("to = [\"ops\"]", "to = [\"opps\"]", "names the target `opps`"),
        (
            "url = \"/srv/vault\"",
            "url = \"/srv/aquifer/./vault\"",
            "repository.vault and repository.nas share a folder",
        ),
        ("url = \"/srv/vault\"", "url = \"/srv/x/../aquifer\"", "share a folder"),
        ("keep = { last = 24, daily = 14, weekly = 8 }", "keep = { }", "`keep` has no rule"),
        (
            "name_suffix = \"_replica\"",
            "name_suffix = \"_x\"\nmapping = { db01 = \"old01\" }",
            "where machine.old01 is",
        ),
        ("calendar = \"hourly\"", "calendar = \"hourly\", cron = \"* * * * *\"", "a schedule has exactly one of"),
        ("every = \"4h\"", "every = \"4h\", days = \"mon\"", "`days` belongs to daily"),
        ("every = \"4h\"", "every = \"25h\"", "`every` is from 1m to 24h"),
        ("window = \"20:00-06:00\"", "window = \"20:00\"", "`window`: `20:00` is not a window"),
        ("timezone = \"Europe/Prague\"", "timezone = \"Europe/Prag\"", "there is no zone `Europe/Prag`"),
        ("password = { file = \"/etc/aquifer/pg\" }", "password = \"hunter2\"", "a secret does not stand in this file"),
        ("postgres://aquifer@", "postgres://aquifer:hunter2@", "a secret does not stand in this file"),
    ] {
        assert!(WHOLE.contains(from), "{from}");
        let what = wrong(&WHOLE.replacen(from, to, 1));
        assert!(what.contains(problem), "{to}: {what}");
        assert!(!what.contains("hunter2"), "the secret is quoted: {what}");
    }
}

#[test]
fn a_replica_has_a_name_of_its_own_wherever_it_stands() {
    let job = "\n[job.second]\nkind = \"replication\"\nmachines = [\"db01\"]\nsource = { from = \"backup\", repositories = [\"nas\"] }\ntarget = { host = \"prod\" }\n";
    let what = wrong(&format!("{WHOLE}{job}"));
    assert!(what.contains("both write db01_replica"), "{what}");
    for away in ["../prod/db01", "/etc"] {
        let what =
            wrong(&WHOLE.replacen("name_suffix = \"_replica\"", &format!("mapping = {{ db01 = \"{away}\" }}"), 1));
        assert!(what.contains("is not 1 to 64 of letters"), "{what}");
    }
}

#[test]
fn a_plan_needs_replicas_of_its_machines() {
    let what = wrong(&WHOLE.replacen("machines = [\"web01\", \"db01\"]", "machines = [\"web01\"]", 1));
    assert!(what.contains("plan.site-dr fails `db01` over, but no replication job makes a replica of it"), "{what}");
}

/// Every key of every shape, set to a value of a type that no key has: the reader must notice each of them at its
/// line. A key in the list that the reader does not look at, or the other way round, cannot be.
#[test]
fn the_reader_looks_at_every_key_of_the_list() {
    let mut wanted = Vec::new();
    spoil(&keys::SITE, "", &mut wanted);
    assert!(wanted.len() > 120, "{}", wanted.len());
    for (line, key) in wanted {
        let text = format!("{line}\n");
        let what = wrong(&text);
        let noticed = what.contains(&format!("`{key}` must be"))
            || what.contains("must be a table")
            || what.contains("a secret does not stand");
        assert!(noticed, "{text}: {what}");
        assert!(!what.contains("unknown key"), "{text}: {what}");
    }
}

fn spoil(shape: &'static Shape, path: &str, wanted: &mut Vec<(String, &'static str)>) {
    for key in shape.keys {
        let here = format!("{path}{}", key.name);
        if key.name != "kind" {
            wanted.push((format!("{} = 1979-05-27", kinded(&here, shape)), key.name));
        }
        match key.kind {
            Kind::Table(below) => spoil(below, &format!("{here}."), wanted),
            Kind::Named(below) => spoil(below, &format!("{here}.x."), wanted),
            Kind::NamedKinds(shapes) => shapes.iter().for_each(|below| spoil(below, &format!("{here}.x."), wanted)),
            _ => {}
        }
    }
}

/// The line that makes a table one of this shape's kind, put before the line with the key.
fn kinded(here: &str, shape: &Shape) -> String {
    let above = here.rsplit_once('.').map_or("", |(above, _)| above);
    match shape.keys.iter().find(|key| key.name == "kind") {
        Some(_) => format!("{above}.kind = \"{}\"\n{here}", shape.name),
        // Tables below a job: the job's own kind has to be there, too.
        None if above.starts_with("job.x") => match above {
            "job.x.source" | "job.x.target" => format!("job.x.kind = \"replication\"\n{here}"),
            _ => format!("job.x.kind = \"backup\"\n{here}"),
        },
        None => here.to_owned(),
    }
}

#[test]
fn the_schema_holds_what_the_reader_holds() {
    let schema = schema::schema();
    let held = |text: &str| fits(&schema, &toml::from_str::<serde_json::Value>(text).expect("toml"));
    assert!(held(WHOLE));
    assert!(held(ENVISAGED), "what is not built yet is in the schema: editors know it");
    for (from, to) in [
        ("version = 1", "version = 2"),
        ("kind = \"backup\"", "kind = \"backups\""),
        ("machines = [\"db01\"]", "machine = [\"db01\"]"),
        ("to = \"nas\"", "to = 3"),
        ("keep = { last = 24", "keep = { lst = 24"),
        ("password = { file = \"/etc/aquifer/pg\" }", "password = \"hunter2\""),
        ("password = { file = \"/etc/aquifer/pg\" }", "password = { file = \"/x\", env = \"Y\" }"),
        ("entries = [", "entries = [ { gate = \"agent\" },"),
    ] {
        assert!(WHOLE.contains(from), "{from}");
        let text = WHOLE.replacen(from, to, 1);
        assert!(!held(&text), "{to}");
        assert!(Site::parse("s.toml", &text).is_err(), "{to}");
    }
}

/// As much of JSON Schema as ours uses.
fn fits(schema: &serde_json::Value, value: &serde_json::Value) -> bool {
    use serde_json::Value;
    if let Some(words) = schema["enum"].as_array() {
        return words.contains(value);
    }
    if let Some(any) = schema["oneOf"].as_array() {
        return any.iter().filter(|schema| fits(schema, value)).count() == 1;
    }
    match (schema["type"].as_str(), value) {
        (Some("string"), Value::String(text)) => !text.is_empty(),
        (Some("boolean"), Value::Bool(_)) => true,
        (Some("integer"), Value::Number(n)) => {
            let n = n.as_u64().unwrap_or(u64::MAX);
            (schema["minimum"].as_u64().unwrap_or(0)..=schema["maximum"].as_u64().unwrap_or(u64::MAX)).contains(&n)
        }
        (Some("array"), Value::Array(items)) => items.iter().all(|item| fits(&schema["items"], item)),
        (Some("object"), Value::Object(map)) => {
            let required = schema["required"].as_array().into_iter().flatten();
            let most = schema["maxProperties"].as_u64().unwrap_or(u64::MAX);
            map.len() as u64 <= most
                && required.into_iter().all(|key| map.contains_key(key.as_str().unwrap_or_default()))
                && map.iter().all(|(key, value)| match (&schema["properties"][key], &schema["additionalProperties"]) {
                    (Value::Null, Value::Bool(false)) => false,
                    (Value::Null, Value::Null) => true,
                    (Value::Null, below) => fits(below, value),
                    (below, _) => fits(below, value),
                })
        }
        _ => false,
    }
}

#[test]
fn a_cluster_is_of_hosts_and_nothing_stands_on_it_but_replicas() {
    let text = |members: &str, more: &str| {
        format!(
            "version = 1\n[host]\na = {{ kind = \"qemu\", images = \"/a\", max_tasks = 3 }}\nb = {{ kind = \"qemu\", images = \"/b\" }}\n\
             dr = {{ kind = \"cluster\", members = {members} }}\n[repository]\nnas = {{ url = \"/nas\" }}\n{more}"
        )
    };
    let site = Site::parse("s.toml", &text("[\"b\", \"a\"]", "")).expect("valid");
    let names: Vec<&str> = site.members("dr").iter().map(|(name, _)| *name).collect();
    assert_eq!((names, site.cluster_of("a"), site.cluster_of("dr")), (vec!["b", "a"], Some("dr"), None));
    assert!(wrong(&text("[\"a\", \"c\"]", "")).contains("host.dr names the host `c`, which is not in this file"));
    assert!(wrong(&text("[\"a\", \"dr\"]", "")).contains("host.dr names `dr`, which is a cluster"));
    assert!(wrong(&text("[]", "")).contains("host.dr: `members` is empty"));
    let twice = text("[\"a\"]", "[host.dr2]\nkind = \"cluster\"\nmembers = [\"a\"]\n");
    assert!(wrong(&twice).contains("host.a is a member of host.dr and of host.dr2"));
    let on_it = text("[\"a\"]", "[machine]\nm = { from = \"dr:m\" }\n");
    assert!(wrong(&on_it).contains("machine.m names `dr`, which is a cluster; name one of its members"));
    let job = "[machine]\nm = { disks = { vda = \"raw:/m\" } }\n[job.j]\nkind = \"replication\"\nmachines = [\"m\"]\n\
               source = { from = \"backup\", repositories = [\"nas\"] }\ntarget = { host = \"dr\"PATH }\n";
    let path = text("[\"a\"]", &job.replace("PATH", ", path = \"/p\""));
    assert!(wrong(&path).contains("job.j: `path` and a cluster exclude each other"));
    // Work on any of its members takes a slot of the cluster's: there are as many as its members have.
    let site = Site::parse("s.toml", &text("[\"a\", \"b\"]", &job.replace("PATH", ""))).expect("valid");
    let works = crate::tasks::expand::works(&site, "j", &site.jobs["j"], false);
    let host = works[0].needs.iter().find(|need| need.resource == "host/dr").expect("slots of the cluster");
    assert_eq!(host.limit, 7);
}
