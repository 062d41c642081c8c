use burn::backend::tensor::FloatTensor;
use burn_flex::FlexTensor;

use super::{F32, Random, Tape, VIEWS, assert_close, differentiate, leaves, other_owners};
use crate::plain::Plain;
use crate::{LowRankOps, Maybe};

/// `(t, m, n, r, q)`
const SHAPES: [(usize, usize, usize, usize, usize); 4] =
    [(32, 24, 40, 4, 6), (5, 123, 7, 3, 2), (1, 1, 1, 1, 1), (3, 2, 5, 2, 5)];

fn constant(tensor: &FlexTensor) -> FloatTensor<Tape> {
    <Tape as burn::backend::AutodiffBackend>::from_inner(tensor.clone())
}

fn product(a: FlexTensor, b: FlexTensor) -> FlexTensor {
    Plain::<burn::backend::Flex>(a).matmul(Plain(b)).0
}

fn dense(input: &[FloatTensor<Tape>]) -> FloatTensor<Tape> {
    Tape::dense_linear(input[0].clone(), input[1].clone(), Maybe::Given(input[2].clone()))
}

fn projected(input: &[FloatTensor<Tape>], left: Option<&FlexTensor>, right: Option<&FlexTensor>) -> FloatTensor<Tape> {
    let [left, right] = [left, right].map(|basis| Maybe::from_option(basis.map(constant)));
    let bias = Maybe::from_option(input.get(2).cloned());
    Tape::projected_linear(input[0].clone(), input[1].clone(), bias, left, right, Maybe::Absent, 1.0)
}

/// `(x P)^T (dy Q) = P^T (x^T dy) Q` for any P and Q, with the `y`, `dx` and `db` of the dense layer.
#[test]
fn the_gradient_of_w_arrives_projected() {
    let mut random = Random::new(11);
    for (t, m, n, r, q) in SHAPES {
        for view in VIEWS {
            for (has_left, has_right) in [(true, false), (false, true), (true, true), (false, false)] {
                let inputs = [random.view(&[t, m], view), random.view(&[m, n], view), random.tensor(&[n])];
                let dy = random.view(&[t, n], view);
                let left = has_left.then(|| random.view(&[m, r], view));
                let right = has_right.then(|| random.view(&[n, q], view));
                let (want_y, want) = differentiate(&inputs, &[true; 3], &dy, dense);
                let (y, got) = differentiate(&inputs, &[true; 3], &dy, |x| projected(x, left.as_ref(), right.as_ref()));
                let mut want = want.into_iter().map(Option::unwrap).collect::<Vec<_>>();
                if let Some(left) = left {
                    want[1] = product(Plain::<burn::backend::Flex>(left).t().0, want[1].clone());
                }
                if let Some(right) = right {
                    want[1] = product(want[1].clone(), right);
                }
                assert_close("y", &y, &want_y, F32);
                for (i, name) in ["dx", "R", "db"].into_iter().enumerate() {
                    assert_close(name, got[i].as_ref().unwrap(), &want[i], F32);
                }
            }
        }
    }
}

/// The factors arrive as they are, `dx` is that of the dense layer, and W gets nothing.
#[test]
fn the_factors_arrive_in_the_placeholders() {
    let mut random = Random::new(12);
    for (t, m, n, ..) in SHAPES {
        let mut inputs = vec![random.tensor(&[t, m]), random.tensor(&[m, n]), random.tensor(&[n])];
        let dy = random.tensor(&[t, n]);
        let (want_y, want) = differentiate(&inputs, &[true; 3], &dy, dense);
        inputs.extend([random.tensor(&[1, 1]), random.tensor(&[1, 1])]);
        let (y, got) = differentiate(&inputs, &[true; 5], &dy, |x| {
            let [input, w, bias, x_slot, dy_slot] = [0, 1, 2, 3, 4].map(|i| x[i].clone());
            Tape::factored_linear(input, w, Maybe::Given(bias), Maybe::Absent, Maybe::Absent, 1.0, x_slot, dy_slot)
        });
        assert_close("y", &y, &want_y, F32);
        assert_close("dx", got[0].as_ref().unwrap(), want[0].as_ref().unwrap(), F32);
        assert!(got[1].is_none(), "W gets no gradient");
        assert_close("db", got[2].as_ref().unwrap(), want[2].as_ref().unwrap(), F32);
        assert_close("x", got[3].as_ref().unwrap(), &inputs[0], F32);
        assert_close("dy", got[4].as_ref().unwrap(), &dy, F32);
    }
}

/// With an offset both layers act as `c W + D U`, and what arrives is the same.
#[test]
fn an_offset_acts_like_a_changed_weight() {
    let mut random = Random::new(14);
    let keep = 0.75;
    for (t, m, n, r, _) in SHAPES {
        for view in VIEWS {
            let (x, w, bias) = (random.view(&[t, m], view), random.view(&[m, n], view), random.tensor(&[n]));
            let (left, up) = (random.view(&[m, r], view), random.view(&[r, n], view));
            let dy = random.view(&[t, n], view);
            let moved = Plain::<burn::backend::Flex>(w.clone()) * keep + Plain(product(left.clone(), up.clone()));
            let changed = [x.clone(), moved.0, bias.clone()];
            let (want_y, want) = differentiate(&changed, &[true; 3], &dy, |x| projected(x, Some(&left), None));
            let inputs = [x.clone(), w.clone(), bias.clone()];
            let given = |tensor: &FlexTensor| Maybe::Given(constant(tensor));
            let (y, got) = differentiate(&inputs, &[true; 3], &dy, |x| {
                let [x, w, bias] = [0, 1, 2].map(|i| x[i].clone());
                Tape::projected_linear(x, w, Maybe::Given(bias), given(&left), Maybe::Absent, given(&up), keep)
            });
            assert_close("y", &y, &want_y, F32);
            for (i, name) in ["dx", "R", "db"].into_iter().enumerate() {
                assert_close(name, got[i].as_ref().unwrap(), want[i].as_ref().unwrap(), F32);
            }
            let slots = [random.tensor(&[1, 1]), random.tensor(&[1, 1])];
            let inputs = [x, w, bias, slots[0].clone(), slots[1].clone()];
            let (y, got) = differentiate(&inputs, &[true; 5], &dy, |x| {
                let [input, w, bias, x_slot, dy_slot] = [0, 1, 2, 3, 4].map(|i| x[i].clone());
                Tape::factored_linear(input, w, Maybe::Given(bias), given(&left), given(&up), keep, x_slot, dy_slot)
            });
            assert_close("y, factored", &y, &want_y, F32);
            assert_close("dx, factored", got[0].as_ref().unwrap(), want[0].as_ref().unwrap(), F32);
        }
    }
}

/// On the input side `x P` is saved and the input, the widest tensor of the layer, is freed after the forward.
#[test]
fn the_input_is_saved_only_without_a_left_basis() {
    let mut random = Random::new(13);
    let w = random.tensor(&[5, 4]);
    let (left, right) = (random.tensor(&[5, 2]), random.tensor(&[4, 2]));
    for (left, right, trained, saved) in [
        (Some(&left), None, true, 0),
        (None, Some(&right), true, 1),
        (Some(&left), Some(&right), true, 0),
        (None, Some(&right), false, 0),
    ] {
        let x = random.tensor(&[6, 5]); // its own: the tape may keep the last one for a while
        let input = leaves(&[x.clone(), w.clone()], &[true, trained]);
        let out = projected(&input, left, right);
        drop(input);
        assert_eq!(other_owners(&x), saved, "left {}, trained {trained}", left.is_some());
        drop(out);
    }
}
