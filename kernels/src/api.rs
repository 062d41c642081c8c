//! The functions of the crate: one door per operation, on Burn's tensors of any backend.

use burn::backend::Dispatch;
use burn::tensor::{Device, FloatDType, Gradients, Int, Tensor};

use crate::adam8::{Adam8, Moments8};
pub use crate::adamw::AdamW;
pub use crate::attention::{AttentionHints, AttentionRoute, KnownKeys};
pub use crate::gated::Activation;
pub use crate::groups::Rounding;
use crate::packed::{Format, Layout, Order, Scales};
use crate::{LowRankOps, Maybe, Packed, Tensors, Weight};

/// `y = x w + bias`. Gradients for `x`, and for `w` and `bias` only where they are trained.
///
/// # Shapes
/// `x [t, d_in]`, `w [d_in, d_out]` (a transposed view costs nothing), `bias [d_out]`, result `[t, d_out]`.
///
/// # Panics
/// As Burn does, where the inner sizes or element types differ.
pub fn linear(x: Tensor<2>, w: impl Into<Weight>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let bias = Maybe::from_option(bias.map(Tensor::into_dispatch));
    match w.into() {
        Weight::Dense(w) => Tensor::from_dispatch(Dispatch::dense_linear(x.into_dispatch(), w.into_dispatch(), bias)),
        Weight::Packed(w) => Tensor::from_dispatch(Dispatch::packed_linear(x.into_dispatch(), w.into_parts(), bias)),
    }
}

/// `alpha a b + c`; on the CPU transposed views are not copied, and `c` is changed in place where nothing else holds it.
/// No gradient flows through it.
///
/// # Shapes
/// `a [m, k]`, `b [k, n]`, `c [m, n]`.
///
/// # Panics
/// As Burn does, where sizes or element types differ.
pub fn gemm(a: Tensor<2>, b: Tensor<2>, c: Option<Tensor<2>>, alpha: f32) -> Tensor<2> {
    let c = Maybe::from_option(c.map(Tensor::into_dispatch));
    Tensor::from_dispatch(Dispatch::gemm(a.into_dispatch(), b.into_dispatch(), c, alpha))
}

/// A low-rank update that is not yet in the weight: the layer acts as `keep w + down up`.
#[derive(Clone, Debug)]
pub struct Offset {
    /// `[m, r]`.
    pub down: Tensor<2>,
    /// `[r, n]`.
    pub up: Tensor<2>,
    /// Factor of the weight.
    pub keep: f32,
}

fn optional(tensor: Option<Tensor<2>>) -> Maybe<Dispatch> {
    Maybe::from_option(tensor.map(Tensor::into_dispatch))
}

/// `y = x w + bias`, where a trained `w` gets the gradient `left^T dW right`, formed without `dW`. With `pending`, the layer
/// acts as `keep w + left up`.
///
/// # Shapes
/// `x [t, m]`, `w [m, n]`, `bias [n]`, `left [m, r]`, `right [n, q]`, `up [r, n]`; `y [t, n]`. The gradient of `w` is `[r, n]`,
/// `[m, q]` or `[r, q]`, whichever sides are given.
///
/// # Panics
/// As Burn does, where sizes or element types differ.
pub fn projected_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    bias: Option<Tensor<1>>,
    left: Option<Tensor<2>>,
    right: Option<Tensor<2>>,
    pending: Option<(Tensor<2>, f32)>,
) -> Tensor<2> {
    let (up, keep) = match pending {
        Some((up, keep)) => (Some(up), keep),
        None => (None, 1.0),
    };
    Tensor::from_dispatch(Dispatch::projected_linear(
        x.into_dispatch(),
        w.into_dispatch(),
        Maybe::from_option(bias.map(Tensor::into_dispatch)),
        optional(left),
        optional(right),
        optional(up),
        keep,
    ))
}

