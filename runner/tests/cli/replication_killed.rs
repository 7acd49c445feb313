//! Promise: whoever carries a replication out may be killed at any moment, again and again: every point that is listed is
//! whole, none is lost that is kept, and the next run ends well.
//!
//! Rounds: [`rounds`], of each source.

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;

use crate::{
    carrier::{Carrier, goes_on, newest_run},
    ledger::Ledger,
    replication::{Disks, Site},
    storm::{Dice, moment, rounds},
};

/// Points that stay.
const KEPT: usize = 3;

/// What production was when.
#[derive(Default)]
struct Known(Vec<(Option<Value>, Disks)>);

impl Known {
    /// Every listed point is what production was then; answers which states they are, oldest first.
    fn check(&self, site: &Site, points: &[Value]) -> Vec<usize> {
        let one = |point: &Value| {
            let is_it =
                |(taken, _): &&(Option<Value>, Disks)| taken.as_ref().is_none_or(|taken| *taken == point["taken"]);
            let candidates: Vec<usize> = (0..self.0.len()).rev().filter(|at| is_it(&&self.0[*at])).collect();
            let found = candidates.into_iter().find(|at| site.holds(point, &self.0[*at].1));
            found.unwrap_or_else(|| panic!("{point} is nothing that production ever was"))
        };
        points.iter().map(one).collect()
    }
}

/// Kills of a run of the job `dr`, twice in each round, then a run to its end.
fn kills(proof: &'static str, seed: u64, source: &str, by_backup: bool) {
    let ledger = Ledger::begin(proof);
    let mut site = Site::with(source, &format!("restore_points_to_keep = {KEPT}"));
    let (mut dice, mut known, mut counts) = (Dice(seed), Known::default(), BTreeMap::<&'static str, u64>::new());
    let (mut takes, mut round, mut killed) = (Duration::from_millis(600), 0, 0);
    while goes_on(round, rounds(4), killed) {
        site.change(3);
        if by_backup {
            let repo = ["r1", "r1", "r2"][dice.below(3)];
            site.back_up(repo, dice.below(4) == 0);
            known.0.push((Some(site.newest_backup(repo)), site.disks.clone()));
        } else {
            known.0.push((None, site.disks.clone()));
        }
        let since = newest_run(&site.room, "dr");
        let carrier = Carrier::of(round);
        for _ in 0..2 {
            let moment = moment(&mut dice, takes);
            let who = match carrier {
                Carrier::Command => "commands killed",
                Carrier::Worker => "workers killed",
                Carrier::Serve => "services killed",
            };
            let hit = u64::from(carrier.is_killed(&site.room, "dr", moment));
            *counts.entry(who).or_default() += hit;
            killed += hit;
            if site.json(&["replicas"]).kind("replica").pop().is_some() {
                let points = site.points();
                known.check(&site, &points);
                *counts.entry("points compared").or_default() += points.len() as u64;
            }
        }
        let began = std::time::Instant::now();
        carrier.carries_through(&site.room, "dr", since);
        takes = began.elapsed().clamp(Duration::from_millis(200), Duration::from_secs(2));
        let replica = site.json(&["replicas"]).one("replica");
        assert_eq!((replica["state"].as_str(), replica["operation"].as_str()), (Some("ready"), None), "{replica}");
        let points = site.points();
        let states = known.check(&site, &points);
        *counts.entry("points compared").or_default() += points.len() as u64;
        assert_eq!(states.last(), Some(&(known.0.len() - 1)), "round {round}: {states:?}");
        assert!(states.is_sorted() && points.len() <= KEPT, "round {round}: {states:?}");
        assert!(points.len() == KEPT.min(known.0.len()) || !by_backup, "round {round}: {states:?}");
        round += 1;
    }
    assert!(killed >= u64::from(round) / 3 && killed > 0, "{counts:?}: too few in time");
    let mut told = vec![("rounds", u64::from(round))];
    told.extend(counts);
    ledger.tell(&seed.to_string(), &told);
}

#[test]
fn no_kill_leaves_a_replica_of_backups_without_a_way_out() {
    kills(
        "kills of a replication from backups",
        0xdead,
        "{ from = \"backup\", repositories = [\"r1\", \"r2\"] }",
        true,
    );
}

#[test]
fn no_kill_leaves_a_replica_of_production_without_a_way_out() {
    kills("kills of a replication from production", 0xbeef, "{ from = \"production\" }", false);
}
