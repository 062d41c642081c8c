//! The adapter of one module: a fresh one by its method's start, or an empty one that takes what a folder holds.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_core::adapters::corda::{self, Corda};
use lowrank_core::adapters::dora::DoraConfig;
use lowrank_core::adapters::eora::Eora;
use lowrank_core::adapters::hra::HraSettings;
use lowrank_core::adapters::lora::{Lora, LoraInit};
use lowrank_core::adapters::lora_sb::LoraSb;
use lowrank_core::adapters::lora_xs::LoraXs;
use lowrank_core::adapters::oft::{Cayley, OftSettings};
use lowrank_core::adapters::olora::Olora;
use lowrank_core::adapters::pissa::Pissa;
use lowrank_core::adapters::randlora::{Density, RandLoraBases, RandLoraSettings};
use lowrank_core::adapters::svfit::{self, Svfit};
use lowrank_core::adapters::tucker::Tucker;
use lowrank_core::adapters::vera::{Vera, VeraBases};
use lowrank_core::adapters::{Site, Statistics};
use lowrank_core::conv::{ConvProjection, LoraConvSettings, TuckerConvSettings};
use lowrank_core::random::Stream;
use lowrank_core::{Delta, LowRank, Projection, Sizes};

use super::files::matrix;
use super::{AdapterError, Target};
use crate::hf::peft::{CordaMethod, InitLoraWeights, MethodConfig, Part};
use crate::hf::{AdapterConfig, HfError};
use crate::network::Network;

/// Length of LoRA-SB's first step where the configuration names none and no learning rate is known.
const DEFAULT_ETA: f64 = 1e-4;

/// Gives the weight of a module at full precision, `[d_in, d_out]` in f32, where the base holds a quantised one.
pub type Original<'a> = &'a mut dyn FnMut(&str) -> Result<Tensor<2>, HfError>;

/// What a fresh adapter starts from.
pub struct Fresh<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// What a calibration pass measured, by module.
    pub statistics: &'a BTreeMap<String, Statistics>,
    /// Weights at full precision over a quantised base.
    pub original: Original<'a>,
    /// Told the module, its number and how many there are, before each start.
    pub progress: &'a mut dyn FnMut(&str, usize, usize),
}

/// Frozen tensors that all adapted layers of a model share.
#[derive(Clone, Debug, Default)]
pub enum Shared {
    /// None: most methods.
    #[default]
    Nothing,
    /// VeRA's factors.
    Vera(VeraBases),
    /// RandLoRA's bases.
    RandLora(RandLoraBases),
}

impl Shared {
    /// Those of a fresh adapter on layers of these sizes.
    pub(super) fn new(config: &AdapterConfig, targets: &[Target], device: &Device) -> Self {
        let largest = |axis: usize| targets.iter().map(|(_, sizes)| sizes.matrix()[axis]).max().unwrap_or(1);
        match &config.method {
            MethodConfig::Vera { projection_prng_key, .. } => {
                Self::Vera(VeraBases::new(largest(0), largest(1), config.r, *projection_prng_key, device))
            }
            MethodConfig::RandLora { projection_prng_key, sparse, very_sparse } => {
                let density = match (sparse, very_sparse) {
                    (_, true) => Density::VerySparse,
                    (true, _) => Density::Sparse,
                    _ => Density::Dense,
                };
                let seed = *projection_prng_key;
                Self::RandLora(RandLoraBases::new(largest(0), largest(1), config.r, density, seed, device))
            }
            _ => Self::Nothing,
        }
    }

    /// Those of a stored adapter; `take` hands over a shared tensor of the file.
    pub(super) fn from_file(
        config: &AdapterConfig,
        device: &Device,
        take: &mut dyn FnMut(Part) -> Option<(Vec<usize>, Vec<f32>)>,
    ) -> Result<Self, String> {
        let mut pair = |a: Part, b: Part| match (take(a), take(b)) {
            (Some(a), Some(b)) => Ok((a, b)),
            _ => Err("the random bases are missing from the file (save_projection)".to_owned()),
        };
        match &config.method {
            MethodConfig::Vera { .. } => {
                let ((a_shape, a), (b_shape, b)) = pair(Part::VeraBaseA, Part::VeraBaseB)?;
                let ([r, d_in], [d_out, _]) = (two(&a_shape)?, two(&b_shape)?);
                let down = matrix(a, [r, d_in], device).transpose();
                Ok(Self::Vera(VeraBases::given(down, matrix(b, [d_out, r], device).transpose())))
            }
            MethodConfig::RandLora { .. } => {
                let ((a_shape, a), (b_shape, b)) = pair(Part::RandBaseA, Part::RandBaseB)?;
                let tensor = |shape: &[usize], values| match <[usize; 3]>::try_from(shape) {
                    Ok(dims) => Ok(Tensor::<3>::from_data(TensorData::new(values, dims), device)),
                    Err(_) => Err(format!("a shared basis has shape {shape:?}, expected three axes")),
                };
                Ok(Self::RandLora(RandLoraBases::from_peft(tensor(&a_shape, a)?, tensor(&b_shape, b)?)))
            }
            _ => Ok(Self::Nothing),
        }
    }

