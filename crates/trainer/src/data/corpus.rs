//! Plain text of any size, read piece by piece: what a streamed run and a new tokenizer learn from.
//!
//! A `.txt` file is one document, as everywhere; a JSONL file holds one in the field `text` of each line. A text file
//! is read in pieces of at most [`PIECE_BYTES`], cut behind an end of line where there is one, and each piece is
//! tokenised by itself: the ids of a file that is longer may differ at the cuts from those of the file tokenised
//! whole. Where a piece begins depends on the file alone, so that any position can be found again.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use lowrank_models::hf::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::error::DataError;
use super::packing::Random;
use super::record::{BadRecord, into_text};
use super::source::{Numbering, bad_file, empty, resolve_files, text_from_bytes};
use super::store::hexadecimal;
use super::{DataConfig, OnBadRecord, Paths};

/// Longest piece of a text file.
pub const PIECE_BYTES: usize = 64 << 10;

/// Longest line of a JSONL file: a longer one is no line of text.
const LONGEST_LINE: u64 = 256 << 20;

/// What is read of the beginning and of the end of a file to tell whether it is still the same.
const FINGERPRINT_BYTES: u64 = 64 << 10;

/// The endings that can be streamed.
const ENDINGS: [&str; 3] = ["txt", "jsonl", "ndjson"];

/// Bits of a record's number that hold its line; the file's number is above them.
const LINE_BITS: u32 = 40;

/// Files of plain text.
#[derive(Debug, Clone)]
pub struct TextFiles {
    files: Arc<[TextFile]>,
    text_field: Arc<str>,
    bytes: u64,
    fingerprint: String,
}

/// Files of plain text, to be read while training.
#[derive(Debug, Clone)]
pub struct Corpus {
    text: TextFiles,
    tokenizer: Arc<Tokenizer>,
    on_bad_record: OnBadRecord,
    fingerprint: String,
}

#[derive(Debug)]
struct TextFile {
    path: PathBuf,
    bytes: u64,
    is_whole: bool,
}

/// A position between two tokens of a corpus that is read again and again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamPosition {
    /// Pass over the files, from 0.
    pub pass: u64,
    /// Number of the file in the order of this pass.
    pub file: usize,
    /// Byte of the file at which the piece begins.
    pub offset: u64,
    /// Lines of the file before it.
    pub line: u64,
    /// The piece goes on with the document of the piece before it.
    pub inside: bool,
    /// Tokens of the piece that were given out already.
    pub skip: usize,
}

/// A part of a document, not tokenised yet.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    /// Where it begins.
    pub at: StreamPosition,
    /// Number of the document, for messages.
    pub record: u64,
    /// Whether the document ends with it.
    pub is_last: bool,
    /// What is in the file.
    pub bytes: Vec<u8>,
    is_line: bool,
}

impl TextFiles {
    /// Looks at the files without reading them through.
    ///
    /// # Errors
    /// A file that cannot be read, is empty or is neither text nor JSONL.
    pub fn open(paths: &Paths, config: &DataConfig) -> Result<Self, DataError> {
        let mut hash = Sha256::new();
        let mut files = Vec::new();
        for path in resolve_files(paths.entries())? {
            files.push(look_at(path, &mut hash)?);
        }
        if files.len() >= 1 << (u64::BITS - LINE_BITS) {
            let reason = format!("has {} files, more than can be streamed", files.len());
            return Err(DataError::Config { key: "train", reason });
        }
        let bytes = files.iter().map(|file| file.bytes).sum();
        let text_field = config.fields.get("text").map_or("text", String::as_str).into();
        Ok(Self { files: files.into(), text_field, bytes, fingerprint: hexadecimal(&hash.finalize()) })
    }

