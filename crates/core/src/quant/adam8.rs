//! Adam on moments that are kept in 8 bits (arXiv 2110.02861), on the host. The step itself, and the one on a device,
//! are [`lowrank_kernels::adam8`](mod@lowrank_kernels::adam8)'s.
//!
//! State: `2 + 8 / block` bytes a value.

use burn::tensor::Device;
pub use lowrank_kernels::adam8::Adam8;
use lowrank_kernels::adam8::{self as kernel, Moment};

use super::dynamic8::{Blockwise8, Map, largest_magnitude};

/// Both moments of one tensor, flattened.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments8 {
    /// m, in the signed map.
    pub first: Blockwise8,
    /// v, in the unsigned map.
    pub second: Blockwise8,
}

impl Moments8 {
    /// Zeros.
    ///
    /// # Panics
    /// Where `block` is 0.
    pub fn zeros(len: usize, block: usize) -> Self {
        Self {
            first: Blockwise8::zeros(len, Map::signed(), block),
            second: Blockwise8::zeros(len, Map::unsigned(), block),
        }
    }

    /// Replaces both moments by these values.
    pub fn set(&mut self, first: &[f32], second: &[f32]) {
        let block = self.first.block;
        encode(first, Map::signed(), &mut self.first.codes, &mut self.first.absmax, block);
        encode(second, Map::unsigned(), &mut self.second.codes, &mut self.second.absmax, block);
    }

    /// Updates a parameter with its gradient, both flattened as the moments are.
    ///
    /// # Panics
    /// Where the lengths differ.
    pub fn step(&mut self, parameter: &mut [f32], gradient: &[f32], rule: Adam8) {
        let block = self.first.block;
        let [first, second] =
            [&mut self.first, &mut self.second].map(|part| Moment { codes: &mut part.codes, absmax: &mut part.absmax });
        kernel::on_host(parameter, gradient, first, second, block, rule);
    }

    /// The same moments on a device.
    pub fn on_device(&self, device: &Device) -> kernel::Moments8 {
        let Self { first, second } = self;
        kernel::Moments8::new([&first.codes, &second.codes], [&first.absmax, &second.absmax], first.block, device)
    }

    /// Those of a device; waits for it.
    pub fn from_device(moments: &kernel::Moments8) -> Self {
        let block = moments.block();
        let [first, second] = moments.to_host().map(|(codes, absmax)| Blockwise8 { codes, absmax, block });
        Self { first, second }
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        self.first.bytes() + self.second.bytes()
    }
}

fn encode(values: &[f32], map: &Map, codes: &mut [u8], absmax: &mut [f32], block: usize) {
    for ((values, codes), absmax) in values.chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
        *absmax = largest_magnitude(values);
        kernel::encode(&mut values.to_vec(), map, *absmax, codes);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Tensor, TensorData};

    use super::*;
    use crate::random::Stream;

    const RULE: Adam8 = Adam8 { learning_rate: 0.01, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.1, step: 1 };

    #[test]
    fn the_first_step_is_that_of_adam_in_full_precision() {
        let gradient = [0.5f32, -0.25, 0.0, 2.0, -1e-3];
        let mut parameter = [1.0f32, -2.0, 3.0, 0.0, 0.5];
        let before = parameter;
        let mut moments = Moments8::zeros(5, 4);
        moments.step(&mut parameter, &gradient, RULE);
        for ((got, p), g) in parameter.iter().zip(before).zip(gradient) {
            let (p, g) = (f64::from(p), f64::from(g));
            let expected = p * (1.0 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8);
            assert!((f64::from(*got) - expected).abs() < 1e-6, "{got} {expected}");
        }
        assert_eq!((moments.first.absmax.len(), moments.bytes()), (2, 26));
    }

    #[test]
    fn a_constant_gradient_leads_to_the_moments_of_adam_within_a_code() {
        let stream = Stream::new(5, "gradient");
        let gradient: Vec<f32> = (0..512).map(|i| stream.normal(i) as f32).collect();
        let mut parameter = vec![0.0; 512];
        let mut moments = Moments8::zeros(512, 256);
        for step in 1..=200 {
            moments.step(&mut parameter, &gradient, Adam8 { step, ..RULE });
        }
        let scale = (1.0 - 0.9f64.powi(200)) as f32;
        let expected: Vec<f32> = gradient.iter().map(|g| g * scale).collect();
        let expected = Blockwise8::quantise(&expected, Map::signed(), 256);
        let apart = moments.first.codes.iter().zip(&expected.codes).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(apart <= Some(1), "{apart:?}");
    }

    #[test]
    fn moments_on_a_device_are_those_of_the_host_to_the_bit() {
        let stream = Stream::new(6, "gradient");
        for (len, block) in [(1000, 256), (7, 4), (1, 256)] {
            let (device, mut host) = (Device::flex(), Moments8::zeros(len, block));
            let mut moved = kernel::Moments8::zeros(len, block, &device);
            assert_eq!((Moments8::from_device(&moved), moved.bytes()), (host.clone(), host.bytes()));
            let mut parameter = vec![1.0; len];
            for step in 1..=3 {
                let first = u64::from(step) * 1000;
                let gradient: Vec<f32> = (0..len).map(|i| stream.normal(first + i as u64) as f32).collect();
                let tensor =
                    |values: &[f32]| Tensor::<2>::from_data(TensorData::new(values.to_vec(), [1, len]), &device);
                let rule = Adam8 { step, ..RULE };
                let (updated, moments) =
                    lowrank_kernels::adam8(tensor(&parameter), tensor(&gradient), moved.clone(), rule);
                moved = moments;
                host.step(&mut parameter, &gradient, rule);
                assert_eq!(crate::linalg::host(updated), parameter);
                assert_eq!(Moments8::from_device(&moved), host);
                assert_eq!(Moments8::from_device(&host.on_device(&device)), host);
            }
        }
    }

    #[test]
    fn signs_are_kept_and_non_finite_gradients_change_nothing() {
        let mut moments = Moments8::zeros(4, 4);
        let mut parameter = [1.0; 4];
        let rule = Adam8 { weight_decay: 0.0, ..RULE };
        moments.step(&mut parameter, &[1.0, -1e-9, 1e-9, f32::NAN], rule);
        let first = moments.first.dequantise(Map::signed());
        assert!(first[0] > 0.0 && first[1] < 0.0 && first[2] >= 0.0);
        assert_eq!((first[3], parameter[3]), (0.0, 1.0));
        let before = parameter;
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30] {
            moments.step(&mut parameter, &[bad; 4], Adam8 { step: 2, ..rule });
            assert_eq!(parameter, before);
            assert!(moments.first.dequantise(Map::signed()).iter().all(|value| *value == 0.0));
        }
    }

    #[test]
    fn without_gradient_the_parameter_only_decays() {
        let mut moments = Moments8::zeros(3, 256);
        let mut parameter = [1.0, -1.0, 0.5];
        moments.step(&mut parameter, &[0.0; 3], RULE);
        assert_eq!(parameter, [0.999, -0.999, 0.4995]);
        assert_eq!(moments, Moments8::zeros(3, 256));
    }
}
