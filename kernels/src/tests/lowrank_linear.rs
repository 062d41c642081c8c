use burn::backend::tensor::FloatTensor;

use super::{
    F32, Random, Tape, VIEWS, assert_close, assert_same_gradients, differentiate, leaves, other_owners, place,
};
use crate::merged_linear::Tracked;
use crate::plain::Plain;
use crate::{LowRankOps, Maybe};

/// `(t, d_in, d_out, r)`; the last two are cheaper with `W + s A B`.
const SHAPES: [(usize, usize, usize, usize); 5] =
    [(32, 24, 40, 4), (5, 123, 7, 3), (1, 1, 1, 1), (3, 2, 5, 8), (40, 6, 7, 6)];
const SCALE: f32 = 1.7;

/// Order of the inputs: x, down, up, bias, and W and the mask as constants.
struct Case {
    w: burn_flex::FlexTensor,
    mask: Option<burn_flex::FlexTensor>,
    scale: f32,
}

impl Case {
    fn constant(tensor: &burn_flex::FlexTensor) -> FloatTensor<Tape> {
        <Tape as burn::backend::AutodiffBackend>::from_inner(tensor.clone())
    }

    fn ours(&self, input: &[FloatTensor<Tape>]) -> FloatTensor<Tape> {
        Tape::lowrank_linear(
            input[0].clone(),
            Self::constant(&self.w),
            Maybe::from_option(input.get(3).cloned()),
            Maybe::from_option(self.mask.as_ref().map(Self::constant)),
            input[1].clone(),
            input[2].clone(),
            self.scale,
        )
    }

    fn plain(&self, input: &[FloatTensor<Tape>]) -> FloatTensor<Tape> {
        let x = Plain::<Tape>(input[0].clone());
        let base = x.clone().matmul(Plain(Self::constant(&self.w)));
        let dropped = match &self.mask {
            Some(mask) => x * Plain(Self::constant(mask)),
            None => x,
        };
        let delta = dropped.matmul(Plain(input[1].clone())).matmul(Plain(input[2].clone())) * self.scale;
        match input.get(3) {
            Some(bias) => {
                let bias = Plain::<Tape>(bias.clone());
                let width = bias.dims()[0];
                (base + delta + bias.reshape(&[1, width])).0
            }
            None => (base + delta).0,
        }
    }
}

/// Inverted dropout with probability one half.
fn dropout(random: &mut Random, t: usize, d_in: usize) -> burn_flex::FlexTensor {
    let values: Vec<f32> = (0..t * d_in).map(|_| if random.uniform() < 0.5 { 0.0 } else { 2.0 }).collect();
    place(&values, &[t, d_in], super::View::Packed)
}

#[test]
fn gradients_are_those_of_the_plain_operations() {
    let mut random = Random::new(1);
    for (t, d_in, d_out, r) in SHAPES {
        for (view, masked) in VIEWS.into_iter().flat_map(|view| [(view, false), (view, true)]) {
            let inputs = [
                random.view(&[t, d_in], view),
                random.view(&[d_in, r], view),
                random.view(&[r, d_out], view),
                random.view(&[d_out], view),
            ];
            let mask = masked.then(|| dropout(&mut random, t, d_in));
            let case = Case { w: random.view(&[d_in, d_out], view), mask, scale: SCALE };
            let dy = random.view(&[t, d_out], view);
            let what = format!("{t} {d_in} {d_out} {r} {view:?} masked {masked}");
            assert_same_gradients(&what, &inputs[..3], &dy, F32, |x| case.ours(x), |x| case.plain(x));
            assert_same_gradients(&format!("{what} bias"), &inputs, &dy, F32, |x| case.ours(x), |x| case.plain(x));
        }
    }
}

#[test]
fn only_trained_operands_get_gradients() {
    let mut random = Random::new(2);
    let (t, d_in, d_out, r) = (6, 5, 4, 2);
    let inputs =
        [random.tensor(&[t, d_in]), random.tensor(&[d_in, r]), random.tensor(&[r, d_out]), random.tensor(&[d_out])];
    let dy = random.tensor(&[t, d_out]);
    let case = Case { w: random.tensor(&[d_in, d_out]), mask: Some(dropout(&mut random, t, d_in)), scale: SCALE };
    let all = differentiate(&inputs, &[true; 4], &dy, |x| case.plain(x));
    for bits in 1..16u8 {
        let tracked = [0, 1, 2, 3].map(|i| bits >> i & 1 > 0);
        let (out, grads) = differentiate(&inputs, &tracked, &dy, |x| case.ours(x));
        assert_close("result", &out, &all.0, F32);
        for i in 0..4 {
            assert_eq!(grads[i].is_some(), tracked[i], "input {i} of {tracked:?}");
            if let Some(gradient) = &grads[i] {
                assert_close("gradient", gradient, all.1[i].as_ref().unwrap(), F32);
            }
        }
    }
}

