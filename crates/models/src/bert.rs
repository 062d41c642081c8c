//! BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) for the classification of texts and pairs of texts.
//!
//! | | BERT | RoBERTa |
//! | --- | --- | --- |
//! | position of a token | its column | how many tokens that are no padding end with it, plus the id of the padding |
//! | head, from the first token's row | `pooler` (linear, tanh), `classifier` | `classifier.dense` (linear, tanh), `classifier.out_proj` |

use burn::tensor::{FloatDType, Tensor};
use lowrank_core::lowrank::cast;

use crate::classifier::batch::InputData;
use crate::classifier::config::Trunk;
use crate::classifier::layout::{Kind, Layout, Part, Segment, join};
use crate::config::{ConfigError, Keys, MAX_SIZE};
use crate::decoder::Embedding;
use crate::encoder::{BlockNames, EncoderConfig, LayerNorm, dropped};
use crate::series::{Series, transparent};

/// The first BERT files call the parts of a norm as TensorFlow does.
pub(crate) const OLD_NAMES: &[(&str, &str)] =
    &[("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];

const BLOCK: BlockNames = BlockNames {
    linear: [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
    norms: ["attention.output.LayerNorm", "output.LayerNorm"],
};

/// Sizes and switches of a BERT or RoBERTa.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// The blocks.
    pub encoder: EncoderConfig,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Rows of the position embedding.
    pub max_positions: usize,
    /// Rows of the token type embedding.
    pub type_vocab_size: usize,
    /// Where positions count tokens that are no padding (RoBERTa), the id of the padding; positions begin after it.
    pub counts_after: Option<i32>,
    /// The head is RoBERTa's, not BERT's.
    pub two_layer_head: bool,
}

fn read(keys: &Keys<'_>) -> Result<TextConfig, ConfigError> {
    for (key, reason) in [("is_decoder", "an encoder"), ("add_cross_attention", "no attention to another model")] {
        if keys.flag(key)?.unwrap_or(false) {
            return Err(keys.unsupported(key, reason, "use a checkpoint that was made for classification"));
        }
    }
    if !matches!(keys.text("position_embedding_type")?, None | Some("absolute")) {
        let hint = "use a checkpoint with absolute positions";
        return Err(keys.unsupported("position_embedding_type", "\"absolute\"", hint));
    }
    Ok(TextConfig {
        encoder: EncoderConfig::read(keys, false)?,
        vocab_size: keys.required_size("vocab_size", MAX_SIZE)?,
        max_positions: keys.size("max_position_embeddings", MAX_SIZE)?.unwrap_or(512),
        type_vocab_size: keys.size("type_vocab_size", MAX_SIZE)?.unwrap_or(2),
        counts_after: None,
        two_layer_head: false,
    })
}

pub(crate) fn read_bert(keys: &Keys<'_>) -> Result<Trunk, ConfigError> {
    Ok(Trunk::Text(read(keys)?))
}

pub(crate) fn read_roberta(keys: &Keys<'_>) -> Result<Trunk, ConfigError> {
    let base = read(keys)?;
    let padding = keys.token_id("pad_token_id", Some(1))?;
    match padding {
        Some(id) if (id as usize) + 1 < base.max_positions => {
            Ok(Trunk::Text(TextConfig { counts_after: Some(id as i32), two_layer_head: true, ..base }))
        }
        other => {
            let expected =
                format!("an id below max_position_embeddings ({}): positions begin after it", base.max_positions);
            Err(keys.invalid("pad_token_id", expected, format!("{other:?}")))
        }
    }
}

/// The modules of block `names` of an encoder.
pub(crate) fn block_parts(names: &BlockNames, config: &EncoderConfig) -> Vec<Part> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let linear = |index: usize| match index {
        0..=2 => Kind::Linear { d_in: hidden, d_out: hidden, bias: config.qkv_bias },
        3 => Kind::Linear { d_in: hidden, d_out: hidden, bias: true },
        4 => Kind::Linear { d_in: hidden, d_out: inner, bias: true },
        _ => Kind::Linear { d_in: inner, d_out: hidden, bias: true },
    };
    let linear = names.linear.iter().enumerate().map(|(index, name)| Part::new(*name, linear(index)));
    let norms = names.norms.iter().map(|name| Part::new(*name, Kind::Norm { width: hidden }));
    linear.chain(norms).collect()
}

impl TextConfig {
    /// Most tokens of a text.
    pub fn max_tokens(&self) -> usize {
        self.max_positions - self.counts_after.map_or(0, |padding| padding as usize + 1)
    }

    /// Name of the trunk.
    fn trunk(&self) -> &'static str {
        if self.two_layer_head { "roberta" } else { "bert" }
    }

    /// Name of the token embedding.
    pub fn embedding(&self) -> &'static str {
        match self.two_layer_head {
            true => "roberta.embeddings.word_embeddings",
            false => "bert.embeddings.word_embeddings",
        }
    }

    /// The modules of the model.
    pub fn layout(&self, labels: usize) -> Layout {
        let width = self.encoder.hidden_size;
        let table = |name: &str, rows: usize| Part::new(name, Kind::Table { rows, width });
        let linear = |name: &str, d_out: usize| Part::new(name, Kind::Linear { d_in: width, d_out, bias: true });
        let block = |index: usize| Segment {
            name: format!("{}.encoder.layer.{index}", self.trunk()),
            parts: block_parts(&BLOCK, &self.encoder),
        };
        let [dense, out] = match self.two_layer_head {
            true => ["classifier.dense", "classifier.out_proj"],
            false => ["bert.pooler.dense", "classifier"],
        };
        Layout {
            stem: Segment {
                name: join(self.trunk(), "embeddings"),
                parts: vec![
                    table("word_embeddings", self.vocab_size),
                    table("position_embeddings", self.max_positions),
                    table("token_type_embeddings", self.type_vocab_size),
                    Part::new("LayerNorm", Kind::Norm { width }),
                ],
            },
            blocks: (0..self.encoder.num_layers).map(block).collect(),
            head: Segment { name: String::new(), parts: vec![linear(dense, width), linear(out, labels)] },
        }
    }
}

/// Token, position and token type embeddings with their norm.
#[derive(Clone, Debug, Default)]
pub struct TextStem {
    /// Tokens, positions, token types.
    pub tables: Series<Embedding>,
    /// One norm.
    pub norms: Series<LayerNorm>,
}

transparent!(TextStem { tables, norms });

impl TextStem {
    /// The first hidden state, `[rows * cols, hidden]`.
    pub fn forward(&self, data: &InputData, config: &EncoderConfig, dtype: FloatDType, training: bool) -> Tensor<2> {
        let InputData::Text { ids, types, positions } = data else { unreachable!("a text model is given texts") };
        let [x, position, kind] = [(0, ids), (1, positions), (2, types)]
            .map(|(table, rows)| lookup(&self.tables[table], rows.clone(), dtype));
        dropped(self.norms[0].forward(x + kind + position, config.norm_eps), config.dropout, training)
    }
}

/// Rows of an embedding and of its delta, in the compute type.
fn lookup(table: &Embedding, rows: Tensor<1, burn::tensor::Int>, dtype: FloatDType) -> Tensor<2> {
    let x = cast(table.weight.val().select(0, rows.clone()), dtype);
    match &table.delta {
        None => x,
        Some(delta) => {
            let down = cast(delta.down.val().select(0, rows), dtype);
            x + down.matmul(cast(delta.up.val(), dtype)) * delta.scale
        }
    }
}
