//! The table of one measurement, and the same as JSON.

use std::fmt;

use serde_json::json;

use crate::machine::Machine;
use crate::stats::Samples;

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Ours over the floor, at least.
    RatioAtLeast(f64),
    /// Ours over the floor, at most.
    RatioAtMost(f64),
    /// Ours, at least.
    AtLeast(f64),
    /// Ours, at most.
    AtMost(f64),
}

/// One figure.
#[derive(Clone, Debug)]
pub struct Row {
    what: String,
    unit: &'static str,
    floor: Option<f64>,
    ours: f64,
    spread: Option<(f64, f64)>,
    ratio: Option<f64>,
    samples: usize,
    goal: Option<Goal>,
}

impl Row {
    /// A figure by itself.
    pub fn value(what: impl Into<String>, unit: &'static str, ours: f64) -> Self {
        Self { what: what.into(), unit, floor: None, ours, spread: None, ratio: None, samples: 1, goal: None }
    }
    /// The median of some measurements.
    pub fn median(what: impl Into<String>, unit: &'static str, ours: &Samples) -> Self {
        let spread = Some((ours.quantile(0.25), ours.quantile(0.75)));
        Self { spread, samples: ours.len(), ..Self::value(what, unit, ours.median()) }
    }
    /// Beside a floor that was measured in turn with it: medians, and the median of the ratios of neighbours.
    pub fn beside(what: impl Into<String>, unit: &'static str, floor: &Samples, ours: &Samples) -> Self {
        Self {
            floor: Some(floor.median()),
            ratio: Some(floor.ratio_of(ours).median()),
            ..Self::median(what, unit, ours)
        }
    }
    /// Floor and ratio from somewhere else.
    pub fn floor(mut self, floor: f64, ratio: f64) -> Self {
        (self.floor, self.ratio) = (Some(floor), Some(ratio));
        self
    }
    /// Over how many measurements the figure is the median.
    pub fn samples(mut self, samples: usize) -> Self {
        self.samples = samples;
        self
    }
    /// What is wanted.
    pub fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }
    /// Whether it is reached.
    pub fn met(&self) -> Option<bool> {
        let ratio = self.ratio.unwrap_or(f64::NAN);
        self.goal.map(|goal| match goal {
            Goal::RatioAtLeast(least) => ratio >= least,
            Goal::RatioAtMost(most) => ratio <= most,
            Goal::AtLeast(least) => self.ours >= least,
            Goal::AtMost(most) => self.ours <= most,
        })
    }

    fn goal_text(&self) -> String {
        match self.goal {
            None => String::new(),
            Some(Goal::RatioAtLeast(x)) => format!(">= {x} x"),
            Some(Goal::RatioAtMost(x)) => format!("<= {x} x"),
            Some(Goal::AtLeast(x)) => format!(">= {}", number(x)),
            Some(Goal::AtMost(x)) => format!("<= {}", number(x)),
        }
    }
}

/// Rows and remarks.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Table {
    /// Adds a figure.
    pub fn row(&mut self, row: Row) {
        self.rows.push(row);
    }
    /// Adds a remark: what was measured exactly, what was skipped.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// One line of JSON for each row.
    pub fn json(&self, bench: &str, load: &str, machine: &Machine) -> String {
        let line = |r: &Row| {
            json!({
                "bench": bench, "what": r.what, "unit": r.unit, "floor": r.floor, "ours": r.ours, "ratio": r.ratio,
                "quartiles": r.spread, "samples": r.samples, "goal": r.goal_text(), "met": r.met(),
                "load_before": load, "machine": machine,
            })
        };
        self.rows.iter().map(|r| format!("{}\n", line(r))).collect()
    }
}

/// Three digits that matter, without an exponent.
fn number(x: f64) -> String {
    match x.abs() {
        a if a.is_nan() => "-".into(),
        a if a >= 10_000.0 => {
            let digits = format!("{x:.0}");
            let mut out = String::new();
            for (i, c) in digits.chars().enumerate() {
                if i > 0 && (digits.len() - i).is_multiple_of(3) && out != "-" {
                    out.push(',');
                }
                out.push(c);
            }
            out
        }
        a if a >= 100.0 => format!("{x:.0}"),
        a if a >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head =
            ["what", "floor or peer", "ours", "quartiles", "unit", "ratio", "goal", "met", "n"].map(String::from);
        let line = |r: &Row| {
            [
                r.what.clone(),
                r.floor.map(number).unwrap_or_default(),
                number(r.ours),
                r.spread.map(|(a, b)| format!("{}..{}", number(a), number(b))).unwrap_or_default(),
                r.unit.to_string(),
                r.ratio.map(|x| format!("{x:.2}")).unwrap_or_default(),
                r.goal_text(),
                r.met().map(|met| if met { "yes" } else { "NO" }.to_string()).unwrap_or_default(),
                r.samples.to_string(),
            ]
        };
        let lines: Vec<_> = std::iter::once(head).chain(self.rows.iter().map(line)).collect();
        let width = |i: usize| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0);
        for line in &lines {
            let cells = line.iter().enumerate().map(|(i, cell)| {
                let width = width(i);
                if matches!(i, 1 | 2 | 3 | 5 | 8) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_goal_says_no() {
        let row = Row::value("x", "ms", 5.0).floor(1.0, 5.0);
        assert_eq!(row.clone().goal(Goal::RatioAtMost(3.0)).met(), Some(false));
        assert_eq!(row.clone().goal(Goal::RatioAtLeast(3.0)).met(), Some(true));
        assert_eq!(row.goal(Goal::AtMost(5.0)).met(), Some(true));
        assert_eq!(Row::value("x", "", f64::NAN).goal(Goal::AtMost(1.0)).met(), Some(false));
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(0.123), "0.12");
    }
}
