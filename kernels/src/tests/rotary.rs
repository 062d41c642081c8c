use burn::backend::{AutodiffBackend, Flex};

use super::{F32, Random, Tape, VIEWS, View, assert_close, assert_same_gradients, place};
use crate::{LowRankOps, rotary};

/// `(b, s, h, d)`
const SHAPES: [[usize; 4]; 4] = [[2, 35, 3, 16], [1, 5, 1, 6], [1, 1, 1, 2], [3, 1, 9, 64]];

fn tables(random: &mut Random, tokens: usize, half: usize, view: View) -> [burn_flex::FlexTensor; 2] {
    let angles: Vec<f32> = (0..tokens * half).map(|_| 6.3 * random.uniform() as f32).collect();
    [f32::cos, f32::sin].map(|f| place(&angles.iter().map(|&a| f(a)).collect::<Vec<_>>(), &[tokens, half], view))
}

#[test]
fn forward_and_gradient_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for dims in SHAPES {
        for (view, sign) in VIEWS.into_iter().flat_map(|view| [(view, 1.0), (view, -1.0)]) {
            let [cos, sin] = tables(&mut random, dims[0] * dims[1], dims[3] / 2, view);
            let (x, dy) = (random.view(&dims, view), random.view(&dims, view));
            let table = |t: &burn_flex::FlexTensor| Tape::from_inner(t.clone());
            assert_same_gradients(
                &format!("{dims:?} {view:?} {sign}"),
                &[x],
                &dy,
                F32,
                |x| Tape::rotary(x[0].clone(), table(&cos), table(&sin), sign),
                |x| rotary::reference::<Tape>(x[0].clone(), table(&cos), table(&sin), sign),
            );
        }
    }
}

#[test]
fn turning_back_restores_the_input() {
    let mut random = Random::new(2);
    let [cos, sin] = tables(&mut random, 70, 8, View::Packed);
    let x = random.tensor(&[2, 35, 3, 16]);
    let there = Flex::rotary(x.clone(), cos.clone(), sin.clone(), 1.0);
    assert_close("there and back", &Flex::rotary(there, cos, sin, -1.0), &x, F32);
}

#[test]
#[should_panic(expected = "shape of the table")]
fn refuses_a_table_of_another_length() {
    let mut random = Random::new(3);
    let [cos, sin] = tables(&mut random, 9, 8, View::Packed);
    Flex::rotary(random.tensor(&[1, 8, 1, 16]), cos, sin, 1.0);
}
