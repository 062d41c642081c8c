//! `lowrank-train analyze`: what training did to the weights and activations of a model, layer by layer.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::FloatDType;
use lowrank_models::hf::{self, ChatTemplate, Tokenizer};
use lowrank_models::{Batch, Decoder, adapters, load};

use crate::analysis::{self, ActivationRow, Analysis, LayerRow, MASK_SHARE, Pair};
use crate::cli::AnalyzeArgs;
use crate::config::{Init, ProgressStyle, RunConfig};
use crate::data::{self, DataConfig, Encoder, Evaluation, LoaderConfig, Paths};
use crate::device;
use crate::error::Problem;
use crate::progress::Phase;
use crate::run_dir::write_atomically;
use crate::task::data_problem;

/// Runs the command.
///
/// # Errors
/// A folder that is no run, adapter or model; models that do not match; data that cannot be read.
pub fn run(args: &AnalyzeArgs) -> anyhow::Result<()> {
    let name = args.run.to_string_lossy().into_owned();
    let tuned = Source::find(&name)?;
    let against = match &args.against {
        Some(other) => Source::find(other)?,
        None => tuned.base(&name)?,
    };
    let (before, after) = (against.load()?, tuned.load()?);
    let directions = args.directions as usize;
    let phase = Phase::start(ProgressStyle::Auto, "spectra of the weights");
    let layers = analysis::layers(&before, &after, directions, |done, total| phase.update(done, total));
    phase.finish();
    let mut analysis = Analysis {
        of: name,
        against: against.to_string(),
        directions,
        layers: layers?,
        tokens: 0,
        activations: vec![],
    };
    if let Some(file) = &args.data {
        let batches = sample(file, &tuned, after.config.vocab_size, args.tokens as usize)?;
        analysis.tokens = batches.iter().map(Batch::target_count).sum();
        let phase = Phase::start(ProgressStyle::Auto, "activations");
        analysis.activations =
            analysis::activations(&before, &after, &batches, |done, total| phase.update(done, total));
        phase.finish();
    }
    let tables = tables(&analysis);
    if args.markdown {
        let path = args.run.join("analysis.md");
        write_atomically(&path, tables.as_bytes())?;
        tracing::info!("wrote {}", path.display());
    }
    let text = match args.json {
        true => serde_json::to_string_pretty(&analysis)? + "\n",
        false => tables,
    };
    Ok(super::deliver(&text, None)?)
}

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq)]
enum Source {
    /// A checkpoint.
    Model {
        /// Its folder or hub id.
        name: String,
        /// What it was trained from, if it is known.
        from: Option<Box<Source>>,
    },
    /// Random weights for a `config.json`.
    Random { name: String, seed: u64 },
    /// An adapter on a base.
    Adapter { folder: PathBuf, base: Box<Source> },
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Model { name, .. } => write!(formatter, "{name}"),
            Self::Random { name, seed } => write!(formatter, "{name} with random weights (seed {seed})"),
            Self::Adapter { folder, .. } => write!(formatter, "{}", folder.display()),
        }
    }
}

impl Source {
    /// What a run folder, an adapter folder, a model folder or a hub id holds.
    fn find(name: &str) -> Result<Self, Problem> {
        let folder = Path::new(name);
        if folder.join("config.toml").is_file() {
            return Self::of_run(folder);
        }
        if folder.join(hf::peft::CONFIG_FILE).is_file() {
            return Self::of_adapter(folder);
        }
        if folder.join("config.json").is_file() || !folder.exists() {
            hf::resolve_model(name).map_err(|error| {
                Problem::config(format!("{name} is no run, no adapter and no model")).source(error).hint(HINT)
            })?;
            return Ok(Self::Model { name: name.to_owned(), from: None });
        }
        Err(Problem::config(format!("{name} is not a run folder (it has no config.toml), no adapter and no model"))
            .hint(HINT))
    }

    fn of_run(folder: &Path) -> Result<Self, Problem> {
        let path = folder.join("config.toml");
        let unreadable = || Problem::config(format!("cannot read {}", path.display()));
        let text = std::fs::read_to_string(&path).map_err(|error| unreadable().source(error))?;
        let config: RunConfig = toml::from_str(&text).map_err(|error| unreadable().source(error))?;
        let base = match config.init {
            Init::Pretrained => Self::Model { name: config.base_model, from: None },
            Init::Random => Self::Random { name: config.base_model, seed: config.seed },
        };
        let (adapter, model) = (folder.join("adapter"), folder.join("model"));
        if adapter.join(hf::peft::CONFIG_FILE).is_file() {
            Ok(Self::Adapter { folder: adapter, base: Box::new(base) })
        } else if model.join("config.json").is_file() {
            Ok(Self::Model { name: model.to_string_lossy().into_owned(), from: Some(Box::new(base)) })
        } else {
            Err(Problem::config(format!("{} holds neither an adapter nor a model", folder.display())).hint(
                "the run has not ended; a checkpoint of an adapter run is analysed by its folder checkpoints/step-N",
            ))
        }
    }

