//! Adapters on a model: which modules get one, and PEFT folders in and out.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Param;
use burn::tensor::{FloatDType, Tensor, TensorData};
use lowrank_core::adapters::lora::{Lora, LoraInit};
use lowrank_core::lowrank::cast;
use lowrank_core::random::Stream;
use lowrank_core::{LowRank, Projection};

use crate::decoder::{Decoder, Embedding};
use crate::hf::error::bullets;
use crate::hf::peft::{AdapterTensor, InitLoraWeights, is_saved_as, shortest_names};
use crate::hf::{AdapterConfig, Checkpoint, Dtype, HfError, OutTensor, write_safetensors, write_text_atomic};
use crate::parameters;
use crate::save::host_values;

/// Name of the embedding's module.
const EMBEDDING: &str = "model.embed_tokens";

/// What can go wrong with an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// `target_modules` names nothing in this model.
    #[error(
        "target_modules {wanted} match no module of the model; it has {known}\nhint: use \"all-linear\" or some of these names"
    )]
    NoTarget {
        /// What the configuration asks for.
        wanted: String,
        /// Number of blocks and last parts of the module names.
        known: String,
    },
    /// A rank larger than a layer.
    #[error("rank {rank} is larger than {module} allows: it maps {d_in} to {d_out}, so r can be at most {}\nhint: lower r, or set rank_pattern for this module", .d_in.min(.d_out))]
    RankTooLarge {
        /// The module.
        module: String,
        /// The rank asked for.
        rank: usize,
        /// Its input width.
        d_in: usize,
        /// Its output width.
        d_out: usize,
    },
    /// A start that this version does not have.
    #[error("init_lora_weights = \"{0}\" is not supported\nhint: use the default start or \"gaussian\"")]
    UnknownInit(String),
    /// The tensors of an adapter folder do not fit the model.
    #[error("{origin} does not fit the model:\n{}\nhint: the adapter was made for another base model or other settings", bullets(.problems))]
    Mismatch {
        /// The adapter's folder.
        origin: String,
        /// One line each.
        problems: Vec<String>,
    },
    /// `modules_to_save` names nothing.
    #[error(
        "modules_to_save names \"{0}\", which matches no module with weights\nhint: for example \"lm_head\" or \"embed_tokens\""
    )]
    NothingToSave(String),
    /// Reading or writing failed.
    #[error(transparent)]
    Files(#[from] HfError),
}

/// What was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Modules with an adapter, in model order.
    pub modules: Vec<String>,
    /// Parameters of the base that are trained whole.
    pub saved: Vec<String>,
}

/// Calls `change` for every projection with its module name.
pub fn for_each_projection(decoder: &mut Decoder, mut change: impl FnMut(&str, &mut Projection)) {
    for (index, block) in decoder.model.layers.iter_mut().enumerate() {
        for (name, projection) in block.projections_mut() {
            change(&format!("model.layers.{index}.{name}"), projection);
        }
    }
    if let Some(head) = &mut decoder.lm_head {
        change("lm_head", head);
    }
}

/// Freezes the base and attaches fresh LoRA factors where the configuration says so.
///
/// # Errors
/// No module matches; a rank is larger than its layer; an unknown start.
pub fn attach_lora(decoder: &mut Decoder, config: &AdapterConfig, seed: u64) -> Result<Attached, AdapterError> {
    let init = match &config.init_lora_weights {
        InitLoraWeights::Default => LoraInit::KaimingUniform,
        InitLoraWeights::Named(name) if name == "gaussian" => LoraInit::Gaussian,
        InitLoraWeights::Named(name) => return Err(AdapterError::UnknownInit(name.clone())),
        InitLoraWeights::Random => return Err(AdapterError::UnknownInit("false".to_owned())),
    };
    let mut problem = None;
    for_each_projection(decoder, |module, projection| {
        let ([d_in, d_out], rank) = (projection.dims(), config.rank_of(module));
        if rank > d_in.min(d_out) && config.targets(module) && problem.is_none() {
            problem = Some(AdapterError::RankTooLarge { module: module.to_owned(), rank, d_in, d_out });
        }
    });
    match problem {
        Some(problem) => Err(problem),
        None => attach(decoder, config, init, seed),
    }
}

