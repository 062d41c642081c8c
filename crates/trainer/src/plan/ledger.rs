//! Memory that is counted and not there: buffers with a size, a purpose and an owner.
//!
//! A [`Buffer`] lives as long as one of its handles, as a tensor does. The ledger adds up what lives and remembers the moment
//! of the most.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde::Serialize;

/// What memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// The base model in its storage types; in full training, what is trained.
    Weights,
    /// The factors of an adapter, trained and frozen, and modules that are trained beside it.
    Adapter,
    /// Gradients of parameters, summed over micro batches.
    Gradients,
    /// Moments of the optimiser.
    Optimizer,
    /// Bases of low-rank methods, and what they keep of the gradient outside.
    Projector,
    /// What the forward pass leaves for the backward pass, with the inputs of the pass.
    Activations,
    /// Logits of one chunk of tokens, which become their own gradient.
    Logits,
    /// Temporaries: gradients of activations, scratch of products, steps of the optimiser, refreshes.
    Workspace,
}

impl Category {
    /// All of them, in the order of a table.
    pub const ALL: [Category; 8] = [
        Category::Weights,
        Category::Adapter,
        Category::Gradients,
        Category::Optimizer,
        Category::Projector,
        Category::Activations,
        Category::Logits,
        Category::Workspace,
    ];

    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Category::Weights => "weights",
            Category::Adapter => "adapter",
            Category::Gradients => "gradients",
            Category::Optimizer => "optimizer",
            Category::Projector => "projector",
            Category::Activations => "activations",
            Category::Logits => "logits",
            Category::Workspace => "workspace",
        }
    }
}

/// A part of a training step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Between two steps.
    #[default]
    Rest,
    /// Embedding and blocks.
    Forward,
    /// Logits and loss, forward and backward.
    Head,
    /// Backward through the blocks, with their second forward where they are rebuilt.
    Backward,
    /// Refreshes of subspaces from the factors of a gradient.
    Refresh,
    /// The optimiser's step.
    Update,
}

impl Phase {
    /// All of them, in the order of a step.
    pub const ALL: [Phase; 6] =
        [Phase::Rest, Phase::Forward, Phase::Head, Phase::Backward, Phase::Refresh, Phase::Update];

    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Rest => "between steps",
            Phase::Forward => "forward",
            Phase::Head => "head",
            Phase::Backward => "backward",
            Phase::Refresh => "refresh",
            Phase::Update => "update",
        }
    }
}

/// Bytes by category.
pub type Bytes = [u64; Category::ALL.len()];

#[derive(Debug, Default)]
struct Book {
    live: Bytes,
    phase: Phase,
    /// The moment of the most.
    peak: Bytes,
    peak_phase: Phase,
    /// The most of each phase, all categories together.
    phases: [u64; Phase::ALL.len()],
}

fn sum(bytes: &Bytes) -> u64 {
    bytes.iter().sum()
}

impl Book {
    fn note(&mut self) {
        let total = sum(&self.live);
        let phase = &mut self.phases[self.phase as usize];
        *phase = (*phase).max(total);
        if total >= sum(&self.peak) {
            (self.peak, self.peak_phase) = (self.live, self.phase);
        }
    }
}

/// The account of all buffers.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Rc<RefCell<Book>>);

impl Ledger {
    /// A new buffer.
    pub fn take(&self, category: Category, bytes: usize) -> Buffer {
        {
            let mut book = self.0.borrow_mut();
            book.live[category as usize] += bytes as u64;
            book.note();
        }
        Buffer(Rc::new(Piece { bytes: bytes as u64, category: Cell::new(category), book: self.0.clone() }))
    }

    /// What follows belongs to this phase. Returns the phase before.
    pub fn enter(&self, phase: Phase) -> Phase {
        let mut book = self.0.borrow_mut();
        let before = std::mem::replace(&mut book.phase, phase);
        book.note();
        before
    }

    /// Bytes by category at the moment of the most, and the phase it belongs to.
    pub fn peak(&self) -> (Bytes, Phase) {
        let book = self.0.borrow();
        (book.peak, book.peak_phase)
    }

    /// The most of a phase.
    pub fn most_of(&self, phase: Phase) -> u64 {
        self.0.borrow().phases[phase as usize]
    }

    /// Bytes by category now.
    pub fn live(&self) -> Bytes {
        self.0.borrow().live
    }
}

#[derive(Debug)]
struct Piece {
    bytes: u64,
    category: Cell<Category>,
    book: Rc<RefCell<Book>>,
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.book.borrow_mut().live[self.category.get() as usize] -= self.bytes;
    }
}

/// A handle to a buffer; the last one frees it.
#[derive(Clone, Debug)]
pub struct Buffer(Rc<Piece>);

impl Buffer {
    /// Whether this is the only handle, so that an operation may write into the buffer.
    pub fn is_unique(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }

    /// Files the buffer under another category.
    pub fn refile(&self, category: Category) {
        let mut book = self.0.book.borrow_mut();
        book.live[self.0.category.get() as usize] -= self.0.bytes;
        book.live[category as usize] += self.0.bytes;
        book.note();
        self.0.category.set(category);
    }

    /// What it is used for.
    pub fn category(&self) -> Category {
        self.0.category.get()
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.0.bytes as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_the_moment_of_the_most_and_not_the_sum() {
        let ledger = Ledger::default();
        let weights = ledger.take(Category::Weights, 100);
        ledger.enter(Phase::Forward);
        let shared = ledger.take(Category::Activations, 50);
        let other = shared.clone();
        drop(shared);
        assert!(other.is_unique());
        let scratch = ledger.take(Category::Workspace, 7);
        drop((other, scratch));
        ledger.enter(Phase::Update);
        let state = ledger.take(Category::Optimizer, 30);
        state.refile(Category::Projector);
        assert_eq!(ledger.peak(), ([100, 0, 0, 0, 0, 50, 0, 7], Phase::Forward));
        assert_eq!((ledger.most_of(Phase::Forward), ledger.most_of(Phase::Update)), (157, 130));
        assert_eq!(ledger.live(), [100, 0, 0, 0, 30, 0, 0, 0]);
        drop((weights, state));
        assert_eq!(ledger.live(), [0; 8]);
    }
}
