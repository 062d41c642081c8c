use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::{F32, Random, VIEWS, View, assert_close, place, values_of};
use crate::adamw::{self, AdamW};
use crate::{LowRankOps, Maybe, Tensors};

const RULE: AdamW =
    AdamW { learning_rate: 0.01, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.1, step: 3, gradient_scale: 0.7 };

/// Lists of one tensor each; the first three come back.
fn step([p, m, v, g]: [FlexTensor; 4]) -> [FlexTensor; 3] {
    let [p, m, v, g] = [p, m, v, g].map(|tensor| Tensors(vec![tensor]));
    let (p, m, v) = Flex::adamw(p, m, v, g, Maybe::Absent, RULE);
    [p, m, v].map(|mut list| list.0.remove(0))
}

/// Two tensors by one rule, with a factor that only the device knows.
#[test]
fn three_steps_are_those_of_the_reference_and_of_f64() {
    let mut random = Random::new(1);
    let factor = place(&[0.4], &[1], View::Packed);
    for dims in [[32, 64], [5, 123], [1, 1], [150, 123], [0, 4]] {
        for view in VIEWS {
            let start = [random.view(&dims, view), random.tensor(&[3, 7])];
            let zeros =
                || Tensors(start.iter().map(|x| place(&vec![0.0; values_of(x).len()], &shape(x), view)).collect());
            let copy = |list: &Tensors<Flex>| Tensors(list.0.clone());
            let mut ours = (Tensors(start.to_vec()), zeros(), zeros());
            let mut plain = (copy(&ours.0), copy(&ours.1), copy(&ours.2));
            let mut exact = start.each_ref().map(|x| values_of(x).iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect());
            for step in 1..=3 {
                let gradients = [random.view(&dims, view), random.tensor(&[3, 7])];
                let rule = AdamW { step, ..RULE };
                let list = || Tensors(gradients.to_vec());
                ours = Flex::adamw(ours.0, ours.1, ours.2, list(), Maybe::Given(factor.clone()), rule);
                let lists = [plain.0, plain.1, plain.2, list()];
                plain = adamw::reference::<Flex>(lists, Some(factor.clone()), rule);
                let rule = AdamW { gradient_scale: 0.4 * rule.gradient_scale, ..rule };
                for (exact, gradient) in exact.iter_mut().zip(&gradients) {
                    let exact: &mut Vec<[f64; 3]> = exact;
                    exact.iter_mut().zip(values_of(gradient)).for_each(|(s, g)| exact_step(s, f64::from(g), rule));
                }
            }
            let lists = [(&ours.0, &plain.0), (&ours.1, &plain.1), (&ours.2, &plain.2)];
            for (i, (ours, plain)) in lists.into_iter().enumerate() {
                for (ours, (plain, exact)) in ours.0.iter().zip(plain.0.iter().zip(&exact)) {
                    let what = format!("{dims:?} {view:?} {i}");
                    let column = exact.iter().map(|state| state[i] as f32).collect::<Vec<_>>();
                    assert_close(&format!("{what} reference"), ours, plain, F32);
                    assert_close(&format!("{what} f64"), ours, &place(&column, &shape(ours), View::Packed), F32);
                }
            }
        }
    }
}

fn shape(x: &FlexTensor) -> Vec<usize> {
    x.layout().shape().to_vec()
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
    let [new, first, _] = step([p, m, v, random.tensor(&[3, 4])]);
    assert_eq!(first.bytes().as_ptr(), address);
    assert_eq!(values_of(&kept), before);
    assert_ne!(values_of(&new), before);
}

#[test]
#[should_panic(expected = "shape")]
fn refuses_shapes_that_differ() {
    let mut random = Random::new(3);
    let [p, m, v] = [[3, 4], [3, 4], [3, 3]].map(|dims| random.tensor(&dims));
    step([p, m, v, random.tensor(&[3, 4])]);
}
