//! Dequantisation and products on packed weights in plain tensor operations.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{FloatDType, Shape, Slice, TensorData};

use super::{Layout, PackedParts};
use crate::extension::{LowRankOps, Maybe};
use crate::linear::broadcast_rows;
use crate::plain::Plain;
use crate::route;

/// Values that are dequantised at the same time on a GPU.
pub(crate) const PANEL: usize = 1 << 26;

/// Codes `from..from + count`; `from` is a multiple of the codes in a word.
fn unpack<B: Backend>(words: &IntTensor<B>, bits: usize, from: usize, count: usize) -> IntTensor<B> {
    let per_word = 32 / bits;
    let (first, last) = (from / per_word, (from + count).div_ceil(per_word));
    let (words_here, device) = (last - first, words.device());
    let words = B::int_slice(words.clone(), &[Slice::from(first..last)]);
    let words = B::int_expand(B::int_reshape(words, Shape::new([words_here, 1])), Shape::new([words_here, per_word]));
    let shifts: Vec<i32> = (0..per_word).map(|i| (i * bits) as i32).collect();
    let shifts = B::int_from_data(TensorData::new(shifts, [1, per_word]), &device);
    let shifts = B::int_expand(shifts, Shape::new([words_here, per_word]));
    let mask = (1i32 << bits) - 1; // the shift is arithmetic: what it fills in is masked off
    let codes = B::bitwise_and_scalar(B::bitwise_right_shift(words, shifts), mask.into());
    let codes = B::int_reshape(codes, Shape::new([words_here * per_word]));
    B::int_slice(codes, &[Slice::from(0..count)])
}

/// Every value `each` times, `count` in all.
fn spread<B: Backend>(values: Plain<B>, each: usize, count: usize) -> Plain<B> {
    let len = values.dims()[0];
    values.reshape(&[len, 1]).expand(&[len, each]).reshape(&[len * each]).narrow(0, 0..count)
}

/// The scales of blocks `first..first + count`.
fn scales<B: Backend>(w: &PackedParts<B>, first: usize, count: usize) -> Plain<B> {
    match w {
        PackedParts::Table { scale, .. } | PackedParts::Affine { scale, .. } => {
            Plain::<B>(scale.clone()).narrow(0, first..first + count)
        }
        PackedParts::Nested { scale_codes, map, absmax, layout, .. } => {
            let (blocks, nested) = (layout.blocks(), layout.nested);
            let (block, offset) = nested.map_or((1, 0.0), |nested| (nested.block, nested.offset));
            let codes = unpack::<B>(scale_codes, 8, 0, blocks);
            let values = Plain::<B>(B::float_select(map.clone(), 0, codes));
            let scale = values * spread::<B>(Plain(absmax.clone()), block, blocks) + offset;
            scale.narrow(0, first..first + count)
        }
    }
}

/// The values of outputs `first..first + rows`, `[rows, d_in]`.
pub(crate) fn dequantise<B: Backend>(
    w: &PackedParts<B>,
    first: usize,
    rows: usize,
    dtype: FloatDType,
) -> FloatTensor<B> {
    let Layout { format, block, dims: [d_in, _], .. } = w.layout();
    let (from, count) = (first * d_in, rows * d_in);
    let before = from % block; // blocks straddle rows: decoding starts with a whole block
    let (from, all) = (from - before, count + before);
    let (first_block, blocks) = (from / block, all.div_ceil(block));
    let scale = spread(scales(w, first_block, blocks), block, all);
    let values = match w {
        PackedParts::Table { codes, table, .. } | PackedParts::Nested { codes, table, .. } => {
            Plain::<B>(B::float_select(table.clone(), 0, unpack::<B>(codes, format.bits(), from, all)))
        }
        PackedParts::Affine { codes, zero, layout, .. } => {
            let zero = Plain::<B>::from_int(unpack::<B>(zero, 8, 0, layout.blocks()));
            let zero = spread(zero.narrow(0, first_block..first_block + blocks), block, all);
            Plain::<B>::from_int(unpack::<B>(codes, format.bits(), from, all)) - zero
        }
    };
    (values * scale).narrow(0, before..all).reshape(&[rows, d_in]).cast(dtype).0
}

/// First output and number of outputs of each panel of about so many values.
fn panels(layout: Layout, values: usize) -> impl Iterator<Item = (usize, usize)> {
    let [d_in, d_out] = layout.dims;
    let rows = (values / d_in.max(1)).clamp(1, d_out.max(1));
    (0..d_out).step_by(rows).map(move |first| (first, rows.min(d_out - first)))
}

/// `x W + b` by the route of its number of tokens.
pub(crate) fn linear_routed<B: LowRankOps>(
    x: FloatTensor<B>,
    w: PackedParts<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    match route::packed(x.shape()[0], &w.layout()) {
        route::Packed::Codes => {
            let (tokens, d_out) = (x.shape()[0], w.layout().dims[1]);
            let y = B::packed_few(x, w);
            match bias {
                Some(bias) => B::float_add(y, broadcast_rows::<B>(bias, tokens, d_out)),
                None => y,
            }
        }
        route::Packed::Panels => linear::<B>(x, w, bias, PANEL),
    }
}

/// `dy W^T` by the route of its number of tokens.
pub(crate) fn input_gradient_routed<B: LowRankOps>(dy: FloatTensor<B>, w: PackedParts<B>) -> FloatTensor<B> {
    match route::packed(dy.shape()[0], &w.layout()) {
        route::Packed::Codes => B::packed_few_backward(dy, w),
        route::Packed::Panels => input_gradient::<B>(dy, w, PANEL),
    }
}

/// `x W + b`, with so many values of W at the same time.
pub(crate) fn linear<B: LowRankOps>(
    x: FloatTensor<B>,
    w: PackedParts<B>,
    bias: Option<FloatTensor<B>>,
    panel: usize,
) -> FloatTensor<B> {
    let dtype = x.dtype().into();
    let part = |(first, rows)| {
        let panel = B::float_transpose(B::dequantise(w.clone(), first, rows, dtype));
        let bias = bias.clone().map(|bias| Plain::<B>(bias).narrow(0, first..first + rows).0);
        B::dense_linear(x.clone(), panel, Maybe::from_option(bias))
    };
    let mut parts: Vec<_> = panels(w.layout(), panel).map(part).collect();
    match parts.len() {
        1 => parts.remove(0),
        _ => B::float_cat(parts, 1),
    }
}

/// `dy W^T`, with so many values of W at the same time.
pub(crate) fn input_gradient<B: LowRankOps>(dy: FloatTensor<B>, w: PackedParts<B>, panel: usize) -> FloatTensor<B> {
    let (dtype, layout) = (dy.dtype().into(), w.layout());
    let mut sum = Maybe::Absent;
    for (first, rows) in panels(layout, panel) {
        let panel = B::dequantise(w.clone(), first, rows, dtype);
        let columns = Plain::<B>(dy.clone()).narrow(1, first..first + rows).0;
        sum = Maybe::Given(B::gemm(columns, panel, sum, 1.0));
    }
    let empty = || B::float_zeros(Shape::new([dy.shape()[0], layout.dims[0]]), &dy.device(), dtype);
    sum.option().unwrap_or_else(empty)
}
