//! Runs fall where the calendar says, in every zone and over every change of the clock.

use std::collections::BTreeMap;

use jiff::civil::date;
use proptest::prelude::*;

use super::*;

fn zone(name: &str) -> TimeZone {
    TimeZone::get(name).expect(name)
}

fn at(text: &str) -> Timestamp {
    text.parse().expect(text)
}

fn daily(time: &str, days: &str, zone_name: &str) -> Schedule {
    let when = When::Daily { at: parse_clock(time).expect(time), days: Weekdays::parse(days).expect(days) };
    Schedule::of(when, zone(zone_name))
}

fn every(every: u64, offset: u64, window: &str, zone_name: &str) -> Schedule {
    let window = if window.is_empty() { Window::default() } else { Window::parse(window).expect(window) };
    let when = When::Periodic { every: Duration::from_secs(every), offset: Duration::from_secs(offset), window };
    Schedule::of(when, zone(zone_name))
}

/// All due times in a range.
fn between(schedule: &Schedule, from: &str, to: &str) -> Vec<String> {
    let (mut from, to) = (at(from), at(to));
    let mut due = Vec::new();
    while let Some(next) = schedule.next_after(from).filter(|next| *next < to) {
        due.push(next.to_string());
        from = next;
    }
    due
}

#[test]
fn a_time_that_a_spring_day_lacks_comes_once_after_the_jump() {
    // Prague: 29 March 2026, 02:00 becomes 03:00. New York: 8 March 2026.
    let prague = daily("02:30", "all", "Europe/Prague");
    assert_eq!(
        between(&prague, "2026-03-28T00:00:00Z", "2026-03-31T00:00:00Z"),
        ["2026-03-28T01:30:00Z", "2026-03-29T01:30:00Z", "2026-03-30T00:30:00Z"]
    );
    let york = daily("02:30", "all", "America/New_York");
    assert_eq!(
        between(&york, "2026-03-07T00:00:00Z", "2026-03-10T00:00:00Z"),
        ["2026-03-07T07:30:00Z", "2026-03-08T07:30:00Z", "2026-03-09T06:30:00Z"]
    );
}

#[test]
fn a_time_that_an_autumn_day_has_twice_comes_once() {
    // Prague: 25 October 2026, 03:00 becomes 02:00. New York: 1 November 2026.
    let prague = daily("02:30", "all", "Europe/Prague");
    assert_eq!(
        between(&prague, "2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z"),
        ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
    );
    let york = daily("01:30", "all", "America/New_York");
    assert_eq!(
        between(&york, "2026-11-01T00:00:00Z", "2026-11-03T00:00:00Z"),
        ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]
    );
}

#[test]
fn a_grid_stays_even_through_a_change_of_clocks_and_starts_anew_at_midnight() {
    let grid = every(4 * 3600, 1800, "", "Europe/Prague");
    assert_eq!(
        between(&grid, "2026-03-28T23:00:00Z", "2026-03-29T22:00:01Z"),
        [
            "2026-03-28T23:30:00Z",
            "2026-03-29T03:30:00Z",
            "2026-03-29T07:30:00Z",
            "2026-03-29T11:30:00Z",
            "2026-03-29T15:30:00Z",
            "2026-03-29T19:30:00Z"
        ]
    );
    // 7 hours do not divide a day: the last step is short.
    let grid = every(7 * 3600, 0, "", "UTC");
    assert_eq!(
        between(&grid, "2026-01-01T12:00:00Z", "2026-01-02T08:00:00Z"),
        ["2026-01-01T14:00:00Z", "2026-01-01T21:00:00Z", "2026-01-02T00:00:00Z", "2026-01-02T07:00:00Z"]
    );
}

#[test]
fn a_window_that_opens_is_a_run_at_once_and_then_the_grid() {
    let grid = every(4 * 3600, 0, "21:30-05:00", "Europe/Prague");
    assert_eq!(
        between(&grid, "2026-06-01T12:00:00Z", "2026-06-02T12:00:00Z"),
        // 21:30 by its opening, 00:00 and 04:00 by the grid.
        ["2026-06-01T19:30:00Z", "2026-06-01T22:00:00Z", "2026-06-02T02:00:00Z"]
    );
    assert!(grid.may_start(at("2026-06-01T22:00:00Z")));
    assert!(!grid.may_start(at("2026-06-01T12:00:00Z")));
    assert_eq!(grid.must_stop(at("2026-06-01T22:00:00Z")), Some(at("2026-06-02T03:00:00Z")));
    // The weekend's window goes on without a gap, and never shuts between its spans.
    let window = Window::parse("mon-fri 20:00-24:00; sat,sun 00:00-24:00").expect("window");
    assert_eq!(window.shuts_after(at("2026-06-05T21:00:00Z"), &TimeZone::UTC), Some(at("2026-06-08T00:00:00Z")));
    assert_eq!(window.openings(date(2026, 6, 6), &TimeZone::UTC), Vec::<Timestamp>::new());
    assert_eq!(window.open_from(at("2026-06-08T01:00:00Z"), &TimeZone::UTC), Some(at("2026-06-08T20:00:00Z")));
}

