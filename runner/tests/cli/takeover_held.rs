//! Promise: while a replica serves in place of a machine, a backup of that machine says so, and no point of it is given up
//! until the takeover is settled.

use std::fs;

use crate::{
    harness::Outcome,
    takeover::{REPLICA, Site},
};

/// What was told of the takeover.
fn told(outcome: &Outcome) -> String {
    let mut warnings = outcome.kind("warning");
    warnings.retain(|warning| warning["code"] == "W_REPLICA_SERVES");
    warnings.iter().map(|warning| warning["what"].to_string()).collect()
}

#[test]
fn points_from_before_a_disaster_stay_until_the_takeover_is_settled() {
    let site = Site::new(2);
    let file = site.room.path("site.toml");
    let text = fs::read_to_string(&file).expect("text");
    let vault = site.room.text("vault");
    let text = text.replace("to = \"nas\"\n", "to = \"nas\"\nkeep = { last = 1 }\n").replace(
        "[repository]\n",
        &format!(
            "[job.away]\nkind = \"copy\"\nmachines = [\"db01\"]\nfrom = [\"nas\"]\nto = \"vault\"\nmode = \"immediate\"\n\
             keep = {{ last = 1 }}\n[repository]\nvault = {{ url = \"{vault}\" }}\n"
        ),
    );
    fs::write(&file, text).expect("write");
    site.room.ok(["-r", &vault, "init"]);
    let points = |repo: &str| -> Vec<String> {
        let listed = site.room.json(["-r", &site.room.text(repo), "points", "db01"]).kind("point");
        listed.iter().map(|point| point["point"].as_str().expect("an id").to_owned()).collect()
    };
    assert_eq!(site.json(&["run", "away", "--strict"]).code, 0);
    let (before, copied) = (points("repo"), points("vault"));
    assert_eq!((before.len(), copied.len()), (2, 1));

    let served = |what: &str| {
        let ran = site.json(&["run", "night", "--strict"]);
        assert_eq!(ran.code, 2, "{what}: {}", ran.stdout);
        let told = told(&ran);
        assert!(
            told.contains("db01_replica serves in its place: this is not the machine that serves"),
            "{what}: {told}"
        );
        assert!(told.contains("every point stays until the takeover by db01_replica is settled"), "{what}: {told}");
        let away = site.json(&["run", "away"]);
        assert!(away.code == 1 && !self::told(&away).contains("serves in its place"), "{what}: {}", away.stdout);
        for (repo, good) in [("repo", &before), ("vault", &copied)] {
            let now = points(repo);
            assert!(good.iter().all(|point| now.contains(point)) && now.len() > good.len(), "{what}: {now:?}");
        }
    };
    site.does(&["failover", REPLICA, "--no-start"]);
    served("failover");
    // What stands is told by the run that finds it.
    let again = site.json(&["run", "away", "--strict"]);
    assert_eq!((again.code, told(&again).as_str()), (0, ""), "{}", again.stdout);
    assert!(points("vault").contains(&copied[0]));
    assert!(told(&site.json(&["run", "night", "-n"])).contains("serves in its place"));
    site.does(&["failback", REPLICA, "--yes"]);
    assert_eq!(site.state(), "ready_to_switch");
    served("ready_to_switch");
    // On trial: production serves, and what was before may still be wanted.
    site.does(&["failback", REPLICA, "--switch", "now", "--no-start", "--yes"]);
    let trial = site.json(&["run", "night"]);
    assert!(told(&trial).contains("is settled: it is failback"), "{}", trial.stdout);
    assert!(!told(&trial).contains("serves in its place"), "{}", trial.stdout);
    assert!(points("repo").contains(&before[0]));

    site.does(&["commit", REPLICA, "--force", "--yes"]);
    for (job, repo) in [("night", "repo"), ("away", "vault")] {
        let ran = site.json(&["run", job]);
        assert!(ran.code <= 1 && told(&ran).is_empty(), "{}{}", ran.stdout, ran.stderr);
        assert_eq!(points(repo).len(), 1, "the rule applies again");
    }
}
