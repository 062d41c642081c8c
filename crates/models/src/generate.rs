//! Text generation: a prompt pass, then one token at a time with a key/value cache, many sequences at once.
//!
//! Prompts are padded on the left, so that every sequence's visible keys are one range of the cache.

use burn::tensor::Tensor;
use lowrank_core::random::Stream;

use crate::batch::{Batch, IGNORE};
use crate::decoder::Decoder;
use crate::inputs::Inputs;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// Keep the most likely tokens whose probabilities sum to this (1: all).
    pub top_p: f64,
    /// Keep this many (0: all).
    pub top_k: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 }
    }
}

/// Generates up to `max_new_tokens` (but no more than the model has positions) after each prompt, stopping a sequence at any of
/// `stop` (which is not returned).
///
/// `on_token(sequence, id)` is called as tokens appear; returning `false` ends the whole generation.
pub fn generate(
    decoder: &Decoder,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    stop: &[u32],
    sampling: &Sampling,
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Vec<Vec<u32>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut out = vec![vec![]; prompts.len()];
    if longest == 0 || max_new_tokens == 0 {
        return out;
    }
    let max_new_tokens = max_new_tokens.min(decoder.config.max_position_embeddings);
    let mut caches = decoder.caches(prompts.len(), longest + max_new_tokens);
    let mut open = vec![true; prompts.len()];
    let mut batch = prompt_batch(prompts, longest);
    for step in 0..max_new_tokens {
        let offset = if step == 0 { 0 } else { longest + step - 1 };
        let inputs = Inputs::new(&batch, &decoder.config, offset, &decoder.device());
        let hidden = decoder.hidden(&inputs, Some(&mut caches));
        let logits = last_logits(decoder, hidden, &batch);
        let next: Vec<u32> =
            logits.iter().enumerate().map(|(row, logits)| choose(logits, sampling, row, step)).collect();
        for (row, &id) in next.iter().enumerate() {
            if !open[row] {
                continue;
            }
            if stop.contains(&id) {
                open[row] = false;
                continue;
            }
            out[row].push(id);
            if !on_token(row, id) {
                return out;
            }
        }
        if !open.contains(&true) {
            break;
        }
        batch = next_batch(prompts, longest, step, &next);
    }
    out
}

fn prompt_batch(prompts: &[Vec<u32>], longest: usize) -> Batch {
    let mut batch = Batch { rows: prompts.len(), cols: longest, ..Batch::default() };
    for (row, prompt) in prompts.iter().enumerate() {
        let pad = longest - prompt.len();
        batch.input_ids.extend(std::iter::repeat_n(0, pad).chain(prompt.iter().map(|&id| id as i32)));
        batch.positions.extend(std::iter::repeat_n(0, pad).chain(0..prompt.len() as i32));
        batch.first_key.extend((0..pad as i32).chain(std::iter::repeat_n(pad as i32, prompt.len())));
        batch.records.push(row as u64);
    }
    batch.targets = vec![IGNORE; batch.input_ids.len()];
    batch
}

/// The batch of one new token a sequence.
fn next_batch(prompts: &[Vec<u32>], longest: usize, step: usize, next: &[u32]) -> Batch {
    Batch {
        rows: prompts.len(),
        cols: 1,
        input_ids: next.iter().map(|&id| id as i32).collect(),
        targets: vec![IGNORE; next.len()],
        positions: prompts.iter().map(|prompt| (prompt.len() + step) as i32).collect(),
        first_key: prompts.iter().map(|prompt| (longest - prompt.len()) as i32).collect(),
        records: (0..prompts.len() as u64).collect(),
    }
}

/// Logits after the last token of each sequence.
fn last_logits(decoder: &Decoder, hidden: Tensor<2>, batch: &Batch) -> Vec<Vec<f32>> {
    let width = hidden.dims()[1];
    let last = hidden
        .reshape([batch.rows, batch.cols, width])
        .slice([0..batch.rows, batch.cols - 1..batch.cols, 0..width])
        .reshape([batch.rows, width]);
    let logits = decoder.logits(last);
    let vocab = logits.dims()[1];
    crate::save::host_values(logits).chunks(vocab).map(<[f32]>::to_vec).collect()
}

/// One token from a row of logits.
fn choose(logits: &[f32], sampling: &Sampling, row: usize, step: usize) -> u32 {
    let best = |a: &usize, b: &usize| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a));
    if sampling.temperature <= 0.0 {
        return (0..logits.len()).max_by(best).unwrap_or(0) as u32;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| best(b, a));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let max = f64::from(logits[order[0]]);
    let weights: Vec<f64> =
        order.iter().map(|&id| ((f64::from(logits[id]) - max) / sampling.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0;
    let mut mass = 0.0;
    while kept < order.len() && (kept == 0 || mass < sampling.top_p * total) {
        mass += weights[kept];
        kept += 1;
    }
    let mut draw = Stream::new(sampling.seed, "sampling").unit(((row as u64) << 32) | step as u64) * mass;
    for index in 0..kept {
        draw -= weights[index];
        if draw < 0.0 {
            return order[index] as u32;
        }
    }
    order[kept - 1] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(choose(&[0.0, 2.0, 2.0], &Sampling::default(), 0, 0), 1);
    }

    #[test]
    fn top_p_and_top_k_cut_the_tail() {
        let logits = [5.0, 4.9, -20.0];
        for top in [
            Sampling { temperature: 1.0, top_k: 2, ..Sampling::default() },
            Sampling { temperature: 1.0, top_p: 0.9, ..Sampling::default() },
        ] {
            let drawn: Vec<u32> = (0..200).map(|step| choose(&logits, &top, 0, step)).collect();
            assert!(drawn.contains(&0) && drawn.contains(&1) && !drawn.contains(&2));
        }
    }
}
