//! The transformer encoder of BERT, RoBERTa and ViT: attention over the whole sequence and a feed-forward layer, with norms
//! after the sums (BERT, arXiv 1810.04805) or before the layers (ViT, arXiv 2010.11929).
//!
//! | order | block |
//! | --- | --- |
//! | norms last | `x = N1(x + attention(x)); x = N2(x + feed_forward(x))` |
//! | norms first | `x = x + attention(N1(x)); x = x + feed_forward(N2(x))` |
//!
//! The hidden dropout that a configuration names is applied in training, that of attention weights is not: the attention
//! kernel never holds them.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Int, Tensor};
use lowrank_core::Projection;
use lowrank_core::lowrank::{cast, dropout_mask};
use lowrank_kernels as kernels;

use crate::config::{Activation, ConfigError, Keys, MAX_SIZE};
use crate::series::{Series, transparent};

/// Bounds what an absurd file can make us allocate before the first tensor is looked at.
const MAX_LAYERS: usize = 10_000;

/// Sizes and switches of an encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Attention heads; divides `hidden_size`.
    pub num_heads: usize,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Added to the variance inside every norm.
    pub norm_eps: f32,
    /// The q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Norms before the layers.
    pub norms_first: bool,
    /// Probability that an output of the embeddings, the attention or the feed-forward layer is dropped in training.
    pub dropout: f64,
}

impl EncoderConfig {
    /// Reads what all encoders have in common; a key that is absent has the default of transformers, except the sizes.
    pub(crate) fn read(keys: &Keys<'_>, norms_first: bool) -> Result<Self, ConfigError> {
        let hidden_size = keys.required_size("hidden_size", MAX_SIZE)?;
        let num_heads = keys.required_size("num_attention_heads", MAX_SIZE)?;
        if !hidden_size.is_multiple_of(num_heads) {
            let expected = format!("a multiple of num_attention_heads ({num_heads})");
            return Err(keys.invalid("hidden_size", expected, hidden_size.to_string()));
        }
        Ok(Self {
            hidden_size,
            intermediate_size: keys.required_size("intermediate_size", MAX_SIZE)?,
            num_layers: keys.required_size("num_hidden_layers", MAX_LAYERS)?,
            num_heads,
            activation: activation(keys)?,
            norm_eps: keys.positive("layer_norm_eps")?.unwrap_or(1e-12) as f32,
            qkv_bias: keys.flag("qkv_bias")?.unwrap_or(true),
            norms_first,
            dropout: probability(keys, "hidden_dropout_prob")?.unwrap_or(0.0),
        })
    }
}

/// A number in [0, 1).
pub(crate) fn probability(keys: &Keys<'_>, key: &str) -> Result<Option<f64>, ConfigError> {
    match keys.number(key)? {
        Some(p) if !(0.0..1.0).contains(&p) => Err(keys.invalid(key, "a probability in [0, 1)", p.to_string())),
        p => Ok(p),
    }
}

/// `x` with each entry dropped with probability `p` in training, and the others scaled up to keep the mean. Drawn from the
/// device's generator: seed it before, to repeat a forward pass.
pub(crate) fn dropped(x: Tensor<2>, p: f64, training: bool) -> Tensor<2> {
    if !training || p == 0.0 {
        return x;
    }
    let mask = dropout_mask(x.dims(), p, x.dtype().into(), &x.device());
    match x.is_autodiff() {
        true => x * Tensor::from_inner(mask),
        false => x * mask,
    }
}

fn activation(keys: &Keys<'_>) -> Result<Activation, ConfigError> {
    match keys.text("hidden_act")? {
        None | Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some(other) => {
            let expected = "gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, silu or another spelling of them";
            Err(keys.invalid("hidden_act", expected, format!("{other:?}")))
        }
    }
}

/// Layer normalisation: `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` (arXiv 1607.06450).
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// Gain, `[d]`.
    pub weight: Param<Tensor<1>>,
    /// Shift, `[d]`.
    pub bias: Param<Tensor<1>>,
}

impl LayerNorm {
    /// A frozen norm.
    pub fn frozen(weight: Tensor<1>, bias: Tensor<1>) -> Self {
        let frozen = |values| Param::from_tensor(values).set_require_grad(false);
        Self { weight: frozen(weight), bias: frozen(bias) }
    }

