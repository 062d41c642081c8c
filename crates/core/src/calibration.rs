//! What a calibration pass measures at a linear layer: moments of its inputs, and the gradient of its weight.
//!
//! | | sum over the tokens of all samples | of methods |
//! | --- | --- | --- |
//! | [`Covariance::Sum`] | `C = sum x^T x` | EoRA |
//! | [`Covariance::MeanOfSequences`] | `C = mean over sequences of (X / \|max X\|)^T (X / \|max X\|)` | CorDA |
//! | gradient | `G = sum x^T dy` | LoRA-SB |
//!
//! [`Moments`] is driven as an optimiser is: it asks the backward pass for the factors x and dy of its matrix and looks at them;
//! it never steps. Sums are taken on the device in f32. Cost of a pass over t tokens beside forward and backward:
//! `2 t d_in^2` flops for C, `2 t d_in d_out` for G; state `d_in^2` and `d_in d_out` values.
//!
//! `|max X|` is the absolute value of the largest entry, as in CorDA's code, not the largest absolute value. Where all entries
//! are negative it may be next to nothing; here it is at least 1e-4 of the largest absolute value.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use crate::adapters::Statistics;
use crate::optim::{MatrixOptimizer, State, StepRule};
use crate::projection::Gradient;

/// Least `|max X|` as a part of the largest absolute value.
const LEAST_MAXIMUM: f64 = 1e-4;
/// Least divisor: a sequence of zeros adds nothing.
const LEAST_DIVISOR: f64 = 1e-30;

/// Which second moment of its inputs a layer is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Covariance {
    /// The plain sum over all tokens.
    Sum,
    /// Every sequence divided by its own largest entry, and the mean over sequences (CorDA).
    MeanOfSequences,
}

/// What is measured at a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// C.
    pub covariance: Option<Covariance>,
    /// G.
    pub gradient: bool,
}

/// Which rows of the coming micro batch are the tokens of which sequence; told once a batch to all layers.
#[derive(Clone, Debug, Default)]
pub struct Sequences(Arc<Mutex<(usize, Vec<Range<usize>>)>>);

impl Sequences {
    /// The coming micro batch has `rows` rows, and these are its sequences without their padding.
    pub fn announce(&self, rows: usize, sequences: Vec<Range<usize>>) {
        *lock(&self.0) = (rows, sequences);
    }

    /// The sequences of a layer with this many rows. One that sees other rows than the blocks do, such as a head that sees the
    /// counted ones, sees a single sequence.
    fn of(&self, rows: usize) -> Vec<Range<usize>> {
        let announced = lock(&self.0);
        if announced.0 == rows { announced.1.clone() } else { std::iter::once(0..rows).collect() }
    }
}

/// A panic elsewhere does not make sums wrong that were complete before it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Sums {
    covariance: Option<Tensor<2>>,
    gradient: Option<Tensor<2>>,
    sequences: usize,
}

/// The moments of one matrix. Clones are handles to the same sums: one goes to the optimiser of the pass, one stays outside.
#[derive(Clone, Debug)]
pub struct Moments {
    wanted: Wanted,
    sequences: Sequences,
    sums: Arc<Mutex<Sums>>,
}

impl Moments {
    /// Sums of nothing yet.
    pub fn new(wanted: Wanted, sequences: &Sequences) -> Self {
        Self { wanted, sequences: sequences.clone(), sums: Arc::default() }
    }

    /// What was measured. Where no pass came by, there is nothing in it.
    pub fn finish(self) -> Statistics {
        let sums = std::mem::take(&mut *lock(&self.sums));
        let covariance = match self.wanted.covariance {
            Some(Covariance::MeanOfSequences) => sums.covariance.map(|sum| sum / sums.sequences.max(1) as f64),
            _ => sums.covariance,
        };
        Statistics { covariance, gradient: sums.gradient, samples: sums.sequences }
    }
}

/// `sum + a^T b`
fn add_product(sum: Option<Tensor<2>>, a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    kernels::gemm(a.transpose(), b, sum, 1.0)
}

/// `X / |max X|`
fn by_largest(x: Tensor<2>) -> Tensor<2> {
    let least = x.clone().abs().max() * LEAST_MAXIMUM;
    let largest = x.clone().max().abs().max_pair(least).clamp_min(LEAST_DIVISOR);
    x / largest.reshape([1, 1])
}

impl MatrixOptimizer for Moments {
    fn collect(&mut self, _micro_batches: usize) -> Gradient {
        Gradient::factors()
    }

    fn observe(&mut self, x: Tensor<2>, dy: Tensor<2>) -> Tensor<2> {
        let device = x.device();
        let mut sums = lock(&self.sums);
        for rows in self.sequences.of(x.dims()[0]).into_iter().filter(|rows| !rows.is_empty()) {
            sums.sequences += 1;
            let sequence = || x.clone().narrow(0, rows.start, rows.len());
            let x = match self.wanted.covariance {
                Some(Covariance::Sum) => sequence(),
                Some(Covariance::MeanOfSequences) => by_largest(sequence()),
                None => continue,
            };
            let sum = sums.covariance.take();
            sums.covariance = Some(add_product(sum, x.clone(), x));
        }
        if self.wanted.gradient {
            let sum = sums.gradient.take();
            sums.gradient = Some(add_product(sum, x, dy));
        }
        Tensor::zeros([1, 1], &device) // nothing is left to accumulate
    }

