//! The rule over made-up points: each period, days, floors, clocks that jump; and what holds for any rule.

use proptest::prelude::*;

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().expect(text)
}

fn points(times: &[&str]) -> Vec<Candidate> {
    let of = |(n, time): (usize, &&str)| Candidate {
        id: Uuid::from_u128(n as u128 + 1),
        created: at(time),
        complete: true,
        pinned: false,
        last_of_disk: false,
    };
    times.iter().enumerate().map(of).collect()
}

/// Numbers, from 1, of the points that stay.
fn kept(points: &[Candidate], keep: &Keep, zone: &str, now: &str) -> Vec<u128> {
    let zone = TimeZone::get(zone).expect(zone);
    let verdicts = judge(points, Some(keep), &zone, at(now));
    verdicts.iter().filter(|v| !v.reasons.is_empty()).map(|v| v.id.as_u128()).collect()
}

#[test]
fn by_count_the_last_ones_stay() {
    let all = points(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]);
    assert_eq!(kept(&all, &Keep { last: Some(2), ..Keep::default() }, "UTC", "2026-01-03T01:00:00Z"), [2, 3]);
    assert_eq!(kept(&all, &Keep { last: Some(9), ..Keep::default() }, "UTC", "2026-01-03T01:00:00Z"), [1, 2, 3]);
    let verdicts = judge(&all, None, &TimeZone::UTC, at("2026-01-03T01:00:00Z"));
    assert!(verdicts.iter().all(|v| v.reasons.contains(&Reason::NoRule)));
}

#[test]
fn by_days_today_does_not_count_and_three_stay_at_least() {
    let all = points(&[
        "2026-01-01T12:00:00Z",
        "2026-01-02T12:00:00Z",
        "2026-01-03T12:00:00Z",
        "2026-01-04T12:00:00Z",
        "2026-01-05T12:00:00Z",
    ]);
    let keep = Keep { days: Some(2), ..Keep::default() };
    // Two days and today: N + 1 days.
    assert_eq!(kept(&all, &keep, "UTC", "2026-01-05T13:00:00Z"), [3, 4, 5]);
    // Days without a point count all the same; three stay.
    assert_eq!(kept(&all, &keep, "UTC", "2026-02-05T13:00:00Z"), [3, 4, 5]);
    let keep = Keep { days: Some(3), ..Keep::default() };
    assert_eq!(kept(&all, &keep, "UTC", "2026-01-05T13:00:00Z"), [2, 3, 4, 5]);
}

#[test]
fn of_each_period_the_newest_stays_by_the_clock_of_the_site() {
    let all = points(&[
        "2026-01-31T22:30:00Z", // 1: January in Prague (23:30)
        "2026-01-31T23:30:00Z", // 2: February there (00:30)
        "2026-02-10T10:00:00Z", // 3
        "2026-02-11T10:00:00Z", // 4
        "2026-03-01T10:00:00Z", // 5
    ]);
    let keep = Keep { monthly: Some(3), ..Keep::default() };
    assert_eq!(kept(&all, &keep, "Europe/Prague", "2026-03-02T00:00:00Z"), [1, 4, 5]);
    assert_eq!(kept(&all, &keep, "UTC", "2026-03-02T00:00:00Z"), [2, 4, 5]);
    // A year by the ISO calendar: 2027-01-01 is in week 53 of 2026.
    let all = points(&["2026-12-28T10:00:00Z", "2027-01-01T10:00:00Z", "2027-01-04T10:00:00Z"]);
    let keep = Keep { weekly: Some(5), ..Keep::default() };
    assert_eq!(kept(&all, &keep, "UTC", "2027-01-05T00:00:00Z"), [2, 3]);
}

#[test]
fn an_hour_that_a_clock_shows_twice_is_two() {
    let all = points(&["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"]);
    let keep = Keep { hourly: Some(5), ..Keep::default() };
    assert_eq!(kept(&all, &keep, "Europe/Prague", "2026-10-25T05:00:00Z"), [1, 2]);
}

