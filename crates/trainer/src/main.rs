//! `lowrank-train`: see `lowrank-train --help`.

fn main() {
    keep_memory();
    let invocation = lowrank_train::cli::parse();
    lowrank_train::progress::init_logging(invocation.verbose);
    if let Err(error) = lowrank_train::commands::run(invocation.command) {
        let (text, code) = lowrank_train::error::report(&error);
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "{text}");
        std::process::exit(code);
    }
}

/// Lets glibc keep freed activations instead of returning them to the system: a training step allocates the same sizes again
/// and again, and fresh pages cost a fault each.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets tuning parameters, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}
