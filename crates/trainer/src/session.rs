//! What a run works with: device, model, tokenizer, adapter.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use lowrank_models::adapters::{self, Attached};
use lowrank_models::hf::peft::{InitLoraWeights as PeftInit, ModulePattern, Modules};
use lowrank_models::hf::{self, ChatTemplate, Dtype as FileDtype, Tokenizer};
use lowrank_models::{Decoder, load, parameters};

use crate::config::{AdapterConfig, Dtype, Init, InitLoraWeights, LoraConfig, ProgressStyle, RunConfig, TargetModules};
use crate::data::Encoder;
use crate::device::{self, ChosenDevice};
use crate::error::Problem;
use crate::progress::Phase;

/// An adapter on the model.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Its configuration as peft has it.
    pub config: hf::AdapterConfig,
    /// The modules it is attached to.
    pub attached: Attached,
}

/// A loaded model with everything around it.
#[derive(Debug)]
pub struct Session {
    /// Where it runs.
    pub device: ChosenDevice,
    /// Folder of the base model.
    pub folder: PathBuf,
    /// The model, with the adapter attached.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, where it has one.
    pub chat: Option<ChatTemplate>,
    /// The adapter; none trains the whole model.
    pub adapter: Option<Adapter>,
}

/// A file problem of the model, tokenizer or adapter as a failed run.
fn run_problem(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> Problem {
    Problem::run(what).source(error)
}

impl Session {
    /// Loads base model and tokenizer.
    ///
    /// # Errors
    /// No such device or model; files that do not fit.
    pub fn open(base_model: &str, device: &str, dtype: Dtype, style: ProgressStyle) -> Result<Self, Problem> {
        Self::open_as(base_model, device, dtype, style, None)
    }

    /// As [`Session::open`]; with a seed, the weights are random and the folder needs none.
    fn open_as(
        base_model: &str,
        device: &str,
        dtype: Dtype,
        style: ProgressStyle,
        random: Option<u64>,
    ) -> Result<Self, Problem> {
        let device = device::choose(device)?;
        let compute = device::compute_type(dtype, &device)?;
        let folder = hf::resolve_model(base_model)
            .map_err(|error| Problem::config(format!("base_model = \"{base_model}\" cannot be used")).source(error))?;
        let tokenizer = Tokenizer::from_folder(&folder).map_err(|error| {
            let is_missing = !folder.join("tokenizer.json").exists();
            let problem = run_problem("cannot load the tokenizer", error);
            match random.is_some() && is_missing {
                true => problem.hint(format!(
                    "train one on your text: lowrank-train tokenizer --corpus FILE --vocab-size N --output {}, with the \
                     vocab_size of config.json as N",
                    folder.display()
                )),
                false => problem,
            }
        })?;
        let chat =
            ChatTemplate::from_folder(&folder).map_err(|error| run_problem("cannot load the chat template", error))?;
        let decoder = match random {
            Some(seed) => random_model(&folder, compute, &device, style, seed)?,
            None => load_model(&folder, compute, &device, style)?,
        };
        let tokenizer = tokenizer
            .for_model(decoder.config.vocab_size)
            .map_err(|error| run_problem("the tokenizer does not fit the model", error))?;
        Ok(Self { device, folder, decoder, tokenizer, chat, adapter: None })
    }

    /// The session of a training run: base model, then a fresh adapter, a stored one, or none and everything trained.
    ///
    /// # Errors
    /// As [`Session::open`]; an adapter that does not fit.
    pub fn for_training(config: &RunConfig) -> Result<Self, Problem> {
        let random = (config.init == Init::Random).then_some(config.seed);
        let style = config.logging.progress;
        let mut session = Self::open_as(&config.base_model, &config.device, config.dtype, style, random)?;
        match (&config.init_adapter, &config.adapter) {
            (Some(folder), wanted) => {
                session.load_adapter(folder)?;
                if let (Some(AdapterConfig::Lora(wanted)), Some(adapter)) = (wanted, &mut session.adapter) {
                    adapter.config.lora_dropout = wanted.lora_dropout;
                    set_dropout(&mut session.decoder, wanted.lora_dropout);
                }
            }
            (None, Some(AdapterConfig::Lora(lora))) => session.attach(lora, config.seed)?,
            (None, None) => {
                session.decoder = parameters::set_trained(session.decoder, |_| Some(true));
            }
        }
        Ok(session)
    }

    fn attach(&mut self, lora: &LoraConfig, seed: u64) -> Result<(), Problem> {
        let config = peft_config(lora)?;
        let attached = adapters::attach_lora(&mut self.decoder, &config, seed)
            .map_err(|error| Problem::config("[adapter.lora] does not fit the model").source(error))?;
        self.adapter = Some(Adapter { config, attached });
        Ok(())
    }

    /// Attaches the adapter of a PEFT folder.
    ///
    /// # Errors
    /// It is missing, damaged, or does not fit.
    pub fn load_adapter(&mut self, folder: &Path) -> Result<(), Problem> {
        let (config, attached) = adapters::load_adapter(&mut self.decoder, folder).map_err(|error| {
            let what = format!("cannot use the adapter {}", folder.display());
            match folder.join("adapter_config.json").is_file() {
                true => Problem::run(what).source(error),
                false => Problem::config(what).source(error), // the folder was named wrongly
            }
        })?;
        self.adapter = Some(Adapter { config, attached });
        Ok(())
    }

    /// Tokenizer and template for the data.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder { tokenizer: &self.tokenizer, chat: self.chat.as_ref() }
    }
}

