//! Which entries of a weight an update changes, and where they lie.

use super::View;
use super::subspace::Decomposition;

/// Entries that an update leaves alone: `1 - mean[abs(w1 - w0) > eta max(abs(w0), abs(w1))]`. With bf16 values and
/// `eta = 1e-3` that is "the bits are equal", because a unit in the last place is at least 0.0039 of the value. `None` where the
/// lengths differ or are 0.
pub fn unchanged_share(before: &[f32], after: &[f32], eta: f32) -> Option<f64> {
    if before.len() != after.len() || before.is_empty() {
        return None;
    }
    let is_changed = |(&w0, &w1): (&f32, &f32)| (w1 - w0).abs() > eta * w0.abs().max(w1.abs());
    let changed = before.iter().zip(after).filter(|pair| is_changed(*pair)).count();
    Some(1.0 - changed as f64 / before.len() as f64)
}

/// The nearest bf16, as its bits.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Entries whose nearest bf16 values differ: what an update changes in a model that is served in 16 bits.
pub fn bf16_mask(before: &[f32], after: &[f32]) -> Vec<bool> {
    before.iter().zip(after).map(|(&w0, &w1)| bf16(w0) != bf16(w1)).collect()
}

/// The share `a` of all entries with the largest magnitude, ties by index.
fn highest(magnitudes: &[f64], a: f64) -> Vec<bool> {
    let count = (a.clamp(0.0, 1.0) * magnitudes.len() as f64).round() as usize;
    let mut order: Vec<u32> = (0..magnitudes.len() as u32).collect();
    let by_size = |&x: &u32, &y: &u32| magnitudes[y as usize].total_cmp(&magnitudes[x as usize]).then(x.cmp(&y));
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, by_size);
    }
    let mut mask = vec![false; magnitudes.len()];
    order[..count].iter().for_each(|&index| mask[index as usize] = true);
    mask
}

/// The share `a` of all entries with the smallest magnitude, ties by index.
pub fn lowest(values: &[f32], a: f64) -> Vec<bool> {
    let magnitudes: Vec<f64> = values.iter().map(|&value| -f64::from(value.abs())).collect();
    highest(&magnitudes, a)
}

/// The share `a` of all entries that are largest in the best approximation of rank k: where the principal directions of a
/// weight live. `decomposition` is that of the weight, with at least k directions where it has them.
pub fn principal_entries(weight: View<'_>, decomposition: &Decomposition, k: usize, a: f64) -> Vec<bool> {
    let [rows, cols] = weight.dims();
    let Decomposition { values, left, right } = decomposition;
    let k = k.min(left.ncols());
    let mut magnitudes = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        let scaled: Vec<f64> = (0..k).map(|l| left[(i, l)] * values[l]).collect();
        magnitudes.extend((0..cols).map(|j| (0..k).map(|l| scaled[l] * right[(j, l)]).sum::<f64>().abs()));
    }
    highest(&magnitudes, a)
}

/// `size(mask and update) / size(update)`: the share of an update that falls into a mask. `None` for an empty update.
pub fn overlap(mask: &[bool], update: &[bool]) -> Option<f64> {
    let changed = update.iter().filter(|&&changed| changed).count();
    let inside = mask.iter().zip(update).filter(|&(&inside, &changed)| inside && changed).count();
    (changed > 0).then(|| inside as f64 / changed as f64)
}

