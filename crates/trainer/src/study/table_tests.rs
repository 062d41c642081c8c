//! The texts of the tables.
use super::*;
use crate::study::metric::Metric;
use crate::study::report::Variant;
use crate::study::testing::{run, variant};

fn report() -> Report {
    let mut full = variant("full", [1.3, 1.3, 1.3], 2_190_000);
    full.grid.remove(2);
    let empty = Variant { name: "a|b, c".to_owned(), remarks: vec!["rate 1 failed".to_owned()], ..Variant::default() };
    Report::new("Study", Metric::default(), true, true, vec![full, variant("lora", [1.0, 1.1, 1.2], 8_960), empty])
}

#[test]
fn the_table_of_the_terminal() {
    let expected = "\
variant     rate  n  eval loss, validation  eval loss, test   place  train loss  trained  peak memory  optimizer  tokens/s  step ms  time  tokens
─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
lora       0.002  3          1.100 ± 0.058    1.200 ± 0.058    best      1.1000     8960    50.00 MiB  70.00 KiB     51.2k     20.5  0.2s   10.2k
full     0.002 *  3          1.300 ± 0.000    1.400 ± 0.000              1.3000    2.19M    50.00 MiB  16.71 MiB     51.2k     20.5  0.2s   10.2k
a|b, c         -  0                      -                -  no run           -        -            -          -         -        -     -       -
";
    let text = terminal(&report());
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn the_report_in_markdown() {
    let text = markdown(&report());
    assert!(
        text.starts_with(
            "# Study\n\n- program: 0.1.0 (abc)\n- device: cpu (2 threads)\n\nBy eval loss on test data: lora is best;"
        ),
        "{text}"
    );
    assert!(text.contains("| a\\|b, c | - | 0 | - |"), "{text}");
    assert!(text.contains("\n- a|b, c: rate 1 failed.\n"));
    assert!(text.contains("| lora | 0.001: 1.500; 0.002: 1.000; 0.004: failed or not run |"), "{text}");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).collect();
    assert_eq!(lines[0].matches(" | ").count(), lines[2].matches(" | ").count());
}

#[test]
fn every_variant_and_run_has_a_line_of_csv() {
    let text = csv(&report());
    let fields = CSV_HEAD.split(',').count();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 1 + (1 + 3) + (1 + 3) + 1);
    assert!(lines[1..9].iter().all(|line| line.split(',').count() == fields), "{text}");
    assert!(lines[1].starts_with("variant,lora,,0.002,,3,eval_loss,1.1"), "{text}");
    assert_eq!(
        lines[3],
        "run,lora,runs/0.002-2,0.002,2,1,eval_loss,1.1,,1.2000000000000002,,,1.1,8960,52428800,71680,51234,20.5,0.25,10240,10,true"
    );
    assert!(lines[9].starts_with("variant,\"a|b, c\",,,,0,eval_loss,,,,,no run,"), "{text}");
}

#[test]
fn places_in_words() {
    let with = |change: fn(&mut RunRecord)| {
        let mut run = run(1e-3, 1, 1.0, 5);
        change(&mut run);
        let variant = Variant { name: "v".to_owned(), runs: vec![run], ..Variant::default() };
        place_text(&Report::new("t", Metric::default(), false, true, vec![variant]).rows[0])
    };
    assert_eq!(with(|_| {}), "best, n = 1");
    assert_eq!(with(|run| run.evals.clear()), "no score");
    assert_eq!(with(|run| run.finished = false), "unfinished");
}