    fn of_adapter(folder: &Path) -> Result<Self, Problem> {
        let config = hf::AdapterConfig::from_folder(folder)
            .map_err(|error| Problem::config(format!("cannot use the adapter {}", folder.display())).source(error))?;
        let Some(base) = config.base_model_name_or_path else {
            return Err(Problem::config(format!("the adapter {} names no base model", folder.display()))
                .hint("write base_model_name_or_path into its adapter_config.json"));
        };
        let base = Box::new(Self::Model { name: base, from: None });
        Ok(Self::Adapter { folder: folder.to_owned(), base })
    }

    /// What it started from.
    fn base(&self, name: &str) -> Result<Self, Problem> {
        match self {
            Self::Adapter { base, .. } | Self::Model { from: Some(base), .. } => Ok((**base).clone()),
            Self::Model { from: None, .. } | Self::Random { .. } => {
                Err(Problem::config(format!("{name} does not say what it was trained from"))
                    .hint("name it with --against DIR"))
            }
        }
    }

    /// Folder with the model's configuration and tokenizer.
    fn folder(&self) -> Result<PathBuf, Problem> {
        match self {
            Self::Model { name, .. } | Self::Random { name, .. } => hf::resolve_model(name)
                .map_err(|error| Problem::config(format!("the model {name} cannot be used")).source(error)),
            Self::Adapter { base, .. } => base.folder(),
        }
    }

    /// The model in f32 on the CPU.
    fn load(&self) -> Result<Decoder, Problem> {
        let failed = |error| Problem::run(format!("cannot load {self}")).source(error);
        let device = device::choose("cpu")?.device;
        match self {
            Self::Model { .. } => {
                let phase = Phase::start(ProgressStyle::Auto, format!("loading {self}"));
                let folder = self.folder()?;
                let mut update = |_: &str, done: usize, total: usize| phase.update(done as u64, total as u64);
                let decoder = load::load(&folder, FloatDType::F32, &device, &mut update);
                phase.finish();
                decoder.map_err(failed)
            }
            Self::Random { seed, .. } => load::random(&self.folder()?, FloatDType::F32, *seed, &device).map_err(failed),
            Self::Adapter { folder, base } => {
                let mut decoder = base.load()?;
                adapters::load_adapter(&mut decoder, folder).map_err(|error| {
                    Problem::run(format!("cannot use the adapter {}", folder.display())).source(error)
                })?;
                Ok(decoder)
            }
        }
    }
}

const HINT: &str = "give the output_dir of a run, a PEFT adapter, or a Hugging Face folder or id";

/// Batches from the start of a file, of so many tokens at most.
fn sample(file: &Path, source: &Source, vocab: usize, tokens: usize) -> Result<Vec<Batch>, Problem> {
    let folder = source.folder()?;
    let tokenizer = Tokenizer::from_folder(&folder)
        .and_then(|tokenizer| tokenizer.for_model(vocab))
        .map_err(|error| Problem::run("cannot load the tokenizer").source(error))?;
    let chat = ChatTemplate::from_folder(&folder)
        .map_err(|error| Problem::run("cannot load the chat template").source(error))?;
    let encoder = Encoder { tokenizer: &tokenizer, chat: chat.as_ref() };
    let settings = DataConfig { train_on_inputs: true, cache: false, ..DataConfig::default() };
    let paths = Paths::One(file.to_string_lossy().into_owned());
    let dataset = data::load("data", &paths, &settings, &encoder, None).map_err(data_problem)?;
    let loader = LoaderConfig {
        micro_batch_size: 1,
        max_seq_length: settings.max_seq_length,
        packing: settings.packing,
        shuffle: false,
        seed: 0,
        pad_id: tokenizer.pad_id(),
        pad_to_multiple_of: settings.pad_to_multiple_of,
    };
    let evaluation = Evaluation::new(Arc::new(dataset), loader).map_err(data_problem)?;
    let mut count = 0;
    let within = |batch: &Batch| {
        let is_wanted = count < tokens;
        count += batch.target_count();
        is_wanted
    };
    Ok(evaluation.batches().take_while(within).collect())
}

