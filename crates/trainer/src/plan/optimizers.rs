//! From the `[optimizer]` table to what it does with each matrix.

use std::collections::BTreeMap;

use lowrank_core::optim::ProjType;
use lowrank_models::hf::{self, peft::Modules};

use super::methods::{Kind, Method, Rule, Store, one_side};
use super::model::{Format, Linear, Model};
use crate::config::{
    self, Granularity, Inner, LowRankCommon, Merge, OptimizerConfig, QWeightFormat, RunConfig, TargetModules,
    WeightFormat,
};
use crate::error::Problem;

/// The low-rank methods by the name of the weight.
pub(super) fn methods(config: &RunConfig, model: &Model, tokens: usize) -> Result<BTreeMap<String, Method>, Problem> {
    let Some(common) = config.optimizer.low_rank() else { return Ok(BTreeMap::new()) };
    let wanted = targets(common, config.optimizer.common().key)?;
    let rank = common.rank.unwrap_or((model.hidden / 4).max(1));
    let module = |linear: &Linear| linear.weight.name.trim_end_matches(".weight").to_owned();
    let found: Vec<&Linear> =
        model.linears().filter(|linear| wanted.targets(&module(linear)) && linear.weight.trained).collect();
    let count = found.len() as u64;
    let place = |index: usize, stagger: bool| {
        if stagger { common.update_proj_gap * index as u64 / count } else { 0 }
    };
    let method = |(index, linear): (usize, &&Linear)| {
        let method = method_of(config, linear.weight.dims, rank, tokens, &|stagger| place(index, stagger));
        Some((linear.weight.name.clone(), method?))
    };
    Ok(found.iter().enumerate().filter_map(method).collect())
}

fn targets(common: LowRankCommon<'_>, key: &str) -> Result<hf::AdapterConfig, Problem> {
    let modules = |wanted: &TargetModules| match wanted {
        TargetModules::Pattern(text) => Modules::from_text(text)
            .map_err(|reason| Problem::config(format!("optimizer.{key}.target_modules = \"{text}\": {reason}"))),
        TargetModules::Names(names) => Ok(Modules::Names(names.clone())),
    };
    let mut wanted = hf::AdapterConfig::new(1, 1.0, modules(common.target_modules)?);
    wanted.exclude_modules = common.exclude_modules.map(modules).transpose()?;
    Ok(wanted)
}

/// What an optimiser does with a matrix; none for AdamW.
fn method_of(
    config: &RunConfig,
    dims: [usize; 2],
    rank: usize,
    tokens: usize,
    place: &dyn Fn(bool) -> u64,
) -> Option<Method> {
    let [m, n] = dims;
    let cut = |rank: usize| rank.min(m).min(n);
    let plain = |kind, proj_type: ProjType, gap: u64| {
        let side = one_side(proj_type, dims, cut(rank));
        Method { kind, rank: cut(rank), side, rule: Rule::AdamW, gap: gap.max(1), offset: 0, store: Store::F32 }
    };
    Some(match &config.optimizer {
        OptimizerConfig::Adamw(_) => return None,
        OptimizerConfig::Galore(table) => Method {
            kind: galore_kind(table),
            rank: cut(rank),
            side: side(table.proj_type, table.exact).side(m, n, cut(rank), tokens),
            rule: rule(table),
            gap: table.update_proj_gap.max(1),
            offset: place(table.stagger.unwrap_or(!table.exact)),
            store: if table.weights == WeightFormat::Bf16 { Store::Bf16 } else { Store::F32 },
        },
        OptimizerConfig::QGalore(table) => Method {
            kind: q_galore_kind(table),
            rank: cut(rank),
            side: side(table.proj_type, table.exact).side(m, n, cut(rank), tokens),
            rule: Rule::AdamW8bit { block: table.block_size },
            gap: table.update_proj_gap.max(1),
            offset: place(!table.exact),
            store: match table.weights {
                QWeightFormat::Int8 => Store::Int8 { group: table.group_size },
                QWeightFormat::Bf16 => Store::Bf16,
                QWeightFormat::F32 => Store::F32,
            },
        },
        OptimizerConfig::DctAdamw(table) => {
            let kind = Kind::Dct { projected: table.projected, error_feedback: table.error_feedback };
            plain(kind, ProjType::Std, table.update_proj_gap)
        }
        OptimizerConfig::Apollo(table) => {
            let rank = match table.granularity {
                Granularity::Tensor => table.rank.unwrap_or(1),
                Granularity::Channel => rank,
            };
            Method { rank: cut(rank), ..plain(Kind::Apollo, ProjType::Std, table.update_proj_gap) }
        }
        OptimizerConfig::Intrinsic(_) => plain(Kind::Intrinsic, ProjType::Input, u64::MAX),
        OptimizerConfig::Fira(table) => plain(Kind::Fira, ProjType::Std, table.update_proj_gap),
        OptimizerConfig::Ldadam(table) => {
            plain(Kind::LdAdam { error_feedback: table.error_feedback }, ProjType::Std, 1)
        }
    })
}