    /// Size of all files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The text of all files once, in pieces, in the given order.
    pub fn texts(&self) -> impl Iterator<Item = Result<String, DataError>> + Send + '_ {
        let mut reader = PieceReader::new(self, None, StreamPosition::default());
        std::iter::from_fn(move || match reader.next_piece() {
            Ok(piece) if piece.at.pass > 0 => None,
            Ok(piece) => Some(self.text(&piece).map_err(|bad| {
                let location = self.describe_record(piece.record);
                DataError::Record { location, bad }
            })),
            Err(error) => Some(Err(error)),
        })
    }

    /// Where a document came from, as `train.jsonl:17`.
    pub fn describe_record(&self, record: u64) -> String {
        let line = record & ((1 << LINE_BITS) - 1);
        match self.files.get((record >> LINE_BITS) as usize) {
            Some(file) if file.is_whole => Numbering::Whole.location(&file.path, 0),
            Some(file) => Numbering::Line.location(&file.path, line),
            None => format!("record {record}"),
        }
    }

    /// The files in the order of a pass: as given, or shuffled by a seed.
    fn order(&self, pass: u64, shuffle: Option<u64>) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.files.len()).collect();
        if let Some(seed) = shuffle {
            Random::new(&[seed, pass, 0x57e4]).shuffle(&mut order);
        }
        order
    }

    fn text(&self, piece: &Piece) -> Result<String, BadRecord> {
        match piece.is_line {
            true => self.text_of_line(&piece.bytes),
            false => text_of_piece(piece).map(str::to_owned),
        }
    }

    fn text_of_line(&self, line: &[u8]) -> Result<String, BadRecord> {
        let text = text_from_bytes(line)?.trim();
        let value: Value = serde_json::from_str(text).map_err(|error| {
            BadRecord::new("not valid JSON", format!("not valid JSON: {error}"))
                .with_hint("each line must hold one JSON object with the field `text`")
        })?;
        let field = &*self.text_field;
        let Value::Object(mut object) = value else {
            return Err(BadRecord::new("not an object", "expected a JSON object with the field `text`"));
        };
        match object.remove(field) {
            None | Some(Value::Null) => Err(BadRecord::new("missing field", "is missing").in_field(field).with_hint(
                "only plain text is read: data.fields names another field, data.streaming = false reads prompts, chats",
            )),
            Some(value) => into_text(value).map_err(|bad| bad.in_field(field)),
        }
    }
}

impl Corpus {
    /// Looks at the files without reading them through.
    ///
    /// # Errors
    /// As [`TextFiles::open`]; a tokenizer without an end-of-text token.
    pub fn open(paths: &Paths, config: &DataConfig, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        tokenizer.eos_id()?;
        let text = TextFiles::open(paths, config)?;
        let settings = format!(
            "{} {} {} {:?} {PIECE_BYTES}",
            text.fingerprint,
            tokenizer.fingerprint(),
            text.text_field,
            config.on_bad_record
        );
        tracing::info!("train data: {} files of {} bytes, read while training", text.files.len(), text.bytes);
        Ok(Self {
            text,
            tokenizer: Arc::new(tokenizer.clone()),
            on_bad_record: config.on_bad_record,
            fingerprint: hexadecimal(&Sha256::digest(settings.as_bytes())),
        })
    }

    /// A hash of the sizes, beginnings and ends of all files, of the tokenizer and of the settings that decide the ids.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The files.
    pub fn text(&self) -> &TextFiles {
        &self.text
    }

    /// Passes done, with the share of the current one.
    pub fn progress(&self, position: &StreamPosition, shuffle: Option<u64>) -> f64 {
        let order = self.text.order(position.pass, shuffle);
        let before: u64 = order.iter().take(position.file).map(|&file| self.text.files[file].bytes).sum();
        position.pass as f64 + (before + position.offset) as f64 / self.text.bytes.max(1) as f64
    }

    /// What a document that cannot be used does.
    pub(super) fn on_bad_record(&self) -> OnBadRecord {
        self.on_bad_record
    }

