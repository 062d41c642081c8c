//! Forward passes: hidden states, logits, loss, tokenizer, chat template, greedy continuation.

use std::path::Path;

use burn::tensor::{FloatDType, Tensor};
use lowrank_models::generate::{Sampling, generate};
use lowrank_models::hf::{ChatTemplate, Tokenizer};
use lowrank_models::save::host_values;
use lowrank_models::{Batch, Decoder, Inputs, Network};
use lowrank_train::evaluate::batch_loss;

use super::case::{Case, ChatExample, TokenizerExample};
use super::checks::Checks;
use super::subject::{Subject, logits, rows};
use super::tensors::{self, Tensors};
use super::{Options, Stop, failed};

/// How far off results may be: the case's limits on the CPU in f32, wider ones elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `None` on the CPU in f32; else the relative error that a loss may have.
    pub relative: Option<f64>,
}

impl Limits {
    /// Those of a case on a device.
    ///
    /// # Errors
    /// An unknown compute type.
    pub fn of(case: &Case, options: &Options) -> Result<Self, Stop> {
        let relative = match (case.compute_dtype()?, options.is_cpu) {
            (FloatDType::F32, true) => None,
            (FloatDType::F32, false) => Some(1e-3),
            _ => Some(1e-2),
        };
        Ok(Self { relative })
    }

    /// Of a loss of this size.
    pub fn loss(&self, own: f64, expected: f64) -> f64 {
        self.relative.map_or(own, |relative| own.max(relative * expected.abs()))
    }

    /// Of a logit or hidden state, relative to the largest of its tensor.
    pub fn values(&self, own: f64, expected: &[f32]) -> f64 {
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        self.relative.map_or(own, |relative| own.max(10.0 * relative * f64::from(largest)))
    }
}

/// Runs a forward case.
///
/// # Errors
/// Files that cannot be used.
pub fn run(case: &Case, model: &Path, options: &Options, checks: &mut Checks) -> Result<(), Stop> {
    let limits = Limits::of(case, options)?;
    check_texts(case, model, checks)?;
    let decoder = Decoder::load(case, model, options)?;
    let tensors = case.tensors()?;
    let batch = batch(case, &tensors)?;
    let inputs = Inputs::new(&batch, &decoder.config, 0, &decoder.device());
    let own = case.limit("logits_abs").unwrap_or(1e-4);
    let hidden = check_hidden(&decoder, &inputs, &tensors, |expected| limits.values(own, expected), checks)?;

    for (sequence, rows) in &case.logit_rows {
        let expected = tensors::get(&tensors, &format!("logits_{sequence}"))?;
        let row = sequence.rsplit('_').next().and_then(|digits| digits.parse::<usize>().ok()).unwrap_or(0);
        let rows: Vec<usize> = rows.iter().map(|col| row * batch.cols + col).collect();
        let got = logits(&decoder, &hidden, &rows);
        checks.largest("logits", &expected.data, &got, limits.values(own, &expected.data));
    }
    check_top(&decoder, &hidden, &batch, &tensors, |expected| limits.values(own, expected), checks);
    if let Some(expected) = case.expected.loss {
        let chunk = options.head_chunk_tokens.unwrap_or(decoder.default_head_chunk());
        let loss = batch_loss(&decoder, &batch, chunk) / batch.target_count().max(1) as f64;
        let limit = limits.loss(case.limit("loss_abs").unwrap_or(1e-5), expected);
        checks.add("loss", (loss - expected).abs(), limit, || format!("expected {expected}, got {loss}"));
    }
    check_greedy(case, model, &decoder, limits, checks)
}

/// Texts in, ids out; conversations in, texts and ids out.
pub(super) fn check_texts(case: &Case, model: &Path, checks: &mut Checks) -> Result<(), Stop> {
    if case.tokenizer.is_empty() && case.chat.is_empty() && case.text.is_none() {
        return Ok(());
    }
    let tokenizer = Tokenizer::from_folder(model).map_err(failed)?;
    let whole = case.text.iter().zip(&case.ids);
    let whole =
        whole.map(|(text, ids)| TokenizerExample { text: text.clone(), ids: ids.clone(), ids_no_special: None });
    for example in whole.chain(case.tokenizer.iter().cloned()) {
        let ids = tokenizer.encode(&example.text, true).map_err(failed)?;
        checks.equal("token ids", &example.ids, &ids);
        if let Some(expected) = &example.ids_no_special {
            let ids = tokenizer.encode(&example.text, false).map_err(failed)?;
            checks.equal("token ids without special tokens", expected, &ids);
        }
    }
    for example in &case.chat {
        check_chat(example, model, &tokenizer, checks)?;
    }
    Ok(())
}

