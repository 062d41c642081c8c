use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::{Random, VIEWS, View, integers, place, values_of};
use crate::LowRankOps;
use crate::adam8::{Adam8, reference};
use crate::map8::Map;

const RULE: Adam8 = Adam8 { learning_rate: 0.01, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.1, step: 1 };

fn maps() -> FlexTensor {
    let (first, second) = (Map::signed(), Map::unsigned());
    place(&[first.values, *first.bounds(), second.values, *second.bounds()].concat(), &[4, 256], View::Packed)
}

fn codes_of(tensor: &FlexTensor) -> Vec<i32> {
    tensor.storage::<i32>().to_vec()
}

/// Parameter, codes and scales of the CPU and of the reference have the same bits: both do the same operations in the
/// same order. Odd lengths, blocks that straddle words, values that are not finite.
#[test]
fn three_steps_are_those_of_the_reference_to_the_bit() {
    let mut random = Random::new(31);
    for (dims, block) in [([5, 61], 64), ([3, 87], 256), ([1, 1], 256), ([4, 9], 6), ([130, 256], 256)] {
        for view in VIEWS {
            let (len, start) = (dims[0] * dims[1], random.view(&dims, view));
            let (words, blocks) = (len.div_ceil(4), len.div_ceil(block));
            let zero = i32::from_le_bytes([Map::signed().zero(); 4]);
            let codes = [vec![zero; words], vec![0; words]].concat();
            let absmax = place(&vec![0.0; 2 * blocks], &[2, blocks], View::Packed);
            let mut ours = (start, integers(&codes, &[2, words]), absmax);
            let mut plain = ours.clone();
            for step in 1..=3 {
                let mut gradient = random.values(len);
                if step == 2 {
                    gradient[0] = f32::NAN;
                    gradient[len / 2] = 1e30;
                }
                let (gradient, rule) = (place(&gradient, &dims, view), Adam8 { step, ..RULE });
                ours = Flex::adam8(ours.0, gradient.clone(), ours.1, ours.2, maps(), block, rule);
                plain = reference::<Flex>(plain.0, gradient, plain.1, plain.2, maps(), block, rule);
                let what = format!("{dims:?} {block} {view:?} step {step}");
                assert_eq!(codes_of(&ours.1), codes_of(&plain.1), "{what}: codes");
                assert_eq!(values_of(&ours.2), values_of(&plain.2), "{what}: scales");
                assert_eq!(values_of(&ours.0), values_of(&plain.0), "{what}: parameter");
            }
            assert!(values_of(&ours.0).iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn what_others_hold_is_not_changed() {
    let mut random = Random::new(32);
    let (parameter, gradient) = (random.tensor(&[2, 8]), random.tensor(&[2, 8]));
    let zero = i32::from_le_bytes([Map::signed().zero(); 4]);
    let codes = integers(&[zero, zero, zero, zero, 0, 0, 0, 0], &[2, 4]);
    let absmax = place(&[0.0; 2], &[2, 1], View::Packed);
    let before = (values_of(&parameter), codes_of(&codes), values_of(&absmax));
    let (updated, new_codes, new_absmax) =
        Flex::adam8(parameter.clone(), gradient, codes.clone(), absmax.clone(), maps(), 16, RULE);
    assert_eq!((values_of(&parameter), codes_of(&codes), values_of(&absmax)), before);
    assert_ne!(values_of(&updated), before.0);
    assert_ne!((codes_of(&new_codes), values_of(&new_absmax)), (before.1, before.2));
}
