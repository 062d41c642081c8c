//! The memory of a refresh: a new basis from the factors of a gradient, from its sum, or from an exact SVD.

use lowrank_core::optim::Side;

use super::ledger::{Buffer, Category};
use super::matrices::Matrix;
use super::methods::{Kind, Rule};

impl Matrix {
    /// A basis from the factors by subspace iteration.
    pub(super) fn find_basis(&mut self, t: usize) {
        let Kind::Galore { oversampling, power_iterations, .. } = self.method.kind else { return };
        let [m, n] = self.dims;
        // `out` is the side that the directions belong to.
        let (out, other) = if self.method.side == Side::Output { (n, m) } else { (m, n) };
        let l = (self.method.rank + oversampling).min(m).min(n);
        let warm = self.moments.is_some() && self.method.side != Side::Both;
        let iterations = power_iterations.saturating_sub(usize::from(warm));
        let block = |rows: usize| self.at.scratch(4 * rows * l);
        let start = if warm { self.warm_start(other, l) } else { block(other) };
        let thin = block(t);
        drop(start);
        let mut y = self.orthonormal(block(out), out, l);
        drop(thin);
        for _ in 0..iterations {
            let (thin, z) = (block(t), block(other));
            drop((thin, y));
            let z = self.orthonormal(z, other, l);
            let thin = block(t);
            drop(z);
            y = self.orthonormal(block(out), out, l);
            drop(thin);
        }
        let thin = block(t);
        let small = block(other);
        drop(thin);
        let magnitudes = block(other);
        drop(magnitudes);
        let scaled = block(other);
        let squares = self.at.scratch(76 * l * l); // eigenvectors on the host in f64
        drop((scaled, squares));
        let basis = self.at.scratch(4 * out * self.method.rank);
        let coordinates = self.at.scratch(4 * other * self.method.rank);
        drop((y, small));
        drop(self.at.scratch(12 * out * self.method.rank)); // signs, on the host in f64
        let right = (self.method.side == Side::Both).then(|| {
            let copy = self.at.scratch(4 * n * self.method.rank);
            self.orthonormal(copy, n, self.method.rank)
        });
        drop(coordinates);
        self.install(basis, right);
    }

    /// The momentum's directions, made orthonormal, beside Gaussian columns.
    fn warm_start(&self, rows: usize, l: usize) -> Buffer {
        let momentum = match self.method.rule {
            Rule::AdamW8bit { .. } => Some(self.at.scratch(4 * rows * self.method.rank)), // dequantised
            _ => None,
        };
        let directions = self.at.scratch(4 * rows * self.method.rank);
        let fresh = self.at.scratch(4 * rows * (l - self.method.rank.min(l)));
        let block = self.at.scratch(4 * rows * l);
        drop((momentum, directions, fresh));
        block
    }

    /// Orthonormal columns in two passes; the block stays until both are done. The factor of the Gram matrix is made on the
    /// host in f64.
    fn orthonormal(&self, block: Buffer, rows: usize, l: usize) -> Buffer {
        drop(self.at.scratch(48 * l * l));
        let first = self.at.scratch(4 * rows * l);
        let second = self.at.scratch(4 * rows * l);
        drop((first, block));
        second
    }

    /// Takes a basis into use: signs, codes, the sketch of the norm.
    fn install(&mut self, basis: Buffer, right: Option<Buffer>) {
        let [m, n] = self.dims;
        let Kind::Galore { aligns, deferred, .. } = self.method.kind else { return };
        let rank = self.method.rank;
        let is_output = self.method.side == Side::Output;
        let rows = if is_output { n } else { m };
        let old = if self.has_basis() { self.values(|matrix, _| matrix.method.rank) } else { None };
        let signs = if aligns && self.has_basis() { 4 } else { 12 };
        drop(self.at.scratch(signs * rows * rank));
        if self.codes().is_some() {
            drop(self.at.scratch(5 * rows * rank)); // in the order of the codes, and these
        }
        if deferred && let Some(pending) = self.beside.take() {
            self.retired.push(pending); // merged in this step's update
            self.retired.extend(self.left.take());
        }
        let widened = |rows: usize, basis: Buffer| {
            let further = self.columns(rows) - rank;
            let sketch = self.at.scratch(4 * rows * further);
            let bytes = match self.codes() {
                Some(codes) => codes.bytes(rows * rank) + 4 * rows * further,
                None => 4 * rows * (rank + further),
            };
            let held = self.at.ledger.take(Category::Projector, bytes);
            drop((basis, sketch));
            held
        };
        let first = widened(rows, basis);
        let second = right.map(|right| widened(n, right));
        drop(old);
        (self.left, self.right) = if is_output { (None, Some(first)) } else { (Some(first), second) };
    }

