//! Llama 1 to 3.x and everything that ships as `LlamaForCausalLM` (SmolLM2, TinyLlama, Yi, ...).
//!
//! The plain decoder that the other families vary: RMS norm before attention and before the gated MLP, rotary positions
//! (scaled by `rope_scaling` since 3.1), grouped key and value heads. `attention_bias` puts a bias on q, k, v and o alike,
//! `mlp_bias` on all three maps of the MLP.

use crate::config::{Activation, ConfigError, DecoderConfig, Defaults, Keys, Rope, shared};

const DEFAULTS: Defaults = Defaults {
    num_kv_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    activation_key: "hidden_act",
    activation: Activation::Silu,
    tie_word_embeddings: false,
    eos_token_id: Some(2),
    bos_token_id: Some(1),
    pad_token_id: None,
};

pub(crate) fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ConfigError> {
    let base = shared(keys, &DEFAULTS)?;
    let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
    Ok(DecoderConfig {
        ropes: vec![Rope::read(keys, &base)?],
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: keys.flag("mlp_bias")?.unwrap_or(false),
        ..base
    })
}
