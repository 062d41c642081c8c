use burn::backend::Flex;

use super::{F32, Random, VIEWS, assert_close, place, values_of};
use crate::{LowRankOps, reduce};

#[test]
fn is_the_sum_in_f64() {
    let mut random = Random::new(1);
    for dims in [vec![32, 64], vec![5, 123], vec![1], vec![1, 1], vec![0, 3], vec![7, 3, 5, 11], vec![200, 513]] {
        for view in VIEWS {
            let x = random.view(&dims, view);
            let exact: f64 = values_of(&x).iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            let got = Flex::sum_squares(x.clone());
            assert_close(&format!("{dims:?} {view:?}"), &got, &place(&[exact as f32], &[1], super::View::Packed), F32);
            assert_close(&format!("{dims:?} {view:?} reference"), &got, &reduce::reference::<Flex>(x), F32);
        }
    }
}