    /// `x [t, d]` to the same shape and type, computed in f32: the root-mean-square norm of the centred x.
    pub fn forward(&self, x: Tensor<2>, eps: f32) -> Tensor<2> {
        let dtype = x.dtype().into();
        let x = cast(x, FloatDType::F32);
        let centred = x.clone() - x.mean_dim(1);
        let normed = kernels::rms_norm(centred, cast(self.weight.val(), FloatDType::F32), eps, 0.0);
        cast(normed + cast(self.bias.val(), FloatDType::F32).unsqueeze::<2>(), dtype)
    }
}

/// Index of a projection in [`EncoderBlock::linear`].
pub mod linear {
    /// Queries, `[hidden, hidden]`.
    pub const QUERY: usize = 0;
    /// Keys, `[hidden, hidden]`.
    pub const KEY: usize = 1;
    /// Values, `[hidden, hidden]`.
    pub const VALUE: usize = 2;
    /// Out of the attention, `[hidden, hidden]`.
    pub const OUT: usize = 3;
    /// Into the feed-forward layer, `[hidden, intermediate]`.
    pub const UP: usize = 4;
    /// Out of the feed-forward layer, `[intermediate, hidden]`.
    pub const DOWN: usize = 5;
}

/// What the projections and norms of a block are called in a family, in the order of [`linear`].
pub(crate) struct BlockNames {
    pub linear: [&'static str; 6],
    pub norms: [&'static str; 2],
}

/// One block.
#[derive(Clone, Debug, Default)]
pub struct EncoderBlock {
    /// See [`linear`] for the order.
    pub linear: Series<Projection>,
    /// Norm of the attention, norm of the feed-forward layer.
    pub norms: Series<LayerNorm>,
}

transparent!(EncoderBlock { linear, norms });

/// The shape of a batch and which keys its queries see.
#[derive(Clone, Debug)]
pub struct Grid {
    /// Sequences.
    pub rows: usize,
    /// Tokens of a sequence.
    pub cols: usize,
    /// Visible keys of every query, `[rows, cols, 2]`.
    pub ranges: Tensor<3, Int>,
}

impl EncoderBlock {
    /// `x [t, hidden]` through the block.
    pub fn forward(&self, x: Tensor<2>, grid: &Grid, config: &EncoderConfig, training: bool) -> Tensor<2> {
        let norm = |index: usize, x: Tensor<2>| self.norms[index].forward(x, config.norm_eps);
        if config.norms_first {
            let x = x.clone() + self.attention(norm(0, x), grid, config, training);
            return x.clone() + self.feed_forward(norm(1, x), config, training);
        }
        let x = norm(0, x.clone() + self.attention(x, grid, config, training));
        norm(1, x.clone() + self.feed_forward(x, config, training))
    }

    fn attention(&self, x: Tensor<2>, grid: &Grid, config: &EncoderConfig, training: bool) -> Tensor<2> {
        let (heads, width) = (config.num_heads, config.hidden_size / config.num_heads);
        let [q, k, v] = [linear::QUERY, linear::KEY, linear::VALUE]
            .map(|index| self.linear[index].forward(x.clone(), training).reshape([grid.rows, grid.cols, heads, width]));
        let scale = (width as f64).powf(-0.5) as f32;
        let out = kernels::attention(q, k, v, grid.ranges.clone(), scale, 0.0);
        let out = self.linear[linear::OUT].forward(out.reshape([grid.rows * grid.cols, heads * width]), training);
        dropped(out, config.dropout, training)
    }

    fn feed_forward(&self, x: Tensor<2>, config: &EncoderConfig, training: bool) -> Tensor<2> {
        let up = self.linear[linear::UP].forward(x, training);
        let activation = match config.activation {
            Activation::Silu => kernels::Activation::Silu,
            Activation::GeluTanh => kernels::Activation::GeluTanh,
            Activation::Gelu => kernels::Activation::Gelu,
        };
        let ones = up.ones_like();
        let down = self.linear[linear::DOWN].forward(kernels::gated(up, ones, activation), training);
        dropped(down, config.dropout, training)
    }
}