/// Freezes the base and attaches fresh factors of any rank.
fn attach(decoder: &mut Decoder, config: &AdapterConfig, init: LoraInit, seed: u64) -> Result<Attached, AdapterError> {
    untie_head(decoder, config);
    let device = decoder.device();
    let lora = |module: &str, dropout: f64| {
        let r = config.rank_of(module);
        let scale = Lora::scale(config.alpha_of(module), r, config.use_rslora);
        Lora { r, scale, dropout, init }
    };
    let mut attached = Attached::default();
    for_each_projection(decoder, |module, projection| {
        if !config.targets(module) || config.saves(module) {
            return;
        }
        let [d_in, d_out] = projection.dims();
        let lora = lora(module, config.lora_dropout);
        projection.delta = Some(lora.init(d_in, d_out, Stream::new(seed, module), &device));
        attached.modules.push(module.to_owned());
    });
    if config.targets(EMBEDDING) && !config.saves(EMBEDDING) {
        let [vocab, dim] = decoder.model.embed_tokens.weight.dims();
        let delta = lora(EMBEDDING, 0.0).init_embedding(vocab, dim, Stream::new(seed, EMBEDDING), &device);
        decoder.model.embed_tokens.delta = Some(delta);
        attached.modules.push(EMBEDDING.to_owned());
    }
    if attached.modules.is_empty() {
        return Err(AdapterError::NoTarget { wanted: wanted(config), known: known_modules(decoder) });
    }
    attached.saved = train_saved(decoder, config)?;
    Ok(attached)
}

/// The modules a configuration asks for, for messages.
fn wanted(config: &AdapterConfig) -> String {
    let mut text = config.target_modules.to_string();
    if let Some(exclude) = &config.exclude_modules {
        text += &format!(" (without exclude_modules {exclude})");
    }
    if !config.layers_to_transform.is_empty() {
        text += &format!(" (in layers_to_transform {:?})", config.layers_to_transform);
    }
    text
}

fn known_modules(decoder: &Decoder) -> String {
    let mut names: Vec<&str> =
        vec!["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"];
    if decoder.lm_head.is_some() {
        names.push("lm_head");
    }
    format!("{} blocks, numbered from 0, and the modules {}", decoder.model.layers.len(), names.join(", "))
}

/// Gives a tied head its own handle to the embedding's weight where head and embedding are to differ: one of them is trained
/// whole, or the head gets an adapter. As in peft, what is not trained keeps the base's weight.
fn untie_head(decoder: &mut Decoder, config: &AdapterConfig) {
    let differ = config.saves("lm_head") || config.saves(EMBEDDING) || config.targets("lm_head");
    if decoder.lm_head.is_none() && differ {
        decoder.lm_head = Some(Projection::frozen(decoder.model.embed_tokens.weight.val().transpose(), None));
    }
}

/// Trains the modules of `modules_to_save` whole and nothing else of the base; returns their parameters.
fn train_saved(decoder: &mut Decoder, config: &AdapterConfig) -> Result<Vec<String>, AdapterError> {
    let mut saved = vec![];
    *decoder = parameters::set_trained(decoder.clone(), |name| {
        if name.contains(".delta.") {
            return None;
        }
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let is_saved = config.saves(module);
        if is_saved {
            saved.push(name.to_owned());
        }
        Some(is_saved)
    });
    for wanted in &config.modules_to_save {
        if !saved.iter().any(|name| is_saved_as(name, wanted.text())) {
            return Err(AdapterError::NothingToSave(wanted.text().to_owned()));
        }
    }
    Ok(saved)
}

/// Attaches the adapter stored in a PEFT folder, trained or not.
///
/// # Errors
/// As [`attach_lora`]; tensors that are missing, left over or of another shape (all in one message).
pub fn load_adapter(decoder: &mut Decoder, folder: &Path) -> Result<(AdapterConfig, Attached), AdapterError> {
    let config = AdapterConfig::from_folder(folder)?;
    let attached = attach(decoder, &config, LoraInit::default(), 0)?; // the file replaces the start, whatever it was
    let checkpoint = Checkpoint::open_file(&folder.join("adapter_model.safetensors"))?;
    let mut problems = vec![];
    let mut values = BTreeMap::new();
    for name in checkpoint.names() {
        match AdapterTensor::from_key(name) {
            Some(AdapterTensor::BaseCopy(_)) => {}
            Some(tensor) => {
                let view = checkpoint.get(name)?;
                values.insert(parameter_name(&tensor), (name.to_owned(), view.shape.to_vec(), view.to_f32()));
            }
            None => problems.push(format!("{name}: not a LoRA tensor")),
        }
    }
    let device = decoder.device();
    decoder.map_parameters(&mut |name, old| {
        let wanted = attached.saved.iter().any(|saved| saved == name) || name.contains(".delta.");
        if !wanted {
            return old;
        }
        let [rows, cols] = old.dims();
        let is_flipped = is_stored_flipped(name);
        let Some((key, shape, values)) = values.remove(name) else {
            problems.push(format!("{}: missing from the file", peft_key(name)));
            return old;
        };
        let expected = if is_flipped { vec![cols, rows] } else { vec![rows, cols] };
        if shape != expected && !(rows == 1 && shape == [cols]) {
            problems.push(format!("{key}: expected shape {expected:?}, got {shape:?}"));
            return old;
        }
        let stored = Tensor::<2>::from_data(TensorData::new(values, [expected[0], expected[1]]), &device);
        if is_flipped { stored.transpose() } else { stored }
    });
    problems.extend(values.into_values().map(|(key, shape, _)| format!("{key} {shape:?}: no such module is adapted")));
    match problems.is_empty() {
        true => Ok((config, attached)),
        false => Err(AdapterError::Mismatch { origin: folder.display().to_string(), problems }),
    }
}

