//! What the optimiser holds and needs for one matrix `[m, n]`: bases, moments, and the memory of a refresh and of a step.
//!
//! | method | keeps, on the input side | gradient | refresh |
//! | --- | --- | --- | --- |
//! | AdamW | `8 m n` bytes | `m n` | |
//! | GaLore | basis `4 m (r + s)`, in codes where it is quantised, moments of R | `[r + s, n]`, dense with `exact` | blocks of `[m, l]`, `[n, l]`, `[t, l]`; an SVD in f64 with `exact` |
//! | DCT-AdamW | moments of R; one `[d, d]` basis for all of a size; E with error feedback | `m n`, or `[r, n]` | two of `m n` |
//! | APOLLO | P, moments of R | `m n` | |
//! | Fira | P, moments of R | `m n` | an SVD in f64 |
//! | intrinsic dimension | a Fastfood map, 12 L bytes for L = `m n` up to a power of two | nothing | |
//! | LDAdam | P, moments of R, E | `m n` | blocks of `[m, r]`, `[n, r]` every step |
//!
//! l is the rank with oversampling, s the columns that estimate the norm. A method asks for what the backward pass shall hand
//! over ([`Collect`]), sees factors where it asked for them, and steps.

use lowrank_core::optim::Side;

use super::layers::{Collect, Directions};
use super::ledger::{Buffer, Category};
use super::methods::{Kind, Method, Store};
use super::model::Format;
use super::operations::{Operations, Read};

/// The coming step of one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Dense,
    Projected,
    Factors,
    RefreshNow,
    RefreshLagged,
}

/// A matrix with what is held for it.
#[derive(Debug)]
pub struct Matrix {
    pub(super) method: Method,
    pub(super) dims: [usize; 2],
    pub(super) at: Operations,
    pub(super) left: Option<Buffer>,
    pub(super) right: Option<Buffer>,
    pub(super) moments: Option<Buffer>,
    /// E, or an update that is not yet in the weight.
    pub(super) beside: Option<Buffer>,
    /// Start blocks and sums of a lagged refresh.
    pub(super) sketch: Vec<Buffer>,
    /// A waiting update in the coordinates of the basis before, and that basis.
    pub(super) retired: Vec<Buffer>,
    pub(super) plan: Plan,
    pub(super) is_due: bool,
}

impl Matrix {
    /// Nothing is held yet.
    pub fn new(method: Method, dims: [usize; 2], at: &Operations) -> Self {
        // The map of a random subspace is there from the start: gains, and a permutation both ways.
        let is_mapped = method.kind == Kind::Intrinsic;
        let map = is_mapped.then(|| at.ledger.take(Category::Projector, 12 * padded(dims)));
        Self {
            method,
            dims,
            at: at.clone(),
            left: map,
            right: None,
            moments: None,
            beside: None,
            sketch: vec![],
            retired: vec![],
            plan: Plan::Dense,
            is_due: false,
        }
    }

    /// `[m, n]`.
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    pub(super) fn has_basis(&self) -> bool {
        self.left.is_some() || self.right.is_some() || self.moments.is_some()
    }

    /// Whether step `number` of a run (from 0) refreshes this matrix, once it has a basis.
    pub fn refreshes_at(method: &Method, number: u64) -> bool {
        match method.kind {
            Kind::Galore { .. } => (number + method.offset).is_multiple_of(method.gap),
            Kind::Dct { .. } => (number + 1).is_multiple_of(method.gap),
            Kind::Apollo | Kind::Fira => number.is_multiple_of(method.gap),
            Kind::LdAdam { .. } => true,
            Kind::Intrinsic => false,
        }
    }

    /// Columns of what is collected on a side of length `rows`.
    pub(super) fn columns(&self, rows: usize) -> usize {
        match self.method.kind {
            Kind::Galore { sketch, .. } => self.method.rank + sketch.min(rows - self.method.rank),
            _ => self.method.rank,
        }
    }

    /// Sizes of R.
    fn low(&self) -> [usize; 2] {
        let ([m, n], r) = (self.dims, self.method.rank);
        match self.method.side {
            Side::Input => [r, n],
            Side::Output => [m, r],
            Side::Both => [r, r],
        }
    }

