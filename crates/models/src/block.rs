//! One transformer block: attention and feed-forward with their norms.
//!
//! Shapes: `t = rows * cols` tokens, `h` query heads, `g` key/value heads, `d` head width, `f` feed-forward width.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use lowrank_core::Projection;
use lowrank_kernels as kernels;

use crate::config::{Activation, DecoderConfig, LayerConfig};
use crate::inputs::Inputs;

/// RMS normalisation with its gain.
#[derive(Module, Debug)]
pub struct Norm {
    /// Gain, `[d]`.
    pub weight: Param<Tensor<1>>,
}

impl Norm {
    /// A frozen norm.
    pub fn frozen(weight: Tensor<1>) -> Self {
        Self { weight: Param::from_tensor(weight).set_require_grad(false) }
    }

    /// `x [t, d]` to the same shape.
    pub fn forward(&self, x: Tensor<2>, config: &DecoderConfig) -> Tensor<2> {
        kernels::rms_norm(x, self.weight.val(), config.norm_eps, config.norm_offset)
    }
}

/// Grouped-query attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[hidden, h d]`.
    pub q_proj: Projection,
    /// `[hidden, g d]`.
    pub k_proj: Projection,
    /// `[hidden, g d]`.
    pub v_proj: Projection,
    /// `[h d, hidden]`.
    pub o_proj: Projection,
    /// Norm of every query head (Qwen 3, Gemma 3).
    pub q_norm: Option<Norm>,
    /// Norm of every key head.
    pub k_norm: Option<Norm>,
}

/// Gated feed-forward layer.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[hidden, f]`.
    pub gate_proj: Projection,
    /// `[hidden, f]`.
    pub up_proj: Projection,
    /// `[f, hidden]`.
    pub down_proj: Projection,
}

/// One block.
#[derive(Module, Debug)]
pub struct Block {
    /// Before attention.
    pub input_layernorm: Norm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the feed-forward layer, or with sandwich norms after attention.
    pub post_attention_layernorm: Norm,
    /// Before the feed-forward layer (sandwich norms).
    pub pre_feedforward_layernorm: Option<Norm>,
    /// After the feed-forward layer (sandwich norms).
    pub post_feedforward_layernorm: Option<Norm>,
    /// Feed-forward layer.
    pub mlp: Mlp,
}

/// Keys and values of the tokens seen so far, `[rows, capacity, g, d]` each.
#[derive(Clone, Debug)]
pub struct KeyValueCache {
    keys: Tensor<4>,
    values: Tensor<4>,
    len: usize,
}

impl KeyValueCache {
    /// An empty cache for `capacity` tokens of each of `rows` sequences.
    pub fn new(
        rows: usize,
        capacity: usize,
        config: &DecoderConfig,
        dtype: burn::tensor::FloatDType,
        device: &Device,
    ) -> Self {
        let dims = [rows, capacity, config.num_kv_heads, config.head_dim];
        let empty = || Tensor::<4>::zeros(dims, device).cast(dtype);
        Self { keys: empty(), values: empty(), len: 0 }
    }

    /// Writes the new tokens in place and returns everything, unused capacity included: the key ranges hide it.
    fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [rows, new, groups, width] = keys.dims();
        let slot = [0..rows, self.len..self.len + new, 0..groups, 0..width];
        let old = std::mem::replace(&mut self.keys, Tensor::zeros([1, 1, 1, 1], &keys.device()));
        self.keys = old.slice_assign(slot.clone(), keys);
        let old = std::mem::replace(&mut self.values, Tensor::zeros([1, 1, 1, 1], &values.device()));
        self.values = old.slice_assign(slot, values);
        self.len += new;
        (self.keys.clone(), self.values.clone())
    }
}