    /// The tensors as a file has them: module, part, shape, values as a matrix.
    pub(super) fn tensors(&self, modules: &[String]) -> Vec<(String, Part, Vec<usize>, Tensor<2>)> {
        match self {
            Self::Nothing => vec![],
            Self::Vera(bases) => {
                let (down, up) = bases.full();
                let part = |part, value: Tensor<2>| (String::new(), part, value.dims().to_vec(), value);
                vec![part(Part::VeraBaseA, down.transpose()), part(Part::VeraBaseB, up.transpose())]
            }
            Self::RandLora(bases) => {
                let (a, b) = bases.to_peft();
                let matrix = |basis: &Tensor<3>| {
                    let dims = basis.dims();
                    (dims.to_vec(), basis.clone().reshape([dims[0], dims[1] * dims[2]]))
                };
                let ((a_shape, a), (b_shape, b)) = (matrix(&a), matrix(&b));
                let both = |module: &str| {
                    [
                        (module.to_owned(), Part::RandBaseA, a_shape.clone(), a.clone()),
                        (module.to_owned(), Part::RandBaseB, b_shape.clone(), b.clone()),
                    ]
                };
                // peft looks for them in every module.
                modules.iter().map(String::as_str).chain([""]).flat_map(both).collect()
            }
        }
    }
}

fn two(shape: &[usize]) -> Result<[usize; 2], String> {
    <[usize; 2]>::try_from(shape).map_err(|_| format!("a shared basis has shape {shape:?}, expected two axes"))
}

/// Refuses a rank that a layer is too small for.
pub(super) fn check_rank(config: &AdapterConfig, module: &str, sizes: Sizes) -> Result<(), AdapterError> {
    let check = |key: &'static str, rank: usize, most: usize| match rank > most {
        true => Err(AdapterError::RankTooLarge {
            module: module.to_owned(),
            key,
            rank,
            most,
            sizes: match sizes {
                Sizes::Linear([d_in, d_out]) => format!("it maps {d_in} to {d_out}"),
                Sizes::Conv([d_out, d_in, kh, kw]) => {
                    format!("its kernel of {kh} x {kw} takes {d_in} channels to {d_out}")
                }
            },
        }),
        false => Ok(()),
    };
    let [d_in, d_out] = sizes.matrix();
    match &config.method {
        MethodConfig::Vera { .. } | MethodConfig::RandLora { .. } | MethodConfig::Oft { .. } => Ok(()),
        MethodConfig::Tucker { r_in, r_out, .. } => {
            let channels = if let Sizes::Conv([_, channels, ..]) = sizes { channels } else { d_in };
            check("r_in", *r_in, channels).and_then(|()| check("r_out", *r_out, d_out))
        }
        MethodConfig::Hra { .. } => check("r", config.rank_of(module), d_in),
        _ => check("r", config.rank_of(module), d_in.min(d_out)),
    }
}

/// Puts a fresh adapter on one layer, as [`super::attach`] does on all that the configuration names.
///
/// # Errors
/// A method that cannot start on the layer; a file of the original weight that cannot be read.
pub fn attach(
    config: &AdapterConfig,
    module: &str,
    projection: &mut Projection,
    fresh: &mut Fresh<'_>,
    shared: &Shared,
) -> Result<(), AdapterError> {
    let is_quantised = projection.weight.is_quantised();
    let weight = match is_quantised && starts_from_weight(&config.method) {
        true => (fresh.original)(module)?,
        false => projection.weight.values(),
    };
    let residual = is_quantised.then(|| weight.clone() - projection.weight.values());
    let site = Site {
        module,
        weight: weight.clone(),
        residual,
        seed: fresh.seed,
        stream: Stream::new(fresh.seed, module),
        statistics: fresh.statistics.get(module),
    };
    let delta = delta(config, &site, shared)?;
    projection.attach_over(delta, weight);
    Ok(())
}

