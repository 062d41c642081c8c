//! Mistral 7B and its relatives that ship as `MistralForCausalLM`.
//!
//! Llama without biases, and with the same sliding window in every layer. `sliding_window: null` (v0.2 and later) is full
//! attention; where the key is absent the window is 4096, as in the first release.

use crate::config::{
    Activation, ConfigError, DecoderConfig, Defaults, Keys, LayerConfig, Rope, shared, sliding_window,
};

const DEFAULTS: Defaults = Defaults {
    num_kv_heads: Some(8),
    head_dim: None,
    max_position_embeddings: 131_072,
    activation_key: "hidden_act",
    activation: Activation::Silu,
    tie_word_embeddings: false,
    eos_token_id: Some(2),
    bos_token_id: Some(1),
    pad_token_id: None,
};

pub(crate) fn read(keys: &Keys<'_>) -> Result<DecoderConfig, ConfigError> {
    let base = shared(keys, &DEFAULTS)?;
    let window = sliding_window(keys, 4096)?;
    Ok(DecoderConfig {
        ropes: vec![Rope::read(keys, &base)?],
        layers: vec![LayerConfig { window, rope: 0 }; base.num_layers],
        ..base
    })
}
