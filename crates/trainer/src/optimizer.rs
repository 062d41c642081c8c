//! From the `[optimizer.<method>]` table to an optimiser that manages the right matrices of a model.

mod storage;

use lowrank_core::optim::apollo::Apollo;
use lowrank_core::optim::dct_adamw::{self, DctAdamW, DctBases};
use lowrank_core::optim::fira::{self, Fira};
use lowrank_core::optim::intrinsic::{self, Subspace};
use lowrank_core::optim::ldadam::{LdAdam, LdAdamConfig};
use lowrank_core::optim::q_galore::Quantised;
use lowrank_core::optim::{
    self, AdamForm, AdamWConfig, Galore, MatrixOptimizer, Optimizer, ProjType as Projected, RuleConfig, Weights, galore,
};
use lowrank_models::hf::AdapterConfig;
use lowrank_models::hf::peft::Modules;
use lowrank_models::{Network, parameters};

use crate::config::{
    self, Accumulation, ApolloConfig, GaloreConfig, GradientNorm, Granularity, Inner, IntrinsicConfig, LowRankCommon,
    Merge, Moments, OptimizerConfig, ProjType, QGaloreConfig, QWeightFormat, Residual, RunConfig, Score, TargetModules,
    WeightFormat,
};
use crate::error::Problem;
pub use storage::trained_codes;

/// A matrix that a low-rank method gets.
#[derive(Clone, Debug)]
struct Target {
    /// Name of the parameter.
    name: String,
    /// `[m, n]`.
    dims: [usize; 2],
    /// Its number among the targets, and how many there are.
    place: (usize, usize),
}

/// Builds the optimiser of a run and stores managed weights in the format it wants.
///
/// # Errors
/// `target_modules` matches nothing, or is no regular expression.
pub fn build<M: Network>(config: &RunConfig, model: &mut M) -> Result<Optimizer, Problem> {
    let table = config.optimizer.common();
    let betas = (table.betas[0], table.betas[1]);
    let form = match config.optimizer {
        OptimizerConfig::Adamw(_)
        | OptimizerConfig::DctAdamw(_)
        | OptimizerConfig::Ldadam(_)
        | OptimizerConfig::Intrinsic(_) => AdamForm::Torch,
        _ => AdamForm::Hf,
    };
    let mut optimizer = Optimizer::adamw(AdamWConfig { betas, eps: table.eps, form });
    let Some(low_rank) = config.optimizer.low_rank() else { return Ok(optimizer) };
    let targets = targets(low_rank, table.key, model)?;
    if let OptimizerConfig::Intrinsic(table) = &config.optimizer {
        return intrinsic(table, config.seed, &targets, optimizer, model);
    }
    let rank = low_rank.rank.unwrap_or((model.hidden_size() / 4).max(1));
    let tokens = config.training.micro_batch_size * config.data.max_seq_length;
    warn_of_rank(rank, tokens, &targets);
    let bases = DctBases::default();
    for target in &targets {
        optimizer.manage(&target.name, method(config, target, rank, tokens, &bases));
    }
    let weights = weights(&config.optimizer);
    storage::store(model, &optimizer, weights, storage::type_of(config.dtype));
    storage::announce_codes(config, model);
    Ok(optimizer.with_weights(weights, config.seed))
}

/// Puts the targets into one random subspace and freezes the rest, unless it is trained too.
fn intrinsic<M: Network>(
    table: &IntrinsicConfig,
    seed: u64,
    targets: &[Target],
    mut optimizer: Optimizer,
    model: &mut M,
) -> Result<Optimizer, Problem> {
    let betas = (table.betas[0], table.betas[1]);
    let config = intrinsic::IntrinsicConfig { dims: table.dims, said: table.said, betas, eps: table.eps };
    let subspace = Subspace::new(config, seed, targets.len(), &model.device())
        .map_err(|reason| Problem::config(format!("optimizer.intrinsic.{reason}")))?;
    for target in targets {
        optimizer.manage(&target.name, Box::new(subspace.matrix(&target.name, target.dims)));
    }
    if !table.train_rest {
        *model = parameters::set_trained(model.clone(), |name| (!optimizer.manages(name)).then_some(false));
    }
    Ok(optimizer)
}

fn modules(wanted: &TargetModules, key: &str) -> Result<Modules, Problem> {
    match wanted {
        TargetModules::Pattern(text) => Modules::from_text(text)
            .map_err(|reason| Problem::config(format!("optimizer.{key}.target_modules = \"{text}\": {reason}"))),
        TargetModules::Names(names) => Ok(Modules::Names(names.clone())),
    }
}

/// What `target_modules` names, by the same rules as for adapters.
fn wanted(low_rank: LowRankCommon<'_>, key: &str) -> Result<AdapterConfig, Problem> {
    let mut wanted = AdapterConfig::new(1, 1.0, modules(low_rank.target_modules, key)?);
    wanted.exclude_modules = low_rank.exclude_modules.map(|excluded| modules(excluded, key)).transpose()?;
    Ok(wanted)
}

