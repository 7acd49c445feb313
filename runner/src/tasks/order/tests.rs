//! Nobody starves, and no slot is taken twice.

use proptest::prelude::*;

use super::*;

fn need(resource: &str, limit: u32) -> Need {
    Need { resource: resource.to_owned(), limit }
}

fn candidate(priority: i32, waits_from: i64, needs: &[Need]) -> Candidate {
    Candidate { place: place(priority, waits_from), waits_from, needs: needs.to_vec(), ours: true }
}

#[test]
fn priority_first_then_age() {
    let restore = place(800, 1000);
    let backup = place(300, 0);
    assert!(restore < backup);
    // 500 points are 2.5 hours.
    assert!(place(300, 0) < place(800, 500 * AGE_MS + 1));
    assert!(place(300, 5) < place(300, 6));
    assert_eq!(place(i32::MIN, i64::MAX), i64::MAX, "no overflow");
}

#[test]
fn six_disks_and_four_slots_are_four_and_two() {
    let mut waiting: Vec<Candidate> = (0..6).map(|i| candidate(300, i, &[need("proxy/p", 4)])).collect();
    let mut in_use = BTreeMap::new();
    let mut begun = 0;
    while let Some(index) = pick(&waiting, &in_use, 10) {
        waiting.remove(index);
        *in_use.entry("proxy/p".to_owned()).or_insert(0) += 1;
        begun += 1;
    }
    assert_eq!((begun, waiting.len()), (4, 2));
}

#[test]
fn what_another_must_do_keeps_nothing_at_first_and_its_slots_when_it_waits_too_long() {
    let theirs = Candidate { ours: false, ..candidate(300, 0, &[need("r", 1)]) };
    let ours = candidate(300, 1, &[need("r", 1)]);
    let waiting = [theirs, ours];
    assert_eq!(pick(&waiting, &BTreeMap::new(), 2), Some(1));
    assert_eq!(pick(&waiting, &BTreeMap::new(), PATIENCE_MS + 1), None);
}

/// A site at work: arrivals, slots, ends. Everything that arrives must begin within a bound that depends on what was
/// ahead of it, not on what comes after it.
#[derive(Clone, Debug)]
struct Arrival {
    after: i64,
    priority: i32,
    needs: Vec<Need>,
    takes: i64,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let resources = prop::collection::btree_set(prop::sample::select(vec!["a", "b", "c"]), 0..3);
    (0..120_000i64, prop::sample::select(vec![100, 200, 300, 400, 800]), resources, 1_000..600_000i64).prop_map(
        |(after, priority, resources, takes)| Arrival {
            after,
            priority,
            needs: resources.into_iter().map(|r| need(r, if r == "a" { 1 } else { 2 })).collect(),
            takes,
        },
    )
}

struct Site {
    now: i64,
    waiting: Vec<Candidate>,
    takes: Vec<i64>,
    running: Vec<(i64, Vec<Need>)>,
    longest: i64,
}

impl Site {
    fn new() -> Self {
        Self { now: 0, waiting: Vec::new(), takes: Vec::new(), running: Vec::new(), longest: 0 }
    }

    fn in_use(&self) -> BTreeMap<String, u32> {
        let mut used = BTreeMap::new();
        for need in self.running.iter().flat_map(|(_, needs)| needs) {
            *used.entry(need.resource.clone()).or_insert(0) += 1;
        }
        used
    }

    fn arrives(&mut self, arrival: &Arrival) {
        let candidate = candidate(arrival.priority, self.now, &arrival.needs);
        let at = self.waiting.partition_point(|c| c.place <= candidate.place);
        self.waiting.insert(at, candidate);
        self.takes.insert(at, arrival.takes);
    }

    fn begins_what_it_can(&mut self, workers: usize) {
        self.running.retain(|(until, _)| *until > self.now);
        while self.running.len() < workers
            && let Some(index) = pick(&self.waiting, &self.in_use(), self.now)
        {
            let candidate = self.waiting.remove(index);
            let takes = self.takes.remove(index);
            self.longest = self.longest.max(self.now - candidate.waits_from);
            self.running.push((self.now + takes, candidate.needs));
            for (resource, used) in self.in_use() {
                assert!(used <= if resource == "a" { 1 } else { 2 }, "{resource}: {used}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn slots_are_never_exceeded_and_everything_begins(arrivals in prop::collection::vec(arrival(), 1..80)) {
        let mut site = Site::new();
        for arrival in &arrivals {
            site.now += arrival.after;
            site.arrives(arrival);
            site.begins_what_it_can(3);
        }
        let total: i64 = arrivals.iter().map(|a| a.takes).sum();
        let until = site.now + total + 1;
        while site.now < until && !site.waiting.is_empty() {
            site.now += 1_000;
            site.begins_what_it_can(3);
        }
        prop_assert!(site.waiting.is_empty(), "{} wait for ever", site.waiting.len());
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// One piece of low priority, and a load of higher priority that never ends and is more than can be done.
    #[test]
    fn nothing_starves(load in prop::sample::select(vec![301, 340, 400]), takes in 30_000..90_000i64, both in any::<bool>()) {
        const EVERY: i64 = 30_000;
        let mut site = Site::new();
        let needs = if both { vec![need("a", 1), need("b", 2)] } else { vec![need("a", 1)] };
        site.arrives(&Arrival { after: 0, priority: 300, needs, takes });
        let low = site.waiting[0].clone();
        // Only what came within the head start goes first, one after the other; nothing that came later does.
        let head_start = i64::from(load - 300) * AGE_MS;
        let ahead = head_start / EVERY + 2;
        let bound = head_start + (ahead + 10) * (takes + 7_000) + PATIENCE_MS;
        let mut number = 0;
        while site.waiting.contains(&low) {
            prop_assert!(site.now <= bound, "still waiting after {} s", site.now / 1000);
            // Both resources are wanted by somebody else at every moment.
            for (resource, limit) in [("a", 1), ("b", 2), ("b", 2)] {
                number += 1;
                let takes = takes + number % 7 * 1_000;
                site.arrives(&Arrival { after: 0, priority: load, needs: vec![need(resource, limit)], takes });
            }
            for _ in 0..6 {
                site.begins_what_it_can(4);
                site.now += EVERY / 6;
            }
        }
    }
}