fn check_chat(example: &ChatExample, model: &Path, tokenizer: &Tokenizer, checks: &mut Checks) -> Result<(), Stop> {
    let Some(template) = ChatTemplate::from_folder(model).map_err(failed)? else {
        return Err(Stop::Failed("the model has no chat template".to_owned()));
    };
    let text = template.render(&example.messages, example.add_generation_prompt).map_err(failed)?;
    checks.equal("chat text", &example.text, &text);
    if let Some(expected) = &example.ids {
        checks.equal("chat ids", expected, &tokenizer.encode(&text, false).map_err(failed)?);
    }
    Ok(())
}

/// `input_ids`, `labels` and perhaps `attention_mask` of the tensors, or the ids of a single sequence.
fn batch(case: &Case, tensors: &Tensors) -> Result<Batch, Stop> {
    if let Some(ids) = &case.ids {
        let row = vec![ids.iter().map(|&id| id as i32).collect::<Vec<_>>()];
        return Ok(Batch::from_rows(&row, &row, None));
    }
    let ids = rows(tensors::get(tensors, "input_ids")?);
    let labels = tensors.get("labels").map_or_else(|| ids.clone(), rows);
    let mask = tensors.get("attention_mask").map(rows);
    Ok(Batch::from_rows(&ids, &labels, mask.as_deref()))
}

/// Runs the model block by block and compares `hidden.I`: the input of block I, and after the last block the normed output.
/// They are given for the first positions of sequence 0. Returns the residual stream after the last block.
fn check_hidden(
    decoder: &Decoder,
    inputs: &Inputs,
    tensors: &Tensors,
    limit: impl Fn(&[f32]) -> f64,
    checks: &mut Checks,
) -> Result<Tensor<2>, Stop> {
    let config = &decoder.config;
    let mut check = |index: usize, x: &Tensor<2>| {
        if let Some(expected) = tensors.get(&format!("hidden.{index}")) {
            let positions = expected.shape[0];
            let got = host_values(x.clone().slice(burn::tensor::s![0..positions]));
            checks.largest("hidden states", &expected.data, &got, limit(&expected.data));
        }
    };
    let mut x = decoder.model.embed_tokens.forward(inputs, config, decoder.compute);
    for (index, block) in decoder.model.layers.iter().enumerate() {
        check(index, &x);
        x = block.forward(x, inputs, config, config.layers[index], false, None);
    }
    check(decoder.model.layers.len(), &decoder.model.norm.forward(x.clone(), config));
    Ok(x)
}

/// `logits_last`: all logits of the last position; `top_ids`, `top_values`: the largest of every position.
fn check_top(
    decoder: &Decoder,
    hidden: &Tensor<2>,
    batch: &Batch,
    tensors: &Tensors,
    limit: impl Fn(&[f32]) -> f64,
    checks: &mut Checks,
) {
    let last = batch.cols.saturating_sub(1);
    if let Some(expected) = tensors.get("logits_last") {
        let got = logits(decoder, hidden, &[last]);
        checks.largest("logits of the last position", &expected.data, &got, limit(&expected.data));
    }
    let (Some(ids), Some(values)) = (tensors.get("top_ids"), tensors.get("top_values")) else { return };
    let count = ids.shape.last().copied().unwrap_or(1).max(1);
    for (position, (ids, values)) in ids.integers().chunks(count).zip(values.data.chunks(count)).enumerate() {
        let row = logits(decoder, hidden, &[position]);
        let at_ids: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
        checks.largest("logits of the most likely tokens", values, &at_ids, limit(values));
        let mut sorted = row;
        sorted.sort_by(|a, b| b.total_cmp(a));
        checks.largest("largest logits", values, &sorted[..count], limit(values));
    }
}

/// The continuation, where no two logits came so close that another order would be right too.
fn check_greedy(case: &Case, model: &Path, decoder: &Decoder, limits: Limits, checks: &mut Checks) -> Result<(), Stop> {
    let Some(greedy) = &case.greedy else { return Ok(()) };
    let safe_margin = limits.relative.map_or(0.0, |relative| 10.0 * relative);
    if greedy.smallest_top2_margin.is_some_and(|margin| margin < safe_margin) {
        return Ok(());
    }
    let count = greedy.new_tokens.len();
    let mut out =
        generate(decoder, std::slice::from_ref(&greedy.prompt), count, &[], &Sampling::default(), |_, _| true);
    let got = out.pop().unwrap_or_default();
    checks.equal("greedy continuation", &greedy.new_tokens, &got);
    if let Some(expected) = &greedy.text {
        let tokenizer = Tokenizer::from_folder(model).map_err(failed)?;
        checks.equal("text of the greedy continuation", expected, &tokenizer.decode(&got, false).map_err(failed)?);
    }
    Ok(())
}
