//! One AdamW step on moments that are kept in 8 bits (arXiv 2110.02861), as bitsandbytes' blockwise AdamW computes it.
//!
//! Per element, in f32: `m = b1 m + (1 - b1) g`; `v = b2 v + (1 - b2) g^2`;
//! `p = (1 - lr wd) p - lr sqrt(c2) / c1 * m / (sqrt(v) + sqrt(c2) eps)` with `c1 = 1 - b1^t`, `c2 = 1 - b2^t` (torch's
//! form). The parameter sees the new moments before they are rounded to codes ([`crate::map8`], one scale per block of
//! consecutive values). Two rules keep the codes harmless: a negative m never gets the code of 0, so its sign is kept;
//! where v is not finite, both moments become 0 and the parameter stays.
//!
//! State: `2 + 8 / block` bytes a value. Memory bound: reads 10 and writes 6 bytes a value with an f32 parameter and
//! gradient. A GPU may contract products and sums and divide with an error of some units in the last place, so its
//! quotients differ from the CPU's in the last bits: a code differs by one where a quotient is that near to a
//! boundary.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{DType, Device, Int, Shape, Slice, Tensor, TensorData};

use crate::map8::{Map, largest_magnitude};
use crate::packed::reference::{spread, unpack};
use crate::plain::Plain;

/// The numbers of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam8 {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Decoupled weight decay, applied before the update.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u32,
}

/// What the loops over values need.
pub(crate) struct Factors {
    /// `1 - lr wd`
    pub decay: f32,
    /// `lr sqrt(c2) / c1`
    pub step_size: f32,
    /// `sqrt(c2) eps`
    pub eps: f32,
    /// b1 and b2.
    pub kept: [f32; 2],
    /// `1 - b1` and `1 - b2`.
    pub added: [f32; 2],
}

impl Adam8 {
    pub(crate) fn factors(&self) -> Factors {
        let c1 = 1.0 - self.betas.0.powi(self.step as i32);
        let c2 = 1.0 - self.betas.1.powi(self.step as i32);
        Factors {
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            step_size: (self.learning_rate * c2.sqrt() / c1) as f32,
            eps: (c2.sqrt() * self.eps) as f32,
            kept: [self.betas.0 as f32, self.betas.1 as f32],
            added: [(1.0 - self.betas.0) as f32, (1.0 - self.betas.1) as f32],
        }
    }
}

/// One moment on the host: a code a value, and the largest magnitude of each block.
#[derive(Debug)]
pub struct Moment<'a> {
    /// Codes.
    pub codes: &'a mut [u8],
    /// One a block.
    pub absmax: &'a mut [f32],
}

/// Both moments of a tensor on a device, flattened.
#[derive(Clone, Debug)]
pub struct Moments8 {
    /// `[2, words]`, four codes a word from the lowest bits on: of m in the signed map, of v in the unsigned one.
    codes: Tensor<2, Int>,
    /// `[2, blocks]`: the largest magnitude of each block.
    absmax: Tensor<2>,
    /// `[4, 256]`: values and bounds of both maps.
    maps: Tensor<2>,
    len: usize,
    block: usize,
}

impl Moments8 {
    /// From codes and scales of m and v, in this order.
    ///
    /// # Panics
    /// Where the lengths do not belong together.
    pub fn new(codes: [&[u8]; 2], absmax: [&[f32]; 2], block: usize, device: &Device) -> Self {
        let (len, blocks) = (codes[0].len(), codes[0].len().div_ceil(block));
        assert!(
            codes[1].len() == len && absmax.iter().all(|scales| scales.len() == blocks),
            "codes and scales of one size"
        );
        let words = len.div_ceil(4);
        let zeros = [Map::signed().zero(), Map::unsigned().zero()];
        let packed = codes.into_iter().zip(zeros).flat_map(|(codes, zero)| {
            codes
                .chunks(4)
                .map(move |part| i32::from_le_bytes(std::array::from_fn(|i| part.get(i).copied().unwrap_or(zero))))
        });
        let packed = TensorData::new(packed.collect::<Vec<_>>(), [2, words]);
        let (first, second) = (Map::signed(), Map::unsigned());
        let maps = [first.values, *first.bounds(), second.values, *second.bounds()].concat();
        let float =
            |values: Vec<f32>, dims: [usize; 2]| Tensor::from_data(TensorData::new(values, dims), (device, DType::F32));
        Self {
            codes: Tensor::from_data(packed, (device, DType::I32)),
            absmax: float(absmax.concat(), [2, blocks]),
            maps: float(maps, [4, 256]),
            len,
            block,
        }
    }

