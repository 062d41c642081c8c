//! The form in which managed weights are kept between steps: f32, 16 bits, or codes.

use burn::tensor::FloatDType;
use lowrank_core::Base;
use lowrank_core::base::PackedBase;
use lowrank_core::lowrank::cast;
use lowrank_core::optim::{Optimizer, Weights};
use lowrank_core::quant::Quantisation;
use lowrank_models::hf::AdapterConfig;
use lowrank_models::{Network, save};

use super::{wanted, weights};
use crate::config::{Dtype, OptimizerConfig, RunConfig};
use crate::error::Problem;

/// The linear layers that training holds as codes, and how: a model may be made with these codes, so that it never exists in f32.
///
/// # Errors
/// As [`super::build`].
pub fn trained_codes(config: &RunConfig) -> Result<Option<(AdapterConfig, Quantisation)>, Problem> {
    let has_adapter = config.adapter.is_some() || config.init_adapter.is_some();
    match (weights(&config.optimizer), config.optimizer.low_rank()) {
        (Weights::Int8 { group }, Some(low_rank)) if !has_adapter => {
            let wanted = wanted(low_rank, config.optimizer.common().key)?;
            Ok(Some((wanted, Quantisation::trained(group))))
        }
        _ => Ok(None),
    }
}

/// Brings managed weights into the form in which they are kept: 16 bits, or codes.
pub(super) fn store<M: Network>(model: &mut M, optimizer: &Optimizer, weights: Weights, dtype: FloatDType) {
    match weights {
        Weights::F32 => {}
        Weights::Bf16 => {
            for index in 0..model.blocks().len() {
                model.map_block(index, &mut |name, value| {
                    if optimizer.manages(name) { cast(value, FloatDType::BF16) } else { value }
                });
            }
        }
        Weights::Int8 { group } => {
            let form = Quantisation::trained(group);
            model.for_each_projection(&mut |module, projection| {
                if !optimizer.manages(&format!("{module}.weight")) {
                    return;
                }
                match &mut projection.weight {
                    Base::Packed(base) if base.quantisation == form => base.trained = true,
                    other => *other = Base::Packed(PackedBase::trained(other.values(), form, dtype)),
                }
            });
        }
    }
}

/// Says what of a model and its optimiser is held as codes.
pub(super) fn announce_codes<M: Network>(config: &RunConfig, model: &M) {
    let OptimizerConfig::QGalore(table) = &config.optimizer else { return };
    tracing::info!("bases are held in {} bits, in groups of {}", table.basis_bits, table.group_size);
    let held = save::held(model);
    if held.trained > 0 {
        tracing::info!("{held}");
    }
}

/// The type of the run.
pub(super) fn type_of(dtype: Dtype) -> FloatDType {
    match dtype {
        Dtype::F32 => FloatDType::F32,
        Dtype::Bf16 => FloatDType::BF16,
        Dtype::F16 => FloatDType::F16,
    }
}
