use burn::backend::AutodiffBackend;
use burn::backend::tensor::FloatTensor;

use super::{
    F32, Random, Tape, VIEWS, View, assert_close, assert_same_gradients, differentiate, leaves, other_owners, values_of,
};
use crate::plain::Plain;
use crate::{LowRankOps, Maybe};

const SHAPES: [(usize, usize, usize); 4] = [(32, 24, 40), (5, 123, 7), (1, 1, 1), (3, 1, 2)];

fn plain(input: &[FloatTensor<Tape>]) -> FloatTensor<Tape> {
    let product = Plain::<Tape>(input[0].clone()).matmul(Plain(input[1].clone()));
    match input.get(2) {
        Some(bias) => {
            let bias = Plain::<Tape>(bias.clone());
            let width = bias.dims()[0];
            (product + bias.reshape(&[1, width])).0
        }
        None => product.0,
    }
}

fn linear(input: &[FloatTensor<Tape>]) -> FloatTensor<Tape> {
    Tape::dense_linear(input[0].clone(), input[1].clone(), Maybe::from_option(input.get(2).cloned()))
}

#[test]
fn gradients_are_those_of_the_plain_operations() {
    let mut random = Random::new(1);
    for (t, d_in, d_out) in SHAPES {
        for view in VIEWS {
            let inputs =
                [random.view(&[t, d_in], view), random.view(&[d_in, d_out], view), random.view(&[d_out], view)];
            let dy = random.view(&[t, d_out], view);
            let what = format!("{t} {d_in} {d_out} {view:?}");
            assert_same_gradients(&what, &inputs[..2], &dy, F32, linear, plain);
            assert_same_gradients(&format!("{what} bias"), &inputs, &dy, F32, linear, plain);
        }
    }
}

#[test]
fn only_trained_operands_get_gradients() {
    let mut random = Random::new(2);
    let inputs = [random.tensor(&[5, 3]), random.tensor(&[3, 4]), random.tensor(&[4])];
    let dy = random.tensor(&[5, 4]);
    let all = differentiate(&inputs, &[true; 3], &dy, plain);
    for mask in 1..8u8 {
        let tracked = [mask & 1 > 0, mask & 2 > 0, mask & 4 > 0];
        let (out, grads) = differentiate(&inputs, &tracked, &dy, linear);
        assert_close("result", &out, &all.0, F32);
        for i in 0..3 {
            assert_eq!(grads[i].is_some(), tracked[i], "input {i} of {tracked:?}");
            if let Some(gradient) = &grads[i] {
                assert_close("gradient", gradient, all.1[i].as_ref().unwrap(), F32);
            }
        }
    }
}

/// With a frozen W the backward needs W alone; the input may be freed.
#[test]
fn the_input_is_saved_only_where_w_is_trained() {
    let mut random = Random::new(3);
    let (x, w) = (random.tensor(&[5, 3]), random.tensor(&[3, 4]));
    for (w_is_trained, saved) in [(false, 0), (true, 1)] {
        let mut input = leaves(&[x.clone(), w.clone()], &[true, w_is_trained]).into_iter();
        let out = Tape::dense_linear(input.next().unwrap(), input.next().unwrap(), Maybe::Absent);
        drop(input);
        assert_eq!(other_owners(&x), saved, "W trained: {w_is_trained}");
        drop(out);
    }
}

#[test]
fn a_seeded_backward_pass_starts_from_the_given_gradient() {
    let mut random = Random::new(5);
    let inputs = [random.tensor(&[5, 3]), random.tensor(&[3, 4])];
    let dy = random.tensor(&[5, 4]);
    let (_, want) = differentiate(&inputs, &[true, true], &dy, linear);
    let input = leaves(&inputs, &[true, true]);
    let seed = Tape::seed_gradient(linear(&input), Tape::from_inner(dy));
    assert_eq!(values_of(seed.primitive()), [0.0]);
    let grads = Tape::backward(seed);
    for (leaf, want) in input.iter().zip(want) {
        assert_close("gradient", &Tape::grad(leaf, &grads).unwrap(), &want.unwrap(), 0.0);
    }
}

#[test]
fn a_transposed_view_of_w_is_not_copied() {
    let mut random = Random::new(4);
    let w = random.view(&[30, 20], View::Swapped);
    let out = burn::backend::Flex::dense_linear(random.tensor(&[2, 30]), w.clone(), Maybe::Absent);
    assert_eq!(other_owners(&w), 0);
    assert_eq!(out.layout().shape().to_vec(), [2, 20]);
}
