//! The page is well formed, needs nothing from elsewhere, and shows what the report holds.
use super::*;
use crate::study::report::Variant;
use crate::study::testing::{run, variant, well_formed};

#[test]
fn the_page_holds_everything_and_loads_nothing() {
    let mut low = variant("<rank> & 1", [1.0, 1.1, 1.2], 8_960);
    low.remarks.push("seed 3 failed".to_owned());
    let variants = vec![low, variant("full", [1.3, 1.31, 1.32], 2_190_000)];
    let mut report = Report::new("Adapters \"today\"", Metric::default(), true, true, variants);
    report.intro = vec!["Two variants.".to_owned()];
    let page = page(&report);
    well_formed(&page);
    assert!(page.contains("&lt;rank&gt; &amp; 1") && !page.contains("<rank>"));
    assert!(page.contains("<title>Adapters &quot;today&quot;</title>"));
    assert_eq!(page.matches("<svg ").count(), 7, "loss, its second half, metric, rates, and three costs");
    for outside in ["http://", "https://", "src=", "@import", "url(\""] {
        let found = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!found.contains(outside), "{outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("data-sort=\"8960\""));
    assert!(page.contains("seed 3 failed.") && page.contains("<tr class=\"best\">"));
    assert_eq!(page.matches("class=\"path\"").count(), 6);
}

#[test]
fn pages_of_little_are_well_formed() {
    let unfinished = |loss: f64| {
        let mut run = run(1e-3, 1, loss, 5);
        (run.finished, run.trainable, run.test) = (false, None, None);
        run.evals.clear();
        run
    };
    let with = |runs: Vec<RunRecord>| Variant { name: "v".to_owned(), runs, ..Variant::default() };
    for variants in
        [vec![], vec![with(vec![])], vec![with(vec![unfinished(1.0)])], vec![with(vec![unfinished(f64::NAN)])]]
    {
        well_formed(&page(&Report::new(
            "t",
            Metric::new("exact_match", None).unwrap_or_default(),
            false,
            true,
            variants,
        )));
    }
}

#[test]
fn outliers_do_not_press_the_others_together() {
    assert_eq!(without_outliers([1.0, 2.0, 3.0, 50.0, f64::NAN].into_iter(), false), (1.0, 5.5));
    assert_eq!(without_outliers([0.0, 0.5, 1.0, 1.0].into_iter(), true), (0.25, 1.0));
    assert_eq!(without_outliers([].into_iter(), true), (f64::NEG_INFINITY, f64::INFINITY));
}