    /// Scores of all DCT directions.
    pub(super) fn score_columns(&mut self, t: usize) {
        let [m, n] = self.dims;
        let d = if self.method.side == Side::Output { n } else { m };
        match t * (m + n) < m * n {
            true => drop((self.at.scratch(8 * t * d), self.at.scratch(4 * t * t))),
            false => drop(self.at.scratch(4 * 32 * (m + n + t + d))),
        }
    }

    pub(super) fn add_to_sketch(&mut self, t: usize) {
        let Kind::Galore { oversampling, .. } = self.method.kind else { return };
        let [m, n] = self.dims;
        let l = (self.method.rank + oversampling).min(m).min(n);
        let _thin = self.at.scratch(4 * t * l);
        if self.is_due && self.sketch.is_empty() {
            let sides = if self.method.side == Side::Both { 2 } else { 1 };
            for _ in 0..sides {
                self.sketch.push(self.at.ledger.take(Category::Projector, 4 * l * (m + n)));
            }
        }
    }

    /// The basis of a lagged refresh.
    pub(super) fn finish_sketch(&mut self) {
        let Kind::Galore { oversampling, .. } = self.method.kind else { return };
        let [m, n] = self.dims;
        let rows = if self.method.side == Side::Output { n } else { m };
        let l = (self.method.rank + oversampling).min(m).min(n);
        if matches!(self.method.kind, Kind::Galore { deferred: true, .. }) {
            self.beside = None; // merged before the basis changes
        }
        let sketch = std::mem::take(&mut self.sketch);
        let found = self.orthonormal(self.at.scratch(0), rows, l);
        let basis = self.at.scratch(4 * rows * self.method.rank);
        drop((sketch, found));
        let right = (self.method.side == Side::Both).then(|| self.at.scratch(4 * n * self.method.rank));
        self.install(basis, right);
    }

    /// An SVD of the dense gradient on the host.
    pub(super) fn exact_basis(&mut self) {
        let ([m, n], rank) = (self.dims, self.method.rank);
        drop(self.at.scratch(svd_bytes(m, n)));
        let part = |rows: usize| self.at.scratch(4 * rows * rank);
        let (left, right) = (part(m), part(n));
        if let Kind::Galore { .. } = self.method.kind {
            match self.method.side {
                Side::Input => self.install(left, None),
                Side::Output => self.install(right, None),
                Side::Both => self.install(left, Some(right)),
            }
        } else {
            self.keep_one_side();
        }
    }

    /// The basis of a method that has one side.
    pub(super) fn keep_one_side(&mut self) {
        let [m, n] = self.dims;
        let (slot, rows) = match self.method.side {
            Side::Output => (&mut self.right, n),
            _ => (&mut self.left, m),
        };
        *slot = Some(self.at.ledger.take(Category::Projector, 4 * rows * self.method.rank));
    }

    /// LDAdam's basis of the next step, and what its change takes.
    pub(super) fn follow_basis(&mut self) {
        let ([m, n], r) = (self.dims, self.method.rank);
        let (rows, other) = if self.method.side == Side::Output { (n, m) } else { (m, n) };
        let y = self.at.scratch(8 * other * r);
        let image = self.at.scratch(4 * rows * r);
        let found = self.orthonormal(image, rows, r);
        drop(y);
        let moments = self.at.scratch(16 * other * r); // rotated, beside the old ones
        self.keep_one_side();
        drop((found, moments));
    }
}

/// Host memory of an exact SVD of an f32 matrix: its values, twice in f64, and what faer's thin decomposition holds: a square
/// problem with its workspace, after a QR decomposition where the matrix is far from square (measured: 9.1 to 9.4 `k^2`).
fn svd_bytes(m: usize, n: usize) -> usize {
    let k = m.min(n);
    let is_long = 6 * m.max(n) > 11 * k;
    20 * m * n + 8 * (if is_long { 2 * m * n } else { 0 } + 46 * k * k / 5)
}
