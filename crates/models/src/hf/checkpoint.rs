//! Reads checkpoints: `model.safetensors`, or shards listed in `model.safetensors.index.json`.
//!
//! Files are mapped, not read: a tensor costs memory only while its bytes are looked at. All headers are checked when the
//! checkpoint is opened, so a truncated or lying file is refused before anything is loaded. A mapped file must not be
//! truncated by another program while it is open (replacing it by renaming, as [`super::write`] does, is fine).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use safetensors::{SafeTensorError, SafeTensors};
use serde_json::Value;

use super::dtype::{self, Dtype};
use super::error::{HfError, list};
use super::{names_in, read_json};

/// The name of a checkpoint that is one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The name of the list of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// An open checkpoint: the headers in memory, the tensors mapped.
#[derive(Debug)]
pub struct Checkpoint {
    origin: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    /// Texts that writers put beside the tensors, of all shards.
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// One tensor of an open [`Checkpoint`].
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Element type of [`TensorView::bytes`].
    pub dtype: Dtype,
    /// Extents as on disk, outermost first.
    pub shape: &'a [usize],
    /// Row-major, little-endian values; not necessarily aligned.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn element_count(&self) -> usize {
        self.bytes.len() / self.dtype.size_bytes()
    }

    /// The values as `f32` (exact).
    pub fn to_f32(&self) -> Vec<f32> {
        dtype::to_f32(self.bytes, self.dtype)
    }

    /// The values as bytes of another type, rounded to nearest even.
    pub fn to_dtype(&self, dtype: Dtype) -> Vec<u8> {
        dtype::convert(self.bytes, self.dtype, dtype)
    }
}

impl Checkpoint {
    /// Opens the checkpoint in a folder: the index and its shards if there is an index, else `model.safetensors`.
    ///
    /// # Errors
    /// No checkpoint in the folder (the text lists what is there); a shard that is missing, damaged or outside the folder;
    /// an index entry whose tensor is not in its shard. All problems of an index are reported at once.
    pub fn open(folder: &Path) -> Result<Self, HfError> {
        let index = folder.join(INDEX_FILE);
        if index.is_file() {
            return Self::open_sharded(folder, &index);
        }
        let single = folder.join(SINGLE_FILE);
        if single.is_file() {
            return Self::open_file(&single);
        }
        Err(no_weights(folder))
    }

    /// Opens one safetensors file, such as `adapter_model.safetensors`.
    ///
    /// # Errors
    /// The file is missing, truncated, or its header does not describe it.
    pub fn open_file(path: &Path) -> Result<Self, HfError> {
        let mut checkpoint = Self::empty(path);
        for (name, entry) in checkpoint.add_shard(path)? {
            checkpoint.tensors.insert(name, entry);
        }
        Ok(checkpoint)
    }

    fn empty(origin: &Path) -> Self {
        let (tensors, metadata) = (BTreeMap::new(), BTreeMap::new());
        Self { origin: origin.to_path_buf(), shards: Vec::new(), tensors, metadata }
    }

    fn open_sharded(folder: &Path, index: &Path) -> Result<Self, HfError> {
        let weight_map = read_weight_map(index)?;
        let mut problems = Vec::new();
        let mut checkpoint = Self::empty(folder);
        let mut in_shard: BTreeMap<&str, BTreeMap<String, Entry>> = BTreeMap::new();
        for shard in weight_map.values().map(String::as_str).collect::<BTreeSet<_>>() {
            if !stays_inside(shard) {
                problems.push(format!("`{shard}` is not a file inside the folder"));
                continue;
            }
            let path = folder.join(shard);
            if !path.is_file() {
                problems.push(format!("shard {shard} is missing"));
                continue;
            }
            in_shard.insert(shard, checkpoint.add_shard(&path)?);
        }
        for (name, shard) in &weight_map {
            let Some(tensors) = in_shard.get_mut(shard.as_str()) else { continue };
            match tensors.remove(name) {
                Some(entry) => drop(checkpoint.tensors.insert(name.clone(), entry)),
                None => problems.push(format!("tensor `{name}` is not in {shard}")),
            }
        }
        if !problems.is_empty() {
            return Err(HfError::BadIndex { path: index.to_path_buf(), problems });
        }
        // Tensors that the index forgot are still part of the checkpoint.
        for tensors in in_shard.into_values() {
            for (name, entry) in tensors {
                checkpoint.tensors.entry(name).or_insert(entry);
            }
        }
        Ok(checkpoint)
    }

