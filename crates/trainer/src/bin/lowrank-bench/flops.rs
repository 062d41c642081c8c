//! Model FLOPs of a training step, counted as in `scripts/bench/peer_gpu.py`.

use lowrank_models::config::DecoderConfig;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trained {
    /// The whole model.
    Everything,
    /// An adapter with so many numbers; the model is frozen.
    Adapter(usize),
}

/// FLOPs a token of sequences of `seq`. A multiplication and an addition are two. A weight costs 2 forward, 2 for the gradient
/// of its input and, where it is trained, 2 for its own. Looking up embeddings is free, a tied head is not; scores count the
/// causal half; what is computed again in the backward pass does not count.
pub fn per_token(config: &DecoderConfig, seq: usize, trained: Trained) -> f64 {
    let layers = config.expected_tensors();
    let matrices = layers.iter().filter(|(name, shape)| shape.len() == 2 && !name.contains("embed_tokens"));
    let mut weights: usize = matrices.map(|(_, shape)| shape[0] * shape[1]).sum();
    if config.tie_word_embeddings {
        weights += config.vocab_size * config.hidden_size;
    }
    let dense = match trained {
        Trained::Everything => 6 * weights,
        Trained::Adapter(numbers) => 4 * weights + 6 * numbers,
    };
    let scores = 3 * 2 * 2 * config.num_layers * config.num_heads * config.head_dim;
    dense as f64 + (scores * seq) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_step_of_llama_1b_has_the_flops_of_the_peer() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/bench/llama-1b");
        let config = DecoderConfig::read(std::path::Path::new(folder)).unwrap();
        // by hand: 16 (2 * 2048^2 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 128256 * 2048
        let weights = 1_235_746_816.0;
        let scores = 12.0 * 16.0 * 32.0 * 64.0 * 1024.0;
        assert_eq!(per_token(&config, 2048, Trained::Everything), 6.0 * weights + scores);
        assert_eq!(per_token(&config, 2048, Trained::Adapter(1000)), 4.0 * weights + 6000.0 + scores);
    }
}
