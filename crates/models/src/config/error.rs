//! Why a `config.json` was refused.

use std::path::PathBuf;

/// Why a `config.json` was refused. Every message names the file, the key, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot read: {source}\nhint: base_model must be a folder with config.json, tokenizer.json and *.safetensors", origin.display())]
    Io {
        /// The file.
        origin: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The text is not JSON; the source has line and column.
    #[error("{}: not valid JSON: {source}\nhint: the file may be cut off; fetch the checkpoint again", origin.display())]
    Json {
        /// The file.
        origin: PathBuf,
        /// Reason, line and column.
        source: serde_json::Error,
    },
    /// The text is JSON, but not an object.
    #[error("{}: expected a JSON object, got {got}", origin.display())]
    NotAnObject {
        /// The file.
        origin: PathBuf,
        /// What stands there.
        got: String,
    },
    /// No family in the registry has this architecture.
    #[error(
        "{}: unknown architecture {} (model_type {})\nexpected one of:\n{known}\nhint: choose a base_model of one of these families",
        origin.display(), architecture.as_deref().unwrap_or("(none given)"), model_type.as_deref().unwrap_or("(none given)")
    )]
    UnknownArchitecture {
        /// The file.
        origin: PathBuf,
        /// First entry of `architectures`.
        architecture: Option<String>,
        /// `model_type`.
        model_type: Option<String>,
        /// One line per known family.
        known: String,
    },
    /// A key without which the model cannot be built is absent or null.
    #[error("{}: key `{key}` is missing: expected {expected}", origin.display())]
    Missing {
        /// The file.
        origin: PathBuf,
        /// The key, with the keys it is nested in (`rope_scaling.factor`).
        key: String,
        /// What should stand there.
        expected: String,
    },
    /// A key holds a value of a wrong type, or one that makes no model.
    #[error("{}: key `{key}`: expected {expected}, got {got}", origin.display())]
    Invalid {
        /// The file.
        origin: PathBuf,
        /// The key, with the keys it is nested in.
        key: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        got: String,
    },
    /// A key asks for something that exists but is not implemented here.
    #[error("{}: key `{key}`: {got} is not supported, expected {expected}\nhint: {hint}", origin.display())]
    Unsupported {
        /// The file.
        origin: PathBuf,
        /// The key, with the keys it is nested in.
        key: String,
        /// What is supported.
        expected: String,
        /// What stands there.
        got: String,
        /// What to do about it.
        hint: String,
    },
}
