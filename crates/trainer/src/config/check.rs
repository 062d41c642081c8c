//! Checks of a configuration that was read: every value that makes no sense, all at once.

use std::path::Path;

use regex::Regex;

use super::check_adapter::check_adapter;
use super::optimizer::{
    Accumulation, Common, GaloreConfig, GradientNorm, Inner, Merge, OptimizerConfig, ProjType, QGaloreConfig, Score,
};
use super::raw::{Dtype, EvaluationConfig, OnNonFinite, RunConfig, Scheduler, TargetModules, Task, TrainingConfig};
use super::resolve::Purpose;
use crate::data::Format;

/// One sentence for every value that makes no sense, in the order of the file. Empty: the configuration is good.
pub fn problems(config: &RunConfig, purpose: Purpose) -> Vec<String> {
    let mut found = Findings(Vec::new());
    check_run(config, purpose, &mut found);
    check_task(config, &mut found);
    check_adapter(config, purpose, &mut found);
    check_optimizer(config, &mut found);
    let has_eval_data = check_data(config, purpose, &mut found);
    check_training(&config.training, purpose, &mut found);
    if purpose == Purpose::Train && !has_eval_data {
        check_no_evaluation(&config.training, &mut found);
    }
    check_at_least_one("logging.logging_steps", config.logging.logging_steps, &mut found);
    check_evaluation(&config.evaluation, &mut found);
    found.0
}

pub(super) struct Findings(Vec<String>);

impl Findings {
    /// Records `problem` unless `good`.
    pub(super) fn require(&mut self, good: bool, problem: impl FnOnce() -> String) {
        if !good {
            self.0.push(problem());
        }
    }

    pub(super) fn push(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }
}

fn check_run(config: &RunConfig, purpose: Purpose, found: &mut Findings) {
    found.require(!config.base_model.is_empty(), || {
        "base_model is missing: name the folder of a checkpoint or a hub id".to_owned()
    });
    let needs_output = purpose == Purpose::Train && config.output_dir.as_os_str().is_empty();
    found.require(!needs_output, || "output_dir is missing: name the folder for the results".to_owned());
    found.require(device_name_is_valid(&config.device), || {
        format!(
            "device is \"{}\", expected auto, cpu, cuda, vulkan, metal or wgpu (with an index as in cuda:1)",
            config.device
        )
    });
    if let Some(folder) = &config.init_adapter {
        found.require(folder.join("adapter_config.json").is_file(), || missing_adapter(folder));
    }
}

/// Keys that another task has.
fn check_task(config: &RunConfig, found: &mut Findings) {
    let (task, data) = (config.task.name(), &config.data);
    let table = config.classification.clone().unwrap_or_default();
    if config.task == Task::CausalLm {
        found.require(config.classification.is_none(), || {
            "[classification] is set, but task is \"causal_lm\": set task = \"sequence_classification\" or \
             \"image_classification\""
                .to_owned()
        });
        return;
    }
    found.require(!table.regression || table.labels.len() <= 1, || {
        "classification.regression is true, but classification.labels names several classes: keep one".to_owned()
    });
    found.require(!table.random_flip || config.task == Task::ImageClassification, || {
        "classification.random_flip is true, but only images can be mirrored".to_owned()
    });
    for (key, is_set) in [
        ("calibration.data", config.calibration.as_ref().is_some_and(|table| table.data.is_some())),
        ("data.streaming", data.streaming),
        ("data.train_on_inputs", data.train_on_inputs),
        ("data.format", data.format != Format::Auto),
        ("evaluation.num_samples", config.evaluation.num_samples.is_some()),
    ] {
        found.require(!is_set, || {
            format!("{key} is set, but task = \"{task}\" has no use for it: it belongs to task = \"causal_lm\"")
        });
    }
}

fn missing_adapter(folder: &Path) -> String {
    format!("init_adapter is \"{}\", which holds no adapter_config.json", folder.display())
}

/// Whether a text has the form of a device: `auto`, `cpu`, or an API with an optional index.
pub fn device_name_is_valid(device: &str) -> bool {
    if device == "auto" || device == "cpu" {
        return true;
    }
    let (api, index) = device.split_once(':').unwrap_or((device, "0"));
    ["cuda", "vulkan", "metal", "wgpu"].contains(&api)
        && index.bytes().all(|byte| byte.is_ascii_digit())
        && index.parse::<u16>().is_ok()
}

