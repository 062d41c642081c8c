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
    /// The method cannot start on a layer.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Reading or writing failed.
    #[error(transparent)]
    Files(#[from] HfError),
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

/// The names of all linear layers, in model order.
pub fn module_names<M: Network>(model: &M) -> Vec<String> {
    let mut names = vec![];
    for (index, block) in model.blocks().iter().enumerate() {
        let block_name = model.block_name(index);
        names.extend(M::projections(block).into_iter().map(|(name, _)| format!("{block_name}.{name}")));
    }
    let head = model.head();
    names.extend(M::head_projections(&head).into_iter().map(|(name, _)| name));
    names
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
    let targets = targets(model, config);
    for (module, dims) in &targets {
        start::check_rank(config, module, *dims)?;
    }
    let shared = Shared::new(config, &targets, &model.device());
    let (total, mut done, mut problem) = (targets.len(), 0, None);
    model.for_each_projection(&mut |module, projection| {
        if problem.is_none() && is_target(config, module) {
            done += 1;
            (fresh.progress)(module, done, total);
            problem = start::attach(config, module, projection, &mut fresh, &shared).err();
        }
    });
    if let Some(problem) = problem {
        return Err(problem);
    }
    finish(model, config, targets, shared, Some(fresh.seed))
}

/// Whether a linear layer gets an adapter.
fn is_target(config: &AdapterConfig, module: &str) -> bool {
    config.targets(module) && !config.saves(module)
}

/// Linear layers that get an adapter, with their sizes.
pub fn targets<M: Network>(model: &mut M, config: &AdapterConfig) -> Vec<(String, [usize; 2])> {
    let mut found = vec![];
    model.for_each_projection(&mut |module, projection| {
        if is_target(config, module) {
            found.push((module.to_owned(), projection.dims()));
        }
    });
    found
}

/// Attaches adapters of the right shapes whose values come from a folder.
fn attach_empty<M: Network>(model: &mut M, config: &AdapterConfig, shared: Shared) -> Result<Attached, AdapterError> {
    untie(model, config);
    let targets = targets(model, config);
    let mut problem = None;
    model.for_each_projection(&mut |module, projection| {
        if problem.is_none() && is_target(config, module) {
            match start::empty(config, module, projection, &shared) {
                Ok(delta) => projection.delta = Some(delta),
                Err(error) => problem = Some(error),
            }
        }
    });
    match problem {
        Some(problem) => Err(problem),
        None => finish(model, config, targets, shared, None),
    }
}

/// The embedding, and what is trained whole.
fn finish<M: Network>(
    model: &mut M,
    config: &AdapterConfig,
    targets: Vec<(String, [usize; 2])>,
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
        let last = module.rsplit('.').next().unwrap_or(module).to_owned();
        if !names.contains(&last) {
            names.push(last);
        }
    };
    module_names(model).iter().for_each(|module| add(module));
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
