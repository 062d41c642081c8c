//! The folder of a run: who may write into it, where everything lies, and files that are whole or absent.

mod checkpoints;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

pub use checkpoints::{CheckpointWriter, SavedCheckpoint, verify_checkpoint};

use crate::config::ResumeFrom;
use crate::error::Problem;

/// An `output_dir` that this process alone writes into, until the value is dropped.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    // Holds the lock; the system releases it however the process ends.
    _lock: File,
}

impl RunDir {
    /// Creates or takes over `root`, locks it, and removes what an interrupted write left behind.
    ///
    /// # Errors
    /// The folder is a file or cannot be written, another process runs in it, it holds a run and `resume` does not
    /// say to go on with it, or `resume` names a checkpoint that is not the newest one of this run.
    pub fn open(root: &Path, resume: &ResumeFrom) -> Result<Self, Problem> {
        let lock = create_and_lock(root)?;
        let run = Self { root: root.to_owned(), _lock: lock };
        run.refuse_to_overwrite(resume)?;
        run.clean_up()?;
        Ok(run)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved configuration.
    pub fn config_path(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The record of the run; see [`crate::metrics`].
    pub fn metrics_path(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// Folder of the event files.
    pub fn tensorboard_dir(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// Folder of the checkpoints.
    pub fn checkpoints_dir(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Folder of the final adapter in PEFT's format.
    pub fn adapter_dir(&self) -> PathBuf {
        self.root.join("adapter")
    }

    /// Folder of the final model in Hugging Face format.
    pub fn model_dir(&self) -> PathBuf {
        self.root.join("model")
    }

    /// The folder of the checkpoint to start from, verified: the newest complete one, or the one that was named. None
    /// starts from the beginning.
    ///
    /// # Errors
    /// The named checkpoint is missing or damaged.
    pub fn checkpoint_to_resume(&self, resume: &ResumeFrom) -> Result<Option<SavedCheckpoint>, Problem> {
        match resume {
            ResumeFrom::Newest(false) => Ok(None),
            ResumeFrom::Newest(true) => self.latest_complete(),
            ResumeFrom::Folder(folder) => {
                let step = verify_checkpoint(folder).map_err(|reason| {
                    Problem::config(format!("cannot resume from {}: {reason}", folder.display()))
                        .hint("resume_from_checkpoint = true takes the newest complete checkpoint of output_dir")
                })?;
                Ok(Some(SavedCheckpoint { step, path: folder.clone() }))
            }
        }
    }

    fn refuse_to_overwrite(&self, resume: &ResumeFrom) -> Result<(), Problem> {
        let holds_run = self.metrics_path().exists()
            || self.adapter_dir().exists()
            || self.model_dir().exists()
            || !self.checkpoints()?.is_empty();
        if !holds_run {
            return Ok(());
        }
        let shown = self.root.display();
        match resume {
            ResumeFrom::Newest(true) => Ok(()),
            ResumeFrom::Newest(false) => Err(Problem::config(format!("output_dir {shown} already holds a run"))
                .hint("choose another output_dir, or go on with that run: --set training.resume_from_checkpoint=true")),
            ResumeFrom::Folder(folder) => self.refuse_to_branch(folder),
        }
    }

    /// A run that goes on from a foreign or an older checkpoint would leave two histories in one folder.
    fn refuse_to_branch(&self, folder: &Path) -> Result<(), Problem> {
        let shown = self.root.display();
        let same = |left: &Path, right: &Path| match (left.canonicalize(), right.canonicalize()) {
            (Ok(left), Ok(right)) => left == right,
            _ => false,
        };
        let saved = self.checkpoints()?;
        let Some(index) = saved.iter().position(|checkpoint| same(&checkpoint.path, folder)) else {
            return Err(Problem::config(format!(
                "output_dir {shown} already holds a run, and {} is not one of its checkpoints",
                folder.display()
            ))
            .hint("choose another output_dir"));
        };
        let newer = saved[index + 1..].iter().rev().find(|checkpoint| verify_checkpoint(&checkpoint.path).is_ok());
        match newer {
            None => Ok(()),
            Some(newer) => Err(Problem::config(format!(
                "{} is not the newest checkpoint of {shown}: {} is",
                folder.display(),
                newer.path.display()
            ))
            .hint("choose another output_dir to branch off, or delete the newer checkpoints")),
        }
    }
}

/// Makes the folder and takes its lock.
pub(crate) fn create_and_lock(root: &Path) -> Result<File, Problem> {
    let shown = root.display();
    if root.exists() && !root.is_dir() {
        return Err(Problem::config(format!("output_dir {shown} is a file, expected a folder"))
            .hint("choose another output_dir"));
    }
    let unwritable = |error: std::io::Error| {
        Problem::config(format!("cannot write into output_dir {shown}"))
            .source(error)
            .hint("choose another output_dir, or check its permissions and the free space")
    };
    std::fs::create_dir_all(root).map_err(unwritable)?;
    let path = root.join(".lock");
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(unwritable)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            // Only for the message; a lock without a readable owner is as good.
            let _ = file.read_to_string(&mut owner);
            let owner = if owner.trim().is_empty() { "unknown" } else { owner.trim() };
            return Err(Problem::config(format!("another run is writing into {shown} (process {owner})"))
                .hint("wait for it, stop it, or choose another output_dir"));
        }
        Err(TryLockError::Error(error)) => return Err(unwritable(error)),
    }
    file.set_len(0).map_err(unwritable)?;
    writeln!(file, "{}", std::process::id()).map_err(unwritable)?;
    Ok(file)
}

/// Writes a file so that after a crash it is there as a whole or as it was before: a temporary file in the same folder,
/// brought to the disk and renamed.
///
/// # Errors
/// The folder cannot be written. The file at `path` is then unchanged.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<(), Problem> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".tmp-{name}-{}", std::process::id()));
    let result = write_and_rename(&temporary, path, content);
    if result.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&temporary);
    }
    result.map_err(|error| {
        Problem::run(format!("cannot write {}", path.display())).source(error).hint("is the disk full?")
    })
}

fn write_and_rename(temporary: &Path, path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(temporary, path)?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Brings the names in a folder to the disk.
pub(crate) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    // Elsewhere a folder cannot be opened as a file.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
#[path = "run_dir/tests.rs"]
mod tests;
