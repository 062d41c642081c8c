//! What the device can do at most, measured: the roof that kernels are compared with.

use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};

use crate::timing::{Effort, time};

/// Rates that nothing on the device exceeds by much.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Bytes a second of copying, read and written ones counted.
    pub bytes: f64,
    /// Flops a second of a large square product in the type of the kernels.
    pub flops: f64,
}

impl Peaks {
    pub fn measure(device: &Device, dtype: FloatDType, quick: bool) -> anyhow::Result<Self> {
        let (effort, side, numbers) = match quick {
            true => (Effort::QUICK, 64, 1 << 16),
            false => (Effort::FULL, 8192, 1 << 28),
        };
        let random = |dims: [usize; 2], dtype: FloatDType| {
            Tensor::<2>::random(dims, Distribution::Normal(0.0, 1.0), (device, DType::from(dtype)))
        };
        let x = random([numbers / 1024, 1024], FloatDType::F32);
        let copy = time(device, effort, 4, || x.clone() * 2.0)?;
        drop(x);
        let (a, b) = (random([side, side], dtype), random([side, side], dtype));
        let product = time(device, effort, 4, || a.clone().matmul(b.clone()))?;
        let flops = 2.0 * (side as f64).powi(3);
        Ok(Self { bytes: 8.0 * numbers as f64 / copy.median, flops: flops / product.median })
    }
}
