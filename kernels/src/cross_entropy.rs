//! Softmax cross-entropy of a chunk of logits, with its gradient in the same pass.
//!
//! `loss_t = logsumexp(z_t) - z_t[target]`, `dz_t = softmax(z_t) - onehot(target)`; rows whose target is negative count as zero
//! in both. With `softcap` c the logits are first capped, `z = c tanh(raw / c)` (Gemma 2).
//! The gradient overwrites the logits where they are not shared, so a chunk costs `[n, vocab]` once.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, AutodiffBackend, Backend, tensor::FloatTensor, tensor::IntTensor};

use crate::LowRankOps;
use crate::plain::Plain;

/// Shapes: `logits [n, vocab]`, `targets [n]`; returns the losses `[n]` f32 and their gradient `[n, vocab]`.
pub(crate) fn reference<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    softcap: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let raw = Plain::<B>(logits);
    let (dims, dtype) = (raw.dims(), raw.dtype());
    let raw = raw.f32();
    let (z, slope) = if softcap > 0.0 {
        let t = (raw * (1.0 / softcap)).tanh();
        (t.clone() * softcap, Some((t.clone() * t * -1.0) + 1.0))
    } else {
        (raw, None)
    };
    let targets = Plain::<B>::from_int(targets).reshape(&[dims[0], 1]);
    let counted = (targets.clone() + 1.0).clamp(0.0, 1.0);
    let column = targets.arange_like(dims[1]).reshape(&[1, dims[1]]);
    let onehot = ((column - targets).abs().clamp(0.0, 1.0) * -1.0) + 1.0;
    let z = z.clone() - z.max_dim(1); // before anything is rounded: large logits keep their digits
    let exp = z.clone().exp();
    let total = exp.clone().sum_dim(1);
    let target_logit = (z * onehot.clone()).sum_dim(1);
    let loss = (total.clone().log() - target_logit) * counted.clone();
    let mut gradient = (exp * total.recip() - onehot) * counted;
    if let Some(slope) = slope {
        gradient = gradient * slope;
    }
    (loss.reshape(&[dims[0]]).0, gradient.cast(dtype).0)
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: LowRankOps> Backward<B, 1> for CrossEntropyBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let d_loss = Plain::<B>(grads.consume::<B>(&ops.node));
        let gradient = Plain::<B>(ops.state);
        if let Some(node) = node {
            let dtype = gradient.dtype();
            let rows = d_loss.dims()[0];
            grads.register::<B>(node.id, (gradient * d_loss.cast(dtype).reshape(&[rows, 1])).0);
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    logits: FloatTensor<Autodiff<B, C>>,
    targets: IntTensor<B>,
    softcap: f32,
) -> (FloatTensor<Autodiff<B, C>>, FloatTensor<Autodiff<B, C>>) {
    let (logits, node) = logits.into_parts();
    let (loss, gradient) = B::cross_entropy(logits, targets, softcap);
    let constant = <Autodiff<B, C> as AutodiffBackend>::from_inner(gradient.clone());
    match CrossEntropyBackward.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => (prep.finish(gradient, loss), constant),
        OpsKind::UnTracked(prep) => (prep.finish(loss), constant),
    }
}

#[cfg(feature = "flex")]
pub(crate) fn cpu(
    logits: burn_flex::FlexTensor,
    targets: burn_flex::FlexTensor,
    softcap: f32,
) -> (burn_flex::FlexTensor, burn_flex::FlexTensor) {
    use crate::cpu::{Rows, for_rows, from_vec, integers, restore, with_output};

    let dtype = logits.dtype();
    let dims = logits.layout().shape().to_vec();
    let (rows, vocab) = (dims[0], dims[1]);
    let targets = integers(targets);
    assert_eq!(targets.len(), rows, "one target a row of logits");
    for (row, &target) in targets.iter().enumerate() {
        assert!(
            target < 0 || (target as usize) < vocab,
            "target {target} of row {row} is beyond the vocabulary of {vocab}"
        );
    }
    let mut losses = vec![0.0f32; rows];
    let losses_rows = Rows(losses.as_mut_ptr());
    let gradient = with_output(crate::cpu::as_f32(logits), |data| {
        let data = Rows(data);
        for_rows(
            rows,
            #[inline(always)]
            |range| {
                for row in range {
                    // SAFETY: one task per row.
                    let (z, loss) = unsafe { (data.slice(row * vocab, vocab), losses_rows.slice(row, 1)) };
                    loss[0] = row_in_place(z, targets[row], softcap);
                }
            },
        );
    });
    (from_vec(losses, &[rows]), restore(gradient, dtype))
}

/// Replaces a row of logits by its gradient and returns its loss.
#[cfg(feature = "flex")]
#[inline(always)]
fn row_in_place(z: &mut [f32], target: i32, softcap: f32) -> f32 {
    if target < 0 {
        z.fill(0.0);
        return 0.0;
    }
    let target = target as usize;
    if softcap > 0.0 { capped_row(z, target, softcap) } else { plain_row(z, target) }
}

/// Values of a row summed in f32; their sums are added in f64.
#[cfg(feature = "flex")]
const BLOCK: usize = 1024;

#[cfg(feature = "flex")]
#[inline(always)]
fn plain_row(z: &mut [f32], target: usize) -> f32 {
    use crate::cpu::{exp, max, sum};

    let (max, target_logit) = (max(z), z[target]);
    let mut total = 0.0f64;
    for block in z.chunks_mut(BLOCK) {
        for z in block.iter_mut() {
            *z = exp(*z - max);
        }
        total += f64::from(sum(block));
    }
    let inverse = (1.0 / total) as f32;
    for z in z.iter_mut() {
        *z *= inverse;
    }
    z[target] -= 1.0;
    total.ln() as f32 - (target_logit - max)
}

/// The capped values take the place of the logits; the gradient is that of the capped row times the slope of the cap.
#[cfg(feature = "flex")]
#[inline(always)]
fn capped_row(z: &mut [f32], target: usize, softcap: f32) -> f32 {
    use crate::cpu::{exp, max, sum, tanh};

    let inverse_cap = 1.0 / softcap;
    let max = softcap * tanh(max(z) * inverse_cap); // the cap is monotone
    let mut total = 0.0f64;
    let mut exponentials = [0.0f32; BLOCK];
    for block in z.chunks_mut(BLOCK) {
        let exponentials = &mut exponentials[..block.len()];
        for (z, e) in block.iter_mut().zip(exponentials.iter_mut()) {
            *z = softcap * tanh(*z * inverse_cap);
            *e = exp(*z - max);
        }
        total += f64::from(sum(exponentials));
    }
    let inverse = (1.0 / total) as f32;
    let slope = |capped: f32| 1.0 - (capped * inverse_cap) * (capped * inverse_cap);
    let target_logit = z[target];
    for z in z.iter_mut() {
        *z = exp(*z - max) * inverse * slope(*z);
    }
    z[target] -= slope(target_logit);
    total.ln() as f32 - (target_logit - max)
}
