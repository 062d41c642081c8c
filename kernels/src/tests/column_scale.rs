use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::{
    F32, Random, Tape, VIEWS, View, assert_close, assert_same_gradients, differentiate, leaves, other_owners, place,
    values_of,
};
use crate::{LowRankOps, Maybe, column_scale};

const SHAPES: [(usize, usize); 5] = [(70, 64), (5, 123), (1, 1), (3, 1), (33, 577)];

fn ours(x: &[burn::backend::tensor::FloatTensor<Tape>]) -> burn::backend::tensor::FloatTensor<Tape> {
    Tape::column_scale(x[0].clone(), x[1].clone(), Maybe::from_option(x.get(2).cloned())).0
}

fn plain(x: &[burn::backend::tensor::FloatTensor<Tape>]) -> burn::backend::tensor::FloatTensor<Tape> {
    column_scale::reference::<Tape>(x[0].clone(), x[1].clone(), x.get(2).cloned()).0
}

/// Factors away from 0: a small one multiplies the rounding of y.
fn factors(random: &mut Random, width: usize) -> Vec<f32> {
    random.values(width).into_iter().map(|c| if c < 0.0 { c - 0.3 } else { c + 0.3 }).collect()
}

#[test]
fn forward_and_gradients_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for (t, d) in SHAPES {
        for view in VIEWS {
            let c = place(&factors(&mut random, d), &[d], view);
            let inputs = [random.view(&[t, d], view), c, random.view(&[d], view)];
            let dy = random.view(&[t, d], view);
            let what = format!("{t} {d} {view:?}");
            assert_same_gradients(&what, &inputs[..2], &dy, F32, ours, plain);
            assert_same_gradients(&format!("{what} bias"), &inputs, &dy, F32, ours, plain);
            let [z, c, bias] = inputs;
            let plain = column_scale::backward_reference::<Flex>(z.clone(), c.clone(), dy.clone());
            for bias in [None, Some(bias)] {
                let has_bias = bias.is_some();
                let (_, kept) = Flex::column_scale(z.clone(), c.clone(), Maybe::from_option(bias));
                let got = Flex::column_scale_backward(kept, c.clone(), dy.clone(), has_bias);
                assert_close("dz", &got.0, &plain.0, F32);
                assert_close("dc", &got.1, &plain.1, F32);
            }
        }
    }
}

/// z does not follow from y there, yet the gradients are those of any other factor.
#[test]
fn factors_of_zero_have_a_gradient() {
    let mut random = Random::new(2);
    let (z, dy) = (random.tensor(&[40, 5]), random.tensor(&[40, 5]));
    for factor in [0.0, 1e-30, f32::MIN_POSITIVE / 4.0] {
        let c = place(&[1.5, factor, -2.0, 0.5, -factor], &[5], View::Packed);
        assert_same_gradients(&format!("{factor}"), &[z.clone(), c], &dy, F32, ours, plain);
    }
}

/// A gradient of a sum that two operations share must not be overwritten.
#[test]
fn operands_with_other_owners_stay_as_they_are() {
    let mut random = Random::new(3);
    let (z, c, dy) = (random.tensor(&[40, 7]), place(&[2.0; 7], &[7], View::Packed), random.tensor(&[40, 7]));
    let before = [values_of(&z), values_of(&dy)];
    let (y, kept) = Flex::column_scale(z.clone(), c.clone(), Maybe::Absent);
    let seen = values_of(&y);
    Flex::column_scale_backward(kept, c, dy.clone(), false);
    assert_eq!([values_of(&z), values_of(&dy)], before);
    assert_eq!(values_of(&y), seen);
}

#[test]
fn z_is_overwritten_and_y_kept_where_nothing_else_holds_z() {
    let mut random = Random::new(4);
    let c = place(&[2.0; 7], &[7], View::Packed);
    let place_of = |tensor: &FlexTensor| crate::cpu::values(tensor).as_ptr();
    let z = random.tensor(&[40, 7]);
    let memory = place_of(&z);
    let (y, kept) = Flex::column_scale(z, c.clone(), Maybe::Absent);
    assert_eq!([place_of(&y), place_of(&kept)], [memory, memory]);
    drop(y);
    let dy = random.tensor(&[40, 7]);
    let memory = place_of(&dy);
    assert_eq!(place_of(&Flex::column_scale_backward(kept, c.clone(), dy, false).0), memory);
    // On the tape: y has one more owner, z none.
    let z = random.tensor(&[40, 7]);
    let leaf = leaves(&[z.clone(), c], &[true, true]);
    let y = ours(&leaf);
    drop(leaf);
    assert_eq!(other_owners(&z), 0);
    assert_eq!(other_owners(&<Tape as burn::backend::AutodiffBackend>::inner(y.clone())), 2); // `y` and the tape
}

#[test]
fn only_trained_operands_get_gradients() {
    let mut random = Random::new(5);
    let inputs = [random.tensor(&[5, 8]), place(&factors(&mut random, 8), &[8], View::Packed), random.tensor(&[8])];
    let dy = random.tensor(&[5, 8]);
    let all = differentiate(&inputs, &[true; 3], &dy, plain);
    for bits in 1..8u8 {
        let tracked = [0, 1, 2].map(|i| bits >> i & 1 > 0);
        let (out, grads) = differentiate(&inputs, &tracked, &dy, ours);
        assert_close("result", &out, &all.0, F32);
        for i in 0..3 {
            assert_eq!(grads[i].is_some(), tracked[i], "input {i} of {tracked:?}");
            if let Some(gradient) = &grads[i] {
                assert_close("gradient", gradient, all.1[i].as_ref().unwrap(), F32);
            }
        }
    }
}

#[test]
fn no_tokens_give_a_zero_gradient_of_the_factors() {
    let (z, c) = (Random::new(6).tensor(&[0, 8]), place(&[2.0; 8], &[8], View::Packed));
    let (dz, dc) = Flex::column_scale_backward(z.clone(), c, z, false);
    assert_eq!((values_of(&dz).len(), values_of(&dc)), (0, vec![0.0; 8]));
}

#[test]
#[should_panic(expected = "shape of the factors")]
fn refuses_factors_of_another_width() {
    let mut random = Random::new(7);
    Flex::column_scale(random.tensor(&[2, 8]), random.tensor(&[7]), Maybe::Absent);
}
