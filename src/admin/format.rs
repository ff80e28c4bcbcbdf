//! How pages display text and values from other nodes, times, and loads.

use std::borrow::Cow;
use std::fmt::Write;

use super::history::LoadSample;
use crate::clock::Timestamp;
use crate::packet::Payload;

/// How much of a value is displayed.
const MAX_VALUE_BYTES: usize = 64 * 1024;

/// Escapes the characters that could hide or reorder the text around them: control characters and the marks of Unicode's
/// bidirectional algorithm. Newlines and tabs stay.
pub(super) fn visible(text: &str) -> Cow<'_, str> {
    let is_invisible = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    if !text.contains(is_invisible) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_invisible(c) {
            // Writing to a string cannot fail.
            let _ = write!(escaped, "{}", c.escape_unicode());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// A payload for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DisplayValue {
    /// A string as it is, any other value as JSON; shortened if it is long.
    pub text: String,
    /// Whether the value is a string.
    pub is_text: bool,
    /// The length of the part that is left out at the end.
    pub omitted_bytes: usize,
}

impl DisplayValue {
    pub fn new(payload: &Payload) -> Self {
        let (text, is_text) = match &payload.0 {
            serde_json::Value::String(text) => (visible(text).into_owned(), true),
            other => {
                let text = serde_json::to_string_pretty(other).unwrap_or_default();
                (visible(&text).into_owned(), false)
            }
        };
        let end = (0..=MAX_VALUE_BYTES.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        let omitted_bytes = text.len() - end;
        let text = text.get(..end).unwrap_or_default().to_owned();
        Self { text, is_text, omitted_bytes }
    }
}

/// A time for display: exact, and as an age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DisplayTime {
    /// Seconds since the epoch, for the script that updates the age.
    pub seconds: u64,
    /// RFC 3339.
    pub exact: String,
    /// `5 s ago`.
    pub age: String,
}

impl DisplayTime {
    /// Without `now`, the age is the exact time, which does not change every second; the script replaces it.
    pub fn new(at: Timestamp, now: Option<Timestamp>) -> Self {
        let exact = at.to_string();
        let age = now.map(|now| format!("{} ago", format_age(now.since(at).as_secs())));
        Self { seconds: at.as_secs(), age: age.unwrap_or_else(|| exact.clone()), exact }
    }
}

/// A duration in its largest unit.
fn format_age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A count with its noun: `1 agent`, `2 agents`.
pub(super) fn count_of(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// A load over time, as SVG paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LoadChart {
    pub width: u32,
    pub height: u32,
    /// The path of the line.
    pub line: String,
    /// The path of the area under the line.
    pub area: String,
    /// The load at the top edge.
    pub max_load: String,
    /// The age of the oldest load.
    pub time_span: String,
    /// The text alternative.
    pub label: String,
}

