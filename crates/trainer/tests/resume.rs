//! A run that was stopped, however rudely, and resumed gives the same bits as one that was never stopped.
//!
//! Every test starts the program itself on a tiny model. What is compared: the bytes of the result, and every line of
//! `metrics.jsonl` apart from what the clock and the memory of the machine decide.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lowrank_train::metrics::deterministic_view;
use lowrank_train::run_dir::verify_checkpoint;
use serde_json::Value;
use tempfile::TempDir;

const RESUME: &str = "training.resume_from_checkpoint=true";

/// LoRA with everything that carries state from step to step: dropout, accumulation over the ends of epochs, a packed
/// and shuffled order, moments, weight decay, a schedule, evaluations between checkpoints.
const LORA: &str = r#"
[adapter.lora]
r = 4
lora_alpha = 8
lora_dropout = 0.1

[optimizer.adamw]
learning_rate = 5e-3
weight_decay = 0.01

[training]
max_steps = 12
gradient_accumulation_steps = 2
lr_scheduler = "cosine"
warmup_steps = 3
eval_steps = 5
save_steps = 2
save_total_limit = 2
"#;

/// Every weight trained, updated while the backward pass goes on, blocks computed twice.
const FULL: &str = r#"
[optimizer.adamw]
learning_rate = 1e-3
weight_decay = 0.1
no_decay = ["norm"]

[training]
max_steps = 100
micro_batch_size = 2
max_grad_norm = 0
gradient_checkpointing = "block"
lr_scheduler = "warmup_stable_decay"
warmup_steps = 3
decay_ratio = 0.25
eval_steps = 5
save_steps = 2
save_total_limit = 2
"#;

/// Runs of one configuration, each in its own folder below a temporary one.
struct Scene {
    folder: TempDir,
    /// Tests of this file run one after the other, so that how long a run takes says how long the next will take.
    _alone: MutexGuard<'static, ()>,
}

impl Scene {
    /// Adds what all runs of this file share to the tables of one test.
    fn new(tables: &str) -> Self {
        let smoke = |file: &str| format!("data/smoke/{file}");
        Self::of("causal_lm", ["tiny-llama", &smoke("completion.jsonl"), &smoke("eval.jsonl")], tables)
    }

    /// The same for any task, from a tiny model, its training and its held-out data.
    fn of(task: &str, [model, train, eval]: [&str; 3], tables: &str) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = TempDir::new().unwrap();
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
        let path = |below: &str| format!("{:?}", repository.join(below).display().to_string());
        let config = format!(
            "task = \"{task}\"\nbase_model = {}\ndevice = \"cpu\"\nseed = 7\n{tables}\n\
             [data]\ntrain = {}\neval = {}\nmax_seq_length = 64\n\
             [logging]\nlogging_steps = 1\n[evaluation]\ngenerate = false\n",
            path(&format!("crates/testkit/goldens/models/{model}")),
            path(train),
            path(eval),
        );
        fs::write(folder.path().join("config.toml"), config).unwrap();
        Self { folder, _alone: alone }
    }

    /// The `output_dir` of a run.
    fn dir(&self, run: &str) -> PathBuf {
        self.folder.path().join(run)
    }

    /// Starts the program; what it says goes to a file.
    fn start(&self, run: &str, sets: &[&str]) -> Child {
        let log = File::create(self.folder.path().join(format!("{run}.log"))).unwrap();
        Command::new(env!("CARGO_BIN_EXE_lowrank-train"))
            .arg("--config")
            .arg(self.folder.path().join("config.toml"))
            .arg("--out")
            .arg(self.dir(run))
            .args(sets.iter().flat_map(|set| ["--set", *set]))
            .env("LOWRANK_CACHE", self.folder.path().join("cache"))
            .env_remove("RUST_LOG")
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// What the last start of a run has said.
    fn log(&self, run: &str) -> String {
        fs::read_to_string(self.folder.path().join(format!("{run}.log"))).unwrap()
    }

    /// Starts the program, expects it to reach its end, and returns what it said.
    fn finish(&self, run: &str, sets: &[&str]) -> String {
        let status = self.start(run, sets).wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.log(run));
        self.log(run)
    }

    /// Waits until a running process has recorded `lines` lines of metrics.
    fn wait_for_lines(&self, run: &str, child: &mut Child, lines: usize) {
        let path = self.dir(run).join("metrics.jsonl");
        while lines_of(&path) < lines {
            assert_eq!(child.try_wait().unwrap(), None, "ended before line {lines}\n{}", self.log(run));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Steps of all checkpoints, by rising step. Each must be complete.
    fn checkpoints(&self, run: &str) -> Vec<u64> {
        let folders = fs::read_dir(self.dir(run).join("checkpoints")).unwrap();
        let mut steps: Vec<u64> = folders.map(|entry| verify_checkpoint(&entry.unwrap().path()).unwrap()).collect();
        steps.sort_unstable();
        steps
    }

    fn checkpoint(&self, run: &str, step: u64) -> PathBuf {
        self.dir(run).join(format!("checkpoints/step-{step}"))
    }

    /// Asserts that two runs left the same bits, and nothing of what is written under a temporary name.
    fn assert_same(&self, run: &str, other: &str, result: &[&str]) {
        assert_eq!(metrics(&self.dir(run)), metrics(&self.dir(other)));
        assert_eq!(self.checkpoints(run), self.checkpoints(other));
        for name in result {
            let read = |run: &str| fs::read(self.dir(run).join(name)).unwrap();
            assert!(read(run) == read(other), "{name} differs between {run} and {other}");
        }
        assert_eq!(temporary_files(&self.dir(run)), Vec::<PathBuf>::new());
    }
}

const ADAPTER: [&str; 2] = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"];

/// The lines of `metrics.jsonl` without what the clock decides.
fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(deterministic_view).collect()
}

