//! A chart of what was measured, as one SVG file.
//!
//! Invariants
//! - Each group of bars has its own scale, from nothing to its longest bar; the figure stands behind each bar.
//! - Names of servers and files are escaped: they are text and nothing else.

use std::{fmt::Write as _, fs, path::Path};

use crate::fail::{Fail, Result};

const WIDTH: f64 = 640.0;
const LEFT: f64 = 130.0;
const RIGHT: f64 = 90.0;
const LINE: f64 = 20.0;
const COLOURS: [&str; 4] = ["#2b7a4b", "#8a8f98", "#c08a2b", "#4b6ea8"];

/// Figures of one kind, one for each side.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// What they are, with their unit.
    pub(super) label: String,
    /// Who, and how much.
    pub(super) bars: Vec<(String, f64)>,
}

/// Groups of one figure each, from what every side reached.
pub(super) fn groups(labels: &[&str], sides: &[(String, Vec<f64>)]) -> Vec<Group> {
    let bars = |n: usize| sides.iter().filter_map(|(name, values)| Some((name.clone(), *values.get(n)?))).collect();
    labels.iter().enumerate().map(|(n, label)| Group { label: (*label).to_owned(), bars: bars(n) }).collect()
}

/// Writes the chart.
///
/// # Errors
/// I/O.
pub(super) fn write(path: &Path, title: &str, groups: &[Group]) -> Result<()> {
    fs::write(path, draw(title, groups)).map_err(|e| Fail::io(path.display(), "write", &e))
}

fn draw(title: &str, groups: &[Group]) -> String {
    let mut body = String::new();
    let mut y = 34.0;
    for group in groups {
        let longest = group.bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let _ = write!(body, r#"<text x="8" y="{}" font-weight="bold">{}</text>"#, y + 14.0, escape(&group.label));
        body.push('\n');
        y += LINE;
        for ((name, value), colour) in group.bars.iter().zip(COLOURS.iter().cycle()) {
            let length = (value / longest).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT);
            let (text_y, end) = (y + 13.0, LEFT + length + 6.0);
            let _ = writeln!(
                body,
                r#"<text x="{}" y="{text_y}" text-anchor="end">{}</text><rect x="{LEFT}" y="{y}" width="{length:.1}" height="15" fill="{colour}"/><text x="{end:.1}" y="{text_y}">{}</text>"#,
                LEFT - 8.0,
                escape(name),
                figure(*value)
            );
            y += LINE;
        }
        y += 8.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{y}\" fill=\"white\"/>\n<text x=\"8\" y=\"20\" \
         font-size=\"14\">{}</text>\n{body}</svg>\n",
        escape(title)
    )
}

/// Three digits that matter, without an exponent.
fn figure(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_of_each_group_fills_its_width_and_names_are_only_text() {
        let sides = [("<a & b>".to_owned(), vec![50.0, 3.0]), ("c".to_owned(), vec![100.0, 1.5])];
        let svg = draw("t", &groups(&["per second", "s"], &sides));
        let full = format!("width=\"{:.1}\"", WIDTH - LEFT - RIGHT);
        let half = format!("width=\"{:.1}\"", (WIDTH - LEFT - RIGHT) / 2.0);
        assert_eq!((svg.matches(&full).count(), svg.matches(&half).count()), (2, 2), "{svg}");
        assert!(svg.contains("&lt;a &amp; b&gt;") && !svg.contains("<a"), "{svg}");
    }
}
