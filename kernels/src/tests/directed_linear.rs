use burn::backend::tensor::FloatTensor;
use burn::backend::{AutodiffBackend, Flex};

use super::{F32, Random, Tape, VIEWS, View, assert_close, differentiate, place, values_of};
use crate::plain::Plain;
use crate::{LowRankOps, directed_linear};

/// t, d_in, d_out, r.
const SHAPES: [(usize, usize, usize, usize); 4] = [(70, 33, 64, 8), (5, 64, 33, 3), (1, 1, 1, 1), (40, 577, 5, 6)];
const SCALE: f32 = 0.7;

fn ours(x: &[FloatTensor<Tape>]) -> FloatTensor<Tape> {
    let [x, w, down, up, magnitude] = [0, 1, 2, 3, 4].map(|i| x[i].clone());
    Tape::directed_linear(x, w, down, up, magnitude, SCALE)
}

/// The lengths are constants.
fn plain(x: &[FloatTensor<Tape>]) -> FloatTensor<Tape> {
    let [w, down, up, magnitude] = [1, 2, 3, 4].map(|i| Tape::inner(x[i].clone()));
    let (_, lengths, _) = directed_linear::reference::<Flex>(w, down, up, magnitude, SCALE);
    let width = Plain::<Flex>(lengths.clone()).dims()[0];
    let [x, w, down, up, magnitude] = [0, 1, 2, 3, 4].map(|i| Plain::<Tape>(x[i].clone()));
    let factor = magnitude.reshape(&[1, width]) * Plain::<Tape>(Tape::from_inner(lengths)).reshape(&[1, width]).recip();
    (x.matmul(w + down.matmul(up) * SCALE) * factor).0
}

fn inputs(random: &mut Random, [t, m, n, r]: [usize; 4], view: View) -> [burn_flex::FlexTensor; 5] {
    // As of weights: columns of a length near 1.
    let w: Vec<f32> = random.values(m * n).into_iter().map(|w| w / (m as f32).sqrt()).collect();
    let magnitude = place(&random.values(n), &[n], view);
    [
        random.view(&[t, m], view),
        place(&w, &[m, n], view),
        random.view(&[m, r], view),
        random.view(&[r, n], view),
        magnitude,
    ]
}

#[test]
fn forward_and_gradients_are_those_of_the_plain_version() {
    let mut random = Random::new(1);
    for (t, m, n, r) in SHAPES {
        for view in VIEWS {
            let inputs = inputs(&mut random, [t, m, n, r], view);
            let dy = random.view(&[t, n], view);
            let frozen = [true, false, true, true, true];
            let want = differentiate(&inputs, &frozen, &dy, plain);
            let got = differentiate(&inputs, &frozen, &dy, ours);
            assert_close(&format!("{t} {m} {n} {r} {view:?}"), &got.0, &want.0, F32);
            assert!(got.1[1].is_none(), "a frozen base gets no gradient");
            for i in [0, 2, 3, 4] {
                let [got, want] = [&got, &want].map(|side| side.1[i].as_ref().unwrap());
                assert_close(&format!("gradient {i} of {t} {m} {n} {r} {view:?}"), got, want, F32);
            }
        }
    }
}

#[test]
fn weights_lengths_and_factors_are_those_of_the_reference() {
    let mut random = Random::new(2);
    for (_, m, n, r) in SHAPES {
        let [_, w, down, up, magnitude] = inputs(&mut random, [1, m, n, r], View::Packed);
        let all = (w, down, up, magnitude);
        let got = Flex::directed_weight(all.0.clone(), all.1.clone(), all.2.clone(), all.3.clone(), SCALE);
        let want = directed_linear::reference::<Flex>(all.0, all.1, all.2, all.3, SCALE);
        for (what, got, want) in [("U", &got.0, &want.0), ("n", &got.1, &want.1), ("c", &got.2, &want.2)] {
            assert_close(&format!("{what} {m} {n} {r}"), got, want, F32);
        }
    }
}

/// y says nothing of such a column, yet m has a gradient there; a column without length divides by the least one.
#[test]
fn lengths_of_zero_have_a_gradient() {
    let mut random = Random::new(3);
    let mut given = inputs(&mut random, [40, 9, 5, 4], View::Packed);
    given[4] = place(&[1.5, 0.0, -2.0, 1e-30, -0.0], &[5], View::Packed);
    let dy = random.tensor(&[40, 5]);
    let frozen = [true, false, true, true, true];
    let (want, got) = (differentiate(&given, &frozen, &dy, plain), differentiate(&given, &frozen, &dy, ours));
    for i in [0, 2, 3, 4] {
        assert_close(&format!("gradient {i}"), got.1[i].as_ref().unwrap(), want.1[i].as_ref().unwrap(), F32);
    }
    let zeros = |dims: &[usize]| place(&vec![0.0; dims.iter().product()], dims, View::Packed);
    let (u, lengths, _) = Flex::directed_weight(zeros(&[9, 5]), zeros(&[9, 4]), zeros(&[4, 5]), zeros(&[5]), SCALE);
    assert!(values_of(&u).iter().chain(&values_of(&lengths)).all(|value| value.is_finite()));
}

#[test]
fn only_trained_operands_get_gradients() {
    let mut random = Random::new(4);
    let given = inputs(&mut random, [5, 8, 6, 3], View::Packed);
    let dy = random.tensor(&[5, 6]);
    let all = differentiate(&given, &[true, false, true, true, true], &dy, plain);
    for bits in 1..16u8 {
        let [x, down, up, magnitude] = [0, 1, 2, 3].map(|i| bits >> i & 1 > 0);
        let tracked = [x, false, down, up, magnitude];
        let (out, grads) = differentiate(&given, &tracked, &dy, ours);
        assert_close("result", &out, &all.0, F32);
        for i in 0..5 {
            assert_eq!(grads[i].is_some(), tracked[i], "input {i} of {tracked:?}");
            if let Some(gradient) = &grads[i] {
                assert_close("gradient", gradient, all.1[i].as_ref().unwrap(), F32);
            }
        }
    }
}

/// Where it is cheaper is a question of the number of rows.
#[test]
fn sums_are_built_for_many_rows() {
    for (m, n) in [(576, 576), (576, 192), (576, 1536), (1536, 576)] {
        assert!(directed_linear::builds_are_cheaper(2048, m, n) && !directed_linear::builds_are_cheaper(64, m, n));
    }
}

#[test]
#[should_panic(expected = "shape of the magnitude")]
fn refuses_a_magnitude_of_another_width() {
    let mut random = Random::new(5);
    let [_, w, down, up, _] = inputs(&mut random, [1, 4, 6, 2], View::Packed);
    Flex::directed_weight(w, down, up, random.tensor(&[5]), SCALE);
}
