//! What a folder says of its run.
#![allow(clippy::unwrap_used)]
use super::*;
use crate::study::file::parse;

const STUDY: &str = r#"
base = { base_model = "m", data = { train = "t.jsonl" }, training = { max_steps = 5 } }
output_dir = "OUT"
seeds = [1]
data = { validation = "v.jsonl", test = "x.jsonl" }
[[variant]]
name = "a"
learning_rates = [1e-3]
"#;

fn planned(folder: &Path, from: &str, to: &str) -> Planned {
    let text = STUDY.replace(from, to).replace("OUT", &folder.to_string_lossy());
    let study = parse("s", "s.toml", &text).unwrap();
    study.run(&study.variants[0], 1e-3, 1).unwrap()
}

fn write(run: &Planned, name: &str, text: &str) {
    std::fs::create_dir_all(&run.config.output_dir).unwrap();
    std::fs::write(run.config.output_dir.join(name), text).unwrap();
}

#[test]
fn a_folder_tells_how_far_its_run_is() {
    let root = tempfile::tempdir().unwrap();
    let run = planned(root.path(), "", "");
    assert!(run.config.output_dir.ends_with("runs/a/lr-1e-3/seed-1"));
    assert_eq!(state(&run).unwrap(), State::Missing);
    write(&run, CONFIG, &toml::to_string(&run.config).unwrap());
    assert_eq!(state(&run).unwrap(), State::Unfinished);
    write(&run, "metrics.jsonl", "{\"kind\":\"summary\",\"step\":5}\n");
    assert_eq!(state(&run).unwrap(), State::Finished);
    write(&run, FAILED, "{\"reason\":\"too hot\"}");
    assert_eq!(state(&run).unwrap(), State::Failed("too hot".to_owned()));
    forget_failure(&run).unwrap();
    assert_eq!(state(&run).unwrap(), State::Finished);

    let State::Changed(changes) =
        state(&planned(root.path(), "max_steps = 5", "max_steps = 9, save_steps = 3")).unwrap()
    else {
        unreachable!()
    };
    assert_eq!(changes.len(), 1, "what is saved makes no other run");
    assert_eq!(changes[0].to_string(), "training.max_steps: 5 -> 9 (changes the learning rate schedule)");
    let other_data = planned(root.path(), "v.jsonl", "w.jsonl");
    assert!(matches!(state(&other_data).unwrap(), State::Changed(changes) if changes[0].key == "data.eval"));
    forget(&run).unwrap();
    forget(&run).unwrap();
    assert_eq!(state(&run).unwrap(), State::Missing);
}

#[test]
fn scores_belong_to_their_data() {
    let root = tempfile::tempdir().unwrap();
    let test = Paths::One("x.jsonl".to_owned());
    assert_eq!(is_scored(root.path(), &test).unwrap(), Err(None));
    assert!(!has_result(root.path()));
    let write = |text: &str| std::fs::write(root.path().join(read::TEST_FILE), text).unwrap();
    write("{\"data\":[\"x.jsonl\"],\"failed\":\"too long\"}");
    assert_eq!(is_scored(root.path(), &test).unwrap(), Err(Some("too long".to_owned())));
    write("{\"data\":[\"x.jsonl\"],\"scores\":{\"loss\":1.0}}");
    assert_eq!(is_scored(root.path(), &test).unwrap(), Ok(()));
    assert_eq!(is_scored(root.path(), &Paths::One("y.jsonl".to_owned())).unwrap(), Err(None));
    std::fs::create_dir(root.path().join("model")).unwrap();
    std::fs::write(root.path().join("model/config.json"), "{}").unwrap();
    assert!(has_result(root.path()));
    drop_weights(root.path()).unwrap();
    assert!(!has_result(root.path()));
}

#[cfg(unix)]
#[test]
fn the_reason_of_a_failure_is_the_error_of_this_start() {
    use std::os::unix::process::ExitStatusExt;
    let file = tempfile::NamedTempFile::new().unwrap();
    let log = "error: an old one\n\nINFO step 1\nerror: step 7: the loss is NaN\n  caused by: heat\n\nhint: cool it\n";
    std::fs::write(file.path(), log).unwrap();
    let failed = ExitStatus::from_raw(1 << 8);
    assert_eq!(reason(file.path(), 20, failed), "step 7: the loss is NaN; caused by: heat");
    std::fs::write(file.path(), "nothing").unwrap();
    assert!(reason(file.path(), 0, failed).starts_with("ended with exit code 1, see "));
    assert!(reason(file.path(), 0, ExitStatus::from_raw(9)).starts_with("was killed (signal: 9"));
}
