//! What a kernel is run on: drawn by the device where its time counts, the same numbers everywhere where its results count.

use burn::tensor::{DType, Device, Distribution, FloatDType, Int, Tensor, TensorData};
use lowrank_core::quant::Quantisation;
use lowrank_core::random::Stream;
use lowrank_kernels::Packed;

/// Where the values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// The device draws them.
    Drawn,
    /// Numbered streams, rounded to a type before they are held in another: a result in f32 can then be compared with one in
    /// 16 bits.
    Repeatable { rounded: FloatDType },
}

/// Makes the inputs of one kernel, one after the other.
pub struct Inputs {
    device: Device,
    dtype: FloatDType,
    values: Values,
    made: u64,
}

impl Inputs {
    pub fn new(device: &Device, dtype: FloatDType, values: Values) -> Self {
        Self { device: device.clone(), dtype, values, made: 0 }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The kernel's type.
    pub fn dtype(&self) -> FloatDType {
        self.dtype
    }

    /// Bytes of a value in the kernel's type.
    pub fn width(&self) -> f64 {
        DType::from(self.dtype).size() as f64
    }

    /// Evenly spread in `low..high`.
    fn uniform<const D: usize>(&mut self, dims: [usize; D], [low, high]: [f64; 2], dtype: FloatDType) -> Tensor<D> {
        self.made += 1;
        let held = DType::from(dtype);
        let Values::Repeatable { rounded } = self.values else {
            return Tensor::random(dims, Distribution::Uniform(low, high), (&self.device, held));
        };
        let stream = Stream::new(self.made, "kernel input");
        let count = dims.iter().product::<usize>() as u64;
        let values: Vec<f32> = (0..count).map(|i| (low + (high - low) * stream.unit(i)) as f32).collect();
        let data = TensorData::new(values, dims);
        // What is held in f32 on every device is not rounded.
        let data = if dtype == self.dtype { data.convert_dtype(rounded.into()) } else { data };
        Tensor::from_data(data.convert_dtype(held), (&self.device, held))
    }

    /// A tensor in the kernel's type.
    pub fn tensor<const D: usize>(&mut self, dims: [usize; D]) -> Tensor<D> {
        self.uniform(dims, [-1.0, 1.0], self.dtype)
    }

    /// A tensor that is f32 in every run.
    pub fn precise<const D: usize>(&mut self, dims: [usize; D]) -> Tensor<D> {
        self.uniform(dims, [-1.0, 1.0], FloatDType::F32)
    }

    /// As [`Inputs::precise`], above zero.
    pub fn positive<const D: usize>(&mut self, dims: [usize; D]) -> Tensor<D> {
        self.uniform(dims, [0.01, 1.0], FloatDType::F32)
    }

    /// A frozen weight in NF4 with quantised scales.
    pub fn packed(&mut self, dims: [usize; 2]) -> anyhow::Result<Packed> {
        self.made += 1;
        let Values::Repeatable { .. } = self.values else {
            return Ok(Quantisation::NF4.drawn(dims, 0.02, &self.device)?);
        };
        let stream = Stream::new(self.made, "kernel weight");
        let values: Vec<f32> = (0..(dims[0] * dims[1]) as u64).map(|i| stream.normal(i) as f32).collect();
        Ok(Quantisation::NF4.pack(&values, dims, &self.device)?)
    }

    pub fn integers<const D: usize>(&self, values: Vec<i32>, dims: [usize; D]) -> Tensor<D, Int> {
        Tensor::from_data(TensorData::new(values, dims), (&self.device, DType::I32))
    }

    /// The same tensor as a trained leaf on the tape.
    pub fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
        Tensor::from_inner(tensor.clone()).require_grad()
    }
}
