//! The kernels in CubeCL: one source for CUDA C++, PTX, SPIR-V, WGSL and MSL.
//!
//! | kernel | file | work per cube |
//! | --- | --- | --- |
//! | 8-bit Adam step | `adam8.rs` | one block of values |
//! | AdamW step of several tensors | `adamw.rs` | elementwise |
//! | cross-entropy with its gradient | `cross_entropy.rs` | one row |
//! | gated forward, backward | `gated.rs` | elementwise |
//! | sums, of squares or values, of several tensors | `reduce.rs` | a share of the values |
//! | RMS norm forward, backward | `rms_norm.rs` | one row |
//! | attention by chunks: softmax, its backward | `attention/chunks.rs` | one row of scores |
//! | attention by tiles: forward, two backward | `attention/tiles_*.rs` | one tile of queries or keys |
//! | rotary embedding, both ways | `rotary.rs` | elementwise |
//! | stochastic rounding | `stochastic_round.rs` | elementwise |
//! | values to codes in groups | `groups.rs` | four groups |
//! | largest of some scores | `top_columns.rs` | 32 of them |
//! | dequantising a panel | `codes.rs` | elementwise |
//! | products with one thin side, dense or packed | `thin/` | a tile of the large matrix |
//!
//! Every kernel computes in f32 whatever the tensors' type and writes each output once. A launcher checks shapes, so that the
//! kernel does not. Kernels are opaque to Burn's fusion; that is why only those are here that a fused reference cannot match.

mod adam8;
mod adamw;
mod attention;
mod backend;
#[cfg(all(test, feature = "codegen"))]
mod codegen;
mod codes;
mod cross_entropy;
mod gated;
mod groups;
mod launch;
mod reduce;
mod rms_norm;
mod rotary;
mod stochastic_round;
mod thin;
mod top_columns;