/// [`projected_linear`] on a weight that is held as codes: what would be the gradient of `w` becomes that of the placeholder
/// `slot`, which has any shape. Without `left` and `right` it is `dW` itself.
///
/// # Panics
/// As [`projected_linear`].
pub fn packed_projected_linear(
    x: Tensor<2>,
    w: Packed,
    bias: Option<Tensor<1>>,
    left: Option<Tensor<2>>,
    right: Option<Tensor<2>>,
    pending: Option<(Tensor<2>, f32)>,
    slot: Tensor<2>,
) -> Tensor<2> {
    let (up, keep) = match pending {
        Some((up, keep)) => (Some(up), keep),
        None => (None, 1.0),
    };
    Tensor::from_dispatch(Dispatch::packed_projected_linear(
        x.into_dispatch(),
        w.into_parts(),
        Maybe::from_option(bias.map(Tensor::into_dispatch)),
        optional(left),
        optional(right),
        optional(up),
        keep,
        slot.into_dispatch(),
    ))
}

/// `y = x w + bias`, where the two factors of `dW = x^T dy` become the gradients of the placeholders, and `w` gets none. With
/// an offset, the layer acts as `keep w + down up`.
///
/// # Shapes
/// `x [t, m]`, `w [m, n]`, `bias [n]`, placeholders of any shape; the gradient of `x_slot` is `x`, that of `dy_slot` `[t, n]`.
///
/// # Panics
/// As Burn does, where sizes or element types differ.
pub fn factored_linear(
    x: Tensor<2>,
    w: impl Into<Weight>,
    bias: Option<Tensor<1>>,
    offset: Option<Offset>,
    x_slot: Tensor<2>,
    dy_slot: Tensor<2>,
) -> Tensor<2> {
    let (down, up, keep) = match offset {
        Some(Offset { down, up, keep }) => (Some(down), Some(up), keep),
        None => (None, None, 1.0),
    };
    let (x, bias) = (x.into_dispatch(), Maybe::from_option(bias.map(Tensor::into_dispatch)));
    let (down, up) = (optional(down), optional(up));
    let (x_slot, dy_slot) = (x_slot.into_dispatch(), dy_slot.into_dispatch());
    Tensor::from_dispatch(match w.into() {
        Weight::Dense(w) => Dispatch::factored_linear(x, w.into_dispatch(), bias, down, up, keep, x_slot, dy_slot),
        Weight::Packed(w) => Dispatch::packed_factored_linear(x, w.into_parts(), bias, down, up, keep, x_slot, dy_slot),
    })
}

/// `y = x w + bias + scale (mask * x) down up`; `w` never gets a gradient, and no dense delta exists.
///
/// # Shapes
/// `x [t, d_in]`, `w [d_in, d_out]`, `bias [d_out]`, `mask [t, d_in]` (inverted dropout), `down [d_in, r]`, `up [r, d_out]`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[1.0, 2.0]], &device);
/// let w = Tensor::<2>::from_floats([[1.0, 0.0], [0.0, 1.0]], &device);
/// let down = Tensor::<2>::from_floats([[1.0], [1.0]], &device);
/// let up = Tensor::<2>::from_floats([[0.0, 10.0]], &device);
/// let y = lowrank_kernels::lowrank_linear(x, w, None, None, down, up, 0.5);
/// assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), vec![1.0, 17.0]);
/// ```
///
/// # Panics
/// As Burn does, where sizes or element types differ.
pub fn lowrank_linear(
    x: Tensor<2>,
    w: impl Into<Weight>,
    bias: Option<Tensor<1>>,
    mask: Option<Tensor<2>>,
    down: Tensor<2>,
    up: Tensor<2>,
    scale: f32,
) -> Tensor<2> {
    let bias = Maybe::from_option(bias.map(Tensor::into_dispatch));
    let (mask, down, up) = (optional(mask), down.into_dispatch(), up.into_dispatch());
    match w.into() {
        Weight::Dense(w) => {
            let (x, w) = (x.into_dispatch(), w.into_dispatch());
            Tensor::from_dispatch(Dispatch::lowrank_linear(x, w, bias, mask, down, up, scale))
        }
        Weight::Packed(w) => {
            let (x, w) = (x.into_dispatch(), w.into_parts());
            Tensor::from_dispatch(Dispatch::packed_lowrank_linear(x, w, bias, mask, down, up, scale))
        }
    }
}

