//! Checkpoints on disk: a folder `step-<n>` is complete if its manifest fits it.
//!
//! The manifest names every file with its size and SHA-256 and is written last, in a temporary folder that is then
//! renamed. So a process that is killed at any moment leaves either the whole checkpoint or a temporary folder, and a
//! checkpoint that was damaged later is noticed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{RunDir, sync_folder};
use crate::error::Problem;

const MANIFEST: &str = "complete.json";
const TEMPORARY: &str = ".tmp-";
const REPLACED: &str = ".replaced-";

/// A checkpoint folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedCheckpoint {
    /// Steps done when it was written.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    step: u64,
    files: Vec<ManifestFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestFile {
    /// Path below the checkpoint, with `/` between folders.
    name: String,
    size: u64,
    sha256: String,
}

impl RunDir {
    /// Every folder `step-<n>`, complete or not, by rising step.
    ///
    /// # Errors
    /// The folder of checkpoints cannot be read.
    pub fn checkpoints(&self) -> Result<Vec<SavedCheckpoint>, Problem> {
        let mut found: Vec<SavedCheckpoint> = entries_of(&self.checkpoints_dir())?
            .into_iter()
            .filter_map(|(name, path)| Some(SavedCheckpoint { step: step_of(&name)?, path }))
            .collect();
        found.sort_by_key(|checkpoint| checkpoint.step);
        Ok(found)
    }

    /// The newest checkpoint that is complete. Newer ones that are not are left out with a warning that says why.
    ///
    /// # Errors
    /// The folder of checkpoints cannot be read.
    pub fn latest_complete(&self) -> Result<Option<SavedCheckpoint>, Problem> {
        for checkpoint in self.checkpoints()?.into_iter().rev() {
            match verify_checkpoint(&checkpoint.path) {
                Ok(_) => return Ok(Some(checkpoint)),
                Err(reason) => tracing::warn!("{} is left out: {reason}", checkpoint.path.display()),
            }
        }
        Ok(None)
    }

    /// Starts to write the checkpoint of a step.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn begin_checkpoint(&self, step: u64) -> Result<CheckpointWriter, Problem> {
        CheckpointWriter::begin(&self.checkpoints_dir(), step)
    }

    /// Deletes the oldest checkpoints until `save_total_limit` are left. The newest complete one and those of the steps
    /// in `protect` (the best one) are never deleted and count towards the limit. Returns the deleted steps.
    ///
    /// # Errors
    /// A folder cannot be deleted.
    pub fn prune(&self, save_total_limit: usize, protect: &[u64]) -> Result<Vec<u64>, Problem> {
        let saved = self.checkpoints()?;
        let mut surplus = saved.len().saturating_sub(save_total_limit.max(1));
        if surplus == 0 {
            return Ok(Vec::new());
        }
        let newest = saved.iter().rev().find(|saved| has_its_files(&saved.path)).map(|saved| saved.step);
        let mut deleted = Vec::new();
        for checkpoint in saved {
            if surplus == 0 {
                break;
            }
            if Some(checkpoint.step) == newest || protect.contains(&checkpoint.step) {
                continue;
            }
            self.delete(&checkpoint)?;
            deleted.push(checkpoint.step);
            surplus -= 1;
        }
        Ok(deleted)
    }

    /// Deletes by renaming first, so that a kill in between leaves no folder that looks like a checkpoint.
    fn delete(&self, checkpoint: &SavedCheckpoint) -> Result<(), Problem> {
        let name = format!("{TEMPORARY}deleted-{}-{}", checkpoint.step, std::process::id());
        let doomed = self.checkpoints_dir().join(name);
        std::fs::rename(&checkpoint.path, &doomed).and_then(|()| std::fs::remove_dir_all(&doomed)).map_err(|error| {
            Problem::run(format!("cannot delete the old checkpoint {}", checkpoint.path.display())).source(error)
        })
    }

    /// Removes what killed processes left: temporary files and folders, and replaced checkpoints once their successor is
    /// there.
    pub(super) fn clean_up(&self) -> Result<(), Problem> {
        let mut entries = entries_of(&self.checkpoints_dir())?;
        entries.extend(entries_of(self.root())?.into_iter().filter(|(name, _)| name.starts_with(TEMPORARY)));
        for folder in [self.adapter_dir(), self.model_dir()] {
            entries.extend(entries_of(&folder)?.into_iter().filter(|(name, _)| is_half_a_result(name)));
        }
        for (name, path) in entries {
            let result = if name.starts_with(TEMPORARY) || is_half_a_result(&name) {
                remove(&path)
            } else if let Some(step) = name.strip_prefix(REPLACED) {
                let successor = self.checkpoints_dir().join(step);
                if successor.exists() { remove(&path) } else { std::fs::rename(&path, &successor) }
            } else {
                continue;
            };
            result.map_err(|error| Problem::run(format!("cannot clean up {}", path.display())).source(error))?;
        }
        Ok(())
    }
}

/// Whether a file has the name that [`lowrank_models::hf::write`] gives it until it is whole.
fn is_half_a_result(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

/// Name and path of everything in a folder; nothing if there is no such folder.
fn entries_of(folder: &Path) -> Result<Vec<(String, PathBuf)>, Problem> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    let entries =
        entries.map_err(|error| Problem::run(format!("cannot read the folder {}", folder.display())).source(error))?;
    Ok(entries.iter().map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())).collect())
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
}

