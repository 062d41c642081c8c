//! Locking, refusals, and checkpoints that were cut off, damaged or pruned.
#![allow(clippy::unwrap_used)]

use std::fs;

use tempfile::TempDir;

use super::*;

const FRESH: ResumeFrom = ResumeFrom::Newest(false);
const RESUME: ResumeFrom = ResumeFrom::Newest(true);

fn open(folder: &TempDir, resume: &ResumeFrom) -> Result<RunDir, Problem> {
    RunDir::open(&folder.path().join("run"), resume)
}

/// Text of a problem with the temporary folder cut out.
fn text(folder: &TempDir, problem: Problem) -> String {
    let (text, _) = crate::error::report(&problem.into());
    text.replace(&folder.path().display().to_string(), "T")
}

fn save(run: &RunDir, step: u64) -> SavedCheckpoint {
    let writer = run.begin_checkpoint(step).unwrap();
    fs::write(writer.path().join("state.json"), format!("step {step}")).unwrap();
    fs::create_dir(writer.path().join("adapter")).unwrap();
    fs::write(writer.path().join("adapter/weights.bin"), vec![step as u8; 3000]).unwrap();
    writer.commit().unwrap()
}

fn steps(run: &RunDir) -> Vec<u64> {
    run.checkpoints().unwrap().iter().map(|checkpoint| checkpoint.step).collect()
}

fn latest(run: &RunDir) -> Option<u64> {
    run.latest_complete().unwrap().map(|checkpoint| checkpoint.step)
}

#[test]
fn a_second_run_in_the_same_folder_is_refused() {
    let folder = TempDir::new().unwrap();
    let first = open(&folder, &FRESH).unwrap();
    let expected = format!(
        "error: another run is writing into T/run (process {})\n\nhint: wait for it, stop it, or choose another output_dir",
        std::process::id()
    );
    assert_eq!(text(&folder, open(&folder, &RESUME).unwrap_err()), expected);
    drop(first);
    open(&folder, &FRESH).unwrap();
}

#[test]
fn a_file_and_an_impossible_folder_are_refused() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("run"), "").unwrap();
    assert_eq!(
        text(&folder, open(&folder, &FRESH).unwrap_err()),
        "error: output_dir T/run is a file, expected a folder\n\nhint: choose another output_dir"
    );
    let below = RunDir::open(&folder.path().join("run/below"), &FRESH).unwrap_err();
    assert_eq!(
        text(&folder, below),
        "error: cannot write into output_dir T/run/below\n  caused by: Not a directory (os error 20)\n\nhint: choose another output_dir, or check its permissions and the free space"
    );
}

#[test]
fn an_earlier_run_is_not_overwritten() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    fs::write(run.metrics_path(), "{}\n").unwrap();
    drop(run);
    let problem = open(&folder, &FRESH).unwrap_err();
    assert_eq!(problem.kind.exit_code(), 2);
    assert_eq!(
        text(&folder, problem),
        "error: output_dir T/run already holds a run\n\nhint: choose another output_dir, or go on with that run: --set training.resume_from_checkpoint=true"
    );
    open(&folder, &RESUME).unwrap();
}

#[test]
fn a_committed_checkpoint_is_complete_and_an_uncommitted_one_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    assert_eq!(latest(&run), None);
    save(&run, 10);
    let writer = run.begin_checkpoint(20).unwrap();
    fs::write(writer.path().join("state.json"), "half").unwrap();
    drop(writer);
    assert_eq!(steps(&run), [10]);
    assert_eq!(fs::read_dir(run.checkpoints_dir()).unwrap().count(), 1);
    let manifest = fs::read_to_string(run.checkpoints_dir().join("step-10/complete.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["files"][0]["name"], "adapter/weights.bin");
    assert_eq!(manifest["files"][0]["size"], 3000);
    // sha256sum of the text "step 10"
    let hash = manifest["files"][1]["sha256"].as_str().unwrap();
    assert_eq!(hash, "706d693bc8df0e62bda1c7e2f518178db05e3e1d95725f2a8a83a82c7806f17f");
}

#[test]
fn leftovers_of_a_killed_process_are_removed_at_the_next_start() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    let checkpoints = run.checkpoints_dir();
    save(&run, 10);
    save(&run, 30);
    fs::create_dir_all(checkpoints.join(".tmp-step-20-999/adapter")).unwrap();
    // Killed between the two renames of a replacement: the old folder is the only one and comes back.
    fs::rename(checkpoints.join("step-30"), checkpoints.join(".replaced-step-30")).unwrap();
    // Killed after them: the old folder goes.
    fs::create_dir_all(checkpoints.join(".replaced-step-10")).unwrap();
    // Killed while the result was written.
    fs::create_dir_all(run.adapter_dir()).unwrap();
    fs::write(run.adapter_dir().join(".adapter_model.safetensors.999-0.tmp"), "half").unwrap();
    fs::write(run.adapter_dir().join("adapter_config.json"), "{}").unwrap();
    drop(run);
    let run = open(&folder, &RESUME).unwrap();
    assert_eq!((steps(&run), latest(&run)), (vec![10, 30], Some(30)));
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 2);
    assert_eq!(fs::read_dir(run.adapter_dir()).unwrap().count(), 1);
}

#[test]
fn a_folder_of_the_same_step_is_replaced() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    let saved = save(&run, 10);
    fs::write(saved.path.join("state.json"), "damaged").unwrap();
    assert_eq!(latest(&run), None);
    save(&run, 10);
    assert_eq!(latest(&run), Some(10));
    assert_eq!(fs::read_dir(run.checkpoints_dir()).unwrap().count(), 1);
}