/// Everything below a folder that has a name of a file or folder under construction.
fn temporary_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with(".tmp-") || name.starts_with(".replaced-") || name.ends_with(".tmp") {
            found.push(path);
        } else if path.is_dir() {
            found.extend(temporary_files(&path));
        }
    }
    found
}

/// Kills with SIGKILL and says whether the process still lived.
fn kill(child: &mut Child) -> bool {
    child.kill().unwrap();
    child.wait().unwrap().signal() == Some(libc::SIGKILL)
}

/// Asks a process to end, as a batch system does, and waits for it.
fn terminate(child: &mut Child) -> ExitStatus {
    let id = libc::pid_t::try_from(child.id()).unwrap();
    // SAFETY: kill takes no pointers; the child was not waited for, so its id is not reused.
    assert_eq!(unsafe { libc::kill(id, libc::SIGTERM) }, 0);
    child.wait().unwrap()
}

/// The next number of a fixed sequence, in [0, 1) (SplitMix64).
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// What a low-rank run shares: three micro batches a step, clipping, a refresh every four steps.
const LOW_RANK: &str = r#"
[training]
max_steps = 14
gradient_accumulation_steps = 3
lr_scheduler = "cosine"
warmup_steps = 2
eval_steps = 6
save_steps = 1
save_total_limit = 2
"#;

/// As soon as a layer has its gradient it is updated.
const LOW_RANK_AT_ONCE: &str = r#"
[training]
max_steps = 14
max_grad_norm = 0
gradient_checkpointing = "block"
eval_steps = 6
save_steps = 3
save_total_limit = 2
"#;