    /// Sizes of what is collected of the gradient.
    fn collected(&self) -> [usize; 2] {
        let [m, n] = self.dims;
        match (self.plan, self.method.side) {
            (Plan::Dense, _) => [m, n],
            (_, Side::Input) => [self.columns(m), n],
            (_, Side::Output) => [m, self.columns(n)],
            (_, Side::Both) => [self.columns(m), self.columns(n)],
        }
    }

    /// What the backward passes of step `number` shall hand over; none for the dense gradient.
    pub fn collect(&mut self, number: u64, micro_batches: usize) -> Option<Collect> {
        self.is_due = !self.has_basis() || Self::refreshes_at(&self.method, number);
        self.plan = match self.method.kind {
            Kind::Galore { exact: true, .. } => Plan::Dense,
            Kind::Galore { norm_from_factors: true, .. } if !self.is_due => Plan::Factors,
            Kind::Galore { .. } if !self.is_due => Plan::Projected,
            Kind::Galore { dense: true, .. } if micro_batches > 1 => Plan::Dense,
            Kind::Galore { lagged: true, .. } if micro_batches > 1 && self.has_basis() => Plan::RefreshLagged,
            Kind::Galore { .. } => Plan::RefreshNow,
            Kind::Intrinsic => Plan::Factors,
            Kind::Dct { projected: true, .. } if self.is_due => Plan::RefreshNow,
            Kind::Dct { projected: true, .. } => Plan::Projected,
            _ => Plan::Dense,
        };
        let [m, n] = self.dims;
        match self.plan {
            Plan::Dense => None,
            Plan::Projected => Some(Collect::Projected {
                left: self.held(&self.left, Side::Output, m),
                right: self.held(&self.right, Side::Input, n),
                // With rows of zeros for the columns of the norm's sketch.
                pending: self.pending().map(|_| self.at.ledger.take(Category::Projector, 4 * self.columns(m) * n)),
            }),
            _ => Some(Collect::Factors { pending: self.pending().map(|_| self.method.rank) }),
        }
    }

    /// The basis of a side as a layer gets it; `unless` is the side of methods without one. DCT gathers its columns anew.
    fn held(&self, basis: &Option<Buffer>, unless: Side, rows: usize) -> Option<Directions> {
        if self.method.side == unless {
            return None;
        }
        let columns = self.columns(rows);
        let gathered = || self.at.ledger.take(Category::Projector, 4 * rows * columns);
        let held = basis.clone().unwrap_or_else(gathered);
        let is_quantised = self.codes().is_some();
        let made = if is_quantised || self.at.width < 4 { self.at.width * rows * columns } else { 0 };
        // The basis by itself, before the columns of the norm's sketch come to it.
        let making = if is_quantised { self.at.width * rows * self.method.rank } else { 0 };
        Some(Directions { held, columns, made, making })
    }

    /// The codes that the basis is held in.
    pub(super) fn codes(&self) -> Option<Format> {
        match self.method.kind {
            Kind::Galore { quantised, .. } => quantised,
            _ => None,
        }
    }

    /// Values in f32 of a basis that is held as codes, with so many columns.
    pub(super) fn values(&self, columns: fn(&Self, usize) -> usize) -> Option<Buffer> {
        self.codes()?;
        let [m, n] = self.dims;
        let side = |rows: usize| 4 * rows * columns(self, rows);
        Some(self.at.scratch(match self.method.side {
            Side::Input => side(m),
            Side::Output => side(n),
            Side::Both => side(m) + side(n),
        }))
    }

    /// Updates that are not yet in the weight.
    fn pending(&self) -> Option<&Buffer> {
        self.beside.as_ref().filter(|_| matches!(self.method.kind, Kind::Galore { deferred: true, .. }))
    }

