//! Optimisers: one file each, one row in [`METHODS`]. They see every parameter as a matrix and know it by name.

pub mod adamw;
pub mod schedule;

pub use adamw::{AdamW, AdamWConfig};
pub use schedule::{Schedule, ScheduleKind};

/// Name (its config key and file), paper, state bytes per trained value.
pub const METHODS: &[(&str, &str, &str)] = &[("adamw", "AdamW, arXiv 1711.05101, as torch.optim.AdamW", "8")];