pub(super) fn check_modules(key: &str, modules: &TargetModules, found: &mut Findings) {
    match modules {
        TargetModules::Names(names) if names.is_empty() => found.push(format!("{key} is an empty list")),
        TargetModules::Names(names) if names.iter().any(String::is_empty) => {
            found.push(format!("{key} holds an empty name"));
        }
        TargetModules::Names(_) => {}
        TargetModules::Pattern(pattern) if pattern.is_empty() => found.push(format!("{key} is empty")),
        TargetModules::Pattern(pattern) => check_regex(key, pattern, found),
    }
}

pub(super) fn check_regex(key: &str, pattern: &str, found: &mut Findings) {
    if let Err(error) = Regex::new(pattern) {
        // The last line of a message of the regex crate is the reason; those above draw the pattern.
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        found.push(format!("{key}: \"{pattern}\" is not a regular expression: {reason}"));
    }
}

fn check_optimizer(config: &RunConfig, found: &mut Findings) {
    let Common { key, learning_rate, plain_learning_rate, betas, eps, weight_decay, no_decay } =
        config.optimizer.common();
    let at = |name: &str| format!("optimizer.{key}.{name}");
    check_positive(&at("learning_rate"), learning_rate, found);
    if plain_learning_rate != learning_rate {
        check_positive(&at("plain_learning_rate"), plain_learning_rate, found);
    }
    found.require(betas.iter().all(|beta| (0.0..1.0).contains(beta)), || {
        format!("{} is [{}, {}], both must be at least 0 and less than 1", at("betas"), betas[0], betas[1])
    });
    check_positive(&at("eps"), eps, found);
    check_not_negative(&at("weight_decay"), weight_decay, found);
    for pattern in no_decay {
        check_regex(&at("no_decay"), pattern, found);
    }
    let Some(low_rank) = config.optimizer.low_rank() else { return };
    check_modules(&at("target_modules"), low_rank.target_modules, found);
    if let Some(excluded) = low_rank.exclude_modules {
        check_modules(&at("exclude_modules"), excluded, found);
    }
    check_at_least_one(&at("rank"), low_rank.rank.unwrap_or(1) as u64, found);
    check_at_least_one(&at("update_proj_gap"), low_rank.update_proj_gap, found);
    found.require(config.adapter.is_none() && config.init_adapter.is_none(), || {
        format!("[optimizer.{key}] trains the weights of the model, which [adapter] and init_adapter freeze: keep one")
    });
    match &config.optimizer {
        OptimizerConfig::Galore(galore) => check_galore(galore, config, found),
        OptimizerConfig::QGalore(galore) => check_q_galore(galore, found),
        OptimizerConfig::DctAdamw(dct) => {
            let fits = dct.score == Score::L2 && !dct.error_feedback;
            found.require(!dct.projected || fits, || {
                "optimizer.dct_adamw.projected forms no dense gradient, which score = \"l1\" and error_feedback need"
                    .to_owned()
            });
        }
        OptimizerConfig::Apollo(apollo) => {
            check_positive("optimizer.apollo.scale", apollo.scale.unwrap_or(1.0), found);
        }
        OptimizerConfig::Fira(fira) => check_positive("optimizer.fira.scale", fira.scale, found),
        OptimizerConfig::Ldadam(ldadam) => check_share("optimizer.ldadam.rho", ldadam.rho, found),
        OptimizerConfig::Intrinsic(table) => {
            check_at_least_one("optimizer.intrinsic.dims", table.dims as u64, found);
        }
        OptimizerConfig::Adamw(_) => {}
    }
}