    /// The ids of a piece: a document begins with what the tokenizer puts before a text, and ends with the end-of-text
    /// token.
    ///
    /// # Errors
    /// It is not text, has no text, or the tokenizer refuses it.
    pub(super) fn encode(&self, piece: &Piece) -> Result<Vec<u32>, BadRecord> {
        let text = self.text.text(piece)?;
        let begins = !piece.at.inside;
        if begins && piece.is_last && text.trim().is_empty() {
            return Err(BadRecord::new("empty", "is empty"));
        }
        let refused =
            |error: lowrank_models::hf::HfError| BadRecord::new("refused by the tokenizer", error.to_string());
        let eos = self.tokenizer.eos_id().map_err(refused)?;
        let mut ids = self.tokenizer.encode(&text, begins).map_err(refused)?;
        if piece.is_last {
            if ids.last() != Some(&eos) {
                ids.push(eos);
            }
        } else if begins && ids.last() == Some(&eos) {
            // Some tokenizers end every text; this one goes on.
            ids.pop();
        }
        Ok(ids)
    }
}

fn look_at(path: PathBuf, hash: &mut Sha256) -> Result<TextFile, DataError> {
    let io = |source| DataError::Io { path: path.clone(), source };
    let mut file = File::open(&path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if metadata.is_dir() {
        return Err(bad_file(&path, "is a folder; expected a file", "list the files of the folder"));
    }
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    if !ENDINGS.contains(&ending.as_str()) {
        let reason = format!("a `{ending}` file cannot be streamed; expected one of .{}", ENDINGS.join(", ."));
        return Err(bad_file(&path, reason, "convert it to JSONL, or set data.streaming = false"));
    }
    let bytes = metadata.len();
    if bytes == 0 {
        return Err(empty(&path));
    }
    let mut ends = Vec::new();
    (&mut file).take(FINGERPRINT_BYTES).read_to_end(&mut ends).map_err(io)?;
    file.seek(SeekFrom::Start(bytes.saturating_sub(FINGERPRINT_BYTES))).map_err(io)?;
    file.take(FINGERPRINT_BYTES).read_to_end(&mut ends).map_err(io)?;
    hash.update(format!("\n{ending} {bytes} "));
    hash.update(Sha256::digest(&ends));
    Ok(TextFile { is_whole: ending == "txt", path, bytes })
}

/// The text of a piece of a text file. A fault is reported with its place in the file.
fn text_of_piece(piece: &Piece) -> Result<&str, BadRecord> {
    if piece.at.offset == 0 {
        return text_from_bytes(&piece.bytes);
    }
    let text = std::str::from_utf8(&piece.bytes).map_err(|error| {
        let at = error.valid_up_to();
        let found = piece.bytes.get(at).copied().unwrap_or_default();
        let at = piece.at.offset + at as u64;
        BadRecord::new("invalid UTF-8", format!("not valid UTF-8: byte {at} is 0x{found:02x}"))
            .with_hint("convert the file to UTF-8, for example with iconv")
    })?;
    match text.find('\0') {
        Some(at) => {
            let at = piece.at.offset + at as u64;
            Err(BadRecord::new("NUL byte", format!("byte {at} is NUL, which no text contains"))
                .with_hint("the file is binary or damaged"))
        }
        None => Ok(text),
    }
}

/// Reads a corpus without end, pass after pass.
pub(super) struct PieceReader<'a> {
    text: &'a TextFiles,
    shuffle: Option<u64>,
    order: Vec<usize>,
    /// Where the next piece begins; `skip` is not used.
    next: StreamPosition,
    open: Option<BufReader<File>>,
    /// Pieces of the open file so far; `None` where reading began inside of it.
    pieces: Option<u64>,
}

impl<'a> PieceReader<'a> {
    /// A reader that begins with the piece at a position; `shuffle` is the seed of the files' order, if any.
    pub fn new(text: &'a TextFiles, shuffle: Option<u64>, at: StreamPosition) -> Self {
        let order = text.order(at.pass, shuffle);
        let pieces = (at.offset == 0).then_some(0);
        Self { text, shuffle, order, next: StreamPosition { skip: 0, ..at }, open: None, pieces }
    }