/// `x + scale (x down) up`. Gradients for x, and for `down` and `up` only where they are trained.
///
/// # Shapes
/// `x [t, d]`, `down [d, r]`, `up [r, d]`; result as x.
///
/// # Panics
/// As Burn does, where sizes or element types differ.
pub fn lowrank_shift(x: Tensor<2>, down: Tensor<2>, up: Tensor<2>, scale: f32) -> Tensor<2> {
    let (down, up) = (down.into_dispatch(), up.into_dispatch());
    Tensor::from_dispatch(Dispatch::lowrank_shift(x.into_dispatch(), down, up, scale))
}

/// `z * c + bias`, a factor and a term for every column.
///
/// # Shapes
/// `z [t, n]`, `c [n]`, `bias [n]`; result as z. On the CPU z is overwritten where nothing else holds it.
///
/// # Panics
/// As Burn does, where sizes differ.
pub fn column_scale(z: Tensor<2>, c: Tensor<1>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let bias = Maybe::from_option(bias.map(Tensor::into_dispatch));
    let (y, _) = Dispatch::column_scale(z.into_dispatch(), c.into_dispatch(), bias);
    Tensor::from_dispatch(y)
}

/// Whether a device is the processor, whose operations are loops of ours.
pub fn is_cpu(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    let is_cpu = *device == Device::flex();
    #[cfg(not(feature = "flex"))]
    let is_cpu = {
        let _ = device;
        false
    };
    is_cpu
}

/// `x V diag(m / n)` with `V = W + s A B` and n the lengths of its columns, which get no gradient; nor does W.
///
/// # Shapes
/// `x [t, d_in]`, `w [d_in, d_out]`, `down [d_in, r]`, `up [r, d_out]`, `magnitude [d_out]`; result `[t, d_out]`.
///
/// # Panics
/// As Burn does, where sizes or element types differ.
pub fn directed_linear(
    x: Tensor<2>,
    w: Tensor<2>,
    down: Tensor<2>,
    up: Tensor<2>,
    magnitude: Tensor<1>,
    scale: f32,
) -> Tensor<2> {
    let (down, up) = (down.into_dispatch(), up.into_dispatch());
    let (x, w, magnitude) = (x.into_dispatch(), w.into_dispatch(), magnitude.into_dispatch());
    Tensor::from_dispatch(Dispatch::directed_linear(x, w, down, up, magnitude, scale))
}

/// `x + x blockdiag(turn)`.
///
/// # Shapes
/// `x [t, n b]`, `turn [n, b, b]`; result as x.
///
/// # Panics
/// As Burn does, where sizes differ.
pub fn block_rotation(x: Tensor<2>, turn: Tensor<3>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::block_rotation(x.into_dispatch(), turn.into_dispatch()))
}

/// `U[k r + i, j] = lambda[i, k] a[i, j] gamma[k, j]`; `a` gets no gradient.
///
/// # Shapes
/// `a [r, m]`, `lambda [r, n]`, `gamma [n, m]`; result `[n r, m]`.
///
/// # Panics
/// As Burn does, where sizes differ.
pub fn scaled_basis(a: Tensor<2>, lambda: Tensor<2>, gamma: Tensor<2>) -> Tensor<2> {
    let (lambda, gamma) = (lambda.into_dispatch(), gamma.into_dispatch());
    Tensor::from_dispatch(Dispatch::scaled_basis(a.into_dispatch(), lambda, gamma))
}

/// `x / sqrt(mean(x^2) + eps) * (offset + gamma)` over the last axis.
///
/// # Shapes
/// `x [t, d]`, `gamma [d]`.
pub fn rms_norm(x: Tensor<2>, gamma: Tensor<1>, eps: f32, offset: f32) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), gamma.into_dispatch(), eps, offset))
}

