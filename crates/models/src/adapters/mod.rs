//! Adapters on a model: which modules get one, how it starts, folders in and out, merging.
//!
//! | file | what |
//! | --- | --- |
//! | `mod.rs` | attaching: targets, modules that are trained whole, tied heads |
//! | [`start`] | the adapter of one module, fresh or empty for what a folder holds |
//! | [`files`] | folders: parameters to keys and shapes of the tensor file, and back |
//! | `merge.rs` | adapters into weights |

pub mod files;
pub mod merge;
pub mod start;

use lowrank_core::adapters::StartError;
use lowrank_core::{Layer, Sizes};

use crate::hf::error::bullets;
use crate::hf::peft::{MethodConfig, ModulePattern, is_saved_as};
use crate::hf::{AdapterConfig, HfError};
use crate::network::Network;
use crate::parameters;

pub use files::{FileForm, adapter_tensors, load_adapter, load_adapter_over, save_adapter};
pub use merge::merge;
pub use start::{Fresh, Original, Shared};

/// What can go wrong with an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// `target_modules` names nothing in this model.
    #[error(
        "target_modules {wanted} match no module of the model; it has {known}\nhint: use \"all-linear\" (which leaves out convolutions) or \
         some of these names"
    )]
    NoTarget {
        /// What the configuration asks for.
        wanted: String,
        /// Number of blocks and last parts of the module names.
        known: String,
    },
    /// A rank larger than a layer.
    #[error(
        "{key} = {rank} is larger than {module} allows: {sizes}, so {key} can be at most {most}\nhint: lower {key}, \
         or {}",
        other_ways(.key)
    )]
    RankTooLarge {
        /// The module.
        module: String,
        /// Name of the rank.
        key: &'static str,
        /// The rank asked for.
        rank: usize,
        /// The largest one.
        most: usize,
        /// What the module is.
        sizes: String,
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
    /// A method that knows linear layers only.
    #[error(
        "{method} cannot adapt {module}, which is an embedding\nhint: leave it out of target_modules; lora can adapt it"
    )]
    Embedding {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
    },
    /// A method that has no form for convolutions.
    #[error(
        "{method} cannot adapt {module}: it is a convolution, and {method} has a form for linear layers only\nhint: use lora \
         or tucker, or keep convolutions out of target_modules (exclude_modules = [\"{}\"])",
        last_part(.module)
    )]
    Convolution {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
    },
    /// The method cannot start on a layer.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Reading or writing failed.
    #[error(transparent)]
    Files(#[from] HfError),
}

/// What to do about a rank that is too large, beside lowering it.
fn other_ways(key: &str) -> &'static str {
    match key {
        "r" => "set rank_pattern for this module",
        _ => "leave this module out by exclude_modules",
    }
}

fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// What was attached.
#[derive(Clone, Debug, Default)]
pub struct Attached {
    /// Modules with an adapter, in model order.
    pub modules: Vec<String>,
    /// Parameters of the base that are trained whole.
    pub saved: Vec<String>,
    /// Frozen tensors that all layers share.
    pub shared: Shared,
}

/// A layer's name and sizes.
pub type Target = (String, Sizes);

/// All layers that can have an adapter, in model order.
pub fn layers<M: Network>(model: &M) -> Vec<Target> {
    let mut found = vec![];
    // The walk is one that may change layers, and hands over handles: a copy of the model shares its values.
    model.clone().for_each_layer(&mut |module, layer| found.push((module.to_owned(), layer.sizes())));
    found
}

/// Freezes the base and attaches fresh adapters where the configuration says so.
///
/// # Errors
/// No module matches; a rank is larger than its layer; an unknown start; a method that cannot start on a layer.
pub fn attach<M: Network>(
    model: &mut M,
    config: &AdapterConfig,
    mut fresh: Fresh<'_>,
) -> Result<Attached, AdapterError> {
    untie(model, config);
    let targets = targets(model, config)?;
    for (module, sizes) in &targets {
        start::check_rank(config, module, *sizes)?;
    }
    let shared = Shared::new(config, &targets, &model.device());
    let (total, mut done) = (targets.len(), 0);
    on_targets(model, &targets, &mut |module, layer| {
        done += 1;
        (fresh.progress)(module, done, total);
        match layer {
            Layer::Linear(projection) => start::attach(config, module, projection, &mut fresh, &shared),
            Layer::Conv(conv) => start::convolution(config, module, conv, Some(fresh.seed)),
        }
    })?;
    finish(model, config, targets, shared, Some(fresh.seed))
}

/// Whether a linear layer or an embedding gets an adapter.
fn is_target(config: &AdapterConfig, module: &str) -> bool {
    config.targets(module) && !config.saves(module)
}

