//! OFT: orthogonal fine-tuning (arXiv 2306.07280), a block-diagonal rotation of the input.
//!
//! ```text
//! Q_i = skew matrix of row i of the weight (upper triangle, row by row)      [b, b]
//! exact:    R_i = (I - Q_i) (I + Q_i)^-1
//! Neumann:  R_i = I + 2 Q_i + 2 Q_i^2 + ... + Q_i^k          last term once
//! y = x blockdiag(R_i) W + b
//! ```
//!
//! | paper | field | shape |
//! | --- | --- | --- |
//! | `Q_i` | row i of `weight` | `[d_in / b, b (b - 1) / 2]`, one row where blocks are shared |
//!
//! Trained: `d_in (b - 1) / 2` values. Start: 0, so the first output is the base's to the bit. The adapter acts on x, so
//! any base works. It is added as `x + x (R - I)` ([`kernels::block_rotation`]), so that bf16 activations lose nothing of a
//! small rotation.
//!
//! Cost beside the base: `2 t d_in b` flops each for y, dx and dR, `2 (k - 2) d_in b^2` for the powers of Q, one write of x
//! forward and one of dx backward. Saved: x `[t, d_in]` and the powers, `(k - 1) d_in b` values.
//!
//! The two forms turn in opposite directions: the series is that of `(I + Q)(I - Q)^-1`. peft has both signs so, and an
//! adapter trained with one form means something else with the other. The series with 5 terms is orthogonal up to
//! `2 |Q|^4`.
//!
//! Constrained OFT keeps every block's Q in the ball `||Q||_F <= eps / sqrt(blocks)`: [`Oft::forward`] acts by the nearest
//! such Q and passes the gradient through, and [`Oft::constrained`] puts the weight itself there, as the reference does
//! before each forward pass. The reference replaces a block size that does not divide `d_in`; here that is an error. Its
//! dropout of blocks never acts on linear layers and is left out.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Int, Tensor, TensorData};
use lowrank_kernels::{self as kernels, Weight};

use super::{Site, StartError};
use crate::linalg::inverse;
use crate::lowrank::cast;

/// How a skew matrix becomes a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cayley {
    /// `(I - Q)(I + Q)^-1`.
    Exact,
    /// The series with this many terms, counted as peft counts them: the identity is the first.
    Neumann(usize),
}

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OftSettings {
    /// b.
    pub block: usize,
    /// Form of the rotation.
    pub cayley: Cayley,
    /// eps of the constrained form, where it is used.
    pub coft: Option<f64>,
    /// Whether all blocks turn alike.
    pub block_share: bool,
}

impl Default for OftSettings {
    fn default() -> Self {
        Self { block: 32, cayley: Cayley::Neumann(5), coft: None, block_share: false }
    }
}

impl OftSettings {
    /// The adapter of a layer.
    ///
    /// # Errors
    /// The block size does not divide `d_in`, or is 1, which leaves nothing to turn.
    pub fn init(&self, site: &Site<'_>) -> Result<Oft, StartError> {
        let d_in = site.dims()[0];
        if self.block < 2 || !d_in.is_multiple_of(self.block) {
            let (below, above) = divisors_around(d_in, self.block);
            return Err(StartError::BlockSize {
                module: site.module.to_owned(),
                d_in,
                block: self.block,
                below,
                above,
            });
        }
        let device = site.weight.device();
        let rows = if self.block_share { 1 } else { d_in / self.block };
        let weight = Tensor::zeros([rows, self.block * (self.block - 1) / 2], &device);
        let places = skew_places(self.block);
        let count = places.len();
        Ok(Oft {
            weight: Param::from_tensor(weight),
            places: Tensor::from_data(TensorData::new(places, [count]), &device),
            block: self.block,
            cayley: self.cayley,
            coft: self.coft,
        })
    }

    /// Trained values of a layer.
    pub fn parameters(&self, d_in: usize, _d_out: usize) -> usize {
        let rows = if self.block_share { 1 } else { d_in / self.block.max(1) };
        rows * (self.block * self.block.saturating_sub(1) / 2)
    }
}

/// The divisors of `d_in` from 2 on that are nearest to a size that is none, or the same one twice.
fn divisors_around(d_in: usize, block: usize) -> (usize, usize) {
    let divides = |size: &usize| d_in.is_multiple_of(*size);
    let below = (2..block.min(d_in + 1)).rev().find(divides);
    let above = (block.max(2)..=d_in).find(divides);
    let either = below.or(above).unwrap_or(d_in);
    (below.unwrap_or(either), above.unwrap_or(either))
}