impl LoadChart {
    /// Draws loads, oldest first. None if no load is known.
    pub fn new(samples: &[LoadSample], width: u32, height: u32) -> Option<Self> {
        let known_loads = || samples.iter().map(|sample| sample.load).filter(|load| load.is_finite());
        let (first, last) = (samples.first()?, samples.last()?);
        let latest = known_loads().next_back()?;
        let (least, most) =
            known_loads().fold((f32::MAX, f32::MIN), |(least, most), load| (least.min(load), most.max(load)));
        // The scale includes 0 and 1, so that small changes of a small load do not look large.
        let (bottom, top) = (f64::from(least.min(0.0)), f64::from(most.max(1.0)));
        let seconds = last.at.saturating_sub(first.at);
        let x = |at: u32| {
            let elapsed = f64::from(at.saturating_sub(first.at));
            if seconds == 0 { 0.0 } else { elapsed / f64::from(seconds) * f64::from(width) }
        };
        // A margin of one pixel keeps the line visible at the edges.
        let y = |load: f32| 1.0 + (f64::from(height) - 2.0) * (top - f64::from(load)) / (top - bottom);
        let (mut line, mut area) = (String::new(), String::new());
        for segment in samples.split(|sample| !sample.load.is_finite()).filter(|segment| !segment.is_empty()) {
            let points: Vec<_> = segment.iter().map(|sample| (x(sample.at), y(sample.load))).collect();
            let (Some(start), Some(end)) = (points.first(), points.last()) else { continue };
            // A single point is drawn as a short line.
            let end = if points.len() == 1 { (f64::min(start.0 + 3.0, f64::from(width)), start.1) } else { *end };
            for (index, (x, y)) in points.iter().chain([&end]).enumerate() {
                // Writing to a string cannot fail.
                let _ = write!(line, "{}{x:.1},{y:.1}", if index == 0 { 'M' } else { 'L' });
                let _ = match index {
                    0 => write!(area, "M{x:.1},{height}L{x:.1},{y:.1}"),
                    _ => write!(area, "L{x:.1},{y:.1}"),
                };
            }
            let _ = write!(area, "L{:.1},{height}Z", end.0);
        }
        let time_span = format_age(seconds.into());
        let label = format!("load between {least:.2} and {most:.2} over {time_span}, latest {latest:.2}");
        Some(Self { width, height, line, area, max_load: format!("{top:.2}"), time_span, label })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n20_escapes_control_and_bidi_characters() {
        assert_eq!(visible("plain <b>\n\t\u{e4}"), "plain <b>\n\t\u{e4}");
        assert_eq!(visible("a\u{202e}b\u{0}\u{1b}[m\u{200b}"), "a\\u{202e}b\\u{0}\\u{1b}[m\\u{200b}");
    }

    #[test]
    fn n20_displays_values_as_text_or_json_up_to_limit() {
        let text = DisplayValue::new(&"a\nb".into());
        assert_eq!((text.text.as_str(), text.is_text, text.omitted_bytes), ("a\nb", true, 0));
        let number = DisplayValue::new(&Payload(serde_json::json!({"a": 5})));
        assert_eq!((number.text.as_str(), number.is_text), ("{\n  \"a\": 5\n}", false));
        let long = DisplayValue::new(&Payload(serde_json::json!("\u{e4}".repeat(MAX_VALUE_BYTES))));
        assert_eq!((long.text.len(), long.omitted_bytes), (MAX_VALUE_BYTES, MAX_VALUE_BYTES));
    }

    #[test]
    fn n20_formats_ages_in_largest_unit() {
        let age = |at: u64, now: u64| DisplayTime::new(Timestamp::from_secs(at), Some(Timestamp::from_secs(now))).age;
        let ages = [0, 119, 120, 7_200, 172_800].map(|seconds| age(1_000_000 - seconds, 1_000_000));
        assert_eq!(ages, ["0 s ago", "119 s ago", "2 min ago", "2 h ago", "2 d ago"]);
        assert_eq!(age(9, 5), "0 s ago");
    }

    fn samples(loads: &[f32]) -> Vec<LoadSample> {
        loads.iter().zip(100..).map(|(load, at)| LoadSample { at, load: *load }).collect()
    }

    #[test]
    fn n20_load_chart_has_gaps_for_unknown_loads() {
        let chart = LoadChart::new(&samples(&[0.0, 2.0, f32::NAN, 1.0]), 30, 12).unwrap();
        assert_eq!(chart.line, "M0.0,11.0L10.0,1.0L10.0,1.0M30.0,6.0L30.0,6.0");
        assert_eq!(chart.label, "load between 0.00 and 2.00 over 3 s, latest 1.00");
        assert_eq!(LoadChart::new(&samples(&[0.5]), 30, 12).unwrap().line, "M0.0,6.0L3.0,6.0");
    }

    #[test]
    fn n20_load_chart_handles_missing_and_extreme_loads() {
        assert_eq!(LoadChart::new(&[], 30, 12), None);
        assert_eq!(LoadChart::new(&samples(&[f32::NAN]), 30, 12), None);
        for loads in [[-5.0, -6.0], [f32::MAX, f32::MIN], [f32::INFINITY, 1.0], [0.0, 0.0]] {
            let chart = LoadChart::new(&samples(&loads), 30, 12).unwrap();
            assert!(!chart.line.contains("NaN") && !chart.line.contains("inf"), "{loads:?}: {}", chart.line);
        }
    }
}
