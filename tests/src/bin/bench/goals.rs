//! What clones are to cost, and the chart of what they do.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// A figure of the table with what it may be at most, and what would be good.
pub(crate) struct Goal {
    key: &'static str,
    what: &'static str,
    unit: &'static str,
    bar: f64,
    aim: f64,
}

const fn goal(key: &'static str, what: &'static str, unit: &'static str, bar: f64, aim: f64) -> Goal {
    Goal {
        key,
        what,
        unit,
        bar,
        aim,
    }
}

const GOALS: [Goal; 7] = [
    goal("clone_pod_over_bare", "ready, over QEMU by hand", "", 1.5, 1.15),
    goal("clone_over_runc", "first output, over runc", "", 4.0, 2.0),
    goal("clone_over_cold", "first output, over a boot", "", 0.12, 0.05),
    goal("clones10_over_one", "ten at once, over one", "", 10.0, 6.0),
    goal("clone_cow_mb", "memory of an idle one", " MB", 80.0, 40.0),
    goal("clone_copy_mb", "memory of an idle one by copy", " MB", 150.0, 90.0),
    goal("remove_ms", "removed, everything freed", " ms", 500.0, 200.0),
];

/// What the figure may be at most.
pub(crate) fn bar(key: &str) -> Option<f64> {
    GOALS.iter().find(|goal| goal.key == key).map(|goal| goal.bar)
}

const WIDTH: f64 = 760.0;
const ROW: f64 = 34.0;
const TOP: f64 = 46.0;
/// Where bars begin, and where the one is that is as long as it may be.
const LEFT: f64 = 250.0;
const BAR: f64 = 540.0;
/// Bars end here, however long they would be.
const RIGHT: f64 = 660.0;

/// A chart of the figures in `json`, as SVG 1.1: each as a part of what it may be at most.
///
/// # Errors
/// When a figure is missing.
pub(crate) fn chart(json: &Value) -> Result<String> {
    let height = TOP + ROW * GOALS.len() as f64 + 12.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"15\" fill=\"#222222\">What a clone costs: shorter is better</text>\n\
         <text x=\"{BAR}\" y=\"38\" text-anchor=\"middle\" fill=\"#555555\">goal</text>\n"
    );
    for (row, goal) in GOALS.iter().enumerate() {
        let value = json[goal.key]
            .as_f64()
            .with_context(|| format!("there is no {}", goal.key))?;
        let y = TOP + ROW * row as f64;
        let at = |value: f64| (LEFT + value / goal.bar * (BAR - LEFT)).min(RIGHT);
        let color = if value <= goal.bar { "#2e7d4f" } else { "#b5482a" };
        let (unit, what) = (goal.unit, goal.what);
        writeln!(
            svg,
            "<text x=\"12\" y=\"{:.0}\" fill=\"#222222\">{what}</text>\n\
             <rect x=\"{LEFT}\" y=\"{:.0}\" width=\"{:.1}\" height=\"18\" fill=\"{color}\"/>\n\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{:.0}\" y2=\"{:.0}\" stroke=\"#222222\" stroke-dasharray=\"2 2\"/>\n\
             <text x=\"{:.1}\" y=\"{:.0}\" fill=\"#222222\">{}{unit} (goal {}{unit}, aim {}{unit})</text>",
            y + 17.0,
            y + 4.0,
            at(value) - LEFT,
            at(goal.aim),
            at(goal.aim),
            y + 1.0,
            y + 25.0,
            LEFT + 6.0,
            y + 17.0,
            rounded(value),
            goal.bar,
            goal.aim
        )?;
    }
    writeln!(
        svg,
        "<line x1=\"{BAR}\" x2=\"{BAR}\" y1=\"{TOP}\" y2=\"{:.0}\" stroke=\"#222222\"/>\n</svg>",
        height - 8.0
    )?;
    Ok(svg)
}

/// With as many digits as say something.
fn rounded(value: f64) -> String {
    if value >= 20.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}
