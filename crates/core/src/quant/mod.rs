//! Quantisation of optimiser states and weights, on host slices.
//!
//! | module | what it holds | bits a value |
//! | --- | --- | --- |
//! | [`dynamic8`] | the dynamic 8-bit maps with one scale per block (arXiv 2110.02861) | `8 + 32 / block` |
//! | [`adam8`] | an Adam step on moments that are kept in that form | |
//! | [`groups`] | asymmetric int8 and int4, scale and zero point per group (arXiv 2407.08296) | `bits + 40 / group` |
//! | [`nf4`] | NF4 and FP4, with double quantisation (arXiv 2305.14314) | `4 + 32 / block`, 4.127 |
//! | [`packed`] | any of the last two as a weight on a device | |

pub mod adam8;
pub mod dynamic8;
pub mod groups;
pub mod nf4;
pub mod packed;

pub use adam8::{Adam8, Moments8};
pub use dynamic8::{Blockwise8, Map};
pub use groups::{Groups, Rounding};
pub use lowrank_kernels::packed::Format;
pub use nf4::{Blockwise4, Codebook, Scale4};
pub use packed::{Quantisation, QuantiseError};

use std::ops::Range;

/// Runs `work` on runs of whole blocks of an array, one run a thread; results in order.
pub(crate) fn over_blocks<T: Send>(len: usize, block: usize, work: impl Fn(Range<usize>) -> T + Send + Sync) -> Vec<T> {
    /// Below this, threads cost more than they save.
    const LEAST: usize = 1 << 16;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(len / LEAST).max(1);
    let each = len.div_ceil(block).div_ceil(threads).max(1) * block;
    let ranges = (0..threads).map(|i| (i * each).min(len)..((i + 1) * each).min(len));
    if threads == 1 {
        return ranges.map(work).collect();
    }
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranges.map(|range| scope.spawn(move || work(range))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause)))
            .collect()
    })
}
