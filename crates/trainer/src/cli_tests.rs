//! The options, what they become, and the first line of every refusal.
#![allow(clippy::unwrap_used)]
use super::*;

fn parse(line: &str) -> Result<Invocation, clap::Error> {
    try_parse_from(format!("lowrank-train {line}").split_whitespace().map(str::to_owned))
}

fn command(line: &str) -> Command {
    parse(line).unwrap_or_else(|error| unreachable!("{line}: {error}")).command
}

/// First line and exit code of a refused command line.
fn refusal(line: &str) -> (String, i32) {
    let error = parse(line).unwrap_err();
    (error.to_string().lines().take_while(|line| !line.is_empty()).collect::<Vec<_>>().join(" "), error.exit_code())
}

#[test]
fn the_command_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn training_needs_no_subcommand() {
    let expected = Command::Train(TrainArgs {
        config: ConfigArgs { config: Some("a.toml".into()), sets: vec!["seed=1".into(), "x.y=[1, 2]".into()] },
        out: Some("o".into()),
    });
    let arguments = ["--config", "a.toml", "--set", "seed=1", "--out", "o", "--set", "x.y=[1, 2]"];
    for first in [&["lowrank-train"][..], &["lowrank-train", "train"]] {
        let line = first.iter().chain(&arguments).copied();
        assert_eq!(try_parse_from(line).unwrap(), Invocation { command: expected.clone(), verbose: false });
    }
    let Command::Train(train) = expected else { unreachable!() };
    assert_eq!(train.overrides(), ["seed=1", "x.y=[1, 2]", "output_dir=\"o\""]);
    assert!(parse("--config a.toml -v").unwrap().verbose);
    assert!(parse("train --config a.toml --verbose").unwrap().verbose);
}

#[test]
fn commands_take_a_configuration_or_a_model() {
    let Command::Eval(eval) = command("eval --model m --data d.jsonl --max-samples 5 --no-generate") else {
        unreachable!()
    };
    assert_eq!((eval.model.model.as_deref(), eval.max_samples, eval.no_generate), (Some("m"), Some(5), true));
    let Command::Eval(eval) = command("eval --config c.toml --set seed=2 --dtype bf16") else { unreachable!() };
    assert_eq!((eval.config.sets.len(), eval.device.dtype), (1, Some(Dtype::Bf16)));
    let Command::Merge(merge) = command("merge --config c.toml") else { unreachable!() };
    assert_eq!((merge.out, merge.overwrite), (None, false));
    assert_eq!((merge.format, merge.rank, merge.tolerance), (Format::Hf, None, None));
    let Command::Merge(merge) = command("merge --config c.toml --format peft --rank 8 --tolerance 0.1") else {
        unreachable!()
    };
    assert_eq!((merge.format, merge.rank, merge.tolerance), (Format::Peft, Some(8), Some(0.1)));
    assert_eq!(command("doctor"), Command::Doctor(DoctorArgs::default()));
    let Command::Compare(compare) = command("compare runs/a runs/b --only x,y --metric f1 --out o") else {
        unreachable!()
    };
    assert_eq!((compare.paths.len(), compare.only.len(), compare.metric.as_deref()), (2, 2, Some("f1")));
    let Command::Plan(plan) = command("plan --config c.toml --set seed=2 --device cuda --json") else { unreachable!() };
    assert_eq!((plan.config.sets.len(), plan.device.as_deref(), plan.json), (1, Some("cuda"), true));
    let Command::Analyze(analyze) = command("analyze runs/a --against b --data d.jsonl") else { unreachable!() };
    assert_eq!((analyze.run.to_str(), analyze.against.as_deref()), (Some("runs/a"), Some("b")));
    assert_eq!((analyze.tokens, analyze.directions, analyze.json), (4096, 8, false));
    assert_eq!(refusal("analyze a --json --markdown").1, 2);
    let line = "tokenizer --corpus a.txt b.jsonl --vocab-size 300 --special <x> <y> --output o";
    let Command::Tokenizer(tokenizer) = command(line) else { unreachable!() };
    assert_eq!((tokenizer.corpus.len(), tokenizer.vocab_size, tokenizer.special.len()), (2, 300, 2));
}

#[test]
fn generation_has_defaults() {
    let Command::Generate(generate) = command("generate --model m --prompt hi") else { unreachable!() };
    let sampling = (generate.max_new_tokens, generate.temperature, generate.top_p, generate.top_k, generate.seed);
    assert_eq!(sampling, (256, 0.0, 1.0, 0, 42));
    assert!(!generate.raw);
}

