//! LoRA: Low-Rank Adaptation (arXiv 2106.09685), with the rsLoRA scale (arXiv 2312.03732).
//!
//! `y = x W + b + s (D(x) A) B`, `s = alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
//!
//! | paper | field | shape |
//! | --- | --- | --- |
//! | A (transposed) | `down` | `[d_in, r]` |
//! | B (transposed) | `up` | `[r, d_out]` |
//!
//! Trained: A and B, `r (d_in + d_out)` values. Start: `A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))` (Kaiming uniform with a = sqrt 5, as
//! peft), `B = 0`, so the first output is the base's to the bit. An embedding starts the other way round: A zero, B normal.

use burn::tensor::{Device, Tensor};

use crate::LowRank;
use crate::random::Stream;

/// How A starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraInit {
    /// Uniform within `1 / sqrt(d_in)`.
    #[default]
    KaimingUniform,
    /// Normal with deviation `1 / r`.
    Gaussian,
}

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// Rank, at least 1.
    pub r: usize,
    /// s.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
    /// How A starts.
    pub init: LoraInit,
}

impl Lora {
    /// `alpha / r`, or `alpha / sqrt(r)`.
    ///
    /// ```
    /// use lowrank_core::adapters::lora::Lora;
    /// assert_eq!(Lora::scale(32.0, 16, false), 2.0);
    /// assert_eq!(Lora::scale(32.0, 16, true), 8.0);
    /// ```
    pub fn scale(alpha: f64, r: usize, rank_stabilised: bool) -> f32 {
        let r = r as f64;
        (alpha / if rank_stabilised { r.sqrt() } else { r }) as f32
    }

    /// The delta of a `[d_in, d_out]` projection.
    pub fn init(&self, d_in: usize, d_out: usize, stream: Stream, device: &Device) -> LowRank {
        let down = match self.init {
            LoraInit::KaimingUniform => stream.uniform_tensor(d_in, self.r, 1.0 / (d_in as f64).sqrt(), device),
            LoraInit::Gaussian => stream.normal_tensor(d_in, self.r, 1.0 / self.r as f64, device),
        };
        LowRank::new(down, Tensor::zeros([self.r, d_out], device), self.scale, self.dropout)
    }

    /// The delta of a `[vocab, dim]` embedding; it has no dropout.
    pub fn init_embedding(&self, vocab: usize, dim: usize, stream: Stream, device: &Device) -> LowRank {
        let up = stream.normal_tensor(self.r, dim, 1.0, device);
        LowRank::new(Tensor::zeros([vocab, self.r], device), up, self.scale, 0.0)
    }
}
