use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::{Random, VIEWS, View, place};
use crate::LowRankOps;
use crate::top_columns::reference;

fn indices(tensor: &FlexTensor) -> Vec<i32> {
    tensor.storage::<i32>().to_vec()
}

/// Both on the same scores.
fn select(scores: &[f32], count: usize, view: View) -> Vec<i32> {
    let scores = place(scores, &[1, scores.len()], view);
    let ours = indices(&Flex::top_columns(scores.clone(), count));
    assert_eq!(ours, indices(&reference::<Flex>(scores, count)));
    ours
}

/// The definition, by sorting everything.
fn sorted(scores: &[f32], count: usize) -> Vec<i32> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (scores[a], scores[b]);
        x.is_nan().cmp(&y.is_nan()).then(y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal)).then(a.cmp(&b))
    });
    order.truncate(count);
    order.sort_unstable();
    order.into_iter().map(|i| i as i32).collect()
}

#[test]
fn the_largest_come_in_ascending_order() {
    let mut random = Random::new(51);
    for d in [1, 2, 33, 257, 600] {
        // Few different values, so that many are equal.
        let scores: Vec<f32> = random.values(d).iter().map(|x| (x * 4.0).round() * 0.25).collect();
        for count in [0, 1, d / 3, d - 1, d] {
            for view in VIEWS {
                assert_eq!(select(&scores, count, view), sorted(&scores, count), "{count} of {d}");
            }
        }
    }
}

#[test]
fn ties_go_to_the_lowest_index() {
    assert_eq!(select(&[1.0, 3.0, 1.0, 3.0, 1.0], 3, View::Packed), [0, 1, 3]);
    assert_eq!(select(&[0.0; 4], 2, View::Packed), [0, 1]);
    assert_eq!(select(&[-0.0, 0.0, -0.0], 2, View::Packed), [0, 1]);
}

#[test]
fn what_is_no_number_comes_last() {
    let scores = [f32::NAN, f32::NEG_INFINITY, 1.0, -f32::NAN, f32::INFINITY, -1e-45, f32::NAN];
    let expected: [&[i32]; 7] =
        [&[4], &[2, 4], &[2, 4, 5], &[1, 2, 4, 5], &[0, 1, 2, 4, 5], &[0, 1, 2, 3, 4, 5], &[0, 1, 2, 3, 4, 5, 6]];
    for (count, expected) in expected.into_iter().enumerate() {
        assert_eq!(select(&scores, count + 1, View::Packed), expected);
    }
}
