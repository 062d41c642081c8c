//! Texts of every kind of mistake in a configuration, word for word.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;

use super::super::calibration::CalibrationConfig;
use super::super::optimizer::{AdamWConfig, OptimizerConfig};
use super::super::raw::{Dtype, Init, ResumeFrom, TargetModules};
use super::*;
use crate::error::report;

const GOOD: &str = r#"
base_model = "m"
output_dir = "runs/x"
[adapter.lora]
r = 4
[optimizer.adamw]
learning_rate = 1e-3
[data]
train = ["t.jsonl"]
[training]
max_steps = 10
"#;

fn sets(list: &[&str]) -> Vec<String> {
    list.iter().map(|set| (*set).to_owned()).collect()
}

/// Text and exit code of the error that a configuration gives.
fn failure(text: &str, overrides: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    let error = load(&path, &sets(overrides)).unwrap_err();
    let (text, code) = report(&error.into());
    assert_eq!(code, 2);
    text.replace(&path.display().to_string(), "run.toml").replace("error: ", "")
}

fn good(overrides: &[&str]) -> RunConfig {
    let config = parse("run.toml", GOOD, &sets(overrides)).unwrap();
    assert_eq!(check::problems(&config, Purpose::Train), Vec::<String>::new());
    config
}

fn adamw(config: &RunConfig) -> &AdamWConfig {
    let OptimizerConfig::Adamw(adamw) = &config.optimizer else { panic!("AdamW") };
    adamw
}

#[test]
fn a_model_can_start_from_nothing_on_streamed_text() {
    assert_eq!(good(&[]).init, Init::Pretrained);
    assert_eq!(good(&["init=random"]).init, Init::Random);
    assert!(good(&["data.streaming=true"]).data.streaming);
    let streamed = ["data.streaming=true", "training.num_epochs=1", "data.val_set_size=0.1"];
    let config = parse("run.toml", &GOOD.replace("max_steps = 10", ""), &sets(&streamed)).unwrap();
    let problems = check::problems(&config, Purpose::Train);
    assert_eq!(
        problems,
        [
            "data.val_set_size is set, but `streaming` never sees all records at once; name other files as `eval`",
            "training.num_epochs is set, but nobody knows the length of streamed data: set training.max_steps",
        ]
    );
}

#[test]
fn keys_of_another_task_are_named() {
    let problems = |overrides: &[&str]| {
        let config = parse("run.toml", GOOD, &sets(overrides)).unwrap();
        check::problems(&config, Purpose::Train)
    };
    assert_eq!(problems(&["task=sequence_classification"]), Vec::<String>::new());
    assert_eq!(
        problems(&["classification.regression=true"]),
        [
            "[classification] is set, but task is \"causal_lm\": set task = \"sequence_classification\" or \"image_classification\""
        ]
    );
    let wrong = [
        "task=sequence_classification",
        "classification={ labels = [\"a\", \"b\"], regression = true, random_flip = true }",
        "data.train_on_inputs=true",
        "evaluation.num_samples=3",
    ];
    let foreign = |key: &str| {
        format!(
            "{key} is set, but task = \"sequence_classification\" has no use for it: it belongs to task = \"causal_lm\""
        )
    };
    assert_eq!(
        problems(&wrong),
        [
            "classification.regression is true, but classification.labels names several classes: keep one".to_owned(),
            "classification.random_flip is true, but only images can be mirrored".to_owned(),
            foreign("data.train_on_inputs"),
            foreign("evaluation.num_samples"),
        ]
    );
    let text = failure(GOOD, &["task=translation"]);
    assert!(text.contains("translation") && text.contains("sequence_classification"), "{text}");
}

