//! Adapters of any method as a plain LoRA folder, which every PEFT reader takes.
//!
//! A delta that is a product stays one, exactly: `s (((x A) M) B) * c` becomes `s (x A) (M B diag(c))`, and a start that moved a
//! part of the weight into the factors becomes a product of twice the rank over the unchanged weight. A method that acts on the
//! weight in another way has the dense delta `W' - W`, of which the leading singular triples are kept; the error that is told is
//! `||delta - A B|| / ||delta||` (Frobenius).
//!
//! | methods | rank of the pair | error |
//! | --- | --- | --- |
//! | LoRA (also rsLoRA), EoRA, LoRA-XS, LoRA-SB, SVFit | r | 0 |
//! | linear FLoRA | the smaller one of its two | 0 |
//! | PiSSA, OLoRA, CorDA | 2r | 0 |
//! | VeRA | r, at most that of the layer | 0; f32 rounding where r is larger than the layer |
//! | HRA | r: its reflections change that many directions | f32 rounding |
//! | DoRA, RandLoRA, OFT | chosen by rank or tolerance | stated |
//!
//! The scale is written so that readers agree: all modules have the same one, `lora_alpha / r` without rsLoRA's root, which some
//! converters do not know; a module of another scale has the quotient in its B. A module of another rank is in `rank_pattern` and,
//! for the same scale, in `alpha_pattern`. Many servers read neither, and differ in what they then divide alpha by: for them
//! [`same_rank`] fills up all factors with zeros.

mod fold;
mod layout;

use std::path::Path;

use burn::tensor::Tensor;
use lowrank_core::Delta;

use crate::hf::peft::{AdapterTensor, CONFIG_FILE, KeyForm, MethodConfig, Part, WEIGHTS_FILE};
use crate::hf::{AdapterConfig, Dtype, HfError, OutTensor, dtype, write_safetensors, write_text_atomic};
use crate::network::Network;
use crate::save::host_values;

pub use fold::{Folded, Limit, fold_dense, fold_pair};
pub use layout::{Layout, layout};

/// What can go wrong with an export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The delta is no product, and nothing says how many directions of it to keep.
    #[error(
        "a {method} adapter is no LoRA of small rank: say how much of it to keep\nhint: --rank R keeps R directions of each \
         layer, --tolerance 0.1 as many as leave out a tenth of the update"
    )]
    NoLimit {
        /// The method.
        method: &'static str,
    },
    /// A module's adapter holds NaN or infinity.
    #[error(
        "the adapter of {module} is not finite, so it cannot be folded\nhint: use an earlier checkpoint of the run"
    )]
    NotFinite {
        /// The module.
        module: String,
    },
    /// The model has no adapter.
    #[error("the model has no adapter to export")]
    NoAdapter,
    /// Writing failed.
    #[error(transparent)]
    Files(#[from] HfError),
}

/// The adapter of one module as a product.
#[derive(Debug)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Whether it is the token embedding.
    pub is_embedding: bool,
    /// s of the product.
    pub scale: f64,
    /// The factors, and what they leave out.
    pub folded: Folded,
}

/// Whether a method's update is a product of small rank, so that no limit has to be given.
pub fn is_exact(method: &MethodConfig) -> bool {
    !matches!(method, MethodConfig::Dora | MethodConfig::RandLora { .. } | MethodConfig::Oft { .. })
}

/// Every adapter of the model as a product; `progress` is told the module, its number and how many there are, before each.
///
/// # Errors
/// The method needs a limit and there is none; an adapter that is not finite; no adapter.
pub fn fold_adapters<M: Network>(
    model: &mut M,
    config: &AdapterConfig,
    limit: Limit,
    progress: &mut dyn FnMut(&str, usize, usize),
) -> Result<Vec<Module>, ExportError> {
    if !is_exact(&config.method) && limit.is_none() {
        return Err(ExportError::NoLimit { method: config.method.name() });
    }
    let mut total = 0;
    model.for_each_projection(&mut |_, projection| total += usize::from(projection.delta.is_some()));
    let mut modules: Vec<Result<Module, ExportError>> = vec![];
    model.for_each_projection(&mut |name, projection| {
        let Some(delta) = &projection.delta else { return };
        if modules.last().is_some_and(Result::is_err) {
            return;
        }
        progress(name, modules.len() + 1, total);
        modules.push(fold(name, delta, || projection.weight.values(), config, limit));
    });
    if let Some((name, embedding)) = model.embedding()
        && let Some(lowrank) = &embedding.delta
    {
        let (down, up) = lowrank.factors();
        let folded = fold_pair(down, up, limit);
        modules.push(checked(Module {
            name: name.to_owned(),
            is_embedding: true,
            scale: config.scale_of(name),
            folded,
        }));
    }
    let modules = modules.into_iter().collect::<Result<Vec<_>, _>>()?;
    if modules.is_empty() { Err(ExportError::NoAdapter) } else { Ok(modules) }
}