/// A number with three digits, or a dash.
fn shown(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value == 0.0 || (0.01..1e4).contains(&value.abs()) => {
            let digits = if value.abs() >= 100.0 {
                0
            } else if value.abs() >= 10.0 {
                1
            } else {
                3
            };
            format!("{value:.digits$}")
        }
        Some(value) => format!("{value:.1e}"),
    }
}

fn both(pair: Pair<Option<f64>>) -> String {
    format!("{} -> {}", shown(pair.before), shown(pair.after))
}

/// Mean of what is defined.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values: Vec<f64> = values.flatten().collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

type Column = (&'static str, fn(&LayerRow) -> Option<f64>);

const UPDATE: [Column; 8] = [
    ("norm dW / norm W", |row| Some(row.update_norm)),
    ("rank dW", |row| Some(row.update_rank as f64)),
    ("effective", |row| row.update_effective_rank),
    ("stable", |row| row.update_stable_rank),
    ("in space of W (in)", |row| row.update_in_input_space),
    ("(out)", |row| row.update_in_output_space),
    ("off-principal", |row| row.off_principal_share),
    ("low magnitude", |row| row.low_magnitude_share),
];

const WEIGHT: [Column; 4] = [
    ("drift", |row| row.spectrum_drift),
    ("angle in", |row| row.input_angle),
    ("angle out", |row| row.output_angle),
    ("unchanged", |row| row.unchanged_share),
];

/// All tables as Markdown, which a terminal shows as well.
fn tables(analysis: &Analysis) -> String {
    let Analysis { of, against, directions, layers, tokens, activations } = analysis;
    let mut text = format!("# {of}\n\nCompared with {against}; {} linear layers.\n\n", layers.len());
    let lines: [(&str, fn(&LayerRow) -> Option<f64>); 6] = [
        ("relative size of the update", |row| Some(row.update_norm)),
        ("effective rank of the update", |row| row.update_effective_rank),
        ("drift of the singular values", |row| row.spectrum_drift),
        ("largest angle of the leading directions, degrees", |row| {
            row.input_angle.into_iter().chain(row.output_angle).reduce(f64::max)
        }),
        ("share of changed entries off the principal ones (chance 0.7)", |row| row.off_principal_share),
        ("share of entries that stay as they are", |row| row.unchanged_share),
    ];
    for (what, of) in lines {
        let _ = writeln!(text, "- mean {what}: {}", shown(mean(layers.iter().map(of))));
    }
    let _ = writeln!(text, "\n## Updates\n");
    let header: Vec<&str> = UPDATE.iter().map(|(name, _)| *name).collect();
    let rows = layers.iter().map(|row| {
        let cells = UPDATE.iter().map(|(_, of)| shown(of(row)));
        [row.module.clone()].into_iter().chain(cells).collect::<Vec<String>>()
    });
    write_table(&mut text, "layer", &header, rows);
    let _ = writeln!(
        text,
        "\nSpaces are those of the leading {directions} directions; masks hold {:.0} % of the entries.\n\n## Weights\n",
        100.0 * MASK_SHARE
    );
    let header: Vec<&str> =
        ["effective rank", "stable rank"].into_iter().chain(WEIGHT.iter().map(|(name, _)| *name)).collect();
    let rows = layers.iter().map(|row| {
        let ranks = [row.module.clone(), both(row.effective_rank), both(row.stable_rank)];
        ranks.into_iter().chain(WEIGHT.iter().map(|(_, of)| shown(of(row)))).collect::<Vec<String>>()
    });
    write_table(&mut text, "layer", &header, rows);
    if !activations.is_empty() {
        let _ = writeln!(text, "\n## Activations behind each block, {tokens} tokens\n");
        let header = ["RankMe", "participation ratio", "alpha", "R2 of alpha"];
        let rows = activations.iter().map(|row: &ActivationRow| {
            let pairs = [row.rank_me, row.participation_ratio, row.alpha, row.alpha_r_squared].map(both);
            [row.block.to_string()].into_iter().chain(pairs).collect::<Vec<String>>()
        });
        write_table(&mut text, "block", &header, rows);
    }
    text
}

fn write_table(text: &mut String, first: &str, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let _ = writeln!(text, "| {first} | {} |", header.join(" | "));
    let _ = writeln!(text, "| --- |{}", " ---: |".repeat(header.len()));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
}

#[cfg(test)]
#[path = "analyze_tests.rs"]
mod tests;