impl Attention {
    fn forward(
        &self,
        x: Tensor<2>,
        inputs: &Inputs,
        config: &DecoderConfig,
        layer: LayerConfig,
        training: bool,
        cache: Option<&mut KeyValueCache>,
    ) -> Tensor<2> {
        let (rows, cols) = (inputs.rows, inputs.cols);
        let (h, g, d) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let heads = |x: Tensor<2>, heads: usize| x.reshape([rows, cols, heads, d]);
        let normed = |x: Tensor<2>, norm: &Option<Norm>, heads: usize| match norm {
            Some(norm) => norm.forward(x.reshape([rows * cols * heads, d]), config).reshape([rows, cols, heads, d]),
            None => x.reshape([rows, cols, heads, d]),
        };
        let (cos, sin) = &inputs.ropes[layer.rope];
        let rotated = |x: Tensor<4>| kernels::rotary(x, cos.clone(), sin.clone());
        let q = rotated(normed(self.q_proj.forward(x.clone(), training), &self.q_norm, h));
        let k = rotated(normed(self.k_proj.forward(x.clone(), training), &self.k_norm, g));
        let v = heads(self.v_proj.forward(x, training), g);
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v),
            None => (k, v),
        };
        let softcap = config.attention_softcap.unwrap_or(0.0);
        let hints = kernels::AttentionHints { keys: inputs.known_keys(layer.window), ..Default::default() };
        let ranges = inputs.range(layer.window);
        let (out, _) = kernels::attention_with(q, k, v, ranges, config.attention_scale, softcap, hints);
        self.o_proj.forward(out.reshape([rows * cols, h * d]), training)
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<2>, config: &DecoderConfig, training: bool) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone(), training);
        let up = self.up_proj.forward(x, training);
        let activation = match config.activation {
            Activation::Silu => kernels::Activation::Silu,
            Activation::GeluTanh => kernels::Activation::GeluTanh,
            Activation::Gelu => kernels::Activation::Gelu,
        };
        self.down_proj.forward(kernels::gated(gate, up, activation), training)
    }
}

impl Block {
    /// The linear layers with their names within the block.
    pub fn projections(&self) -> [(&'static str, &Projection); 7] {
        let (a, m) = (&self.self_attn, &self.mlp);
        [
            ("self_attn.q_proj", &a.q_proj),
            ("self_attn.k_proj", &a.k_proj),
            ("self_attn.v_proj", &a.v_proj),
            ("self_attn.o_proj", &a.o_proj),
            ("mlp.gate_proj", &m.gate_proj),
            ("mlp.up_proj", &m.up_proj),
            ("mlp.down_proj", &m.down_proj),
        ]
    }

    /// [`Block::projections`], to change them.
    pub fn projections_mut(&mut self) -> [(&'static str, &mut Projection); 7] {
        let (a, m) = (&mut self.self_attn, &mut self.mlp);
        [
            ("self_attn.q_proj", &mut a.q_proj),
            ("self_attn.k_proj", &mut a.k_proj),
            ("self_attn.v_proj", &mut a.v_proj),
            ("self_attn.o_proj", &mut a.o_proj),
            ("mlp.gate_proj", &mut m.gate_proj),
            ("mlp.up_proj", &mut m.up_proj),
            ("mlp.down_proj", &mut m.down_proj),
        ]
    }

    /// The residual stream `x [t, hidden]` through this block.
    pub fn forward(
        &self,
        x: Tensor<2>,
        inputs: &Inputs,
        config: &DecoderConfig,
        layer: LayerConfig,
        training: bool,
        cache: Option<&mut KeyValueCache>,
    ) -> Tensor<2> {
        let normed = self.input_layernorm.forward(x.clone(), config);
        let attended = self.self_attn.forward(normed, inputs, config, layer, training, cache);
        let (Some(before), Some(after)) = (&self.pre_feedforward_layernorm, &self.post_feedforward_layernorm) else {
            let x = x + attended;
            let normed = self.post_attention_layernorm.forward(x.clone(), config);
            return x + self.mlp.forward(normed, config, training);
        };
        let x = x + self.post_attention_layernorm.forward(attended, config);
        let normed = before.forward(x.clone(), config);
        x + after.forward(self.mlp.forward(normed, config, training), config)
    }
}
