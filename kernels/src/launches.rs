//! How many kernels a program launches.
//!
//! CubeCL calls an observer for every launch on the thread that issues it. Counting costs an atomic addition; nothing is timed.

#[cfg(feature = "gpu")]
mod observed {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use cubecl_runtime::logging::{LaunchObservation, LaunchObserver};

    #[derive(Debug, Default)]
    struct Counter(AtomicU64);

    impl LaunchObserver for Counter {
        fn launched(&self, _kernel: &'static str) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts the launches of the whole process for as long as it lives.
    #[derive(Debug)]
    pub struct Launches {
        counter: Arc<Counter>,
        _observation: LaunchObservation,
    }

    impl Launches {
        /// Begins to count. Only one counter counts at a time: a second one takes over until it is dropped.
        pub fn watch() -> Option<Self> {
            let counter = Arc::new(Counter::default());
            Some(Self { _observation: LaunchObservation::new(counter.clone()), counter })
        }

        /// Launches since then.
        pub fn count(&self) -> u64 {
            self.counter.0.load(Ordering::Relaxed)
        }
    }
}

#[cfg(not(feature = "gpu"))]
mod observed {
    /// Counts launches; a build without graphics cards has none.
    #[derive(Debug)]
    pub struct Launches;

    impl Launches {
        /// Nothing to count.
        pub fn watch() -> Option<Self> {
            None
        }

        /// None.
        pub fn count(&self) -> u64 {
            0
        }
    }
}

pub use observed::Launches;
