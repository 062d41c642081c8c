//! The mathematics of `lowrank` as Burn modules: projections, adapters, optimisers.
//!
//! | symbol | meaning | shape |
//! | --- | --- | --- |
//! | t | tokens of a micro batch | |
//! | W | weight of a projection | `[d_in, d_out]` |
//! | A, `down` | input factor | `[d_in, r]` |
//! | M, `core` | core, diagonal or dense | `[r, r]` |
//! | B, `up` | output factor | `[r, d_out]` |
//! | c, `out_scale` | output scale | `[d_out]` |
//! | s, `scale` | factor of the whole delta | |
//! | G, dW | gradient of W, `x^T dy` | `[d_in, d_out]` |
//! | P, `left`; Q, `right` | bases of a gradient's subspace | `[d_in, r]`, `[d_out, r]` |
//! | R | projected gradient, `P^T dW` formed as `(x P)^T dy` | `[r, d_out]` |
//!
//! Modules hold plain tensors and remember which of them are trained (Burn's `Param` keeps that flag); `Module::train` lifts a
//! copy of a segment onto the tape for the time of one backward pass. Trained parameters are f32, frozen ones have the type of
//! the run, and the arithmetic follows the type of the activations.

pub mod adapters;
pub mod base;
pub mod calibration;
pub mod conv;
pub mod delta;
pub mod diagnostics;
pub mod directions;
pub mod layer;
pub mod linalg;
pub mod lowrank;
pub mod optim;
pub mod projection;
pub mod quant;
pub mod random;

pub use base::Base;
pub use delta::Delta;
pub use directions::Directions;
pub use layer::{Layer, Sizes};
pub use lowrank::LowRank;
pub use projection::Projection;