/// A W on the tape is a constant all the same.
#[test]
fn w_never_gets_a_gradient() {
    let mut random = Random::new(3);
    let inputs = [random.tensor(&[6, 5]), random.tensor(&[5, 2]), random.tensor(&[2, 4]), random.tensor(&[5, 4])];
    let (_, grads) = differentiate(&inputs, &[true; 4], &random.tensor(&[6, 4]), |x| {
        let [input, down, up, w] = [0, 1, 2, 3].map(|i| x[i].clone());
        Tape::lowrank_linear(input, w, Maybe::Absent, Maybe::Absent, down, up, SCALE)
    });
    let given: Vec<bool> = grads.iter().map(Option::is_some).collect();
    assert_eq!(given, [true, true, true, false]);
}

/// The input, the widest tensor of the layer, is freed after the forward where `down` is frozen.
#[test]
fn the_input_is_saved_only_where_down_is_trained() {
    let mut random = Random::new(4);
    let (x, w) = (random.tensor(&[6, 5]), random.tensor(&[5, 4]));
    let (down, up) = (random.tensor(&[5, 1]), random.tensor(&[1, 4]));
    for (down_is_trained, saved) in [(false, 0), (true, 1)] {
        let input = leaves(&[x.clone(), down.clone(), up.clone()], &[true, down_is_trained, true]);
        let case = Case { w: w.clone(), mask: None, scale: 1.0 };
        let out = case.ours(&input);
        drop(input);
        assert_eq!(other_owners(&x), saved, "down trained: {down_is_trained}");
        drop(out);
    }
}

#[test]
fn a_zero_up_leaves_the_base_product_to_the_bit() {
    let mut random = Random::new(5);
    let (x, w, down) = (random.tensor(&[33, 20]), random.tensor(&[20, 17]), random.tensor(&[20, 4]));
    let up = place(&[0.0; 68], &[4, 17], super::View::Packed);
    let base = burn::backend::Flex::dense_linear(x.clone(), w.clone(), Maybe::Absent);
    let y = burn::backend::Flex::lowrank_linear(x, w, Maybe::Absent, Maybe::Absent, down, up, 2.0);
    assert_eq!(super::values_of(&y), super::values_of(&base));
}

#[test]
fn a_shift_is_the_layer_of_an_identity() {
    let mut random = Random::new(6);
    for (t, d, r) in [(32, 24, 4), (5, 7, 9), (1, 1, 1)] {
        let inputs = [random.tensor(&[t, d]), random.tensor(&[d, r]), random.tensor(&[r, d])];
        let dy = random.tensor(&[t, d]);
        let plain = |x: &[FloatTensor<Tape>]| {
            let [x, down, up] = [0, 1, 2].map(|i| Plain::<Tape>(x[i].clone()));
            (x.clone() + x.matmul(down).matmul(up) * SCALE).0
        };
        let ours = |x: &[FloatTensor<Tape>]| Tape::lowrank_shift(x[0].clone(), x[1].clone(), x[2].clone(), SCALE);
        assert_same_gradients(&format!("{t} {d} {r}"), &inputs, &dy, F32, ours, plain);
    }
}

/// V is kept where it is no larger than x, and then neither W nor a factor that serves V alone; else those are kept.
#[test]
fn a_merged_layer_keeps_v_or_its_parts() {
    let mut random = Random::new(7);
    let (w, down, up) = (random.tensor(&[6, 7]), random.tensor(&[6, 6]), random.tensor(&[6, 7]));
    for (t, parts) in [(40, false), (6, true)] {
        let x = random.tensor(&[t, 6]);
        let input = leaves(&[x.clone(), down.clone(), up.clone()], &[true, true, false]);
        let case = Case { w: w.clone(), mask: None, scale: 1.0 };
        assert!(crate::merged_linear::is_cheaper(t, 6, 7, 6, Tracked { x: true, down: true, up: false }));
        let out = case.ours(&input);
        drop((input, case));
        let kept = [&w, &down, &up, &x].map(|tensor| other_owners(tensor) > 0);
        assert_eq!(kept, [parts, parts, true, true], "{t} rows");
        drop(out);
    }
}

#[test]
fn the_cheaper_route_follows_the_flops() {
    use crate::merged_linear::is_cheaper;
    let lora = Tracked { x: true, down: true, up: true };
    assert!(!is_cheaper(2048, 576, 576, 16, lora));
    assert!(is_cheaper(2048, 576, 576, 576, Tracked { down: false, ..lora }));
    // One token of a generation never pays for a product of the size of W.
    assert!(!is_cheaper(1, 576, 576, 64, Tracked { x: false, down: false, up: false }));
}
