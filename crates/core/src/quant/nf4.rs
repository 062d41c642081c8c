//! 4-bit blockwise quantisation of frozen weights: NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), and FP4.
//!
//! Blocks of consecutive values of the flattened `[d_out, d_in]` matrix: `a = max |block|`, `q` the code whose value is nearest
//! to `w / a`, `w^ = table[q] a`. In the middle of two values, rounded to f32, the lower one is taken.
//!
//! NF4's table holds quantiles of the normal distribution divided by the largest: eight positive ones, zero, seven negative ones.
//! FP4's holds the floats with one sign, two exponent and one mantissa bits, over 12.
//!
//! **Double quantisation**: with `o = mean(a)` over the whole tensor, `a - o` is quantised itself, in blocks of 256 with the
//! signed dynamic 8-bit map ([`super::dynamic8`]): `a^ = map[p] a_p + o`.
//!
//! Bytes of n values: `n / 2 + 4 n / block`, or `n / 2 + n / block + 4 n / (256 block) + 4`: 4.127 bits a value for blocks of 64.
//!
//! All of it as bitsandbytes does, which puts the first of two codes of a byte into the upper half ([`Blockwise4::to_bitsandbytes`]);
//! here it is in the lower half. bitsandbytes on a CPU rounds quotients of the scales to a grid of 2 / 65535 first, so some of
//! their codes may differ from these by one; on a GPU it does not.

use std::sync::LazyLock;

use super::dynamic8::{Blockwise8, Map, largest_magnitude};
use super::over_blocks;

/// Scales that share a scale.
pub const NESTED_BLOCK: usize = 256;

/// Sixteen values and what is needed to find the nearest.
#[derive(Clone, Debug)]
pub struct Codebook {
    /// By code.
    pub values: [f32; 16],
    /// `bounds[i]` is the largest number that belongs to the i-th smallest value: the middle to the next, rounded to f32.
    bounds: [f32; 15],
    /// Codes by rank of their value; FP4 has two zeros, of which the first is used.
    codes: [u8; 16],
}

/// Of NF4, as bitsandbytes prints them.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
/// Of FP4's positive codes, times 12.
const FP4_TIMES_12: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];

static NF4_BOOK: LazyLock<Codebook> = LazyLock::new(|| Codebook::new(NF4));
static FP4_BOOK: LazyLock<Codebook> = LazyLock::new(|| {
    Codebook::new(std::array::from_fn(|code| match code {
        8 => 0.0,
        0..8 => FP4_TIMES_12[code] / 12.0,
        _ => -FP4_TIMES_12[code - 8] / 12.0,
    }))
});

impl Codebook {
    /// Normal quantiles.
    pub fn nf4() -> &'static Self {
        &NF4_BOOK
    }

    /// Small floats.
    pub fn fp4() -> &'static Self {
        &FP4_BOOK
    }

    fn new(values: [f32; 16]) -> Self {
        let mut codes: [u8; 16] = std::array::from_fn(|code| 15 - code as u8);
        codes.sort_by(|a, b| values[usize::from(*a)].total_cmp(&values[usize::from(*b)])); // of equals the first comes last
        let mut bounds = [f32::INFINITY; 15];
        for i in 0..15 {
            let [low, high] = [codes[i], codes[i + 1]].map(|code| values[usize::from(code)]);
            bounds[i] = ((f64::from(low) + f64::from(high)) / 2.0) as f32;
            if low == high && i > 0 {
                bounds[i] = bounds[i - 1]; // nothing belongs to the other of them
            }
        }
        Self { values, bounds, codes }
    }

    /// The code of the value nearest to a number; the lower one in the middle of two. Not-a-number gets some code.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> u8 {
        let mut rank = 0;
        for bound in &self.bounds {
            rank += usize::from(x > *bound);
        }
        self.codes[rank]
    }
}

/// The scales of 4-bit blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Scale4 {
    /// Largest magnitude of each block.
    Plain(Vec<f32>),
    /// The same, quantised.
    Double {
        /// By the signed dynamic map.
        codes: Blockwise8,
        /// Their mean.
        offset: f32,
    },
}

/// Values as 4-bit codes and one scale per block.
#[derive(Clone, Debug, PartialEq)]
pub struct Blockwise4 {
    /// Two codes a byte, the first in the lower half.
    pub codes: Vec<u8>,
    /// One a block.
    pub scale: Scale4,
    /// Values of a block, an even number; the last may have fewer.
    pub block: usize,
    /// Number of values.
    pub len: usize,
}

impl Blockwise4 {
    /// Quantises finite values.
    ///
    /// # Panics
    /// Where `block` is 0 or odd.
    pub fn quantise(values: &[f32], book: &Codebook, block: usize, double: bool) -> Self {
        assert!(block > 0 && block.is_multiple_of(2), "blocks of {block} values");
        let parts = over_blocks(values.len(), block, |range| encode(&values[range], book, block));
        let (mut codes, mut scale) = (Vec::with_capacity(values.len().div_ceil(2)), vec![]);
        for (part, scales) in parts {
            codes.extend(part);
            scale.extend(scales);
        }
        let scale = if double { Scale4::double(&scale) } else { Scale4::Plain(scale) };
        Self { codes, scale, block, len: values.len() }
    }