#[test]
fn damage_is_named_and_the_checkpoint_before_it_is_taken() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    save(&run, 10);
    let state = |saved: &SavedCheckpoint| saved.path.join("state.json");
    type Damage<'a> = (&'a dyn Fn(&SavedCheckpoint), &'a str);
    let cases: [Damage<'_>; 6] = [
        (&|saved| fs::remove_file(state(saved)).unwrap(), "state.json: No such file or directory (os error 2)"),
        (&|saved| fs::write(state(saved), "step").unwrap(), "state.json has 4 bytes, expected 7"),
        (
            &|saved| fs::write(state(saved), "step 21").unwrap(),
            "state.json was changed or damaged: its SHA-256 differs from complete.json",
        ),
        (&|saved| fs::write(saved.path.join("more"), "").unwrap(), "more is not in complete.json"),
        (
            &|saved| fs::remove_file(saved.path.join("complete.json")).unwrap(),
            "complete.json: No such file or directory (os error 2)",
        ),
        (
            &|saved| fs::write(saved.path.join("complete.json"), "{\"step\":").unwrap(),
            "complete.json: EOF while parsing a value at line 1 column 8",
        ),
    ];
    for (damage, reason) in cases {
        let saved = save(&run, 20);
        damage(&saved);
        assert_eq!(verify_checkpoint(&saved.path), Err(reason.to_owned()));
        assert_eq!(latest(&run), Some(10), "{reason}");
    }
}

#[test]
fn pruning_keeps_the_newest_complete_and_the_best() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    for step in [10, 20, 30, 40, 100] {
        save(&run, step);
    }
    assert!(run.prune(9, &[]).unwrap().is_empty());
    assert_eq!(run.prune(3, &[10]).unwrap(), [20, 30]);
    assert_eq!(steps(&run), [10, 40, 100]);
    // The newest folder is not complete: the one before it must stay, whatever the limit.
    fs::remove_file(run.checkpoints_dir().join("step-100/complete.json")).unwrap();
    run.prune(1, &[10]).unwrap();
    assert_eq!((steps(&run), latest(&run)), (vec![10, 40], Some(40)));
    assert_eq!(run.prune(0, &[]).unwrap(), [10]);
    assert_eq!(latest(&run), Some(40));
}

#[test]
fn names_that_are_no_checkpoints_are_left_alone() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    for name in ["step-", "step-x", "step-+5", "notes", "step-5.bak"] {
        fs::create_dir_all(run.checkpoints_dir().join(name)).unwrap();
    }
    assert!(steps(&run).is_empty());
    drop(run);
    let run = open(&folder, &RESUME).unwrap();
    assert_eq!(fs::read_dir(run.checkpoints_dir()).unwrap().count(), 5);
}

#[test]
fn a_named_checkpoint_must_be_whole_and_the_newest_of_its_run() {
    let folder = TempDir::new().unwrap();
    let run = open(&folder, &FRESH).unwrap();
    let (old, new) = (save(&run, 10), save(&run, 20));
    drop(run);
    let from = |checkpoint: &SavedCheckpoint| ResumeFrom::Folder(checkpoint.path.clone());
    let run = open(&folder, &from(&new)).unwrap();
    assert_eq!(run.checkpoint_to_resume(&from(&new)).unwrap().unwrap().step, 20);
    assert_eq!(run.checkpoint_to_resume(&RESUME).unwrap().unwrap().step, 20);
    assert_eq!(run.checkpoint_to_resume(&FRESH).unwrap(), None);
    drop(run);
    assert_eq!(
        text(&folder, open(&folder, &from(&old)).unwrap_err()),
        "error: T/run/checkpoints/step-10 is not the newest checkpoint of T/run: T/run/checkpoints/step-20 is\n\nhint: choose another output_dir to branch off, or delete the newer checkpoints"
    );
    // In another folder any checkpoint will do.
    let branch = RunDir::open(&folder.path().join("branch"), &from(&old)).unwrap();
    assert_eq!(branch.checkpoint_to_resume(&from(&old)).unwrap().unwrap().step, 10);
    save(&branch, 15);
    drop(branch);
    assert_eq!(
        text(&folder, RunDir::open(&folder.path().join("branch"), &from(&old)).unwrap_err()),
        "error: output_dir T/branch already holds a run, and T/run/checkpoints/step-10 is not one of its checkpoints\n\nhint: choose another output_dir"
    );
    // A damaged newer one does not count, and is no place to start from.
    fs::remove_file(new.path.join("state.json")).unwrap();
    let run = open(&folder, &from(&old)).unwrap();
    assert_eq!(
        text(&folder, run.checkpoint_to_resume(&from(&new)).unwrap_err()),
        "error: cannot resume from T/run/checkpoints/step-20: state.json: No such file or directory (os error 2)\n\nhint: resume_from_checkpoint = true takes the newest complete checkpoint of output_dir"
    );
}

#[test]
fn a_failed_write_leaves_the_file_and_no_leftover() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("config.toml");
    write_atomically(&path, b"one").unwrap();
    write_atomically(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    // A folder cannot be replaced by a file.
    let blocked = folder.path().join("blocked");
    fs::create_dir(&blocked).unwrap();
    fs::write(blocked.join("x"), "").unwrap();
    assert!(write_atomically(&blocked, b"no").unwrap_err().what.starts_with("cannot write "));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}