#[test]
fn a_file_and_overrides_become_one_configuration() {
    let config = good(&[
        "optimizer.adamw.learning_rate=5e-5",
        "dtype = bf16",
        "device=cuda:1",
        "adapter.lora.target_modules=[\"q_proj\", \"v_proj\"]",
        "training.resume_from_checkpoint=true",
        "adapter.lora.rank_pattern.\"layers.0\"=2",
    ]);
    assert_eq!(adamw(&config).learning_rate, 5e-5);
    assert_eq!((config.dtype, config.device.as_str(), config.seed), (Dtype::Bf16, "cuda:1", 42));
    assert_eq!(config.training.resume_from_checkpoint, ResumeFrom::Newest(true));
    let Some(AdapterConfig::Lora(lora)) = &config.adapter else { unreachable!() };
    assert_eq!(lora.target_modules, TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]));
    assert_eq!((lora.r, lora.lora_alpha, lora.rank_pattern["layers.0"]), (4, 8.0, 2));
}

#[test]
fn bare_words_are_strings_and_later_overrides_win() {
    let config = good(&[
        "adapter.lora.target_modules=.*\\.(q|v)_proj",
        "training.resume_from_checkpoint=runs/a/checkpoints/step-5",
        "seed=1",
        "seed=2",
    ]);
    let Some(AdapterConfig::Lora(lora)) = &config.adapter else { unreachable!() };
    assert_eq!(lora.target_modules, TargetModules::Pattern(".*\\.(q|v)_proj".into()));
    let folder = PathBuf::from("runs/a/checkpoints/step-5");
    assert_eq!(config.training.resume_from_checkpoint, ResumeFrom::Folder(folder));
    assert_eq!(config.seed, 2);
}

#[test]
fn an_override_may_add_a_table() {
    let text = GOOD.replace("[adapter.lora]\nr = 4\n", "");
    let config = parse("run.toml", &text, &sets(&["adapter.lora.r=3"])).unwrap();
    assert!(matches!(config.adapter, Some(AdapterConfig::Lora(lora)) if lora.r == 3));
    assert_eq!(parse("run.toml", &text, &[]).unwrap().adapter, None);
}

#[test]
fn the_resolved_text_reads_back_as_the_same_configuration() {
    let config = good(&["adapter.lora.rank_pattern.q=2", "data.eval=[\"e.jsonl\"]", "training.warmup_ratio=0.1"]);
    let text = resolved_toml(&config, "CPU (8 threads)\nsecond line").unwrap();
    let head: Vec<&str> = text.lines().take(4).collect();
    assert_eq!(head[0], "# Resolved configuration of this run, with every default filled in.");
    assert_eq!(head[1], format!("# lowrank-train {}", crate::cli::VERSION));
    assert_eq!(head[2..], ["# device: CPU (8 threads) second line", "# seed: 42"]);
    assert!(text.contains("\n[adapter.lora]\nr = 4\n"), "{text}");
    assert!(text.contains("\nbetas = [0.9, 0.999]\n"), "{text}");
    assert_eq!(parse("config.toml", &text, &[]).unwrap(), config);
    let value = resolved_value(&config).unwrap();
    assert_eq!(value["training"]["save_steps"].as_integer(), Some(500));
}

/// What an adapter is measured on is shown where it counts.
#[test]
fn calibration_is_there_where_a_method_needs_it() {
    let with = |table: &str| parse("run.toml", &GOOD.replace("[adapter.lora]", table), &[]).unwrap();
    assert_eq!(with("[adapter.lora]").calibration, None);
    assert_eq!(with("[adapter.corda]").calibration, Some(CalibrationConfig::default()));
    let text = resolved_toml(&with("[adapter.lora_sb]"), "CPU").unwrap();
    assert!(text.contains("\n[calibration]\nsamples = 64\nbatch_size = 1\ncache = true\n"), "{text}");
    assert_eq!(parse("config.toml", &text, &[]).unwrap(), with("[adapter.lora_sb]"));
}

#[test]
fn a_missing_file_and_a_folder() {
    let error = load(&PathBuf::from("no/such.toml"), &[]).unwrap_err();
    assert_eq!(
        report(&error.into()),
        (
            "error: cannot read the configuration file no/such.toml\n  caused by: No such file or directory (os error 2)\n\nhint: paths are relative to the current folder".to_owned(),
            2
        )
    );
    let error = load(&PathBuf::from("."), &[]).unwrap_err();
    assert_eq!(error.what, ". is a folder, expected a configuration file");
}

