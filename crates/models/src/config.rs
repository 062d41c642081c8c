//! `config.json` of a Hugging Face decoder -> [`DecoderConfig`], the one description that the shared decoder is built from.
//!
//! What differs between families is on one page each (`llama.rs`, `mistral.rs`, `qwen.rs`, `gemma.rs`): such a page starts
//! from `shared` and overwrites fields. [`registry`] is the list of families; adding one means a page and a row.
//!
//! Both spellings found in the wild are read: the old one (`rope_theta` and `rope_scaling` at the top level) and the one
//! that transformers 5 writes (`rope_parameters`). A key that is absent has the default of the family's transformers class,
//! except the sizes that no default could guess. Keys that do not change the forward pass are ignored, the stored
//! dtype included: the tensors themselves say what they are.

mod error;
mod keys;
mod rope;
mod shared;
mod tensors;

use std::path::Path;

use serde_json::Value;

pub use error::ConfigError;
pub(crate) use keys::Keys;
pub use rope::Rope;
pub(crate) use shared::{Defaults, MAX_SIZE, mixed_layers, shared, sliding_window};

use crate::{gemma, llama, mistral, qwen};

/// One row of [`registry`]: how a family is recognised and who reads it.
pub struct Family {
    /// Value of `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Accepted values of `architectures[0]`; the first is assumed where the file names none.
    pub architectures: &'static [&'static str],
    read: fn(&Keys<'_>) -> Result<DecoderConfig, ConfigError>,
}

/// Every family that can be loaded. The error for an unknown architecture prints this list.
pub fn registry() -> &'static [Family] {
    const ROWS: &[Family] = &[
        Family { model_type: "llama", architectures: &["LlamaForCausalLM"], read: llama::read },
        Family { model_type: "mistral", architectures: &["MistralForCausalLM"], read: mistral::read },
        Family { model_type: "qwen2", architectures: &["Qwen2ForCausalLM"], read: qwen::read_qwen2 },
        Family { model_type: "qwen3", architectures: &["Qwen3ForCausalLM"], read: qwen::read_qwen3 },
        Family { model_type: "gemma2", architectures: &["Gemma2ForCausalLM"], read: gemma::read_gemma2 },
        Family { model_type: "gemma3_text", architectures: &["Gemma3ForCausalLM"], read: gemma::read_gemma3 },
        Family {
            model_type: "gemma3",
            architectures: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
            read: gemma::read_gemma3_outer,
        },
    ];
    ROWS
}

/// Activation of the gated MLP, `down(activation(gate(x)) * up(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
    GeluTanh,
    /// `0.5 x (1 + erf(x / sqrt(2)))`
    Gelu,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Sliding window: the query at position `i` sees the keys `j` with `i - window < j <= i`, itself included, so at
    /// most `window` of them. `None` is full causal attention.
    pub window: Option<usize>,
    /// Index into [`DecoderConfig::ropes`].
    pub rope: usize,
}

/// Everything that the shared decoder needs to know about a model. All sizes are at least 1.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Class name in transformers, for example `LlamaForCausalLM`.
    pub architecture: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks; equals `layers.len()`.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head, even; not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Longest sequence, in tokens, that the model was made for.
    pub max_position_embeddings: usize,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Added to the mean square inside every RMS norm.
    pub norm_eps: f32,
    /// RMS norms multiply by `norm_offset + weight`: 0, or 1 for Gemma.
    pub norm_offset: f32,
    /// Factor on the embedded tokens (Gemma: `sqrt(hidden_size)`); transformers rounds it to the dtype of the embedding.
    pub embedding_scale: Option<f32>,
    /// The q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// The output projection of the attention has a bias.
    pub o_bias: bool,
    /// The three projections of the MLP have a bias.
    pub mlp_bias: bool,
    /// RMS norm over each head of q and k, before the rotation.
    pub qk_norm: bool,
    /// Factor on `q k^T`.
    pub attention_scale: f32,
    /// Scores become `cap * tanh(score / cap)` before the mask.
    pub attention_softcap: Option<f32>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub final_softcap: Option<f32>,
    /// Gemma's block: norms after the attention and around the MLP (`post_attention_layernorm`,
    /// `pre_feedforward_layernorm`, `post_feedforward_layernorm`) beside `input_layernorm`.
    pub sandwich_norms: bool,
    /// The head uses the embedding's weight; the checkpoint then has no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// One entry per block.
    pub layers: Vec<LayerConfig>,
    /// Rotary tables that the layers refer to: one, or global then local for Gemma 3.
    pub ropes: Vec<Rope>,
    /// Standard deviation of freshly initialised weights.
    pub initializer_range: f32,
    /// Tokens that end a generation; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Token that starts a sequence.
    pub bos_token_id: Option<u32>,
    /// Token that fills up short rows; smaller than `vocab_size`.
    pub pad_token_id: Option<u32>,
}

