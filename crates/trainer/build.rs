//! Sets `LOWRANK_COMMIT` to the short hash of the commit being built, or to "unknown" outside a git checkout.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A path that does not exist would make cargo run this script on every build, so only existing ones are named.
    // `HEAD` changes on a checkout of another branch, `logs/HEAD` on every commit.
    for path in ["../../.git/HEAD", "../../.git/logs/HEAD"] {
        if Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    println!("cargo:rustc-env=LOWRANK_COMMIT={}", short_commit().unwrap_or_else(|| "unknown".to_owned()));
}

fn short_commit() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    if !output.status.success() {
        return None;
    }
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (!commit.is_empty()).then_some(commit)
}
