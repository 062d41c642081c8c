//! Shared ground of the CPU implementations: views into Flex tensors, uninitialised outputs, vector dispatch, row loops.
//!
//! All CPU kernels compute in f32. Tensors of another float type are widened on entry and the result narrowed on exit.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::tensor::{Bytes, DType, FloatDType, IntDType, Shape};
use burn_flex::{FlexTensor, Layout};
use rayon::prelude::*;

/// A strided f32 matrix inside a tensor; strides in elements.
pub(crate) struct Matrix {
    pub data: *const f32,
    pub rows: usize,
    pub cols: usize,
    pub row_stride: isize,
    pub col_stride: isize,
}

impl Matrix {
    /// The view of a two-dimensional f32 tensor, which must outlive it.
    pub fn of(tensor: &FlexTensor) -> Self {
        let layout = tensor.layout();
        let (dims, strides) = (layout.shape().to_vec(), layout.strides());
        assert_eq!(dims.len(), 2, "a matrix has two axes");
        let storage: &[f32] = tensor.storage();
        let last: isize = layout.start_offset() as isize
            + dims.iter().zip(strides).map(|(&d, &s)| (d.max(1) as isize - 1) * s.max(0)).sum::<isize>();
        let first: isize = layout.start_offset() as isize
            + dims.iter().zip(strides).map(|(&d, &s)| (d.max(1) as isize - 1) * s.min(0)).sum::<isize>();
        let empty = dims.contains(&0);
        assert!(empty || (first >= 0 && (last as usize) < storage.len()), "strides stay inside the buffer");
        Self {
            data: storage[layout.start_offset().min(storage.len())..].as_ptr(),
            rows: dims[0],
            cols: dims[1],
            row_stride: strides[0],
            col_stride: strides[1],
        }
    }

    /// The same view of memory that is already known.
    pub fn raw(data: *const f32, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Self {
        Self { data, rows, cols, row_stride: row_stride as isize, col_stride: col_stride as isize }
    }
}

/// `out = alpha a b (+ out)`.
///
/// # Safety
/// Both views must be in bounds and `out` valid for `m` rows of `n` values with the given strides; it is read only with
/// `accumulate`.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn gemm(
    m: usize,
    n: usize,
    k: usize,
    out: *mut f32,
    out_row_stride: isize,
    out_col_stride: isize,
    accumulate: bool,
    a: &Matrix,
    b: &Matrix,
    alpha: f32,
    threads: gemm::Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: passed on from the caller.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            out_col_stride,
            out_row_stride,
            accumulate,
            a.data,
            a.col_stride,
            a.row_stride,
            b.data,
            b.col_stride,
            b.row_stride,
            1.0,
            alpha,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Stops where a tensor has another shape than the loops over it assume: they do not check again.
#[track_caller]
pub(crate) fn assert_shape(what: &str, tensor: &FlexTensor, expected: &[usize]) {
    let shape = tensor.layout().shape().to_vec();
    assert!(shape == expected, "shape of {what}: expected {expected:?}, got {shape:?}");
}

/// The tensor in f32.
pub(crate) fn as_f32(tensor: FlexTensor) -> FlexTensor {
    if tensor.dtype() == DType::F32 { tensor } else { Flex::float_cast(tensor, FloatDType::F32) }
}

/// The tensor in f32, contiguous.
pub(crate) fn dense(tensor: FlexTensor) -> FlexTensor {
    let tensor = as_f32(tensor);
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// Narrows a result back to the type of the input.
pub(crate) fn restore(tensor: FlexTensor, dtype: DType) -> FlexTensor {
    if dtype == DType::F32 { tensor } else { Flex::float_cast(tensor, dtype.into()) }
}

/// The values of a contiguous f32 tensor.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    let (start, end) = tensor.layout().contiguous_offsets().unwrap_or((0, 0));
    &tensor.storage::<f32>()[start..end]
}

/// The values of an integer tensor, of whatever width, as i32 in row-major order.
pub(crate) fn integers(tensor: FlexTensor) -> Vec<i32> {
    let tensor = if tensor.dtype() == DType::I32 { tensor } else { Flex::int_cast(tensor, IntDType::I32) };
    let tensor = if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() };
    let (start, end) = tensor.layout().contiguous_offsets().unwrap_or((0, 0));
    tensor.storage::<i32>()[start..end].to_vec()
}

/// A tensor of the given shape around a full vector.
pub(crate) fn from_vec(values: Vec<f32>, dims: &[usize]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::from(dims.to_vec())), DType::F32)
}

/// A vector of words.
pub(crate) fn from_words(words: Vec<i32>) -> FlexTensor {
    let layout = Layout::contiguous(Shape::new([words.len()]));
    FlexTensor::new(Bytes::from_elems(words), layout, DType::I32)
}

/// A new tensor whose memory `fill` writes completely; nothing is zeroed before.
pub(crate) fn output(dims: &[usize], fill: impl FnOnce(*mut f32)) -> FlexTensor {
    let len = dims.iter().product();
    let mut buffer: Vec<f32> = Vec::with_capacity(len);
    fill(buffer.spare_capacity_mut().as_mut_ptr().cast());
    // SAFETY: every caller writes all `len` values.
    unsafe { buffer.set_len(len) };
    from_vec(buffer, dims)
}

