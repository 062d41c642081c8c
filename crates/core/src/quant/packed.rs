//! From values in f32 to a packed weight on a device.

use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use lowrank_kernels::Packed;
use lowrank_kernels::packed::{Format, Layout, Nested, Scales, scales, words};

use super::dynamic8::Map;
use super::groups::{Groups, Rounding};
use super::nf4::{Blockwise4, Codebook, NESTED_BLOCK, Scale4};
use crate::linalg;

/// How a weight is to be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantisation {
    /// What a code means.
    pub format: Format,
    /// Values that share a scale.
    pub block: usize,
    /// Whether the scales are quantised too (4-bit tables only).
    pub double: bool,
}

/// Why a weight cannot be packed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantiseError {
    /// A setting that no format has.
    #[error("{what}: expected {expected}, got {got}")]
    Setting {
        /// Which.
        what: &'static str,
        /// What is possible.
        expected: &'static str,
        /// What was given.
        got: String,
    },
    /// The values have no scale.
    #[error("value {index} of {count} is not finite: such a weight cannot be quantised")]
    NotFinite {
        /// Position in the flattened `[d_out, d_in]` matrix.
        index: usize,
        /// Number of values.
        count: usize,
    },
}

impl Quantisation {
    /// NF4 in blocks of 64 with quantised scales.
    pub const NF4: Self = Self { format: Format::Nf4, block: 64, double: true };
    /// 8 bits in groups of 256.
    pub const INT8: Self = Self { format: Format::Int8, block: 256, double: false };
    /// 4 bits in groups of 64.
    pub const INT4: Self = Self { format: Format::Int4, block: 64, double: false };

    /// Whether such weights can be made.
    ///
    /// # Errors
    /// Says which setting is none.
    pub fn check(&self) -> Result<(), QuantiseError> {
        if !self.block.is_power_of_two() || !(32..=4096).contains(&self.block) {
            let expected = "a power of two between 32 and 4096";
            return Err(QuantiseError::Setting { what: "block size", expected, got: self.block.to_string() });
        }
        if self.double && self.table().is_none() {
            let (expected, got) = ("nf4 or fp4", format!("{:?}", self.format).to_lowercase());
            return Err(QuantiseError::Setting { what: "format of double quantisation", expected, got });
        }
        Ok(())
    }

    fn table(&self) -> Option<&'static Codebook> {
        match self.format {
            Format::Nf4 => Some(Codebook::nf4()),
            Format::Fp4 => Some(Codebook::fp4()),
            Format::Int8 | Format::Int4 => None,
        }
    }

    /// Packs the row-major values of a `[d_out, d_in]` matrix.
    ///
    /// # Errors
    /// A setting that no format has, or a value that is not finite.
    pub fn pack(&self, values: &[f32], dims: [usize; 2], device: &Device) -> Result<Packed, QuantiseError> {
        self.check()?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(QuantiseError::NotFinite { index, count: values.len() });
        }
        Ok(self.pack_finite(values, dims, device))
    }

    /// As [`Quantisation::pack`], for settings and values that are known to be good.
    ///
    /// # Panics
    /// Where the number of values is not that of the matrix.
    pub(crate) fn pack_finite(&self, values: &[f32], dims: [usize; 2], device: &Device) -> Packed {
        match self.table() {
            Some(book) => {
                let packed = Blockwise4::quantise(values, book, self.block, self.double);
                from_blockwise4(self.format, &packed, dims, device)
            }
            None => {
                let bits = self.format.bits() as u8;
                from_groups(&Groups::quantise_with(values, bits, self.block, Rounding::Nearest), dims, device)
            }
        }
    }

    /// A `[d_in, d_out]` weight of codes that the device draws, with scales as values of this standard deviation would have
    /// them. Speed and memory are those of a real weight.
    ///
    /// # Errors
    /// A setting that no format has.
    pub fn drawn(&self, dims: [usize; 2], deviation: f64, device: &Device) -> Result<Packed, QuantiseError> {
        self.check()?;
        let layout = Layout { format: self.format, block: self.block, dims, nested: None };
        let bits = |count: usize| {
            let all = Distribution::Uniform(f64::from(i32::MIN), f64::from(i32::MAX));
            Tensor::<1, Int>::random([count], all, (device, DType::I32))
        };
        // The largest of a block of normals is near three deviations.
        let scale = |count, largest: f64| Tensor::full([count], largest * deviation, (device, DType::F32));
        let (blocks, codes) = (layout.blocks(), bits(layout.words()));
        let Some(book) = self.table() else {
            let scales = Scales::Affine {
                scale: scale(blocks, 6.0 / f64::from((1u32 << self.format.bits()) - 1)),
                zero: bits(blocks.div_ceil(4)),
            };
            return Ok(Packed::new(layout, codes, scales));
        };
        let table = scales(book.values.to_vec(), device);
        if !self.double {
            return Ok(Packed::new(layout, codes, Scales::Table { table, scale: scale(blocks, 3.0) }));
        }
        let nested = Nested { block: NESTED_BLOCK, offset: (3.0 * deviation) as f32 };
        let map = scales(Map::signed().values.to_vec(), device);
        let absmax = scale(blocks.div_ceil(NESTED_BLOCK), 0.5);
        let layout = Layout { nested: Some(nested), ..layout };
        Ok(Packed::new(layout, codes, Scales::Nested { table, codes: bits(blocks.div_ceil(4)), map, absmax }))
    }

    /// Packs a `[d_in, d_out]` tensor.
    pub(crate) fn pack_tensor(&self, weight: Tensor<2>) -> Packed {
        let (dims, device) = (weight.dims(), weight.device());
        self.pack_finite(&linalg::host(weight.transpose()), dims, &device)
    }
}