    /// The values that the codes stand for.
    pub fn dequantise(&self, book: &Codebook) -> Vec<f32> {
        let scale = self.scale.values();
        (0..self.len)
            .map(|i| book.values[usize::from(self.codes[i / 2] >> (4 * (i % 2)) & 15)] * scale[i / self.block])
            .collect()
    }

    /// The codes as bitsandbytes packs them.
    pub fn to_bitsandbytes(&self) -> Vec<u8> {
        self.codes.iter().map(|byte| byte.rotate_left(4)).collect()
    }

    /// From codes as bitsandbytes packs them.
    pub fn from_bitsandbytes(packed: &[u8], scale: Scale4, block: usize, len: usize) -> Self {
        Self { codes: packed.iter().map(|byte| byte.rotate_left(4)).collect(), scale, block, len }
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scale {
            Scale4::Plain(scale) => 4 * scale.len(),
            Scale4::Double { codes, .. } => codes.bytes() + 4,
        };
        self.codes.len() + scales
    }
}

impl Scale4 {
    /// Quantises scales. Their mean is taken in f64 and rounded once.
    pub fn double(scale: &[f32]) -> Self {
        let sum: f64 = scale.iter().copied().map(f64::from).sum();
        let offset = (sum / scale.len().max(1) as f64) as f32;
        let rest: Vec<f32> = scale.iter().map(|scale| scale - offset).collect();
        Self::Double { codes: Blockwise8::quantise(&rest, Map::signed(), NESTED_BLOCK), offset }
    }

    /// The scale of every block.
    pub fn values(&self) -> Vec<f32> {
        match self {
            Self::Plain(scale) => scale.clone(),
            Self::Double { codes, offset } => {
                codes.dequantise(Map::signed()).into_iter().map(|rest| rest + offset).collect()
            }
        }
    }
}