/// Two new tensors that `fill` writes completely.
pub(crate) fn outputs(a: &[usize], b: &[usize], fill: impl FnOnce(*mut f32, *mut f32)) -> (FlexTensor, FlexTensor) {
    let (a_len, b_len) = (a.iter().product(), b.iter().product());
    let (mut a_buffer, mut b_buffer) = (Vec::<f32>::with_capacity(a_len), Vec::<f32>::with_capacity(b_len));
    fill(a_buffer.spare_capacity_mut().as_mut_ptr().cast(), b_buffer.spare_capacity_mut().as_mut_ptr().cast());
    // SAFETY: every caller writes all values of both.
    unsafe {
        a_buffer.set_len(a_len);
        b_buffer.set_len(b_len);
    }
    (from_vec(a_buffer, a), from_vec(b_buffer, b))
}

/// Changes a tensor in place where it is not shared, else a copy of it.
pub(crate) fn with_output(tensor: FlexTensor, change: impl FnOnce(*mut f32)) -> FlexTensor {
    let mut tensor = dense(tensor);
    if !tensor.is_unique() {
        let source = values(&tensor);
        return output(&tensor.layout().shape().to_vec(), |out| {
            let copy = Rows(out);
            for_chunks(source.len(), |range| {
                // SAFETY: chunks are disjoint.
                unsafe { copy.slice(range.start, range.len()) }.copy_from_slice(&source[range]);
            });
            change(out);
        });
    }
    let start = tensor.layout().contiguous_offsets().unwrap_or((0, 0)).0;
    change(tensor.storage_mut::<f32>()[start..].as_mut_ptr());
    tensor
}

/// A pointer that row loops may share: every row is touched by one thread only.
#[derive(Clone, Copy)]
pub(crate) struct Rows(pub *mut f32);
// SAFETY: the loops below hand disjoint ranges to the threads.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Rows `range` of width `width` as a slice.
    ///
    /// # Safety
    /// The range must be inside the buffer, initialised or only written, and used by this thread alone.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// Rows per task of [`for_rows`]: fixed, so that sums over tasks do not depend on the number of threads.
const ROWS_PER_TASK: usize = 32;

/// Runs `body` over blocks of rows in parallel, with the widest vector instructions of this processor.
///
/// The body must be an `#[inline(always)]` closure with plain `for` loops, here and below: what is called instead of inlined is
/// compiled for the oldest processor.
pub(crate) fn for_rows(rows: usize, body: impl Fn(Range<usize>) + Send + Sync) {
    (0..rows.div_ceil(ROWS_PER_TASK)).into_par_iter().for_each(|task| {
        let range = task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(rows);
        vectorised(
            #[inline(always)]
            || body(range.clone()),
        );
    });
}

/// As [`for_rows`], collecting one value per block in block order.
pub(crate) fn map_rows<T: Send>(rows: usize, body: impl Fn(Range<usize>) -> T + Send + Sync) -> Vec<T> {
    (0..rows.div_ceil(ROWS_PER_TASK))
        .into_par_iter()
        .map(|task| {
            let range = task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(rows);
            vectorised(
                #[inline(always)]
                || body(range.clone()),
            )
        })
        .collect()
}

/// Runs `body` over chunks of a flat array in parallel.
pub(crate) fn for_chunks(len: usize, body: impl Fn(Range<usize>) + Send + Sync) {
    const CHUNK: usize = 1 << 14;
    (0..len.div_ceil(CHUNK)).into_par_iter().for_each(|task| {
        let range = task * CHUNK..((task + 1) * CHUNK).min(len);
        vectorised(
            #[inline(always)]
            || body(range.clone()),
        );
    });
}

/// Compiles `body` once per instruction set and runs the best one for this processor.
#[inline(always)]
pub(crate) fn vectorised<T>(body: impl FnOnce() -> T) -> T {
    pulp::Arch::new().dispatch(body)
}

/// `e^x` to about two units in the last place, without branches, so that loops over it vectorise.
///
/// Range reduction `x = n ln2 + r`, a polynomial of degree 6 for `e^r`, and `2^n` by its exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = x.clamp(-87.3, 88.3);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let p = (p * r).mul_add(r, r) + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    p * f32::from_bits(((exponent + 127) << 23) as u32)
}

/// The hyperbolic tangent by [`exp`].
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let e = exp(2.0 * x.clamp(-15.0, 15.0));
    (e - 1.0) / (e + 1.0)
}

/// Values that one vector instruction handles.
pub(crate) const LANES: usize = 16;

/// Folds a slice in sixteen independent lanes: this vectorises, and a sum is as exact as pairwise summation on short rows.
#[inline(always)]
fn fold(values: &[f32], start: f32, combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = combine(lanes[i], chunk[i]);
        }
    }
    for i in 0..rest.len() {
        lanes[i] = combine(lanes[i], rest[i]);
    }
    lanes.into_iter().fold(start, combine)
}

/// Sum of a slice.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    fold(values, 0.0, |a, b| a + b)
}

/// Largest value of a slice.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    fold(values, f32::NEG_INFINITY, f32::max)
}

/// Dot product in sixteen lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    #[test]
    fn folds_take_every_value() {
        for len in 0..70usize {
            let values: Vec<f32> = (0..len).map(|i| (i * 7 % 11) as f32 - 3.0).collect();
            assert_eq!(super::sum(&values), values.iter().sum::<f32>());
            assert_eq!(super::dot(&values, &values), values.iter().map(|v| v * v).sum::<f32>());
            assert_eq!(super::max(&values), values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }

    #[test]
    fn exp_is_close_to_the_standard_library() {
        let worst = (-8000..8000)
            .map(|i| i as f32 * 0.01)
            .map(|x| ((super::exp(x) - x.exp()) / x.exp()).abs())
            .fold(0.0f32, f32::max);
        assert!(worst < 4e-7, "{worst}");
        assert!((super::tanh(0.3) - 0.3f32.tanh()).abs() < 1e-7);
        assert!(super::exp(f32::NAN).is_nan() && super::tanh(f32::NAN).is_nan());
    }
}