/// Rotates the pairs `(i, i + d/2)` of every head by the angle of its token.
///
/// # Shapes
/// `x [b, s, h, d]`; `cos`, `sin` `[b * s, d / 2]` in f32.
pub fn rotary(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    Tensor::from_dispatch(Dispatch::rotary(x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch(), 1.0))
}

/// `softmax(cap(scale q k^T)) v`, where query `i` sees the keys `ranges[.., i, 0] .. ranges[.., i, 1]`.
///
/// # Shapes
/// `q [b, sq, h, d]`, `k, v [b, sk, g, d]` with `h` a multiple of `g`, `ranges [b, sq, 2]`; result as `q`.
/// `softcap` 0 means none.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    ranges: Tensor<3, Int>,
    scale: f32,
    softcap: f32,
) -> Tensor<4> {
    attention_with(q, k, v, ranges, scale, softcap, AttentionHints::default()).0
}

/// [`attention`] with what the caller knows of the ranges, and also the log-sum-exp of each row, `[b, sq, h]` in f32, through
/// which no gradient flows.
///
/// # Panics
/// Where a range reaches beyond `hints.keys` (found on the CPU only; elsewhere such keys may go unseen), or where the device has
/// no kernel of the route asked for.
pub fn attention_with(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    ranges: Tensor<3, Int>,
    scale: f32,
    softcap: f32,
    hints: AttentionHints,
) -> (Tensor<4>, Tensor<3>) {
    let (out, lse) = Dispatch::range_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        ranges.into_dispatch(),
        scale,
        softcap,
        hints,
    );
    (Tensor::from_dispatch(out), Tensor::from_dispatch(lse))
}

/// `activation(gate) * up`, element by element.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), activation))
}

/// The cross-entropy of each row, 0 where the target is negative.
///
/// # Shapes
/// `logits [n, vocab]`, `targets [n]`, result `[n]` in f32.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>, softcap: f32) -> Tensor<1> {
    let (loss, _) = Dispatch::cross_entropy(logits.into_dispatch(), targets.into_dispatch(), softcap);
    Tensor::from_dispatch(loss)
}

/// Runs the backward pass of everything `out` depends on, starting from the given gradient of `out`.
pub fn backward_from<const D: usize>(out: Tensor<D>, gradient: Tensor<D>) -> Gradients {
    let seed: Tensor<1> = Tensor::from_dispatch(Dispatch::seed_gradient(out.into_dispatch(), gradient.into_dispatch()));
    seed.backward()
}

/// One AdamW step in f32, in place where the tensors are not shared; returns `(parameter, first, second)`.
///
/// # Shapes
/// All equal.
pub fn adamw(
    parameter: Tensor<2>,
    first: Tensor<2>,
    second: Tensor<2>,
    gradient: Tensor<2>,
    rule: AdamW,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let [parameter, first, second] = adamw_all(vec![[parameter, first, second, gradient]], None, rule).remove(0);
    (parameter, first, second)
}

/// [`adamw`] for several sets of parameter, moments and gradient by one rule; returns parameters and moments. On a GPU a few
/// launches do all of them. `factor`, one number on the device, multiplies every gradient too: clipping without a read.
pub fn adamw_all(sets: Vec<[Tensor<2>; 4]>, factor: Option<Tensor<1>>, rule: AdamW) -> Vec<[Tensor<2>; 3]> {
    if sets.is_empty() {
        return vec![];
    }
    let mut lists = [vec![], vec![], vec![], vec![]];
    for set in sets {
        lists.iter_mut().zip(set).for_each(|(list, tensor)| list.push(tensor.into_dispatch()));
    }
    let [parameters, first, second, gradients] = lists.map(Tensors);
    let factor = Maybe::from_option(factor.map(Tensor::into_dispatch));
    let (parameters, first, second) = Dispatch::adamw(parameters, first, second, gradients, factor, rule);
    let sets = parameters.0.into_iter().zip(first.0).zip(second.0);
    sets.map(|((parameter, first), second)| [parameter, first, second].map(Tensor::from_dispatch)).collect()
}

