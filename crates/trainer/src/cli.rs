//! The command line: `lowrank-train --config run.toml` trains, subcommands do the rest.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::config::Dtype;

/// Version and commit: `0.1.0 (1a2b3c4)`.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("LOWRANK_COMMIT"), ")");

const EXAMPLES: &str = "\
Examples:
  lowrank-train --config configs/finetune/smollm2-lora.toml
  lowrank-train --config run.toml --set optimizer.adamw.learning_rate=1e-4 --set seed=1
  lowrank-train --config run.toml --set training.resume_from_checkpoint=true
  lowrank-train eval --config run.toml
  lowrank-train generate --model models/smollm2 --adapter runs/demo/adapter --prompt \"Hello\"
  lowrank-train merge --model models/smollm2 --adapter runs/demo/adapter --out merged
  lowrank-train tokenizer --corpus data/text/train.txt --vocab-size 4096 --output models/llama-tiny
  lowrank-train compare configs/compare/adapters.toml
  lowrank-train intrinsic --config run.toml --metric accuracy --full-learning-rate 1e-5
  lowrank-train plan --config run.toml
  lowrank-train analyze runs/demo
  lowrank-train doctor

Exit codes: 0 done; 1 the run failed; 2 the command or configuration is wrong; 130 interrupted (a checkpoint was written).";

/// What the process was started with.
#[derive(Debug, Parser)]
#[command(
    name = "lowrank-train",
    version = VERSION,
    about = "Fine-tunes and pre-trains language models with low-rank methods, from one TOML file",
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: TrainArgs,
    /// Show debug messages too
    #[arg(short, long, global = true, display_order = 900)]
    verbose: bool,
}

/// A subcommand with its arguments.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Command {
    /// Train; the same as no subcommand
    #[command(after_help = TRAIN_EXAMPLES)]
    Train(TrainArgs),
    /// Report the loss on held-out data, and the share of generated answers that equal the reference
    #[command(after_help = EVAL_EXAMPLES)]
    Eval(EvalArgs),
    /// Answer a prompt, or every line of standard input
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(GenerateArgs),
    /// Write an adapter for other programs: added to its base model, or as a plain LoRA
    #[command(after_help = MERGE_EXAMPLES)]
    Merge(MergeArgs),
    /// Learn a tokenizer from text, for a model that is trained from nothing
    #[command(after_help = TOKENIZER_EXAMPLES)]
    Tokenizer(TokenizerArgs),
    /// Run variants of a configuration with several seeds and compare them, or compare runs that are there
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(CompareArgs),
    /// Search for the smallest number of dimensions that trains a model nearly as well as all its weights do
    #[command(after_help = INTRINSIC_EXAMPLES)]
    Intrinsic(IntrinsicArgs),
    /// Predict how much memory a run will need, without running it
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(PlanArgs),
    /// Measure what training did to the weights of a run, layer by layer
    #[command(after_help = ANALYZE_EXAMPLES)]
    Analyze(AnalyzeArgs),
    /// Show the devices of this machine, what they can do, and what is wrong
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArgs),
}

const TRAIN_EXAMPLES: &str = "\
Examples:
  lowrank-train train --config run.toml
  lowrank-train train --config run.toml --set adapter.lora.r=32 --out runs/r32

An interrupt (Ctrl-C) finishes the step, writes a checkpoint and ends with code 130. To go on from there:
  lowrank-train train --config run.toml --set training.resume_from_checkpoint=true";

const EVAL_EXAMPLES: &str = "\
Examples:
  lowrank-train eval --config run.toml                    the adapter or model of the run, on its data.eval
  lowrank-train eval --config run.toml --adapter runs/demo/checkpoints/step-50/adapter
  lowrank-train eval --model models/smollm2 --data data/demo/eval.jsonl --no-generate";

const GENERATE_EXAMPLES: &str = "\
Examples:
  lowrank-train generate --model models/smollm2 --prompt \"What is a rank?\"
  lowrank-train generate --config run.toml --prompt \"Hello\" --temperature 0.7 --top-p 0.9 --seed 1
  lowrank-train generate --model models/smollm2 --adapter runs/demo/adapter < prompts.txt
  lowrank-train generate --model models/smollm2 --raw --prompt \"Once upon a time\"";

