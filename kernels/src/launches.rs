//! How many kernels a program launches, and which.
//!
//! CubeCL calls an observer for every launch on the thread that issues it. Counting costs a lock that nobody else holds; nothing
//! is timed.

#[cfg(feature = "gpu")]
mod observed {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

    use cubecl_runtime::logging::{LaunchObservation, LaunchObserver};

    #[derive(Debug, Default)]
    struct Counter(Mutex<BTreeMap<&'static str, u64>>);

    impl Counter {
        fn counts(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl LaunchObserver for Counter {
        fn launched(&self, kernel: &'static str) {
            *self.counts().entry(kernel).or_default() += 1;
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
            self.counter.counts().values().sum()
        }

        /// Launches since then by the name of the kernel's type.
        pub fn by_kernel(&self) -> BTreeMap<&'static str, u64> {
            self.counter.counts().clone()
        }
    }
}

#[cfg(not(feature = "gpu"))]
mod observed {
    use std::collections::BTreeMap;

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

        /// None.
        pub fn by_kernel(&self) -> BTreeMap<&'static str, u64> {
            BTreeMap::new()
        }
    }
}

pub use observed::Launches;