/// Bytes as words, the first in the lowest bits.
fn as_words(bytes: &[u8]) -> Vec<i32> {
    let (whole, rest) = bytes.as_chunks::<4>();
    let mut words: Vec<i32> = whole.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
    if !rest.is_empty() {
        words.push(i32::from_le_bytes(std::array::from_fn(|i| rest.get(i).copied().unwrap_or(0))));
    }
    words
}

/// A 4-bit weight `[d_in, d_out]` from codes on the host.
///
/// # Panics
/// Where the number of values is not that of the matrix, or the format has no table.
pub fn from_blockwise4(format: Format, packed: &Blockwise4, dims: [usize; 2], device: &Device) -> Packed {
    assert_eq!(packed.len, dims[0] * dims[1], "values of a {dims:?} matrix");
    let book = if format == Format::Fp4 { Codebook::fp4() } else { Codebook::nf4() };
    let table = scales(book.values.to_vec(), device);
    let (nested, scales) = match &packed.scale {
        Scale4::Plain(scale) => (None, Scales::Table { table, scale: scales(scale.clone(), device) }),
        Scale4::Double { codes, offset } => {
            let map = scales(Map::signed().values.to_vec(), device);
            let absmax = scales(codes.absmax.clone(), device);
            let codes = words(as_words(&codes.codes), device);
            (Some(Nested { block: NESTED_BLOCK, offset: *offset }), Scales::Nested { table, codes, map, absmax })
        }
    };
    let layout = Layout { format, block: packed.block, dims, nested };
    Packed::new(layout, words(as_words(&packed.codes), device), scales)
}

