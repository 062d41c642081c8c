//! Blockwise quantisation to 8 bits (arXiv 2110.02861, section 2), as bitsandbytes defines it.
//!
//! A block of consecutive values is divided by its largest magnitude and each quotient replaced by the nearest of the
//! 256 values of a [`Map`]: `value = map[code] * absmax[block]`.
//!
//! State: `1 + 4 / block` bytes a value.

pub use lowrank_kernels::map8::{Map, largest_magnitude};

/// Values as codes and one scale per block.
#[derive(Clone, Debug, PartialEq)]
pub struct Blockwise8 {
    /// One code a value.
    pub codes: Vec<u8>,
    /// Largest magnitude of each block.
    pub absmax: Vec<f32>,
    /// Values of a block; the last may have fewer.
    pub block: usize,
}

impl Blockwise8 {
    /// Zeros.
    ///
    /// # Panics
    /// Where `block` is 0.
    pub fn zeros(len: usize, map: &Map, block: usize) -> Self {
        Self { codes: vec![map.zero(); len], absmax: vec![0.0; len.div_ceil(block)], block }
    }

    /// Quantises finite values. In a block of zeros every code is 0, as in the reference; its values are 0 all the
    /// same.
    ///
    /// # Panics
    /// Where `block` is 0.
    pub fn quantise(values: &[f32], map: &Map, block: usize) -> Self {
        let mut codes = vec![0; values.len()];
        let mut absmax = Vec::with_capacity(values.len().div_ceil(block));
        for (codes, values) in codes.chunks_mut(block).zip(values.chunks(block)) {
            let largest = largest_magnitude(values);
            absmax.push(largest);
            if largest > 0.0 {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = map.nearest(value / largest);
                }
            }
        }
        Self { codes, absmax, block }
    }

    /// The values that the codes stand for.
    pub fn dequantise(&self, map: &Map) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        let blocks = values.chunks_mut(self.block).zip(self.codes.chunks(self.block));
        for ((values, codes), absmax) in blocks.zip(&self.absmax) {
            for (value, code) in values.iter_mut().zip(codes) {
                *value = map.values[usize::from(*code)] * absmax;
            }
        }
        values
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.absmax.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn blocks_round_trip_within_half_a_step_and_codes_are_a_fixed_point() {
        let stream = Stream::new(4, "values");
        let values: Vec<f32> = (0..1000).map(|i| stream.normal(i) as f32).collect();
        let packed = Blockwise8::quantise(&values, Map::signed(), 256);
        assert_eq!((packed.codes.len(), packed.absmax.len(), packed.bytes()), (1000, 4, 1016)); // the last has 232
        let got = packed.dequantise(Map::signed());
        for (i, (value, got)) in values.iter().zip(&got).enumerate() {
            assert!((value - got).abs() <= 0.0071 * packed.absmax[i / 256], "{i}: {value} {got}");
        }
        let again = Blockwise8::quantise(&got, Map::signed(), 256);
        // -0.993 is the end of the negative side: a block whose largest value is negative shrinks, and only such a
        // block.
        for (block, (before, after)) in packed.absmax.iter().zip(&again.absmax).enumerate() {
            if before == after {
                let range = 256 * block..1000.min(256 * (block + 1));
                assert_eq!(packed.codes[range.clone()], again.codes[range]);
            }
        }
        let zeros = Blockwise8::quantise(&[0.0; 5], Map::signed(), 4);
        assert_eq!((&zeros.codes, &zeros.absmax), (&vec![0; 5], &vec![0.0; 2]));
        assert!(zeros.dequantise(Map::signed()).iter().all(|value| *value == 0.0));
    }
}
