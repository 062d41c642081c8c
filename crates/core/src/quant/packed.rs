//! From values in f32 to a packed weight on a device.

use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use lowrank_kernels::packed::{Format, Layout, Nested, Order, Scales, scales, words};
use lowrank_kernels::{self as kernels, Packed};

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
    /// Which matrix is cut into blocks: `[d_out, d_in]` where the weight is frozen, `[d_in, d_out]` where an optimiser rounds it
    /// after each step (groups only).
    pub order: Order,
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
    pub const NF4: Self = Self { format: Format::Nf4, block: 64, double: true, order: Order::Outputs };
    /// 8 bits in groups of 256.
    pub const INT8: Self = Self { format: Format::Int8, block: 256, double: false, order: Order::Outputs };
    /// 4 bits in groups of 64.
    pub const INT4: Self = Self { format: Format::Int4, block: 64, double: false, order: Order::Outputs };

    /// 8 bits in groups of the matrix that an optimiser trains.
    pub fn trained(group: usize) -> Self {
        Self { block: group, order: Order::Inputs, ..Self::INT8 }
    }

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
        if self.order == Order::Inputs && self.table().is_some() {
            let (expected, got) = ("int8 or int4", format!("{:?}", self.format).to_lowercase());
            return Err(QuantiseError::Setting { what: "format of a trained weight", expected, got });
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
        Ok(match self.order {
            Order::Outputs => self.pack_finite(values, dims, device),
            Order::Inputs => self.pack_finite(&transposed(values, dims[0]), dims, device),
        })
    }

    /// As [`Quantisation::pack`], for settings and values that are known to be good; values are in the order of the blocks.
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
                from_groups(&Groups::quantise(values, bits, self.block), dims, self.order, device)
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
        let layout = Layout { format: self.format, block: self.block, dims, nested: None, order: self.order };
        let bits = |count: usize| {
            let all = Distribution::Uniform(f64::from(i32::MIN), f64::from(i32::MAX));
            Tensor::<1, Int>::random([count], all, (device, DType::I32))
        };
        // The largest of a block of normals is near three deviations.
        let scale = |count, largest: f64| Tensor::full([count], largest * deviation, (device, DType::F32));
        let (blocks, codes) = (layout.blocks(), bits(layout.words()));
        let Some(book) = self.table() else {
            // Zero stands in the middle of the codes; four of them are a word.
            let middle = i32::from_le_bytes([1 << (self.format.bits() - 1); 4]);
            let scales = Scales::Affine {
                scale: scale(blocks, 6.0 / f64::from((1u32 << self.format.bits()) - 1)),
                zero: Tensor::full([blocks.div_ceil(4)], middle, (device, DType::I32)),
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

    /// Packs a `[d_in, d_out]` tensor: groups where it lies, values of a table by way of the host.
    pub fn pack_tensor(&self, weight: Tensor<2>) -> Packed {
        if self.table().is_none() {
            return self.pack_rounded(weight, Rounding::Nearest);
        }
        let (dims, device) = (weight.dims(), weight.device());
        let flattened = match self.order {
            Order::Outputs => weight.transpose(),
            Order::Inputs => weight,
        };
        self.pack_finite(&linalg::host(flattened), dims, &device)
    }

    /// Packs a `[d_in, d_out]` tensor in groups of codes that are rounded in this way, where it lies.
    ///
    /// # Panics
    /// Where the format has no groups.
    pub fn pack_rounded(&self, weight: Tensor<2>, rounding: Rounding) -> Packed {
        let layout =
            Layout { format: self.format, block: self.block, dims: weight.dims(), nested: None, order: self.order };
        kernels::pack_groups(weight, layout, rounding)
    }
}

/// The transposed matrix of one that has rows of this length, in runs of rows that fit a cache.
fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    const RUN: usize = 64;
    let rows = values.len() / cols.max(1);
    let mut out = vec![0.0; values.len()];
    for first in (0..rows).step_by(RUN) {
        let run = first..(first + RUN).min(rows);
        for col in 0..cols {
            for row in run.clone() {
                out[col * rows + row] = values[row * cols + col];
            }
        }
    }
    out
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

/// The first bytes of words.
fn as_bytes(words: &Tensor<1, Int>, count: usize) -> Vec<u8> {
    let words = words.clone().into_data().convert::<i32>();
    let words = words.try_into_vec::<i32>().unwrap_or_else(|_| unreachable!("converted just before"));
    words.iter().flat_map(|word| word.to_le_bytes()).take(count).collect()
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
    let layout = Layout { format, block: packed.block, dims, order: Order::Outputs, nested };
    Packed::new(layout, words(as_words(&packed.codes), device), scales)
}

/// An 8-bit or 4-bit weight `[d_in, d_out]` from groups on the host, flattened in this order.
///
/// # Panics
/// Where the number of values is not that of the matrix, or a group's no multiple of 8.
pub fn from_groups(groups: &Groups, dims: [usize; 2], order: Order, device: &Device) -> Packed {
    assert_eq!(groups.len, dims[0] * dims[1], "values of a {dims:?} matrix");
    let format = if groups.bits == 8 { Format::Int8 } else { Format::Int4 };
    let zero = words(as_words(&groups.zero), device);
    let scale = scales(groups.scale.clone(), device);
    let layout = Layout { format, block: groups.group, dims, order, nested: None };
    Packed::new(layout, words(as_words(&groups.codes), device), Scales::Affine { scale, zero })
}

/// The groups of an 8-bit or 4-bit weight on the host; none of one whose values come from a table.
pub fn to_groups(packed: &Packed) -> Option<Groups> {
    let Scales::Affine { scale, zero } = packed.scales() else { return None };
    let layout = packed.layout();
    let bits = layout.format.bits();
    Some(Groups {
        bits: bits as u8,
        codes: as_bytes(packed.codes(), (layout.len() * bits).div_ceil(8)),
        scale: linalg::host(scale.clone().reshape([1, layout.blocks()])),
        zero: as_bytes(zero, layout.blocks()),
        group: layout.block,
        len: layout.len(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{FloatDType, TensorData};

    use super::*;
    use crate::random::Stream;

    const ALL: [Quantisation; 6] = [
        Quantisation::NF4,
        Quantisation { double: false, ..Quantisation::NF4 },
        Quantisation { format: Format::Fp4, block: 32, ..Quantisation::NF4 },
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
        let Quantisation { format, block, double, .. } = quantisation;
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
    fn groups_of_a_trained_weight_run_along_its_outputs() {
        let (device, dims) = (Device::flex(), [70, 33]);
        let trained = Quantisation::trained(64);
        let on_disk = values(70 * 33); // `[33, 70]`
        let packed = trained.pack(&on_disk, dims, &device).unwrap();
        let weight = Tensor::<2>::from_data(TensorData::new(on_disk, [33, 70]), &device).transpose();
        let groups = Groups::quantise(&linalg::host(weight.clone()), 8, 64);
        assert_eq!(to_groups(&packed), Some(groups.clone()));
        assert_eq!(to_groups(&trained.pack_tensor(weight.clone())), Some(groups.clone()));
        assert_eq!(to_groups(&trained.pack_rounded(weight.clone(), Rounding::Nearest)), Some(groups.clone()));
        assert_eq!(linalg::host(packed.dense(FloatDType::F32)), groups.dequantise());
        let rounding = Stream::new(3, "rounding").rounding(1 << 33);
        let other = Groups::quantise_with(&linalg::host(weight.clone()), 8, 64, rounding);
        assert_eq!(to_groups(&trained.pack_rounded(weight, rounding)), Some(other));
        let error = Quantisation { order: Order::Inputs, ..Quantisation::NF4 }.check().unwrap_err().to_string();
        assert_eq!(error, "format of a trained weight: expected int8 or int4, got nf4");
    }

    #[test]
    fn groups_survive_the_way_to_a_device_and_back() {
        let device = Device::flex();
        for (bits, group) in [(8, 256), (4, 64), (4, 8), (8, 32)] {
            for (dims, order) in [([33, 70], Order::Inputs), ([5, 7], Order::Outputs), ([1, 1], Order::Inputs)] {
                let groups = Groups::quantise(&values(dims[0] * dims[1]), bits, group);
                let packed = from_groups(&groups, dims, order, &device);
                assert_eq!(to_groups(&packed), Some(groups.clone()), "{bits} {group} {dims:?}");
                let dense = packed.dense(FloatDType::F32);
                assert_eq!(dense.dims(), dims);
                let flat = if order == Order::Inputs { dense } else { dense.transpose() };
                assert_eq!(linalg::host(flat), groups.dequantise());
            }
        }
        assert_eq!(to_groups(&Quantisation::NF4.pack(&values(64), [8, 8], &device).unwrap()), None);
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
