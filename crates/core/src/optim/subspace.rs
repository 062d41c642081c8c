//! The subspace of one matrix: which side of its gradient is projected, and onto what.
//!
//! | side | basis | projected gradient | back |
//! | --- | --- | --- | --- |
//! | input | P, `[m, r]` | `P^T G`, `[r, n]` | `P N` |
//! | output | Q, `[n, r]` | `G Q`, `[m, r]` | `N Q^T` |
//! | both | P and Q | `P^T G Q`, `[r, r]` | `P N Q^T` |
//!
//! GaLore (arXiv 2403.03507) speaks of the transposed array: its `right` is the input side here, its `left` the output side.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

/// Which side is projected, as a configuration says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProjType {
    /// Always the input side: x is never saved, and the state is the smallest for wide layers.
    #[default]
    Input,
    /// Always the output side.
    Output,
    /// The smaller dimension, as published; the input side where both are equal.
    Std,
    /// The larger dimension.
    ReverseStd,
    /// Both sides.
    Full,
    /// The side with the smaller state, gradient and saved input together.
    Auto,
}

/// Which side of one matrix is projected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// P.
    Input,
    /// Q.
    Output,
    /// P and Q.
    Both,
}

impl ProjType {
    /// The side for a matrix `[m, n]`. `auto` compares the values each side keeps at rank `r` with `tokens` in a micro batch:
    /// basis, two moments and gradient, and `x P` or `x`.
    pub fn side(self, m: usize, n: usize, r: usize, tokens: usize) -> Side {
        let smaller = if m <= n { Side::Input } else { Side::Output };
        match self {
            Self::Input => Side::Input,
            Self::Output => Side::Output,
            Self::Full => Side::Both,
            Self::Std => smaller,
            Self::ReverseStd if smaller == Side::Input => Side::Output,
            Self::ReverseStd => Side::Input,
            Self::Auto => {
                let input = m * r + 3 * r * n + tokens * r;
                let output = n * r + 3 * r * m + tokens * m;
                if input <= output { Side::Input } else { Side::Output }
            }
        }
    }
}

/// An orthonormal basis of a subspace on one side or both.
#[derive(Clone, Debug)]
pub struct Basis {
    /// P, `[m, r]`.
    pub left: Option<Tensor<2>>,
    /// Q, `[n, r]`.
    pub right: Option<Tensor<2>>,
}

impl Basis {
    /// The low-rank gradient of `g [m, n]`.
    pub fn project(&self, g: Tensor<2>) -> Tensor<2> {
        let rows = match &self.left {
            Some(left) => kernels::gemm(left.clone().transpose(), g, None, 1.0),
            None => g,
        };
        match &self.right {
            Some(right) => kernels::gemm(rows, right.clone(), None, 1.0),
            None => rows,
        }
    }

    /// The `[m, n]` matrix of low-rank coordinates.
    pub fn back(&self, low: Tensor<2>) -> Tensor<2> {
        match (&self.left, &self.right) {
            (Some(left), None) => kernels::gemm(left.clone(), low, None, 1.0),
            (left, Some(right)) => kernels::gemm(lifted(left, low), right.clone().transpose(), None, 1.0),
            (None, None) => low,
        }
    }

    /// `weight + alpha back(low)`, accumulated into the weight's memory where nothing else holds it (`2 m n r` flops).
    pub fn add_back(&self, weight: Tensor<2>, low: Tensor<2>, alpha: f64) -> Tensor<2> {
        match (&self.left, &self.right) {
            (Some(left), None) => kernels::gemm(left.clone(), low, Some(weight), alpha as f32),
            (left, Some(right)) => {
                kernels::gemm(lifted(left, low), right.clone().transpose(), Some(weight), alpha as f32)
            }
            (None, None) => weight + low * alpha,
        }
    }

    /// Values held.
    pub fn len(&self) -> usize {
        [&self.left, &self.right].into_iter().flatten().map(|basis| basis.shape().num_elements()).sum()
    }

    /// Whether there is no basis at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `P low`, or `low` itself without P.
fn lifted(left: &Option<Tensor<2>>, low: Tensor<2>) -> Tensor<2> {
    match left {
        Some(left) => kernels::gemm(left.clone(), low, None, 1.0),
        None => low,
    }
}
