//! Sizes, rates and durations, read and printed.
//!
//! Invariants
//! - A rate or a duration without a unit is refused with both readings shown: tools disagree.
//! - `KiB` is 1024, `kB` is 1000, `kbit` is 1000 bits; everything is kept in bytes and bytes per second.

use std::time::Duration;

use jiff::Timestamp;

use crate::fail::{Code, Fail, Result};

/// `62.1 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut unit = 0;
    let mut whole = n;
    loop {
        let fraction = whole % 1024;
        whole /= 1024;
        if whole < 1024 || unit + 1 == UNITS.len() {
            let name = UNITS.get(unit).copied().unwrap_or("EiB");
            return if whole < 100 {
                format!("{whole}.{} {name}", fraction * 10 / 1024)
            } else {
                format!("{whole} {name}")
            };
        }
        unit += 1;
    }
}

/// `1 point`, `2 points`.
pub fn count(n: usize, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

/// `00:06:12`, with days where there are some.
pub fn seconds(n: u64) -> String {
    let (days, hours, minutes, rest) = (n / 86_400, n / 3600 % 24, n / 60 % 60, n % 60);
    let clock = format!("{hours:02}:{minutes:02}:{rest:02}");
    if days > 0 { format!("{days} d {clock}") } else { clock }
}

/// The multiplier of a size unit, in bytes.
fn scale_of(unit: &str) -> Option<u64> {
    Some(match unit {
        "B" => 1,
        "K" | "k" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    })
}

/// The multiplier of a bit unit, in bits.
fn bits_of(unit: &str) -> Option<u64> {
    Some(match unit {
        "bit" => 1,
        "kbit" | "Kbit" => 1_000,
        "Mbit" => 1_000_000,
        "Gbit" => 1_000_000_000,
        _ => return None,
    })
}

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim())
}

/// A decimal number times a whole one, without floating point.
fn times(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = if whole.is_empty() && !fraction.is_empty() { 0 } else { whole.parse().ok()? };
    let mut value = whole.checked_mul(scale)?;
    if !fraction.is_empty() {
        let digits: u64 = fraction.get(..fraction.len().min(6))?.parse().ok()?;
        let tens = 10u64.checked_pow(u32::try_from(fraction.len().min(6)).ok()?)?;
        let part = u128::from(digits) * u128::from(scale) / u128::from(tens);
        value = value.checked_add(u64::try_from(part).ok()?)?;
    }
    Some(value)
}

/// Reads `64KiB`, `10G`, `4096B`. A bare number is bytes only where it says so: it is refused.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let (number, unit) = split(text);
    let value = scale_of(unit).and_then(|scale| times(number, scale));
    value.ok_or_else(|| Fail::new(Code::Unit, format!("`{text}` is not a size; write for example 512MiB or 10GiB")))
}

/// Reads `200MiB/s`, `1Gbit/s`; `none` is no limit. In bytes per second.
pub fn parse_rate(text: &str) -> Result<Option<u64>> {
    if text == "none" {
        return Ok(None);
    }
    let (number, unit) = split(text);
    if unit.is_empty() && !number.is_empty() {
        let what = format!("the rate `{text}` has no unit: {number}MiB/s or {number}Mbit/s?");
        return Err(Fail::new(Code::Unit, what));
    }
    let per_second = unit.strip_suffix("/s").and_then(|unit| {
        let by_bytes = scale_of(unit).and_then(|scale| times(number, scale));
        by_bytes.or_else(|| bits_of(unit).and_then(|bits| times(number, bits)).map(|bits| bits / 8))
    });
    match per_second {
        Some(rate) if rate > 0 => Ok(Some(rate)),
        _ => Err(Fail::new(Code::Unit, format!("`{text}` is not a rate; write for example 200MiB/s or 1Gbit/s"))),
    }
}

/// Reads `30s`, `10m`, `2h`, `1d`.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let (number, unit) = split(text);
    let scale = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" | "min" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        _ => None,
    };
    let value = scale.and_then(|scale| times(number, scale)).map(Duration::from_millis);
    value.ok_or_else(|| Fail::new(Code::Unit, format!("`{text}` is not a duration; write for example 30s, 10m or 2h")))
}

/// Reads `02:00` (the next time the clock here shows that) or an RFC 3339 time with its zone.
pub fn parse_when(text: &str) -> Result<Timestamp> {
    if let Ok(at) = text.parse() {
        return Ok(at);
    }
    let now = jiff::Zoned::now();
    let next = text.parse::<jiff::civil::Time>().ok().filter(|_| text.len() <= 8).and_then(|time| {
        let today = now.date().to_datetime(time).to_zoned(now.time_zone().clone()).ok()?;
        if today > now {
            Some(today)
        } else {
            now.date().tomorrow().ok()?.to_datetime(time).to_zoned(now.time_zone().clone()).ok()
        }
    });
    let bad = || Fail::new(Code::Unit, format!("`{text}` is not a time; write 02:00 or 2026-11-21T02:00:00Z"));
    next.map(|zoned| zoned.timestamp()).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_rates_and_durations_need_their_unit() {
        assert_eq!(parse_bytes("64KiB").expect("size"), 65_536);
        assert_eq!(parse_bytes("1.5G").expect("size"), 1_610_612_736);
        assert_eq!(parse_bytes("10MB").expect("size"), 10_000_000);
        assert_eq!(parse_bytes("99").expect_err("bare").code, Code::Unit);
        assert_eq!(parse_rate("200MiB/s").expect("rate"), Some(209_715_200));
        assert_eq!(parse_rate("1Gbit/s").expect("rate"), Some(125_000_000));
        assert_eq!(parse_rate("none").expect("rate"), None);
        let bare = parse_rate("200").expect_err("bare");
        assert!(bare.what.contains("200MiB/s") && bare.what.contains("200Mbit/s"), "{}", bare.what);
        for bad in ["", "fast", "200MiB", "0B/s", "99999999999999999999MiB/s", "1..5MiB/s"] {
            assert_eq!(parse_rate(bad).expect_err(bad).code, Code::Unit, "{bad}");
        }
        assert_eq!(parse_duration("90s").expect("duration"), Duration::from_secs(90));
        assert_eq!(parse_duration("10m").expect("duration"), Duration::from_secs(600));
        assert!(parse_duration("10").is_err());
    }

    #[test]
    fn sizes_and_times_print_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(150 << 30), "150 GiB");
        assert_eq!(bytes(u64::MAX), "15.9 EiB");
        assert_eq!(seconds(372), "00:06:12");
        assert_eq!(seconds(90_000), "1 d 01:00:00");
    }

    #[test]
    fn a_clock_time_is_the_next_one() {
        let now = Timestamp::now();
        for text in ["00:00", "02:00", "13:37", "23:59:59"] {
            let at = parse_when(text).expect(text);
            let ahead = at.duration_since(now).as_secs();
            // A day with a change of the clocks has 25 hours.
            assert!((0..=25 * 3600).contains(&ahead), "{text} is {ahead} s ahead");
        }
        assert_eq!(parse_when("2026-11-21T02:00:00Z").expect("time").as_second(), 1_795_226_400);
        for bad in ["2026-11-21T02:00:00", "25:00", "soon", ""] {
            assert_eq!(parse_when(bad).expect_err(bad).code, Code::Unit);
        }
    }
}
