//! Qwen2, Qwen2.5 (the same `model_type`) and Qwen3.
//!
//! | | Qwen2 | Qwen3 |
//! | --- | --- | --- |
//! | bias | q, k and v, always; never o | q, k, v and o, if `attention_bias` |
//! | norm of each q and k head | no | yes |
//! | `head_dim` where absent | `hidden_size / num_attention_heads` | 128 |
//!
//! Sliding windows are off unless `use_sliding_window`. Then `layer_types` says which layers slide; without it those from
//! `max_window_layers` (default 28) on.

use crate::config::{
    Activation, ConfigError, DecoderConfig, Defaults, Keys, LayerConfig, Rope, mixed_layers, shared, sliding_window,
};

const QWEN2: Defaults = Defaults {
    num_kv_heads: Some(32),
    head_dim: None,
    max_position_embeddings: 32_768,
    activation_key: "hidden_act",
    activation: Activation::Silu,
    tie_word_embeddings: false,
    eos_token_id: None,
    bos_token_id: None,
    pad_token_id: None,
};
const QWEN3: Defaults = Defaults { head_dim: Some(128), ..QWEN2 };

pub(crate) fn read_qwen2(keys: &Keys<'_>) -> Result<DecoderConfig, ConfigError> {
    let base = shared(keys, &QWEN2)?;
    Ok(DecoderConfig {
        ropes: vec![Rope::read(keys, &base)?],
        layers: layers(keys, base.num_layers)?,
        qkv_bias: true,
        ..base
    })
}

pub(crate) fn read_qwen3(keys: &Keys<'_>) -> Result<DecoderConfig, ConfigError> {
    let base = shared(keys, &QWEN3)?;
    let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
    Ok(DecoderConfig {
        ropes: vec![Rope::read(keys, &base)?],
        layers: layers(keys, base.num_layers)?,
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        qk_norm: true,
        ..base
    })
}

fn layers(keys: &Keys<'_>, num_layers: usize) -> Result<Vec<LayerConfig>, ConfigError> {
    let window = match keys.flag("use_sliding_window")?.unwrap_or(false) {
        true => sliding_window(keys, 4096)?,
        false => None,
    };
    let first_sliding = keys.count("max_window_layers")?.unwrap_or(28);
    mixed_layers(keys, num_layers, window, 0, |layer| window.is_some() && layer >= first_sliding)
}
