//! Which columns of Q carry a gradient, and where the ones in use were before.

use std::time::Instant;

use burn::tensor::{DType, Int, IntDType, Tensor};
use lowrank_kernels as kernels;

use super::DctAdamW;
use crate::linalg;
use crate::optim::one_side::rank_axis;
use crate::optim::subspace::Side;

/// Columns of the sketch of the scores.
const SKETCH: usize = 32;

/// How much of the gradient a direction carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Score {
    /// Sum of absolute values, the released code's default.
    L1,
    /// Sum of squares: optimal for the projection error, and known from sketches.
    #[default]
    L2,
}

impl DctAdamW {
    /// Takes the r best directions into use, and moves the moments.
    fn select(&mut self, scores: Tensor<2>) -> Tensor<1, Int> {
        let new = kernels::top_columns(scores, self.rank);
        self.refreshes += 1;
        if let Some(old) = self.indices.replace(new.clone()) {
            let sources = Sources::of(&new, old);
            if let Some((m, v)) = self.moments.take_if(|_| self.config.rotate_subspace) {
                let axis = rank_axis(self.side);
                self.moments = Some((sources.moved(m, axis), sources.moved(v, axis)));
            }
            self.kept = Some(sources.is_kept.sum());
        }
        new
    }

    /// Selects from a gradient and returns its projection, which is a part of the same product.
    pub(super) fn select_dense(&mut self, gradient: &Tensor<2>) -> Tensor<2> {
        let started = Instant::now();
        let device = gradient.device();
        let q = self.bases.get(self.size(), &device);
        let all = match self.side {
            Side::Output => kernels::gemm(gradient.clone(), q, None, 1.0),
            _ => kernels::gemm(q.transpose(), gradient.clone(), None, 1.0),
        };
        let weighted = if self.config.score == Score::L1 { all.clone().abs() } else { all.clone().square() };
        let chosen = self.select(weighted.sum_dim(1 - rank_axis(self.side)));
        self.seconds += started.elapsed().as_secs_f64();
        all.select(rank_axis(self.side), chosen)
    }

    /// Selects from the factors of a micro batch.
    pub(super) fn select_from_factors(&mut self, x: &Tensor<2>, dy: &Tensor<2>) {
        let started = Instant::now();
        let scores = self.factor_scores(x, dy);
        self.select(scores);
        self.seconds += started.elapsed().as_secs_f64();
    }

    /// `||q_j^T x^T dy||^2` (output side: `||x^T dy q_j||^2`) for every direction, exactly or by a sketch.
    pub(super) fn factor_scores(&self, x: &Tensor<2>, dy: &Tensor<2>) -> Tensor<2> {
        let [m, n] = self.dims;
        let tokens = x.dims()[0];
        // From here on as on the input side: `inside` has the columns that Q meets.
        let (inside, outside) = if self.side == Side::Output { (dy, x) } else { (x, dy) };
        let q = self.bases.get(self.size(), &x.device());
        if tokens * (m + n) < m * n {
            let turned = kernels::gemm(inside.clone(), q, None, 1.0);
            let gram = kernels::gemm(outside.clone(), outside.clone().transpose(), None, 1.0);
            (turned.clone() * kernels::gemm(gram, turned, None, 1.0)).sum_dim(0)
        } else {
            let name = format!("{} dct {}", self.name, self.refreshes);
            let deviation = (1.0 / SKETCH as f64).sqrt();
            let start = linalg::gaussian(self.seed, &name, outside.dims()[1], SKETCH, deviation, &x.device());
            let thin = kernels::gemm(outside.clone(), start, None, 1.0);
            let sketch = kernels::gemm(inside.clone().transpose(), thin, None, 1.0);
            kernels::gemm(q.transpose(), sketch, None, 1.0).square().sum_dim(1)
        }
    }
}

/// Where the directions of a selection were in the one before.
pub(super) struct Sources {
    /// Places, 0 where there was none.
    places: Tensor<1, Int>,
    /// 1 where there was one, else 0; `[r, 1]`.
    pub(super) is_kept: Tensor<2, Int>,
}

impl Sources {
    pub(super) fn of(new: &Tensor<1, Int>, old: Tensor<1, Int>) -> Self {
        let (r, device) = (new.dims()[0], new.device());
        let same = new.clone().reshape([r, 1]).expand([r, r]).equal(old.reshape([1, r]).expand([r, r]));
        let same = same.int().cast(IntDType::I32); // at most one 1 a row
        let place = Tensor::<1, Int>::arange(0..r as i64, (&device, DType::I32)).reshape([1, r]).expand([r, r]);
        Self { places: (same.clone() * place).sum_dim(1).reshape([r]), is_kept: same.sum_dim(1) }
    }

    /// `O^T M`: the rows (axis 0) or columns of M at their new places, 0 where there is no source.
    pub(super) fn moved(&self, moment: Tensor<2>, axis: usize) -> Tensor<2> {
        let dims = moment.dims();
        let mut wide = [1, 1];
        wide[axis] = dims[axis];
        let is_new = self.is_kept.clone().reshape(wide).equal_scalar(0).expand(dims);
        moment.select(axis, self.places.clone()).mask_fill(is_new, 0.0f32)
    }
}