/// An 8-bit or 4-bit weight `[d_in, d_out]` from groups on the host.
///
/// # Panics
/// Where the number of values is not that of the matrix.
pub fn from_groups(groups: &Groups, dims: [usize; 2], device: &Device) -> Packed {
    assert_eq!(groups.len, dims[0] * dims[1], "values of a {dims:?} matrix");
    let format = if groups.bits == 8 { Format::Int8 } else { Format::Int4 };
    let zero = words(as_words(&groups.zero), device);
    let scale = scales(groups.scale.clone(), device);
    let layout = Layout { format, block: groups.group, dims, nested: None };
    Packed::new(layout, words(as_words(&groups.codes), device), Scales::Affine { scale, zero })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::FloatDType;

    use super::*;
    use crate::random::Stream;

    const ALL: [Quantisation; 6] = [
        Quantisation::NF4,
        Quantisation { double: false, ..Quantisation::NF4 },
        Quantisation { format: Format::Fp4, block: 32, double: true },
        Quantisation::INT8,
        Quantisation::INT4,
        Quantisation { block: 4096, ..Quantisation::INT4 },
    ];

    fn values(count: usize) -> Vec<f32> {
        let stream = Stream::new(14, "weights");
        (0..count as u64).map(|i| stream.normal(i) as f32 * 0.02).collect()
    }

    /// What the host says the codes stand for.
    fn on_host(quantisation: Quantisation, values: &[f32]) -> Vec<f32> {
        let Quantisation { format, block, double } = quantisation;
        match quantisation.table() {
            Some(book) => Blockwise4::quantise(values, book, block, double).dequantise(book),
            None => Groups::quantise(values, format.bits() as u8, block).dequantise(),
        }
    }

    #[test]
    fn packed_weights_have_the_values_of_the_host() {
        let device = Device::flex();
        for quantisation in ALL {
            for [d_in, d_out] in [[64, 8], [70, 5], [3, 1], [1, 1], [129, 300]] {
                let values = values(d_in * d_out);
                let packed = quantisation.pack(&values, [d_in, d_out], &device).unwrap();
                let got = linalg::host(packed.rows(0..d_out, FloatDType::F32));
                assert_eq!(got, on_host(quantisation, &values), "{quantisation:?} {d_in} {d_out}");
                let again = quantisation.pack_tensor(packed.dense(FloatDType::F32));
                assert_eq!(again.layout().dims, [d_in, d_out]);
            }
        }
    }

    #[test]
    fn bits_a_value_are_the_published_ones() {
        let (device, n) = (Device::flex(), 1 << 20);
        let values = values(n);
        let expected = [4.127, 4.5, 4.2539, 8.156, 4.625, 4.0098];
        for (quantisation, expected) in ALL.into_iter().zip(expected) {
            let bytes = quantisation.pack(&values, [1024, 1024], &device).unwrap().bytes();
            let bits = 8.0 * bytes as f64 / n as f64;
            // Tables are 1088 bytes: 0.0083 bits a value of this matrix.
            assert!((bits - expected).abs() < 0.0095, "{quantisation:?}: {bits}");
        }
    }

    #[test]
    fn drawn_weights_have_the_size_and_spread_of_real_ones() {
        let (device, dims) = (Device::flex(), [256, 512]);
        let real = values(dims[0] * dims[1]);
        for quantisation in ALL {
            let drawn = quantisation.drawn(dims, 0.02, &device).unwrap();
            let packed = quantisation.pack(&real, dims, &device).unwrap();
            assert_eq!((drawn.bytes(), drawn.layout().nested.is_some()), (packed.bytes(), quantisation.double));
            let got = linalg::host(drawn.rows(0..dims[1], FloatDType::F32));
            let deviation = (got.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / got.len() as f64).sqrt();
            // Codes are drawn evenly, so the values spread wider than those of a normal weight, by less than a factor of 5.
            assert!((0.02..0.1).contains(&deviation), "{quantisation:?}: {deviation}");
        }
        assert!(Quantisation { block: 48, ..Quantisation::NF4 }.drawn(dims, 0.02, &device).is_err());
    }

    #[test]
    fn what_cannot_be_packed_is_refused() {
        let device = Device::flex();
        let nf4 = Quantisation::NF4;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = nf4.pack(&[0.0, 1.0, bad, 2.0], [2, 2], &device).unwrap_err();
            assert_eq!(error, QuantiseError::NotFinite { index: 2, count: 4 });
        }
        for block in [0, 16, 48, 8192] {
            let error = Quantisation { block, ..nf4 }.pack(&[0.0; 4], [2, 2], &device).unwrap_err().to_string();
            assert!(error.contains(&format!("between 32 and 4096, got {block}")), "{error}");
        }
        let error = Quantisation { double: true, ..Quantisation::INT8 }.check().unwrap_err().to_string();
        assert_eq!(error, "format of double quantisation: expected nf4 or fp4, got int8");
    }
}
