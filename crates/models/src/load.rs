//! From a checkpoint folder, or from nothing but its `config.json`, to a [`Decoder`] on a device.
//!
//! Tensors go to the device one at a time straight from the mapped file, so host memory holds one of them beside the model. A
//! linear weight stays as it lies on disk, `[out, in]`, and the model sees its transposed view. One that is to be quantised is
//! packed on the host as it is read, from the values in the file: neither host nor device ever holds the model in full precision.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, Distribution, FloatDType, Shape, Tensor, TensorData};
use lowrank_core::Projection;
use lowrank_core::base::{Base, PackedBase};
use lowrank_core::quant::{Quantisation, QuantiseError};
use lowrank_core::random::Stream;
use lowrank_kernels::Packed;

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
    let values = |name: &str, _: &[usize], dtype| Ok(tensor_data(&checkpoint, name, dtype)?);
    let decoder = build(config, dtype, quantise, device, progress, OnHost(values))?;
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
    let values = |name: &str, shape: &[usize], dtype: FloatDType| {
        let count = shape.iter().product::<usize>();
        let stream = Stream::new(seed, name);
        let values: Vec<f32> = match shape.len() {
            1 if name.ends_with(".bias") => vec![0.0; count],
            1 => vec![norm; count],
            _ => (0..count as u64).map(|i| (stream.normal(i) * deviation) as f32).collect(),
        };
        Ok(TensorData::new(values, shape.to_vec()).convert_dtype(dtype.into()))
    };
    build(config, dtype, quantise, device, &mut |_, _, _| {}, OnHost(values))
}

/// As [`random`], drawn by the device itself, whose generator decides the values; the codes of quantised weights are drawn as
/// they are. Nothing passes through the host: what speed and memory of large models are measured on.
///
/// # Errors
/// An unusable `config.json`; a format that does not exist.
pub fn random_on_device(
    folder: &Path,
    dtype: FloatDType,
    seed: u64,
    quantise: Quantise<'_>,
    device: &Device,
) -> Result<Decoder, LoadError> {
    let config = DecoderConfig::read(folder)?;
    device.seed(seed);
    let drawn = Drawn { deviation: f64::from(config.initializer_range), norm: 1.0 - config.norm_offset };
    build(config, dtype, quantise, device, &mut |_, _, _| {}, drawn)
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

/// Where the tensors of a model come from, by their name and shape on disk.
trait Tensors {
    fn dense<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Tensor<D>, LoadError>;

    /// A linear weight of `dims` `[d_in, d_out]` in packed form.
    fn packed(
        &mut self,
        name: &str,
        dims: [usize; 2],
        quantisation: Quantisation,
        device: &Device,
    ) -> Result<Packed, LoadError>;
}

/// Values that the host has.
struct OnHost<F>(F);

impl<F: FnMut(&str, &[usize], FloatDType) -> Result<TensorData, LoadError>> Tensors for OnHost<F> {
    fn dense<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Tensor<D>, LoadError> {
        Ok(tensor((self.0)(name, &shape, dtype)?, device))
    }

    fn packed(
        &mut self,
        name: &str,
        [d_in, d_out]: [usize; 2],
        quantisation: Quantisation,
        device: &Device,
    ) -> Result<Packed, LoadError> {
        let data = (self.0)(name, &[d_out, d_in], FloatDType::F32)?;
        let values = data.try_into_vec::<f32>().unwrap_or_else(|_| unreachable!("f32 was asked for"));
        let packed = quantisation.pack(&values, [d_in, d_out], device);
        packed.map_err(|source| LoadError::Quantise { name: name.to_owned(), source })
    }
}

/// Values that the device draws.
struct Drawn {
    deviation: f64,
    norm: f32,
}

impl Tensors for Drawn {
    fn dense<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Tensor<D>, LoadError> {
        Ok(match shape.len() {
            1 if name.ends_with(".bias") => Tensor::zeros(shape, (device, DType::from(dtype))),
            1 => Tensor::full(shape, self.norm, (device, DType::from(dtype))),
            _ => Tensor::random(shape, Distribution::Normal(0.0, self.deviation), (device, DType::from(dtype))),
        })
    }

    fn packed(
        &mut self,
        name: &str,
        dims: [usize; 2],
        quantisation: Quantisation,
        device: &Device,
    ) -> Result<Packed, LoadError> {
        let packed = quantisation.drawn(dims, self.deviation, device);
        packed.map_err(|source| LoadError::Quantise { name: name.to_owned(), source })
    }
}

struct Source<'a, T> {
    tensors: T,
    dtype: FloatDType,
    quantise: Quantise<'a>,
    device: &'a Device,
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

impl<T: Tensors> Source<'_, T> {
    fn dense<const D: usize>(&mut self, name: &str, shape: [usize; D]) -> Result<Tensor<D>, LoadError> {
        self.tell(name);
        self.tensors.dense(name, shape, self.dtype, self.device)
    }
    fn tell(&mut self, name: &str) {
        self.done += 1;
        (self.progress)(name, self.done, self.total);
    }
    fn weight(&mut self, module: &str, d_in: usize, d_out: usize) -> Result<Base, LoadError> {
        let name = format!("{module}.weight");
        let Some(quantisation) = (self.quantise)(module) else {
            return Ok(Base::dense(self.dense(&name, [d_out, d_in])?.transpose()));
        };
        self.tell(&name);
        let weight = self.tensors.packed(&name, [d_in, d_out], quantisation, self.device)?;
        Ok(Base::Packed(PackedBase::frozen(weight, quantisation, self.dtype)))
    }
    fn norm(&mut self, name: &str, width: usize) -> Result<Norm, LoadError> {
        Ok(Norm::frozen(self.dense(&format!("{name}.weight"), [width])?))
    }
    fn projection(&mut self, name: &str, d_in: usize, d_out: usize, bias: bool) -> Result<Projection, LoadError> {
        let weight = self.weight(name, d_in, d_out)?;
        let bias = match bias {
            true => Some(self.dense(&format!("{name}.bias"), [d_out])?),
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

/// Builds the modules, asking `tensors` for every one by name and shape on disk.
fn build(
    config: DecoderConfig,
    dtype: FloatDType,
    quantise: Quantise<'_>,
    device: &Device,
    progress: Progress<'_>,
    tensors: impl Tensors,
) -> Result<Decoder, LoadError> {
    let total = config.expected_tensors().len();
    let mut source = Source { tensors, dtype, quantise, device, done: 0, total, progress };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embedding = source.dense("model.embed_tokens.weight", [vocab, hidden])?;
    let embed_tokens =
        Embedding { weight: burn::module::Param::from_tensor(embedding).set_require_grad(false), delta: None };
    let layers = (0..config.num_layers).map(|index| source.block(index, &config)).collect::<Result<_, _>>()?;
    let norm = source.norm("model.norm", hidden)?;
    let lm_head = match config.tie_word_embeddings {
        true => None,
        false => Some(source.projection("lm_head", hidden, vocab, false)?),
    };
    let model = Trunk { embed_tokens, layers, norm };
    Ok(Decoder { model, lm_head, config: Arc::new(config), compute: dtype })
}
