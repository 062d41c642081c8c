//! Order, places, notes.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::study::testing::{run, variant};

fn names(report: &Report) -> Vec<&str> {
    report.rows.iter().map(|row| row.variant.name.as_str()).collect()
}

#[test]
fn the_best_comes_first_and_ties_are_named() {
    let variants = || {
        vec![
            variant("worse", [3.0, 3.1, 3.2], 10),
            variant("good", [1.0, 1.1, 1.2], 20),
            variant("near", [1.05, 1.15, 1.25], 30),
            Variant { name: "missing".to_owned(), ..Variant::default() },
        ]
    };
    let report = Report::new("t", Metric::default(), true, true, variants());
    assert_eq!(names(&report), ["good", "near", "worse", "missing"]);
    let places: Vec<Option<Place>> = report.rows.iter().map(|row| row.place).collect();
    assert_eq!(places, [Some(Place::Best), Some(Place::Tied), Some(Place::Behind), None]);
    assert_eq!(report.score_label(), "eval loss on test data");
    assert!((report.rows[0].test.unwrap().mean - 1.2).abs() < 1e-12 && !report.rows[0].at_edge);
    assert_eq!(
        report.verdict().unwrap(),
        "good has the best mean; near is within 2 standard errors of the difference and cannot be told apart from it."
    );
    assert_eq!(report.origin, [("program", "0.1.0 (abc)".to_owned()), ("device", "cpu (2 threads)".to_owned())]);
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    let far = Report::new("t", Metric::default(), false, true, vec![variants().remove(0), variants().remove(1)]);
    assert_eq!(far.verdict().unwrap(), "good is best; no other variant is within 2 standard errors of it.");
}

#[test]
fn single_runs_claim_nothing() {
    let single = |name: &str, loss: f64| Variant {
        name: name.to_owned(),
        runs: vec![run(1e-3, 1, loss, 5)],
        ..Variant::default()
    };
    let report = Report::new("t", Metric::default(), false, true, vec![single("b", 2.0), single("a", 1.0)]);
    assert_eq!(names(&report), ["a", "b"]);
    assert_eq!(
        report.verdict().unwrap(),
        "a has the best mean; single runs have no standard error, so nothing is claimed (n = 1)."
    );
    assert_eq!(report.rows[1].place, Some(Place::Unknown));
    assert_eq!(
        Report::new("t", Metric::default(), false, true, vec![single("a", 1.0)]).verdict().unwrap(),
        "Only a has a score."
    );
    assert_eq!(Report::new("t", Metric::default(), false, true, vec![]).verdict(), None);
}

#[test]
fn what_must_be_known_is_noted() {
    let mut edge = variant("edge", [1.0, 1.1, 1.2], 10);
    edge.grid.remove(0);
    edge.remarks.push("rate 0.004 failed: out of memory".to_owned());
    let mut short = variant("short", [2.0, 2.1, 2.2], 10);
    short.runs.iter_mut().for_each(|run| run.tokens /= 2);
    short.runs[2].finished = false;
    let report = Report::new("t", Metric::default(), false, true, vec![edge, short]);
    assert_eq!(
        report.notes,
        [
            "The variants were not trained on equally many tokens: short on 5120, edge on 10240.",
            "edge: the picked rate 0.002 is at the edge of its grid, a better one may lie outside.",
            "edge: rate 0.004 failed: out of memory.",
            "short: 1 of 3 runs unfinished, at step 10.",
        ]
    );
    assert_eq!(report.rows[1].counted().len(), 2, "an unfinished run does not count beside finished ones");
}

#[test]
fn rates_are_short() {
    let texts = [1e-4, 2.5e-4, 0.01, 0.002, 1.5, 12.0, 0.000_782_236_7].map(rate_text);
    assert_eq!(texts, ["1e-4", "2.5e-4", "0.01", "0.002", "1.5", "12", "7.822e-4"]);
}