    /// Maps a file, checks its header and returns its tensors.
    fn add_shard(&mut self, path: &Path) -> Result<BTreeMap<String, Entry>, HfError> {
        let file = File::open(path).map_err(|source| HfError::io("open", path, source))?;
        let length = file.metadata().map_err(|source| HfError::io("read", path, source))?.len();
        if length < 8 {
            let reason =
                format!("{length} bytes long; a safetensors file has at least the 8 bytes of its header length");
            return Err(HfError::bad_file(
                path,
                reason,
                "the download or the write was interrupted: fetch the file again",
            ));
        }
        // SAFETY: the map is only read, and its length is fixed by the file's size now. Rust cannot rule out that another
        // program truncates the file meanwhile; the module documentation states that as a condition.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| HfError::io("map", path, source))?;
        let (header_length, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| bad_header(path, &map, &error))?;
        let start = 8 + header_length;
        let shard = self.shards.len();
        let tensors = metadata.tensors().into_iter().map(|(name, info)| {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            (name, Entry { shard, dtype: info.dtype, shape: info.shape.clone(), bytes })
        });
        let tensors = tensors.collect();
        self.metadata.extend(metadata.metadata().iter().flatten().map(|(key, text)| (key.clone(), text.clone())));
        self.shards.push(Shard { path: path.to_path_buf(), map });
        Ok(tensors)
    }