/// Layers that get an adapter, with their sizes, in model order.
///
/// # Errors
/// One of them is a convolution, for which the method has no form.
pub fn targets<M: Network>(model: &M, config: &AdapterConfig) -> Result<Vec<Target>, AdapterError> {
    let is_wanted = |(module, sizes): &Target| match sizes {
        Sizes::Linear(_) => is_target(config, module),
        Sizes::Conv(_) => config.targets_convolution(module) && !config.saves(module),
    };
    let targets: Vec<Target> = layers(model).into_iter().filter(is_wanted).collect();
    match targets.iter().find(|(_, sizes)| sizes.is_conv() && !config.method.adapts_convolutions()) {
        Some((module, _)) => Err(AdapterError::Convolution { method: config.method.name(), module: module.to_owned() }),
        None => Ok(targets),
    }
}

/// Calls `change` for these layers until one of them is refused.
fn on_targets<M: Network>(
    model: &mut M,
    targets: &[Target],
    change: &mut dyn FnMut(&str, Layer<'_>) -> Result<(), AdapterError>,
) -> Result<(), AdapterError> {
    let (mut left, mut result) = (targets.iter().map(|(module, _)| module).peekable(), Ok(()));
    model.for_each_layer(&mut |module, layer| {
        if result.is_ok() && left.next_if(|target| *target == module).is_some() {
            result = change(module, layer);
        }
    });
    result
}

/// Attaches adapters of the right shapes whose values come from a folder.
fn attach_empty<M: Network>(model: &mut M, config: &AdapterConfig, shared: Shared) -> Result<Attached, AdapterError> {
    untie(model, config);
    let targets = targets(model, config)?;
    on_targets(model, &targets, &mut |module, layer| {
        match layer {
            Layer::Linear(projection) => {
                projection.delta = Some(start::empty(config, module, projection, &shared)?);
            }
            Layer::Conv(conv) => start::convolution(config, module, conv, None)?,
        }
        Ok(())
    })?;
    finish(model, config, targets, shared, None)
}

/// The embedding, and what is trained whole.
fn finish<M: Network>(
    model: &mut M,
    config: &AdapterConfig,
    targets: Vec<Target>,
    shared: Shared,
    seed: Option<u64>,
) -> Result<Attached, AdapterError> {
    let mut modules: Vec<String> = targets.into_iter().map(|(module, _)| module).collect();
    let device = model.device();
    if let Some((module, embedding)) = model.embedding()
        && is_target(config, module)
    {
        if config.method != MethodConfig::Lora {
            return Err(AdapterError::Embedding { method: config.method.name(), module: module.to_owned() });
        }
        embedding.delta = Some(start::embedding(config, module, embedding.weight.dims(), seed, &device)?);
        modules.push(module.to_owned());
    }
    if modules.is_empty() {
        return Err(AdapterError::NoTarget { wanted: wanted(config), known: known_modules(model) });
    }
    let saved = train_saved(model, config);
    let names_nothing = |wanted: &&ModulePattern| !saved.iter().any(|name| is_saved_as(name, wanted.text()));
    match config.modules_to_save.iter().find(names_nothing) {
        // peft's folders of classifiers name both `classifier` and `score`, of which a model has one.
        Some(wanted) if seed.is_some() => return Err(AdapterError::NothingToSave(wanted.text().to_owned())),
        _ => {}
    }
    Ok(Attached { modules, saved, shared })
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

fn known_modules<M: Network>(model: &mut M) -> String {
    let mut names: Vec<String> = vec![];
    let mut add = |module: &str| {
        let last = last_part(module).to_owned();
        if !names.contains(&last) {
            names.push(last);
        }
    };
    layers(model).iter().for_each(|(module, _)| add(module));
    if let Some((module, _)) = model.embedding() {
        add(module);
    }
    format!("{} blocks, numbered from 0, and the modules {}", model.blocks().len(), names.join(", "))
}

/// A tied head differs from the embedding where one of them is trained whole or adapted. As in peft, what is not trained keeps
/// the base's weight.
fn untie<M: Network>(model: &mut M, config: &AdapterConfig) {
    let embedding = model.embedding().map(|(module, _)| module);
    let head = config.saves("lm_head") || config.targets("lm_head");
    if head || embedding.is_some_and(|module| config.saves(module)) {
        model.untie_head();
    }
}

/// Trains the modules of `modules_to_save` whole and nothing else of the base; returns their parameters.
fn train_saved<M: Network>(model: &mut M, config: &AdapterConfig) -> Vec<String> {
    let mut saved = vec![];
    *model = parameters::set_trained(model.clone(), |name| {
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
    saved
}
