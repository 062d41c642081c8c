//! Bad inputs: every row damages a small run that works in one way, starts the real program, and looks at its exit code, at its
//! message, and at the files that were there before.
//!
//! Exit code 2 is a wrong command line or configuration, with files it names that are not there; 1 is a file with wrong contents
//! or a run that failed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

#[path = "bad_inputs/adapter_rows.rs"]
mod adapter_rows;
#[path = "bad_inputs/command_rows.rs"]
mod command_rows;
#[path = "bad_inputs/config_rows.rs"]
mod config_rows;
#[path = "bad_inputs/data_rows.rs"]
mod data_rows;
#[path = "bad_inputs/full_disk.rs"]
mod full_disk;
#[path = "bad_inputs/model_rows.rs"]
mod model_rows;
#[path = "bad_inputs/workplace.rs"]
mod workplace;

use workplace::Workplace;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lowrank-train");
const TRAIN: &str = "--config run.toml";

/// One bad input.
struct Row {
    name: &'static str,
    /// Damages the run.
    prepare: fn(&Workplace),
    /// The command line, split at blanks.
    arguments: &'static str,
    exit_code: i32,
    /// Parts of the message, in any order.
    says: &'static [&'static str],
}

/// A row that trains.
const fn train(name: &'static str, exit_code: i32, says: &'static [&'static str], prepare: fn(&Workplace)) -> Row {
    Row { name, prepare, arguments: TRAIN, exit_code, says }
}

/// What is wrong with the end of a program, if anything.
fn faults(output: &std::process::Output, exit_code: i32, says: &[&str]) -> Vec<String> {
    let message = String::from_utf8_lossy(&output.stderr);
    let mut faults = vec![];
    if output.status.code() != Some(exit_code) {
        faults.push(format!("ended with {}, expected exit code {exit_code}", output.status));
    }
    if message.contains("panicked") || message.contains("RUST_BACKTRACE") {
        faults.push("panicked".to_owned());
    }
    if !message.lines().any(|line| line.starts_with("error: ")) {
        faults.push("no line starts with `error: `".to_owned());
    }
    faults.extend(says.iter().filter(|part| !message.contains(**part)).map(|part| format!("does not say: {part}")));
    faults
}

/// Runs a row; the text tells what is wrong.
fn check(row: &Row) -> Result<(), String> {
    let place = Workplace::new();
    (row.prepare)(&place);
    let before = place.files();
    let arguments: Vec<&str> = row.arguments.split_whitespace().collect();
    let output = place.run(PROGRAM, &arguments);
    let mut faults = faults(&output, row.exit_code, row.says);
    let after = place.files();
    for path in before.iter().filter(|(path, content)| after.get(*path) != Some(*content)).map(|(path, _)| path) {
        faults.push(format!("changed or deleted {}", path.display()));
    }
    for path in after.keys().filter(|path| path.to_string_lossy().contains("/.tmp-")) {
        faults.push(format!("left {} behind", path.display()));
    }
    match faults.is_empty() {
        true => Ok(()),
        false => Err(format!("{}:\n  {}\n{}", row.name, faults.join("\n  "), String::from_utf8_lossy(&output.stderr))),
    }
}

fn check_all(rows: &[Row]) {
    let failed: Vec<String> = rows.iter().filter_map(|row| check(row).err()).collect();
    assert!(failed.is_empty(), "{} of {} rows:\n\n{}", failed.len(), rows.len(), failed.join("\n"));
}

#[test]
fn the_run_works_before_it_is_damaged() {
    let place = Workplace::new();
    place.with_adapter();
    let output = place.run(PROGRAM, &["--config", "run.toml"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(place.path("out/adapter/adapter_model.safetensors").is_file());
}

#[test]
fn models() {
    check_all(model_rows::ROWS);
}

#[test]
fn configurations() {
    check_all(config_rows::ROWS);
}

#[test]
fn data() {
    check_all(data_rows::ROWS);
}

#[test]
fn adapters() {
    check_all(adapter_rows::ROWS);
}

#[test]
fn commands_and_output_folders() {
    check_all(command_rows::ROWS);
}