fn fold(
    name: &str,
    delta: &Delta,
    weight: impl FnOnce() -> Tensor<2>,
    config: &AdapterConfig,
    limit: Limit,
) -> Result<Module, ExportError> {
    let (scale, folded) = match delta.low_rank() {
        Some(lowrank) => {
            let (down, up) = fold::factors(lowrank);
            let [d_in, d_out] = [down.dims()[0], up.dims()[1]];
            // LoRA itself stays as it is, whatever its rank.
            let most = if config.method == MethodConfig::Lora { usize::MAX } else { d_in.min(d_out) };
            (config.scale_of(name), fold_pair(down, up, limit.at_most(most)))
        }
        None => {
            let weight = weight();
            let difference = delta.merged(weight.clone()) - weight;
            // Reflections change only so many directions; what else there is is rounding.
            let most =
                if matches!(config.method, MethodConfig::Hra { .. }) { config.rank_of(name) } else { usize::MAX };
            (1.0, fold_dense(difference, limit.at_most(most)))
        }
    };
    checked(Module { name: name.to_owned(), is_embedding: false, scale, folded })
}

fn checked(module: Module) -> Result<Module, ExportError> {
    let Folded { down, up, error } = &module.folded;
    match error.is_finite() && fold::is_finite(down) && fold::is_finite(up) {
        true => Ok(module),
        false => Err(ExportError::NotFinite { module: module.name }),
    }
}

/// Fills up the factors with zeros to the largest rank, so that rank and scale are those of every module to every reader.
pub fn same_rank(modules: &mut [Module]) {
    let rank = |module: &Module| module.folded.down.dims()[1];
    let most = modules.iter().map(rank).max().unwrap_or(0);
    for module in modules {
        let missing = most - rank(module);
        if missing > 0 {
            let Folded { down, up, .. } = &mut module.folded;
            let device = down.device();
            let columns = Tensor::zeros([down.dims()[0], missing], &device);
            let rows = Tensor::zeros([missing, up.dims()[1]], &device);
            *down = Tensor::cat(vec![down.clone(), columns], 1);
            *up = Tensor::cat(vec![up.clone(), rows], 0);
        }
    }
}

/// The settings of the LoRA folder that holds these modules, of `all` modules of the model, and what each B is multiplied by.
pub fn lora_config(config: &AdapterConfig, modules: &[Module], all: &[String]) -> (AdapterConfig, Vec<f64>) {
    let rows: Vec<(&str, usize, f64)> =
        modules.iter().map(|module| (module.name.as_str(), module.folded.down.dims()[1], module.scale)).collect();
    let Layout { r, lora_alpha, rank_pattern, alpha_pattern, factors } = layout(&rows);
    let names: Vec<String> = modules.iter().map(|module| module.name.clone()).collect();
    let targets = crate::hf::peft::Modules::Names(crate::hf::peft::shortest_names(&names, all));
    let lora = AdapterConfig {
        lora_dropout: config.lora_dropout,
        modules_to_save: config.modules_to_save.clone(),
        rank_pattern,
        alpha_pattern,
        base_model_name_or_path: config.base_model_name_or_path.clone(),
        task_type: config.task_type.clone(),
        ..AdapterConfig::new(r, lora_alpha, targets)
    };
    (lora, factors)
}

/// Writes a PEFT LoRA folder: the factors in `dtype`, and `saved`, the modules that were trained whole, as they are. The
/// configuration is written last.
///
/// # Errors
/// Anything the disk refuses.
pub fn write_lora(
    folder: &Path,
    config: &AdapterConfig,
    modules: Vec<Module>,
    factors: &[f64],
    saved: Vec<OutTensor<'_>>,
    dtype: Dtype,
) -> Result<(), HfError> {
    std::fs::create_dir_all(folder).map_err(|source| HfError::io("create", folder, source))?;
    let mut tensors = saved;
    for (module, factor) in modules.into_iter().zip(factors) {
        let Module { name, is_embedding, folded: Folded { down, up, .. }, .. } = module;
        let parts = if is_embedding { [Part::EmbeddingA, Part::EmbeddingB] } else { [Part::A, Part::B] };
        let up = if *factor == 1.0 { up } else { up * *factor as f32 };
        for (part, value) in parts.into_iter().zip([down, up]) {
            tensors.push(stored(&AdapterTensor::new(name.as_str(), part).key(KeyForm::Peft), value, dtype));
        }
    }
    write_safetensors(&folder.join(WEIGHTS_FILE), tensors, &[("format", "pt")])?;
    let text = format!("{:#}\n", config.to_json());
    write_text_atomic(&folder.join(CONFIG_FILE), &text)
}

/// A factor as it lies on disk, with its axes swapped.
fn stored(key: &str, value: Tensor<2>, dtype: Dtype) -> OutTensor<'static> {
    let [rows, cols] = value.dims();
    OutTensor::new(key, dtype, &[cols, rows], move || dtype::from_f32(&host_values(value.transpose()), dtype))
}

#[cfg(test)]
#[path = "export/tests.rs"]
mod tests;
