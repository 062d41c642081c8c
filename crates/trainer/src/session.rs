//! What a run works with: device, model, tokenizer, adapter.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use lowrank_core::quant::Quantisation;
use lowrank_models::adapters::Attached;
use lowrank_models::hf::peft::Modules;
use lowrank_models::hf::{self, ChatTemplate, Dtype as FileDtype, Tokenizer};
use lowrank_models::{Decoder, Network, load, parameters};

use crate::attach;
use crate::calibrate::Measured;
use crate::causal;
use crate::config::{AdapterConfig, Dtype, Init, ProgressStyle, QuantizationConfig, RunConfig, TargetModules};
use crate::data::Encoder;
use crate::device::{self, ChosenDevice};
use crate::error::Problem;
use crate::optimizer;
use crate::progress::{Phase, bytes_text};

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

/// Which linear layers are made as codes, and how.
#[derive(Clone, Debug, Default)]
pub(crate) struct Packing {
    layers: Option<(hf::AdapterConfig, Quantisation)>,
    /// The table that says so, where the codes are frozen.
    pub(crate) frozen_as: Option<&'static str>,
}

impl Packing {
    pub(crate) fn frozen(quantization: &QuantizationConfig) -> Result<Self, Problem> {
        let layers = Some((quantized_modules(quantization)?, quantisation(quantization)));
        Ok(Self { layers, frozen_as: Some(quantization.key()) })
    }

    pub(crate) fn of(&self, module: &str) -> Option<Quantisation> {
        self.layers.as_ref().filter(|(targets, _)| targets.targets(module)).map(|(_, form)| *form)
    }
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
        Self::open_as(base_model, device, dtype, style, None, &Packing::default())
    }

    /// As [`Session::open`]; with a seed, the weights are random and the folder needs none.
    fn open_as(
        base_model: &str,
        device: &str,
        dtype: Dtype,
        style: ProgressStyle,
        random: Option<u64>,
        packing: &Packing,
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
            Some(seed) => random_model(&folder, compute, &device, style, seed, packing)?,
            None => load_model(&folder, compute, &device, style, packing)?,
        };
        let tokenizer = tokenizer
            .for_model(decoder.config.vocab_size)
            .map_err(|error| run_problem("the tokenizer does not fit the model", error))?;
        Ok(Self { device, folder, decoder, tokenizer, chat, adapter: None })
    }

    /// The session of a training run: base model, then a fresh adapter, a stored one, or none and everything trained. A run that
    /// goes on from a checkpoint takes the adapter from there where its start looked at the weights.
    ///
    /// # Errors
    /// As [`Session::open`]; an adapter that does not fit; data that cannot be read for a calibration.
    pub fn for_training(config: &RunConfig, checkpoint: Option<&Path>) -> Result<Self, Problem> {
        match (&config.init_adapter, &config.adapter) {
            (Some(folder), wanted) => Self::going_on(config, folder, wanted.as_ref()),
            (None, Some(adapter)) => Self::adapted(config, adapter, checkpoint),
            (None, None) => {
                let mut session = Self::base(config, true)?;
                session.decoder = parameters::set_trained(session.decoder, |_| Some(true));
                Ok(session)
            }
        }
    }

    /// The base model of a run, quantised as it says or not.
    fn base(config: &RunConfig, quantised: bool) -> Result<Self, Problem> {
        let random = (config.init == Init::Random).then_some(config.seed);
        let packing = match config.quantization.as_ref().filter(|_| quantised) {
            Some(quantization) => Packing::frozen(quantization)?,
            None => Packing { layers: optimizer::trained_codes(config)?, frozen_as: None },
        };
        let style = config.logging.progress;
        Self::open_as(&config.base_model, &config.device, config.dtype, style, random, &packing)
    }

    fn going_on(config: &RunConfig, folder: &Path, wanted: Option<&AdapterConfig>) -> Result<Self, Problem> {
        let mut session = Self::base(config, true)?;
        session.load_adapter(folder)?;
        if let (Some(wanted), Some(adapter)) = (wanted, &mut session.adapter) {
            check_method(folder, wanted, &adapter.config)?;
            if let Some((_, dropout)) = wanted.common().dropout {
                adapter.config.lora_dropout = dropout;
                set_dropout(&mut session.decoder, dropout);
            }
        }
        Ok(session)
    }

    fn adapted(config: &RunConfig, adapter: &AdapterConfig, checkpoint: Option<&Path>) -> Result<Self, Problem> {
        let settings = attach::settings(config, adapter)?;
        if let Some(checkpoint) = checkpoint.filter(|_| attach::starts_from_base(&settings.method)) {
            let mut session = Self::base(config, true)?;
            session.adapter = Some(attach::resumed(&mut session.decoder, &settings, checkpoint, &session.folder)?);
            return Ok(session);
        }
        let (mut session, measured) = Self::calibrated(config, &settings)?;
        let (folder, style) = (&session.folder, config.logging.progress);
        session.adapter = Some(attach::fresh(&mut session.decoder, settings, &measured, folder, config.seed, style)?);
        Ok(session)
    }

    /// The base model with what a calibration pass measured, where the adapter asks for one. It is measured on the model at full
    /// precision, which is dropped before a quantised one is read.
    fn calibrated(config: &RunConfig, settings: &hf::AdapterConfig) -> Result<(Self, Measured), Problem> {
        let mut session = Self::base(config, !attach::needs_calibration(&settings.method))?;
        let wanted = attach::wanted(&session.decoder, settings)?;
        if wanted.is_empty() {
            return Ok((session, Measured::new()));
        }
        let measured = causal::calibrate(&mut session, config, settings, &wanted)?;
        if config.quantization.is_some() {
            drop(session);
            session = Self::base(config, true)?;
        }
        Ok((session, measured))
    }

    /// Attaches the adapter of a PEFT folder.
    ///
    /// # Errors
    /// It is missing, damaged, or does not fit.
    pub fn load_adapter(&mut self, folder: &Path) -> Result<(), Problem> {
        self.adapter = Some(attach::stored(&mut self.decoder, folder, &self.folder)?);
        Ok(())
    }

    /// Tokenizer and template for the data.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder { tokenizer: &self.tokenizer, chat: self.chat.as_ref() }
    }
}

