//! Causal attention with grouped key/value heads, packed documents, sliding windows and score capping.
//!
//! `O = softmax(cap(s Q K^T)) V` row by row, where row `i` sees the keys `first[i] <= j < end[i]` (int tensor `ranges`): causal
//! masking, sliding windows, packed documents, padding and a key/value cache are all such ranges.
//! `cap(z) = c tanh(z / c)` with `softcap` c, or the identity for 0 (Gemma 2).
//!
//! Shapes: `q [b, sq, h, d]`, `k, v [b, sk, g, d]` with `h` a multiple of `g`, `ranges [b, sq, 2]`, output `[b, sq, h, d]`.
//! Saved for the backward: q, k, v, the output and one log-sum-exp a row (flash attention, arXiv 2205.14135, algorithm 4):
//! with `P = exp(S - lse)` and `D = rowsum(dO * O)`: `dV = P^T dO`, `dS = P * (dO V^T - D)`, `dQ = s dS K`, `dK = s dS^T Q`.
//! Scores exist only as tiles, in the reference as a whole. Flops `4 b h d N` forward and `10 b h d N` backward for N visible pairs.

#[cfg(feature = "flex")]
pub(crate) mod cpu;

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, tensor::FloatTensor, tensor::IntTensor};

use crate::LowRankOps;
use crate::plain::Plain;

/// What the host knows of key ranges without reading them back from the device. A promise: it never widens a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KnownKeys {
    /// Nothing.
    #[default]
    Unknown,
    /// Query `i` sees no key beyond `offset + i`, and with a window only the last `window` of those.
    Band {
        /// Keys before the first query, as in a key/value cache.
        offset: usize,
        /// Keys that a query sees at most.
        window: Option<usize>,
    },
}

impl KnownKeys {
    /// The keys among `0..keys` that any of these queries may see.
    pub(crate) fn of(self, queries: std::ops::Range<usize>, keys: usize) -> std::ops::Range<usize> {
        match self {
            Self::Unknown => 0..keys,
            Self::Band { offset, window } => {
                let end = (offset + queries.end).min(keys);
                let first = window.map_or(0, |window| (offset + queries.start + 1).saturating_sub(window));
                first.min(end)..end
            }
        }
    }
}

/// Which kernels of a GPU compute attention. The result is the same to rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionRoute {
    /// Those that the device, the type and the sizes call for.
    #[default]
    Chosen,
    /// Chunks of so many queries with batched products (0: as many as fit), scores of a chunk in memory.
    Chunks(usize),
    /// Tiles, products in registers.
    Registers,
    /// Tiles, products by tensor cores.
    Fragments,
}

/// What attention may use beside its operands. Nothing of it changes the result; the CPU only checks the promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionHints {
    /// Bounds of the ranges.
    pub keys: KnownKeys,
    /// Kernels to use.
    pub route: AttentionRoute,
}

/// Log-sum-exp of a row that sees nothing: finite, so that its probabilities are `exp(-1e30 - -1e30) * 0 = 0`, never NaN.
pub(crate) const NOTHING_SEEN: f32 = -1e30;

/// Scores `[b, g, h/g, sq, sk]` after capping, the derivative of the cap, and the visibility mask (0 or 1).
fn scores<B: Backend>(
    q: &Plain<B>,
    k: &Plain<B>,
    ranges: IntTensor<B>,
    scale: f32,
    softcap: f32,
) -> (Plain<B>, Option<Plain<B>>, Plain<B>) {
    let (qd, sk) = (q.dims(), k.dims()[3]);
    let raw = q.clone().matmul(k.clone().t()) * scale;
    let (capped, slope) = if softcap > 0.0 {
        let t = (raw * (1.0 / softcap)).tanh();
        (t.clone() * softcap, Some((t.clone() * t * -1.0) + 1.0))
    } else {
        (raw, None)
    };
    let ranges = Plain::<B>::from_int(ranges);
    let (b, sq) = (qd[0], qd[3]);
    let edge = |i: usize| ranges.clone().narrow(2, i..i + 1).reshape(&[b, 1, 1, sq, 1]);
    let key = ranges.arange_like(sk).reshape(&[1, 1, 1, 1, sk]);
    let visible = (key.clone() - edge(0) + 1.0).clamp(0.0, 1.0) * (edge(1) - key).clamp(0.0, 1.0);
    let masked = capped + (visible.clone() + -1.0) * -NOTHING_SEEN;
    (masked, slope, visible)
}

/// `[b, s, h, d]` to `[b, g, h/g, s, d]` in f32.
fn by_group<B: Backend>(x: FloatTensor<B>, groups: usize) -> Plain<B> {
    let x = Plain::<B>(x).f32();
    let d = x.dims();
    x.swap(1, 2).reshape(&[d[0], groups, d[2] / groups, d[1], d[3]])
}

/// The inverse of [`by_group`].
fn by_token<B: Backend>(x: Plain<B>) -> Plain<B> {
    let d = x.dims();
    x.reshape(&[d[0], d[1] * d[2], d[3], d[4]]).swap(1, 2).reshape(&[d[0], d[3], d[1] * d[2], d[4]])
}

