//! The kernels in CubeCL: one source for CUDA C++, PTX, SPIR-V, WGSL and MSL.
//!
//! | kernel | file | work per cube |
//! | --- | --- | --- |
//! | gated forward, backward | `gated.rs` | elementwise |
//! | RMS norm forward, backward | `rms_norm.rs` | one row |
//! | dequantising a panel | `codes.rs` | elementwise |
//! | products with one thin side, dense or packed | `thin/` | a tile of the large matrix |
//!
//! Every kernel computes in f32 whatever the tensors' type and writes each output once. A launcher checks shapes, so that the
//! kernel does not. Kernels are opaque to Burn's fusion; that is why only those are here that a fused reference cannot match.

mod backend;
mod codes;
mod gated;
mod launch;
mod rms_norm;
mod thin;
