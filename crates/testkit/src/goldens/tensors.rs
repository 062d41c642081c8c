//! The tensors of a case, all in memory. Read with the `safetensors` crate alone, so that what the models crate reads is
//! compared with something else.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::{Stop, failed};

/// One tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Row-major; f32 holds the ids and floats of these files exactly.
    pub data: Vec<f32>,
}

impl Values {
    /// As whole numbers.
    pub fn integers(&self) -> Vec<i32> {
        self.data.iter().map(|&value| value as i32).collect()
    }
}

/// The tensors of a file by name.
pub type Tensors = BTreeMap<String, Values>;

/// Reads every tensor of a safetensors file.
///
/// # Errors
/// The file is missing or damaged, or has a type that no case has.
pub fn read(path: &Path) -> Result<Tensors, Stop> {
    let bytes = std::fs::read(path).map_err(|error| failed(format!("{}: cannot read: {error}", path.display())))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| failed(format!("{}: {error}", path.display())))?;
    let mut tensors = Tensors::new();
    for (name, view) in file.tensors() {
        let Some(data) = floats(view.dtype(), view.data()) else {
            return Err(Stop::Failed(format!("{}: {name} has the type {:?}", path.display(), view.dtype())));
        };
        tensors.insert(name, Values { shape: view.shape().to_vec(), data });
    }
    Ok(tensors)
}

/// Little-endian values of any type that fits f32.
fn floats(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|chunk| value(*chunk)).collect()
    }
    Some(match dtype {
        Dtype::F32 => each(bytes, f32::from_le_bytes),
        Dtype::F64 => each(bytes, |chunk| f64::from_le_bytes(chunk) as f32),
        Dtype::F16 => each(bytes, |chunk| burn::tensor::f16::from_le_bytes(chunk).to_f32()),
        Dtype::BF16 => each(bytes, |[low, high]| f32::from_le_bytes([0, 0, low, high])),
        Dtype::I64 => each(bytes, |chunk| i64::from_le_bytes(chunk) as f32),
        Dtype::I32 => each(bytes, |chunk| i32::from_le_bytes(chunk) as f32),
        Dtype::U8 | Dtype::BOOL => each(bytes, |[byte]| f32::from(byte)),
        _ => return None,
    })
}

/// A tensor that must be there.
///
/// # Errors
/// It is not.
pub fn get<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a Values, Stop> {
    tensors.get(name).ok_or_else(|| Stop::Failed(format!("the case has no tensor {name}")))
}
