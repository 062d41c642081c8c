//! Command lines and output folders that cannot be used.

use crate::Row;
use crate::workplace::Workplace;

const fn row(
    name: &'static str,
    arguments: &'static str,
    exit_code: i32,
    says: &'static [&'static str],
    prepare: fn(&Workplace),
) -> Row {
    Row { name, prepare, arguments, exit_code, says }
}

fn nothing(_: &Workplace) {}

/// `out/` as an earlier run left it.
fn finished_run(place: &Workplace) {
    place.copy("lora_qv_r4/adapter_init", "out/adapter");
    place.write("out/metrics.jsonl", "{\"type\":\"train\",\"step\":1}\n");
    place.write("out/config.toml", "seed = 1\n");
    place.write("out/checkpoints/step-1/state.json", "{}");
}

pub(crate) const ROWS: &[Row] = &[
    row("nothing to do", "", 2, &["a configuration is required: lowrank-train --config FILE", "Usage: "], nothing),
    row("unknown flag", "--confg run.toml", 2, &["unexpected argument '--confg'", "'--config'"], nothing),
    row("unknown command", "trian --config run.toml", 2, &["trian", "train"], nothing),
    row(
        "output folder is a file",
        "--config run.toml --out data.jsonl",
        2,
        &["output_dir data.jsonl is a file, expected a folder", "hint: "],
        nothing,
    ),
    row(
        "output folder below a file",
        "--config run.toml --out data.jsonl/out",
        2,
        &["cannot write into output_dir data.jsonl/out", "Not a directory", "hint: choose another output_dir"],
        nothing,
    ),
    // No user, root included, can write here.
    row(
        "output folder cannot be written",
        "--config run.toml --out /proc/lowrank",
        2,
        &["cannot write into output_dir /proc/lowrank", "hint: "],
        nothing,
    ),
    row(
        "output folder holds a run",
        "--config run.toml",
        2,
        &[
            "output_dir out already holds a run",
            "hint: choose another output_dir",
            "training.resume_from_checkpoint=true",
        ],
        finished_run,
    ),
    row(
        "checkpoint to resume from is missing",
        "--config run.toml --set training.resume_from_checkpoint=\"nowhere\"",
        2,
        &["cannot resume from nowhere: there is no such folder", "hint: "],
        nothing,
    ),
    row(
        "checkpoint to resume from is not complete",
        "--config run.toml --set training.resume_from_checkpoint=\"out/checkpoints/step-1\"",
        2,
        &["cannot resume from out/checkpoints/step-1", "complete.json", "hint: "],
        finished_run,
    ),
    row(
        "nothing to evaluate on",
        "eval --config run.toml",
        2,
        &["there is nothing to evaluate on", "data.eval", "hint: give a file with --data"],
        nothing,
    ),
    row("evaluation without data", "eval --model model", 2, &["--data <FILE>", "Usage: "], nothing),
    row(
        "no such data to evaluate on",
        "eval --model model --data no.jsonl --device cpu",
        2,
        &["cannot read no.jsonl: No such file", "hint: "],
        nothing,
    ),
    row(
        "merge into a model",
        "merge --model model --adapter adapter --out model",
        2,
        &["model already holds a model", "hint: choose another --out, or pass --overwrite"],
        Workplace::with_adapter,
    ),
    row(
        "merge without the adapter",
        "merge --model model --adapter nowhere --out merged",
        2,
        &["nowhere has no adapter_config.json", "hint: "],
        nothing,
    ),
    row(
        "merge into a folder that cannot be written",
        "merge --model model --adapter adapter --out data.jsonl/merged",
        1,
        &["cannot write data.jsonl/merged", "Not a directory"],
        Workplace::with_adapter,
    ),
    row(
        "a LoRA over an adapter",
        "merge --model model --adapter adapter --out adapter --format peft",
        2,
        &["adapter already holds an adapter", "hint: choose another --out, or pass --overwrite"],
        Workplace::with_adapter,
    ),
    row(
        "a merged model of some rank",
        "merge --model model --adapter adapter --out merged --rank 2",
        2,
        &["--rank, --tolerance and --same-rank are for --format peft"],
        Workplace::with_adapter,
    ),
    row(
        "answers of no model",
        "generate --model nowhere --prompt a --device cpu",
        2,
        &["\"nowhere\" cannot be used", "no such folder", "hint: "],
        nothing,
    ),
    row(
        "answers of no adapter",
        "generate --model model --adapter nowhere --prompt a --device cpu",
        2,
        &["nowhere has no adapter_config.json"],
        nothing,
    ),
    row(
        "negative temperature",
        "generate --model model --prompt a --temperature -1",
        2,
        &["'-1' for '--temperature <T>'", "expected a number, 0 or more"],
        nothing,
    ),
    row(
        "answers into no folder",
        "generate --model model --raw --prompt a --max-new-tokens 1 --device cpu --out no/such/file",
        1,
        &["cannot write no/such/file"],
        nothing,
    ),
    row(
        "unknown device to look at",
        "doctor --device tpu",
        2,
        &["device \"tpu\" is not in this build", "hint: use auto, cpu, cuda"],
        nothing,
    ),
];
