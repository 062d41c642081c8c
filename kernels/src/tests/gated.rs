use burn::backend::Flex;

use super::{F32, Random, Tape, VIEWS, View, assert_close, assert_same_gradients, differentiate, place, values_of};
use crate::{Activation, LowRankOps, gated};

/// The last is longer than one parallel chunk.
const SHAPES: [(usize, usize); 5] = [(32, 64), (5, 123), (1, 1), (1, 17), (150, 123)];
const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];

#[test]
fn forward_and_gradients_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for (t, d) in SHAPES {
        for (view, act) in VIEWS.into_iter().flat_map(|view| ACTIVATIONS.map(|act| (view, act))) {
            let inputs = [random.view(&[t, d], view), random.view(&[t, d], view)];
            let dy = random.view(&[t, d], view);
            assert_same_gradients(
                &format!("{t} {d} {view:?} {act:?}"),
                &inputs,
                &dy,
                F32,
                |x| Tape::gated(x[0].clone(), x[1].clone(), act),
                |x| gated::reference::<Tape>(x[0].clone(), x[1].clone(), act),
            );
            let [gate, up] = inputs;
            let ours = Flex::gated_backward(gate.clone(), up.clone(), dy.clone(), act);
            let plain = gated::backward_reference::<Flex>(gate, up, dy, act);
            assert_close("dgate", &ours.0, &plain.0, F32);
            assert_close("dup", &ours.1, &plain.1, F32);
        }
    }
}

/// Values over the whole range against formulas in f64; a far tail must be zero or the identity, never NaN.
#[test]
fn values_are_exact_far_out() {
    let xs: Vec<f32> = (-2000..=2000).map(|i| i as f32 * 0.06).collect();
    let gate = place(&xs, &[1, xs.len()], View::Packed);
    let ones = place(&vec![1.0; xs.len()], &[1, xs.len()], View::Packed);
    for act in ACTIVATIONS {
        let exact = |x: f64| match act {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
            }
            Activation::Gelu => x * normal_distribution(x),
        };
        let got = values_of(&Flex::gated(gate.clone(), ones.clone(), act));
        for (&x, got) in xs.iter().zip(got) {
            let want = exact(f64::from(x));
            assert!(
                (f64::from(got) - want).abs() <= 3e-7 * (1.0 + f64::from(x).abs()),
                "{act:?}({x}) = {got}, not {want}"
            );
        }
    }
}

/// By Simpson's rule.
fn normal_distribution(x: f64) -> f64 {
    if x.abs() > 9.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (n, density) = (2000, |z: f64| (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt());
    let step = x / n as f64;
    let inner: f64 = (1..n).map(|i| density(i as f64 * step) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    0.5 + (density(0.0) + inner + density(x)) * step / 3.0
}

#[test]
fn only_trained_operands_get_gradients() {
    let mut random = Random::new(2);
    let inputs = [random.tensor(&[5, 8]), random.tensor(&[5, 8])];
    let dy = random.tensor(&[5, 8]);
    for tracked in [[true, false], [false, true]] {
        let (_, grads) =
            differentiate(&inputs, &tracked, &dy, |x| Tape::gated(x[0].clone(), x[1].clone(), Activation::Silu));
        assert_eq!([grads[0].is_some(), grads[1].is_some()], tracked);
    }
}

#[test]
#[should_panic(expected = "shape")]
fn refuses_shapes_that_differ() {
    let mut random = Random::new(3);
    Flex::gated(random.tensor(&[2, 8]), random.tensor(&[2, 7]), Activation::Silu);
}
