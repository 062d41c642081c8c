//! How a run takes its steps: loss and norm read later, f16 with a loss scale, and memory that does not grow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lowrank_models::save::host_values;
use lowrank_models::{Batch, Decoder, load, parameters};
use lowrank_train::commands::train::prepare;
use lowrank_train::config::{self, GradientCheckpointing, OptimizerConfig, RunConfig};
use lowrank_train::loss_scale::LossScale;
use lowrank_train::metrics::deterministic_view;
use lowrank_train::optimizer;
use lowrank_train::session::Session;
use lowrank_train::step::StepOptions;
use lowrank_train::train_loop::{Reading, Run, StepPlan, StepReport};
use lowrank_train::update::{Measured, read_all, take_step};
use tempfile::TempDir;

/// The system's allocator with the number of live bytes.
struct Counted;

static LIVE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// The counter belongs to the process: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder with a configuration of a run on the tiny Llama.
struct Scene {
    folder: TempDir,
}

impl Scene {
    fn new(tables: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
        let path = |below: &str| format!("{:?}", repository.join(below).display().to_string());
        let text = format!(
            "base_model = {}\ndevice = \"cpu\"\nseed = 7\n{tables}\n[training]\nlr_scheduler = \"constant\"\n\
             [data]\ntrain = {}\nmax_seq_length = 32\n\
             [logging]\nlogging_steps = 5\nprogress = \"none\"\ntensorboard = false\n",
            path("crates/testkit/goldens/models/tiny-llama"),
            path("data/smoke/completion.jsonl"),
        );
        std::fs::write(folder.path().join("config.toml"), text).unwrap();
        Self { folder }
    }

    fn config(&self, run: &str, sets: &[&str]) -> RunConfig {
        let out = format!("output_dir={:?}", self.dir(run).display().to_string());
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).chain([out]).collect();
        config::load(&self.folder.path().join("config.toml"), &sets).unwrap()
    }

    fn dir(&self, run: &str) -> PathBuf {
        self.folder.path().join(run)
    }

    /// The train lines of a run.
    fn lines(&self, run: &str) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.dir(run).join("metrics.jsonl")).unwrap();
        text.lines().map(deterministic_view).filter(|line| line["kind"] == "train").collect()
    }

    fn checkpoints(&self, run: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir(run).join("checkpoints")) else { return vec![] };
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn model() -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models/tiny-llama");
    let device = lowrank_train::device::choose("cpu").unwrap().device;
    let decoder = load::load(&folder, burn::tensor::FloatDType::F32, &device, &mut |_, _, _| {}).unwrap();
    parameters::set_trained(decoder, |_| Some(true))
}

/// Steps with an optimiser, and the weights after them.
fn steps(table: &str, scale: f64, reading: Reading, max_grad_norm: f64) -> (Vec<StepReport>, Vec<f32>) {
    let table: OptimizerConfig = toml::from_str(table).unwrap();
    let mut decoder = model();
    let config = RunConfig { optimizer: table, ..RunConfig::default() };
    let mut optimizer = optimizer::build(&config, &mut decoder).unwrap();
    let mut reports = vec![];
    let mut unread = vec![];
    for step in 0..4 {
        let ids: Vec<i32> = (0..24).map(|i| 4 + (i * 7 + step as i32) % 90).collect();
        let batch = Batch::from_rows(std::slice::from_ref(&ids), std::slice::from_ref(&ids), None);
        let batches = [batch.clone(), batch];
        let denominators = [2.0 * batches[0].target_count() as f64; 2];
        let plan = StepPlan {
            options: StepOptions { checkpointing: GradientCheckpointing::None, head_chunk_tokens: 10, seed: 0 },
            step,
            max_grad_norm,
            denominators: &denominators,
            first_key: 2 * step,
            rule: &|_, _, gradient_scale| lowrank_core::optim::StepRule {
                learning_rate: 1e-3,
                weight_decay: 0.1,
                gradient_scale,
            },
            immediate: false,
        };
        match take_step(&mut decoder, &mut optimizer, &batches, &plan, scale, reading) {
            Measured::Read(report) => reports.push(report),
            Measured::Unread(measured) => unread.push(*measured),
        }
    }
    reports.extend(read_all(unread));
    lowrank_train::train_loop::settle(&mut decoder, &mut optimizer);
    let mut values = vec![];
    parameters::visit(&decoder, "", |entry| values.extend(host_values((entry.value)())));
    (reports, values)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let apart = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (apart / square(&mut b.iter().map(|b| f64::from(*b)))).sqrt()
}