/// Key/value heads repeated for every query head of their group, as a view.
fn repeated<B: Backend>(x: FloatTensor<B>, repeats: usize) -> Plain<B> {
    let groups = Plain::<B>(x.clone()).dims()[2];
    let x = by_group::<B>(x, groups);
    let d = x.dims();
    x.expand(&[d[0], groups, repeats, d[3], d[4]])
}

pub(crate) fn reference<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    ranges: IntTensor<B>,
    scale: f32,
    softcap: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = Plain::<B>(q.clone()).dtype();
    let (qd, groups) = (Plain::<B>(q.clone()).dims(), Plain::<B>(k.clone()).dims()[2]);
    let repeats = qd[2] / groups;
    let (q, k, v) = (by_group::<B>(q, groups), repeated::<B>(k, repeats), repeated::<B>(v, repeats));
    let (scores, _, visible) = scores(&q, &k, ranges, scale, softcap);
    let max = scores.clone().max_dim(4);
    let weights = (scores - max.clone()).exp() * visible;
    let total = weights.clone().sum_dim(4).clamp(1e-30, f32::MAX); // 0 only where nothing is seen
    let out = by_token(weights.matmul(v) * total.clone().recip());
    let lse = (max + total.log()).reshape(&[qd[0], qd[2], qd[1]]).swap(1, 2);
    (out.cast(dtype).0, lse.reshape(&[qd[0], qd[1], qd[2]]).0)
}

pub(crate) fn backward_reference<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    d_out: FloatTensor<B>,
    ranges: IntTensor<B>,
    scale: f32,
    softcap: f32,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let dtype = Plain::<B>(q.clone()).dtype();
    let (qd, kd) = (Plain::<B>(q.clone()).dims(), Plain::<B>(k.clone()).dims());
    let (b, sq, h, groups) = (qd[0], qd[1], qd[2], kd[2]);
    let repeats = h / groups;
    let (q, k, v) = (by_group::<B>(q, groups), repeated::<B>(k, repeats), repeated::<B>(v, repeats));
    let (out, d_out) = (by_group::<B>(out, groups), by_group::<B>(d_out, groups));
    let (scores, slope, visible) = scores(&q, &k, ranges, scale, softcap);
    let lse = Plain::<B>(lse).swap(1, 2).reshape(&[b, groups, repeats, sq, 1]);
    let weights = (scores - lse).exp() * visible;
    let delta = (d_out.clone() * out).sum_dim(4);
    let mut d_scores = weights.clone() * (d_out.clone().matmul(v.t()) - delta) * scale;
    if let Some(slope) = slope {
        d_scores = d_scores * slope;
    }
    let over_group = |x: Plain<B>| {
        let d = x.dims();
        by_token(x.sum_dim(2).reshape(&[d[0], d[1], 1, d[3], d[4]])).cast(dtype).0
    };
    let dv = over_group(weights.t().matmul(d_out));
    let dk = over_group(d_scores.clone().t().matmul(q));
    let dq = by_token(d_scores.matmul(k)).cast(dtype).0;
    (dq, dk, dv)
}

#[derive(Debug)]
struct AttentionBackward;

#[derive(Clone, Debug)]
struct State<B: LowRankOps> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    ranges: IntTensor<B>,
    scale: f32,
    softcap: f32,
    hints: AttentionHints,
}

impl<B: LowRankOps> Backward<B, 3> for AttentionBackward {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let nodes = ops.parents;
        let d_out = grads.consume::<B>(&ops.node);
        let State { q, k, v, out, lse, ranges, scale, softcap, hints } = ops.state;
        let (dq, dk, dv) = B::range_attention_backward(q, k, v, out, lse, d_out, ranges, scale, softcap, hints);
        for (node, gradient) in nodes.into_iter().zip([dq, dk, dv]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    q: FloatTensor<Autodiff<B, C>>,
    k: FloatTensor<Autodiff<B, C>>,
    v: FloatTensor<Autodiff<B, C>>,
    ranges: IntTensor<B>,
    scale: f32,
    softcap: f32,
    hints: AttentionHints,
) -> (FloatTensor<Autodiff<B, C>>, FloatTensor<Autodiff<B, C>>) {
    let (q, q_node) = q.into_parts();
    let (k, k_node) = k.into_parts();
    let (v, v_node) = v.into_parts();
    let constant = |lse| <Autodiff<B, C> as burn::backend::AutodiffBackend>::from_inner(lse);
    let (out, lse) = B::range_attention(q.clone(), k.clone(), v.clone(), ranges.clone(), scale, softcap, hints);
    match AttentionBackward.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let state = State { q, k, v, out: out.clone(), lse: lse.clone(), ranges, scale, softcap, hints };
            (prep.finish(state, out), constant(lse))
        }
        OpsKind::UnTracked(prep) => (prep.finish(out), constant(lse)),
    }
}
