//! Gemma 2 and the text models of Gemma 3.
//!
//! Beside Llama: embeddings times `sqrt(hidden_size)`, norms that multiply by `1 + weight`, a norm after as well as before
//! attention and MLP, tanh-GELU, scores times `query_pre_attn_scalar^-0.5`, a tied head, windows that alternate with full
//! attention. `attention_bias` puts a bias on q, k, v and o.
//!
//! | | Gemma 2 | Gemma 3 |
//! | --- | --- | --- |
//! | soft caps where the keys are absent | 50 on scores, 30 on logits | none |
//! | norm of each q and k head | no | yes |
//! | sliding layers without `layer_types` | every other, from the first | all but every sixth (`sliding_window_pattern`) |
//! | rotary tables | one | full layers: `rope_theta` (1e6) with `rope_scaling`; sliding layers: `rope_local_base_freq` (1e4) |

use crate::config::{
    Activation, ConfigError, DecoderConfig, Defaults, Keys, MAX_SIZE, Rope, mixed_layers, shared, sliding_window,
};

const GEMMA2: Defaults = Defaults {
    num_kv_heads: Some(4),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    activation_key: "hidden_activation",
    activation: Activation::GeluTanh,
    tie_word_embeddings: true,
    eos_token_id: Some(1),
    bos_token_id: Some(2),
    pad_token_id: Some(0),
};
const GEMMA3: Defaults = Defaults { max_position_embeddings: 131_072, ..GEMMA2 };

pub(crate) fn read_gemma2(keys: &Keys<'_>) -> Result<DecoderConfig, ConfigError> {
    let base = both(keys, &GEMMA2)?;
    let window = sliding_window(keys, 4096)?;
    Ok(DecoderConfig {
        ropes: vec![Rope::read(keys, &base)?],
        layers: mixed_layers(keys, base.num_layers, window, 0, |layer| layer % 2 == 0)?,
        attention_softcap: softcap(keys, "attn_logit_softcapping", Some(50.0))?,
        final_softcap: softcap(keys, "final_logit_softcapping", Some(30.0))?,
        ..base
    })
}

/// The key `attn_logit_softcapping` is left alone: the q and k norms replaced the cap, and transformers does not apply it here.
pub(crate) fn read_gemma3(keys: &Keys<'_>) -> Result<DecoderConfig, ConfigError> {
    let base = both(keys, &GEMMA3)?;
    let window = sliding_window(keys, 4096)?;
    let pattern = keys.size("sliding_window_pattern", MAX_SIZE)?.unwrap_or(6);
    Ok(DecoderConfig {
        ropes: vec![
            Rope::read_for_layers(keys, &base, "full_attention", "rope_theta", 1e6)?,
            Rope::read_for_layers(keys, &base, "sliding_attention", "rope_local_base_freq", 1e4)?,
        ],
        layers: mixed_layers(keys, base.num_layers, window, 1, |layer| (layer + 1) % pattern != 0)?,
        qk_norm: true,
        final_softcap: softcap(keys, "final_logit_softcapping", None)?,
        ..base
    })
}

/// `model_type` gemma3 is the wrapper that pairs a text model with a vision tower; only its text-only form is a decoder.
pub(crate) fn read_gemma3_outer(keys: &Keys<'_>) -> Result<DecoderConfig, ConfigError> {
    let hint = "use a text-only checkpoint (Gemma3ForCausalLM), such as one saved from the text part of this model";
    if !keys.is_absent_or_null("vision_config") {
        return Err(keys.unsupported("vision_config", "a text model without a vision tower", hint));
    }
    if keys.first_text("architectures")? == Some("Gemma3ForConditionalGeneration") {
        return Err(keys.unsupported("architectures", "Gemma3ForCausalLM", hint));
    }
    match keys.object("text_config")? {
        Some(text) => read_gemma3(&text),
        None => read_gemma3(keys),
    }
}

fn both(keys: &Keys<'_>, defaults: &Defaults) -> Result<DecoderConfig, ConfigError> {
    let base = shared(keys, defaults)?;
    if keys.flag("use_bidirectional_attention")?.unwrap_or(false) {
        let hint = "encoders made from Gemma (EmbeddingGemma) are not causal language models";
        return Err(keys.unsupported("use_bidirectional_attention", "false", hint));
    }
    let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
    let query_scalar = keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    Ok(DecoderConfig {
        norm_offset: 1.0,
        embedding_scale: Some((base.hidden_size as f64).sqrt() as f32),
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        attention_scale: query_scalar.powf(-0.5) as f32,
        sandwich_norms: true,
        ..base
    })
}

/// A cap of tanh form: `default` if the key is absent, none if it is null.
fn softcap(keys: &Keys<'_>, key: &str, default: Option<f64>) -> Result<Option<f32>, ConfigError> {
    Ok(keys.positive_or_null(key, default)?.map(|cap| cap as f32))
}
