//! The one error type of this module. Every message says what failed, where, what was expected and what was found, and ends
//! with a line `hint: ...` where there is something the user can do.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with files in the Hugging Face layout and with the hub.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// The operating system refused to read or write a file.
    #[error("cannot {doing} {}: {source}{}", .path.display(), hint_line(io_hint(.source)))]
    Io {
        /// What was tried, as a verb: "read", "write", "rename".
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The disk, or the user's share of it, is full. The file that was to be replaced is unchanged.
    #[error("no space left on the disk while writing {} ({bytes} bytes): {source}; an earlier file of that name is unchanged{}", .path.display(), hint_line("free some space, or set another output folder"))]
    DiskFull {
        /// The final name of the file that was being written.
        path: PathBuf,
        /// How large it was to become.
        bytes: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is there but its content is wrong.
    #[error("{}: {reason}{}", .path.display(), hint_line(.hint))]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with key, line or tensor.
        reason: String,
        /// What to do about it, perhaps empty.
        hint: String,
    },
    /// A file that is needed is not in the folder.
    #[error("{} has no {wanted}; it holds: {}{}", .folder.display(), list(.found, 12), hint_line(.hint))]
    MissingFile {
        /// The folder that was searched.
        folder: PathBuf,
        /// What was looked for.
        wanted: String,
        /// What is there.
        found: Vec<String>,
        /// What to do about it, perhaps empty.
        hint: String,
    },
    /// Entries of `model.safetensors.index.json` that do not fit the shards.
    #[error("{}: {} of its entries do not fit the files:\n{}{}", .path.display(), .problems.len(), bullets(.problems), hint_line("download the missing or damaged files again; an interrupted download leaves such a folder"))]
    BadIndex {
        /// The index file.
        path: PathBuf,
        /// One line each.
        problems: Vec<String>,
    },
    /// No tensor of this name.
    #[error("{}: no tensor named `{name}`; the nearest names are: {}", .origin.display(), list(.nearest, 5))]
    MissingTensor {
        /// The folder or file that was searched.
        origin: PathBuf,
        /// The name asked for.
        name: String,
        /// Names that look alike.
        nearest: Vec<String>,
    },
    /// A tensor is stored in a type that is not read.
    #[error("{}: tensor `{name}` is stored as {dtype}; expected F32, F16 or BF16{}", .path.display(), hint_line("use the model's unquantised checkpoint"))]
    UnsupportedDtype {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The type in the file.
        dtype: String,
    },
    /// The tensors of a checkpoint are not those that the model needs.
    #[error("{}: the tensors do not fit the model:\n{report}{}", .origin.display(), hint_line(.hint))]
    TensorMismatch {
        /// The folder or file.
        origin: PathBuf,
        /// All differences, one paragraph for each kind.
        report: String,
        /// What to do about it, perhaps empty.
        hint: String,
    },
    /// `base_model` (or a data set's name) is neither a folder nor a hub id.
    #[error("`{given}`: {reason}{}", hint_line(.hint))]
    BadName {
        /// What the user wrote.
        given: String,
        /// What is wrong with it.
        reason: String,
        /// What to do about it.
        hint: String,
    },
    /// The hub could not be asked, or refused.
    #[error("cannot get {what} of `{repo}` from {endpoint}: {reason}{}", hint_line(.hint))]
    Hub {
        /// The server.
        endpoint: String,
        /// `org/name`, perhaps with `@revision`.
        repo: String,
        /// A file name or "the file list".
        what: String,
        /// What happened.
        reason: String,
        /// What to do about it.
        hint: String,
    },
    /// The tokenizer refused a text or an id.
    #[error("{}: {reason}", .path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// Its reason.
        reason: String,
    },
    /// The chat template could not be compiled or rendered.
    #[error("chat template of {}: {reason}{}", .origin.display(), hint_line(.hint))]
    Template {
        /// The file the template came from.
        origin: PathBuf,
        /// What the template engine, or the template itself, says.
        reason: String,
        /// What to do about it, perhaps empty.
        hint: String,
    },
    /// The assistant's part of a rendered conversation cannot be found.
    #[error("chat template of {} is not prefix-stable at message {message}: {reason}{}", .origin.display(), hint_line("the assistant's tokens cannot be told apart with this template: train on the whole text (train_on_inputs = true), keep only the last assistant turn, or use a template that renders earlier turns the same way"))]
    NotPrefixStable {
        /// The file the template came from.
        origin: PathBuf,
        /// Index of the assistant message, from 0.
        message: usize,
        /// Which rendering differs from which.
        reason: String,
    },
    /// A key of `adapter_config.json` is wrong or asks for something that is not supported.
    #[error("{}: `{key}`: {reason}{}", .origin.display(), hint_line(.hint))]
    Adapter {
        /// The file, or the config section the settings came from.
        origin: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
        /// What to do about it, perhaps empty.
        hint: String,
    },
}

impl HfError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_path_buf(), source }
    }

    /// A failed write of `bytes` bytes to `path` (the final name): a full disk gets its own message.
    pub(crate) fn writing(path: &Path, bytes: u64, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path, bytes, source },
            _ => Self::Io { doing: "write", path, source },
        }
    }

    pub(crate) fn bad_file(path: &Path, reason: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::BadFile { path: path.to_path_buf(), reason: reason.into(), hint: hint.into() }
    }
}

fn io_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "check the permissions of the file and its folder"
        }
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::FileTooLarge => {
            "the file system or a limit of the shell (ulimit -f) allows no file of this size"
        }
        _ => "",
    }
}

fn hint_line(hint: impl AsRef<str>) -> String {
    match hint.as_ref() {
        "" => String::new(),
        hint => format!("\nhint: {hint}"),
    }
}

/// At most `most` names, separated by commas, and how many more there are.
pub(crate) fn list(names: &[String], most: usize) -> String {
    if names.is_empty() {
        return "nothing".to_string();
    }
    let mut text = names.iter().take(most).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > most {
        let _ = write!(text, " and {} more", names.len() - most);
    }
    text
}

/// At most ten lines, each with a dash, and how many more there are.
pub(crate) fn bullets(lines: &[String]) -> String {
    let mut text = lines.iter().take(10).map(|line| format!("  - {line}")).collect::<Vec<_>>().join("\n");
    if lines.len() > 10 {
        let _ = write!(text, "\n  - and {} more", lines.len() - 10);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_has_its_own_text() {
        let error = HfError::writing(Path::new("out/model.safetensors"), 123, io::Error::from_raw_os_error(28));
        let text = error.to_string();
        assert!(
            text.starts_with("no space left on the disk while writing out/model.safetensors (123 bytes)"),
            "{text}"
        );
        assert!(text.contains("\nhint: free some space"), "{text}");
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..20).map(|i| format!("n{i}")).collect();
        assert_eq!(list(&names, 3), "n0, n1, n2 and 17 more");
        assert!(bullets(&names).ends_with("and 10 more"));
        assert_eq!(list(&[], 3), "nothing");
    }
}