/// The share of an update outside the principal entries. `1 - a` for an update that knows nothing of them. `None` for an empty
/// update.
pub fn off_principal_share(principal: &[bool], update: &[bool]) -> Option<f64> {
    overlap(principal, update).map(|share| 1.0 - share)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::random::Stream;

    #[test]
    fn rounding_to_bf16_is_to_the_nearest_and_even() {
        // A unit is 2^-7 here; half way between two values goes to the even one.
        let at = |units: f32| 1.0 + units / 128.0;
        for (units, expected) in [(0.0, 0.0), (0.4, 0.0), (0.6, 1.0), (0.5, 0.0), (1.5, 2.0)] {
            let (value, expected) = (at(units), at(expected));
            assert_eq!(f32::from_bits(u32::from(bf16(value)) << 16), expected, "{value}");
        }
        assert!(f32::from_bits(u32::from(bf16(f32::NAN)) << 16).is_nan());
        assert_eq!(f32::from_bits(u32::from(bf16(f32::MAX)) << 16), f32::INFINITY);
    }

    #[test]
    fn updates_below_half_a_unit_are_none() {
        let before = [1.0f32, 1.0, -2.0, 0.0, 100.0];
        let after = [1.0f32, 1.001, -2.02, 1e-20, 100.0];
        assert_eq!(bf16_mask(&before, &after), [false, false, true, true, false]);
        assert!((unchanged_share(&before, &after, 1e-3).unwrap() - 0.6).abs() < 1e-12, "0.001 is below eta");
        assert!((unchanged_share(&before, &after, 9e-4).unwrap() - 0.4).abs() < 1e-12);
        assert_eq!(unchanged_share(&before, &before, 1e-3), Some(1.0));
        assert_eq!((unchanged_share(&[], &[], 1e-3), unchanged_share(&[1.0], &[], 1e-3)), (None, None));
    }

    /// For bf16 values "more than a thousandth" and "other bits" are the same.
    #[test]
    fn both_definitions_agree_on_bf16_values() {
        let stream = Stream::new(3, "weights");
        let rounded = |value: f64| f32::from_bits(u32::from(bf16(value as f32)) << 16);
        let before: Vec<f32> = (0..5000).map(|i| rounded(stream.normal(i))).collect();
        let after: Vec<f32> = before
            .iter()
            .enumerate()
            .map(|(i, w)| rounded(f64::from(*w) + 2e-3 * stream.normal(10_000 + i as u64)))
            .collect();
        let changed = bf16_mask(&before, &after).iter().filter(|&&changed| changed).count();
        let share = unchanged_share(&before, &after, 1e-3).unwrap();
        assert!((share - (1.0 - changed as f64 / 5000.0)).abs() < 1e-12);
        assert!((0.1..0.9).contains(&share), "{share}");
    }

    #[test]
    fn ties_are_cut_by_index() {
        assert_eq!(lowest(&[1.0, -1.0, 1.0, 0.5], 0.5), [true, false, false, true]);
        assert_eq!(highest(&[2.0, 2.0, 2.0], 0.34), [true, false, false]);
        assert_eq!((highest(&[1.0], 0.0), lowest(&[1.0, 2.0], 1.0)), (vec![false], vec![true, true]));
    }

    /// One large outer product in noise: its rows and columns are the principal entries.
    #[test]
    fn principal_entries_follow_the_leading_direction() {
        let stream = Stream::new(4, "noise");
        let spike = |i: usize, j: usize| if i < 4 && j < 5 { 10.0 } else { 0.0 };
        let values: Vec<f32> =
            (0..20 * 20).map(|i| (spike(i / 20, i % 20) + 0.1 * stream.normal(i as u64)) as f32).collect();
        let weight = View::new(&values, 20, 20).unwrap();
        let decomposition = Decomposition::of(weight, 1);
        let principal = principal_entries(weight, &decomposition, 1, 0.05);
        assert!((0..400).all(|i| principal[i] == (i / 20 < 4 && i % 20 < 5)));
        let update: Vec<bool> = (0..400).map(|i| i / 20 < 8 && i % 20 < 5).collect();
        assert_eq!(off_principal_share(&principal, &update), Some(0.5));
        assert_eq!(overlap(&principal, &[false; 400]), None);
    }

    /// A random mask meets a share a of any update by chance; the standard error here is 0.003.
    #[test]
    fn random_masks_overlap_by_chance() {
        let stream = Stream::new(5, "masks");
        let update: Vec<bool> = (0..40_000).map(|i| stream.unit(i) < 0.5).collect();
        let values: Vec<f32> = (0..40_000).map(|i| stream.normal(50_000 + i) as f32).collect();
        let share = overlap(&lowest(&values, 0.3), &update).unwrap();
        assert!((share - 0.3).abs() < 0.014, "{share}");
    }
}