/// Loss, norm and weights are the same whether the host clips with a number or the device with a tensor. The norm of the gradient
/// is far above the limit in every step.
#[test]
fn a_step_that_is_read_later_is_the_same_step() {
    let _alone = alone();
    for table in [
        "adamw = {}",
        "galore = { rank = 8, update_proj_gap = 2 }",
        "galore = { rank = 8, update_proj_gap = 3, merge = \"deferred\" }",
        "dct_adamw = { rank = 8, error_feedback = true }",
        "apollo = { rank = 4 }",
        "fira = { rank = 8 }",
        "ldadam = { rank = 8 }",
        "intrinsic = { dims = 64 }",
    ] {
        let (now, weights) = steps(table, 1.0, Reading::EveryStep, 0.05);
        let (later, other) = steps(table, 1.0, Reading::Later, 0.05);
        for (now, later) in now.iter().zip(&later) {
            assert!(now.grad_norm > 0.1, "{table}: {now:?} is not clipped");
            assert!((now.loss / later.loss - 1.0).abs() < 1e-6, "{table}: {now:?} {later:?}");
            assert!((now.grad_norm / later.grad_norm - 1.0).abs() < 1e-4, "{table}: {now:?} {later:?}");
            assert_eq!((now.applied, now.gradient_bytes), (later.applied, later.gradient_bytes));
        }
        assert_eq!((now.len(), later.len()), (4, 4));
        let moved = distance(&weights, &steps(table, 1.0, Reading::EveryStep, 0.0).1);
        let apart = distance(&other, &weights);
        assert!(apart < 1e-6, "{table}: {apart}, clipping itself moves the weights by {moved}");
    }
}

/// The loss scale is a power of two: nothing of a step in f32 changes but what underflows.
#[test]
fn a_scaled_loss_makes_the_same_step() {
    let _alone = alone();
    for table in ["adamw = {}", "galore = { rank = 8, update_proj_gap = 2 }"] {
        let (plain, weights) = steps(table, 1.0, Reading::EveryStep, 0.05);
        let (scaled, other) = steps(table, LossScale::START, Reading::EveryStep, 0.05);
        for (plain, scaled) in plain.iter().zip(&scaled) {
            assert!((plain.grad_norm / scaled.grad_norm - 1.0).abs() < 1e-5, "{table}: {plain:?} {scaled:?}");
        }
        let apart = distance(&other, &weights);
        assert!(apart < 1e-6, "{table}: {apart}");
    }
}

const LORA: &str = "[adapter.lora]\nr = 4\n[optimizer.adamw]\nlearning_rate = 5e-3\n";

/// Runs to the end with loss and norm read at every line of the log.
fn train_later(config: &RunConfig) -> Result<(), String> {
    let mut run: Run<'_, Session> = prepare(config).map_err(|error| format!("{error:#}"))?;
    run.reading = Reading::Later;
    run.train().map(|_| ()).map_err(|problem| problem.what)
}

fn train(config: &RunConfig) -> Result<(), String> {
    let mut run: Run<'_, Session> = prepare(config).map_err(|error| format!("{error:#}"))?;
    run.train().map(|_| ()).map_err(|problem| problem.what)
}

/// The error names the same step and the same records as when every step is read, and no later state reaches the disk: the
/// checkpoint of step 4 is due before the next line of the log, and is not written.
#[test]
fn a_loss_that_is_not_finite_is_reported_with_its_step_and_leaves_no_checkpoint() {
    let _alone = alone();
    let scene = Scene::new(LORA);
    let sets = ["optimizer.adamw.learning_rate=1e30", "training.max_steps=20", "training.save_steps=4"];
    let at_once = train(&scene.config("now", &sets)).unwrap_err();
    let later = train_later(&scene.config("later", &sets)).unwrap_err();
    assert!(at_once.starts_with("step 2: the loss is NaN"), "{at_once}");
    assert_eq!(at_once.replace("/now/", "/later/"), later);
    assert_eq!(scene.checkpoints("later"), Vec::<String>::new());
    assert_eq!(scene.lines("later").len(), 1);
}

/// What is read at a line of the log, an evaluation or a checkpoint is the step it belongs to.
#[test]
fn a_run_that_reads_later_leaves_the_same_lines() {
    let _alone = alone();
    let scene = Scene::new(LORA);
    let sets = ["training.max_steps=12", "training.save_steps=4"];
    train(&scene.config("now", &sets)).unwrap();
    train_later(&scene.config("later", &sets)).unwrap();
    let (now, later) = (scene.lines("now"), scene.lines("later"));
    assert_eq!(now.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 5, 10, 12]);
    for (now, later) in now.iter().zip(&later) {
        assert_eq!((&now["step"], &now["tokens"]), (&later["step"], &later["tokens"]));
        let ratio = now["loss"].as_f64().unwrap() / later["loss"].as_f64().unwrap();
        assert!((ratio - 1.0).abs() < 1e-5, "{now} {later}");
    }
    assert_eq!(scene.checkpoints("now"), scene.checkpoints("later"));
}

