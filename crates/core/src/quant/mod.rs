//! Quantisation of optimiser states and trained weights, on host slices.
//!
//! | module | what it holds | bits a value |
//! | --- | --- | --- |
//! | [`dynamic8`] | the dynamic 8-bit maps with one scale per block (arXiv 2110.02861) | `8 + 32 / block` |
//! | [`adam8`] | an Adam step on moments that are kept in that form | |
//! | [`groups`] | asymmetric int8 and int4, scale and zero point per group (arXiv 2407.08296) | `bits + 40 / group` |

pub mod adam8;
pub mod dynamic8;
pub mod groups;

pub use adam8::{Adam8, Moments8};
pub use dynamic8::{Blockwise8, Map};
pub use groups::{Groups, Rounding};
