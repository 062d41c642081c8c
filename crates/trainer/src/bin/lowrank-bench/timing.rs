//! Time of work that a device does later than it is asked to.

use std::time::Instant;

use anyhow::{Context, anyhow};
use burn::tensor::Device;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Calls before anything counts: tuning, compilation, first pages.
    pub warmup: usize,
    /// Windows that are timed; the median counts.
    pub windows: usize,
    /// A window has as many calls as fill this time, so that waiting for the device is a small part of it.
    pub window_seconds: f64,
}

impl Effort {
    /// For the tables.
    pub const FULL: Self = Self { warmup: 3, windows: 15, window_seconds: 0.01 };
    /// For a look at whether everything runs.
    pub const QUICK: Self = Self { warmup: 1, windows: 3, window_seconds: 0.001 };
}

/// Seconds of one call.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Timing {
    /// # Errors
    /// There is none.
    pub fn of(mut seconds: Vec<f64>) -> anyhow::Result<Self> {
        seconds.sort_by(f64::total_cmp);
        let (min, max) = seconds.first().zip(seconds.last()).context("nothing was timed")?;
        Ok(Self { median: seconds[seconds.len() / 2], min: *min, max: *max })
    }
}

/// Waits until the device has done everything.
///
/// # Errors
/// Some of it failed.
pub fn wait(device: &Device) -> anyhow::Result<()> {
    device.sync().map_err(|error| anyhow!("the device failed: {error:?}"))
}

/// Times `call`. What it returns is kept until the end of a window, at most `keep` of it: a lazy backend could otherwise leave
/// out what nobody reads.
///
/// # Errors
/// The device failed.
pub fn time<T>(device: &Device, effort: Effort, keep: usize, mut call: impl FnMut() -> T) -> anyhow::Result<Timing> {
    let keep = keep.max(1);
    let mut window = |calls: usize| {
        let mut kept = Vec::with_capacity(keep.min(calls));
        let started = Instant::now();
        for i in 0..calls {
            let result = call();
            match i < keep {
                true => kept.push(result),
                false => kept[i % keep] = result,
            }
        }
        wait(device)?;
        anyhow::Ok(started.elapsed().as_secs_f64() / calls as f64)
    };
    let mut one = 0.0;
    for _ in 0..effort.warmup.max(1) {
        one = window(1)?;
    }
    let calls = ((effort.window_seconds / one.max(1e-7)) as usize).clamp(1, 500);
    Timing::of((0..effort.windows).map(|_| window(calls)).collect::<anyhow::Result<_>>()?)
}