fn galore_kind(table: &config::GaloreConfig) -> Kind {
    let has_sketch = !table.exact && table.gradient_norm == config::GradientNorm::Hybrid;
    Kind::Galore {
        exact: table.exact,
        oversampling: table.oversampling,
        power_iterations: table.power_iterations,
        sketch: if has_sketch { table.norm_sketch } else { 0 },
        norm_from_factors: table.gradient_norm == config::GradientNorm::Exact,
        lagged: table.accumulation == config::Accumulation::Lagged,
        dense: table.accumulation == config::Accumulation::Dense,
        deferred: table.merge == Merge::Deferred,
        quantised: None,
        aligns: table.align_sign.unwrap_or(!table.exact),
    }
}

fn q_galore_kind(table: &config::QGaloreConfig) -> Kind {
    let base = lowrank_core::optim::GaloreConfig::default();
    Kind::Galore {
        exact: table.exact,
        oversampling: base.oversampling,
        power_iterations: base.power_iterations,
        sketch: if table.exact { 0 } else { base.norm_sketch },
        norm_from_factors: false,
        lagged: true,
        dense: false,
        deferred: false,
        quantised: Some(Format::groups(usize::from(table.basis_bits), table.group_size)),
        aligns: !table.exact,
    }
}

fn side(wanted: Option<config::ProjType>, exact: bool) -> ProjType {
    match wanted {
        Some(config::ProjType::Input) => ProjType::Input,
        Some(config::ProjType::Output) => ProjType::Output,
        Some(config::ProjType::Std) => ProjType::Std,
        Some(config::ProjType::ReverseStd) => ProjType::ReverseStd,
        Some(config::ProjType::Full) => ProjType::Full,
        Some(config::ProjType::Auto) => ProjType::Auto,
        None if exact => ProjType::Std,
        None => ProjType::Input,
    }
}

fn rule(table: &config::GaloreConfig) -> Rule {
    match table.inner {
        Inner::Adamw => Rule::AdamW,
        Inner::Adamw8bit => Rule::AdamW8bit { block: table.block_size },
        Inner::Adafactor => Rule::Adafactor { momentum: table.momentum.is_some() },
        Inner::Sgd => Rule::Sgd { momentum: table.momentum.unwrap_or(0.9) != 0.0 },
        Inner::Muon => Rule::Muon,
    }
}

/// Freezes what an optimiser leaves out, and gives the managed weights the storage that their method wants.
pub(super) fn store(model: &mut Model, optimizer: &OptimizerConfig, methods: &BTreeMap<String, Method>) {
    if let OptimizerConfig::Intrinsic(table) = optimizer
        && !table.train_rest
    {
        model.for_each_parameter(&mut |parameter| parameter.trained &= methods.contains_key(&parameter.name));
    }
    let stored = |linear: &Linear| methods.get(&linear.weight.name).map(|method| method.store);
    for linear in model.blocks.iter_mut().flat_map(|block| &mut block.linears) {
        if stored(linear) == Some(Store::Bf16) {
            linear.weight.format = Format::Dense(2);
        }
    }
    for linear in model.blocks.iter_mut().flat_map(|block| &mut block.linears).chain(&mut model.head) {
        if let Some(Store::Int8 { group }) = stored(linear) {
            linear.weight.format = Format::groups(8, group);
        }
    }
}
