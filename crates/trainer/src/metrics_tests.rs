//! The fields of every line, and a log that was cut off and continued.
#![allow(clippy::unwrap_used)]
use super::*;

fn train(step: u64, loss: f64) -> Line {
    Line::Train(TrainLine {
        step,
        epoch: 0.5,
        loss,
        grad_norm: 1.25,
        learning_rate: 1e-4,
        tokens: 64 * step,
        tokens_per_second: 100.0,
        step_ms: 640.0,
        host_ms: None,
        launches: None,
        loss_scale: None,
        skipped_steps: None,
        memory_bytes: 1024,
        tensor_bytes: None,
        gradient_bytes: 256,
        optimizer_bytes: 512,
        subspace: None,
    })
}

fn eval(step: u64) -> Line {
    Line::Eval(EvalLine {
        step,
        loss: 2.0,
        perplexity: Some(7.5),
        tokens: 10,
        exact_match: None,
        exact_match_samples: None,
        scores: BTreeMap::new(),
        seconds: 0.1,
    })
}

fn summary(step: u64) -> Line {
    Line::Summary(SummaryLine {
        step,
        ended_by: "max_steps".to_owned(),
        train_loss: 1.0,
        eval_loss: Some(2.0),
        best_eval_loss: None,
        best_step: None,
        exact_match: None,
        scores: BTreeMap::new(),
        trainable_parameters: 3,
        total_parameters: 4,
        tokens: 5,
        peak_memory_bytes: 6,
        predicted_peak_memory_bytes: Some(5),
        measured_memory_bytes: [("weights".to_owned(), 1)].into(),
        predicted_memory_bytes: [("weights".to_owned(), 2)].into(),
        wall_seconds: 7.5,
    })
}

#[test]
fn lines_have_the_documented_fields() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let mut log = MetricsLog::open(&path).unwrap();
    for line in [train(1, 0.1 + 0.2), eval(1), summary(1)] {
        log.write(&line).unwrap();
    }
    log.sync().unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let expected = [
        r#"{"kind":"train","step":1,"epoch":0.5,"loss":0.30000000000000004,"grad_norm":1.25,"learning_rate":0.0001,"tokens":64,"tokens_per_second":100.0,"step_ms":640.0,"memory_bytes":1024,"gradient_bytes":256,"optimizer_bytes":512}"#,
        r#"{"kind":"eval","step":1,"loss":2.0,"perplexity":7.5,"tokens":10,"seconds":0.1}"#,
        r#"{"kind":"summary","step":1,"ended_by":"max_steps","train_loss":1.0,"eval_loss":2.0,"trainable_parameters":3,"total_parameters":4,"tokens":5,"peak_memory_bytes":6,"predicted_peak_memory_bytes":5,"measured_memory_bytes":{"weights":1},"predicted_memory_bytes":{"weights":2},"wall_seconds":7.5}"#,
    ];
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn scores_are_fields_of_the_line() {
    let Line::Eval(mut line) = eval(1) else { unreachable!() };
    (line.perplexity, line.scores) = (None, [("accuracy".to_owned(), 0.75), ("pearson".to_owned(), f64::NAN)].into());
    assert_eq!(
        Line::Eval(line).to_json().unwrap(),
        r#"{"kind":"eval","step":1,"loss":2.0,"tokens":10,"accuracy":0.75,"pearson":null,"seconds":0.1,"non_finite":{"pearson":"NaN"}}"#
    );
}

#[test]
fn values_that_are_not_finite_are_null_and_named() {
    let json = train(3, f64::NAN).to_json().unwrap();
    assert!(json.contains(r#""loss":null,"#), "{json}");
    assert!(
        json.ends_with(
            r#","memory_bytes":1024,"gradient_bytes":256,"optimizer_bytes":512,"non_finite":{"loss":"NaN"}}"#
        ),
        "{json}"
    );
    assert!(train(3, f64::INFINITY).to_json().unwrap().contains(r#"{"loss":"inf"}"#));
}

#[test]
fn a_resumed_log_equals_an_unbroken_one() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole.jsonl"), folder.path().join("broken.jsonl"));
    let steps = |log: &mut MetricsLog, range: std::ops::RangeInclusive<u64>| {
        for step in range {
            log.write(&train(step, 1.0 / step as f64)).unwrap();
            log.write(&eval(step)).unwrap();
        }
    };
    let mut log = MetricsLog::open(&whole).unwrap();
    steps(&mut log, 1..=9);
    log.write(&summary(9)).unwrap();

    let mut log = MetricsLog::open(&broken).unwrap();
    steps(&mut log, 1..=6);
    log.write(&summary(4)).unwrap();
    log.file.write_all(b"{\"kind\":\"train\",\"step\":3,\"lo").unwrap();
    drop(log);
    let mut log = MetricsLog::resume(&broken, 4).unwrap();
    steps(&mut log, 5..=9);
    log.write(&summary(9)).unwrap();
    assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&broken).unwrap());
}

#[test]
fn resuming_without_a_log_starts_an_empty_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    MetricsLog::resume(&path, 5).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"");
}

#[test]
fn a_log_in_a_missing_folder_is_a_problem() {
    let error = MetricsLog::open(Path::new("/nonexistent/metrics.jsonl")).unwrap_err();
    assert_eq!(error.what, "cannot write /nonexistent/metrics.jsonl");
}

#[test]
fn the_deterministic_view_has_no_clock_and_no_memory() {
    let mut slow = train(1, 2.0);
    if let Line::Train(line) = &mut slow {
        (line.step_ms, line.tokens_per_second, line.memory_bytes) = (9.0, f64::INFINITY, 7);
    }
    let view = |line: &Line| deterministic_view(&line.to_json().unwrap());
    assert_eq!(
        view(&train(1, 2.0)).to_string(),
        r#"{"kind":"train","step":1,"epoch":0.5,"loss":2.0,"grad_norm":1.25,"learning_rate":0.0001,"tokens":64,"gradient_bytes":256,"optimizer_bytes":512}"#
    );
    assert_ne!(view(&train(1, 2.0)), view(&train(1, 2.0 + f64::EPSILON * 2.0)));
    assert_eq!(deterministic_view("torn {"), Value::Null);
}

#[test]
fn memory_is_read_from_the_status_text() {
    let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t     100 kB\n";
    assert_eq!((status_bytes(status, "VmRSS:"), status_bytes(status, "VmHWM:")), (102_400, 2_097_152));
    assert_eq!(status_bytes("", "VmRSS:"), 0);
    #[cfg(target_os = "linux")]
    assert!(process_memory().peak_bytes >= process_memory().current_bytes / 2);
}