    /// The folder or file that was opened.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// A text that the writer put beside the tensors.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// No such tensor (the text names similar ones), or stored as something other than F32, F16 or BF16.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>, HfError> {
        let Some(entry) = self.tensors.get(name) else {
            let nearest = nearest_names(name, self.names());
            return Err(HfError::MissingTensor { origin: self.origin.clone(), name: name.to_string(), nearest });
        };
        let shard = &self.shards[entry.shard];
        let Some(dtype) = Dtype::from_safetensors(entry.dtype) else {
            let dtype = entry.dtype.to_string();
            return Err(HfError::UnsupportedDtype { path: shard.path.clone(), name: name.to_string(), dtype });
        };
        Ok(TensorView { dtype, shape: &entry.shape, bytes: &shard.map[entry.bytes.clone()] })
    }

    /// Compares the checkpoint with the tensors a model needs: name and shape of each.
    ///
    /// `ignorable` says which tensors may be there without being needed (`lm_head.weight` of a tied model, buffers).
    ///
    /// # Errors
    /// One error that lists every missing tensor, every tensor that is not expected, and every wrong shape or element type:
    /// the first ten of each kind and their number.
    pub fn check(&self, expected: &[(String, Vec<usize>)], ignorable: impl Fn(&str) -> bool) -> Result<(), HfError> {
        let mut missing = Vec::new();
        let mut shapes = Vec::new();
        let mut dtypes = Vec::new();
        for (name, shape) in expected {
            let Some(entry) = self.tensors.get(name) else {
                missing.push(format!("{name} {shape:?}"));
                continue;
            };
            if entry.shape != *shape {
                shapes.push(format!("{name}: expected {shape:?}, got {:?}", entry.shape));
            }
            // Bytes alone are codes whose meaning is not known here.
            if matches!(Dtype::from_safetensors(entry.dtype), None | Some(Dtype::U8)) {
                dtypes.push(format!("{name}: expected F32, F16 or BF16, got {}", entry.dtype));
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let is_extra = |name: &&str| !known.contains(name) && !ignorable(name);
        let extra: Vec<String> = self.names().filter(is_extra).map(str::to_string).collect();

        let mut report = String::new();
        add_section(&mut report, "missing", &missing);
        add_section(&mut report, "not expected", &extra);
        add_section(&mut report, "wrong shape", &shapes);
        add_section(&mut report, "unsupported element type", &dtypes);
        if report.is_empty() {
            return Ok(());
        }
        let hint = mismatch_hint(&known, &missing, &extra, &shapes, &dtypes);
        Err(HfError::TensorMismatch { origin: self.origin.clone(), report: report.trim_end().to_string(), hint })
    }
}

fn add_section(report: &mut String, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(report, "{title}: {}", lines.len());
    for line in lines.iter().take(10) {
        let _ = writeln!(report, "  {line}");
    }
    if lines.len() > 10 {
        let _ = writeln!(report, "  and {} more", lines.len() - 10);
    }
}

/// The likeliest cause of a mismatch.
fn mismatch_hint(
    known: &BTreeSet<&str>,
    missing: &[String],
    extra: &[String],
    shapes: &[String],
    dtypes: &[String],
) -> String {
    let other_prefix = extra.iter().any(|name| {
        known.contains(format!("model.{name}").as_str())
            || name.split_once('.').is_some_and(|(_, rest)| known.contains(rest))
    });
    let hint = if extra.iter().any(|name| name.contains("lora_")) {
        "this is an adapter, not a model: merge it into its base model, or give the base model"
    } else if other_prefix {
        "the names differ by a prefix: this checkpoint holds another class of the model than config.json says"
    } else if !dtypes.is_empty()
        || extra.iter().any(|name| name.ends_with(".weight_scale") || name.ends_with(".qweight"))
    {
        "this looks like a quantised checkpoint: use the unquantised one"
    } else if !missing.is_empty() || !shapes.is_empty() {
        "config.json and the weights may come from different models"
    } else {
        "the architecture in config.json does not use these tensors: check model_type and tie_word_embeddings"
    };
    hint.to_string()
}

fn no_weights(folder: &Path) -> HfError {
    let found = names_in(folder);
    let has = |end: &str| found.iter().any(|name| name.ends_with(end));
    let hint = if !folder.is_dir() {
        "the folder does not exist: check base_model"
    } else if has(".bin") || has(".pt") || has(".pth") {
        "the weights are in PyTorch's pickle format: convert them with transformers, model.save_pretrained(folder)"
    } else if has(".gguf") {
        "GGUF files are for inference: use the model's safetensors checkpoint"
    } else if has("adapter_model.safetensors") {
        "this is a PEFT adapter: base_model must be the model it was trained on"
    } else {
        "give the folder of a model in the Hugging Face layout, or a hub id such as org/name"
    };
    HfError::MissingFile {
        folder: folder.to_path_buf(),
        wanted: format!("{SINGLE_FILE} and no {INDEX_FILE}"),
        found,
        hint: hint.to_string(),
    }
}

/// Tensor name to shard name.
///
/// # Errors
/// Not JSON, no `weight_map`, or an entry that is not text.
pub fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>, HfError> {
    let json = read_json(index)?;
    let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
        return Err(HfError::bad_file(
            index,
            "no `weight_map` object",
            "this is not the index of a sharded checkpoint",
        ));
    };
    let mut weight_map = BTreeMap::new();
    for (name, shard) in map {
        let Some(shard) = shard.as_str() else {
            let reason = format!("weight_map[`{name}`]: expected a file name, got {shard}");
            return Err(HfError::bad_file(index, reason, "download the file again"));
        };
        weight_map.insert(name.clone(), shard.to_string());
    }
    match weight_map.is_empty() {
        true => Err(HfError::bad_file(index, "`weight_map` is empty", "download the file again")),
        false => Ok(weight_map),
    }
}

