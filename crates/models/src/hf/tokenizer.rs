//! A model's tokenizer: text to ids and back, with the special ids that training and generation need.
//!
//! Reads `tokenizer.json`. The names of the special tokens come from `tokenizer_config.json`, then `special_tokens_map.json`;
//! the ids that end a text also from `generation_config.json` and `config.json`. Truncation and padding settings that some
//! files carry are switched off: lengths are the data loader's business.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    PostProcessor as _, PreTokenizerWrapper, SplitDelimiterBehavior, TruncationDirection, TruncationParams,
    TruncationStrategy,
};

use super::error::HfError;
use super::{names_in, read_json_if_there};

/// The file that is read.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// A loaded tokenizer. Cheap to share between threads by reference.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    special: SpecialIds,
    vocab_size: usize,
    /// The model knows ids below this one only; set where it knows fewer than the tokenizer has.
    rows: Option<usize>,
    fingerprint: String,
}

/// The ids with a meaning of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct SpecialIds {
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
}

/// The ids of a text and the bytes each came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetEncoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id the byte range of the text it stands for; empty (`0..0`) for tokens that were added around the text.
    /// The parts of one character that is split between tokens all have the whole character's range.
    pub offsets: Vec<Range<usize>>,
}

/// The ids of a text, or of two texts that belong together, with special tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairEncoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Token types: 0 for the first text, 1 for the second where the tokenizer tells them apart.
    pub types: Vec<u32>,
    /// Whether something was cut off.
    pub cut: bool,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder.
    ///
    /// # Errors
    /// `tokenizer.json` is missing or not valid; the end-of-text token that the configuration names is not in it.
    pub fn from_folder(folder: &Path) -> Result<Self, HfError> {
        let path = folder.join(TOKENIZER_FILE);
        if !path.is_file() {
            return Err(missing(folder));
        }
        let bytes = std::fs::read(&path).map_err(|source| HfError::io("read", &path, source))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| {
            HfError::bad_file(
                &path,
                format!("not a usable tokenizer: {error}"),
                "download the file again; it may be truncated",
            )
        })?;
        use_family_rules(folder, &mut inner)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| HfError::bad_file(&path, error.to_string(), ""))?;
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |last| last as usize + 1);
        let special = read_special_ids(folder, &inner)?;
        let fingerprint = fingerprint(&bytes, &special, inner.get_pre_tokenizer());
        Ok(Self { inner, path, special, vocab_size, rows: None, fingerprint })
    }

    /// This tokenizer for a model with embeddings for the ids below `rows`. Some models lack those of a few added tokens, which
    /// is harmless until a text holds one of them: such a text is refused.
    ///
    /// # Errors
    /// The model lacks an end-of-text token.
    pub fn for_model(mut self, rows: usize) -> Result<Self, HfError> {
        if self.vocab_size > rows {
            self.rows = Some(rows);
            self.special.pad = self.special.pad.filter(|&id| (id as usize) < rows);
            self.fingerprint = format!("{}, ids below {rows}", self.fingerprint);
        }
        self.check_ids(&self.special.eos)?;
        Ok(self)
    }

    /// Refuses ids that the model does not know.
    fn check_ids(&self, ids: &[u32]) -> Result<(), HfError> {
        let Some(rows) = self.rows else { return Ok(()) };
        let Some(&id) = ids.iter().find(|&&id| id as usize >= rows) else { return Ok(()) };
        let token = self.id_to_token(id).unwrap_or_default();
        Err(HfError::bad_file(
            &self.path,
            format!("the token `{token}` has id {id}, but the model's vocab_size is {rows}"),
            "tokenizer and weights seem to belong to different models",
        ))
    }

    /// The ids of a text. `add_special_tokens` adds what the tokenizer puts around a text (often the begin-of-text token);
    /// text rendered by a chat template has these already.
    ///
    /// # Errors
    /// The tokenizer refuses the text (its vocabulary lacks a symbol and has no unknown token); an id that the model lacks.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, HfError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|error| self.refused(error))?;
        self.check_ids(encoding.get_ids())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`Tokenizer::encode`] of many texts, on all cores.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_batch(&self, texts: &[&str], add_special_tokens: bool) -> Result<Vec<Vec<u32>>, HfError> {
        let encodings =
            self.inner.encode_batch_fast(texts.to_vec(), add_special_tokens).map_err(|error| self.refused(error))?;
        encodings.iter().try_for_each(|encoding| self.check_ids(encoding.get_ids()))?;
        Ok(encodings.iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// The ids of a text with the bytes each came from.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str, add_special_tokens: bool) -> Result<OffsetEncoding, HfError> {
        let encoding = self.inner.encode(text, add_special_tokens).map_err(|error| self.refused(error))?;
        self.check_ids(encoding.get_ids())?;
        Ok(with_offsets(&encoding))
    }

    /// This tokenizer for rows of at most `longest` ids, special tokens included: [`Tokenizer::encode_pair`] cuts the end of
    /// what is longer, of a pair always that of the longer text.
    ///
    /// # Errors
    /// The special tokens alone are longer.
    pub fn cutting_at(&self, longest: usize) -> Result<Self, HfError> {
        let added = self.inner.get_post_processor().map_or(0, |processor| processor.added_tokens(true));
        if longest <= added {
            let reason =
                format!("puts {added} special tokens around a pair of texts; rows of {longest} tokens have no room");
            return Err(HfError::bad_file(&self.path, reason, "raise max_seq_length"));
        }
        let mut cutting = self.clone();
        let params = TruncationParams {
            max_length: longest,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
            direction: TruncationDirection::Right,
        };
        cutting.inner.with_truncation(Some(params)).map_err(|error| self.refused(error))?;
        Ok(cutting)
    }

    /// The ids and types of a text, or of a pair, as the tokenizer puts them together for classification.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, text: &str, pair: Option<&str>) -> Result<PairEncoding, HfError> {
        let encoding = match pair {
            Some(pair) => self.inner.encode_fast((text, pair), true),
            None => self.inner.encode_fast(text, true),
        }
        .map_err(|error| self.refused(error))?;
        self.check_ids(encoding.get_ids())?;
        Ok(PairEncoding {
            ids: encoding.get_ids().to_vec(),
            types: encoding.get_type_ids().to_vec(),
            cut: !encoding.get_overflowing().is_empty(),
        })
    }

    /// [`Tokenizer::encode_with_offsets`] of many texts, on all cores.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_batch_with_offsets(
        &self,
        texts: &[&str],
        add_special_tokens: bool,
    ) -> Result<Vec<OffsetEncoding>, HfError> {
        let encodings =
            self.inner.encode_batch(texts.to_vec(), add_special_tokens).map_err(|error| self.refused(error))?;
        encodings.iter().try_for_each(|encoding| self.check_ids(encoding.get_ids()))?;
        Ok(encodings.iter().map(with_offsets).collect())
    }

    /// The text of some ids; `skip_special_tokens` leaves out begin and end markers and the like. Unknown ids are left out.
    ///
    /// # Errors
    /// The decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, HfError> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| self.refused(error))
    }

    /// A decoder for text that is shown while it is generated.
    pub fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special_tokens, ids: Vec::new(), shown: 0 }
    }

    /// One more than the largest id: the rows that an embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, if it is in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, if there is one.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The begin-of-text id.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The id that ends a training text.
    ///
    /// # Errors
    /// No configuration file of the folder names one.
    pub fn eos_id(&self) -> Result<u32, HfError> {
        self.special.eos.first().copied().ok_or_else(|| {
            let reason = "no end-of-text token: tokenizer_config.json has no `eos_token` and no configuration has `eos_token_id`";
            HfError::bad_file(&self.path, reason, "add `eos_token` to tokenizer_config.json")
        })
    }

    /// Every id that ends generation: the tokenizer's own first, then those of `generation_config.json` and `config.json`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// The id that fills up short rows: the padding token, else the end-of-text token, else the unknown token, else 0.
    /// Padded positions never count, so any id of the vocabulary will do.
    pub fn pad_id(&self) -> u32 {
        self.special.pad.or(self.special.eos.first().copied()).or(self.special.unk).unwrap_or(0)
    }

    /// A hash of everything that decides which ids a text gets: `tokenizer.json` and the special ids, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn refused(&self, error: tokenizers::Error) -> HfError {
        HfError::Tokenizer { path: self.path.clone(), reason: error.to_string() }
    }
}

