//! `alpha A B + C`: the dense product everything else is built from.
//!
//! CPU: the `gemm` crate (AVX-512 where the processor has it) on the tensors' own strides, so that a transposed weight is never
//! copied and a sum of products (`x W + s (x A) B`) accumulates in place.
//! GPU: Burn's matmul on tensor cores; its fusion merges the factor and the addend into the write, so that `s u B + y` reads and writes y
//! once, as a kernel of our own would. Products with few rows or columns go to `gpu/thin/` (see [`routed`]).
//! `flops 2 M K N`; floor on the measured machine: 480 GFLOP/s in f32 on two cores (AMD Zen 5).

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};

use crate::extension::LowRankOps;
use crate::plain::Plain;
use crate::route;

/// `alpha a b + c` by the kernel for thin products or by Burn's matmul.
pub(crate) fn routed<B: LowRankOps>(
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    c: Option<FloatTensor<B>>,
    alpha: f32,
) -> FloatTensor<B> {
    let (m, n, same_type) = (a.shape()[0], b.shape()[1], a.dtype() == b.dtype());
    match route::product(m, n, c.is_some() || !same_type) {
        route::Product::Thin => B::thin_product(a, b, alpha),
        route::Product::Matmul => reference::<B>(a, b, c, alpha),
    }
}

/// `alpha a b + c` by Burn's matmul.
///
/// # Shapes
/// `a [m, k]`, `b [k, n]`, `c [m, n]` (overwritten where the backend can).
pub(crate) fn reference<B: Backend>(
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    c: Option<FloatTensor<B>>,
    alpha: f32,
) -> FloatTensor<B> {
    let mut product = Plain::<B>(a).matmul(Plain(b));
    if alpha != 1.0 {
        product = product * alpha;
    }
    match c {
        Some(c) => (Plain(c) + product).0,
        None => product.0,
    }
}

#[cfg(feature = "flex")]
pub(crate) use cpu::gemm as cpu;

/// All threads for a product of so many multiply-adds, or one where that is faster than waking the others.
#[cfg(feature = "flex")]
pub(crate) fn threads(multiply_adds: usize) -> gemm::Parallelism {
    const PARALLEL: usize = 1 << 18;
    if multiply_adds < PARALLEL { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) }
}

#[cfg(feature = "flex")]
mod cpu {
    use burn_flex::FlexTensor;

    use crate::cpu::{Matrix, as_f32, assert_shape, output, restore, with_output};

    pub(crate) fn gemm(a: FlexTensor, b: FlexTensor, c: Option<FlexTensor>, alpha: f32) -> FlexTensor {
        let dtype = a.dtype();
        let (a, b) = (as_f32(a), as_f32(b));
        let (a, b) = (Matrix::of(&a), Matrix::of(&b));
        let (m, n) = (a.rows, b.cols);
        let result = match c {
            Some(c) => {
                assert_shape("the addend", &c, &[m, n]);
                with_output(as_f32(c), |out| product(&a, &b, out, alpha, true))
            }
            None => output(&[m, n], |out| product(&a, &b, out, alpha, false)),
        };
        restore(result, dtype)
    }

    fn product(a: &Matrix, b: &Matrix, out: *mut f32, alpha: f32, accumulate: bool) {
        let n = b.cols;
        let threads = super::threads(a.rows * a.cols * n);
        assert_eq!(a.cols, b.rows, "inner sizes of a product");
        // SAFETY: `Matrix::of` checked that rows, columns and strides stay inside each buffer, `out` has room for m*n
        // values, and without `accumulate` it is only written.
        unsafe { crate::cpu::gemm(a.rows, n, a.cols, out, n as isize, 1, accumulate, a, b, alpha, threads) }
    }
}
