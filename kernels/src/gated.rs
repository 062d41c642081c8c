//! The gated activation of feed-forward layers: `y = act(gate) * up` (SwiGLU and GeGLU, arXiv 2002.05202).
//!
//! Saved: gate and up; the activation is recomputed in the backward. Memory bound: `12 t d` bytes forward, `20 t d` backward.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, tensor::FloatTensor};

use crate::LowRankOps;
use crate::plain::Plain;

/// What the gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x sigmoid(x)` (Llama, Mistral, Qwen).
    Silu,
    /// `x Phi(x)` by the tanh approximation (Gemma).
    GeluTanh,
    /// `x Phi(x)`.
    Gelu,
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// Value and derivative of the activation.
fn activation<B: Backend>(x: Plain<B>, activation: Activation) -> (Plain<B>, Plain<B>) {
    match activation {
        Activation::Silu => {
            let sigmoid = ((x.clone() * -1.0).exp() + 1.0).recip();
            let value = x.clone() * sigmoid.clone();
            let slope = sigmoid.clone() + value.clone() * ((sigmoid * -1.0) + 1.0);
            (value, slope)
        }
        Activation::GeluTanh => {
            let square = x.clone() * x.clone();
            let t = (x.clone() * (square.clone() * CUBIC + 1.0) * SQRT_2_OVER_PI).tanh();
            let value = x.clone() * (t.clone() + 1.0) * 0.5;
            let inner = (square * (3.0 * CUBIC) + 1.0) * SQRT_2_OVER_PI;
            let slope = (t.clone() + 1.0) * 0.5 + x * ((t.clone() * t * -1.0) + 1.0) * inner * 0.5;
            (value, slope)
        }
        Activation::Gelu => {
            let phi = ((x.clone() * std::f32::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
            let density = (x.clone() * x.clone() * -0.5).exp() * 0.398_942_3;
            (x.clone() * phi.clone(), phi + x * density)
        }
    }
}

/// Shapes: `gate` and `up` equal, any.
pub(crate) fn reference<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>, act: Activation) -> FloatTensor<B> {
    let dtype = Plain::<B>(gate.clone()).dtype();
    (activation(Plain::<B>(gate).f32(), act).0 * Plain(up).f32()).cast(dtype).0
}

pub(crate) fn backward_reference<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    dy: FloatTensor<B>,
    act: Activation,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = Plain::<B>(gate.clone()).dtype();
    let (value, slope) = activation(Plain::<B>(gate).f32(), act);
    let dy = Plain::<B>(dy).f32();
    ((dy.clone() * Plain(up).f32() * slope).cast(dtype).0, (dy * value).cast(dtype).0)
}

#[derive(Debug)]
struct GatedBackward;

impl<B: LowRankOps> Backward<B, 2> for GatedBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [gate_node, up_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (gate, up, act) = ops.state;
        let (d_gate, d_up) = B::gated_backward(gate, up, dy, act);
        if let Some(node) = gate_node {
            grads.register::<B>(node.id, d_gate);
        }
        if let Some(node) = up_node {
            grads.register::<B>(node.id, d_up);
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    gate: FloatTensor<Autodiff<B, C>>,
    up: FloatTensor<Autodiff<B, C>>,
    act: Activation,
) -> FloatTensor<Autodiff<B, C>> {
    let (gate, gate_node) = gate.into_parts();
    let (up, up_node) = up.into_parts();
    match GatedBackward.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((gate.clone(), up.clone(), act), B::gated(gate, up, act)),
        OpsKind::UnTracked(prep) => prep.finish(B::gated(gate, up, act)),
    }
}

#[cfg(feature = "flex")]
pub(crate) use on_cpu::{backward as backward_cpu, forward as cpu};

#[cfg(feature = "flex")]
mod on_cpu {
    use burn_flex::FlexTensor;

    use super::{Activation, CUBIC, SQRT_2_OVER_PI};
    use crate::cpu::{Rows, assert_shape, dense, exp, for_chunks, output, outputs, restore, tanh, values};

    #[inline(always)]
    fn silu(x: f32) -> (f32, f32) {
        let sigmoid = 1.0 / (1.0 + exp(-x));
        let value = x * sigmoid;
        (value, sigmoid + value * (1.0 - sigmoid))
    }