impl DecoderConfig {
    /// Reads `folder/config.json`.
    ///
    /// # Errors
    /// As [`DecoderConfig::from_json`], and where the file cannot be read.
    pub fn read(folder: &Path) -> Result<Self, ConfigError> {
        let path = folder.join("config.json");
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::from_json(&text, &path),
            Err(source) => Err(ConfigError::Io { origin: path, source }),
        }
    }

    /// Reads the text of a `config.json`; `origin` is only used in error messages.
    ///
    /// ```
    /// use lowrank_models::config::DecoderConfig;
    /// let text = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    ///     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0}"#;
    /// let config = DecoderConfig::from_json(text, "config.json".as_ref())?;
    /// assert_eq!(config.head_dim, 8);
    /// assert_eq!(config.ropes[0].inv_freq, [1.0, 0.1, 0.01, 0.001]);
    /// let (name, shape) = &config.expected_tensors()[3];
    /// assert_eq!((name.as_str(), shape.as_slice()), ("model.layers.0.self_attn.k_proj.weight", &[16, 32][..]));
    /// # Ok::<(), lowrank_models::config::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// Names the key, what was expected and what was found: invalid JSON, an unknown architecture, a missing key, a wrong
    /// type, an impossible value, or something that this program does not support.
    pub fn from_json(text: &str, origin: &Path) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|source| ConfigError::Json { origin: origin.to_path_buf(), source })?;
        let keys = Keys::of_file(&value, origin)?;
        let (family, architecture) = find_row(&keys, registry(), |row| (row.model_type, row.architectures))?;
        if !keys.is_absent_or_null("quantization_config") {
            return Err(keys.unsupported(
                "quantization_config",
                "a checkpoint with plain weights (f32, f16 or bf16)",
                "use the unquantised checkpoint as base_model; this program quantises it itself ([quantization.<format>])",
            ));
        }
        let config = (family.read)(&keys)?;
        Ok(Self { architecture, ..config })
    }
}

/// Value of `model_type` and accepted values of `architectures[0]` of a row of a registry.
pub(crate) type RowNames = (&'static str, &'static [&'static str]);

/// The row for `model_type` and `architectures`, and the architecture's name.
pub(crate) fn find_row<R>(
    keys: &Keys<'_>,
    rows: &'static [R],
    names: fn(&R) -> RowNames,
) -> Result<(&'static R, String), ConfigError> {
    let model_type = keys.text("model_type")?;
    let architecture = keys.first_text("architectures")?;
    let found = rows.iter().map(|row| (row, names(row))).find(|(_, (of_row, architectures))| {
        match (model_type, architecture) {
            (Some(model_type), Some(name)) => *of_row == model_type && architectures.contains(&name),
            (Some(model_type), None) => *of_row == model_type,
            (None, Some(name)) => architectures.contains(&name),
            (None, None) => false,
        }
    });
    match found {
        Some((row, (_, architectures))) => Ok((row, architecture.unwrap_or(architectures[0]).to_string())),
        None => Err(ConfigError::UnknownArchitecture {
            origin: keys.origin(),
            architecture: architecture.map(str::to_string),
            model_type: model_type.map(str::to_string),
            known: known_architectures(rows.iter().map(names)),
        }),
    }
}

/// One line per row of a registry, for error messages.
fn known_architectures(rows: impl Iterator<Item = RowNames>) -> String {
    let line =
        |(model_type, architectures): RowNames| format!("  {} (model_type {model_type})", architectures.join(" or "));
    rows.map(line).collect::<Vec<_>>().join("\n")
}