fn step_of(folder_name: &str) -> Option<u64> {
    let digits = folder_name.strip_prefix("step-")?;
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// A checkpoint that is being written. Dropped without [`CheckpointWriter::commit`], it leaves nothing.
#[derive(Debug)]
pub struct CheckpointWriter {
    step: u64,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl CheckpointWriter {
    /// Makes the temporary folder below the folder of checkpoints.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn begin(checkpoints_dir: &Path, step: u64) -> Result<Self, Problem> {
        let temporary = checkpoints_dir.join(format!("{TEMPORARY}step-{step}-{}", std::process::id()));
        if temporary.exists() {
            std::fs::remove_dir_all(&temporary).map_err(|error| cannot_save(step, error))?;
        }
        std::fs::create_dir_all(&temporary).map_err(|error| cannot_save(step, error))?;
        let target = checkpoints_dir.join(format!("step-{step}"));
        Ok(Self { step, temporary, target, committed: false })
    }

    /// The folder to write the files of the checkpoint into; subfolders are allowed.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Brings every file to the disk, writes the manifest and moves the folder to its name. An older folder of the same
    /// step is replaced.
    ///
    /// # Errors
    /// The disk refuses. The temporary folder is then removed and earlier checkpoints are unchanged.
    pub fn commit(mut self) -> Result<SavedCheckpoint, Problem> {
        self.write_manifest_and_move().map_err(|error| cannot_save(self.step, error))?;
        self.committed = true;
        Ok(SavedCheckpoint { step: self.step, path: self.target.clone() })
    }

    fn write_manifest_and_move(&self) -> std::io::Result<()> {
        let mut files = Vec::new();
        for name in files_below(&self.temporary)? {
            let path = self.temporary.join(&name);
            File::open(&path)?.sync_all()?;
            let (size, sha256) = fingerprint(&path)?;
            files.push(ManifestFile { name, size, sha256 });
        }
        let manifest = serde_json::to_vec_pretty(&Manifest { step: self.step, files })?;
        let mut file = File::create(self.temporary.join(MANIFEST))?;
        file.write_all(&manifest)?;
        file.sync_all()?;
        sync_folders(&self.temporary)?;

        let parent = self.target.parent().unwrap_or(Path::new("."));
        let replaced = parent.join(format!("{REPLACED}step-{}", self.step));
        if self.target.exists() {
            std::fs::rename(&self.target, &replaced)?;
        }
        std::fs::rename(&self.temporary, &self.target)?;
        sync_folder(parent)?;
        if replaced.exists() { std::fs::remove_dir_all(&replaced) } else { Ok(()) }
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be reported from here; what stays is removed at the next start.
            let _ = std::fs::remove_dir_all(&self.temporary);
        }
    }
}

fn cannot_save(step: u64, error: std::io::Error) -> Problem {
    Problem::run(format!("cannot write the checkpoint of step {step}"))
        .source(error)
        .hint("is the disk full? Earlier checkpoints are unchanged; training.save_total_limit keeps fewer of them")
}

/// Checks a checkpoint against its manifest: every file is there, with its size and hash, and no other. Returns its step,
/// or what is wrong.
pub fn verify_checkpoint(folder: &Path) -> Result<u64, String> {
    if !folder.is_dir() {
        return Err("there is no such folder".to_owned());
    }
    let manifest = read_manifest(folder)?;
    let listed: BTreeSet<&str> = manifest.files.iter().map(|file| file.name.as_str()).collect();
    let present = files_below(folder).map_err(|error| format!("cannot be read: {error}"))?;
    if let Some(extra) = present.iter().find(|name| *name != MANIFEST && !listed.contains(name.as_str())) {
        return Err(format!("{extra} is not in {MANIFEST}"));
    }
    for file in &manifest.files {
        let (size, sha256) =
            fingerprint(&folder.join(&file.name)).map_err(|error| format!("{}: {error}", file.name))?;
        if size != file.size {
            return Err(format!("{} has {size} bytes, expected {}", file.name, file.size));
        }
        if sha256 != file.sha256 {
            return Err(format!("{} was changed or damaged: its SHA-256 differs from {MANIFEST}", file.name));
        }
    }
    Ok(manifest.step)
}

/// Whether every file of the manifest is there with its size. Hashing gigabytes after every checkpoint would cost more
/// than writing them.
fn has_its_files(folder: &Path) -> bool {
    let has_size = |file: &ManifestFile| {
        std::fs::metadata(folder.join(&file.name)).is_ok_and(|metadata| metadata.len() == file.size)
    };
    read_manifest(folder).is_ok_and(|manifest| manifest.files.iter().all(has_size))
}

fn read_manifest(folder: &Path) -> Result<Manifest, String> {
    let text = std::fs::read(folder.join(MANIFEST)).map_err(|error| format!("{MANIFEST}: {error}"))?;
    serde_json::from_slice(&text).map_err(|error| format!("{MANIFEST}: {error}"))
}

/// Size in bytes and SHA-256 in hexadecimal.
fn fingerprint(path: &Path) -> std::io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut size = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        size += count as u64;
    }
    let hex = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((size, hex))
}

/// Relative names of all files in a folder and its subfolders, sorted.
fn files_below(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            names.extend(files_below(&entry.path())?.into_iter().map(|inner| format!("{name}/{inner}")));
        } else {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Brings the names in a folder and all its subfolders to the disk.
fn sync_folders(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_folders(&entry.path())?;
        }
    }
    sync_folder(folder)
}
