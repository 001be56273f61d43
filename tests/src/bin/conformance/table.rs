//! The outcomes of both runtimes side by side.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use kubeception_tests::artifacts::Containerd;
use kubeception_tests::cri::{COREOS_KVM, RUNC};

use crate::exceptions::{Exceptions, OF_CONTAINERD};
use crate::suite::{Outcome, Outcomes};

/// What one containerd was found to do.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) containerd: Containerd,
    pub(crate) runc: Outcomes,
    pub(crate) coreos_kvm: Outcomes,
}

/// One spec under both runtimes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) spec: &'a str,
    pub(crate) runc: Option<&'a Outcome>,
    pub(crate) coreos_kvm: Option<&'a Outcome>,
    /// Why a machine cannot.
    reason: Option<&'a str>,
    /// Why not even runc can, on this containerd.
    beyond_runc: Option<&'a str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Passed,
    /// runc passes it, and this runtime does not.
    Behind,
    /// The same, argued in the list of exceptions.
    Excepted,
    /// It is in that list, and passes.
    NoException,
    /// runc fails it, which it is not known to: what is wrong is the run, and there is no bar.
    NoBar,
    /// Neither passes it.
    Neither,
}

impl Row<'_> {
    pub(crate) fn verdict(&self) -> Verdict {
        match (self.runc, self.coreos_kvm, self.reason) {
            (Some(Outcome::Failed(_)), _, _) if self.beyond_runc.is_none() => Verdict::NoBar,
            (_, Some(Outcome::Passed), None) => Verdict::Passed,
            (_, Some(Outcome::Passed), Some(_)) => Verdict::NoException,
            (Some(Outcome::Passed), _, None) => Verdict::Behind,
            (Some(Outcome::Passed), _, Some(_)) => Verdict::Excepted,
            _ => Verdict::Neither,
        }
    }
}

impl Found {
    pub(crate) fn rows<'a>(&'a self, exceptions: &'a Exceptions) -> Vec<Row<'a>> {
        let specs: BTreeSet<_> = self.runc.keys().chain(self.coreos_kvm.keys()).collect();
        specs
            .into_iter()
            .map(|spec| Row {
                spec,
                runc: self.runc.get(spec),
                coreos_kvm: self.coreos_kvm.get(spec),
                reason: exceptions.get(spec).map(String::as_str),
                beyond_runc: exceptions
                    .get(&format!("{OF_CONTAINERD}{}: {spec}", self.containerd.version()))
                    .map(String::as_str),
            })
            .collect()
    }

    /// Specs that this runtime passes, and those that it has to and does not.
    pub(crate) fn counts(&self, exceptions: &Exceptions) -> (usize, usize) {
        let count = |verdicts: &[Verdict]| {
            let rows = self.rows(exceptions);
            rows.iter().filter(|row| verdicts.contains(&row.verdict())).count()
        };
        (
            count(&[Verdict::Passed]),
            count(&[Verdict::Behind, Verdict::NoException, Verdict::NoBar]),
        )
    }

    /// Specs that passed and that failed, where only one runtime was run.
    pub(crate) fn own_counts(&self) -> (usize, usize) {
        let outcomes = || self.runc.values().chain(self.coreos_kvm.values());
        (
            outcomes().filter(|outcome| **outcome == Outcome::Passed).count(),
            outcomes()
                .filter(|outcome| matches!(outcome, Outcome::Failed(_)))
                .count(),
        )
    }

    /// One line a runtime.
    pub(crate) fn summary(&self) -> String {
        let of = |name: &str, outcomes: &Outcomes| {
            let count = |is: fn(&Outcome) -> bool| outcomes.values().filter(|&outcome| is(outcome)).count();
            format!(
                "containerd {}, {name}: {} passed, {} failed, {} skipped\n",
                self.containerd.version(),
                count(|outcome| matches!(outcome, Outcome::Passed)),
                count(|outcome| matches!(outcome, Outcome::Failed(_))),
                count(|outcome| matches!(outcome, Outcome::Skipped(_))),
            )
        };
        of(RUNC, &self.runc) + &of(COREOS_KVM, &self.coreos_kvm)
    }

