//! The adapter methods: one file each, one row in [`METHODS`].
//!
//! A method decides how the factors of a [`LowRank`](crate::LowRank) start and which of them are trained; the forward and the
//! backward are shared.

pub mod lora;

/// Name (its config key and file), paper, trainable parameters of one projection.
pub const METHODS: &[(&str, &str, &str)] =
    &[("lora", "LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732", "r (d_in + d_out)")];
