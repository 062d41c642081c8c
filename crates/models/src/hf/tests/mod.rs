//! Tests of the Hugging Face formats, one file for each module.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chat;
mod checkpoint;
mod hub;
mod peft;
mod tokenizer;
mod write;

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A folder of the committed reference results.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens").join(name)
}

fn temp() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Writes files into a folder.
fn put(folder: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        std::fs::write(folder.join(name), text).unwrap();
    }
}

/// The text of the error that is expected.
fn text_of<T>(result: Result<T, super::HfError>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

/// All of `parts` are in `text`.
#[track_caller]
fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}