/// Whether a parameter lies on disk with its axes swapped: linear weights and all factors but those of the embedding.
///
/// peft stores `lora_A.weight [r, in]` and `lora_B.weight [out, r]`; `lora_embedding_A [r, vocab]`, `lora_embedding_B [dim, r]`.
pub fn is_stored_flipped(name: &str) -> bool {
    name.contains(".delta.") || (name.ends_with("_proj.weight") || name == "lm_head.weight")
}

/// Our name of an adapter tensor.
fn parameter_name(tensor: &AdapterTensor) -> String {
    match tensor {
        AdapterTensor::A(module) | AdapterTensor::EmbeddingA(module) => format!("{module}.delta.down"),
        AdapterTensor::B(module) | AdapterTensor::EmbeddingB(module) => format!("{module}.delta.up"),
        AdapterTensor::Saved(name) | AdapterTensor::BaseCopy(name) => name.clone(),
    }
}

/// peft's key of one of our parameters.
pub fn peft_key(name: &str) -> String {
    let factor = |module: &str, a: bool| match (module == EMBEDDING, a) {
        (true, true) => AdapterTensor::EmbeddingA(module.to_owned()),
        (true, false) => AdapterTensor::EmbeddingB(module.to_owned()),
        (false, true) => AdapterTensor::A(module.to_owned()),
        (false, false) => AdapterTensor::B(module.to_owned()),
    };
    match (name.strip_suffix(".delta.down"), name.strip_suffix(".delta.up")) {
        (Some(module), _) => factor(module, true).key(),
        (_, Some(module)) => factor(module, false).key(),
        _ => AdapterTensor::Saved(name.to_owned()).key(),
    }
}

/// Every tensor of the adapter under peft's key and shape, in f32.
pub fn adapter_tensors(decoder: &Decoder) -> Vec<OutTensor<'static>> {
    let mut out = vec![];
    parameters::visit(decoder, "", |entry| {
        if !entry.trained && !entry.name.contains(".delta.") {
            return;
        }
        let (value, is_vector) = ((entry.value)(), entry.dims.len() == 1);
        let value = if is_stored_flipped(entry.name) && !is_vector { value.transpose() } else { value };
        let shape = if is_vector { entry.dims.to_vec() } else { value.dims().to_vec() };
        out.push(OutTensor::new(peft_key(entry.name), Dtype::F32, &shape, move || {
            crate::hf::dtype::from_f32(&host_values(value), Dtype::F32)
        }));
    });
    out
}

/// Writes `adapter_model.safetensors` and `adapter_config.json`, each atomically, the configuration last.
///
/// # Errors
/// Anything the disk refuses.
pub fn save_adapter(
    decoder: &Decoder,
    config: &AdapterConfig,
    attached: &Attached,
    base_model: &str,
    folder: &Path,
) -> Result<(), AdapterError> {
    std::fs::create_dir_all(folder).map_err(|source| HfError::io("create", folder, source))?;
    let mut config = config.clone();
    config.base_model_name_or_path = Some(base_model.to_owned());
    if config.target_modules == crate::hf::peft::Modules::AllLinear {
        let mut all = decoder.config.linear_modules();
        all.extend(["lm_head".to_owned(), EMBEDDING.to_owned()]);
        config.target_modules = crate::hf::peft::Modules::Names(shortest_names(&attached.modules, &all));
    }
    write_safetensors(&folder.join("adapter_model.safetensors"), adapter_tensors(decoder), &[("format", "pt")])?;
    let text = serde_json::to_string_pretty(&config.to_json()).unwrap_or_default() + "\n";
    write_text_atomic(&folder.join("adapter_config.json"), &text)?;
    Ok(())
}

/// Adds every delta to its weight.
pub fn merge(decoder: &mut Decoder) {
    for_each_projection(decoder, |_, projection| projection.merge());
    merge_embedding(&mut decoder.model.embed_tokens, &mut decoder.lm_head);
}

/// An adapted embedding that is also the head must be untied first: the head stays the base's.
fn merge_embedding(embedding: &mut Embedding, head: &mut Option<Projection>) {
    let Some(delta) = embedding.delta.take() else { return };
    if head.is_none() {
        *head = Some(Projection::frozen(embedding.weight.val().transpose(), None));
    }
    embedding.weight = merged_weight(embedding.weight.clone(), &delta);
}

fn merged_weight(weight: Param<Tensor<2>>, delta: &LowRank) -> Param<Tensor<2>> {
    weight.map(|weight| {
        let dtype = weight.dtype().into();
        cast(cast(weight, FloatDType::F32) + delta.delta(), dtype)
    })
}
