//! Tokenised data on disk, so that the next run on the same files starts at once.
//!
//! The name of a cache file is a hash of everything that decides its content: the bytes of the data files, the tokenizer, the
//! chat template, the settings, and the version of this format. A file is written under a temporary name and renamed; a
//! damaged one is noticed by its checksum and built again. Layout, little-endian:
//!
//! ```text
//! magic "LOWRANKT" | header length u64 | header (JSON) | ids u32 each | counted u8 each | documents 4 x u64 each | sha256
//! ```

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowrank_models::hf::write_bytes_atomic;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::DataError;
use super::source::Numbering;
use super::store::{DataFile, Dataset, Document, ReadReport, Tokens, hexadecimal};
use super::tokenize::{Encoder, tokenize_files};
use super::{DataConfig, Format, OnBadRecord};

/// Counts up whenever the same files and settings would give other tokens, or the layout changes.
const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"LOWRANKT";
const CHECKSUM_BYTES: usize = 32;
const DOCUMENT_BYTES: usize = 32;

/// The folder of the cache: `$LOWRANK_CACHE/tokens`, else `lowrank/tokens` in `$XDG_CACHE_HOME` or `~/.cache`. `None` where
/// no home folder is known.
pub fn default_cache_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = variable("LOWRANK_CACHE") {
        return Some(folder.join("tokens"));
    }
    let base = variable("XDG_CACHE_HOME").or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?;
    Some(base.join("lowrank").join("tokens"))
}

/// Takes the tokens of some files from the cache, or makes them and puts them there. A cache that cannot be read or written
/// costs a warning, not the run.
///
/// # Errors
/// As [`tokenize_files`].
pub fn load_or_tokenize(
    files: &[PathBuf],
    config: &DataConfig,
    encoder: &Encoder<'_>,
    folder: &Path,
) -> Result<Dataset, DataError> {
    let path = folder.join(format!("{}.tokens", key(files, config, encoder)?));
    if path.exists() {
        match read(&path, files) {
            Ok(dataset) => {
                tracing::info!("tokens from the cache: {}", path.display());
                return Ok(dataset);
            }
            Err(reason) => {
                tracing::warn!("cache file {} is unusable and will be built again: {reason}", path.display())
            }
        }
    }
    let dataset = tokenize_files(files, config, encoder)?;
    if let Err(reason) = write(&path, &dataset) {
        tracing::warn!("cannot keep the tokens for the next run: {reason}; LOWRANK_CACHE names another folder");
    }
    Ok(dataset)
}

/// What the tokens depend on, with every default filled in.
#[derive(Serialize)]
struct Key<'a> {
    version: u32,
    files: Vec<(String, String)>,
    tokenizer: &'a str,
    chat_template: Option<&'a str>,
    max_seq_length: usize,
    packing: bool,
    train_on_inputs: bool,
    format: Format,
    on_bad_record: OnBadRecord,
    fields: &'a std::collections::BTreeMap<String, String>,
}

fn key(files: &[PathBuf], config: &DataConfig, encoder: &Encoder<'_>) -> Result<String, DataError> {
    let hashed = files.iter().map(|path| {
        // The ending decides how the bytes are read.
        let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let hash = hash_file(path).map_err(|source| DataError::Io { path: path.clone(), source })?;
        Ok((ending, hash))
    });
    let key = Key {
        version: VERSION,
        files: hashed.collect::<Result<_, DataError>>()?,
        tokenizer: encoder.tokenizer.fingerprint(),
        chat_template: encoder.chat.map(|chat| chat.source()),
        max_seq_length: config.max_seq_length,
        packing: config.packing,
        train_on_inputs: config.train_on_inputs,
        format: config.format,
        on_bad_record: config.on_bad_record,
        fields: &config.fields,
    };
    // Strings, numbers and lists always have a JSON form.
    let text = serde_json::to_string(&key).unwrap_or_default();
    Ok(hexadecimal(&Sha256::digest(text.as_bytes())))
}