/// The linear layers among them.
fn targets<M: Network>(low_rank: LowRankCommon<'_>, key: &str, model: &mut M) -> Result<Vec<Target>, Problem> {
    let wanted = wanted(low_rank, key)?;
    let mut found = vec![];
    let mut known = vec![];
    model.for_each_projection(&mut |module, projection| {
        known.push(module.rsplit('.').next().unwrap_or(module).to_owned());
        if wanted.targets(module) {
            found.push((format!("{module}.weight"), projection.dims()));
        }
    });
    if found.is_empty() {
        known.sort();
        known.dedup();
        return Err(Problem::config(format!(
            "optimizer.{key}.target_modules match no linear layer of the model; it has {}",
            known.join(", ")
        ))
        .hint("use \"all-linear\" or some of these names"));
    }
    let count = found.len();
    let target = |(index, (name, dims))| Target { name, dims, place: (index, count) };
    Ok(found.into_iter().enumerate().map(target).collect())
}

/// Tells where a rank does not save arithmetic, and where a batch is too short for it.
fn warn_of_rank(rank: usize, tokens: usize, targets: &[Target]) {
    let without_gain = targets.iter().filter(|target| {
        let [m, n] = target.dims;
        rank >= m * n / (m + n)
    });
    let without_gain = without_gain.count();
    if without_gain > 0 {
        tracing::warn!(
            "rank {rank} is at or above m n / (m + n) of {without_gain} of {} matrices: their projected gradients cost as \
             much as dense ones",
            targets.len()
        );
    }
    if tokens < rank {
        tracing::warn!(
            "a micro batch has at most {tokens} tokens, fewer than the rank {rank}: some directions of a refresh are filled \
             up without gradient"
        );
    }
}

fn weights(optimizer: &OptimizerConfig) -> Weights {
    match optimizer {
        OptimizerConfig::Galore(GaloreConfig { weights: WeightFormat::Bf16, .. }) => Weights::Bf16,
        OptimizerConfig::QGalore(table) => match table.weights {
            QWeightFormat::Int8 => Weights::Int8 { group: table.group_size },
            QWeightFormat::Bf16 => Weights::Bf16,
            QWeightFormat::F32 => Weights::F32,
        },
        _ => Weights::F32,
    }
}

/// Whether managed weights are kept in bf16, which not every device has.
pub fn stores_bf16(optimizer: &OptimizerConfig) -> bool {
    weights(optimizer) == Weights::Bf16
}

fn method(
    config: &RunConfig,
    target: &Target,
    rank: usize,
    tokens: usize,
    bases: &DctBases,
) -> Box<dyn MatrixOptimizer> {
    let (name, seed, dims) = (target.name.as_str(), config.seed, target.dims);
    let table = config.optimizer.common();
    let (betas, eps) = ((table.betas[0], table.betas[1]), table.eps);
    match &config.optimizer {
        OptimizerConfig::Galore(galore) => galore_method(galore, target, rank, tokens, seed),
        OptimizerConfig::QGalore(galore) => q_galore_method(galore, target, rank, tokens, seed),
        OptimizerConfig::DctAdamw(dct) => {
            let config = dct_adamw::DctAdamWConfig {
                rank,
                update_proj_gap: dct.update_proj_gap,
                score: match dct.score {
                    Score::L1 => dct_adamw::Score::L1,
                    Score::L2 => dct_adamw::Score::L2,
                },
                rotate_subspace: dct.rotate_subspace,
                error_feedback: dct.error_feedback,
                projected: dct.projected,
                betas,
                eps,
            };
            Box::new(DctAdamW::new(config, name, seed, dims, bases.clone()))
        }
        OptimizerConfig::Apollo(apollo) => Box::new(Apollo::new(apollo_config(apollo, rank, betas), name, seed, dims)),
        OptimizerConfig::Fira(table) => {
            let config = fira::FiraConfig {
                rank,
                update_proj_gap: table.update_proj_gap,
                scale: table.scale,
                residual: match table.residual {
                    Residual::Paper => fira::Residual::Text,
                    Residual::Code => fira::Residual::Code,
                },
                betas,
                eps,
                ..fira::FiraConfig::default()
            };
            Box::new(Fira::new(config, name, seed, dims))
        }
        OptimizerConfig::Ldadam(table) => {
            let config = LdAdamConfig { rank, rho: table.rho, betas, eps, error_feedback: table.error_feedback };
            Box::new(LdAdam::new(config, name, seed, dims))
        }
        OptimizerConfig::Adamw(_) | OptimizerConfig::Intrinsic(_) => {
            unreachable!("these have no method of one matrix alone")
        }
    }
}

fn apollo_config(table: &ApolloConfig, rank: usize, betas: (f64, f64)) -> optim::apollo::ApolloConfig {
    let start = match table.granularity {
        Granularity::Channel => optim::apollo::ApolloConfig { rank, ..Default::default() },
        Granularity::Tensor => {
            let mini = optim::apollo::ApolloConfig::mini();
            optim::apollo::ApolloConfig { rank: table.rank.unwrap_or(mini.rank), ..mini }
        }
    };
    optim::apollo::ApolloConfig {
        update_proj_gap: table.update_proj_gap,
        scale: table.scale.unwrap_or(start.scale),
        scale_front: table.scale_front,
        betas,
        eps: table.eps,
        ..start
    }
}