    /// Zeros.
    ///
    /// # Panics
    /// Where `block` is 0.
    pub fn zeros(len: usize, block: usize, device: &Device) -> Self {
        let [first, second] = [Map::signed(), Map::unsigned()].map(|map| vec![map.zero(); len]);
        let absmax = vec![0.0; len.div_ceil(block)];
        Self::new([&first, &second], [&absmax, &absmax], block, device)
    }

    /// Codes and scales of m, then of v; waits for the device.
    pub fn to_host(&self) -> [(Vec<u8>, Vec<f32>); 2] {
        let words: Vec<i32> = self.codes.clone().cast(burn::tensor::IntDType::I32).into_data().iter::<i32>().collect();
        let absmax: Vec<f32> = self.absmax.clone().into_data().iter::<f32>().collect();
        let (words_each, blocks) = (words.len() / 2, absmax.len() / 2);
        [0, 1].map(|part| {
            let codes = words[part * words_each..][..words_each].iter().flat_map(|word| word.to_le_bytes());
            (codes.take(self.len).collect(), absmax[part * blocks..][..blocks].to_vec())
        })
    }

    /// Values that share a scale.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Where they lie.
    pub fn device(&self) -> Device {
        self.absmax.device()
    }

    /// Bytes of codes and scales of both.
    pub fn bytes(&self) -> usize {
        2 * (self.len + 4 * self.len.div_ceil(self.block))
    }

    pub(crate) fn into_parts(self) -> (Tensor<2, Int>, Tensor<2>, Tensor<2>, usize) {
        (self.codes, self.absmax, self.maps, self.block)
    }

    pub(crate) fn parts(&self) -> (Tensor<2>, usize, usize) {
        (self.maps.clone(), self.len, self.block)
    }

    pub(crate) fn of_parts(
        codes: Tensor<2, Int>,
        absmax: Tensor<2>,
        (maps, len, block): (Tensor<2>, usize, usize),
    ) -> Self {
        Self { codes, absmax, maps, len, block }
    }
}

/// The step on the host.
///
/// # Panics
/// Where the lengths differ.
pub fn on_host(
    parameter: &mut [f32],
    gradient: &[f32],
    first: Moment<'_>,
    second: Moment<'_>,
    block: usize,
    rule: Adam8,
) {
    let len = first.codes.len();
    assert!(parameter.len() == len && gradient.len() == len, "{len} moments, {} gradients", gradient.len());
    let Factors { decay, step_size, eps, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    let (first_map, second_map) = (Map::signed(), Map::unsigned());
    let (mut m, mut v) = (vec![0.0f32; block.min(len)], vec![0.0f32; block.min(len)]);

    for (index, (parameter, gradient)) in parameter.chunks_mut(block).zip(gradient.chunks(block)).enumerate() {
        let range = index * block..index * block + gradient.len();
        let (m, v) = (&mut m[..gradient.len()], &mut v[..gradient.len()]);
        let first_codes = &mut first.codes[range.clone()];
        let second_codes = &mut second.codes[range];
        // The look-ups apart from the arithmetic, which then vectorises.
        decode(first_codes, first_map, first.absmax[index], m);
        decode(second_codes, second_map, second.absmax[index], v);
        for (((p, g), m), v) in parameter.iter_mut().zip(gradient).zip(m.iter_mut()).zip(v.iter_mut()) {
            let (first, second) = (b1 * *m + c1 * g, b2 * *v + c2 * g * g);
            let keep = second.is_finite(); // false for every g that is not
            let updated = *p * decay - step_size * (first / (second.sqrt() + eps));
            (*m, *v) = if keep { (first, second) } else { (0.0, 0.0) };
            *p = if keep { updated } else { *p };
        }
        first.absmax[index] = largest_magnitude(m);
        second.absmax[index] = largest_magnitude(v);
        encode(m, first_map, first.absmax[index], first_codes);
        encode(v, second_map, second.absmax[index], second_codes);
    }
}

fn decode(codes: &[u8], map: &Map, absmax: f32, values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = map.values[usize::from(*code)] * absmax;
    }
}

/// Nearest codes of a block, but not that of 0 for a negative value. Leaves the quotients in `values`.
pub fn encode(values: &mut [f32], map: &Map, absmax: f32, codes: &mut [u8]) {
    let zero = map.zero();
    if absmax == 0.0 {
        codes.fill(zero);
        return;
    }
    values.iter_mut().for_each(|value| *value /= absmax); // apart from the look-ups, so that it vectorises
    for (code, value) in codes.iter_mut().zip(values) {
        let nearest = map.nearest(*value);
        *code = nearest - u8::from(nearest == zero && *value < 0.0);
    }
}

