//! What can be wrong with training data.

use std::io::ErrorKind;
use std::path::PathBuf;

use lowrank_models::hf::HfError;

use super::record::BadRecord;
use crate::error::{Kind, Problem};

/// An error of reading, tokenising or loading data. [`Problem::from`] adds the hint and the exit code.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A setting of `[data]` is wrong.
    #[error("data.{key} {reason}")]
    Config {
        /// The key under `[data]`.
        key: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
    /// The operating system refused to read a file.
    #[error("cannot read {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file as a whole cannot be used.
    #[error("{}: {reason}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do about it.
        hint: String,
    },
    /// One record cannot be used, and `on_bad_record` is `error`.
    #[error("{location}: {bad}")]
    Record {
        /// File and line, or file and number of the record.
        location: String,
        /// Field and reason.
        bad: BadRecord,
    },
    /// Every record was skipped.
    #[error("no usable record: all {skipped} were skipped ({reasons})")]
    NothingLeft {
        /// How many records there were.
        skipped: u64,
        /// Why, with counts.
        reasons: String,
    },
    /// The tokenizer, the chat template or the hub failed.
    #[error(transparent)]
    HuggingFace(#[from] HfError),
    /// The thread that reads streamed data has failed.
    #[error("cannot read the training data: {reason}")]
    Stream {
        /// What happened to it.
        reason: String,
    },
    /// A saved position does not belong to this data and these settings.
    #[error("the data does not continue where the checkpoint stopped:{}", .differences.iter().map(|line| format!("\n  {line}")).collect::<String>())]
    Resume {
        /// One line for each thing that differs: name, value in the checkpoint, value now.
        differences: Vec<String>,
    },
}

impl DataError {
    /// Who has to act: a wrong setting and a file that is not there are faults of the configuration, damaged contents are not.
    pub fn kind(&self) -> Kind {
        match self {
            DataError::Config { .. } => Kind::Config,
            DataError::Io { source, .. } if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::IsADirectory) => {
                Kind::Config
            }
            _ => Kind::Run,
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            DataError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                "relative paths start at the folder the program was started in"
            }
            DataError::Io { source, .. } if source.kind() == ErrorKind::IsADirectory => "list the files of the folder",
            DataError::File { hint, .. } => hint.as_str(),
            DataError::Record { bad, .. } if bad.hint.is_empty() => {
                "repair the record, or set on_bad_record = \"skip\" to leave such records out"
            }
            DataError::Record { bad, .. } => bad.hint.as_str(),
            DataError::NothingLeft { .. } => {
                "check data.format and data.fields; data.on_bad_record = \"error\" shows the first bad record in full"
            }
            DataError::Resume { .. } => {
                "use the data and settings of the checkpoint, or start anew with resume_from_checkpoint = false"
            }
            DataError::Config { .. } | DataError::Io { .. } | DataError::HuggingFace(_) | DataError::Stream { .. } => {
                ""
            }
        };
        (!hint.is_empty()).then(|| hint.to_owned())
    }
}

impl From<DataError> for Problem {
    fn from(error: DataError) -> Self {
        let what = error.to_string();
        let problem = match error.kind() {
            Kind::Config => Problem::config(what),
            _ => Problem::run(what),
        };
        match error.hint() {
            Some(hint) => problem.hint(hint),
            None => problem,
        }
    }
}