fn projected(wanted: Option<ProjType>, exact: bool) -> Projected {
    match wanted {
        Some(ProjType::Input) => Projected::Input,
        Some(ProjType::Output) => Projected::Output,
        Some(ProjType::Std) => Projected::Std,
        Some(ProjType::ReverseStd) => Projected::ReverseStd,
        Some(ProjType::Full) => Projected::Full,
        Some(ProjType::Auto) => Projected::Auto,
        None if exact => Projected::Std,
        None => Projected::Input,
    }
}

/// The matrix's share of the gap, so that refreshes are spread evenly over it.
fn offset(target: &Target, gap: u64, stagger: bool) -> u64 {
    let (index, count) = target.place;
    if stagger { gap * index as u64 / count as u64 } else { 0 }
}

fn rule(table: &GaloreConfig) -> RuleConfig {
    let (betas, eps) = ((table.betas[0], table.betas[1]), table.eps);
    match table.inner {
        Inner::Adamw => RuleConfig::AdamW { betas, eps, form: AdamForm::Hf },
        Inner::Adamw8bit => RuleConfig::AdamW8bit { betas, eps, block: table.block_size },
        Inner::Adafactor => match RuleConfig::adafactor() {
            RuleConfig::Adafactor { decay, eps, clip, .. } => {
                RuleConfig::Adafactor { beta1: table.momentum, decay, eps, clip }
            }
            other => other,
        },
        Inner::Sgd => RuleConfig::Sgd { momentum: table.momentum.unwrap_or(0.9), nesterov: false },
        Inner::Muon => RuleConfig::Muon { momentum: table.momentum.unwrap_or(0.95), steps: 5, nesterov: true },
    }
}

fn galore_method(
    table: &GaloreConfig,
    target: &Target,
    rank: usize,
    tokens: usize,
    seed: u64,
) -> Box<dyn MatrixOptimizer> {
    let config = galore::GaloreConfig {
        rank,
        update_proj_gap: table.update_proj_gap,
        scale: table.scale,
        proj_type: projected(table.proj_type, table.exact),
        exact: table.exact,
        rule: rule(table),
        power_iterations: table.power_iterations,
        oversampling: table.oversampling,
        norm_sketch: table.norm_sketch,
        norm: match table.gradient_norm {
            GradientNorm::Hybrid => galore::Norm::Hybrid,
            GradientNorm::Exact => galore::Norm::Exact,
            GradientNorm::Projected => galore::Norm::Projected,
        },
        accumulation: match table.accumulation {
            Accumulation::Lagged => galore::Accumulation::Lagged,
            Accumulation::Dense => galore::Accumulation::Dense,
            Accumulation::FirstMicroBatch => galore::Accumulation::FirstMicroBatch,
        },
        align_sign: table.align_sign.unwrap_or(!table.exact),
        moments: match table.moments {
            Moments::Keep => galore::Moments::Keep,
            Moments::Rotate => galore::Moments::Rotate,
        },
        merge: match table.merge {
            Merge::Eager => galore::Merge::Eager,
            Merge::Deferred => galore::Merge::Deferred,
        },
        quantised: None,
        tokens,
    };
    let stagger = table.stagger.unwrap_or(!table.exact);
    let offset = offset(target, table.update_proj_gap, stagger);
    Box::new(Galore::new(config, &target.name, seed, target.dims, offset))
}

fn q_galore_method(
    table: &QGaloreConfig,
    target: &Target,
    rank: usize,
    tokens: usize,
    seed: u64,
) -> Box<dyn MatrixOptimizer> {
    let betas = (table.betas[0], table.betas[1]);
    let config = galore::GaloreConfig {
        rank,
        update_proj_gap: table.update_proj_gap,
        scale: table.scale,
        proj_type: projected(table.proj_type, table.exact),
        exact: table.exact,
        rule: RuleConfig::AdamW8bit { betas, eps: table.eps, block: table.block_size },
        align_sign: !table.exact,
        quantised: Some(Quantised {
            basis_bits: table.basis_bits,
            group: table.group_size,
            cos_threshold: table.cos_threshold,
            gamma_proj: table.gamma_proj,
            queue_size: table.queue_size,
        }),
        tokens,
        ..galore::GaloreConfig::default()
    };
    let offset = offset(target, table.update_proj_gap, !table.exact);
    Box::new(Galore::new(config, &target.name, seed, target.dims, offset))
}

/// Whether a layer may be updated before the backward pass has ended. All that most methods need of a step is in the layer's own
/// gradient, so only clipping, accumulation and skipped steps stand against it; a subspace of all layers needs all gradients. In
/// f16 a step may have to be left out.
pub fn updates_immediately(config: &RunConfig) -> bool {
    !matches!(config.optimizer, OptimizerConfig::Intrinsic(_))
        && config.training.gradient_accumulation_steps == 1
        && config.training.max_grad_norm == 0.0
        && config.training.on_non_finite == config::OnNonFinite::Stop
        && config.dtype != config::Dtype::F16
}
