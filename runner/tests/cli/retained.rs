//! Promise: what retention writes anew is the same restore point to everybody else, and is written anew only where that
//! sets something free.

use crate::replication::Site;

const CLUSTER: usize = 64 << 10;
const MIB: usize = 1 << 20;

/// A site whose backups are made by a job with this retention.
fn site(keep: &str) -> Site {
    let job = format!("[job.b]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"r1\"\nkeep = {keep}\n");
    Site::with("{ from = \"backup\", repositories = [\"r1\"] }", &job)
}

/// Fills a part of the first disk with what no compression makes smaller.
fn randomise(site: &mut Site, from: usize, len: usize) {
    for at in from..from + len {
        let byte = u8::try_from(site.roll() % 256).expect("small");
        site.disks[0].1[at] = byte;
    }
    site.put_production();
}

/// Runs the backup; which points retention wrote anew.
fn back_up(site: &Site) -> Vec<String> {
    let ran = site.json(&["run", "b"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    let retained = ran.kind("retained");
    let rebased = retained.iter().filter_map(|retained| retained["rebased"].as_object());
    rebased.flat_map(|rebased| rebased.keys().cloned()).collect()
}

#[test]
fn a_replica_of_points_that_were_written_anew_reads_what_changed() {
    let mut site = site("{ last = 2 }");
    randomise(&mut site, 0, 4 * MIB);
    back_up(&site);
    // Draws from the first point for an eighth of it: worth writing anew when that one goes.
    randomise(&mut site, 0, 3584 << 10);
    back_up(&site);
    site.replicate();
    let mut anew = 0;
    for round in 0..4 {
        randomise(&mut site, round * CLUSTER, CLUSTER);
        anew += back_up(&site).len();
        let report = site.replicate();
        let read = report["bytes_read"].as_u64().expect("bytes");
        assert!(read <= 4 * CLUSTER as u64, "round {round}: {report}");
        site.assert_point(site.points().last().expect("a point"), &site.disks);
    }
    assert!(anew > 1, "nothing was written anew: {anew}");
}

#[test]
fn points_are_written_anew_once_and_not_at_every_run() {
    let mut site = site("{ last = 2 }");
    back_up(&site);
    let fill = |round: u8, site: &mut Site| {
        let at = usize::from(round) * CLUSTER;
        site.disks[0].1[at..at + CLUSTER].fill(round + 1);
        site.put_production();
    };
    for round in 0..5 {
        fill(round, &mut site);
        back_up(&site);
    }
    site.rewrite("last = 2", "last = 40");
    // What was left to do may be done once; nothing is given up any more.
    fill(6, &mut site);
    back_up(&site);
    for round in 7..10 {
        fill(round, &mut site);
        let anew = back_up(&site);
        assert!(anew.is_empty(), "round {round}: {anew:?} were written anew, and nothing was given up");
    }
}