/// Codes and scales of some whole blocks.
fn encode(values: &[f32], book: &Codebook, block: usize) -> (Vec<u8>, Vec<f32>) {
    let mut packed = vec![0; values.len().div_ceil(2)];
    let mut scales = Vec::with_capacity(values.len().div_ceil(block));
    for (packed, values) in packed.chunks_mut(block / 2).zip(values.chunks(block)) {
        let largest = largest_magnitude(values);
        scales.push(largest);
        let divisor = if largest > 0.0 { largest } else { 1.0 };
        for (byte, pair) in packed.iter_mut().zip(values.chunks(2)) {
            let [low, high] = [pair[0], pair.get(1).copied().unwrap_or(0.0)].map(|x| book.nearest(x / divisor));
            *byte = low | if pair.len() == 2 { high << 4 } else { 0 };
        }
    }
    (packed, scales)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn normals(count: u64) -> Vec<f32> {
        let stream = Stream::new(12, "weights");
        (0..count).map(|i| stream.normal(i) as f32).collect()
    }

    fn mean(values: impl Iterator<Item = f64>) -> f64 {
        let (count, sum) = values.fold((0, 0.0), |(count, sum), value| (count + 1, sum + value));
        sum / f64::from(count)
    }

    #[test]
    fn decisions_are_at_the_published_thresholds() {
        let published = [
            -0.848_096_4,
            -0.610_632_93,
            -0.459_995_27,
            -0.339_679_43,
            -0.234_607_41,
            -0.137_911_73,
            -0.045_525_02,
            0.039_790_15,
            0.120_255_25,
            0.203_521_25,
            0.292_013_77,
            0.389_312_54,
            0.501_663_42,
            0.642_786_92,
            0.861_478_42,
        ];
        let book = Codebook::nf4();
        for (code, (bound, published)) in book.bounds.iter().zip(published).enumerate() {
            assert!((f64::from(*bound) - published).abs() < 1e-7, "{code}: {bound}");
            assert_eq!((book.nearest(*bound), book.nearest(bound.next_up())), (code as u8, code as u8 + 1));
        }
    }

    #[test]
    fn every_code_is_the_nearest_to_its_value() {
        for code in 0..16u8 {
            assert_eq!(Codebook::nf4().nearest(Codebook::nf4().values[usize::from(code)]), code);
            let wanted = if code == 8 { 0 } else { code }; // FP4 has two zeros
            assert_eq!(Codebook::fp4().nearest(Codebook::fp4().values[usize::from(code)]), wanted);
        }
        let stream = Stream::new(13, "quotients");
        for book in [Codebook::nf4(), Codebook::fp4()] {
            for i in 0..20_000 {
                let x = (2.2 * stream.unit(i) - 1.1) as f32;
                let distance = |code: u8| (f64::from(x) - f64::from(book.values[usize::from(code)])).abs();
                let least = (0..16).map(distance).fold(f64::INFINITY, f64::min);
                assert!(distance(book.nearest(x)) <= least + 1e-7, "{x:e}");
            }
        }
    }

    #[test]
    fn errors_on_normals_are_the_measured_ones() {
        let values = normals(1 << 18);
        let plain = Blockwise4::quantise(&values, Codebook::nf4(), 64, false);
        let double = Blockwise4::quantise(&values, Codebook::nf4(), 64, true);
        let square = |x: f32| f64::from(x).powi(2);
        let size: f64 = values.iter().map(|value| square(*value)).sum();
        for (packed, expected) in [(&plain, 0.0919), (&double, 0.0920)] {
            let got = packed.dequantise(Codebook::nf4());
            let error: f64 = values.iter().zip(&got).map(|(a, b)| square(a - b)).sum();
            assert!(((error / size).sqrt() / expected - 1.0).abs() < 0.01, "{}", (error / size).sqrt());
        }
        let got = plain.dequantise(Codebook::nf4());
        let error = mean(values.iter().zip(&got).map(|(a, b)| f64::from((a - b).abs())));
        assert!((error / 0.0728 - 1.0).abs() < 0.01, "{error}");
        let (exact, restored) = (plain.scale.values(), double.scale.values());
        assert!((mean(exact.iter().map(|scale| f64::from(*scale))) / 2.598 - 1.0).abs() < 0.01);
        let off: Vec<f64> = exact.iter().zip(&restored).map(|(a, b)| f64::from(((a - b) / a).abs())).collect();
        let largest = off.iter().copied().fold(0.0, f64::max);
        assert!((mean(off.into_iter()) / 0.0016 - 1.0).abs() < 0.1 && largest < 0.012, "{largest}");
    }

    #[test]
    fn codes_are_a_fixed_point_and_the_largest_of_a_block_is_exact() {
        let values = normals(64 * 40 + 7); // the last block has 7, an odd number
        let packed = Blockwise4::quantise(&values, Codebook::nf4(), 64, false);
        let got = packed.dequantise(Codebook::nf4());
        assert_eq!(Blockwise4::quantise(&got, Codebook::nf4(), 64, false), packed);
        for (values, got) in values.chunks(64).zip(got.chunks(64)) {
            let largest = largest_magnitude(values);
            for (value, got) in values.iter().zip(got) {
                assert!((value - got).abs() <= 0.1521 * largest);
                assert!(value.abs() < largest || value == got, "{value} {got}");
            }
        }
    }

    #[test]
    fn zeros_and_constants_are_exact() {
        for (value, code) in [(0.0, 7), (0.3, 15), (-0.3, 0)] {
            for double in [false, true] {
                let packed = Blockwise4::quantise(&[value; 130], Codebook::nf4(), 64, double);
                assert!(packed.codes.iter().all(|byte| *byte == code | code << 4), "{value}");
                assert_eq!(packed.dequantise(Codebook::nf4()), [value; 130]);
            }
        }
        assert!(Blockwise4::quantise(&[], Codebook::nf4(), 64, true).dequantise(Codebook::nf4()).is_empty());
    }

    #[test]
    fn bytes_are_those_of_the_formula() {
        for n in [1usize, 64, 65, 16_384, 20_001] {
            let values = normals(n as u64);
            let plain = Blockwise4::quantise(&values, Codebook::nf4(), 64, false).bytes();
            assert_eq!(plain, n.div_ceil(2) + 4 * n.div_ceil(64));
            let double = Blockwise4::quantise(&values, Codebook::nf4(), 64, true).bytes();
            assert_eq!(double, n.div_ceil(2) + n.div_ceil(64) + 4 * n.div_ceil(16_384) + 4);
        }
    }

    /// The values are enough for several threads.
    #[test]
    fn blocks_do_not_depend_on_their_neighbours() {
        let values = normals(1 << 18);
        let whole = Blockwise4::quantise(&values, Codebook::nf4(), 32, false);
        let (mut codes, mut scale) = (vec![], vec![]);
        for values in values.chunks(1 << 12) {
            let part = Blockwise4::quantise(values, Codebook::nf4(), 32, false);
            codes.extend(part.codes);
            scale.extend(part.scale.values());
        }
        assert_eq!((whole.codes, whole.scale), (codes, Scale4::Plain(scale)));
    }

    #[test]
    fn bitsandbytes_has_the_first_code_in_the_upper_half() {
        let packed = Blockwise4::quantise(&[1.0, -1.0, 0.0, 1.0], Codebook::nf4(), 32, false);
        assert_eq!(packed.to_bitsandbytes(), [0xf0, 0x7f]);
        let scale = packed.scale.clone();
        assert_eq!(Blockwise4::from_bitsandbytes(&[0xf0, 0x7f], scale, 32, 4), packed);
    }
}
