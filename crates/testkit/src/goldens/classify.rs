//! Forward passes of classifiers: token ids, hidden states, logits of every sequence or image, loss.

use std::path::Path;

use burn::tensor::s;
use lowrank_models::Network;
use lowrank_models::classifier::Classifier;
use lowrank_models::save::host_values;
use lowrank_train::evaluate::batch_loss;

use super::case::Case;
use super::checks::Checks;
use super::forward::{Limits, check_texts};
use super::subject::Subject;
use super::tensors;
use super::{Options, Stop};

/// Runs a forward case.
///
/// # Errors
/// Files that cannot be used.
pub fn run(case: &Case, model: &Path, options: &Options, checks: &mut Checks) -> Result<(), Stop> {
    let limits = Limits::of(case, options)?;
    check_texts(case, model, checks)?;
    let classifier = Classifier::load(case, model, options)?;
    let tensors = case.tensors()?;
    let height = tensors::get(&tensors, "labels")?.data.len();
    let batch = Classifier::batch(&tensors, 0, height)?;
    let own = case.limit("logits_abs").unwrap_or(1e-4);
    // The first positions of sequence 0.
    for (index, state) in classifier.hidden_states(&batch).into_iter().enumerate() {
        if let Some(expected) = tensors.get(&format!("hidden.{index}")) {
            let got = host_values(state.slice(s![0..expected.shape[0]]));
            checks.largest("hidden states", &expected.data, &got, limits.values(own, &expected.data));
        }
    }
    if let Some(expected) = tensors.get("logits") {
        let got = classifier.reference_logits(&batch, 0);
        checks.largest("logits", &expected.data, &got, limits.values(own, &expected.data));
    }
    if let Some(expected) = case.expected.loss {
        let chunk = options.head_chunk_tokens.unwrap_or(classifier.default_head_chunk());
        let loss = batch_loss(&classifier, &batch, chunk) / batch.target_count().max(1) as f64;
        let limit = limits.loss(case.limit("loss_abs").unwrap_or(1e-5), expected);
        checks.add("loss", (loss - expected).abs(), limit, || format!("expected {expected}, got {loss}"));
    }
    Ok(())
}