    /// The table for a terminal.
    pub(crate) fn text(&self, exceptions: &Exceptions) -> String {
        let rows = self.rows(exceptions);
        let width = rows
            .iter()
            .map(|row| row.spec.chars().count())
            .max()
            .unwrap_or_default();
        let mut text = format!("{:width$}  {RUNC:7}  {COREOS_KVM}\n", "spec");
        for row in rows {
            let mark = match row.verdict() {
                Verdict::Behind => "  <- runc passes it",
                Verdict::NoException => "  <- it is no exception any longer",
                Verdict::NoBar => "  <- runc fails it, so there is no bar",
                Verdict::Excepted => "  (an exception)",
                Verdict::Passed | Verdict::Neither => "",
            };
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{:width$}  {:7}  {:7}{mark}",
                row.spec,
                word(row.runc),
                word(row.coreos_kvm)
            );
        }
        text
    }

    /// The table for the documentation.
    pub(crate) fn markdown(&self, exceptions: &Exceptions) -> String {
        let mut text = format!("| spec | {RUNC} | {COREOS_KVM} |\n|---|---|---|\n");
        for row in self.rows(exceptions) {
            let name = row.spec.replace('|', "\\|");
            let _ = writeln!(text, "| {name} | {} | {} |", word(row.runc), word(row.coreos_kvm));
        }
        text
    }
}

fn word(outcome: Option<&Outcome>) -> &'static str {
    match outcome {
        None => "-",
        Some(Outcome::Passed) => "passed",
        Some(Outcome::Failed(_)) => "FAILED",
        Some(Outcome::Skipped(_)) => "skipped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(runc: Outcome, coreos_kvm: Outcome, excepted: bool) -> Verdict {
        verdict_with(runc, coreos_kvm, excepted.then_some("spec"))
    }

    fn verdict_with(runc: Outcome, coreos_kvm: Outcome, exception: Option<&str>) -> Verdict {
        let found = Found {
            containerd: Containerd::V2_1,
            runc: Outcomes::from([("spec".to_owned(), runc)]),
            coreos_kvm: Outcomes::from([("spec".to_owned(), coreos_kvm)]),
        };
        let exceptions = exception.map(|spec| (spec.to_owned(), "why".to_owned()));
        found.rows(&exceptions.into_iter().collect())[0].verdict()
    }

    #[test]
    fn what_runc_passes_is_the_bar() {
        let failed = || Outcome::Failed("so".to_owned());
        let skipped = || Outcome::Skipped("so".to_owned());
        assert_eq!(verdict(Outcome::Passed, Outcome::Passed, false), Verdict::Passed);
        assert_eq!(verdict(Outcome::Passed, failed(), false), Verdict::Behind);
        assert_eq!(verdict(Outcome::Passed, skipped(), false), Verdict::Behind);
        assert_eq!(verdict(skipped(), skipped(), false), Verdict::Neither);
        assert_eq!(verdict(Outcome::Passed, failed(), true), Verdict::Excepted);
    }

    #[test]
    fn what_runc_fails_is_known_or_there_is_no_bar() {
        let failed = || Outcome::Failed("so".to_owned());
        let known = format!("containerd {}: spec", Containerd::V2_1.version());
        assert_eq!(verdict(failed(), Outcome::Passed, false), Verdict::NoBar);
        assert_eq!(verdict(failed(), failed(), true), Verdict::NoBar);
        assert_eq!(verdict_with(failed(), failed(), Some(&known)), Verdict::Neither);
        assert_eq!(verdict_with(failed(), Outcome::Passed, Some(&known)), Verdict::Passed);
    }

    #[test]
    fn an_exception_that_passes_has_to_go() {
        assert_eq!(verdict(Outcome::Passed, Outcome::Passed, true), Verdict::NoException);
    }
}
