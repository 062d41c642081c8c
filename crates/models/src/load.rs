//! From a checkpoint folder, or from nothing but its `config.json`, to a [`Decoder`] on a device.
//!
//! Tensors go to the device one at a time straight from the mapped file, so host memory holds one of them beside the model. A
//! linear weight stays as it lies on disk, `[out, in]`, and the model sees its transposed view. One that is to be quantised is
//! packed on the host as it is read, from the values in the file: neither host nor device ever holds the model in full precision.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, FloatDType, Shape, Tensor, TensorData};
use lowrank_core::Projection;
use lowrank_core::base::{Base, PackedBase};
use lowrank_core::quant::{Quantisation, QuantiseError};
use lowrank_core::random::Stream;

use crate::block::{Attention, Block, Mlp, Norm};
use crate::config::{ConfigError, DecoderConfig};
use crate::decoder::{Decoder, Embedding, Trunk};
use crate::hf::{Checkpoint, Dtype, HfError};
use crate::save::held;

/// What can go wrong when a model is loaded. Both kinds say what, where, expected and got, with a hint.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// `config.json` is missing, malformed or of an unknown family.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tensors do not fit.
    #[error(transparent)]
    Checkpoint(#[from] HfError),
    /// A weight cannot be quantised.
    #[error("`{name}` of the checkpoint cannot be quantised: {source}")]
    Quantise {
        /// The tensor.
        name: String,
        /// Why.
        source: QuantiseError,
    },
}

/// Says of a linear layer, by its module name, how its weight is to be packed; `None` leaves it dense.
pub type Quantise<'a> = &'a dyn Fn(&str) -> Option<Quantisation>;

/// Tells how far loading is: name of the tensor, its number, how many there are.
pub type Progress<'a> = &'a mut dyn FnMut(&str, usize, usize);

/// Loads the model in `folder`: frozen weights and activations in `dtype`.
///
/// # Errors
/// An unknown architecture, a missing or extra tensor, a wrong shape or type: one message names all of them.
pub fn load(folder: &Path, dtype: FloatDType, device: &Device, progress: Progress<'_>) -> Result<Decoder, LoadError> {
    load_quantised(folder, dtype, &|_| None, device, progress)
}

/// As [`load`], with the weights of some linear layers packed.
///
/// # Errors
/// As [`load`]; a weight that is not finite, a format that does not exist.
pub fn load_quantised(
    folder: &Path,
    dtype: FloatDType,
    quantise: Quantise<'_>,
    device: &Device,
    progress: Progress<'_>,
) -> Result<Decoder, LoadError> {
    let config = DecoderConfig::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    checkpoint.check(&config.expected_tensors(), |name| config.is_ignorable(name))?;
    let decoder =
        build(config, dtype, quantise, device, progress, |name, _, dtype| Ok(tensor_data(&checkpoint, name, dtype)?))?;
    let held = held(&decoder);
    if held.packed > 0 {
        tracing::info!("{held}");
    }
    Ok(decoder)
}

/// A model with the field's usual random start: normal with `initializer_range`, norms at their identity, biases zero.
///
/// # Errors
/// An unusable `config.json`.
pub fn random(folder: &Path, dtype: FloatDType, seed: u64, device: &Device) -> Result<Decoder, LoadError> {
    random_quantised(folder, dtype, &|_| None, seed, device)
}

/// As [`random`], with the weights of some linear layers packed.
///
/// # Errors
/// As [`random`]; a format that does not exist.
pub fn random_quantised(
    folder: &Path,
    dtype: FloatDType,
    quantise: Quantise<'_>,
    seed: u64,
    device: &Device,
) -> Result<Decoder, LoadError> {
    let config = DecoderConfig::read(folder)?;
    let (deviation, norm) = (f64::from(config.initializer_range), 1.0 - config.norm_offset);
    build(config, dtype, quantise, device, &mut |_, _, _| {}, |name, shape, dtype| {
        let count = shape.iter().product::<usize>();
        let stream = Stream::new(seed, name);
        let values: Vec<f32> = match shape.len() {
            1 if name.ends_with(".bias") => vec![0.0; count],
            1 => vec![norm; count],
            _ => (0..count as u64).map(|i| (stream.normal(i) * deviation) as f32).collect(),
        };
        Ok(TensorData::new(values, shape.to_vec()).convert_dtype(dtype.into()))
    })
}

/// A tensor of a checkpoint in the wanted type.
pub(crate) fn tensor_data(checkpoint: &Checkpoint, name: &str, dtype: FloatDType) -> Result<TensorData, HfError> {
    let view = checkpoint.get(name)?;
    let shape = Shape::from(view.shape.to_vec());
    Ok(match dtype {
        FloatDType::BF16 => TensorData::from_bytes_vec(view.to_dtype(Dtype::BF16), shape, DType::BF16),
        FloatDType::F16 => TensorData::from_bytes_vec(view.to_dtype(Dtype::F16), shape, DType::F16),
        _ => TensorData::new(view.to_f32(), shape),
    })
}

/// On the device in the type it has: Burn's default would be f32 whatever the data is.
pub(crate) fn tensor<const D: usize>(data: TensorData, device: &Device) -> Tensor<D> {
    let dtype = data.dtype();
    Tensor::from_data(data, (device, dtype))
}