/// Whether a relative file name cannot leave the folder it is joined to.
pub(crate) fn stays_inside(name: &str) -> bool {
    !name.is_empty()
        && !name.contains('\\')
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Puts the safetensors crate's reason into words, with the tensor where the header tells which.
fn bad_header(path: &Path, bytes: &[u8], error: &SafeTensorError) -> HfError {
    let header_length = u64::from_le_bytes(std::array::from_fn(|i| bytes[i]));
    let after_header = (bytes.len() as u64 - 8).saturating_sub(header_length);
    let hint = "the file is truncated or damaged: fetch or write it again";
    let reason = match error {
        SafeTensorError::InvalidHeaderLength => {
            format!("the header claims {header_length} bytes, but only {} follow in the file", bytes.len() - 8)
        }
        SafeTensorError::HeaderTooLarge => {
            format!("the header claims {header_length} bytes, more than the format allows")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            let claimed = header_entries(bytes).iter().map(|entry| entry.end).max().unwrap_or(0);
            format!("the header describes {claimed} bytes of tensors, but the file holds {after_header}")
        }
        SafeTensorError::TensorInvalidInfo => match header_entries(bytes).iter().find(|entry| entry.is_lying()) {
            Some(entry) => format!(
                "tensor `{}`: {} elements of {} take {} bytes, but its offsets span {}",
                entry.name,
                entry.elements,
                entry.dtype,
                entry.wanted_bytes(),
                entry.end.saturating_sub(entry.start)
            ),
            None => "a tensor's offsets do not match its shape and type".to_string(),
        },
        SafeTensorError::InvalidOffset(name) => {
            format!("tensor `{name}`: its offsets overlap another tensor, leave a gap, or run backwards")
        }
        SafeTensorError::ValidationOverflow => match header_entries(bytes).iter().max_by_key(|entry| entry.elements) {
            Some(entry) => format!("tensor `{}`: its shape is larger than memory can be", entry.name),
            None => "a tensor's shape is larger than memory can be".to_string(),
        },
        SafeTensorError::InvalidHeader(error) => format!("the header is not text: {error}"),
        SafeTensorError::InvalidHeaderDeserialization(error) => format!("the header is not valid: {error}"),
        other => other.to_string(),
    };
    HfError::bad_file(path, format!("not a usable safetensors file: {reason}"), hint)
}

/// What a header says of one tensor, read leniently to explain what is wrong with it.
struct HeaderEntry {
    name: String,
    dtype: String,
    element_bits: u64,
    elements: u64,
    start: u64,
    end: u64,
}

impl HeaderEntry {
    fn wanted_bytes(&self) -> u64 {
        self.elements.saturating_mul(self.element_bits) / 8
    }

    fn is_lying(&self) -> bool {
        self.wanted_bytes() != self.end.saturating_sub(self.start)
    }
}

fn header_entries(bytes: &[u8]) -> Vec<HeaderEntry> {
    let length = u64::from_le_bytes(std::array::from_fn(|i| bytes[i])) as usize;
    let Some(header) = length.checked_add(8).and_then(|end| bytes.get(8..end)) else { return Vec::new() };
    let Ok(Value::Object(header)) = serde_json::from_slice::<Value>(header) else { return Vec::new() };
    let entries = header.iter().filter(|(name, _)| *name != "__metadata__").filter_map(|(name, info)| {
        let dtype: safetensors::Dtype = serde_json::from_value(info["dtype"].clone()).ok()?;
        Some(HeaderEntry {
            name: name.clone(),
            dtype: dtype.to_string(),
            element_bits: dtype.bitsize() as u64,
            elements: info["shape"]
                .as_array()?
                .iter()
                .try_fold(1u64, |product, extent| Some(product.saturating_mul(extent.as_u64()?)))?,
            start: info["data_offsets"][0].as_u64()?,
            end: info["data_offsets"][1].as_u64()?,
        })
    });
    entries.collect()
}

/// Names that end like `name` does, longest common ending first.
fn nearest_names<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let common = |other: &str| name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
    let mut names: Vec<&str> = names.collect();
    names.sort_by_key(|other| std::cmp::Reverse(common(other)));
    names.into_iter().take(5).map(str::to_string).collect()
}

/// Describes a checkpoint in one line, for logs.
impl std::fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let types: BTreeSet<String> = self.tensors.values().map(|entry| entry.dtype.to_string()).collect();
        let types: Vec<String> = types.into_iter().collect();
        write!(
            f,
            "{}: {} tensors, {:.1} MiB in {} file(s), {}",
            self.origin.display(),
            self.tensors.len(),
            self.total_bytes() as f64 / (1 << 20) as f64,
            self.shards.len(),
            list(&types, 4)
        )
    }
}