/// Turns ids into text piece by piece, holding back bytes that are not a whole character yet.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    /// The ids whose text was shown last, kept because decoders look at neighbours, then those not shown yet.
    ids: Vec<u32>,
    /// How many of `ids` were shown.
    shown: usize,
}

impl DecodeStream<'_> {
    /// Adds an id and returns the text that is complete with it, often empty in the middle of a character.
    ///
    /// # Errors
    /// The decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, HfError> {
        self.ids.push(id);
        let text = self.unseen()?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) || text.is_empty() {
            return Ok(String::new());
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }

    /// The text that was held back, with a replacement character for an incomplete one.
    ///
    /// # Errors
    /// The decoder fails.
    pub fn finish(self) -> Result<String, HfError> {
        self.unseen()
    }

    /// The text of all ids beyond that of the shown ones.
    fn unseen(&self) -> Result<String, HfError> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special_tokens)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        // A decoder that rewrites what it gave before (it should not) loses text here instead of failing.
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}

fn with_offsets(encoding: &tokenizers::Encoding) -> OffsetEncoding {
    OffsetEncoding {
        ids: encoding.get_ids().to_vec(),
        offsets: encoding.get_offsets().iter().map(|(start, end)| *start..*end).collect(),
    }
}

/// How Qwen 2 splits a text before merging bytes: words with a leading sign, single digits, runs of signs, line ends, spaces.
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Transformers builds the tokenizer of Qwen 2 models from the vocabulary and its own splitting rule, whatever
/// `tokenizer.json` says. The files of the Qwen models agree with that rule; for others it decides the ids that the
/// model was trained with, so it is followed here.
fn use_family_rules(folder: &Path, inner: &mut tokenizers::Tokenizer) -> Result<(), HfError> {
    let text_at = |file: &str, key: &str| -> Result<Option<String>, HfError> {
        let json = read_json_if_there(&folder.join(file))?;
        Ok(json.and_then(|json| json[key].as_str().map(str::to_string)))
    };
    let class = text_at("tokenizer_config.json", "tokenizer_class")?.unwrap_or_default();
    let family = text_at("config.json", "model_type")?.unwrap_or_default();
    let is_qwen2 = family == "qwen2" || class.trim_end_matches("Fast") == "Qwen2Tokenizer";
    if !is_qwen2 || !matches!(inner.get_model(), tokenizers::ModelWrapper::BPE(_)) {
        return Ok(());
    }
    let words = Split::new(SplitPattern::Regex(QWEN2_WORDS.to_string()), SplitDelimiterBehavior::Isolated, false)
        .map_err(|error| HfError::bad_file(folder, format!("splitting rule of Qwen 2: {error}"), ""))?;
    inner.with_normalizer(Some(NFC));
    inner.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), ByteLevel::new(false, false, false).into()])));
    Ok(())
}

