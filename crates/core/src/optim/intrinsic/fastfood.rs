//! Fastfood: a random map of d numbers to D without a matrix (Le, Sarlos, Smola 2013, as used in arXiv 2012.13255).
//!
//! ```text
//! P v = first D entries of  H (g * (H (b * pad(v)))[pi]) / (sqrt(L sum g^2) sqrt(D / L))       L = 2^ceil(log2 D)
//! P^T u = first d entries of  b * (H ((g * H pad(u))[pi^-1])) / (the same)
//! ```
//!
//! b random signs, pi a random permutation, g independent normals, H the Walsh-Hadamard transform without a factor. Columns have
//! norm 1 where D is a power of two, and about 1 otherwise. d above L: the last entries of v have no effect.
//!
//! With K the power of two from d on, the first K entries are all that the inner transform meets, and its result repeats with
//! period K: it is made at size K. H is a Kronecker product of transforms of up to 128, each a product with a small matrix that
//! also turns the index bits by its own share, so that after the last one they are in place: `2 L (sum of sizes)` flops.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Device, Int, Tensor, TensorData};
use lowrank_kernels as kernels;

use crate::random::Stream;

/// Largest factor of the transform.
const LARGEST: usize = 128;

/// The Walsh-Hadamard transform in place; the length is a power of two.
pub fn walsh_hadamard(values: &mut [f64]) {
    let mut half = 1;
    while half < values.len() {
        for block in values.chunks_exact_mut(2 * half) {
            let (low, high) = block.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// The transform on a device. Clones share its small matrices.
#[derive(Clone, Debug, Default)]
pub struct Hadamard(Arc<Mutex<Vec<(Device, Tensor<2>)>>>);

impl Hadamard {
    /// The matrix of a size.
    fn matrix(&self, size: usize, device: &Device) -> Tensor<2> {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, matrix)) = made.iter().find(|(place, matrix)| place == device && matrix.dims()[0] == size) {
            return matrix.clone();
        }
        let sign = |at: usize| if ((at / size) & (at % size)).count_ones().is_multiple_of(2) { 1.0f32 } else { -1.0 };
        let values: Vec<f32> = (0..size * size).map(sign).collect();
        let matrix = Tensor::from_data(TensorData::new(values, [size, size]), device);
        made.push((device.clone(), matrix.clone()));
        matrix
    }

    /// H x.
    ///
    /// # Shapes
    /// `x [1, L]`, L a power of two.
    pub fn transform(&self, x: Tensor<2>) -> Tensor<2> {
        let ([_, length], device) = (x.dims(), x.device());
        let mut x = x;
        let mut left = length;
        while left > 1 {
            let size = left.min(LARGEST);
            // The lowest bits of the index become its highest.
            let columns = x.reshape([length / size, size]).transpose();
            x = kernels::gemm(self.matrix(size, &device), columns, None, 1.0);
            left /= size;
        }
        x.reshape([1, length])
    }
}

/// The map P `[D, d]`.
#[derive(Clone, Debug)]
pub struct Fastfood {
    /// D.
    length: usize,
    /// d.
    dims: usize,
    /// b, `[1, min(d, L)]`.
    signs: Tensor<2>,
    /// Where each middle entry comes from among the K repeating ones, `[L]`.
    sources: Tensor<1, Int>,
    /// The inverse permutation, `[L]`.
    inverse: Tensor<1, Int>,
    /// g over the norm, `[1, L]`.
    gains: Tensor<2>,
    transform: Hadamard,
}

/// A permutation of `0..length` by Fisher and Yates.
fn permutation(length: usize, stream: Stream) -> Vec<usize> {
    let mut places: Vec<usize> = (0..length).collect();
    for i in (1..length).rev() {
        places.swap(i, (stream.bits(i as u64) % (i as u64 + 1)) as usize);
    }
    places
}

fn integers(values: impl Iterator<Item = usize>, count: usize, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.map(|value| value as i32).collect();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

impl Fastfood {
    /// The map of d = `dims` numbers to D = `length`, from the streams of b, pi and g.
    pub fn new(length: usize, dims: usize, streams: [Stream; 3], transform: &Hadamard, device: &Device) -> Self {
        let width = length.max(1).next_power_of_two();
        let used = dims.min(width);
        let period = used.max(1).next_power_of_two();
        let [signs, order, gains] = streams;
        let signs: Vec<f32> = (0..used as u64).map(|i| if signs.bits(i) >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        let order = permutation(width, order);
        let mut inverse = vec![0; width];
        order.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
        let gains: Vec<f64> = (0..width as u64).map(|i| gains.normal(i)).collect();
        let square: f64 = gains.iter().map(|g| g * g).sum();
        let norm = (square * length.max(1) as f64).sqrt(); // sqrt(L sum g^2) sqrt(D / L)
        let gains: Vec<f32> = gains.into_iter().map(|g| (g / norm) as f32).collect();
        Self {
            length,
            dims,
            signs: Tensor::from_data(TensorData::new(signs, [1, used]), device),
            sources: integers(order.into_iter().map(|from| from % period), width, device),
            inverse: integers(inverse.into_iter(), width, device),
            gains: Tensor::from_data(TensorData::new(gains, [1, width]), device),
            transform: transform.clone(),
        }
    }

    /// K.
    fn period(&self) -> usize {
        self.signs.dims()[1].max(1).next_power_of_two()
    }

    /// P v.
    ///
    /// # Shapes
    /// `v [1, d]`; result `[1, D]`.
    pub fn apply(&self, v: Tensor<2>) -> Tensor<2> {
        let used = self.signs.dims()[1];
        let inner = padded(v.narrow(1, 0, used) * self.signs.clone(), self.period());
        let repeating = self.transform.transform(inner);
        let middle = repeating.select(1, self.sources.clone()) * self.gains.clone();
        self.transform.transform(middle).narrow(1, 0, self.length)
    }

    /// P^T u.
    ///
    /// # Shapes
    /// `u [1, D]`; result `[1, d]`.
    pub fn adjoint(&self, u: Tensor<2>) -> Tensor<2> {
        let ([_, width], period, used) = (self.gains.dims(), self.period(), self.signs.dims()[1]);
        let middle = self.transform.transform(padded(u, width)) * self.gains.clone();
        let ordered = middle.select(1, self.inverse.clone());
        let folded = ordered.reshape([width / period, period]).sum_dim(0);
        let inner = self.transform.transform(folded).narrow(1, 0, used) * self.signs.clone();
        padded(inner, self.dims)
    }

    /// Bytes of signs, permutation and gains.
    pub fn bytes(&self) -> usize {
        let integers = [&self.sources, &self.inverse].map(|t| t.shape().num_elements() * t.dtype().size());
        4 * (self.signs.dims()[1] + self.gains.dims()[1]) + integers.into_iter().sum::<usize>()
    }
}

/// Zeros behind a row.
fn padded(row: Tensor<2>, width: usize) -> Tensor<2> {
    let [_, length] = row.dims();
    if length == width {
        return row;
    }
    let zeros = Tensor::zeros([1, width - length], &row.device());
    Tensor::cat(vec![row, zeros], 1)
}