fn load_model(
    folder: &Path,
    compute: FloatDType,
    device: &ChosenDevice,
    style: ProgressStyle,
) -> Result<Decoder, Problem> {
    let phase = Phase::start(style, format!("loading {}", folder.display()));
    let decoder =
        load::load(folder, compute, &device.device, &mut |_, done, total| phase.update(done as u64, total as u64));
    phase.finish();
    decoder.map_err(|error| run_problem(&format!("cannot load the model in {}", folder.display()), error))
}

/// A model of which only `config.json` is read; the weights follow from the seed.
fn random_model(
    folder: &Path,
    compute: FloatDType,
    device: &ChosenDevice,
    style: ProgressStyle,
    seed: u64,
) -> Result<Decoder, Problem> {
    let phase = Phase::start(style, format!("random weights for {}", folder.display()));
    let decoder = load::random(folder, compute, seed, &device.device);
    phase.finish();
    decoder.map_err(|error| run_problem(&format!("cannot make the model of {}", folder.display()), error))
}

/// Gives every delta of the blocks this dropout.
fn set_dropout(decoder: &mut Decoder, dropout: f64) {
    adapters::for_each_projection(decoder, |_, projection| {
        if let Some(delta) = &mut projection.delta {
            delta.dropout = dropout;
        }
    });
}

fn modules(wanted: &TargetModules, key: &str) -> Result<Modules, Problem> {
    match wanted {
        TargetModules::Pattern(text) => Modules::from_text(text)
            .map_err(|reason| Problem::config(format!("adapter.lora.{key} = \"{text}\": {reason}"))),
        TargetModules::Names(names) => Ok(Modules::Names(names.clone())),
    }
}

fn pattern(text: &str, make: fn(&str) -> Result<ModulePattern, String>, key: &str) -> Result<ModulePattern, Problem> {
    make(text).map_err(|reason| Problem::config(format!("adapter.lora.{key}: \"{text}\": {reason}")))
}

/// The configuration of an adapter in peft's terms.
///
/// # Errors
/// A pattern that is no regular expression.
pub fn peft_config(lora: &LoraConfig) -> Result<hf::AdapterConfig, Problem> {
    let mut config = hf::AdapterConfig::new(lora.r, lora.lora_alpha, modules(&lora.target_modules, "target_modules")?);
    config.lora_dropout = lora.lora_dropout;
    config.use_rslora = lora.use_rslora;
    config.exclude_modules =
        lora.exclude_modules.as_ref().map(|wanted| modules(wanted, "exclude_modules")).transpose()?;
    for (text, &rank) in &lora.rank_pattern {
        config.rank_pattern.push((pattern(text, ModulePattern::ending, "rank_pattern")?, rank));
    }
    for (text, &alpha) in &lora.alpha_pattern {
        config.alpha_pattern.push((pattern(text, ModulePattern::ending, "alpha_pattern")?, alpha));
    }
    for text in &lora.modules_to_save {
        config.modules_to_save.push(pattern(text, ModulePattern::part, "modules_to_save")?);
    }
    config.layers_to_transform = lora.layers_to_transform.clone().unwrap_or_default();
    config.init_lora_weights = match lora.init_lora_weights {
        InitLoraWeights::Default => PeftInit::Default,
        InitLoraWeights::Gaussian => PeftInit::Named("gaussian".to_owned()),
    };
    Ok(config)
}

/// The type of written weights.
pub fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::Bf16 => FileDtype::BF16,
        Dtype::F16 => FileDtype::F16,
    }
}