/// Puts an adapter on a convolution; without a seed its values come from a folder.
pub(super) fn convolution(
    config: &AdapterConfig,
    module: &str,
    conv: &mut ConvProjection,
    seed: Option<u64>,
) -> Result<(), AdapterError> {
    let (scale, dropout) = (config.scale_of(module) as f32, config.lora_dropout);
    match &config.method {
        MethodConfig::Lora => {
            let init = if seed.is_some() { lora_init(config)? } else { LoraInit::default() };
            let settings = LoraConvSettings { r: config.rank_of(module), scale, dropout, init };
            conv.attach_lora(settings, module, seed.unwrap_or(0))?;
        }
        MethodConfig::Tucker { r_in, r_out, r_rows, r_columns, .. } => {
            let settings = TuckerConvSettings { ranks: [*r_in, *r_out, *r_rows, *r_columns], scale, dropout };
            conv.attach_tucker(settings, module, seed.unwrap_or(0))?;
        }
        method => {
            return Err(AdapterError::Convolution { method: method.name(), module: module.to_owned() });
        }
    }
    Ok(())
}

/// Whether the start looks at the weight.
fn starts_from_weight(method: &MethodConfig) -> bool {
    use MethodConfig as M;
    match method {
        M::Lora | M::Vera { .. } | M::RandLora { .. } | M::Tucker { .. } | M::Hra { .. } | M::Oft { .. } => false,
        // DoRA's magnitude is that of the base as it acts.
        M::Dora => false,
        M::Pissa { .. } | M::Olora | M::Corda { .. } | M::Eora { .. } | M::LoraXs | M::LoraSb { .. } | M::Svfit => true,
    }
}

fn delta(config: &AdapterConfig, site: &Site<'_>, shared: &Shared) -> Result<Delta, AdapterError> {
    let (r, dropout) = (config.rank_of(site.module), config.lora_dropout);
    let scale = config.scale_of(site.module) as f32;
    let [d_in, d_out] = site.dims();
    Ok(match &config.method {
        MethodConfig::Lora => {
            let lora = Lora { r, scale, dropout, init: lora_init(config)? };
            Delta::LowRank(lora.init(d_in, d_out, site.stream, &site.weight.device()))
        }
        MethodConfig::Dora => {
            Delta::Dora(DoraConfig { lora: Lora { r, scale, dropout, init: lora_init(config)? } }.init(site)?)
        }
        MethodConfig::Pissa { niter } => Delta::LowRank(Pissa { r, scale, dropout, niter: *niter }.init(site)?),
        MethodConfig::Olora => Delta::LowRank(Olora { r, scale, dropout }.init(site)?),
        MethodConfig::Corda { corda_method } => {
            let mode = match corda_method {
                CordaMethod::Ipm => corda::CordaMethod::Ipm,
                CordaMethod::Kpm => corda::CordaMethod::Kpm,
            };
            Delta::LowRank(Corda { r, scale, dropout, method: mode }.init(site)?)
        }
        MethodConfig::Eora { trained } => Delta::LowRank(Eora { r, dropout, trained: *trained }.init(site)?),
        MethodConfig::LoraXs => Delta::LowRank(LoraXs { r, scale, dropout }.init(site)?),
        MethodConfig::LoraSb { eta } => {
            Delta::LowRank(LoraSb { r, scale, dropout, eta: eta.unwrap_or(DEFAULT_ETA) }.init(site)?)
        }
        MethodConfig::Svfit => Delta::LowRank(Svfit { r, dropout }.init(site)?),
        MethodConfig::Vera { d_initial, .. } => {
            let Shared::Vera(bases) = shared else { unreachable!("made for the method") };
            Delta::LowRank(Vera { r: config.r, d_initial: *d_initial, dropout }.init(site, bases)?)
        }
        MethodConfig::RandLora { .. } => {
            let Shared::RandLora(bases) = shared else { unreachable!("made for the method") };
            Delta::RandLora(RandLoraSettings { r: config.r, scale, dropout }.init(site, bases)?)
        }
        MethodConfig::Tucker { r_in, r_out, scale, .. } => {
            let tucker = Tucker { r_in: *r_in, r_out: *r_out, scale: *scale as f32, dropout };
            Delta::LowRank(tucker.init(site)?)
        }
        MethodConfig::Hra { apply_gs } => Delta::Hra(HraSettings { r, apply_gs: *apply_gs }.init(site)?),
        MethodConfig::Oft { .. } => Delta::Oft(oft_settings(&config.method).init(site)?),
    })
}