/// The tensors of one step: parameter and gradient of any shape, codes `[2, words]`, scales `[2, blocks]`, maps `[4,
/// 256]`. Returns parameter, codes and scales.
pub(crate) fn reference<B: Backend>(
    parameter: FloatTensor<B>,
    gradient: FloatTensor<B>,
    codes: IntTensor<B>,
    absmax: FloatTensor<B>,
    maps: FloatTensor<B>,
    block: usize,
    rule: Adam8,
) -> (FloatTensor<B>, IntTensor<B>, FloatTensor<B>) {
    let Factors { decay, step_size, eps, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    let (p, g) = (Plain::<B>(parameter), Plain::<B>(gradient).f32());
    let (dims, dtype) = (p.dims(), p.dtype());
    let len = dims.iter().product::<usize>();
    let (p, g) = (p.f32().reshape(&[len]), g.reshape(&[len]));
    let (words, blocks) = (codes.shape()[1], absmax.shape()[1]);
    let codes = B::int_reshape(codes, Shape::new([2 * words]));
    let row = |tensor: &FloatTensor<B>, row: usize, len: usize| {
        Plain::<B>(tensor.clone()).narrow(0, row..row + 1).reshape(&[len])
    };
    let moment = |which: usize| {
        let part = B::int_slice(codes.clone(), &[Slice::from(which * words..(which + 1) * words)]);
        let values = B::float_select(row(&maps, 2 * which, 256).0, 0, unpack::<B>(&part, 8, 0, len));
        Plain::<B>(values) * spread(row(&absmax, which, blocks), block, len)
    };
    let m = moment(0) * b1 + g.clone() * c1;
    let v = moment(1) * b2 + g.clone() * c2 * g;
    let keep = flag::<B>(B::float_lower_equal_elem(v.clone().abs().0, f32::MAX.into(), bools::<B>(&v)), &v);
    let update = Plain::<B>(B::float_div(m.clone().0, (v.clone().sqrt() + eps).0)) * step_size;
    let updated = p.clone() * decay - update;
    let p = only(updated, &keep) + p * (keep.clone() * -1.0 + 1.0);
    let (m, v) = (only(m, &keep), only(v, &keep));
    let (first, first_scale) = encoded(m, row(&maps, 1, 256), Map::signed().zero(), block);
    let (second, second_scale) = encoded(v, row(&maps, 3, 256), Map::unsigned().zero(), block);
    let codes = B::int_cat(vec![first, second], 0);
    let absmax = B::float_cat(vec![first_scale.0, second_scale.0], 0);
    (p.reshape(&dims).cast(dtype).0, codes, absmax)
}

pub(crate) fn bools<B: Backend>(like: &Plain<B>) -> burn::tensor::BoolDType {
    burn::backend::get_device_settings::<B>(&like.0.device()).bool_dtype
}

/// 1 where true.
fn flag<B: Backend>(mask: burn::backend::tensor::BoolTensor<B>, like: &Plain<B>) -> Plain<B> {
    Plain(B::bool_into_float(mask, like.dtype()))
}

/// The values where the flag is 1, 0 elsewhere, whatever is there.
fn only<B: Backend>(values: Plain<B>, keep: &Plain<B>) -> Plain<B> {
    let drop = B::float_equal_elem(keep.0.clone(), 0f32.into(), bools::<B>(keep));
    Plain(B::float_mask_fill(values.0, drop, 0f32.into()))
}

/// Words `[1, words]` and scales `[1, blocks]` of values.
fn encoded<B: Backend>(values: Plain<B>, bounds: Plain<B>, zero: u8, block: usize) -> (IntTensor<B>, Plain<B>) {
    let (len, zero) = (values.dims()[0], f32::from(zero));
    let (blocks, words) = (len.div_ceil(block), len.div_ceil(4));
    let padded = |values: Plain<B>, to: usize, with: f32| match to - len {
        0 => values,
        more => {
            let device = values.0.device();
            let rest = B::float_full(Shape::new([more]), with.into(), &device, values.dtype());
            Plain::<B>(B::float_cat(vec![values.0, rest], 0))
        }
    };
    let scale =
        padded(values.clone(), blocks * block, 0.0).reshape(&[blocks, block]).abs().max_dim(1).reshape(&[blocks]);
    let quotient = Plain::<B>(B::float_div(values.0, spread(scale.clone(), block, len).0));
    let nan = B::float_not_equal(quotient.0.clone(), quotient.0.clone(), bools::<B>(&quotient)); // 0 / 0
    let quotient = Plain::<B>(B::float_mask_fill(quotient.0, nan, 0f32.into()));
    // How many bounds are below, by halving.
    let mut code = quotient.clone() * 0.0;
    for half in [128.0f32, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0] {
        let at = B::float_into_int((code.clone() + (half - 1.0)).0, burn::tensor::IntDType::I32);
        let bound = B::float_select(bounds.0.clone(), 0, at);
        let above = B::float_greater(quotient.0.clone(), bound, bools::<B>(&quotient));
        code = code + flag::<B>(above, &quotient) * half;
    }
    let negative = flag::<B>(B::float_lower_elem(quotient.0.clone(), 0f32.into(), bools::<B>(&quotient)), &quotient);
    let is_zero = flag::<B>(B::float_equal_elem(code.0.clone(), zero.into(), bools::<B>(&code)), &code);
    let code = padded(code - negative * is_zero, words * 4, zero).reshape(&[words, 4]);
    let code = B::float_into_int(code.0, burn::tensor::IntDType::I32);
    let shifts = B::int_from_data(TensorData::new(vec![0i32, 8, 16, 24], [1, 4]), &scale.0.device());
    let shifted = B::bitwise_left_shift(code, B::int_expand(shifts, Shape::new([words, 4])));
    (B::int_reshape(B::int_sum_dim(shifted, 1), Shape::new([1, words])), scale.reshape(&[1, blocks]))
}

/// Blocks that a thread takes at a time.
#[cfg(feature = "flex")]
const TOGETHER: usize = 64;

#[cfg(feature = "flex")]
pub(crate) fn cpu(
    parameter: burn_flex::FlexTensor,
    gradient: burn_flex::FlexTensor,
    codes: burn_flex::FlexTensor,
    absmax: burn_flex::FlexTensor,
    block: usize,
    rule: Adam8,
) -> (burn_flex::FlexTensor, burn_flex::FlexTensor, burn_flex::FlexTensor) {
    use rayon::prelude::*;

    use crate::cpu::{assert_shape, dense, restore, values, vectorised};

    let dtype = parameter.dtype();
    let gradient = dense(gradient);
    assert_shape("the parameter", &parameter, gradient.layout().shape());
    let g = values(&gradient);
    let (len, blocks, words) = (g.len(), g.len().div_ceil(block), g.len().div_ceil(4));
    assert_shape("the codes", &codes, &[2, words]);
    assert_shape("the scales", &absmax, &[2, blocks]);
    let (mut parameter, mut codes, mut absmax) = (dense(parameter), contiguous(codes), dense(absmax));
    let start = |tensor: &burn_flex::FlexTensor| tensor.layout().contiguous_offsets().unwrap_or((0, 0)).0;
    let (p_start, codes_start, absmax_start) = (start(&parameter), start(&codes), start(&absmax));
    let p = &mut parameter.storage_mut::<f32>()[p_start..][..len];
    let (first, second) = codes.storage_mut::<i32>()[codes_start..][..2 * words].split_at_mut(words);
    // Words hold their codes from the lowest byte on, as the processors that this runs on store them.
    let [first, second] = [first, second].map(|words| &mut bytemuck::cast_slice_mut::<i32, u8>(words)[..len]);
    let (first_scale, second_scale) = absmax.storage_mut::<f32>()[absmax_start..][..2 * blocks].split_at_mut(blocks);
    let each = TOGETHER * block;
    let firsts = first.par_chunks_mut(each).zip(first_scale.par_chunks_mut(TOGETHER));
    let seconds = second.par_chunks_mut(each).zip(second_scale.par_chunks_mut(TOGETHER));
    p.par_chunks_mut(each).zip(g.par_chunks(each)).zip(firsts.zip(seconds)).for_each(|((p, g), (first, second))| {
        let [first, second] = [first, second].map(|(codes, absmax)| Moment { codes, absmax });
        vectorised(
            #[inline(always)]
            || on_host(p, g, first, second, block, rule),
        );
    });
    (restore(parameter, dtype), codes, absmax)
}

/// The words, contiguous i32.
#[cfg(feature = "flex")]
fn contiguous(words: burn_flex::FlexTensor) -> burn_flex::FlexTensor {
    crate::packed::cpu::contiguous(words)
}