#[test]
fn bytes_that_are_not_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    std::fs::write(&path, b"seed = 1\nbase_model = \"\xff\"").unwrap();
    let what = load(&path, &[]).unwrap_err().what.replace(&path.display().to_string(), "run.toml");
    assert_eq!(what, "run.toml, line 2: byte 23 of the file is not UTF-8");
}

#[test]
fn text_that_is_not_toml() {
    assert_eq!(
        failure("seed = 1\nbase_model = \"m\nseed = 2", &[]),
        "run.toml, line 2, column 16: not valid TOML: invalid basic string, expected `\"`\n  2 | base_model = \"m"
    );
    assert_eq!(
        failure("seed = 1\nseed = 2", &[]),
        "run.toml, line 2, column 1: not valid TOML: duplicate key\n  2 | seed = 2"
    );
}

#[test]
fn unknown_keys_name_the_valid_ones() {
    assert_eq!(
        failure(&GOOD.replace("learning_rate", "learnig_rate"), &[]),
        "run.toml, line 7, column 1: unknown key `learnig_rate` in [optimizer.adamw]\n  7 | learnig_rate = 1e-3\n\nhint: did you mean `learning_rate`? Valid keys here: learning_rate, plain_learning_rate, betas, eps, weight_decay, no_decay"
    );
    assert_eq!(
        failure("sed = 1", &[]),
        "run.toml, line 1, column 1: unknown key `sed` at the top level\n  1 | sed = 1\n\nhint: did you mean `seed`? Valid keys here: task, base_model, init, output_dir, device, dtype, seed, init_adapter, adapter, quantization, calibration, classification, optimizer, data, training, logging, evaluation"
    );
    assert_eq!(
        failure(GOOD, &["seed=1", "logging.momentum=3"]),
        "--set logging.momentum=3: unknown key `momentum` in [logging]\n\nhint: valid keys here: logging_steps, tensorboard, progress"
    );
}

#[test]
fn unknown_methods_and_values() {
    assert_eq!(
        failure("[adapter.loar]\nr = 1", &[]),
        "run.toml, line 1, column 10: unknown method `loar` in [adapter]\n  1 | [adapter.loar]\n\nhint: did you mean `lora`? Valid values here: lora, dora, pissa, olora, corda, eora, lora_xs, lora_sb, svfit, vera, randlora, tucker, hra, oft"
    );
    assert_eq!(
        failure(GOOD, &["training.lr_scheduler=cosin"]),
        "--set training.lr_scheduler=cosin: `training.lr_scheduler`: unknown value \"cosin\"\n\nhint: did you mean `cosine`? Valid values here: constant, linear, cosine, warmup_stable_decay"
    );
    assert_eq!(
        failure("[optimizer.adamw]\n[optimizer.sgd]\n", &[]),
        "run.toml, line 1, column 2: `optimizer`: expected exactly one table below it, got none or several\n  1 | [optimizer.adamw]"
    );
}

#[test]
fn wrong_types_say_what_was_expected() {
    assert_eq!(
        failure("[training]\nmax_steps = \"many\"", &[]),
        "run.toml, line 2, column 13: `training.max_steps`: expected a whole number, 0 or more, got string \"many\"\n  2 | max_steps = \"many\""
    );
    assert_eq!(
        failure(GOOD, &["adapter.lora.r=-1"]),
        "--set adapter.lora.r=-1: `adapter.lora.r`: expected a whole number, 0 or more, got integer `-1`"
    );
    assert_eq!(
        failure(GOOD, &["optimizer.adamw.betas=[0.9]"]),
        "--set optimizer.adamw.betas=[0.9]: `optimizer.adamw.betas`: invalid length 1, expected an array of length 2"
    );
    assert_eq!(
        failure(GOOD, &["adapter.lora.target_modules=3"]),
        "--set adapter.lora.target_modules=3: `adapter.lora.target_modules`: expected a list of names, or a string: \"all-linear\" or one regular expression"
    );
    assert_eq!(
        failure(GOOD, &["adapter.lora.init_lora_weights=false"]),
        "--set adapter.lora.init_lora_weights=false: `adapter.lora.init_lora_weights`: expected \"default\" (or true) or \"gaussian\", got boolean `false`"
    );
    assert_eq!(
        failure("data = 3", &[]),
        "run.toml, line 1, column 8: `data`: expected a table, got integer `3`\n  1 | data = 3"
    );
}

