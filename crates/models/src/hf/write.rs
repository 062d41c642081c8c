//! Writes files so that a reader never sees half of one: the bytes go to a temporary name in the same folder, are synced,
//! and the file is renamed; then the folder is synced. A run that dies while writing leaves the earlier file as it was
//! (and perhaps a temporary file, whose name starts with a dot and ends in `.tmp`).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value, json};

use super::checkpoint::{INDEX_FILE, SINGLE_FILE};
use super::dtype::{self, Dtype};
use super::error::HfError;
use super::names_in;

/// The metadata that transformers and peft expect in the header of a safetensors file.
pub const TORCH_METADATA: &[(&str, &str)] = &[("format", "pt")];

/// Files beside the weights that belong to a model and are carried along when it is written again.
pub const COMPANION_FILES: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
];

/// A tensor to be written. Its bytes are produced when their turn comes, so that only one tensor is in memory at a time.
pub struct OutTensor<'a> {
    /// The name in the file.
    pub name: String,
    /// Element type of the bytes.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Gives the row-major, little-endian values: `shape`'s product times the size of an element.
    pub data: Box<dyn FnOnce() -> Vec<u8> + 'a>,
}

impl<'a> OutTensor<'a> {
    /// A tensor whose bytes are computed when they are needed.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize], data: impl FnOnce() -> Vec<u8> + 'a) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec(), data: Box::new(data) }
    }

    /// A tensor of values that are in memory already, rounded to `dtype`.
    pub fn from_f32(name: impl Into<String>, dtype: Dtype, shape: &[usize], values: Vec<f32>) -> Self {
        Self::new(name, dtype, shape, move || dtype::from_f32(&values, dtype))
    }

    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.size_bytes() as u64
    }
}

/// Writes one safetensors file, atomically. Tensors of wider types come first, then by name; the
/// same tensors always give the same bytes. Transformers wants [`TORCH_METADATA`].
///
/// # Errors
/// Two tensors of one name; data of the wrong length; anything the disk refuses. The file under `path` is then unchanged.
pub fn write_safetensors(path: &Path, tensors: Vec<OutTensor<'_>>, metadata: &[(&str, &str)]) -> Result<(), HfError> {
    stage_safetensors(path, tensors, metadata)?.commit()
}

/// Writes a whole checkpoint into a folder (made if needed): `model.safetensors` if all tensors fit into `max_shard_bytes`,
/// else `model-00001-of-0000n.safetensors` and the index. Tensors stay in the order given; one larger than the limit gets a
/// shard of its own. Weight files of an earlier checkpoint in the folder are removed at the end.
///
/// Returns the names of the files written.
///
/// # Errors
/// As [`write_safetensors`]. No file is replaced before all shards are on the disk.
pub fn write_sharded(folder: &Path, tensors: Vec<OutTensor<'_>>, max_shard_bytes: u64) -> Result<Vec<String>, HfError> {
    std::fs::create_dir_all(folder).map_err(|source| HfError::io("make the folder", folder, source))?;
    refuse_duplicates(folder, tensors.iter().map(|tensor| tensor.name.as_str()))?;
    let total_bytes: u64 = tensors.iter().map(OutTensor::bytes).sum();
    let shards = split(tensors, max_shard_bytes);
    let count = shards.len();
    let mut names = Vec::new();
    let mut staged = Vec::new();
    let mut weight_map: Vec<(String, String)> = Vec::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let name = match count {
            1 => SINGLE_FILE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        staged.push(stage_safetensors(&folder.join(&name), shard, TORCH_METADATA)?);
        names.push(name);
    }
    weight_map.sort();
    for file in staged {
        file.commit()?;
    }
    if count > 1 {
        let map: Map<String, Value> =
            weight_map.into_iter().map(|(tensor, file)| (tensor, Value::String(file))).collect();
        let index = json!({ "metadata": { "total_size": total_bytes }, "weight_map": map });
        write_text_atomic(&folder.join(INDEX_FILE), &format!("{index:#}\n"))?;
        names.push(INDEX_FILE.to_string());
    }
    remove_other_weights(folder, &names)?;
    Ok(names)
}

/// Consecutive groups of at most `max_bytes`; at least one group.
fn split(tensors: Vec<OutTensor<'_>>, max_bytes: u64) -> Vec<Vec<OutTensor<'_>>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        if filled > 0 && filled + bytes > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    shards
}

/// Readers prefer an index over `model.safetensors`, so files of an earlier checkpoint must not stay beside a new one.
fn remove_other_weights(folder: &Path, keep: &[String]) -> Result<(), HfError> {
    let is_shard = |name: &str| name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
    for name in names_in(folder) {
        if !keep.contains(&name) && (name == INDEX_FILE || name == SINGLE_FILE || is_shard(&name)) {
            let path = folder.join(&name);
            std::fs::remove_file(&path).map_err(|source| HfError::io("remove", &path, source))?;
        }
    }
    sync_dir(folder)
}

fn refuse_duplicates<'a>(path: &Path, names: impl Iterator<Item = &'a str>) -> Result<(), HfError> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(HfError::bad_file(path, format!("two tensors are named `{name}`"), ""));
        }
    }
    Ok(())
}

