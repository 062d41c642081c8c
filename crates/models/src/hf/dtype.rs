//! Element types of stored tensors and the conversions between them. Bytes are little-endian and need no alignment:
//! a header of odd length may put a tensor anywhere in a mapped file.

use bytemuck::cast_slice;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A type that checkpoints are read and written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// The upper half of an `F32`, 2 bytes.
    BF16,
    /// Bytes: codes of quantised values, never a weight of its own.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::U8 => "U8",
        }
    }

    /// The name in a Hugging Face `config.json` (`dtype` or `torch_dtype`).
    pub fn torch_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            Dtype::U8 => "uint8",
        }
    }

    /// The type of a safetensors header, where it is one of these.
    pub fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::BF16 => Some(Dtype::BF16),
            safetensors::Dtype::U8 => Some(Dtype::U8),
            _ => None,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The values of `bytes` as `f32`; exact for all types. Bytes beyond the last whole element are ignored.
pub fn to_f32(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let whole = &bytes[..bytes.len() / dtype.size_bytes() * dtype.size_bytes()];
    match dtype {
        // Both loops are a move or a shift, which compilers vectorise.
        Dtype::F32 => {
            whole.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
        }
        Dtype::BF16 => whole
            .chunks_exact(2)
            .map(|pair| f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16))
            .collect(),
        Dtype::F16 => match bytemuck::try_cast_slice::<u8, f16>(whole) {
            Ok(aligned) => aligned.to_f32_vec(),
            Err(_) => {
                let halves: Vec<f16> =
                    whole.chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]])).collect();
                halves.to_f32_vec()
            }
        },
        Dtype::U8 => whole.iter().map(|&byte| f32::from(byte)).collect(),
    }
}

/// `values` as bytes of `dtype`, rounded to nearest even.
pub fn from_f32(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => cast_slice(values).to_vec(),
        Dtype::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            cast_slice(&halves).to_vec()
        }
        Dtype::BF16 => {
            let mut bytes = vec![0; values.len() * 2];
            for (pair, value) in bytes.chunks_exact_mut(2).zip(values) {
                pair.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
            }
            bytes
        }
        Dtype::U8 => values.iter().map(|&value| value.round_ties_even() as u8).collect(),
    }
}

/// `bytes` of type `from` as bytes of type `to`; a plain copy where they are the same.
pub fn convert(bytes: &[u8], from: Dtype, to: Dtype) -> Vec<u8> {
    match from == to {
        true => bytes.to_vec(),
        false => from_f32(&to_f32(bytes, from), to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_value_survives_the_round_trip() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in [Dtype::F16, Dtype::BF16] {
            let values = to_f32(&bytes, dtype);
            let back = from_f32(&values, dtype);
            for (i, value) in values.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
                assert_eq!(bytes[2 * i..2 * i + 2], back[2 * i..2 * i + 2], "{dtype} {value}");
            }
            let nans = to_f32(&back, dtype);
            assert!(values.iter().zip(&nans).all(|(a, b)| a.is_nan() == b.is_nan()));
        }
    }

    #[test]
    fn unaligned_bytes_are_read() {
        let values = [1.5f32, -2.0, 3.25];
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let mut bytes = vec![0u8];
            bytes.extend(from_f32(&values, dtype));
            assert_eq!(to_f32(&bytes[1..], dtype), values);
        }
    }

    #[test]
    fn rounds_to_nearest_even() {
        let halfway = f32::from_bits(0x3f80_8000);
        assert_eq!(to_f32(&from_f32(&[halfway], Dtype::BF16), Dtype::BF16), [1.0]);
        let above = f32::from_bits(0x3f80_8001);
        assert_eq!(to_f32(&from_f32(&[above], Dtype::BF16), Dtype::BF16), [f32::from_bits(0x3f81_0000)]);
        assert_eq!(convert(&from_f32(&[0.5], Dtype::F16), Dtype::F16, Dtype::BF16), from_f32(&[0.5], Dtype::BF16));
    }
}