#[test]
fn malformed_overrides() {
    let example = "write --set key=value, for example --set optimizer.adamw.learning_rate=1e-4";
    assert_eq!(failure(GOOD, &["seed"]), format!("--set seed: there is no `=`\n\nhint: {example}"));
    assert_eq!(failure(GOOD, &["a..b=1"]), format!("--set a..b=1: `a..b` is not a key\n\nhint: {example}"));
    assert_eq!(failure(GOOD, &["=1"]), format!("--set =1: `` is not a key\n\nhint: {example}"));
    assert_eq!(
        failure(GOOD, &["data.train=[\"a\""]),
        "--set data.train=[\"a\": not a TOML value: unclosed array, expected `]`"
    );
}

#[test]
fn one_senseless_value_is_one_line() {
    assert_eq!(failure(GOOD, &["adapter.lora.r=0"]), "run.toml: adapter.lora.r is 0, must be at least 1");
}

#[test]
fn all_senseless_values_are_reported_together() {
    let text = failure(
        "[adapter.lora]\nr = 0\n[data]\neval = [\"e\"]\nval_set_size = 0.1",
        &[
            "device=gpu",
            "init_adapter=nowhere",
            "adapter.lora.lora_dropout=1.0",
            "adapter.lora.target_modules=(q_proj",
            "adapter.lora.loraplus_lr_embedding=1e-6",
            "optimizer.adamw.learning_rate=-1.0",
            "optimizer.adamw.betas=[0.9, 1.0]",
            "optimizer.adamw.eps=nan",
            "training.max_steps=10",
            "training.num_epochs=1",
            "training.gradient_accumulation_steps=0",
            "training.warmup_steps=11",
            "training.decay_ratio=0.5",
            "training.max_grad_norm=-0.5",
            "training.save_steps=0",
            "training.early_stopping_patience=2",
            "logging.logging_steps=0",
            "evaluation.num_samples=0",
        ],
    );
    let expected = [
        "run.toml has 22 problems:",
        "1. base_model is missing: name the folder of a checkpoint or a hub id",
        "2. output_dir is missing: name the folder for the results",
        "3. device is \"gpu\", expected auto, cpu, cuda, vulkan, metal or wgpu (with an index as in cuda:1)",
        "4. init_adapter is \"nowhere\", which holds no adapter_config.json",
        "5. adapter.lora.r is 0, must be at least 1",
        "6. adapter.lora.lora_dropout is 1, must be at least 0 and less than 1",
        "7. adapter.lora.target_modules: \"(q_proj\" is not a regular expression: unclosed group",
        "8. adapter.lora.loraplus_lr_embedding is set without loraplus_lr_ratio",
        "9. optimizer.adamw.learning_rate is -1, must be greater than 0",
        "10. optimizer.adamw.betas is [0.9, 1], both must be at least 0 and less than 1",
        "11. optimizer.adamw.eps is NaN, must be greater than 0",
        "12. data.val_set_size is set beside `eval`; give one of the two",
        "13. data.train is missing: name a file, a list of files or a hub data set",
        "14. training.max_steps and training.num_epochs are both set: keep one",
        "15. training.gradient_accumulation_steps is 0, must be at least 1",
        "16. training.decay_ratio is set, but only lr_scheduler = \"warmup_stable_decay\" uses it",
        "17. training.warmup_steps is 11, must be at most max_steps (10)",
        "18. training.max_grad_norm is -0.5, must be at least 0",
        "19. training.save_steps is 0, must be at least 1",
        "20. training.early_stopping_patience is set without training.eval_steps",
        "21. logging.logging_steps is 0, must be at least 1",
        "22. evaluation.num_samples is 0, must be at least 1",
    ];
    let got: Vec<&str> = text.lines().map(str::trim).collect();
    assert_eq!(got, expected);
}