    /// Sees the factors of one micro batch; returns what it collects of them.
    pub fn observe(&mut self, t: usize, x: &Buffer, dy: &Buffer) -> Buffer {
        let [m, n] = self.dims;
        if self.method.kind == Kind::Intrinsic {
            let dense = self.at.product_f32([m, t, n], Read::Transposed, Category::Workspace);
            drop(self.at.scratch(3 * 4 * padded(self.dims)));
            drop(dense);
            return self.at.ledger.take(Category::Gradients, 4);
        }
        // Factors are handed over in f32.
        let wide = (self.at.width < 4).then(|| self.at.scratch(4 * (x.bytes() + dy.bytes()) / self.at.width));
        match (self.plan, self.method.kind) {
            (Plan::RefreshNow, Kind::Galore { .. }) if self.is_due => self.find_basis(t),
            (Plan::RefreshNow, _) if self.is_due => self.score_columns(t),
            (Plan::RefreshLagged, _) => self.add_to_sketch(t),
            _ => {}
        }
        self.is_due = self.is_due && self.plan == Plan::RefreshLagged;
        let [p, q] = self.collected();
        let bases = self.values(Self::columns);
        let rows = (p != m).then(|| self.at.scratch(4 * t * p));
        let columns = (q != n).then(|| self.at.scratch(4 * t * q));
        let collected = self.at.product_f32([p, t, q], Read::Transposed, Category::Gradients);
        drop((rows, columns, wide, bases));
        collected
    }

    /// A step with the collected gradient. `is_strided`: the weight still lies as on disk, so it is copied once.
    pub fn step(&mut self, collected: Buffer, is_strided: bool) {
        let [m, n] = self.dims;
        let values = m * n;
        if self.method.kind == Kind::Intrinsic {
            let _copy = is_strided.then(|| self.at.scratch(4 * values));
            return drop(self.at.scratch(3 * 4 * padded(self.dims)));
        }
        let wide = match self.method.store {
            Store::Bf16 if !self.keeps_weight() => Some(self.at.scratch(4 * values)),
            Store::Int8 { .. } => Some(self.at.scratch(4 * values)),
            _ if is_strided => Some(self.at.scratch(4 * values)),
            _ => None,
        };
        match self.method.kind {
            Kind::Galore { exact: true, .. } if self.is_due => self.exact_basis(),
            Kind::Galore { .. } if self.is_due && self.plan == Plan::Dense => self.exact_basis(),
            Kind::Fira if self.is_due => self.exact_basis(),
            Kind::LdAdam { .. } if !self.has_basis() => self.exact_basis(),
            Kind::LdAdam { .. } => self.follow_basis(),
            Kind::Apollo if self.is_due => self.keep_one_side(),
            Kind::Dct { .. } if self.is_due && self.plan == Plan::Dense => drop(self.at.scratch(8 * values)),
            _ => {}
        }
        let low = self.low();
        let projected = (self.plan == Plan::Dense).then(|| self.at.scratch(4 * low[0] * low[1]));
        let copied = (low != self.collected() && self.plan != Plan::Dense && self.method.side != Side::Input)
            .then(|| self.at.scratch(4 * low[0] * low[1]));
        if self.moments.is_none() {
            self.moments = Some(self.at.ledger.take(Category::Optimizer, self.method.rule.state(low)));
        }
        let update = self.at.scratch(self.method.rule.scratch(low));
        self.keep_beside();
        let basis = self.values(|matrix, _| matrix.method.rank);
        drop((projected, copied, update, collected, basis));
        self.retired.clear();
        if self.plan == Plan::RefreshLagged {
            self.finish_sketch();
        }
        let rounded = match self.method.store {
            Store::Bf16 if wide.is_some() => Some(self.at.scratch(6 * values)),
            // The values on the host; the codes of all threads, and one behind the other.
            Store::Int8 { .. } => Some(self.at.scratch(6 * values)),
            _ => None,
        };
        drop((wide, rounded));
    }

    fn keeps_weight(&self) -> bool {
        let waits = matches!(self.method.kind, Kind::Galore { deferred: true, .. });
        waits && self.retired.is_empty() && self.plan != Plan::RefreshLagged
    }

    /// E, or the update that waits.
    fn keep_beside(&mut self) {
        let ([m, n], [p, q]) = (self.dims, self.low());
        let bytes = match self.method.kind {
            Kind::Galore { deferred: true, .. } => 4 * p * q,
            Kind::Dct { error_feedback: true, .. } | Kind::LdAdam { error_feedback: true } => 4 * m * n,
            _ => return,
        };
        if self.beside.is_none() {
            self.beside = Some(self.at.ledger.take(Category::Projector, bytes));
        }
    }
}

/// L, what a Fastfood map works on.
fn padded([m, n]: [usize; 2]) -> usize {
    (m * n).next_power_of_two()
}
