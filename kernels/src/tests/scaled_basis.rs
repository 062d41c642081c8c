use burn::backend::Flex;

use super::{F32, Random, Tape, VIEWS, assert_close, assert_same_gradients, differentiate, leaves};
use crate::{LowRankOps, scaled_basis};

/// `(r, n, m)`.
const SHAPES: [(usize, usize, usize); 5] = [(4, 9, 33), (1, 7, 7), (3, 1, 16), (1, 1, 1), (16, 5, 77)];

#[test]
fn forward_and_gradients_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for (r, n, m) in SHAPES {
        for view in VIEWS {
            let inputs = [random.view(&[r, n], view), random.view(&[n, m], view)];
            let (a, dy) = (random.view(&[r, m], view), random.view(&[n * r, m], view));
            let constant = || leaves(std::slice::from_ref(&a), &[false]).remove(0);
            assert_same_gradients(
                &format!("{r} {n} {m} {view:?}"),
                &inputs,
                &dy,
                F32,
                |x| Tape::scaled_basis(constant(), x[0].clone(), x[1].clone()),
                |x| scaled_basis::reference::<Tape>(constant(), x[0].clone(), x[1].clone()),
            );
            let [lambda, gamma] = inputs;
            let ours = Flex::scaled_basis_backward(a.clone(), lambda.clone(), gamma.clone(), dy.clone());
            let plain = scaled_basis::backward_reference::<Flex>(a, lambda, gamma, dy);
            assert_close("dlambda", &ours.0, &plain.0, F32);
            assert_close("dgamma", &ours.1, &plain.1, F32);
        }
    }
}

#[test]
fn only_trained_scales_get_gradients_and_the_basis_none() {
    let mut random = Random::new(2);
    let inputs = [random.tensor(&[3, 5]), random.tensor(&[3, 4]), random.tensor(&[4, 5])];
    let dy = random.tensor(&[12, 5]);
    for tracked in [[true, true, false], [true, false, true], [true, true, true]] {
        let (_, grads) =
            differentiate(&inputs, &tracked, &dy, |x| Tape::scaled_basis(x[0].clone(), x[1].clone(), x[2].clone()));
        let given: Vec<bool> = grads.iter().map(Option::is_some).collect();
        assert_eq!(given, [false, tracked[1], tracked[2]]);
    }
}

#[test]
#[should_panic(expected = "shape of the basis")]
fn refuses_a_basis_of_another_width() {
    let mut random = Random::new(3);
    Flex::scaled_basis(random.tensor(&[3, 5]), random.tensor(&[3, 4]), random.tensor(&[4, 6]));
}