/// Writes everything under the temporary name.
fn stage_safetensors(
    path: &Path,
    mut tensors: Vec<OutTensor<'_>>,
    metadata: &[(&str, &str)],
) -> Result<StagedFile, HfError> {
    refuse_duplicates(path, tensors.iter().map(|tensor| tensor.name.as_str()))?;
    tensors.sort_by(|a, b| {
        (b.dtype.size_bytes(), b.dtype.name()).cmp(&(a.dtype.size_bytes(), a.dtype.name())).then(a.name.cmp(&b.name))
    });
    let header = header(&tensors, metadata);
    let total = 8 + header.len() as u64 + tensors.iter().map(OutTensor::bytes).sum::<u64>();
    let mut file = StagedFile::create(path, total)?;
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(header.as_bytes())?;
    for tensor in tensors {
        let expected = tensor.bytes();
        let name = tensor.name;
        let bytes = (tensor.data)();
        if bytes.len() as u64 != expected {
            let reason = format!(
                "tensor `{name}` {:?} {}: expected {expected} bytes, got {}",
                tensor.shape,
                tensor.dtype,
                bytes.len()
            );
            return Err(HfError::bad_file(path, reason, ""));
        }
        file.write(&bytes)?;
    }
    file.sync()?;
    Ok(file)
}

/// The JSON header, padded with spaces so that the data starts at a multiple of eight.
fn header(tensors: &[OutTensor<'_>], metadata: &[(&str, &str)]) -> String {
    let mut header = Map::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|(key, value)| (key.to_string(), Value::from(*value)));
        header.insert("__metadata__".to_string(), Value::Object(entries.collect()));
    }
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let info = json!({ "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [offset, end] });
        header.insert(tensor.name.clone(), info);
        offset = end;
    }
    let mut text = Value::Object(header).to_string();
    let padded = text.len().next_multiple_of(8);
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    text
}

/// Writes a text file, atomically.
///
/// # Errors
/// Anything the disk refuses; the file under `path` is then unchanged.
pub fn write_text_atomic(path: &Path, text: &str) -> Result<(), HfError> {
    write_bytes_atomic(path, text.as_bytes())
}

/// Writes a file, atomically.
///
/// # Errors
/// Anything the disk refuses; the file under `path` is then unchanged.
pub fn write_bytes_atomic(path: &Path, bytes: &[u8]) -> Result<(), HfError> {
    let mut file = StagedFile::create(path, bytes.len() as u64)?;
    file.write(bytes)?;
    file.commit()
}

/// Copies those [`COMPANION_FILES`] that exist (tokenizer, chat template, generation settings) from one model folder to
/// another, each atomically, and returns their names.
///
/// # Errors
/// A file cannot be read or written.
pub fn copy_companion_files(from: &Path, to: &Path) -> Result<Vec<String>, HfError> {
    let mut copied = Vec::new();
    for name in COMPANION_FILES {
        let source = from.join(name);
        if source.is_file() {
            let bytes = std::fs::read(&source).map_err(|error| HfError::io("read", &source, error))?;
            write_bytes_atomic(&to.join(name), &bytes)?;
            copied.push(name.to_string());
        }
    }
    Ok(copied)
}

/// Makes renames and new files in a folder survive a power cut.
///
/// # Errors
/// The folder cannot be opened or synced.
pub fn sync_dir(folder: &Path) -> Result<(), HfError> {
    // Windows has no handle of a folder to sync, and does not need one.
    if cfg!(windows) {
        return Ok(());
    }
    File::open(folder).and_then(|handle| handle.sync_all()).map_err(|source| HfError::io("sync", folder, source))
}

/// A file under construction. Dropped without [`StagedFile::commit`], it disappears.
struct StagedFile {
    path: PathBuf,
    temporary: PathBuf,
    bytes: u64,
    writer: Option<BufWriter<File>>,
}

impl StagedFile {
    /// `bytes` is the final size, for messages.
    fn create(path: &Path, bytes: u64) -> Result<Self, HfError> {
        // Unique within this machine's processes, so that two writers of one file cannot mix their bytes.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let Some(name) = path.file_name() else {
            return Err(HfError::bad_file(path, "not a file name", ""));
        };
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{}.{}-{number}.tmp", name.to_string_lossy(), std::process::id()));
        let file = File::create(&temporary).map_err(|source| HfError::writing(path, bytes, source))?;
        let writer = Some(BufWriter::with_capacity(1 << 20, file));
        Ok(Self { path: path.to_path_buf(), temporary, bytes, writer })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), HfError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        writer.write_all(bytes).map_err(|source| HfError::writing(&self.path, self.bytes, source))
    }

    /// Syncs the bytes and gives the file its name.
    fn commit(mut self) -> Result<(), HfError> {
        self.sync()?;
        std::fs::rename(&self.temporary, &self.path)
            .map_err(|source| HfError::writing(&self.path, self.bytes, source))?;
        sync_dir(parent(&self.path))
    }

    /// Brings every byte to the disk, still under the temporary name.
    fn sync(&mut self) -> Result<(), HfError> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let synced = writer.into_inner().map_err(|error| error.into_error()).and_then(|file| file.sync_all());
        synced.map_err(|source| HfError::writing(&self.path, self.bytes, source))
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // After a commit the temporary name is gone and this does nothing. The buffer is discarded unwritten.
        if let Some(writer) = self.writer.take() {
            let _ = writer.into_parts();
        }
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// The folder of a file; `.` for a bare name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
