//! The indices of the largest of some scores, in ascending order: which columns of a fixed basis a method takes.
//!
//! Equal scores (zeros of both signs among them) go to the lower index; what is not a number comes last. The result is the same
//! on every device, so that a selection never has to leave it.
//!
//! The reference counts for each score how many come before it, on a `[d, d]` table; so does the kernel, without the table
//! (`gpu/top_columns.rs`). The CPU sorts.

use burn::backend::{Backend, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::IntDType;

use crate::plain::Plain;

/// The first `count` of the scores, i32.
pub(crate) fn reference<B: Backend>(scores: FloatTensor<B>, count: usize) -> IntTensor<B> {
    let scores = Plain::<B>(scores).f32();
    let d = scores.dims().iter().product::<usize>();
    assert!(count <= d, "{count} of {d} scores");
    let scores = scores.reshape(&[d]);
    let is_number = scores.equal(&scores);
    let scores = scores.only(&is_number);
    // Rows are what is placed, columns what may come before it.
    let row = |values: &Plain<B>| values.clone().reshape(&[d, 1]).expand(&[d, d]);
    let column = |values: &Plain<B>| values.clone().reshape(&[1, d]).expand(&[d, d]);
    let index = scores.arange_like(d);
    let is_earlier = row(&index).greater(&column(&index));
    let is_larger = column(&scores).greater(&row(&scores));
    let is_tied = row(&scores).equal(&column(&scores)) * is_earlier.clone();
    let one_is_nan = column(&is_number).greater(&row(&is_number));
    let same_kind = row(&is_number).equal(&column(&is_number));
    let place = (one_is_nan + same_kind * (is_larger + is_tied)).sum_dim(1);
    let is_taken = Plain::<B>(B::float_sign((place * -1.0 + count as f32).clamp(0.0, f32::MAX).0));
    let position = (is_earlier * column(&is_taken)).sum_dim(1);
    let wide = [count, d];
    let wanted = scores.arange_like(count).reshape(&[count, 1]).expand(&wide);
    let here = position.reshape(&[1, d]).expand(&wide).equal(&wanted);
    let taken = (here * is_taken.reshape(&[1, d]).expand(&wide) * index.reshape(&[1, d]).expand(&wide)).sum_dim(1);
    B::float_into_int(taken.reshape(&[count]).0, IntDType::I32)
}

#[cfg(feature = "flex")]
pub(crate) fn cpu(scores: burn_flex::FlexTensor, count: usize) -> burn_flex::FlexTensor {
    use crate::cpu::{dense, from_words, values};

    let scores = dense(scores);
    let scores = values(&scores);
    assert!(count <= scores.len(), "{count} of {} scores", scores.len());
    let mut order: Vec<i32> = (0..scores.len() as i32).collect();
    let descending = |i: &i32| (std::cmp::Reverse(key(scores[*i as usize])), *i);
    if count < order.len() {
        order.select_nth_unstable_by_key(count, descending);
        order.truncate(count);
    }
    order.sort_unstable();
    from_words(order)
}

/// Larger for a larger score, 0 for what is not a number.
#[cfg(feature = "flex")]
fn key(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits(); // -0 becomes 0
    match bits >> 31 {
        _ if score.is_nan() => 0,
        0 => bits | 1 << 31,
        _ => !bits,
    }
}
