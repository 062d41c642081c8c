//! A study runs what is missing and nothing else, survives a run that fails, refuses to mix configurations, and writes its report.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// Two variants, two rates of one of them, two seeds: three runs in the search, two with the other seed, four scores.
const STUDY: &str = r#"
output_dir = "out"
seeds = [1, 2]
data = { validation = "EVAL", test = "TEST" }

[base]
base_model = "MODEL"
device = "cpu"
data = { train = "TRAIN", max_seq_length = 64 }
training = { max_steps = 3, eval_steps = 1, lr_scheduler = "constant" }
logging = { logging_steps = 1, tensorboard = false }
evaluation = { generate = false }

[[variant]]
name = "LoRA"
adapter = { lora = { r = 4 } }
learning_rates = [1e-3, 1e-2]

[[variant]]
name = "full"
set = { "optimizer.adamw.learning_rate" = 1e-3 }
"#;

struct Scene(TempDir);

impl Scene {
    fn new(study: &str) -> Self {
        let scene = Self(TempDir::new().unwrap());
        scene.study(study);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn study(&self, text: &str) {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
        let below = |name: &str| repository.join(name).to_string_lossy().into_owned();
        let text = text
            .replace("MODEL", &below("crates/testkit/goldens/models/tiny-llama"))
            .replace("TRAIN", &below("data/smoke/completion.jsonl"))
            .replace("EVAL", &below("data/smoke/eval.jsonl"))
            .replace("TEST", &below("data/smoke/text.jsonl"));
        fs::write(self.path("study.toml"), text).unwrap();
    }

    fn compare(&self, arguments: &[&str]) -> (Output, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_lowrank-train"))
            .arg("compare")
            .args(arguments)
            .current_dir(self.0.path())
            .env("LOWRANK_CACHE", self.path("cache"))
            .env_remove("RUST_LOG")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, said)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Every metrics file with its time of change: what a run touches.
    fn runs(&self) -> Vec<(PathBuf, std::time::SystemTime)> {
        let folders = lowrank_train::study::read::run_folders(&self.path("out")).unwrap();
        let time = |folder: &PathBuf| fs::metadata(folder.join("metrics.jsonl")).unwrap().modified().unwrap();
        folders.iter().map(|folder| (folder.clone(), time(folder))).collect()
    }
}

#[test]
fn a_study_runs_once_and_writes_its_report() {
    let scene = Scene::new(STUDY);
    let (output, said) = scene.compare(&["study.toml"]);
    assert!(output.status.success(), "{said}");
    let runs = scene.runs();
    assert_eq!(runs.len(), 5, "{runs:?}");
    for text in [
        "[1/9] LoRA, rate 0.001, seed 1: eval loss ",
        "[5/9] full, rate 0.001, seed 2: ",
        "[9/9] full, rate 0.001, seed 2, test: ",
    ] {
        assert!(said.contains(text), "{text}\n{said}");
    }
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.starts_with("variant ") && table.contains("\nLoRA ") && table.contains("\nfull "), "{table}");
    assert!(table.contains("\nBy eval loss on test data: "), "{table}");
    assert!(!table.contains("has not run") && !table.contains("NaN"), "{table}");

    let csv = scene.read("out/report.csv");
    assert_eq!(csv.lines().filter(|line| line.starts_with("run,")).count(), 4, "{csv}");
    assert_eq!(csv.lines().filter(|line| line.starts_with("variant,")).count(), 2, "{csv}");
    assert!(scene.read("out/report.md").contains("picked by eval loss on validation data"));
    let page = scene.read("out/report.html");
    assert!(page.contains("</html>") && page.matches("<svg ").count() >= 6 && !page.contains("NaN"));
    let below = "out/runs/LoRA/lr-1e-2/seed-1";
    assert!(!scene.path(below).join("checkpoints").exists(), "only the result is kept");
    assert!(
        scene.path(below).join("adapter").exists() && scene.read(&format!("{below}/config.toml")).contains("seed = 1")
    );

    let (output, said) = scene.compare(&["study.toml"]);
    assert!(output.status.success() && !said.contains("[1/9]"), "nothing is run again: {said}");
    assert_eq!(scene.runs(), runs);
    assert_eq!(String::from_utf8_lossy(&output.stdout), table);

    // The runs without their study: seeds are found, the two rates are two variants.
    let (output, said) = scene.compare(&["out/runs", "--out", "again"]);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.lines().filter(|line| line.starts_with("LoRA") || line.starts_with("full")).count(), 3, "{text}");
    assert!(scene.read("again/report.html").contains("</html>"));
}