/// Killed inside a gap, at a refresh and inside an accumulation, with every method: the model, the metrics (captured energy,
/// overlap and refreshes among them) and the checkpoints are those of the run that was never killed.
#[test]
fn killed_runs_of_every_low_rank_method_give_the_same_bits() {
    let galore = "rank = 8, update_proj_gap = 4, learning_rate = 5e-3";
    let methods = [
        format!("galore = {{ {galore} }}"),
        format!("galore = {{ {galore}, proj_type = \"full\", accumulation = \"dense\", moments = \"rotate\" }}"),
        format!("galore = {{ {galore}, exact = true, inner = \"adafactor\", momentum = 0.9 }}"),
        format!("galore = {{ {galore}, proj_type = \"output\", inner = \"adamw8bit\", weights = \"bf16\" }}"),
        format!("galore = {{ {galore}, merge = \"deferred\", weights = \"bf16\", weight_decay = 0.1 }}"),
        "q_galore = { rank = 8, update_proj_gap = 2, queue_size = 2, cos_threshold = 0.01 }".to_owned(),
        "q_galore = { rank = 8, update_proj_gap = 4, proj_type = \"full\", basis_bits = 8, group_size = 32 }"
            .to_owned(),
        "dct_adamw = { rank = 8, update_proj_gap = 4, projected = true }".to_owned(),
        "dct_adamw = { rank = 8, error_feedback = true }".to_owned(),
        "apollo = { rank = 4, update_proj_gap = 4 }".to_owned(),
        "fira = { rank = 8, update_proj_gap = 4, learning_rate = 5e-3 }".to_owned(),
        "ldadam = { rank = 8 }".to_owned(),
    ];
    for (number, method) in methods.iter().enumerate() {
        // Every method once with accumulation and clipping, the first two also updated at once.
        let schemes = if number < 2 { &[LOW_RANK, LOW_RANK_AT_ONCE][..] } else { &[LOW_RANK][..] };
        for scheme in schemes {
            let scene = Scene::new(&format!("[optimizer]\n{method}\n{scheme}"));
            scene.finish("whole", &[]);
            for line in [2, 5, 10] {
                let mut child = scene.start("killed", &[RESUME]);
                scene.wait_for_lines("killed", &mut child, line);
                std::thread::sleep(Duration::from_millis(3 + 2 * line as u64)); // somewhere within the next step
                assert!(kill(&mut child), "{method}: the kill at line {line} came after the end");
            }
            scene.finish("killed", &[RESUME]);
            scene.assert_same("killed", "whole", &["model/model.safetensors"]);
        }
    }
}

/// Adapters whose start looks at the weights (or at data) take it from the checkpoint; the others start again from the seed. Over
/// a quantised base, what a start took out of the weights is quantised again.
#[test]
fn killed_runs_of_every_adapter_give_the_same_bits() {
    const NF4: &str = "[quantization.nf4]";
    let adapters = [
        ("dora = { r = 4, lora_dropout = 0.1 }", ""),
        ("pissa = { r = 4 }", ""),
        ("pissa = { r = 4, niter = 2 }", NF4),
        ("olora = { r = 4 }", ""),
        ("corda = { r = 4, corda_method = \"kpm\" }", "[calibration]\nsamples = 4"),
        ("eora = { r = 4 }", "[calibration]\nsamples = 4\n[quantization.int4]"),
        ("lora_xs = { r = 4, lora_alpha = 8 }", NF4),
        ("lora_sb = { r = 4 }", "[calibration]\nsamples = 4"),
        ("svfit = { r = 4 }", ""),
        ("vera = { r = 16 }", "[quantization.int8]"),
        ("randlora = { r = 8, randlora_dropout = 0.1 }", ""),
        ("tucker = { r_in = 4, r_out = 3 }", ""),
        ("hra = { r = 4 }", NF4),
        ("oft = { oft_block_size = 8 }", ""),
    ];
    for (adapter, tables) in adapters {
        let scene = Scene::new(&format!("[adapter]\n{adapter}\n{tables}\n[optimizer.adamw]\n{LOW_RANK}"));
        scene.finish("whole", &[]);
        for line in [3, 9] {
            let mut child = scene.start("killed", &[RESUME]);
            scene.wait_for_lines("killed", &mut child, line);
            std::thread::sleep(Duration::from_millis(3));
            assert!(kill(&mut child), "{adapter}: the kill at line {line} came after the end");
        }
        scene.finish("killed", &[RESUME]);
        scene.assert_same("killed", "whole", &ADAPTER);
    }
}

/// Adapter with dropout on a classifier, an epoch that ends within the run, evaluations with scores.
const CLASSIFIER: &str = r#"
[adapter.lora]
r = 4
lora_dropout = 0.1

[optimizer.adamw]
learning_rate = 5e-3

[training]
max_steps = 40
micro_batch_size = 3
gradient_accumulation_steps = 2
eval_steps = 8
save_steps = 3
save_total_limit = 2
"#;

