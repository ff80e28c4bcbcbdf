//! Load over time as a line: the coordinates of an SVG path.

use std::fmt::Write;

use super::history::Sample;
use super::text::span;

/// A line and the area under it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chart {
    pub width: u32,
    pub height: u32,
    /// The line, as a path.
    pub line: String,
    /// The area under it, as a path.
    pub area: String,
    /// The load at the top.
    pub top: String,
    /// How long ago the line begins.
    pub begins: String,
    /// For those who do not see it.
    pub label: String,
}

impl Chart {
    /// The chart of these loads, oldest first; none where there is no load.
    pub fn of(samples: &[Sample], width: u32, height: u32) -> Option<Self> {
        let known = || samples.iter().map(|sample| sample.load).filter(|load| load.is_finite());
        let (first, last) = (samples.first()?, samples.last()?);
        let (least, most) = known().fold((f32::MAX, f32::MIN), |(low, high), load| (low.min(load), high.max(load)));
        let latest = known().next_back()?;
        // Down to nought, so that small changes of a small load do not look large.
        let (bottom, top) = (least.min(0.0), most.max(1.0));
        let took = last.at.saturating_sub(first.at);
        let x = |at: u32| {
            if took == 0 { 0.0 } else { f64::from(at.saturating_sub(first.at)) / f64::from(took) * f64::from(width) }
        };
        // A line of one pixel at the edge stays whole.
        let room = f64::from(height) - 2.0;
        let (bottom, highest) = (f64::from(bottom), f64::from(top));
        let y = |load: f32| 1.0 + room * (highest - f64::from(load)) / (highest - bottom);
        let (mut line, mut area) = (String::new(), String::new());
        for part in samples.split(|sample| !sample.load.is_finite()).filter(|part| !part.is_empty()) {
            let points: Vec<_> = part.iter().map(|sample| (x(sample.at), y(sample.load))).collect();
            // One point alone is a short line.
            let (Some(begin), Some(end)) = (points.first(), points.last()) else { continue };
            let end = if points.len() == 1 { (f64::min(begin.0 + 3.0, f64::from(width)), begin.1) } else { *end };
            let points = points.iter().chain([&end]);
            for (number, (x, y)) in points.enumerate() {
                let _ = write!(line, "{}{x:.1},{y:.1}", if number == 0 { 'M' } else { 'L' });
                let _ = match number {
                    0 => write!(area, "M{x:.1},{height}L{x:.1},{y:.1}"),
                    _ => write!(area, "L{x:.1},{y:.1}"),
                };
            }
            let _ = write!(area, "L{:.1},{height}Z", end.0);
        }
        let begins = span(took.into());
        let label = format!("load between {least:.2} and {most:.2} within {begins}, at last {latest:.2}");
        Some(Self { width, height, line, area, top: format!("{top:.2}"), begins, label })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(loads: &[f32]) -> Vec<Sample> {
        loads.iter().zip(100..).map(|(load, at)| Sample { at, load: *load }).collect()
    }

    #[test]
    fn n20_loads_become_a_line_with_gaps() {
        let chart = Chart::of(&samples(&[0.0, 2.0, f32::NAN, 1.0]), 30, 12).unwrap();
        assert_eq!(chart.line, "M0.0,11.0L10.0,1.0L10.0,1.0M30.0,6.0L30.0,6.0");
        assert_eq!(chart.label, "load between 0.00 and 2.00 within 3 s, at last 1.00");
        assert_eq!(Chart::of(&samples(&[0.5]), 30, 12).unwrap().line, "M0.0,6.0L3.0,6.0");
    }

    #[test]
    fn n20_no_load_is_no_chart_and_no_load_breaks_one() {
        assert_eq!(Chart::of(&[], 30, 12), None);
        assert_eq!(Chart::of(&samples(&[f32::NAN]), 30, 12), None);
        for loads in [[-5.0, -6.0], [f32::MAX, f32::MIN], [f32::INFINITY, 1.0], [0.0, 0.0]] {
            let chart = Chart::of(&samples(&loads), 30, 12).unwrap();
            assert!(!chart.line.contains("NaN") && !chart.line.contains("inf"), "{loads:?}: {}", chart.line);
        }
    }
}
