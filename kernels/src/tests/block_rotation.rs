use burn::backend::Flex;

use super::{
    F32, Random, Tape, VIEWS, assert_close, assert_same_gradients, differentiate, leaves, other_owners, values_of,
};
use crate::{LowRankOps, block_rotation};

/// `(t, blocks, b)`; the last is more than one task of rows.
const SHAPES: [(usize, usize, usize); 5] = [(32, 3, 8), (5, 7, 3), (1, 1, 2), (40, 1, 16), (300, 2, 5)];

#[test]
fn forward_and_gradients_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for (t, n, b) in SHAPES {
        for view in VIEWS {
            let inputs = [random.view(&[t, n * b], view), random.view(&[n, b, b], view)];
            let dy = random.view(&[t, n * b], view);
            assert_same_gradients(
                &format!("{t} {n} {b} {view:?}"),
                &inputs,
                &dy,
                F32,
                |x| Tape::block_rotation(x[0].clone(), x[1].clone()),
                |x| block_rotation::reference::<Tape>(x[0].clone(), x[1].clone()),
            );
            let [x, _] = inputs;
            let ours = Flex::block_rotation_gradient(x.clone(), dy.clone(), b);
            assert_close("dE", &ours, &block_rotation::gradient_reference::<Flex>(x, dy, b), F32);
        }
    }
}

#[test]
fn only_trained_operands_get_gradients_and_x_is_kept_for_blocks_alone() {
    let mut random = Random::new(2);
    let (x, turn, dy) = (random.tensor(&[5, 8]), random.tensor(&[2, 4, 4]), random.tensor(&[5, 8]));
    for (tracked, kept) in [([true, false], 0), ([false, true], 1)] {
        let run = |x: &[burn::backend::tensor::FloatTensor<Tape>]| Tape::block_rotation(x[0].clone(), x[1].clone());
        let (_, grads) = differentiate(&[x.clone(), turn.clone()], &tracked, &dy, run);
        assert_eq!([grads[0].is_some(), grads[1].is_some()], tracked);
        let input = leaves(&[x.clone(), turn.clone()], &tracked);
        let y = run(&input);
        drop(input);
        assert_eq!(other_owners(&x), kept);
        drop(y);
    }
}

#[test]
fn zero_blocks_leave_x_to_the_bit_and_no_tokens_a_zero_gradient() {
    let mut random = Random::new(3);
    let x = random.tensor(&[300, 12]);
    let zero = super::place(&[0.0; 48], &[3, 4, 4], super::View::Packed);
    assert_eq!(values_of(&Flex::block_rotation(x.clone(), zero)), values_of(&x));
    let none = random.tensor(&[0, 12]);
    assert_eq!(values_of(&Flex::block_rotation_gradient(none.clone(), none, 4)), vec![0.0; 48]);
}

#[test]
#[should_panic(expected = "shape of x: expected blocks of 4, got [2, 9]")]
fn refuses_blocks_that_do_not_tile_the_input() {
    let mut random = Random::new(4);
    Flex::block_rotation(random.tensor(&[2, 9]), random.tensor(&[2, 4, 4]));
}
