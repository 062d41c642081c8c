//! Asymmetric group quantisation to 8 or 4 bits, as Q-GaLore uses it for weights and bases (arXiv 2407.08296, section
//! 3), on the host; equations in [`lowrank_kernels::groups`], which does the same where the values lie.
//!
//! Stochastic rounding goes up with the probability of the fraction, so its mean is the value itself and small updates are not
//! lost.
//!
//! Two things differ from the published code: the range is extended to include 0 (there, groups of one sign saturate),
//! and the last group may be short.
//!
//! State: `bits / 8 + 5 / group` bytes a value; two 4-bit codes share a byte, the first in the lower half.

pub use lowrank_kernels::Rounding;
use lowrank_kernels::groups::{encode, grid, top};

use super::over_blocks;

/// Values as codes with a scale and a zero point per group.
#[derive(Clone, Debug, PartialEq)]
pub struct Groups {
    /// 8 or 4.
    pub bits: u8,
    /// One code a byte, or two.
    pub codes: Vec<u8>,
    /// s of each group.
    pub scale: Vec<f32>,
    /// z of each group.
    pub zero: Vec<u8>,
    /// Values of a group; the last may have fewer.
    pub group: usize,
    /// Number of values.
    pub len: usize,
}

impl Groups {
    /// Quantises finite values, to the nearest codes.
    ///
    /// # Panics
    /// Where `bits` is neither 8 nor 4, or `group` is 0.
    pub fn quantise(values: &[f32], bits: u8, group: usize) -> Self {
        Self::quantise_with(values, bits, group, Rounding::Nearest)
    }

    /// Quantises finite values.
    ///
    /// # Panics
    /// As [`Groups::quantise`].
    pub fn quantise_with(values: &[f32], bits: u8, group: usize, rounding: Rounding) -> Self {
        assert!(bits == 8 || bits == 4, "{bits} bits are neither 8 nor 4");
        // Two groups, so that no byte is shared where a group has an odd number of 4-bit codes.
        let parts = over_blocks(values.len(), 2 * group, |range| {
            let rounding = rounding.after(range.start);
            Self::quantise_part(&values[range], bits, group, rounding)
        });
        let (bytes, count) = (values.len().div_ceil(8 / usize::from(bits)), values.len().div_ceil(group));
        let (codes, scale, zero) = (Vec::with_capacity(bytes), Vec::with_capacity(count), Vec::with_capacity(count));
        let mut whole = Self { bits, codes, scale, zero, group, len: values.len() };
        for part in parts {
            whole.codes.extend(part.codes);
            whole.scale.extend(part.scale);
            whole.zero.extend(part.zero);
        }
        whole
    }

    fn quantise_part(values: &[f32], bits: u8, group: usize, rounding: Rounding) -> Self {
        let mut codes = vec![0; values.len()];
        let count = values.len().div_ceil(group);
        let (mut scale, mut zero) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for (index, (codes, values)) in codes.chunks_mut(group).zip(values.chunks(group)).enumerate() {
            let top = top(usize::from(bits));
            let (s, z) = grid(values, top);
            encode(values, s, z, top, rounding.after(index * group), codes);
            scale.push(s);
            zero.push(z);
        }
        let codes = if bits == 4 { pack(&codes) } else { codes };
        Self { bits, codes, scale, zero, group, len: values.len() }
    }

    /// The values that the codes stand for.
    pub fn dequantise(&self) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.len);
        for (index, (scale, zero)) in self.scale.iter().zip(&self.zero).enumerate() {
            let range = index * self.group..self.len.min((index + 1) * self.group);
            let value = |code: u8| (f32::from(code) - f32::from(*zero)) * scale;
            match self.bits {
                4 => values.extend(range.map(|i| value(self.codes[i / 2] >> (4 * (i % 2)) & 15))),
                _ => values.extend(self.codes[range].iter().map(|code| value(*code))),
            }
        }
        values
    }

    /// Bytes of codes, scales and zero points.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.scale.len() + self.zero.len()
    }
}

