use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;

use super::{F32, Random, VIEWS, View, assert_close, place, values_of};
use crate::{LowRankOps, Tensors, reduce};

#[test]
fn are_the_sums_in_f64() {
    let mut random = Random::new(1);
    for dims in [vec![32, 64], vec![5, 123], vec![1], vec![1, 1], vec![0, 3], vec![7, 3, 5, 11], vec![200, 513]] {
        for view in VIEWS {
            let x = random.view(&dims, view);
            for squared in [true, false] {
                // a sum that does not cancel
                let x = if squared { x.clone() } else { Flex::float_abs(x.clone()) };
                let values: Vec<f64> = values_of(&x).iter().map(|&v| f64::from(v)).collect();
                let of = |v: &f64| if squared { v * v } else { *v };
                let exact = [values.iter().map(of).sum::<f64>() as f32, if squared { 3.25 } else { 2.5 }];
                let list = || Tensors(vec![x.clone(), place(&[1.5, 1.0], &[2], View::Packed)]);
                let (got, what) = (Flex::sums(list(), squared), format!("{dims:?} {view:?} {squared}"));
                assert_close(&what, &got, &place(&exact, &[2], View::Packed), F32);
                assert_close(&format!("{what} reference"), &got, &reduce::reference::<Flex>(list(), squared), F32);
            }
        }
    }
}
