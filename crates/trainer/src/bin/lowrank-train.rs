//! `lowrank-train`: see `lowrank-train --help`.

fn main() {
    lowrank_train::device::prepare_process();
    let invocation = lowrank_train::cli::parse();
    lowrank_train::progress::init_logging(invocation.verbose);
    lowrank_train::shortage::quiet_shortages();
    if let Err(error) = lowrank_train::commands::run(invocation.command) {
        let (text, code) = lowrank_train::error::report(&error);
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "{text}");
        std::process::exit(code);
    }
}
