//! Dequantisation and products on packed weights in plain tensor operations.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{FloatDType, IntDType, Shape, Slice, TensorData};

use super::{Layout, Order, PackedParts};
use crate::extension::{LowRankOps, Maybe};
use crate::linear::broadcast_rows;
use crate::plain::Plain;
use crate::route;

/// Values that are dequantised at the same time on a GPU.
pub(crate) const PANEL: usize = 1 << 26;

/// Codes `from..from + count`; `from` is a multiple of the codes in a word.
pub(crate) fn unpack<B: Backend>(words: &IntTensor<B>, bits: usize, from: usize, count: usize) -> IntTensor<B> {
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

/// `values` and so many copies of `with` that they are `to`.
pub(crate) fn padded<B: Backend>(values: Plain<B>, to: usize, with: f32) -> Plain<B> {
    match to - values.dims()[0] {
        0 => values,
        more => {
            let rest = B::float_full(Shape::new([more]), with.into(), &values.0.device(), values.dtype());
            Plain(B::float_cat(vec![values.0, rest], 0))
        }
    }
}

/// The words of some codes; what is left of the last word gets the code `rest`.
pub(crate) fn pack<B: Backend>(codes: Plain<B>, bits: usize, rest: f32) -> IntTensor<B> {
    let (per_word, device) = (32 / bits, codes.0.device());
    let words = codes.dims()[0].div_ceil(per_word);
    let codes = padded(codes, words * per_word, rest).reshape(&[words, per_word]);
    let codes = B::float_into_int(codes.0, IntDType::I32);
    let shifts: Vec<i32> = (0..per_word).map(|i| (i * bits) as i32).collect();
    let shifts = B::int_from_data(TensorData::new(shifts, [1, per_word]), &device);
    let shifted = B::bitwise_left_shift(codes, B::int_expand(shifts, Shape::new([words, per_word])));
    B::int_reshape(B::int_sum_dim(shifted, 1), Shape::new([words]))
}

/// Every value `each` times, `count` in all.
pub(crate) fn spread<B: Backend>(values: Plain<B>, each: usize, count: usize) -> Plain<B> {
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

/// The values of rows `first..first + rows` of the flattened matrix.
pub(crate) fn dequantise<B: Backend>(
    w: &PackedParts<B>,
    first: usize,
    rows: usize,
    dtype: FloatDType,
) -> FloatTensor<B> {
    let Layout { format, block, .. } = w.layout();
    let [_, cols] = w.layout().stored();
    let (from, count) = (first * cols, rows * cols);
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
    (values * scale).narrow(0, before..all).reshape(&[rows, cols]).cast(dtype).0
}

/// First row and number of rows of each panel of about so many values.
fn panels(layout: Layout, values: usize) -> impl Iterator<Item = (usize, usize)> {
    let [all, cols] = layout.stored();
    let rows = (values / cols.max(1)).clamp(1, all.max(1));
    (0..all).step_by(rows).map(move |first| (first, rows.min(all - first)))
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
    match w.layout().order {
        Order::Outputs => across(x, w, bias, panel),
        Order::Inputs => along(x, w, bias, panel),
    }
}

/// `dy W^T`, with so many values of W at the same time.
pub(crate) fn input_gradient<B: LowRankOps>(dy: FloatTensor<B>, w: PackedParts<B>, panel: usize) -> FloatTensor<B> {
    match w.layout().order {
        Order::Outputs => along(dy, w, None, panel),
        Order::Inputs => across(dy, w, None, panel),
    }
}

/// `x S^T + b` for the flattened matrix S.
fn across<B: LowRankOps>(
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

/// `x S + b` for the flattened matrix S.
fn along<B: LowRankOps>(
    x: FloatTensor<B>,
    w: PackedParts<B>,
    bias: Option<FloatTensor<B>>,
    panel: usize,
) -> FloatTensor<B> {
    let (dtype, layout, tokens) = (x.dtype().into(), w.layout(), x.shape()[0]);
    let cols = layout.stored()[1];
    let mut sum = Maybe::from_option(bias.map(|bias| broadcast_rows::<B>(bias, tokens, cols)));
    for (first, rows) in panels(layout, panel) {
        let panel = B::dequantise(w.clone(), first, rows, dtype);
        let columns = Plain::<B>(x.clone()).narrow(1, first..first + rows).0;
        sum = Maybe::Given(B::gemm(columns, panel, sum, 1.0));
    }
    let empty = || B::float_zeros(Shape::new([tokens, cols]), &x.device(), dtype);
    sum.option().unwrap_or_else(empty)
}