/// In f16 the loss falls as in f32, for an adapter, all weights and projected gradients.
#[test]
fn f16_trains_like_f32() {
    let _alone = alone();
    for tables in
        [LORA, "[optimizer.adamw]\nlearning_rate = 1e-3\n", "[optimizer.galore]\nrank = 8\nlearning_rate = 5e-3\n"]
    {
        let scene = Scene::new(tables);
        let sets = |dtype: &'static str| ["training.max_steps=15", dtype];
        train(&scene.config("f32", &sets("dtype=f32"))).unwrap();
        train(&scene.config("f16", &sets("dtype=f16"))).unwrap();
        let last = |run: &str| scene.lines(run).last().unwrap().clone();
        let (full, half) = (last("f32"), last("f16"));
        let first = scene.lines("f32")[0]["loss"].as_f64().unwrap();
        let (full, loss) = (full["loss"].as_f64().unwrap(), half["loss"].as_f64().unwrap());
        assert!(full < 0.9 * first, "{tables}: f32 does not learn: {first} {full}");
        // The first scale overflows here once or twice, so f16 makes fewer updates, on other batches.
        assert!(loss < first - 0.8 * (first - full), "{tables}: f32 {full}, f16 {loss}, start {first}");
        let (scale, skipped) = (half["loss_scale"].as_f64().unwrap(), half["skipped_steps"].as_i64().unwrap());
        assert_eq!(scale, LossScale::START * 0.5f64.powi(skipped as i32), "{half}");
    }
}

/// At the largest scale gradients overflow: steps are left out until they fit, the run goes on, and a resumed run has the same
/// scale, count and bits.
#[test]
fn an_overflow_in_f16_is_skipped_and_counted_and_survives_a_resume() {
    let _alone = alone();
    for tables in [LORA, "[optimizer.galore]\nrank = 8\nupdate_proj_gap = 3\nlearning_rate = 5e-3\n"] {
        let scene = Scene::new(tables);
        let sets = ["training.max_steps=20", "training.save_steps=10", "dtype=f16"];
        let run_of = |run: &str, more: &[&str], steps: u64| {
            let config = scene.config(run, &[&sets[..], more].concat());
            let mut run: Run<'_, Session> = prepare(&config).unwrap();
            run.counters.loss_scale.get_or_insert(LossScale { scale: LossScale::LARGEST, ..LossScale::default() });
            run.total_steps = steps;
            run.train().unwrap();
            run.counters.loss_scale.unwrap()
        };
        let whole = run_of("whole", &[], 20);
        assert!(whole.skipped_steps > 0 && whole.scale < LossScale::LARGEST, "{whole:?}");
        assert_eq!(whole.scale, LossScale::LARGEST * 0.5f64.powi(whole.skipped_steps as i32), "{whole:?}");
        assert!(whole.skipped_steps < 15, "{whole:?}");
        let lines = scene.lines("whole");
        assert_eq!(lines[0]["non_finite"]["grad_norm"].as_str().map(|norm| norm != "0"), Some(true), "{}", lines[0]);
        assert!(lines.iter().all(|line| line["loss"].is_number()), "{lines:?}");
        let last = lines.last().unwrap();
        assert!(last["loss"].as_f64().unwrap() < lines[0]["loss"].as_f64().unwrap(), "{lines:?}");
        assert_eq!(last["skipped_steps"], whole.skipped_steps);
        // Stopped after 10 steps and taken up again.
        run_of("half", &[], 10);
        let resumed = run_of("half", &["training.resume_from_checkpoint=true"], 20);
        assert_eq!(resumed, whole);
        assert_eq!(scene.lines("half").last(), scene.lines("whole").last());
    }
}

/// Bytes alive after a number of steps of one run. What a step leaves behind, every step leaves: the least that an
/// allocation can be is more than one byte a step.
#[test]
fn memory_does_not_grow_over_thousands_of_steps() {
    let _alone = alone();
    for (tables, reading, most) in [
        (LORA, Reading::Later, 2300),
        (LORA, Reading::EveryStep, 1300),
        ("[optimizer.galore]\nrank = 8\nupdate_proj_gap = 50\n", Reading::Later, 1300),
    ] {
        let scene = Scene::new(tables);
        let config = scene.config("run", &["training.max_steps=3000", "training.save_steps=100000"]);
        let mut run: Run<'_, Session> = prepare(&config).unwrap();
        run.reading = reading;
        let mut alive = |steps: u64| {
            run.total_steps = steps;
            run.train().unwrap();
            LIVE.load(Ordering::Relaxed)
        };
        let (early, late) = (alive(300), alive(most));
        assert!(
            (late - early).abs() < 1000,
            "{tables} {reading:?}: {early} bytes after 300 steps, {late} after {most}"
        );
    }
}