fn missing(folder: &Path) -> HfError {
    let found = names_in(folder);
    let hint = if found.iter().any(|name| matches!(name.as_str(), "tokenizer.model" | "vocab.json" | "vocab.txt")) {
        "only an older tokenizer format is there: convert it with transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    } else {
        "copy tokenizer.json and tokenizer_config.json from the model's repository"
    };
    HfError::MissingFile {
        folder: folder.to_path_buf(),
        wanted: TOKENIZER_FILE.to_string(),
        found,
        hint: hint.to_string(),
    }
}

/// The text of a special token: `"</s>"`, or `{"content": "</s>", ...}`.
pub(crate) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
}

fn read_special_ids(folder: &Path, inner: &tokenizers::Tokenizer) -> Result<SpecialIds, HfError> {
    let config_path = folder.join("tokenizer_config.json");
    let named = [read_json_if_there(&config_path)?, read_json_if_there(&folder.join("special_tokens_map.json"))?];
    let numbered =
        [read_json_if_there(&folder.join("generation_config.json"))?, read_json_if_there(&folder.join("config.json"))?];
    let text_of = |key: &str| named.iter().flatten().find_map(|json| token_text(&json[key]));
    let id_of = |name: &str| -> Option<u32> {
        let token = text_of(&format!("{name}_token"))?;
        let id = inner.token_to_id(token);
        if id.is_none() {
            tracing::warn!("{}: {name}_token `{token}` is not in the vocabulary and is ignored", folder.display());
        }
        id
    };
    let numbers_of = |name: &str| -> Vec<u32> {
        let values = numbered.iter().flatten().map(|json| &json[&format!("{name}_token_id")]);
        let ids = values.flat_map(|value| match value {
            Value::Array(ids) => ids.iter().collect(),
            one => vec![one],
        });
        // Some configurations carry ids beyond the vocabulary or -1.
        ids.filter_map(Value::as_u64)
            .filter_map(|id| u32::try_from(id).ok())
            .filter(|id| inner.id_to_token(*id).is_some())
            .collect()
    };
    if let Some(token) = text_of("eos_token")
        && inner.token_to_id(token).is_none()
    {
        let reason = format!("eos_token `{token}` is not in the vocabulary of {TOKENIZER_FILE}");
        return Err(HfError::bad_file(
            &config_path,
            reason,
            "the two files come from different models: copy both from one",
        ));
    }
    let mut seen = BTreeSet::new();
    let eos = id_of("eos").into_iter().chain(numbers_of("eos")).filter(|id| seen.insert(*id)).collect();
    Ok(SpecialIds {
        bos: id_of("bos").or_else(|| numbers_of("bos").first().copied()),
        eos,
        pad: id_of("pad").or_else(|| numbers_of("pad").first().copied()),
        unk: id_of("unk"),
    })
}

fn fingerprint(tokenizer_json: &[u8], special: &SpecialIds, splitting: Option<&PreTokenizerWrapper>) -> String {
    let mut hash = Sha256::new();
    hash.update((tokenizer_json.len() as u64).to_le_bytes());
    hash.update(tokenizer_json);
    hash.update(format!("{special:?} {splitting:?}").as_bytes());
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