/// Two codes a byte.
fn pack(codes: &[u8]) -> Vec<u8> {
    codes.chunks(2).map(|pair| pair[0] | pair.get(1).copied().unwrap_or(0) << 4).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn normals(count: u64) -> Vec<f32> {
        let stream = Stream::new(6, "weights");
        (0..count).map(|i| stream.normal(i) as f32).collect()
    }

    fn relative_error(values: &[f32], bits: u8, group: usize) -> f64 {
        let got = Groups::quantise(values, bits, group).dequantise();
        let square = |sum: f64, x: f32| sum + f64::from(x).powi(2);
        let error = values.iter().zip(&got).map(|(a, b)| a - b).fold(0.0, square);
        (error / values.iter().copied().fold(0.0, square)).sqrt()
    }

    #[test]
    fn errors_on_normals_are_the_measured_ones() {
        let values = normals(1 << 18);
        for (bits, group, expected) in [(8, 256, 0.0064), (4, 256, 0.109), (4, 128, 0.1005), (4, 64, 0.0911)] {
            let error = relative_error(&values, bits, group);
            assert!((error / expected - 1.0).abs() < 0.02, "{bits} bits, groups of {group}: {error}");
        }
    }

    #[test]
    fn one_signed_groups_do_not_saturate() {
        let stream = Stream::new(7, "one sign");
        for sign in [1.0, -1.0] {
            let values: Vec<f32> = (0..4096).map(|i| sign * (0.5 + 0.1 * stream.unit(i)) as f32).collect();
            assert!(relative_error(&values, 4, 256) < 0.025);
            assert!(relative_error(&values, 8, 256) < 0.0015);
        }
    }

    #[test]
    fn values_are_within_a_step_also_in_a_short_tail_of_odd_length() {
        let values = normals(1001);
        for (bits, bytes) in [(8, 1001), (4, 501)] {
            for group in [7, 256, 5000] {
                let packed = Groups::quantise(&values, bits, group);
                assert_eq!((packed.codes.len(), packed.scale.len()), (bytes, 1001usize.div_ceil(group)));
                assert_eq!(packed.bytes(), bytes + 5 * packed.scale.len());
                let got = packed.dequantise();
                assert_eq!(got.len(), 1001);
                for (i, (value, got)) in values.iter().zip(&got).enumerate() {
                    assert!((value - got).abs() <= packed.scale[i / group] * 1.001, "{i}: {value} {got}");
                }
                // The same grid finds the same codes again.
                let mut again = vec![0; 1001];
                for (index, (codes, values)) in again.chunks_mut(group).zip(got.chunks(group)).enumerate() {
                    let (scale, zero) = (packed.scale[index], packed.zero[index]);
                    encode(values, scale, zero, top(usize::from(bits)), Rounding::Nearest, codes);
                }
                assert_eq!(if bits == 4 { pack(&again) } else { again }, packed.codes);
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_nothing_is_nothing() {
        let zeros = Groups::quantise(&[0.0; 3], 8, 256);
        assert_eq!((zeros.dequantise(), zeros.scale), (vec![0.0; 3], vec![1e-5 / 255.0]));
        assert!(Groups::quantise(&[], 4, 256).dequantise().is_empty());
    }

    #[test]
    fn stochastic_rounding_is_unbiased_and_repeatable() {
        // The ends fix the grid: s = 1 / 15, z = 5 or so; the value in the middle lies between two codes.
        let mut values = vec![0.217f32; 100_002];
        (values[0], values[100_001]) = (-1.0, 2.0);
        let rounding = Stream::new(8, "rounding").rounding(1 << 40);
        let packed = Groups::quantise_with(&values, 4, values.len(), rounding);
        let got = packed.dequantise();
        let middle: Vec<f64> = got[1..100_001].iter().map(|value| f64::from(*value)).collect();
        let mean = middle.iter().sum::<f64>() / 1e5;
        let variance = middle.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 1e5;
        assert!(variance > 0.0 && (mean - f64::from(0.217f32)).abs() < 4.0 * (variance / 1e5).sqrt(), "{mean}");
        assert_eq!(packed, Groups::quantise_with(&values, 4, values.len(), rounding));
        let other = Stream::new(9, "rounding").rounding(1 << 40);
        assert_ne!(packed, Groups::quantise_with(&values, 4, values.len(), other));
    }

    #[test]
    fn random_numbers_belong_to_elements_and_not_to_groups() {
        let values = normals(512);
        let stream = Stream::new(10, "rounding");
        let whole = Groups::quantise_with(&values, 8, 256, stream.rounding(0));
        let half = Groups::quantise_with(&values[256..], 8, 256, stream.rounding(256));
        assert_eq!(whole.codes[256..], half.codes);
    }

    #[test]
    fn small_updates_move_weights_only_with_stochastic_rounding() {
        let start = Groups::quantise(&normals(4096), 8, 256);
        let (mut nearest, mut stochastic) = (start.clone(), start.clone());
        let stream = Stream::new(11, "steps");
        let add = |state: &Groups, rounding| {
            let mut values = state.dequantise();
            for (i, value) in values.iter_mut().enumerate() {
                // The ends of each group stay, so that its grid does.
                let code = state.codes[i];
                *value += if code == 0 || code == 255 { 0.0 } else { 0.1 * state.scale[i / 256] };
            }
            Groups::quantise_with(&values, 8, 256, rounding)
        };
        for step in 0..20 {
            nearest = add(&nearest, Rounding::Nearest);
            stochastic = add(&stochastic, stream.rounding(4096 * step));
        }
        assert_eq!(nearest.codes, start.codes);
        let moved: f64 = stochastic.codes.iter().zip(&start.codes).map(|(a, b)| f64::from(*a) - f64::from(*b)).sum();
        let mean = moved / 4096.0;
        assert!((mean - 2.0).abs() < 0.15, "{mean}");
    }
}