#[test]
fn months_have_their_own_length() {
    let monthly = |day| Schedule::of(When::Monthly { at: parse_clock("22:00").expect("time"), day }, TimeZone::UTC);
    assert_eq!(
        between(&monthly(MonthDay::Number(31)), "2027-12-15T00:00:00Z", "2028-05-01T00:00:00Z"),
        [
            "2027-12-31T22:00:00Z",
            "2028-01-31T22:00:00Z",
            "2028-02-29T22:00:00Z",
            "2028-03-31T22:00:00Z",
            "2028-04-30T22:00:00Z"
        ]
    );
    let first_sunday = monthly(MonthDay::Weekday(1, Weekday::Sunday));
    assert_eq!(first_sunday.next_after(at("2026-11-01T22:00:00Z")), Some(at("2026-12-06T22:00:00Z")));
    let last_saturday = monthly(MonthDay::Weekday(5, Weekday::Saturday));
    assert_eq!(last_saturday.next_after(at("2026-11-01T00:00:00Z")), Some(at("2026-11-28T22:00:00Z")));
}

#[test]
fn calendars_are_read_as_people_write_them() {
    for (text, after, next) in [
        ("hourly", "2026-11-21T08:59:59Z", "2026-11-21T09:00:00Z"),
        ("daily", "2026-11-21T08:00:00Z", "2026-11-21T23:00:00Z"),
        ("Sun 04:00", "2026-11-21T08:00:00Z", "2026-11-22T03:00:00Z"),
        ("Mon..Fri *-*-* 22:00", "2026-11-21T08:00:00Z", "2026-11-23T21:00:00Z"),
        ("*-*-01 04:00:00", "2026-11-21T08:00:00Z", "2026-12-01T03:00:00Z"),
        ("*:0/15", "2026-11-21T08:46:00Z", "2026-11-21T09:00:00Z"),
        ("sat,sun 08..10:30", "2026-11-21T08:30:00Z", "2026-11-21T09:30:00Z"),
        ("weekly", "2026-11-21T08:30:00Z", "2026-11-22T23:00:00Z"),
    ] {
        let calendar = Calendar::on_calendar(text).expect(text);
        assert_eq!(calendar.next_after(at(after), &zone("Europe/Prague")), Some(at(next)), "{text}");
    }
    for bad in ["", "noon", "Sun Mon", "25:00", "2026-01-01 04:00", "*:*:*:*", "Foo 04:00", "*-02-30 04:00"] {
        assert!(Calendar::on_calendar(bad).is_err(), "{bad}");
    }
    for bad in ["* * *", "0 0 31 2 *", "a b c d e", "60 * * * *"] {
        assert!(Calendar::cron(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_calendar_time_in_the_gap_is_not_lost() {
    let calendar = Calendar::cron("30 2 * * *").expect("cron");
    let prague = zone("Europe/Prague");
    let first = calendar.next_after(at("2026-03-28T12:00:00Z"), &prague).expect("a time");
    assert!(first >= at("2026-03-29T00:59:59Z") && first <= at("2026-03-29T02:00:00Z"), "{first}");
    let autumn = calendar.next_after(at("2026-10-24T12:00:00Z"), &prague).expect("a time");
    assert_eq!(autumn, at("2026-10-25T00:30:00Z"));
    assert_eq!(calendar.next_after(autumn, &prague), Some(at("2026-10-26T01:30:00Z")));
}

#[test]
fn what_was_missed_is_made_up_for_once() {
    let mut schedule = daily("22:00", "all", "UTC");
    let (last, now) = (at("2026-06-01T22:00:00Z"), at("2026-06-05T08:00:00Z"));
    let told = schedule.catch_up("j", last, now);
    assert_eq!(told, CatchUp { next: Some(at("2026-06-04T22:00:00Z")), missed: 3 });
    schedule.catch_up = false;
    let told = schedule.catch_up("j", last, now);
    assert_eq!(told, CatchUp { next: Some(at("2026-06-05T22:00:00Z")), missed: 3 });
    // Nothing was missed.
    let told = schedule.catch_up("j", at("2026-06-04T22:00:00Z"), now);
    assert_eq!(told, CatchUp { next: Some(at("2026-06-05T22:00:00Z")), missed: 0 });
}

#[test]
fn events_wait_for_their_window() {
    let schedule =
        Schedule::of(When::OnNewPoint { window: Window::parse("20:00-06:00").expect("window") }, TimeZone::UTC);
    assert_eq!(schedule.due("j", at("2026-06-01T12:00:00Z")), Due::OnEvent(at("2026-06-01T20:00:00Z")));
    assert_eq!(schedule.due("j", at("2026-06-01T22:00:00Z")), Due::OnEvent(at("2026-06-01T22:00:00Z")));
    assert_eq!(Schedule::of(When::Manual, TimeZone::UTC).due("j", at("2026-06-01T22:00:00Z")), Due::Never);
}

fn any_zone() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("Europe/Prague"),
        Just("America/New_York"),
        Just("UTC"),
        Just("Asia/Kolkata"),
        Just("Australia/Lord_Howe"),
        Just("America/St_Johns"),
        Just("Asia/Beirut")
    ]
}

/// Instants of 2020 to 2040.
fn any_time() -> impl Strategy<Value = Timestamp> {
    (1_577_836_800i64..2_208_988_800).prop_map(|s| Timestamp::from_second(s).expect("in range"))
}

fn cases() -> ProptestConfig {
    let scale = std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse::<u32>().ok()).unwrap_or(1);
    ProptestConfig { cases: 64 * scale, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    /// One run for each day a daily rule names, none for others, in order.
    #[test]
    fn each_day_has_its_run(zone_name in any_zone(), start in any_time(), minute in 0u16..1440, days in 1u8..0x80) {
        let days = Weekdays::of((0..7).filter(|d| days & (1 << d) != 0).map(|d| Weekday::from_monday_zero_offset(d).expect("day")));
        let time = Time::new(i8::try_from(minute / 60).expect("small"), i8::try_from(minute % 60).expect("small"), 0, 0).expect("time");
        let schedule = Schedule::of(When::Daily { at: time, days }, zone(zone_name));
        let mut runs: BTreeMap<Date, u32> = BTreeMap::new();
        let mut from = start;
        for _ in 0..40 {
            let next = schedule.next_after(from).expect("a run");
            prop_assert!(next > from);
            let local = next.to_zoned(zone(zone_name));
            prop_assert!(days.has(local.date().weekday()));
            let late = local.time().duration_since(time);
            prop_assert!(late == SignedDuration::ZERO || (late > SignedDuration::ZERO && late <= SignedDuration::from_hours(1)), "{local} {time}");
            *runs.entry(local.date()).or_default() += 1;
            from = next;
        }
        prop_assert!(runs.values().all(|n| *n == 1));
        let (first, last) = (*runs.keys().next().expect("a day"), *runs.keys().last().expect("a day"));
        let mut day = first;
        while day < last {
            prop_assert_eq!(runs.contains_key(&day), days.has(day.weekday()), "{}", day);
            day = day.tomorrow().expect("a day");
        }
    }

    /// Due times of a grid rise, lie in the window, and are at most one step apart while it is open.
    #[test]
    fn a_grid_is_in_its_window(zone_name in any_zone(), start in any_time(), every_min in 1u64..1440, from in 0u16..1440, len in 1u16..1440) {
        let to = (from + len) % 1440;
        prop_assume!(from != to);
        let text = format!("{:02}:{:02}-{:02}:{:02}", from / 60, from % 60, to / 60, to % 60);
        let schedule = every(every_min * 60, 0, &text, zone_name);
        let zone = zone(zone_name);
        let window = Window::parse(&text).expect("window");
        let mut last = start;
        for _ in 0..30 {
            let next = schedule.next_after(last).expect("a run");
            prop_assert!(next > last);
            prop_assert!(window.is_open(next, &zone), "{} {}", next, text);
            last = next;
        }
    }

    /// Asking twice from anywhere before a due time gives that due time: no instant is skipped by where one asks.
    #[test]
    fn the_answer_does_not_depend_on_where_one_asks(zone_name in any_zone(), start in any_time(), every_min in 1u64..600, part in 0i64..100) {
        let schedule = every(every_min * 60, 0, "", zone_name);
        let next = schedule.next_after(start).expect("a run");
        let gap = next.duration_since(start).as_secs();
        let between = start + SignedDuration::from_secs(gap * part / 100);
        prop_assume!(between < next);
        prop_assert_eq!(schedule.next_after(between), Some(next));
    }

    /// Jitter is late by less than its range, and the same each time.
    #[test]
    fn jitter_is_bounded_and_steady(start in any_time(), range in 1u64..7200) {
        let mut schedule = daily("22:00", "all", "Europe/Prague");
        let plain = schedule.next_after(start).expect("a run");
        schedule.jitter = Duration::from_secs(range);
        let Due::At(late) = schedule.due("nightly", start) else { panic!("a time") };
        prop_assert!(late >= plain && late.duration_since(plain).as_secs() < i64::try_from(range).expect("small"));
        prop_assert_eq!(schedule.due("nightly", start), Due::At(late));
    }

    /// Windows never panic and agree with themselves.
    #[test]
    fn any_text_is_read_or_refused(text in "[ a-z0-9:;,.*/-]{0,24}") {
        let _ = (Window::parse(&text), Weekdays::parse(&text), Calendar::on_calendar(&text), Calendar::cron(&text));
    }
}