/// Where entry (i, j) of a skew matrix is in `[upper, -upper, 0]`.
fn skew_places(b: usize) -> Vec<i32> {
    let half = b * (b - 1) / 2;
    let upper = |i: usize, j: usize| i * (2 * b - i - 1) / 2 + j - i - 1;
    let place = |at: usize| match (at / b, at % b) {
        (i, j) if i < j => upper(i, j),
        (i, j) if i > j => half + upper(j, i),
        _ => 2 * half,
    };
    (0..b * b).map(|at| place(at) as i32).collect()
}

/// A rotation of the input of a base layer.
#[derive(Module, Debug)]
pub struct Oft {
    /// Upper triangles of Q, `[blocks, b (b - 1) / 2]`.
    pub weight: Param<Tensor<2>>,
    /// Where the entries of Q come from, `[b b]`.
    #[module(skip)]
    places: Tensor<1, Int>,
    /// b.
    #[module(skip)]
    pub block: usize,
    /// Form of the rotation.
    #[module(skip)]
    pub cayley: Cayley,
    /// eps of the constrained form.
    #[module(skip)]
    pub coft: Option<f64>,
}

impl Oft {
    /// The factor that brings each block into its ball, `[blocks, 1]`: 1 inside.
    fn shrink(&self, eps: f64) -> Tensor<2> {
        let weight = self.weight.val().inner();
        let radius = eps / (weight.dims()[0] as f64).sqrt();
        let norm = ((weight.clone() * weight).sum_dim(1) * 2.0).sqrt(); // an entry of the triangle is in Q twice
        (norm.clamp_min(1e-30).recip() * radius).clamp_max(1.0)
    }

    /// The weight inside the ball of the constrained form; as it is without one. To be taken over after every step.
    #[must_use]
    pub fn constrained(self) -> Self {
        let Some(eps) = self.coft else { return self };
        let shrink = self.shrink(eps);
        Self { weight: self.weight.map(|weight| weight * shrink), ..self }
    }

    /// The weight that acts: the gradient passes the constraint as if it were not there.
    fn acting(&self) -> Tensor<2> {
        let weight = cast(self.weight.val(), FloatDType::F32);
        match self.coft {
            Some(eps) => {
                let inside = weight.clone().inner();
                let step = inside.clone() * self.shrink(eps) - inside;
                weight + step
            }
            None => weight,
        }
    }

    /// `R - I`, `[blocks, b, b]`.
    fn turn(&self) -> Tensor<3> {
        let (weight, b) = (self.acting(), self.block);
        let [rows, _] = weight.dims();
        let zero = Tensor::<2>::zeros([rows, 1], &weight.device());
        let parts = Tensor::cat(vec![weight.clone(), weight.neg(), zero], 1);
        let q = parts.select(1, self.places.clone()).reshape([rows, b, b]);
        match self.cayley {
            Cayley::Exact => {
                let eye = Tensor::<2>::eye(b, &q.device()).reshape([1, b, b]);
                q.clone().matmul(inverse::inverse(q + eye)) * -2.0
            }
            Cayley::Neumann(terms) => series(q, terms),
        }
    }

    /// `(x R) W + b`.
    ///
    /// # Shapes
    /// `x [t, d_in]`, `weight [d_in, d_out]`, `bias [d_out]`; result `[t, d_out]` in the type of x.
    pub fn forward(&self, x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>, _training: bool) -> Tensor<2> {
        let ([t, d_in], b) = (x.dims(), self.block);
        let turn = cast(self.turn(), x.dtype().into());
        let turned = match turn.dims()[0] {
            // Shared: every piece of b values is a row.
            1 => kernels::block_rotation(x.reshape([t * d_in / b, b]), turn).reshape([t, d_in]),
            _ => kernels::block_rotation(x, turn),
        };
        kernels::linear(turned, weight, bias)
    }

    /// `R W` in f32.
    pub fn merged(&self, weight: Tensor<2>) -> Tensor<2> {
        let weight = cast(weight, FloatDType::F32);
        let ([d_in, d_out], b) = (weight.dims(), self.block);
        let turn = self.turn();
        let turn = if turn.dims()[0] == 1 { turn.repeat_dim(0, d_in / b) } else { turn };
        let moved = turn.matmul(weight.clone().reshape([d_in / b, b, d_out]));
        weight + moved.reshape([d_in, d_out])
    }
}