#[test]
fn what_cannot_be_used_counts_for_nothing_and_stays() {
    let mut all = points(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]);
    all[2].complete = false;
    all[0].pinned = true;
    let zone = TimeZone::UTC;
    let verdicts = judge(&all, Some(&Keep { last: Some(1), ..Keep::default() }), &zone, at("2026-01-04T00:00:00Z"));
    assert_eq!(verdicts[0].reasons, BTreeSet::from([Reason::Pinned]));
    assert_eq!(verdicts[1].reasons, BTreeSet::from([Reason::Newest, Reason::Last]));
    assert_eq!(verdicts[2].reasons, BTreeSet::from([Reason::NotComplete]));
}

#[test]
fn a_clock_that_was_ahead_does_not_keep_its_point_for_ever() {
    let all = points(&["2036-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z", "2026-01-04T00:00:00Z"]);
    // The point of the future is the oldest by receipt: by count it goes first.
    assert_eq!(kept(&all, &Keep { last: Some(2), ..Keep::default() }, "UTC", "2026-01-04T01:00:00Z"), [3, 4]);
}

fn any_keep() -> impl Strategy<Value = Keep> {
    let count = || proptest::option::of(1u32..9);
    (count(), count(), count(), count(), count(), count(), count()).prop_map(
        |(last, days, hourly, daily, weekly, monthly, yearly)| Keep {
            last,
            days,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
        },
    )
}

fn any_points() -> impl Strategy<Value = Vec<Candidate>> {
    let one = (0i64..400 * 24 * 3600, prop::bool::weighted(0.9), prop::bool::weighted(0.1));
    prop::collection::vec(one, 0..60).prop_map(|raw| {
        let mut at = 1_770_000_000;
        let of = |(n, (gap, complete, pinned)): (usize, (i64, bool, bool))| {
            at += gap / 40;
            let created = Timestamp::from_second(at).expect("in range");
            Candidate { id: Uuid::from_u128(n as u128 + 1), created, complete, pinned, last_of_disk: false }
        };
        raw.into_iter().enumerate().map(of).collect()
    })
}

fn cases() -> ProptestConfig {
    let scale = std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse::<u32>().ok()).unwrap_or(1);
    ProptestConfig { cases: 128 * scale, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn rules_hold(points in any_points(), keep in any_keep(), zone in prop_oneof![Just("UTC"), Just("Europe/Prague")]) {
        let zone = TimeZone::get(zone).expect("a zone");
        let now = Timestamp::from_second(1_770_000_000 + 700 * 24 * 3600).expect("in range");
        let verdicts = judge(&points, Some(&keep), &zone, now);
        prop_assert_eq!(verdicts.len(), points.len());
        let stays = |point: &Candidate| verdicts.iter().any(|v| v.id == point.id && !v.reasons.is_empty());
        // The newest, the pinned and the unusable stay.
        if let Some(newest) = points.iter().rev().find(|p| p.complete) {
            prop_assert!(stays(newest));
        }
        prop_assert!(points.iter().filter(|p| p.pinned || !p.complete).all(stays));
        // No rule keeps more than it says.
        for (reason, most) in [(Reason::Last, keep.last), (Reason::Hourly, keep.hourly), (Reason::Daily, keep.daily), (Reason::Weekly, keep.weekly), (Reason::Monthly, keep.monthly), (Reason::Yearly, keep.yearly)] {
            let count = verdicts.iter().filter(|v| v.reasons.contains(&reason)).count();
            prop_assert!(count <= most.unwrap_or(0) as usize, "{:?}: {}", reason, count);
        }
        // A second look changes nothing.
        let left: Vec<Candidate> = points.iter().filter(|p| stays(p)).copied().collect();
        prop_assert!(judge(&left, Some(&keep), &zone, now).iter().all(|v| !v.reasons.is_empty()));
        // Adding a rule never lets a point go.
        let more = Keep { last: Some(keep.last.unwrap_or(0) + 1), ..keep };
        let wider = judge(&points, Some(&more), &zone, now);
        prop_assert!(wider.iter().zip(&verdicts).all(|(w, v)| v.reasons.is_empty() || !w.reasons.is_empty()));
    }
}
