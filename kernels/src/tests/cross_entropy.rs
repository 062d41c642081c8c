use burn::backend::{AutodiffBackend, Flex};

use super::{F32, Random, Tape, VIEWS, assert_close, assert_same_gradients, integers, place, values_of};
use crate::{LowRankOps, cross_entropy};

/// `(n, vocab)`: more than one task, odd, size 1, and rows longer than one block.
const SHAPES: [(usize, usize); 5] = [(40, 64), (5, 123), (1, 1), (3, 1), (7, 2051)];

fn targets(random: &mut Random, n: usize, vocab: usize) -> burn_flex::FlexTensor {
    let target = |i: usize| if i % 3 == 1 { -100 } else { (random.uniform() * vocab as f64) as i32 };
    integers(&(0..n).map(target).collect::<Vec<_>>(), &[n])
}

#[test]
fn loss_and_gradient_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for (n, vocab) in SHAPES {
        for (view, softcap) in VIEWS.into_iter().flat_map(|view| [(view, 0.0), (view, 5.0)]) {
            let values: Vec<f32> = random.values(n * vocab).iter().map(|v| 4.0 * v).collect();
            let logits = place(&values, &[n, vocab], view);
            let targets = targets(&mut random, n, vocab);
            let dy = random.tensor(&[n]);
            let what = format!("{n} {vocab} {view:?} softcap {softcap}");
            assert_same_gradients(
                &what,
                std::slice::from_ref(&logits),
                &dy,
                F32,
                |x| Tape::cross_entropy(x[0].clone(), Tape::int_from_inner(targets.clone()), softcap).0,
                |x| cross_entropy::reference::<Tape>(x[0].clone(), Tape::int_from_inner(targets.clone()), softcap).0,
            );
            let ours = Flex::cross_entropy(logits.clone(), targets.clone(), softcap);
            let plain = cross_entropy::reference::<Flex>(logits, targets, softcap);
            assert_close(&format!("{what} loss"), &ours.0, &plain.0, F32);
            assert_close(&format!("{what} gradient"), &ours.1, &plain.1, F32);
        }
    }
}

/// Logits around a million: the maximum is subtracted before the exponential.
#[test]
fn large_logits_stay_finite() {
    let logits = place(&[1e6, 1e6 - 1.0, -1e6, 0.0], &[1, 4], super::View::Packed);
    let (loss, gradient) = Flex::cross_entropy(logits, integers(&[1], &[1]), 0.0);
    let p = 1.0 / (1.0 + 1f32.exp());
    assert_close("loss", &loss, &place(&[-p.ln()], &[1], super::View::Packed), 1e-6 * 1e6 / 16.0);
    assert_close("gradient", &gradient, &place(&[1.0 - p, p - 1.0, 0.0, 0.0], &[1, 4], super::View::Packed), F32);
}

/// A diverged model must show in the loss.
#[test]
fn a_logit_that_is_not_a_number_shows_in_the_loss() {
    for at in [0, 17, 49] {
        let mut values = vec![0.5; 50];
        values[at] = f32::NAN;
        for softcap in [0.0, 5.0] {
            let logits = place(&values, &[1, 50], super::View::Packed);
            let (loss, _) = Flex::cross_entropy(logits, integers(&[3], &[1]), softcap);
            assert!(values_of(&loss)[0].is_nan(), "at {at}, softcap {softcap}");
        }
    }
}

#[test]
fn ignored_rows_have_no_loss_and_no_gradient() {
    let mut random = Random::new(2);
    let (loss, gradient) = Flex::cross_entropy(random.tensor(&[3, 50]), integers(&[-100; 3], &[3]), 0.0);
    assert_eq!((values_of(&loss), values_of(&gradient)), (vec![0.0; 3], vec![0.0; 150]));
    let (loss, gradient) = Flex::cross_entropy(random.tensor(&[0, 50]), integers(&[], &[0]), 0.0);
    assert_eq!((values_of(&loss).len(), values_of(&gradient).len()), (0, 0));
}

#[test]
fn the_gradient_takes_the_memory_of_unshared_logits() {
    let mut random = Random::new(3);
    let logits = random.tensor(&[3, 50]);
    let (address, kept) = (logits.bytes().as_ptr(), logits.clone());
    let before = values_of(&kept);
    let (_, gradient) = Flex::cross_entropy(logits, integers(&[1, 2, 3], &[3]), 0.0);
    assert_ne!(gradient.bytes().as_ptr(), address);
    assert_eq!(values_of(&kept), before);
    let (_, gradient) = Flex::cross_entropy(kept, integers(&[1, 2, 3], &[3]), 0.0);
    assert_eq!(gradient.bytes().as_ptr(), address);
}

#[test]
#[should_panic(expected = "target 50 of row 0")]
fn refuses_a_target_beyond_the_vocabulary() {
    let mut random = Random::new(4);
    Flex::cross_entropy(random.tensor(&[1, 50]), integers(&[50], &[1]), 0.0);
}