#[test]
fn what_is_missing_is_run_and_what_changed_only_if_that_is_said() {
    let scene = Scene::new(STUDY);
    let (output, said) = scene.compare(&["study.toml", "--only", "full"]);
    assert!(output.status.success(), "{said}");
    assert_eq!(scene.runs().len(), 2);
    let before = scene.runs();
    fs::remove_dir_all(scene.path("out/runs/full/lr-1e-3/seed-2")).unwrap();
    let (output, said) = scene.compare(&["study.toml"]);
    assert!(output.status.success(), "{said}");
    assert_eq!(scene.runs().len(), 5);
    assert!(scene.runs().contains(&before[0]), "the run that stayed is not repeated");

    scene.study(&STUDY.replace("max_steps = 3", "max_steps = 4"));
    let (output, said) = scene.compare(&["study.toml"]);
    assert_eq!(output.status.code(), Some(2), "{said}");
    for text in [
        "lr-1e-3/seed-1 holds a run with another configuration:",
        "training.max_steps: 3 -> 4",
        "and 4 more runs",
        "hint: --fresh removes",
    ] {
        assert!(said.contains(text), "{text}\n{said}");
    }
    assert_eq!(scene.runs().len(), 5);
    let (output, said) = scene.compare(&["study.toml", "--fresh"]);
    assert!(output.status.success(), "{said}");
    assert!(
        scene.read("out/report.csv").lines().skip(1).all(|line| line.contains(",4,true")),
        "{}",
        scene.read("out/report.csv")
    );
}

#[test]
fn a_run_that_fails_is_told_and_the_study_goes_on() {
    // The model of the second variant is not there.
    let broken = STUDY.replace("name = \"full\"", "name = \"full\"\nbase = { base_model = \"no/such/model\", data = { train = \"TRAIN\" }, training = { max_steps = 1 } }");
    let scene = Scene::new(&broken);
    let (output, said) = scene.compare(&["study.toml"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("full, rate 0.001, seed 1: failed"), "{said}");
    assert!(said.contains("error: there is no score for full"), "{said}");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("- full: rate 0.001 failed: "), "{table}");
    assert!(scene.read("out/report.md").contains("| LoRA |"));
    let (_, said) = scene.compare(&["study.toml"]);
    assert!(
        !said.contains("LoRA, rate") && said.contains("failed before (") && said.contains("--retry tries it again"),
        "{said}"
    );
}

#[cfg(unix)]
#[test]
fn an_interrupted_study_goes_on() {
    let scene =
        Scene::new(&STUDY.replace("max_steps = 3", "max_steps = 300, save_steps = 5").replace("eval_steps = 1, ", ""));
    let log = fs::File::create(scene.path("log")).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_lowrank-train"))
        .args(["compare", "study.toml"])
        .current_dir(scene.0.path())
        .env("LOWRANK_CACHE", scene.path("cache"))
        .stdout(std::process::Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let first = scene.path("out/runs/LoRA/lr-1e-3/seed-1/metrics.jsonl");
    while fs::read_to_string(&first).unwrap_or_default().lines().count() < 20 {
        assert_eq!(child.try_wait().unwrap(), None, "{}", scene.read("log"));
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    // SAFETY: kill takes no pointers; the child was not waited for, so its id is not reused.
    assert_eq!(unsafe { libc::kill(libc::pid_t::try_from(child.id()).unwrap(), libc::SIGTERM) }, 0);
    let status = child.wait().unwrap();
    let said = scene.read("log");
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(said.contains("error: interrupted with 0 of 9 runs and scores done"), "{said}");
    let checkpoints = fs::read_dir(scene.path("out/runs/LoRA/lr-1e-3/seed-1/checkpoints")).unwrap().count();
    assert!(checkpoints > 0);
    let (output, said) = scene.compare(&["study.toml", "--only", "LoRA"]);
    assert!(said.contains("[1/5] LoRA, rate 0.001, seed 1: "), "{said}");
    assert!(scene.read("out/runs/LoRA/lr-1e-3/seed-1/log.txt").contains("resuming from "));
    assert!(output.status.success(), "{said}");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let scene = Scene::new(STUDY);
    for (arguments, text) in [
        (&["nowhere"][..], "error: there is no folder nowhere"),
        (&["study.toml", "."], "error: study.toml is a study, but other paths are named too"),
        (&["."], "error: there is no run in what was named"),
        (&[".", "--fresh"], "error: --fresh is for a study, but run folders are named"),
        (&["study.toml", "--only", "lora"], "error: --only lora: study.toml has no such variant"),
        (&["missing.toml"], "error: cannot read the configuration file missing.toml"),
    ] {
        let (output, said) = scene.compare(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?} {said}");
        assert!(said.contains(text), "{arguments:?} {said}");
    }
    assert!(!scene.path("out").exists());
}

/// Every variant of the studies that are shipped is a configuration that can be read.
#[test]
fn the_shipped_studies_can_be_read() {
    let scene = Scene::new(STUDY);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (study, variants) in [("adapters", 13), ("adapters-smoke", 2)] {
        let output = Command::new(env!("CARGO_BIN_EXE_lowrank-train"))
            .arg("compare")
            .arg(format!("configs/compare/{study}.toml"))
            .args(["--report", "--out"])
            .arg(scene.path(study))
            .current_dir(&repository)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let csv = scene.read(&format!("{study}/report.csv"));
        assert_eq!(csv.lines().filter(|line| line.starts_with("variant,")).count(), variants, "{csv}");
    }
}
