//! A block-diagonal change of the input: `y = x + x blockdiag(E_0, E_1, ...)` (OFT's `x R` with `E = R - I`, arXiv 2306.07280).
//!
//! | symbol | argument | shape |
//! | --- | --- | --- |
//! | x | input | `[t, n b]` |
//! | E | `turn` | `[n, b, b]` |
//!
//! With `g = dL/dy`: `dx = g + g blockdiag(E^T)`, the same operation, and `dE_i = x_i^T g_i`. Saved: x, and E. Cost: `2 t n b^2`
//! flops each for y, dx and dE; the CPU works on the columns of a block where they lie, so that x is never put in another order.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, TensorMetadata, tensor::FloatTensor};

use crate::extension::LowRankOps;
use crate::plain::Plain;

/// Block by block, `[n, t, b]`.
fn by_block<B: Backend>(x: FloatTensor<B>, block: usize) -> Plain<B> {
    let [t, width] = [x.shape()[0], x.shape()[1]];
    Plain::<B>(x).reshape(&[t, width / block.max(1), block]).swap(0, 1)
}

pub(crate) fn reference<B: Backend>(x: FloatTensor<B>, turn: FloatTensor<B>) -> FloatTensor<B> {
    let (dims, block) = (x.shape().to_vec(), turn.shape()[2]);
    let moved = by_block::<B>(x.clone(), block).matmul(Plain(turn)).swap(0, 1).reshape(&dims);
    (Plain(x) + moved).0
}

/// `dE`.
pub(crate) fn gradient_reference<B: Backend>(x: FloatTensor<B>, dy: FloatTensor<B>, block: usize) -> FloatTensor<B> {
    by_block::<B>(x, block).t().matmul(by_block::<B>(dy, block)).0
}

#[derive(Debug)]
struct BlockRotationBackward;

impl<B: LowRankOps> Backward<B, 2> for BlockRotationBackward {
    /// x, only where E is trained, and E.
    type State = (Option<FloatTensor<B>>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, turn_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (x, turn) = ops.state;
        if let (Some(node), Some(x)) = (turn_node, x) {
            grads.register::<B>(node.id, B::block_rotation_gradient(x, dy.clone(), turn.shape()[2]));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::block_rotation(dy, B::float_swap_dims(turn, 1, 2)));
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    turn: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let turn_is_trained = turn.is_tracked();
    let (x, x_node) = x.into_parts();
    let (turn, turn_node) = turn.into_parts();
    let y = B::block_rotation(x.clone(), turn.clone());
    match BlockRotationBackward.prepare::<C>([x_node, turn_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((turn_is_trained.then_some(x), turn), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

#[cfg(feature = "flex")]
pub(crate) use on_cpu::{forward as cpu, gradient as gradient_cpu};

#[cfg(feature = "flex")]
mod on_cpu {
    use burn_flex::FlexTensor;
    use gemm::Parallelism;
    use rayon::prelude::*;

    use crate::cpu::{Matrix, Rows, assert_shape, dense, output, restore, values};

    /// Rows of a task: fixed, so that a result does not depend on the number of threads.
    const ROWS: usize = 256;

    /// Rows, blocks and block size.
    fn sizes(x: &FlexTensor, block: usize) -> [usize; 3] {
        let dims = x.layout().shape().to_vec();
        assert!(
            dims.len() == 2 && block > 0 && dims[1].is_multiple_of(block),
            "shape of x: expected blocks of {block}, got {dims:?}"
        );
        [dims[0], dims[1] / block, block]
    }

    pub(crate) fn forward(x: FlexTensor, turn: FlexTensor) -> FlexTensor {
        let dtype = x.dtype();
        let (x, turn) = (dense(x), dense(turn));
        let block = turn.layout().shape().to_vec().last().copied().unwrap_or(0);
        let [t, blocks, b] = sizes(&x, block);
        assert_shape("the blocks", &turn, &[blocks, b, b]);
        let (width, x, turn) = (blocks * b, values(&x), values(&turn));
        let y = output(&[t, width], |out| {
            let out = Rows(out);
            (0..t.div_ceil(ROWS)).into_par_iter().for_each(|task| {
                let (first, rows) = (task * ROWS, ROWS.min(t - task * ROWS));
                let x = &x[first * width..][..rows * width];
                // SAFETY: one task per row.
                let y = unsafe { out.slice(first * width, rows * width) };
                y.copy_from_slice(x);
                for i in 0..blocks {
                    let columns = Matrix::raw(x[i * b..].as_ptr(), rows, b, width, 1);
                    let turn = Matrix::raw(turn[i * b * b..].as_ptr(), b, b, b, 1);
                    let y = y[i * b..].as_mut_ptr();
                    // SAFETY: columns `i b .. (i + 1) b` of these rows, which were written above.
                    unsafe {
                        let one = Parallelism::None;
                        crate::cpu::gemm(rows, b, b, y, width as isize, 1, true, &columns, &turn, 1.0, one);
                    }
                }
            });
        });
        restore(y, dtype)
    }

    pub(crate) fn gradient(x: FlexTensor, dy: FlexTensor, block: usize) -> FlexTensor {
        let dtype = x.dtype();
        let (x, dy) = (dense(x), dense(dy));
        let [t, blocks, b] = sizes(&x, block);
        let width = blocks * b;
        assert_shape("dy", &dy, &[t, width]);
        let (x, dy) = (values(&x), values(&dy));
        let d_turn = output(&[blocks, b, b], |out| {
            let out = Rows(out);
            if t == 0 {
                // SAFETY: nothing else has this memory yet.
                unsafe { out.slice(0, blocks * b * b) }.fill(0.0);
                return;
            }
            // Blocks are tasks; where there is but one, the product has the threads.
            let threads = if blocks == 1 { crate::gemm::threads(t * b * b) } else { Parallelism::None };
            (0..blocks).into_par_iter().for_each(|i| {
                let (across, down) = (
                    Matrix::raw(x[i * b..].as_ptr(), b, t, 1, width),
                    Matrix::raw(dy[i * b..].as_ptr(), t, b, width, 1),
                );
                // SAFETY: one task per block.
                let out = unsafe { out.slice(i * b * b, b * b) }.as_mut_ptr();
                // SAFETY: columns `i b .. (i + 1) b` of both; the result is only written.
                unsafe { crate::cpu::gemm(b, b, t, out, b as isize, 1, false, &across, &down, 1.0, threads) };
            });
        });
        restore(d_turn, dtype)
    }
}
