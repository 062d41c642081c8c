use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::{F32, Random, VIEWS, View, assert_close, place, values_of};
use crate::cpu::from_vec;
use crate::{LowRankOps, Maybe, gemm};

/// `(m, k, n)`: tile-sized, odd, of size 1 in every place, skinny both ways, empty.
const SHAPES: [(usize, usize, usize); 12] = [
    (64, 64, 64),
    (5, 123, 17),
    (1, 1, 1),
    (1, 37, 19),
    (37, 1, 19),
    (37, 19, 1),
    (130, 67, 4),
    (4, 67, 130),
    (130, 4, 67),
    (0, 5, 3),
    (4, 0, 3),
    (4, 5, 0),
];

/// The product in f64.
fn exact(
    a: &FlexTensor,
    b: &FlexTensor,
    c: Option<&FlexTensor>,
    alpha: f32,
    (m, k, n): (usize, usize, usize),
) -> FlexTensor {
    let (a, b, c) = (values_of(a), values_of(b), c.map(values_of));
    let entry = |i: usize, j: usize| {
        let sum: f64 = (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j])).sum();
        (sum * f64::from(alpha) + c.as_ref().map_or(0.0, |c| f64::from(c[i * n + j]))) as f32
    };
    from_vec((0..m * n).map(|at| entry(at / n, at % n)).collect(), &[m, n])
}

#[test]
fn agrees_with_a_product_in_f64() {
    let mut random = Random::new(1);
    for shape in SHAPES {
        let (m, k, n) = shape;
        for (a_view, b_view) in VIEWS.into_iter().flat_map(|a| VIEWS.map(|b| (a, b))) {
            for (c_view, alpha) in
                [(None, 1.0), (Some(View::Packed), -0.5), (Some(View::Swapped), 1.0), (Some(View::Window), 3.0)]
            {
                let (a, b) = (random.view(&[m, k], a_view), random.view(&[k, n], b_view));
                let c = c_view.map(|view| random.view(&[m, n], view));
                let got = Flex::gemm(a.clone(), b.clone(), Maybe::from_option(c.clone()), alpha);
                let what = format!("{shape:?} a {a_view:?} b {b_view:?} c {c_view:?} alpha {alpha}");
                assert_close(&what, &got, &exact(&a, &b, c.as_ref(), alpha, shape), F32);
                let plain = gemm::reference::<Flex>(a, b, c, alpha);
                assert_close(&format!("{what} reference"), &got, &plain, F32);
            }
        }
    }
}

#[test]
fn accumulates_in_place_only_where_the_tensor_is_not_shared() {
    let mut random = Random::new(2);
    let (a, b) = (random.tensor(&[3, 4]), random.tensor(&[4, 5]));
    let c = place(&[1.0; 15], &[3, 5], View::Packed);
    let address = c.bytes().as_ptr();
    let kept = c.clone();
    let result = Flex::gemm(a.clone(), b.clone(), Maybe::Given(c), 1.0);
    assert_ne!(result.bytes().as_ptr(), address);
    assert_eq!(values_of(&kept), [1.0; 15]);
    let result = Flex::gemm(a, b, Maybe::Given(kept), 1.0);
    assert_eq!(result.bytes().as_ptr(), address);
}

#[test]
#[should_panic(expected = "inner sizes")]
fn refuses_inner_sizes_that_differ() {
    let mut random = Random::new(3);
    Flex::gemm(random.tensor(&[3, 4]), random.tensor(&[5, 3]), Maybe::Absent, 1.0);
}

#[test]
#[should_panic(expected = "shape")]
fn refuses_an_addend_of_another_shape() {
    let mut random = Random::new(3);
    Flex::gemm(random.tensor(&[3, 4]), random.tensor(&[4, 3]), Maybe::Given(random.tensor(&[3, 2])), 1.0);
}
