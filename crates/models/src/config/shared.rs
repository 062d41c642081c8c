//! What all families read from `config.json` alike, and the pieces that several of them use.

use super::{Activation, ConfigError, DecoderConfig, Keys, LayerConfig};

/// Where families differ in what an absent key means; values of the classes in transformers.
pub(crate) struct Defaults {
    /// `None`: as many as query heads.
    pub num_kv_heads: Option<usize>,
    /// `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    /// The key that names the activation.
    pub activation_key: &'static str,
    pub activation: Activation,
    pub tie_word_embeddings: bool,
    pub eos_token_id: Option<u32>,
    pub bos_token_id: Option<u32>,
    pub pad_token_id: Option<u32>,
}

/// Reads what all families have in common and leaves the rest plain: full attention in every layer, no biases, no extra
/// norms, scores times `1/sqrt(head_dim)`. The caller fills `ropes` and whatever its family does otherwise.
pub(crate) fn shared(keys: &Keys<'_>, defaults: &Defaults) -> Result<DecoderConfig, ConfigError> {
    let vocab_size = keys.required_size("vocab_size", MAX_SIZE)?;
    let hidden_size = keys.required_size("hidden_size", MAX_SIZE)?;
    let num_layers = keys.required_size("num_hidden_layers", MAX_LAYERS)?;
    let num_heads = keys.required_size("num_attention_heads", MAX_SIZE)?;
    let num_kv_heads = keys.size_or_null("num_key_value_heads", MAX_SIZE, defaults.num_kv_heads)?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(keys.invalid(
            "num_key_value_heads",
            format!("a divisor of num_attention_heads ({num_heads})"),
            num_kv_heads.to_string(),
        ));
    }
    let head_dim = head_dim(keys, defaults, hidden_size, num_heads)?;
    Ok(DecoderConfig {
        architecture: String::new(),
        vocab_size,
        hidden_size,
        intermediate_size: keys.required_size("intermediate_size", MAX_SIZE)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        max_position_embeddings: keys
            .size("max_position_embeddings", MAX_SIZE)?
            .unwrap_or(defaults.max_position_embeddings),
        activation: activation(keys, defaults)?,
        norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        norm_offset: 0.0,
        embedding_scale: None,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        attention_scale: (head_dim as f64).powf(-0.5) as f32,
        attention_softcap: None,
        final_softcap: None,
        sandwich_norms: false,
        tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
        layers: vec![LayerConfig { window: None, rope: 0 }; num_layers],
        ropes: Vec::new(),
        initializer_range: keys.positive("initializer_range")?.unwrap_or(0.02) as f32,
        eos_token_ids: keys.token_ids("eos_token_id", defaults.eos_token_id)?,
        bos_token_id: keys.token_id("bos_token_id", defaults.bos_token_id)?,
        pad_token_id: pad_token_id(keys, defaults, vocab_size)?,
    })
}

/// Keeps products of two sizes within 64 bits and every index within what tensor libraries take.
pub(crate) const MAX_SIZE: usize = i32::MAX as usize;
/// Bounds what an absurd file can make us allocate before the first tensor is looked at.
const MAX_LAYERS: usize = 10_000;
const MAX_HEAD_DIM: usize = 65_536;

fn head_dim(keys: &Keys<'_>, defaults: &Defaults, hidden_size: usize, num_heads: usize) -> Result<usize, ConfigError> {
    let given = keys.size_or_null("head_dim", MAX_HEAD_DIM, defaults.head_dim)?;
    if given.is_none() && !hidden_size.is_multiple_of(num_heads) {
        return Err(keys.invalid(
            "hidden_size",
            format!("a multiple of num_attention_heads ({num_heads}), or a head_dim"),
            hidden_size.to_string(),
        ));
    }
    let head_dim = given.unwrap_or(hidden_size / num_heads);
    if !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        let expected = format!("an even number of at most {MAX_HEAD_DIM} (rotary embeddings turn pairs)");
        return Err(keys.invalid("head_dim", expected, head_dim.to_string()));
    }
    Ok(head_dim)
}

fn activation(keys: &Keys<'_>, defaults: &Defaults) -> Result<Activation, ConfigError> {
    // The spellings of the tanh form differ in transformers by rounding only.
    match keys.text(defaults.activation_key)? {
        None => Ok(defaults.activation),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some(other) => Err(keys.invalid(
            defaults.activation_key,
            "silu, swish, gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh or gelu_python_tanh",
            format!("{other:?}"),
        )),
    }
}

fn pad_token_id(keys: &Keys<'_>, defaults: &Defaults, vocab_size: usize) -> Result<Option<u32>, ConfigError> {
    let id = keys.token_id("pad_token_id", defaults.pad_token_id)?;
    // Unlike the other special tokens this one is fed to the model.
    match id {
        Some(id) if id as usize >= vocab_size => {
            Err(keys.invalid("pad_token_id", format!("less than vocab_size ({vocab_size})"), id.to_string()))
        }
        _ => Ok(id),
    }
}

/// Layers that alternate between full attention and a sliding window: by the key `layer_types` if it is there, else where
/// `slides(index)` says so. Full layers turn by rope 0, sliding ones by `sliding_rope`.
pub(crate) fn mixed_layers(
    keys: &Keys<'_>,
    num_layers: usize,
    window: Option<usize>,
    sliding_rope: usize,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<LayerConfig>, ConfigError> {
    let kinds = match keys.texts("layer_types")? {
        Some(names) => names.into_iter().map(|name| is_sliding(keys, name)).collect::<Result<Vec<_>, _>>()?,
        None => (0..num_layers).map(slides).collect(),
    };
    if kinds.len() != num_layers {
        let expected = format!("one entry per layer (num_hidden_layers is {num_layers})");
        return Err(keys.invalid("layer_types", expected, format!("{} entries", kinds.len())));
    }
    if window.is_none() && kinds.contains(&true) {
        let expected = "a window of at least 1, because some layers slide";
        return Err(keys.invalid("sliding_window", expected, "none".to_string()));
    }
    let layer = |slides: bool| match slides {
        true => LayerConfig { window, rope: sliding_rope },
        false => LayerConfig { window: None, rope: 0 },
    };
    Ok(kinds.into_iter().map(layer).collect())
}

fn is_sliding(keys: &Keys<'_>, layer_type: &str) -> Result<bool, ConfigError> {
    match layer_type {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(keys.invalid("layer_types", "full_attention or sliding_attention", format!("{other:?}"))),
    }
}

/// The key `sliding_window`: `default` if absent, `None` if null.
pub(crate) fn sliding_window(keys: &Keys<'_>, default: usize) -> Result<Option<usize>, ConfigError> {
    keys.size_or_null("sliding_window", MAX_SIZE, Some(default))
}
