use burn::backend::Flex;

use super::{F32, Random, Tape, VIEWS, assert_close, assert_same_gradients, differentiate, values_of};
use crate::{LowRankOps, rms_norm};

const SHAPES: [(usize, usize); 6] = [(70, 64), (5, 123), (1, 1), (3, 1), (1, 40), (33, 577)];
const EPS: f32 = 1e-5;

#[test]
fn forward_and_gradients_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for (t, d) in SHAPES {
        for (view, offset) in VIEWS.into_iter().flat_map(|view| [(view, 0.0), (view, 1.0)]) {
            let inputs = [random.view(&[t, d], view), random.view(&[d], view)];
            let dy = random.view(&[t, d], view);
            assert_same_gradients(
                &format!("{t} {d} {view:?} offset {offset}"),
                &inputs,
                &dy,
                F32,
                |x| Tape::rms_norm(x[0].clone(), x[1].clone(), EPS, offset),
                |x| rms_norm::reference::<Tape>(x[0].clone(), x[1].clone(), EPS, offset),
            );
            let [x, gamma] = inputs;
            let ours = Flex::rms_norm_backward(x.clone(), gamma.clone(), dy.clone(), EPS, offset);
            let plain = rms_norm::backward_reference::<Flex>(x, gamma, dy, EPS, offset);
            assert_close("dx", &ours.0, &plain.0, F32);
            assert_close("dgamma", &ours.1, &plain.1, F32);
        }
    }
}

#[test]
fn only_trained_operands_get_gradients() {
    let mut random = Random::new(2);
    let inputs = [random.tensor(&[5, 8]), random.tensor(&[8])];
    let dy = random.tensor(&[5, 8]);
    for tracked in [[true, false], [false, true]] {
        let (_, grads) =
            differentiate(&inputs, &tracked, &dy, |x| Tape::rms_norm(x[0].clone(), x[1].clone(), EPS, 0.0));
        assert_eq!([grads[0].is_some(), grads[1].is_some()], tracked);
    }
}

#[test]
fn no_tokens_give_a_zero_gradient_of_gamma() {
    let mut random = Random::new(3);
    let (x, gamma) = (random.tensor(&[0, 8]), random.tensor(&[8]));
    let (dx, d_gamma) = Flex::rms_norm_backward(x.clone(), gamma.clone(), x.clone(), EPS, 0.0);
    assert_eq!((values_of(&dx).len(), values_of(&d_gamma)), (0, vec![0.0; 8]));
    assert!(values_of(&Flex::rms_norm(x, gamma, EPS, 0.0)).is_empty());
}

/// Rows of zeros are legal (padding): the result is zero, the gradient finite.
#[test]
fn rows_of_zeros_stay_finite() {
    let zeros = super::place(&[0.0; 16], &[2, 8], super::View::Packed);
    let mut random = Random::new(4);
    let (gamma, dy) = (random.tensor(&[8]), random.tensor(&[2, 8]));
    assert_eq!(values_of(&Flex::rms_norm(zeros.clone(), gamma.clone(), EPS, 0.0)), [0.0; 16]);
    let (dx, d_gamma) = Flex::rms_norm_backward(zeros, gamma, dy, EPS, 0.0);
    assert!(values_of(&dx).iter().all(|value| value.is_finite()));
    assert_eq!(values_of(&d_gamma), [0.0; 8]);
}

#[test]
#[should_panic(expected = "shape")]
fn refuses_a_gamma_of_another_width() {
    let mut random = Random::new(5);
    Flex::rms_norm(random.tensor(&[2, 8]), random.tensor(&[7]), EPS, 0.0);
}