    #[inline(always)]
    fn gelu_tanh(x: f32) -> (f32, f32) {
        let t = tanh(SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x));
        let inner = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
        (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
    }

    /// `Phi(x)` by the error function of Abramowitz and Stegun, 7.1.26 (absolute error below 1.5e-7), which shares its
    /// exponential with the density.
    #[inline(always)]
    fn gelu(x: f32) -> (f32, f32) {
        let t = 1.0 / (0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2).mul_add(x.abs(), 1.0);
        let mut p = 1.061_405_4_f32;
        p = p.mul_add(t, -1.453_152);
        p = p.mul_add(t, 1.421_413_8);
        p = p.mul_add(t, -0.284_496_72);
        p = p.mul_add(t, 0.254_829_6);
        let e = exp(-0.5 * x * x);
        let tail = 0.5 * p * t * e; // 1 - Phi(|x|)
        let phi = if x < 0.0 { tail } else { 1.0 - tail };
        (x * phi, phi + x * e * 0.398_942_3)
    }

    pub(crate) fn forward(gate: FlexTensor, up: FlexTensor, act: Activation) -> FlexTensor {
        match act {
            Activation::Silu => forward_by(
                gate,
                up,
                #[inline(always)]
                |x| silu(x).0,
            ),
            Activation::GeluTanh => forward_by(
                gate,
                up,
                #[inline(always)]
                |x| gelu_tanh(x).0,
            ),
            Activation::Gelu => forward_by(
                gate,
                up,
                #[inline(always)]
                |x| gelu(x).0,
            ),
        }
    }

    fn forward_by(gate: FlexTensor, up: FlexTensor, f: impl Fn(f32) -> f32 + Send + Sync) -> FlexTensor {
        let dtype = gate.dtype();
        let (gate, up) = (dense(gate), dense(up));
        let dims = gate.layout().shape().to_vec();
        assert_shape("up", &up, &dims);
        let (gate, up) = (values(&gate), values(&up));
        let y = output(&dims, |out| {
            let out = Rows(out);
            for_chunks(
                gate.len(),
                #[inline(always)]
                |range| {
                    // SAFETY: chunks are disjoint.
                    let y = unsafe { out.slice(range.start, range.len()) };
                    for ((y, g), u) in y.iter_mut().zip(&gate[range.clone()]).zip(&up[range]) {
                        *y = f(*g) * u;
                    }
                },
            );
        });
        restore(y, dtype)
    }

    pub(crate) fn backward(
        gate: FlexTensor,
        up: FlexTensor,
        dy: FlexTensor,
        act: Activation,
    ) -> (FlexTensor, FlexTensor) {
        match act {
            Activation::Silu => backward_by(gate, up, dy, silu),
            Activation::GeluTanh => backward_by(gate, up, dy, gelu_tanh),
            Activation::Gelu => backward_by(gate, up, dy, gelu),
        }
    }

    fn backward_by(
        gate: FlexTensor,
        up: FlexTensor,
        dy: FlexTensor,
        f: impl Fn(f32) -> (f32, f32) + Send + Sync,
    ) -> (FlexTensor, FlexTensor) {
        let dtype = gate.dtype();
        let (gate, up, dy) = (dense(gate), dense(up), dense(dy));
        let dims = gate.layout().shape().to_vec();
        assert_shape("up", &up, &dims);
        assert_shape("dy", &dy, &dims);
        let (gate, up, dy) = (values(&gate), values(&up), values(&dy));
        let (d_gate, d_up) = outputs(&dims, &dims, |d_gate, d_up| {
            let (d_gate, d_up) = (Rows(d_gate), Rows(d_up));
            for_chunks(
                gate.len(),
                #[inline(always)]
                |range| {
                    // SAFETY: chunks are disjoint.
                    let (dg, du) =
                        unsafe { (d_gate.slice(range.start, range.len()), d_up.slice(range.start, range.len())) };
                    let (gate, up, dy) = (&gate[range.clone()], &up[range.clone()], &dy[range]);
                    for i in 0..gate.len() {
                        let (value, slope) = f(gate[i]);
                        dg[i] = dy[i] * up[i] * slope;
                        du[i] = dy[i] * value;
                    }
                },
            );
        });
        (restore(d_gate, dtype), restore(d_up, dtype))
    }
}