/// One AdamW step with moments in 8 bits, in place where the tensors are not shared; returns parameter and moments.
///
/// # Shapes
/// Parameter and gradient equal, with as many values as the moments; blocks run over them row by row.
///
/// # Panics
/// Where the sizes differ.
pub fn adam8(parameter: Tensor<2>, gradient: Tensor<2>, moments: Moments8, rule: Adam8) -> (Tensor<2>, Moments8) {
    let kept = moments.parts();
    let (codes, absmax, maps, block) = moments.into_parts();
    let (parameter, codes, absmax) = Dispatch::adam8(
        parameter.into_dispatch(),
        gradient.into_dispatch(),
        codes.into_dispatch(),
        absmax.into_dispatch(),
        maps.into_dispatch(),
        block,
        rule,
    );
    let moments = Moments8::of_parts(Tensor::from_dispatch(codes), Tensor::from_dispatch(absmax), kept);
    (Tensor::from_dispatch(parameter), moments)
}

/// `x` in another float type, rounded up or down at random so that the mean is kept.
pub fn stochastic_round(x: Tensor<2>, dtype: FloatDType, seed: u64) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::stochastic_round(x.into_dispatch(), dtype, seed))
}

/// A `[d_in, d_out]` weight as codes in groups, rounded on the device that it lies on; see [`crate::groups`].
///
/// # Panics
/// Where the layout is that of other sizes or of a format without groups, or its groups are no multiple of 8.
pub fn pack_groups(weight: Tensor<2>, layout: Layout, rounding: Rounding) -> Packed {
    let is_affine = matches!(layout.format, Format::Int8 | Format::Int4) && layout.nested.is_none();
    assert!(is_affine, "{layout:?} has no groups with a zero point");
    assert!(layout.block > 0 && layout.block.is_multiple_of(8), "groups of {} values", layout.block);
    assert_eq!(weight.dims(), layout.dims, "shape of the weight");
    let values = match layout.order {
        Order::Outputs => weight.transpose(),
        Order::Inputs => weight,
    };
    let values = values.cast(FloatDType::F32).into_dispatch();
    let (codes, scale, zero) = Dispatch::pack_groups(values, layout, rounding);
    let scales = Scales::Affine { scale: Tensor::from_dispatch(scale), zero: Tensor::from_dispatch(zero) };
    Packed::new(layout, Tensor::from_dispatch(codes), scales)
}

/// The indices of the `count` largest scores, in ascending order, as i32. Equal scores go to the lower index, and what is not a
/// number comes last.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let scores = Tensor::<1>::from_floats([0.5, 2.0, 3.0, 2.0], &Device::flex());
/// let best = lowrank_kernels::top_columns(scores, 2);
/// assert_eq!(best.into_data().try_to_vec::<i32>().unwrap(), vec![1, 2]);
/// ```
///
/// # Panics
/// Where there are fewer scores.
pub fn top_columns<const D: usize>(scores: Tensor<D>, count: usize) -> Tensor<1, Int> {
    Tensor::from_dispatch(Dispatch::top_columns(scores.cast(FloatDType::F32).into_dispatch(), count))
}

/// The sum of the squares of all values, `[1]`.
pub fn sum_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::sums(Tensors(vec![x.into_dispatch()]), true))
}

/// [`sum_squares`] of each of some tensors (at least one), one number for each. On a GPU a few launches do all of them.
pub fn sum_squares_all<const D: usize>(tensors: Vec<Tensor<D>>) -> Tensor<1> {
    let tensors = tensors.into_iter().map(Tensor::into_dispatch).collect();
    Tensor::from_dispatch(Dispatch::sums(Tensors(tensors), true))
}

/// The sum of the values of each of some tensors (at least one), one number for each.
pub fn sum_all<const D: usize>(tensors: Vec<Tensor<D>>) -> Tensor<1> {
    let tensors = tensors.into_iter().map(Tensor::into_dispatch).collect();
    Tensor::from_dispatch(Dispatch::sums(Tensors(tensors), false))
}