/// The table of the run must be that of the adapter it goes on from.
pub(crate) fn check_method(folder: &Path, wanted: &AdapterConfig, held: &hf::AdapterConfig) -> Result<(), Problem> {
    let (wanted, held) = (wanted.common().key, held.method.name());
    if wanted == held {
        return Ok(());
    }
    let what =
        format!("init_adapter = \"{}\" holds a {held} adapter, but the table is [adapter.{wanted}]", folder.display());
    Err(Problem::config(what).hint(format!("write [adapter.{held}], or leave the table out")))
}

fn load_model(
    folder: &Path,
    compute: FloatDType,
    device: &ChosenDevice,
    style: ProgressStyle,
    packing: &Packing,
) -> Result<Decoder, Problem> {
    let quantise = |module: &str| packing.of(module);
    let phase = Phase::start(style, format!("loading {}", folder.display()));
    let decoder = load::load_quantised(folder, compute, &quantise, &device.device, &mut |_, done, total| {
        phase.update(done as u64, total as u64)
    });
    phase.finish();
    let decoder =
        decoder.map_err(|error| run_problem(&format!("cannot load the model in {}", folder.display()), error))?;
    if let Some(key) = packing.frozen_as {
        announce_quantised(&decoder, key)?;
    }
    Ok(decoder)
}

/// The layers that a run quantises, by the same rules as for adapters.
pub(crate) fn quantized_modules(quantization: &QuantizationConfig) -> Result<hf::AdapterConfig, Problem> {
    let key = format!("quantization.{}.target_modules", quantization.key());
    let modules = match quantization.target_modules() {
        TargetModules::Pattern(text) => {
            Modules::from_text(text).map_err(|reason| Problem::config(format!("{key} = \"{text}\": {reason}")))?
        }
        TargetModules::Names(names) => Modules::Names(names.clone()),
    };
    Ok(hf::AdapterConfig::new(1, 1.0, modules))
}

fn quantisation(quantization: &QuantizationConfig) -> Quantisation {
    let (_, block) = quantization.group();
    match quantization {
        QuantizationConfig::Nf4(table) => Quantisation { block, double: table.double_quant, ..Quantisation::NF4 },
        QuantizationConfig::Int8(_) => Quantisation { block, ..Quantisation::INT8 },
        QuantizationConfig::Int4(_) => Quantisation { block, ..Quantisation::INT4 },
    }
}

/// Tells what the packed layers take, or that there is none.
pub(crate) fn announce_quantised<M: Network>(model: &M, key: &str) -> Result<(), Problem> {
    let (mut layers, mut values, mut bytes) = (0, 0, 0);
    let (mut model, mut example) = (model.clone(), None);
    model.for_each_projection(&mut |module, projection| {
        example.get_or_insert_with(|| module.rsplit('.').next().unwrap_or(module).to_owned());
        if projection.weight.is_quantised() {
            layers += 1;
            values += projection.dims().iter().product::<usize>();
            bytes += projection.weight.bytes();
        }
    });
    if layers == 0 {
        let example = example.unwrap_or_default();
        return Err(Problem::config(format!("quantization.{key}.target_modules match no linear layer of the model"))
            .hint(format!("use \"all-linear\" or names such as {example}")));
    }
    let bits = 8.0 * bytes as f64 / values as f64;
    tracing::info!("{layers} layers are held in {key}: {}, {bits:.3} bits a value", bytes_text(bytes as u64));
    Ok(())
}

/// A model of which only `config.json` is read; the weights follow from the seed.
fn random_model(
    folder: &Path,
    compute: FloatDType,
    device: &ChosenDevice,
    style: ProgressStyle,
    seed: u64,
    packing: &Packing,
) -> Result<Decoder, Problem> {
    let phase = Phase::start(style, format!("random weights for {}", folder.display()));
    let decoder = load::random_quantised(folder, compute, &|module| packing.of(module), seed, &device.device);
    phase.finish();
    decoder.map_err(|error| run_problem(&format!("cannot make the model of {}", folder.display()), error))
}

/// Gives every adapter of a layer this dropout.
pub(crate) fn set_dropout<M: Network>(model: &mut M, dropout: f64) {
    model.for_each_layer(&mut |_, mut layer| layer.set_dropout(dropout));
}

/// The type of written weights.
pub fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::Bf16 => FileDtype::BF16,
        Dtype::F16 => FileDtype::F16,
    }
}