fn check_galore(galore: &GaloreConfig, config: &RunConfig, found: &mut Findings) {
    let training = &config.training;
    let micro_batches = training.gradient_accumulation_steps;
    check_positive("optimizer.galore.scale", galore.scale, found);
    check_at_least_one("optimizer.galore.block_size", galore.block_size as u64, found);
    check_at_least_one("optimizer.galore.norm_sketch", galore.norm_sketch as u64, found);
    let momentum = galore.momentum.unwrap_or(0.0);
    found.require((0.0..1.0).contains(&momentum), || {
        format!("optimizer.galore.momentum is {momentum}, must be at least 0 and less than 1")
    });
    let has_momentum = matches!(galore.inner, Inner::Sgd | Inner::Muon | Inner::Adafactor);
    found.require(galore.momentum.is_none() || has_momentum, || {
        "optimizer.galore.momentum is set, but AdamW has betas".to_owned()
    });
    if galore.merge == Merge::Deferred {
        let is_input = matches!(galore.proj_type, None | Some(ProjType::Input));
        found.require(is_input && !galore.exact, || {
            "optimizer.galore.merge = \"deferred\" carries updates as P B, which needs proj_type = \"input\" and exact = false"
                .to_owned()
        });
        found.require(training.on_non_finite == OnNonFinite::Stop, || {
            "optimizer.galore.merge = \"deferred\" cannot leave out a step (training.on_non_finite = \"skip\"): a refresh \
             retires pending updates, and the step must merge them"
                .to_owned()
        });
        found.require(config.dtype != Dtype::F16, || {
            "optimizer.galore.merge = \"deferred\" cannot leave out a step, which dtype = \"f16\" does where a gradient does not \
             fit; use \"bf16\" or \"f32\", or merge = \"eager\""
                .to_owned()
        });
        found.require(galore.accumulation != Accumulation::Dense, || {
            "optimizer.galore.merge = \"deferred\" and accumulation = \"dense\" are both set: a dense refresh forms the whole \
             gradient and knows no pending update; use \"lagged\""
                .to_owned()
        });
    }
    let ghost = galore.gradient_norm == GradientNorm::Exact && !galore.exact;
    found.require(!ghost || micro_batches == 1, || {
        format!(
            "optimizer.galore.gradient_norm = \"exact\" needs gradient_accumulation_steps = 1, got {micro_batches}: the \
             norm of a sum is not known from its parts; use \"hybrid\""
        )
    });
}

fn check_q_galore(galore: &QGaloreConfig, found: &mut Findings) {
    check_positive("optimizer.q_galore.scale", galore.scale, found);
    found.require([4, 8].contains(&galore.basis_bits), || {
        format!("optimizer.q_galore.basis_bits is {}, must be 4 or 8", galore.basis_bits)
    });
    let group = galore.group_size;
    found.require(group.is_power_of_two() && (32..=4096).contains(&group), || {
        format!("optimizer.q_galore.group_size is {group}, must be a power of two between 32 and 4096")
    });
    for (name, value) in [
        ("gamma_proj", galore.gamma_proj),
        ("queue_size", galore.queue_size as u64),
        ("block_size", galore.block_size as u64),
    ] {
        check_at_least_one(&format!("optimizer.q_galore.{name}"), value, found);
    }
    check_share("optimizer.q_galore.cos_threshold", galore.cos_threshold, found);
}

/// Checks where data comes from and says whether there is anything to evaluate on.
fn check_data(config: &RunConfig, purpose: Purpose, found: &mut Findings) -> bool {
    for (key, problem) in config.data.problems() {
        found.push(format!("data.{key} {problem}"));
    }
    let missing = purpose == Purpose::Train && config.data.train.is_empty();
    found.require(!missing, || "data.train is missing: name a file, a list of files or a hub data set".to_owned());
    let endless = config.data.streaming && config.training.num_epochs.is_some();
    found.require(!endless, || {
        "training.num_epochs is set, but nobody knows the length of streamed data: set training.max_steps".to_owned()
    });
    config.data.eval.is_some() || config.data.val_set_size.is_some()
}