fn hash_file(path: &Path) -> std::io::Result<String> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut hash = Sha256::new();
    std::io::copy(&mut reader, &mut hash)?;
    Ok(hexadecimal(&hash.finalize()))
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    numbering: Vec<Numbering>,
    report: ReadReport,
    tokens: usize,
    documents: usize,
}

fn write(path: &Path, dataset: &Dataset) -> Result<(), String> {
    let tokens = dataset.tokens();
    let header = Header {
        version: VERSION,
        numbering: dataset.files().iter().map(|file| file.numbering).collect(),
        report: dataset.report().clone(),
        tokens: tokens.ids.len(),
        documents: dataset.documents().len(),
    };
    let header = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
    let size = MAGIC.len()
        + 8
        + header.len()
        + tokens.ids.len() * 5
        + dataset.documents().len() * DOCUMENT_BYTES
        + CHECKSUM_BYTES;
    let mut bytes = Vec::with_capacity(size);
    bytes.extend(MAGIC);
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(&header);
    bytes.extend(tokens.ids.iter().flat_map(|id| id.to_le_bytes()));
    bytes.extend(tokens.counted.iter().map(|counted| u8::from(*counted)));
    for document in dataset.documents() {
        let fields = [document.length as u64, document.record, document.file as u64, document.position];
        bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    }
    let checksum = Sha256::digest(&bytes);
    bytes.extend(checksum);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
    }
    write_bytes_atomic(path, &bytes).map_err(|error| error.to_string())
}

fn read(path: &Path, files: &[PathBuf]) -> Result<Dataset, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let (content, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or("it is too short")?;
    if Sha256::digest(content).as_slice() != checksum {
        return Err("its checksum does not match its content".to_owned());
    }
    let mut rest = content.strip_prefix(MAGIC).ok_or("it is no cache file")?;
    let header_length = u64::from_le_bytes(take(&mut rest, 8)?.try_into().map_err(|_| "it is too short")?);
    let header = take(&mut rest, usize::try_from(header_length).map_err(|_| "its header is too long")?)?;
    let header: Header = serde_json::from_slice(header).map_err(|error| error.to_string())?;
    if header.version != VERSION || header.numbering.len() != files.len() {
        return Err("it is of another version".to_owned());
    }
    let size = |count: usize, each: usize| count.checked_mul(each).ok_or("its sizes overflow");
    let ids = take(&mut rest, size(header.tokens, 4)?)?
        .chunks_exact(4)
        .map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
        .collect();
    let counted = take(&mut rest, header.tokens)?.iter().map(|counted| *counted != 0).collect();
    let documents =
        read_documents(take(&mut rest, size(header.documents, DOCUMENT_BYTES)?)?, header.tokens, files.len())?;
    if !rest.is_empty() || documents.is_empty() {
        return Err("its sizes do not fit".to_owned());
    }
    let files = files
        .iter()
        .zip(header.numbering)
        .map(|(path, numbering)| DataFile { path: path.clone(), numbering })
        .collect();
    Ok(Dataset::new(Arc::new(Tokens { ids, counted }), documents, files, Arc::new(header.report)))
}