/// Combinations of a low-rank optimiser that cannot work name the reason.
#[test]
fn impossible_combinations_of_low_rank_optimisers() {
    let run = |optimizer: &str| {
        format!(
            "base_model = \"m\"\noutput_dir = \"o\"\n[optimizer]\n{optimizer}\n[data]\ntrain = \"t.txt\"\n[training]\nmax_steps = 10\n"
        )
    };
    let cases: [(&str, &[&str], &str); 11] = [
        (
            "galore = {}",
            &["adapter.lora.r=4"],
            "[optimizer.galore] trains the weights of the model, which [adapter] and init_adapter freeze: keep one",
        ),
        (
            "galore = { gradient_norm = \"exact\" }",
            &["training.gradient_accumulation_steps=2"],
            "optimizer.galore.gradient_norm = \"exact\" needs gradient_accumulation_steps = 1, got 2: the norm of a sum is \
             not known from its parts; use \"hybrid\"",
        ),
        (
            "galore = { merge = \"deferred\", proj_type = \"output\" }",
            &[],
            "optimizer.galore.merge = \"deferred\" carries updates as P B, which needs proj_type = \"input\" and exact = \
             false",
        ),
        (
            "galore = { merge = \"deferred\" }",
            &["training.on_non_finite=skip"],
            "optimizer.galore.merge = \"deferred\" cannot leave out a step (training.on_non_finite = \"skip\"): a refresh \
             retires pending updates, and the step must merge them",
        ),
        (
            "galore = { merge = \"deferred\" }",
            &["dtype=f16"],
            "optimizer.galore.merge = \"deferred\" cannot leave out a step, which dtype = \"f16\" does where a gradient does not \
             fit; use \"bf16\" or \"f32\", or merge = \"eager\"",
        ),
        ("galore = { momentum = 0.5 }", &[], "optimizer.galore.momentum is set, but AdamW has betas"),
        ("galore = { rank = 0 }", &[], "optimizer.galore.rank is 0, must be at least 1"),
        ("q_galore = { basis_bits = 3 }", &[], "optimizer.q_galore.basis_bits is 3, must be 4 or 8"),
        (
            "q_galore = { group_size = 100 }",
            &[],
            "optimizer.q_galore.group_size is 100, must be a power of two between 32 and 4096",
        ),
        (
            "dct_adamw = { projected = true, score = \"l1\" }",
            &[],
            "optimizer.dct_adamw.projected forms no dense gradient, which score = \"l1\" and error_feedback need",
        ),
        ("fira = { update_proj_gap = 0 }", &[], "optimizer.fira.update_proj_gap is 0, must be at least 1"),
    ];
    for (optimizer, sets, expected) in cases {
        assert_eq!(failure(&run(optimizer), sets), format!("run.toml: {expected}"));
    }
}

#[test]
fn evaluation_during_training_needs_data() {
    assert_eq!(
        failure(GOOD, &["training.eval_steps=5"]),
        "run.toml: training.eval_steps is set, but there is neither data.eval nor data.val_set_size"
    );
}

#[test]
fn a_schedule_must_fit() {
    assert_eq!(
        failure(
            GOOD,
            &["training.lr_scheduler=warmup_stable_decay", "training.decay_ratio=0.5", "training.warmup_steps=6"]
        ),
        "run.toml: training: 6 warm-up and 5 decay steps do not fit into max_steps (10)"
    );
}

#[test]
fn other_commands_need_less() {
    let config = parse("run.toml", "base_model = \"m\"", &[]).unwrap();
    assert_eq!(check::problems(&config, Purpose::Use), Vec::<String>::new());
    assert_eq!(check::problems(&config, Purpose::Train).len(), 3);
}

#[test]
fn device_names() {
    for name in ["auto", "cpu", "cuda", "cuda:0", "vulkan:3", "metal", "wgpu"] {
        assert!(check::device_name_is_valid(name), "{name}");
    }
    for name in ["", "gpu", "cuda:", "cuda:x", "cuda:+1", "cpu:0", "auto:1", "CUDA", "cuda:99999"] {
        assert!(!check::device_name_is_valid(name), "{name}");
    }
}
