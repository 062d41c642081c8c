use burn::backend::Flex;

use super::{F32, Random, VIEWS, View, assert_close, place, values_of};
use crate::LowRankOps;
use crate::adamw::{self, AdamW};

const RULE: AdamW =
    AdamW { learning_rate: 0.01, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.1, step: 3, gradient_scale: 0.7 };

#[test]
fn three_steps_are_those_of_the_reference_and_of_f64() {
    let mut random = Random::new(1);
    for dims in [[32, 64], [5, 123], [1, 1], [150, 123], [0, 4]] {
        for view in VIEWS {
            let start = random.view(&dims, view);
            let zeros = place(&vec![0.0; dims[0] * dims[1]], &dims, view);
            let mut ours = (start.clone(), zeros.clone(), zeros.clone());
            let mut plain = ours.clone();
            let mut exact: Vec<[f64; 3]> = values_of(&start).iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
            for step in 1..=3 {
                let gradient = random.view(&dims, view);
                let rule = AdamW { step, ..RULE };
                ours = Flex::adamw(ours.0, ours.1, ours.2, gradient.clone(), rule);
                plain = adamw::reference::<Flex>(plain.0, plain.1, plain.2, gradient.clone(), rule);
                exact.iter_mut().zip(values_of(&gradient)).for_each(|(state, g)| exact_step(state, f64::from(g), rule));
            }
            let what = format!("{dims:?} {view:?}");
            let column = |i: usize| place(&exact.iter().map(|s| s[i] as f32).collect::<Vec<_>>(), &dims, View::Packed);
            for (i, (ours, plain)) in
                [(&ours.0, &plain.0), (&ours.1, &plain.1), (&ours.2, &plain.2)].into_iter().enumerate()
            {
                assert_close(&format!("{what} {i} reference"), ours, plain, F32);
                assert_close(&format!("{what} {i} f64"), ours, &column(i), F32);
            }
        }
    }
}

/// `[parameter, first, second]` by the equations of `torch.optim.AdamW`.
fn exact_step(state: &mut [f64; 3], gradient: f64, rule: AdamW) {
    let (g, [p, m, v]) = (gradient * rule.gradient_scale, state);
    *m = rule.betas.0 * *m + (1.0 - rule.betas.0) * g;
    *v = rule.betas.1 * *v + (1.0 - rule.betas.1) * g * g;
    let corrected = (1.0 - rule.betas.0.powi(rule.step as i32), 1.0 - rule.betas.1.powi(rule.step as i32));
    *p *= 1.0 - rule.learning_rate * rule.weight_decay;
    *p -= rule.learning_rate / corrected.0 * *m / ((*v / corrected.1).sqrt() + rule.eps);
}

#[test]
fn works_in_place_only_on_tensors_that_are_not_shared() {
    let mut random = Random::new(2);
    let (p, m, v) = (random.tensor(&[3, 4]), random.tensor(&[3, 4]), place(&[1.0; 12], &[3, 4], View::Packed));
    let (address, kept) = (m.bytes().as_ptr(), p.clone());
    let before = values_of(&kept);
    let (new, first, _) = Flex::adamw(p, m, v, random.tensor(&[3, 4]), RULE);
    assert_eq!(first.bytes().as_ptr(), address);
    assert_eq!(values_of(&kept), before);
    assert_ne!(values_of(&new), before);
}

#[test]
#[should_panic(expected = "shape")]
fn refuses_shapes_that_differ() {
    let mut random = Random::new(3);
    let [p, m, v] = [[3, 4], [3, 4], [3, 3]].map(|dims| random.tensor(&dims));
    Flex::adamw(p, m, v, random.tensor(&[3, 4]), RULE);
}