/// A classifier of sentences, and one of images, which are decoded ahead and half of them mirrored, also on packed weights.
#[test]
fn killed_classifiers_give_the_same_bits() {
    let flip = format!("{CLASSIFIER}[classification]\nrandom_flip = true\n");
    let labelled = ["tiny-bert", "data/smoke/labelled.jsonl", "data/smoke/labelled-eval.jsonl"];
    let images = ["tiny-vit", "data/smoke/images/train", "data/smoke/images/eval"];
    // What a start took out of the weights of the file is packed again.
    let pissa = CLASSIFIER.replace("[adapter.lora]", "[adapter.pissa]");
    let pissa = format!("{pissa}[quantization.nf4]\nblock_size = 32\n");
    let scenes = [
        ("sequence_classification", labelled, CLASSIFIER),
        ("image_classification", images, flip.as_str()),
        ("image_classification", images, pissa.as_str()),
    ];
    for (task, files, tables) in scenes {
        let scene = Scene::of(task, files, tables);
        scene.finish("whole", &[]);
        for line in [2, 9, 20] {
            let mut child = scene.start("killed", &[RESUME]);
            scene.wait_for_lines("killed", &mut child, line);
            assert!(kill(&mut child), "{task}: the kill at line {line} came after the end");
        }
        scene.finish("killed", &[RESUME]);
        scene.assert_same("killed", "whole", &["adapter/classes.json", ADAPTER[0], ADAPTER[1]]);
        let settings = fs::read_to_string(scene.dir("whole").join(ADAPTER[1])).unwrap();
        let settings: Value = serde_json::from_str(&settings).unwrap();
        let kind = if task == "sequence_classification" { Value::from("SEQ_CLS") } else { Value::Null };
        assert_eq!((&settings["task_type"], &settings["modules_to_save"][0]), (&kind, &Value::from("classifier")));
        let last = metrics(&scene.dir("whole")).pop().unwrap();
        assert!(last["accuracy"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)), "{last}");
        assert_eq!(last.get("perplexity"), None);
    }
}

/// What runs on convolutions share; the tables of the adapter come before.
const CONVOLUTIONS: &str = r#"
target_modules = ["convolution"]

[optimizer.adamw]
learning_rate = 1e-2

[training]
max_steps = 10
micro_batch_size = 2
eval_steps = 4
save_steps = 2
save_total_limit = 2
"#;

/// Adapters on convolutions, LoRA with dropout and a Tucker core, in the stem and the blocks of a ResNet.
#[test]
fn killed_runs_on_convolutions_give_the_same_bits() {
    let images = ["tiny-resnet", "data/smoke/images/train", "data/smoke/images/eval"];
    for (method, table) in [("lora", "r = 2\nlora_dropout = 0.1"), ("tucker", "r_in = 3\nr_out = 4\ndropout = 0.1")] {
        let scene = Scene::of("image_classification", images, &format!("[adapter.{method}]\n{table}\n{CONVOLUTIONS}"));
        scene.finish("whole", &[]);
        for line in [3, 8] {
            let mut child = scene.start("killed", &[RESUME]);
            scene.wait_for_lines("killed", &mut child, line);
            assert!(kill(&mut child), "{method}: the kill at line {line} came after the end");
        }
        let log = scene.finish("killed", &[RESUME]);
        assert!(log.contains("8 modules"), "{log}");
        scene.assert_same("killed", "whole", &["adapter/classes.json", ADAPTER[0], ADAPTER[1]]);
    }
}

