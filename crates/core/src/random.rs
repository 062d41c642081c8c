//! Random numbers by counter: value `i` of the stream `(seed, name)` depends on nothing else.
//!
//! So a parameter starts from the same values on every device, in every order of initialisation, with every thread count.

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels::Rounding;

/// A stream of random numbers addressed by index.
#[derive(Clone, Copy, Debug)]
pub struct Stream(u64);

/// Added to the state for each index.
const INCREMENT: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64: a bijection whose outputs pass for random.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Stream {
    /// The stream of a purpose (for example a parameter's name) under a run's seed.
    pub fn new(seed: u64, name: &str) -> Self {
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        Self(mix(seed ^ mix(hash)))
    }

    /// 64 random bits at an index.
    pub fn bits(&self, index: u64) -> u64 {
        mix(self.0.wrapping_add(index.wrapping_mul(INCREMENT)))
    }

    /// Stochastic rounding where value i draws number `first + i`.
    pub fn rounding(&self, first: u64) -> Rounding {
        // Value i of a kernel draws from the state that is `i + 1` increments after its seed.
        Rounding::Stochastic { seed: self.0.wrapping_add(first.wrapping_sub(1).wrapping_mul(INCREMENT)) }
    }

    /// Uniform in `[0, 1)` with 53 bits.
    pub fn unit(&self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal by Box and Muller.
    pub fn normal(&self, index: u64) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit(2 * index)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit(2 * index + 1)).cos()
    }

    /// A `[rows, cols]` tensor, uniform in `[-bound, bound)`.
    pub fn uniform_tensor(&self, rows: usize, cols: usize, bound: f64, device: &Device) -> Tensor<2> {
        let values = (0..rows * cols).map(|i| ((2.0 * self.unit(i as u64) - 1.0) * bound) as f32).collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(values, [rows, cols]), device)
    }

    /// A `[rows, cols]` tensor of independent normals.
    pub fn normal_tensor(&self, rows: usize, cols: usize, deviation: f64, device: &Device) -> Tensor<2> {
        let values = (0..rows * cols).map(|i| (self.normal(i as u64) * deviation) as f32).collect::<Vec<_>>();
        Tensor::from_data(TensorData::new(values, [rows, cols]), device)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn moments_are_right_and_streams_differ() {
        let stream = Stream::new(1, "a");
        let n = 100_000;
        let (mut sum, mut square, mut unit) = (0.0, 0.0, 0.0);
        for i in 0..n {
            sum += stream.normal(i);
            square += stream.normal(i).powi(2);
            unit += stream.unit(i);
        }
        // Standard errors at n = 1e5: 3.2e-3, 4.5e-3, 0.9e-3; the bounds are four of them.
        assert!((sum / n as f64).abs() < 1.3e-2);
        assert!((square / n as f64 - 1.0).abs() < 1.8e-2);
        assert!((unit / n as f64 - 0.5).abs() < 3.7e-3);
        assert_ne!(stream.bits(0), Stream::new(1, "b").bits(0));
        assert_ne!(stream.bits(0), Stream::new(2, "a").bits(0));
    }

    /// The draws are the top 24 bits of the stream, whatever their number.
    #[test]
    fn rounding_draws_from_the_stream() {
        let stream = Stream::new(3, "rounding");
        for first in [0, 1 << 40, u64::MAX - 3] {
            let mut codes = [0; 64];
            // Halfway between two codes: up where the draw is below a half.
            lowrank_kernels::groups::encode(&[0.5; 64], 1.0, 0, 255.0, stream.rounding(first), &mut codes);
            for (i, code) in codes.into_iter().enumerate() {
                let draw = stream.bits(first.wrapping_add(i as u64)) >> 40;
                assert_eq!(code, u8::from(draw < 1 << 23), "{first} {i}");
            }
        }
    }
}
