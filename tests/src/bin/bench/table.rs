//! Samples, and the table that is made of them.

use serde_json::{Map, Value, json};

/// Figures of one kind, the least first.
#[derive(Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn add(&mut self, sample: f64) {
        self.0.push(sample);
        self.0.sort_by(f64::total_cmp);
    }

    pub(crate) fn each(&self, take: impl FnMut(f64)) {
        self.0.iter().copied().for_each(take);
    }

    pub(crate) fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        if self.0.len() % 2 == 1 {
            self.0[middle]
        } else {
            f64::midpoint(self.0[middle - 1], self.0[middle])
        }
    }

    pub(crate) fn min(&self) -> f64 {
        self.0[0]
    }

    pub(crate) fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }
}

/// What was measured, in the order in which it was.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<[String; 5]>,
    figures: Map<String, Value>,
}

impl Table {
    pub(crate) fn figure(&mut self, key: &str, what: &str, unit: &str, value: f64, limit: Option<f64>) {
        self.row(key, what, unit, value, String::new(), limit);
    }

    pub(crate) fn samples(&mut self, key: &str, what: &str, unit: &str, samples: &Samples, limit: Option<f64>) {
        let range = format!("{:.2} to {:.2}", samples.min(), samples.max());
        self.row(key, what, unit, samples.median(), range, limit);
    }

    pub(crate) fn ratio(&mut self, key: &str, what: &str, over: &Samples, under: &Samples, limit: f64) {
        let value = over.median() / under.median();
        self.row(key, what, "", value, ratios(over, under), Some(limit));
    }

    /// A ratio of which more is better.
    pub(crate) fn at_least(&mut self, key: &str, what: &str, (over, under): (&Samples, &Samples), limit: f64) {
        let value = over.median() / under.median();
        self.row_with(
            key,
            what,
            "",
            value,
            ratios(over, under),
            goal("at least", limit, value >= limit),
        );
    }

    fn row(&mut self, key: &str, what: &str, unit: &str, value: f64, range: String, limit: Option<f64>) {
        let goal = limit.map(|limit| goal("at most", limit, value <= limit));
        self.row_with(key, what, unit, value, range, goal.unwrap_or_default());
    }

    fn row_with(&mut self, key: &str, what: &str, unit: &str, value: f64, range: String, goal: String) {
        self.figures
            .insert(key.to_owned(), json!((value * 1000.0).round() / 1000.0));
        let value = format!("{value:.2} {unit}");
        self.rows.push([key.to_owned(), what.to_owned(), value, range, goal]);
    }

    pub(crate) fn print(&self) {
        println!(
            "{:<31} {:<60} {:>11}  {:<16} goal",
            "figure", "what", "median", "min to max"
        );
        for [key, what, value, range, limit] in &self.rows {
            println!("{key:<31} {what:<60} {:>11}  {range:<16} {limit}", value.trim_end());
        }
    }

    pub(crate) fn json(&self) -> Value {
        Value::Object(self.figures.clone())
    }
}

fn ratios(over: &Samples, under: &Samples) -> String {
    format!("{:.2} to {:.2}", over.min() / under.max(), over.max() / under.min())
}

fn goal(side: &str, limit: f64, is_held: bool) -> String {
    format!("{side} {limit}: {}", if is_held { "held" } else { "MISSED" })
}