fn read_documents(bytes: &[u8], tokens: usize, files: usize) -> Result<Vec<Document>, String> {
    let mut start = 0;
    let mut documents = Vec::with_capacity(bytes.len() / DOCUMENT_BYTES);
    for entry in bytes.chunks_exact(DOCUMENT_BYTES) {
        let (fields, _) = entry.as_chunks::<8>();
        let field = |index: usize| u64::from_le_bytes(fields[index]);
        let (length, file) = (field(0) as usize, field(2) as usize);
        if length > tokens - start || file >= files {
            return Err("a document reaches beyond its data".to_owned());
        }
        documents.push(Document { start, length, record: field(1), file, position: field(3) });
        start += length;
    }
    Ok(documents)
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], String> {
    let (taken, left) = rest.split_at_checked(count).ok_or("it is too short")?;
    *rest = left;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::data::testing::{encoder, tokenizer, write as write_file};
    use crate::data::{Paths, load};

    fn cached_files(folder: &Path) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    #[test]
    fn a_cache_gives_what_tokenising_gave() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        let tokenizer = tokenizer();
        let path = write_file(
            &folder,
            "a.jsonl",
            b"{\"prompt\": \"one\", \"completion\": \"two\"}\n{}\n{\"prompt\": \"3\", \"completion\": \"4\"}\n",
        );
        let config = DataConfig { on_bad_record: OnBadRecord::Skip, ..DataConfig::default() };
        let run = |config: &DataConfig| {
            load("train", &Paths::One(path.clone()), config, &encoder(&tokenizer), Some(&cache)).unwrap()
        };
        let built = run(&config);
        let files = cached_files(&cache);
        assert_eq!(files.len(), 1);
        let written = std::fs::metadata(&files[0]).unwrap().modified().unwrap();
        let found = run(&config);
        assert_eq!(std::fs::metadata(&files[0]).unwrap().modified().unwrap(), written, "the second run must not write");
        assert_eq!(found.fingerprint(), built.fingerprint());
        assert_eq!(found.documents(), built.documents());
        assert_eq!(found.report(), built.report());
        assert_eq!(found.tokens(), built.tokens());
        assert_eq!(found.describe_record(2), format!("{path}:3"));

        run(&DataConfig { train_on_inputs: true, ..config.clone() });
        assert_eq!(cached_files(&cache).len(), 2, "other settings are another entry");
        std::fs::write(&path, "{\"prompt\": \"one\", \"completion\": \"other\"}\n").unwrap();
        assert_ne!(run(&config).fingerprint(), built.fingerprint(), "other content is another entry");
        run(&DataConfig { cache: false, max_seq_length: 99, ..config });
        assert_eq!(cached_files(&cache).len(), 3, "the cache can be switched off");
    }

    #[test]
    fn damage_is_noticed_and_repaired() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        let tokenizer = tokenizer();
        let path = write_file(&folder, "a.jsonl", b"{\"text\": \"hello there\"}\n{\"text\": \"more of it\"}\n");
        let run = || {
            load("train", &Paths::One(path.clone()), &DataConfig::default(), &encoder(&tokenizer), Some(&cache))
                .unwrap()
        };
        let built = run();
        let file = cached_files(&cache).remove(0);
        let good = std::fs::read(&file).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 4;
        for bad in
            [&good[..good.len() - 1], &flipped, b"", &good[..20], b"LOWRANKT and some more bytes than a checksum has"]
        {
            std::fs::write(&file, bad).unwrap();
            assert!(read(&file, &[PathBuf::from(&path)]).is_err());
            assert_eq!(run().fingerprint(), built.fingerprint());
            assert_eq!(std::fs::read(&file).unwrap(), good, "the entry is repaired");
        }
        // A file that lies about its sizes under a right checksum.
        let lie = |header: &str, body: usize| {
            let mut bytes =
                [MAGIC.as_slice(), &(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![1; body]].concat();
            let checksum = Sha256::digest(&bytes);
            bytes.extend(checksum);
            std::fs::write(&file, bytes).unwrap();
            read(&file, &[PathBuf::from(&path)]).unwrap_err()
        };
        let header = |tokens: u64, documents: u64| {
            let report = serde_json::to_string(&ReadReport::default()).unwrap();
            format!(
                "{{\"version\": {VERSION}, \"numbering\": [\"line\"], \"report\": {report}, \"tokens\": {tokens}, \"documents\": {documents}}}"
            )
        };
        assert_eq!(lie(&header(u64::MAX, 1), 8), "its sizes overflow");
        assert_eq!(lie(&header(100, 1), 8), "it is too short");
        assert_eq!(lie(&header(1, 1), 5 + 32), "a document reaches beyond its data");
        assert_eq!(lie(&header(1, 0), 5), "its sizes do not fit");
    }

    #[test]
    fn an_unwritable_cache_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let blocked = write_file(&folder, "file", b"not a folder");
        let path = write_file(&folder, "a.jsonl", b"{\"text\": \"hello there\"}\n");
        let tokenizer = tokenizer();
        let dataset =
            load("train", &Paths::One(path), &DataConfig::default(), &encoder(&tokenizer), Some(Path::new(&blocked)))
                .unwrap();
        assert_eq!(dataset.statistics().records, 1);
    }
}