fn oft_settings(method: &MethodConfig) -> OftSettings {
    let MethodConfig::Oft { oft_block_size, use_cayley_neumann, num_cayley_neumann_terms, coft, eps, block_share } =
        method
    else {
        unreachable!("only for OFT")
    };
    OftSettings {
        block: *oft_block_size,
        cayley: if *use_cayley_neumann { Cayley::Neumann(*num_cayley_neumann_terms) } else { Cayley::Exact },
        coft: coft.then_some(*eps),
        block_share: *block_share,
    }
}

fn lora_init(config: &AdapterConfig) -> Result<LoraInit, AdapterError> {
    match &config.init_lora_weights {
        InitLoraWeights::Default => Ok(LoraInit::KaimingUniform),
        InitLoraWeights::Named(name) if name == "gaussian" => Ok(LoraInit::Gaussian),
        InitLoraWeights::Named(name) => Err(AdapterError::UnknownInit(name.clone())),
        InitLoraWeights::Random => Err(AdapterError::UnknownInit("false".to_owned())),
    }
}

/// LoRA on an embedding; without a seed its values come from a folder.
pub(super) fn embedding(
    config: &AdapterConfig,
    module: &str,
    [vocab, dim]: [usize; 2],
    seed: Option<u64>,
    device: &Device,
) -> Result<LowRank, AdapterError> {
    let (r, scale) = (config.rank_of(module), config.scale_of(module) as f32);
    let lora = Lora { r, scale, dropout: 0.0, init: LoraInit::default() };
    Ok(lora.init_embedding(vocab, dim, Stream::new(seed.unwrap_or(0), module), device))
}

/// An adapter of the right shapes, for values from a folder.
pub(super) fn empty(
    config: &AdapterConfig,
    module: &str,
    projection: &Projection,
    shared: &Shared,
) -> Result<Delta, AdapterError> {
    let (r, dropout) = (config.rank_of(module), config.lora_dropout);
    let scale = config.scale_of(module) as f32;
    let [d_in, d_out] = projection.dims();
    let device = projection.device();
    let factors = |scale: f32| {
        LowRank::new(Tensor::zeros([d_in, r], &device), Tensor::zeros([r, d_out], &device), scale, dropout)
    };
    let core = |rows: usize| Tensor::zeros([rows, r], &device);
    Ok(Delta::LowRank(match &config.method {
        MethodConfig::Lora => factors(scale),
        MethodConfig::Pissa { .. } | MethodConfig::Olora | MethodConfig::Corda { .. } => factors(scale).with_start(),
        MethodConfig::Eora { trained: true } => factors(1.0),
        MethodConfig::Eora { trained: false } => factors(1.0).frozen(),
        MethodConfig::LoraXs | MethodConfig::LoraSb { .. } => factors(scale).with_core(core(r)).frozen_factors(),
        MethodConfig::Svfit => factors(1.0).with_core(core(1)).with_core_start(core(1)).frozen_factors(),
        MethodConfig::Dora
        | MethodConfig::Vera { .. }
        | MethodConfig::RandLora { .. }
        | MethodConfig::Tucker { .. }
        | MethodConfig::Hra { .. }
        | MethodConfig::Oft { .. } => {
            let site = Site {
                module,
                weight: projection.weight.values(),
                residual: None,
                seed: 0,
                stream: Stream::new(0, module),
                statistics: None,
            };
            return delta(config, &site, shared);
        }
    }))
}

/// What depends on the values that a folder brought: the base without what the factors started with, the origin of a core.
pub(super) fn finish_loaded<M: Network>(
    model: &mut M,
    config: &AdapterConfig,
    original: Original<'_>,
) -> Result<(), AdapterError> {
    if !config.method.doubles_rank() && config.method != MethodConfig::Svfit {
        return Ok(());
    }
    let mut problem = None;
    model.for_each_projection(&mut |module, projection| {
        let Some(Delta::LowRank(mut lowrank)) = projection.delta.take() else { return };
        let weight = match projection.weight.is_quantised() {
            false => projection.weight.values(),
            true => match original(module) {
                Ok(weight) => weight,
                Err(error) => {
                    problem = Some(error);
                    return;
                }
            },
        };
        if config.method == MethodConfig::Svfit {
            let origin = svfit::values(&lowrank.down.val(), &weight, &lowrank.up.val());
            lowrank = lowrank.with_core_start(origin);
        }
        projection.attach_over(Delta::LowRank(lowrank), weight);
    });
    match problem {
        Some(problem) => Err(problem.into()),
        None => Ok(()),
    }
}