    fn step(&mut self, weight: Tensor<2>, _collected: Tensor<2>, _rule: StepRule) -> Tensor<2> {
        weight
    }

    fn keeps_weight(&self) -> bool {
        true
    }

    fn save(&self) -> State {
        let sums = lock(&self.sums);
        let tensors = [("covariance", &sums.covariance), ("gradient", &sums.gradient)];
        let tensors = tensors.into_iter().filter_map(|(name, sum)| Some((name.to_owned(), sum.clone()?)));
        let numbers = [("sequences".to_owned(), sums.sequences as u64)];
        State { tensors: tensors.collect(), numbers: numbers.into(), ..State::default() }
    }

    fn restore(&mut self, mut state: State) -> Result<(), String> {
        let sequences = state.number("sequences")? as usize;
        let [covariance, gradient] = ["covariance", "gradient"].map(|name| state.tensors.remove(name));
        *lock(&self.sums) = Sums { covariance, gradient, sequences };
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        let sums = lock(&self.sums);
        [&sums.covariance, &sums.gradient].into_iter().flatten().map(|sum| 4 * sum.shape().num_elements()).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::linalg::{gaussian, host};
    use burn::tensor::Device;

    fn random(name: &str, rows: usize, cols: usize) -> Tensor<2> {
        gaussian(2, name, rows, cols, 1.0, &Device::flex())
    }

    fn assert_near(a: Tensor<2>, b: Tensor<2>) {
        let (a, b) = (host(a), host(b));
        assert!(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs())));
    }

    #[test]
    fn sums_are_those_of_all_tokens() {
        let sequences = Sequences::default();
        let mut moments = Moments::new(Wanted { covariance: Some(Covariance::Sum), gradient: true }, &sequences);
        let handle = moments.clone();
        let (x, dy) = (random("x", 10, 6), random("dy", 10, 4));
        assert!(matches!(moments.collect(1), Gradient::Factors { offset: None, slots: None }));
        // Rows 3 and 7 to 9 are padding, where dy is zero.
        let real = [0, 1, 2, 4, 5, 6];
        let keep = (0..10).map(|i| f32::from(u8::from(real.contains(&i)))).collect::<Vec<_>>();
        let keep = Tensor::<2>::from_data(burn::tensor::TensorData::new(keep, [10, 1]), &Device::flex());
        let dy = dy * keep.clone();
        for _ in 0..2 {
            sequences.announce(10, vec![0..3, 4..7, 7..7]);
            assert_eq!(moments.observe(x.clone(), dy.clone()).dims(), [1, 1]);
        }
        assert_eq!(moments.state_bytes(), 4 * (36 + 24));
        let found = handle.finish();
        let real = x.clone() * keep;
        assert_near(found.covariance.unwrap(), real.clone().transpose().matmul(real) * 2.0);
        assert_near(found.gradient.unwrap(), x.transpose().matmul(dy) * 2.0);
        assert_eq!(found.samples, 4);
    }

    #[test]
    fn every_sequence_counts_by_its_own_largest_entry() {
        let sequences = Sequences::default();
        let wanted = Wanted { covariance: Some(Covariance::MeanOfSequences), gradient: false };
        let (mut together, mut apart) = (Moments::new(wanted, &sequences), Moments::new(wanted, &sequences));
        let (x, dy) = (random("x", 9, 5), random("dy", 9, 3));
        sequences.announce(9, vec![0..4, 4..9]);
        together.observe(x.clone(), dy.clone());
        for (from, rows) in [(0, 4), (4, 5)] {
            sequences.announce(rows, std::iter::once(0..rows).collect());
            // Inputs of another size count the same.
            apart.observe(x.clone().narrow(0, from, rows) * (1 + from) as f64, dy.clone().narrow(0, from, rows));
        }
        let [together, apart] = [together, apart].map(Moments::finish);
        assert_eq!((together.samples, apart.samples), (2, 2));
        assert!(together.gradient.is_none());
        let largest = host(x.clone().narrow(0, 0, 4)).into_iter().fold(f32::MIN, f32::max).abs();
        let other = host(x.clone().narrow(0, 4, 5)).into_iter().fold(f32::MIN, f32::max).abs();
        let [a, b] = [(0, 4, largest), (4, 5, other)].map(|(from, rows, largest)| {
            let part = x.clone().narrow(0, from, rows) / largest;
            part.clone().transpose().matmul(part)
        });
        assert_near(together.covariance.clone().unwrap(), (a + b) / 2.0);
        assert_near(together.covariance.unwrap(), apart.covariance.unwrap());
    }

    #[test]
    fn inputs_without_a_positive_entry_and_zeros_stay_finite() {
        let sequences = Sequences::default();
        let wanted = Wanted { covariance: Some(Covariance::MeanOfSequences), gradient: false };
        let mut moments = Moments::new(wanted, &sequences);
        let mut negative = vec![-1.0f32; 12];
        negative[5] = -1e-9;
        let x = Tensor::<2>::from_data(burn::tensor::TensorData::new(negative, [4, 3]), &Device::flex());
        moments.observe(x, random("dy", 4, 2));
        moments.observe(Tensor::zeros([4, 3], &Device::flex()), random("dy", 4, 2));
        let largest = host(moments.finish().covariance.unwrap()).into_iter().fold(0.0f32, |a, b| a.max(b.abs()));
        // 4 tokens of 1e4 each, over two sequences.
        assert!((largest / 2e8 - 1.0).abs() < 1e-4, "{largest}");
    }
}