fn check_training(training: &TrainingConfig, purpose: Purpose, found: &mut Findings) {
    match (training.max_steps, training.num_epochs) {
        (Some(_), Some(_)) => found.push("training.max_steps and training.num_epochs are both set: keep one"),
        (None, None) if purpose == Purpose::Train => {
            found.push("training.max_steps is missing: set it, or training.num_epochs");
        }
        (None, None) => {}
        (Some(steps), None) => check_at_least_one("training.max_steps", steps, found),
        (None, Some(epochs)) => check_positive("training.num_epochs", epochs, found),
    }
    check_at_least_one("training.micro_batch_size", training.micro_batch_size as u64, found);
    check_at_least_one("training.gradient_accumulation_steps", training.gradient_accumulation_steps as u64, found);
    check_at_most("training.micro_batch_size", training.micro_batch_size, 1 << 16, found);
    check_at_most("training.gradient_accumulation_steps", training.gradient_accumulation_steps, 1 << 20, found);
    check_schedule(training, found);
    check_not_negative("training.max_grad_norm", training.max_grad_norm, found);
    for (key, value) in [
        ("training.eval_steps", training.eval_steps),
        ("training.save_steps", Some(training.save_steps)),
        ("training.save_total_limit", training.save_total_limit.map(|limit| limit as u64)),
        ("training.early_stopping_patience", training.early_stopping_patience),
        ("training.head_chunk_tokens", training.head_chunk_tokens.map(|tokens| tokens as u64)),
    ] {
        check_at_least_one(key, value.unwrap_or(1), found);
    }
    let early_stopping = training.early_stopping_patience.is_some();
    found.require(!early_stopping || training.eval_steps.is_some(), || {
        "training.early_stopping_patience is set without training.eval_steps".to_owned()
    });
}

fn check_schedule(training: &TrainingConfig, found: &mut Findings) {
    if training.warmup_steps.is_some() && training.warmup_ratio.is_some() {
        found.push("training.warmup_steps and training.warmup_ratio are both set: keep one");
    }
    check_share("training.warmup_ratio", training.warmup_ratio.unwrap_or(0.0), found);
    check_share("training.decay_ratio", training.decay_ratio.unwrap_or(0.0), found);
    check_share("training.min_lr_ratio", training.min_lr_ratio, found);
    let falls_at_end = training.lr_scheduler == Scheduler::WarmupStableDecay;
    found.require(falls_at_end || training.decay_ratio.is_none(), || {
        "training.decay_ratio is set, but only lr_scheduler = \"warmup_stable_decay\" uses it".to_owned()
    });
    let Some(total) = training.max_steps else { return };
    let warmup = training.warmup(total);
    if warmup > total {
        found.push(format!("training.warmup_steps is {warmup}, must be at most max_steps ({total})"));
    } else if falls_at_end && warmup + training.decay(total) > total {
        let decay = training.decay(total);
        found.push(format!("training: {warmup} warm-up and {decay} decay steps do not fit into max_steps ({total})"));
    }
}

fn check_no_evaluation(training: &TrainingConfig, found: &mut Findings) {
    for (key, is_set) in [
        ("training.eval_steps", training.eval_steps.is_some()),
        ("training.eval_at_start", training.eval_at_start),
        ("training.early_stopping_patience", training.early_stopping_patience.is_some()),
    ] {
        found.require(!is_set, || format!("{key} is set, but there is neither data.eval nor data.val_set_size"));
    }
}

fn check_evaluation(evaluation: &EvaluationConfig, found: &mut Findings) {
    check_at_least_one("evaluation.max_new_tokens", evaluation.max_new_tokens as u64, found);
    check_at_least_one("evaluation.num_samples", evaluation.num_samples.map_or(1, |n| n as u64), found);
}

pub(super) fn check_at_least_one(key: &str, value: u64, found: &mut Findings) {
    found.require(value >= 1, || format!("{key} is {value}, must be at least 1"));
}

/// Far above anything useful, and low enough that the lists of one step can be made.
pub(super) fn check_at_most(key: &str, value: usize, most: usize, found: &mut Findings) {
    found.require(value <= most, || format!("{key} is {value}, must be at most {most}"));
}

pub(super) fn check_positive(key: &str, value: f64, found: &mut Findings) {
    found.require(value > 0.0 && value.is_finite(), || format!("{key} is {value}, must be greater than 0"));
}

fn check_not_negative(key: &str, value: f64, found: &mut Findings) {
    found.require(value >= 0.0 && value.is_finite(), || format!("{key} is {value}, must be at least 0"));
}

fn check_share(key: &str, value: f64, found: &mut Findings) {
    found.require((0.0..=1.0).contains(&value), || format!("{key} is {value}, must be between 0 and 1"));
}