/// Every other kill waits for the moment at which a checkpoint is being written.
#[test]
fn killed_ten_times_gives_the_same_bits() {
    const KILLS: usize = 10;
    const STEPS: usize = 300;
    let steps = &format!("training.max_steps={STEPS}");
    let scene = Scene::new(LORA);
    let started = Instant::now();
    scene.finish("whole", &[steps]);
    let duration = started.elapsed().as_secs_f64();

    let mut state = 1;
    let (mut in_writing, mut reached) = (0, vec![]);
    for number in 0..KILLS {
        let mut child = scene.start("killed", &[steps, RESUME]);
        let delay = 0.03 + random(&mut state) * (duration / KILLS as f64 - 0.03).max(0.0);
        let started = Instant::now();
        // The machine may be faster now than it was: no kill waits for so long that the next ones would find no process.
        let latest = (number + 1) * STEPS / (KILLS + 2);
        let metrics = scene.dir("killed").join("metrics.jsonl");
        while started.elapsed().as_secs_f64() < delay && lines_of(&metrics) < latest {
            std::thread::sleep(Duration::from_millis(1));
        }
        let checkpoints = scene.dir("killed").join("checkpoints");
        if number % 2 == 1 {
            while child.try_wait().unwrap().is_none() && !is_being_written(&checkpoints) {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        assert!(kill(&mut child), "kill {number} came after the end\n{}", scene.log("killed"));
        in_writing += usize::from(is_being_written(&checkpoints));
        reached.push(lines_of(&metrics));
    }
    eprintln!(
        "{KILLS} kills in a run of {duration:.1} s, at lines {reached:?} of the metrics, {in_writing} in a checkpoint"
    );
    assert!(in_writing > 0, "no kill hit the writing of a checkpoint");
    assert!(reached.windows(2).any(|pair| pair[0] > 2 && pair[1] > pair[0]), "no start went on from a checkpoint");

    scene.finish("killed", &[steps, RESUME]);
    scene.assert_same("killed", "whole", &ADAPTER);
    assert_eq!(scene.checkpoints("killed").last(), Some(&(STEPS as u64)));
}

/// Whether a checkpoint is being written right now, or was when its process died.
fn is_being_written(checkpoints: &Path) -> bool {
    let Ok(entries) = fs::read_dir(checkpoints) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with(".tmp-step-"))
}

fn lines_of(path: &Path) -> usize {
    fs::read_to_string(path).unwrap_or_default().lines().count()
}

#[test]
fn a_termination_signal_ends_with_130_and_a_checkpoint() {
    let steps = "training.max_steps=100";
    // Only the signal writes a checkpoint before the end.
    let sets = [steps, "training.save_steps=1000", "training.eval_steps=1000"];
    let scene = Scene::new(LORA);
    scene.finish("whole", &sets);
    let mut child = scene.start("stopped", &sets);
    scene.wait_for_lines("stopped", &mut child, 4);
    let status = terminate(&mut child);
    let said = scene.log("stopped");
    assert_eq!(status.code(), Some(130), "{said}");
    let saved = scene.checkpoints("stopped");
    assert_eq!(saved.len(), 1, "{said}");
    assert!((4..100).contains(&saved[0]), "{saved:?}");
    assert!(said.contains(&format!("interrupted after step {} of 100; a checkpoint was written", saved[0])), "{said}");
    assert!(said.contains("--set training.resume_from_checkpoint=true"), "{said}");

    let again = scene.start("stopped", &sets).wait().unwrap();
    assert_eq!(again.code(), Some(2), "a run is not overwritten: {}", scene.log("stopped"));
    let said = scene.finish("stopped", &[&sets[..], &[RESUME]].concat());
    assert!(said.contains(&format!("resuming from {}", scene.checkpoint("stopped", saved[0]).display())), "{said}");
    // The checkpoint of the interruption remains beside the last one.
    fs::remove_dir_all(scene.checkpoint("stopped", saved[0])).unwrap();
    scene.assert_same("stopped", "whole", &ADAPTER);
}

#[test]
fn a_damaged_checkpoint_is_left_out_and_the_one_before_taken() {
    let scene = Scene::new(LORA);
    scene.finish("whole", &[]);
    scene.finish("damaged", &[]);
    for name in ["optimizer.safetensors", "parameters.safetensors"] {
        let file = scene.checkpoint("damaged", 12).join(name);
        let bytes = fs::read(&file).unwrap();
        match name {
            "optimizer.safetensors" => fs::write(&file, &bytes[..bytes.len() / 2]).unwrap(),
            _ => fs::write(&file, [&bytes[..bytes.len() - 1], &[bytes[bytes.len() - 1] ^ 1]].concat()).unwrap(),
        }
        fs::remove_dir_all(scene.dir("damaged").join("adapter")).unwrap();
        let said = scene.finish("damaged", &[RESUME]);
        let warning = format!("{} is left out: {name} ", scene.checkpoint("damaged", 12).display());
        assert!(said.lines().any(|line| line.contains("WARN") && line.contains(&warning)), "{said}");
        assert!(said.contains(&format!("resuming from {}", scene.checkpoint("damaged", 10).display())), "{said}");
        scene.assert_same("damaged", "whole", &ADAPTER);
    }
}

#[test]
fn the_newest_and_the_best_checkpoint_are_kept() {
    let common = ["training.eval_steps=2", "training.lr_scheduler=\"constant\""];
    let scene = Scene::new(LORA);
    scene.finish("run", &[&common[..], &["training.max_steps=6", "optimizer.adamw.learning_rate=0.1"]].concat());
    // Goes on so fast that the model only gets worse.
    let worse = ["training.max_steps=16", "optimizer.adamw.learning_rate=10.0", RESUME];
    scene.finish("run", &[&common[..], &worse].concat());
    let lines = metrics(&scene.dir("run"));
    let evaluations = lines.iter().filter(|line| line["kind"] == "eval");
    let best = evaluations.min_by(|a, b| a["loss"].as_f64().unwrap().total_cmp(&b["loss"].as_f64().unwrap())).unwrap();
    let best = best["step"].as_u64().unwrap();
    assert!(best < 14, "the best evaluation is at step {best}, which is kept anyway");
    assert_eq!(scene.checkpoints("run"), [best, 16]);
    assert_eq!(lines.last().unwrap()["best_step"], best);
}

#[test]
fn a_changed_configuration_is_told_and_weighed() {
    let scene = Scene::new(LORA);
    scene.finish("run", &[]);
    let said = scene.finish("run", &[RESUME, "optimizer.adamw.learning_rate=1e-3", "logging.logging_steps=5"]);
    let told: Vec<(&str, &str)> = said
        .lines()
        .filter_map(|line| line.split_once(" changed since the checkpoint: "))
        .map(|(start, change)| (start.split_whitespace().last().unwrap(), change))
        .collect();
    assert_eq!(
        told,
        [
            ("INFO", "logging.logging_steps: 1 -> 5 (only what is recorded)"),
            ("WARN", "optimizer.adamw.learning_rate: 0.005 -> 0.001 (changes the training)"),
            ("INFO", "training.resume_from_checkpoint: false -> true (only where the run starts from)"),
        ],
        "{said}"
    );
}

#[test]
fn a_killed_full_fine_tuning_gives_the_same_bits() {
    let scene = Scene::new(FULL);
    scene.finish("whole", &[]);
    let mut child = scene.start("killed", &[]);
    scene.wait_for_lines("killed", &mut child, 9);
    assert!(kill(&mut child), "{}", scene.log("killed"));
    let said = scene.finish("killed", &[RESUME]);
    assert!(said.contains("resuming from"), "{said}");
    scene.assert_same("killed", "whole", &["model/model.safetensors", "model/config.json"]);
}

/// A run that ended early and is started again must not train on.
#[test]
fn a_run_that_stopped_early_stays_stopped() {
    let sets = [
        "training.eval_steps=2",
        "training.max_steps=60",
        "optimizer.adamw.learning_rate=0.1",
        "training.early_stopping_patience=2",
    ];
    let scene = Scene::new(LORA);
    scene.finish("whole", &sets);
    scene.finish("again", &sets);
    assert_eq!(metrics(&scene.dir("whole")).last().unwrap()["ended_by"], "early_stopping");
    fs::remove_dir_all(scene.dir("again").join("adapter")).unwrap();
    scene.finish("again", &[&sets[..], &[RESUME]].concat());
    scene.assert_same("again", "whole", &ADAPTER);
}

/// A loss that is not a number must neither keep a checkpoint from being read nor count as the best.
#[test]
fn a_run_that_skips_its_steps_can_be_resumed() {
    let sets = ["training.on_non_finite=\"skip\"", "optimizer.adamw.learning_rate=1e30"];
    let scene = Scene::new(LORA);
    scene.finish("whole", &sets);
    let lines = metrics(&scene.dir("whole"));
    assert_eq!(lines.iter().rfind(|line| line["kind"] == "train").unwrap()["non_finite"]["loss"], "NaN");
    scene.finish("again", &sets);
    let newest = *scene.checkpoints("again").last().unwrap();
    fs::remove_dir_all(scene.checkpoint("again", newest)).unwrap();
    let said = scene.finish("again", &[&sets[..], &[RESUME]].concat());
    assert!(said.contains("resuming from") && said.contains("the update is left out"), "{said}");
    scene.assert_same("again", "whole", &ADAPTER);
}
