//! Reference results made with torch, transformers and peft, and the harness that compares `lowrank` with them.
//!
//! `goldens/` of this crate holds the cases (its README has the format); [`goldens`] runs them through the public path:
//! checkpoint and adapter files in, the real training step, adapter files out.

pub mod goldens;