    /// The next pieces, with `bytes` of text or a little more; at least one.
    ///
    /// # Errors
    /// A file cannot be read, has changed, or holds nothing.
    pub fn next_pieces(&mut self, bytes: usize) -> Result<Vec<Piece>, DataError> {
        let (mut pieces, mut size) = (Vec::new(), 0);
        while size < bytes || pieces.is_empty() {
            let piece = self.next_piece()?;
            size += piece.bytes.len().max(1);
            pieces.push(piece);
        }
        Ok(pieces)
    }

    fn next_piece(&mut self) -> Result<Piece, DataError> {
        loop {
            if self.next.file >= self.order.len() {
                self.next = StreamPosition { pass: self.next.pass + 1, ..StreamPosition::default() };
                self.order = self.text.order(self.next.pass, self.shuffle);
            }
            let number = self.order[self.next.file];
            let text = self.text;
            let file = &text.files[number];
            if self.next.offset >= file.bytes {
                if self.pieces == Some(0) {
                    return Err(empty(&file.path));
                }
                self.next =
                    StreamPosition { pass: self.next.pass, file: self.next.file + 1, ..StreamPosition::default() };
                (self.open, self.pieces) = (None, Some(0));
                continue;
            }
            let at = self.next;
            let bytes = self.read(file)?;
            let is_line = !file.is_whole;
            if is_line && bytes.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            self.pieces = self.pieces.map(|pieces| pieces + 1);
            let is_last = is_line || self.next.offset >= file.bytes;
            // Lines count from 1; a text file is one record.
            let line = if is_line { at.line + 1 } else { 0 };
            return Ok(Piece { at, record: (number as u64) << LINE_BITS | line, is_last, bytes, is_line });
        }
    }

    /// The bytes of the next piece, and the position behind it.
    fn read(&mut self, file: &TextFile) -> Result<Vec<u8>, DataError> {
        let io = |source| DataError::Io { path: file.path.clone(), source };
        let offset = self.next.offset;
        let reader = match self.open.take() {
            Some(reader) => reader,
            None => {
                let mut opened = File::open(&file.path).map_err(io)?;
                opened.seek(SeekFrom::Start(offset)).map_err(io)?;
                BufReader::with_capacity(PIECE_BYTES, opened)
            }
        };
        let reader = self.open.insert(reader);
        let left = file.bytes - offset;
        let mut bytes = Vec::new();
        if file.is_whole {
            reader.by_ref().take(left.min(PIECE_BYTES as u64)).read_to_end(&mut bytes).map_err(io)?;
            if (bytes.len() as u64) < left {
                let keep = cut(&bytes);
                reader.seek_relative(keep as i64 - bytes.len() as i64).map_err(io)?;
                bytes.truncate(keep);
            }
        } else {
            reader.by_ref().take(left.min(LONGEST_LINE)).read_until(b'\n', &mut bytes).map_err(io)?;
            if bytes.len() as u64 == LONGEST_LINE && bytes.last() != Some(&b'\n') {
                let reason = format!("line {} is longer than {} MiB", self.next.line + 1, LONGEST_LINE >> 20);
                return Err(bad_file(&file.path, reason, "JSONL holds one object a line; name plain text .txt"));
            }
        }
        if bytes.is_empty() {
            return Err(bad_file(
                &file.path,
                "became shorter while it was read",
                "leave the data alone while training",
            ));
        }
        self.next.offset += bytes.len() as u64;
        self.next.line += u64::from(!file.is_whole);
        self.next.inside = file.is_whole;
        Ok(bytes)
    }
}

/// Where a piece of a longer text ends: behind its last end of line, else before its last blank, else between
/// characters.
fn cut(bytes: &[u8]) -> usize {
    if let Some(at) = bytes.iter().rposition(|byte| *byte == b'\n') {
        return at + 1;
    }
    if let Some(at) = bytes.iter().rposition(|byte| *byte == b' ').filter(|at| *at > 0) {
        return at;
    }
    // A character of UTF-8 has at most three continuation bytes.
    let start = bytes.iter().rposition(|byte| byte & 0xc0 != 0x80).unwrap_or(0);
    if start > 0 && bytes.len() - start <= 4 { start } else { bytes.len() }
}