struct Source<'a, F> {
    next: F,
    dtype: FloatDType,
    quantise: Quantise<'a>,
    device: &'a Device,
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

impl<F: FnMut(&str, &[usize], FloatDType) -> Result<TensorData, LoadError>> Source<'_, F> {
    fn data(&mut self, name: &str, shape: &[usize]) -> Result<TensorData, LoadError> {
        self.data_as(name, shape, self.dtype)
    }
    fn data_as(&mut self, name: &str, shape: &[usize], dtype: FloatDType) -> Result<TensorData, LoadError> {
        self.done += 1;
        (self.progress)(name, self.done, self.total);
        (self.next)(name, shape, dtype)
    }
    fn weight(&mut self, module: &str, d_in: usize, d_out: usize) -> Result<Base, LoadError> {
        let (name, shape) = (format!("{module}.weight"), [d_out, d_in]);
        let Some(quantisation) = (self.quantise)(module) else {
            return Ok(Base::dense(tensor::<2>(self.data(&name, &shape)?, self.device).transpose()));
        };
        let data = self.data_as(&name, &shape, FloatDType::F32)?;
        let values = data.try_into_vec::<f32>().unwrap_or_else(|_| unreachable!("f32 was asked for"));
        let weight = quantisation
            .pack(&values, [d_in, d_out], self.device)
            .map_err(|source| LoadError::Quantise { name, source })?;
        Ok(Base::Packed(PackedBase::frozen(weight, quantisation, self.dtype)))
    }
    fn norm(&mut self, name: &str, width: usize) -> Result<Norm, LoadError> {
        let data = self.data(&format!("{name}.weight"), &[width])?;
        Ok(Norm::frozen(tensor(data, self.device)))
    }
    fn projection(&mut self, name: &str, d_in: usize, d_out: usize, bias: bool) -> Result<Projection, LoadError> {
        let weight = self.weight(name, d_in, d_out)?;
        let bias = match bias {
            true => Some(tensor(self.data(&format!("{name}.bias"), &[d_out])?, self.device)),
            false => None,
        };
        Ok(Projection::on(weight, bias))
    }
    fn block(&mut self, index: usize, c: &DecoderConfig) -> Result<Block, LoadError> {
        let at = |part: &str| format!("model.layers.{index}.{part}");
        let (hidden, q, kv, f) =
            (c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size);
        let head_norm = |source: &mut Self, name: &str| match c.qk_norm {
            true => source.norm(&at(name), c.head_dim).map(Some),
            false => Ok(None),
        };
        let sandwich = |source: &mut Self, name: &str| match c.sandwich_norms {
            true => source.norm(&at(name), hidden).map(Some),
            false => Ok(None),
        };
        Ok(Block {
            input_layernorm: self.norm(&at("input_layernorm"), hidden)?,
            self_attn: Attention {
                q_proj: self.projection(&at("self_attn.q_proj"), hidden, q, c.qkv_bias)?,
                k_proj: self.projection(&at("self_attn.k_proj"), hidden, kv, c.qkv_bias)?,
                v_proj: self.projection(&at("self_attn.v_proj"), hidden, kv, c.qkv_bias)?,
                o_proj: self.projection(&at("self_attn.o_proj"), q, hidden, c.o_bias)?,
                q_norm: head_norm(self, "self_attn.q_norm")?,
                k_norm: head_norm(self, "self_attn.k_norm")?,
            },
            post_attention_layernorm: self.norm(&at("post_attention_layernorm"), hidden)?,
            pre_feedforward_layernorm: sandwich(self, "pre_feedforward_layernorm")?,
            post_feedforward_layernorm: sandwich(self, "post_feedforward_layernorm")?,
            mlp: Mlp {
                gate_proj: self.projection(&at("mlp.gate_proj"), hidden, f, c.mlp_bias)?,
                up_proj: self.projection(&at("mlp.up_proj"), hidden, f, c.mlp_bias)?,
                down_proj: self.projection(&at("mlp.down_proj"), f, hidden, c.mlp_bias)?,
            },
        })
    }
}

/// Builds the modules, asking `next` for every tensor by name and shape on disk.
fn build(
    config: DecoderConfig,
    dtype: FloatDType,
    quantise: Quantise<'_>,
    device: &Device,
    progress: Progress<'_>,
    next: impl FnMut(&str, &[usize], FloatDType) -> Result<TensorData, LoadError>,
) -> Result<Decoder, LoadError> {
    let total = config.expected_tensors().len();
    let mut source = Source { next, dtype, quantise, device, done: 0, total, progress };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embedding = source.data("model.embed_tokens.weight", &[vocab, hidden])?;
    let embed_tokens = Embedding {
        weight: burn::module::Param::from_tensor(tensor(embedding, device)).set_require_grad(false),
        delta: None,
    };
    let layers = (0..config.num_layers).map(|index| source.block(index, &config)).collect::<Result<_, _>>()?;
    let norm = source.norm("model.norm", hidden)?;
    let lm_head = match config.tie_word_embeddings {
        true => None,
        false => Some(source.projection("lm_head", hidden, vocab, false)?),
    };
    let model = Trunk { embed_tokens, layers, norm };
    Ok(Decoder { model, lm_head, config: Arc::new(config), compute: dtype })
}