/// `2 Q + 2 Q^2 + ... + Q^k`. With 3 terms peft adds the cube as well, and so it is the same as with 4.
fn series(q: Tensor<3>, terms: usize) -> Tensor<3> {
    if terms < 2 {
        return q * 0.0;
    }
    let mut sum = q.clone() * 2.0;
    if terms == 2 {
        return sum;
    }
    let mut power = q.clone();
    for _ in 0..terms.saturating_sub(3).max(1) {
        power = power.matmul(q.clone());
        sum = sum + power.clone() * 2.0;
    }
    sum + power.matmul(q)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;

    use super::*;
    use crate::adapters::checks::{assert_close, check_gradient, host, normal, site, trained_values};

    fn started(settings: OftSettings, d_in: usize) -> Oft {
        let weight = normal("w", d_in, 5);
        let oft = settings.init(&site("a", &weight)).unwrap();
        assert_eq!(trained_values(&oft), settings.parameters(d_in, 5));
        oft
    }

    fn turned(settings: OftSettings, d_in: usize, size: f32) -> Oft {
        let oft = started(settings, d_in);
        let [rows, cols] = oft.weight.dims();
        with_weight(oft, normal("q", rows, cols) * size)
    }

    fn with_weight(oft: Oft, weight: Tensor<2>) -> Oft {
        Oft { weight: oft.weight.map(|_| weight), ..oft }
    }

    fn rotation(oft: &Oft, d_in: usize) -> Tensor<2> {
        oft.merged(Tensor::eye(d_in, &Device::flex()))
    }

    fn settings(block: usize, cayley: Cayley) -> OftSettings {
        OftSettings { block, cayley, ..OftSettings::default() }
    }

    #[test]
    fn starts_as_the_base_to_the_bit() {
        for cayley in [Cayley::Exact, Cayley::Neumann(5), Cayley::Neumann(1)] {
            for block_share in [false, true] {
                let oft = started(OftSettings { block_share, ..settings(4, cayley) }, 12);
                let (x, w) = (normal("x", 3, 12), normal("w", 12, 5));
                let y = oft.forward(x.clone(), w.clone().into(), None, true);
                assert_eq!(host(y), host(kernels::linear(x, w.clone(), None)));
                assert_eq!(host(oft.merged(w.clone())), host(w));
            }
        }
    }

    #[test]
    fn the_values_of_peft() {
        // `OFTConfig(oft_block_size=3)` of peft on a 3 x 3 identity, weight = [0.3, -0.2, 0.1].
        let cases: [(Cayley, [f32; 9]); 4] = [
            (
                Cayley::Exact,
                [
                    0.771_929_8,
                    -0.491_228_1,
                    0.403_508_8,
                    0.561_403_5,
                    0.824_561_4,
                    -0.070_175_4,
                    -0.298_245_6,
                    0.280_701_8,
                    0.912_280_7,
                ],
            ),
            (Cayley::Neumann(5), [0.7582, 0.5532, -0.2882, -0.4788, 0.814, 0.2836, 0.3998, -0.0604, 0.907]),
            (Cayley::Neumann(3), [0.74, 0.598, -0.312, -0.518, 0.8, 0.306, 0.432, -0.066, 0.9]),
            (Cayley::Neumann(6), [0.7764, 0.55628, -0.29632, -0.48748, 0.828, 0.27716, 0.39952, -0.07076, 0.914]),
        ];
        for (cayley, want) in cases {
            let oft = started(settings(3, cayley), 3);
            let weight = Tensor::<2>::from_floats([[0.3, -0.2, 0.1]], &Device::flex());
            let want = Tensor::<2>::from_data(TensorData::new(want.to_vec(), [3, 3]), &Device::flex());
            assert_close(rotation(&with_weight(oft, weight), 3), want, 1e-6);
        }
    }

    #[test]
    fn forward_and_merged_weight_agree() {
        for (cayley, block_share, block) in [
            (Cayley::Exact, false, 4),
            (Cayley::Neumann(5), false, 6),
            (Cayley::Neumann(3), true, 4),
            (Cayley::Exact, true, 12),
        ] {
            let oft = turned(OftSettings { block_share, ..settings(block, cayley) }, 12, 0.2);
            let (x, w) = (normal("x", 3, 12), normal("w", 12, 5));
            let y = oft.forward(x.clone(), w.clone().into(), None, true);
            assert_close(y, x.matmul(oft.merged(w)), 2e-6);
            // Nothing outside the blocks.
            let r = host(rotation(&oft, 12));
            assert!((0..144).all(|at| (at / 12) / block == (at % 12) / block || r[at] == 0.0));
        }
    }

    #[test]
    fn the_exact_form_is_a_rotation_and_the_series_almost() {
        let oft = turned(settings(8, Cayley::Exact), 16, 0.3);
        let (eye, r) = (Tensor::<2>::eye(16, &Device::flex()), rotation(&oft, 16));
        assert_close(r.clone().matmul(r.clone().transpose()), eye.clone(), 1e-6);
        let w = normal("w", 16, 5);
        let angles = |w: Tensor<2>| w.clone().transpose().matmul(w); // norms and angles of the columns
        assert_close(angles(oft.merged(w.clone())), angles(w), 1e-5);
        // A block of two with entry q turns by 2 atan(q): cos = (1 - q^2) / (1 + q^2).
        for q in [0.05f32, 0.1, 0.2] {
            let weight = Tensor::<2>::from_floats([[q]], &Device::flex());
            let plane = |cayley| rotation(&with_weight(started(settings(2, cayley), 2), weight.clone()), 2);
            let (exact, series) = (plane(Cayley::Exact), plane(Cayley::Neumann(5)));
            let (cosine, sine) = ((1.0 - q * q) / (1.0 + q * q), 2.0 * q / (1.0 + q * q));
            let want = Tensor::<2>::from_floats([[cosine, -sine], [sine, cosine]], &Device::flex());
            assert_close(exact.clone(), want, 1e-6);
            let eye = Tensor::<2>::eye(2, &Device::flex());
            let off = host((series.clone().matmul(series.clone().transpose()) - eye).abs());
            assert!(off.into_iter().fold(0.0, f32::max) <= 1.1 * 2.0 * q.powi(4) + 3e-7);
            // Opposite directions.
            assert_close(series, exact.transpose(), f64::from(2.0 * q.powi(4) + 1e-6));
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        for (cayley, block_share) in [(Cayley::Exact, false), (Cayley::Neumann(5), false), (Cayley::Neumann(4), true)] {
            let oft = turned(OftSettings { block_share, ..settings(4, cayley) }, 12, 0.3);
            let (x, w) = (normal("x", 3, 12), normal("w", 12, 5));
            let run = |oft: &Oft| oft.forward(x.clone(), w.clone().into(), None, true);
            check_gradient(&oft, run, |oft| oft.weight.clone(), with_weight);
        }
    }

    #[test]
    fn the_constrained_form_stays_in_its_ball() {
        let coft = OftSettings { coft: Some(0.3), ..settings(4, Cayley::Neumann(5)) };
        let mut oft = turned(coft, 12, 0.01);
        let first = normal("large", 1, 6);
        let rest = oft.weight.val().slice([1..3, 0..6]);
        oft = with_weight(oft, Tensor::cat(vec![first, rest.clone()], 0));
        let (x, w) = (normal("x", 3, 12), normal("w", 12, 5));
        let before = oft.forward(x.clone(), w.clone().into(), None, true);
        let inside = oft.clone().constrained();
        assert_close(inside.forward(x.clone(), w.clone().into(), None, true), before, 1e-6);
        let norms = host((inside.weight.val() * inside.weight.val()).sum_dim(1) * 2.0);
        assert!((f64::from(norms[0]).sqrt() - 0.3 / 3f64.sqrt()).abs() < 1e-6);
        assert_eq!(host(inside.weight.val().slice([1..3, 0..6])), host(rest)); // these were inside
        // The gradient is the one at the projected weight.
        let gradient = |oft: &Oft| {
            let lifted = oft.clone().train();
            let gradients = lifted.forward(x.clone(), w.clone().into(), None, true).sum().backward();
            lifted.weight.val().grad(&gradients).unwrap()
        };
        assert_close(gradient(&oft), gradient(&inside), 1e-5);
    }

    #[test]
    fn sizes_that_do_not_divide_are_refused() {
        let refused = |block: usize, d_in: usize| {
            let weight = normal("w", d_in, 5);
            settings(block, Cayley::Exact).init(&site("q", &weight)).unwrap_err().to_string()
        };
        assert_eq!(
            refused(32, 576 + 8),
            "q: blocks of 32 do not divide d_in = 584; the nearest sizes that do are 8 and 73"
        );
        assert!(refused(1, 12).ends_with("2 and 2"));
        assert!(refused(24, 12).ends_with("12 and 12"));
        assert!(refused(5, 7).ends_with("7 and 7"));
        assert_eq!(OftSettings::default().parameters(4096, 1), 63_488);
    }
}