const MERGE_EXAMPLES: &str = "\
Examples:
  lowrank-train merge --model models/smollm2 --adapter runs/demo/adapter --out merged --dtype bf16
  lowrank-train merge --config run.toml                   writes <output_dir>/model
  lowrank-train merge --config run.toml --format peft     a plain LoRA for servers: <output_dir>/peft
  lowrank-train merge --config run.toml --format peft --rank 32 --tolerance 0.1";

const TOKENIZER_EXAMPLES: &str = "\
Examples:
  lowrank-train tokenizer --corpus data/text/train.txt --vocab-size 4096 --output models/llama-tiny
  lowrank-train tokenizer --corpus a.txt b.jsonl --vocab-size 32000 --output models/mine --special \"<end>\" --force";

const COMPARE_EXAMPLES: &str = "\
Examples:
  lowrank-train compare configs/compare/adapters.toml           runs what is missing, writes the report into output_dir
  lowrank-train compare configs/compare/adapters.toml --only LoRA,DoRA
  lowrank-train compare configs/compare/adapters.toml --report  runs nothing: the report of what is there
  lowrank-train compare runs/a runs/b
  lowrank-train compare runs/* --metric exact_match --out runs/report

A study is a TOML file: base (path of a configuration, or a table), output_dir, seeds, [data] validation and test,
and [[variant]] tables with name, set, adapter, optimizer, quantization and learning_rates. Every learning rate runs
with one seed; the one that is best on validation data runs with all seeds and is scored on test data. Runs that are
done are not repeated; an interrupted study goes on with the same command.";

const INTRINSIC_EXAMPLES: &str = "\
Examples:
  lowrank-train intrinsic --config run.toml --metric accuracy --full-learning-rate 1e-5
  lowrank-train intrinsic --config run.toml --dims 100,1000,10000 --seeds 3 --target 2.5

The configuration has an [optimizer.intrinsic] table. Every d runs with every seed, and all weights too where
--full-learning-rate is given; the answer is the smallest d that reaches the target by the mean and by the best of its
seeds. Runs that are done are not repeated.";
const PLAN_EXAMPLES: &str = "\
Examples:
  lowrank-train plan --config run.toml
  lowrank-train plan --config run.toml --set training.micro_batch_size=8 --set training.gradient_checkpointing=block
  lowrank-train plan --config run.toml --json";

const ANALYZE_EXAMPLES: &str = "\
Examples:
  lowrank-train analyze runs/demo                         the adapter or model of a run against its base
  lowrank-train analyze runs/demo --data data/demo/eval.jsonl --markdown
  lowrank-train analyze runs/lora --against runs/galore   what two runs did to the same base
  lowrank-train analyze models/tuned --against models/base --json";

const DOCTOR_EXAMPLES: &str = "\
Examples:
  lowrank-train doctor
  lowrank-train doctor --device cuda:1";

/// Where the configuration comes from; the same for every command.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct ConfigArgs {
    /// Configuration of the run
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override one key of the configuration; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub sets: Vec<String>,
}

/// Arguments of `train`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct TrainArgs {
    /// Configuration and overrides; a configuration is required.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Folder for the results, instead of output_dir
    #[arg(long, value_name = "DIR", requires = "config")]
    pub out: Option<PathBuf>,
}

impl TrainArgs {
    /// The overrides of the configuration, with `--out` as the last of them.
    pub fn overrides(&self) -> Vec<String> {
        let mut sets = self.config.sets.clone();
        if let Some(out) = &self.out {
            let quoted = toml::Value::String(out.to_string_lossy().into_owned());
            sets.push(format!("output_dir={quoted}"));
        }
        sets
    }
}

/// Model and adapter of a command that does not train.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct ModelArgs {
    /// Folder or hub id of the model [default: base_model of the configuration]
    #[arg(long, value_name = "DIR|ID", required_unless_present = "config")]
    pub model: Option<String>,
    /// Folder of a PEFT adapter [default: what the run of the configuration wrote]
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

/// Where and how to compute.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct DeviceArgs {
    /// auto, cpu, cuda, vulkan, metal or wgpu, with an index as in cuda:1 [default: of the configuration, or auto]
    #[arg(long)]
    pub device: Option<String>,
    /// Number format of the weights and the arithmetic [default: of the configuration, or f32]
    #[arg(long)]
    pub dtype: Option<Dtype>,
}

/// Arguments of `eval`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct EvalArgs {
    /// Configuration and overrides.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// What is evaluated.
    #[command(flatten)]
    pub model: ModelArgs,
    /// File of records [default: data.eval of the configuration]
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    pub data: Option<PathBuf>,
    /// Use only the first N records
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_samples: Option<u64>,
    /// Report the loss only, do not generate answers
    #[arg(long)]
    pub no_generate: bool,
    /// File for the results as JSON, instead of standard output
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Where and how to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `generate`.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct GenerateArgs {
    /// Configuration and overrides.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// What answers.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The prompt [default: every line of standard input]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Text of a system message before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Longest answer, in tokens; never more than the model's context
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_new_tokens: u64,
    /// Randomness of the choice; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Choose among the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability, allow_negative_numbers = true)]
    pub top_p: f64,
    /// Choose among the K most likely tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: u64,
    /// Seed of the choice
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// File for the answers, instead of standard output
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Where and how to compute.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// What `merge` writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The base model with the adapter added to its weights, in the Hugging Face layout
    #[default]
    Hf,
    /// A plain LoRA in PEFT's layout, whatever the method
    Peft,
}

/// Arguments of `merge`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct MergeArgs {
    /// Configuration and overrides.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Folder or hub id of the base model [default: base_model of the configuration]
    #[arg(long, value_name = "DIR|ID", required_unless_present = "config")]
    pub model: Option<String>,
    /// Folder of the PEFT adapter [default: <output_dir>/adapter]
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    pub adapter: Option<PathBuf>,
    /// What is written
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Keep at most R directions of each layer's update; for --format peft [default: all, where the method has few]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u64).range(1..))]
    pub rank: Option<u64>,
    /// Keep as few directions as leave out at most this share of each layer's update; for --format peft
    #[arg(long, value_name = "T", value_parser = share, allow_negative_numbers = true)]
    pub tolerance: Option<f64>,
    /// Give every layer the same rank, filled up with zeros, for servers that read one rank and alpha; for --format peft
    #[arg(long)]
    pub same_rank: bool,
    /// Folder for the result [default: <output_dir>/model, or <output_dir>/peft]
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    pub out: Option<PathBuf>,
    /// Number format of the written weights [default: that of the base model; of a LoRA f32]
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Replace a model or adapter that is in the folder already
    #[arg(long)]
    pub overwrite: bool,
}

/// Arguments of `tokenizer`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct TokenizerArgs {
    /// Text to learn from: .txt files, or .jsonl files with a field `text`
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub corpus: Vec<PathBuf>,
    /// Tokens of the vocabulary; special tokens and the 256 bytes count
    #[arg(long, value_name = "N")]
    pub vocab_size: usize,
    /// Folder for tokenizer.json and tokenizer_config.json
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Further special tokens, beside the usual four (unknown, begin, end, padding)
    #[arg(long, value_name = "TOKEN", num_args = 1..)]
    pub special: Vec<String>,
    /// Replace a tokenizer that is in the folder already
    #[arg(long)]
    pub force: bool,
}

/// What `compare` and `intrinsic` do about runs that are there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Args)]
pub struct StudyRuns {
    /// Remove runs whose configuration changed and make them again
    #[arg(long)]
    pub fresh: bool,
    /// Try runs again that failed
    #[arg(long)]
    pub retry: bool,
    /// Run nothing, report what is there
    #[arg(long, conflicts_with_all = ["fresh", "retry"])]
    pub report: bool,
}

/// Arguments of `compare`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct CompareArgs {
    /// A study (.toml), or folders of runs; runs are looked for below a folder too
    #[arg(value_name = "STUDY|RUN", required = true)]
    pub paths: Vec<PathBuf>,
    /// Folder for report.md, report.csv and report.html [default: output_dir of the study]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// What to compare by: eval_loss, perplexity, exact_match, accuracy, f1, ... [default: of the study, or eval_loss]
    #[arg(long, value_name = "NAME")]
    pub metric: Option<String>,
    /// Run only these variants of the study
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// What to do about runs that are there.
    #[command(flatten)]
    pub runs: StudyRuns,
}

/// Arguments of `intrinsic`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct IntrinsicArgs {
    /// Configuration and overrides; a configuration is required.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Dimensions to try [default: 1, 2, 3, 5, 8 of every decade between --from and --to]
    #[arg(long, value_name = "D", value_delimiter = ',')]
    pub dims: Vec<usize>,
    /// Where the default dimensions begin
    #[arg(long, value_name = "D", default_value_t = 100)]
    pub from: usize,
    /// Where the default dimensions end
    #[arg(long, value_name = "D", default_value_t = 10_000)]
    pub to: usize,
    /// Runs of each dimension; the first has the seed of the configuration
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub seeds: usize,
    /// What is measured: accuracy, exact_match, f1, eval_loss, ... [default: eval_loss]
    #[arg(long, value_name = "NAME")]
    pub metric: Option<String>,
    /// Also train all weights by AdamW at this rate
    #[arg(long, value_name = "RATE")]
    pub full_learning_rate: Option<f64>,
    /// Share of what training all weights reaches that counts as enough
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    pub share: f64,
    /// The value to reach, instead of a share
    #[arg(long, value_name = "VALUE")]
    pub target: Option<f64>,
    /// Folder for all runs [default: output_dir of the configuration]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// What to do about runs that are there.
    #[command(flatten)]
    pub runs: StudyRuns,
}

/// Arguments of `plan`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct PlanArgs {
    /// Configuration and overrides; a configuration is required.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Device to plan for [default: of the configuration]
    #[arg(long)]
    pub device: Option<String>,
    /// Write JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// File for the result, instead of standard output
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments of `analyze`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct AnalyzeArgs {
    /// Folder of a run, an adapter or a model
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// What it is compared with: a run, an adapter, or a folder or hub id of a model [default: the base model]
    #[arg(long, value_name = "RUN|DIR|ID")]
    pub against: Option<String>,
    /// Also measure activations on the first tokens of this file of records
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Tokens of the activations
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(16..))]
    pub tokens: u64,
    /// Directions that are compared: angles and overlaps of the leading K
    #[arg(long, value_name = "K", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    pub directions: u64,
    /// Write JSON to standard output instead of tables
    #[arg(long, conflicts_with = "markdown")]
    pub json: bool,
    /// Write the tables to analysis.md in the folder of the run too
    #[arg(long)]
    pub markdown: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct DoctorArgs {
    /// Look at one device only
    #[arg(long)]
    pub device: Option<String>,
}

/// A command line that makes sense.
#[derive(Debug, Clone, PartialEq)]
pub struct Invocation {
    /// What to do.
    pub command: Command,
    /// Show debug messages too.
    pub verbose: bool,
}

/// Reads the command line of this process. Prints help or a usage error itself and then ends the process with code 0
/// or 2.
pub fn parse() -> Invocation {
    try_parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Reads a command line; the first argument is the name of the program.
///
/// # Errors
/// A usage error, or the text of `--help` and `--version`. Its `exit_code` is 2 or 0.
pub fn try_parse_from<T: Into<OsString> + Clone>(
    arguments: impl IntoIterator<Item = T>,
) -> Result<Invocation, clap::Error> {
    let cli = Cli::try_parse_from(arguments)?;
    let command = cli.command.unwrap_or(Command::Train(cli.train));
    if let Command::Train(train) = &command
        && train.config.config.is_none()
    {
        let message = "a configuration is required: lowrank-train --config FILE\n\nlowrank-train --help has examples";
        return Err(Cli::command().error(ErrorKind::MissingRequiredArgument, message));
    }
    Ok(Invocation { command, verbose: cli.verbose })
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err("expected a number, 0 or more".to_owned()),
    }
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("expected a number above 0 and at most 1".to_owned()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..1.0).contains(&value) => Ok(value),
        _ => Err("expected a number, 0 or more and below 1".to_owned()),
    }
}

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