#[test]
fn usage_errors_end_with_2() {
    for (line, expected) in [
        ("", "error: a configuration is required: lowrank-train --config FILE"),
        ("train", "error: a configuration is required: lowrank-train --config FILE"),
        ("--confg a.toml", "error: unexpected argument '--confg' found"),
        ("explode", "error: unrecognized subcommand 'explode'"),
        ("merge --model m --adapter a", "error: the following required arguments were not provided:   --out <DIR>"),
        ("eval --model m", "error: the following required arguments were not provided:   --data <FILE>"),
        ("generate", "error: the following required arguments were not provided:   --model <DIR|ID>"),
        (
            "generate --model m --set a=1",
            "error: the following required arguments were not provided:   --config <FILE>",
        ),
        (
            "generate --model m --top-p 0",
            "error: invalid value '0' for '--top-p <P>': expected a number above 0 and at most 1",
        ),
        (
            "generate --model m --temperature nan",
            "error: invalid value 'nan' for '--temperature <T>': expected a number, 0 or more",
        ),
        ("generate --model m --raw --system s", "error: the argument '--raw' cannot be used with '--system <TEXT>'"),
        (
            "eval --config c --max-samples 0",
            "error: invalid value '0' for '--max-samples <N>': 0 is not in 1..18446744073709551615",
        ),
        (
            "merge --config c --dtype f64",
            "error: invalid value 'f64' for '--dtype <DTYPE>'   [possible values: f32, bf16, f16]",
        ),
        ("compare", "error: the following required arguments were not provided:   <STUDY|RUN>..."),
        ("compare s.toml --report --fresh", "error: the argument '--report' cannot be used with '--fresh'"),
        (
            "merge --config c --format gguf",
            "error: invalid value 'gguf' for '--format <FORMAT>'   [possible values: hf, peft]",
        ),
        (
            "merge --config c --format peft --tolerance 1",
            "error: invalid value '1' for '--tolerance <T>': expected a number, 0 or more and below 1",
        ),
        ("--config a.toml eval", "error: the subcommand 'eval' cannot be used with '--config <FILE>'"),
    ] {
        assert_eq!(refusal(line), (expected.to_owned(), 2), "{line}");
    }
}

#[test]
fn help_and_version_end_with_0() {
    let version = parse("--version").unwrap_err();
    assert_eq!((version.to_string(), version.exit_code()), (format!("lowrank-train {VERSION}\n"), 0));
    for name in ["", "train", "eval", "generate", "merge", "tokenizer", "compare", "intrinsic", "doctor"] {
        let line = format!("{name} --help");
        let help = parse(&line).unwrap_err();
        assert_eq!(help.exit_code(), 0);
        assert!(help.to_string().contains("Examples:\n  lowrank-train "), "{line}");
    }
}

/// The list of options is part of the interface: a change here is a change for every script of a user.
#[test]
fn the_options_are_frozen() {
    let options = |command: &clap::Command| -> Vec<String> {
        command.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned)).collect()
    };
    let cli = Cli::command();
    assert_eq!(options(&cli), ["config", "set", "out", "verbose"]);
    let listed: Vec<(String, Vec<String>)> =
        cli.get_subcommands().map(|command| (command.get_name().to_owned(), options(command))).collect();
    let expected: [(&str, &[&str]); 10] = [
        ("train", &["config", "set", "out"]),
        (
            "eval",
            &["config", "set", "model", "adapter", "data", "max-samples", "no-generate", "out", "device", "dtype"],
        ),
        (
            "generate",
            &[
                "config",
                "set",
                "model",
                "adapter",
                "prompt",
                "system",
                "max-new-tokens",
                "temperature",
                "top-p",
                "top-k",
                "seed",
                "raw",
                "out",
                "device",
                "dtype",
            ],
        ),
        (
            "merge",
            &[
                "config",
                "set",
                "model",
                "adapter",
                "format",
                "rank",
                "tolerance",
                "same-rank",
                "out",
                "dtype",
                "overwrite",
            ],
        ),
        ("tokenizer", &["corpus", "vocab-size", "output", "special", "force"]),
        ("compare", &["out", "metric", "only", "fresh", "retry", "report"]),
        (
            "intrinsic",
            &[
                "config",
                "set",
                "dims",
                "from",
                "to",
                "seeds",
                "metric",
                "full-learning-rate",
                "share",
                "target",
                "out",
                "fresh",
                "retry",
                "report",
            ],
        ),
        ("plan", &["config", "set", "device", "json", "out"]),
        ("analyze", &["against", "data", "tokens", "directions", "json", "markdown"]),
        ("doctor", &["device"]),
    ];
    let expected: Vec<(String, Vec<String>)> = expected
        .iter()
        .map(|(name, options)| ((*name).to_owned(), options.iter().map(|option| (*option).to_owned()).collect()))
        .collect();
    assert_eq!(listed, expected);
}
