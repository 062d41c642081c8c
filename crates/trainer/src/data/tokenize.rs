//! Records to token ids, and which of them count in the loss.
//!
//! | record | ids | counted |
//! | --- | --- | --- |
//! | `text` | the text with the tokenizer's own special tokens, end-of-text appended | all |
//! | `prompt`, `completion` | the prompt with special tokens, the completion without, end-of-text appended | the completion and the end |
//! | `messages` | the rendered conversation without special tokens (the template writes them) | the assistant's turns with their end tokens |
//!
//! `train_on_inputs` counts everything. A record longer than a row loses its end; a plain text, where rows are packed, is cut
//! into pieces instead.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use lowrank_models::hf::{ChatTemplate, HfError, Tokenizer};
use rayon::prelude::*;

use super::error::DataError;
use super::record::{BadRecord, Chunk, Record, RecordReader};
use super::source::{Numbering, bad_file};
use super::store::{DataFile, Dataset, Document, ReadReport, Tokens};
use super::{DataConfig, Format, OnBadRecord};

/// A model's tokenizer and, where it has one, its chat template.
#[derive(Debug, Clone, Copy)]
pub struct Encoder<'a> {
    /// Text to ids.
    pub tokenizer: &'a Tokenizer,
    /// Messages to text; needed for `messages` records only.
    pub chat: Option<&'a ChatTemplate>,
}

/// A tokenised record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id whether predicting it counts in the loss.
    pub counted: Vec<bool>,
}

impl Encoder<'_> {
    /// Checks that records of a format can be encoded at all.
    ///
    /// # Errors
    /// There is no chat template for `messages`, or no end-of-text token for the others.
    fn check(&self, format: Format) -> Result<(), HfError> {
        match format {
            Format::Messages | Format::Auto => Ok(()),
            Format::Text | Format::PromptCompletion | Format::Alpaca => self.tokenizer.eos_id().map(drop),
        }
    }

    /// The ids of a record.
    ///
    /// # Errors
    /// The tokenizer or the chat template refuses it.
    pub fn encode(&self, record: &Record, train_on_inputs: bool) -> Result<Encoded, BadRecord> {
        let mut encoded = match record {
            Record::Text(text) => self.encode_text(text),
            Record::PromptCompletion { prompt, completion } => self.encode_pair(prompt, completion),
            Record::Messages { messages, tools } => self.encode_chat(messages, tools, train_on_inputs),
        }
        .map_err(|error| BadRecord::new(kind_of_failure(&error), error.to_string()))?;
        if train_on_inputs {
            encoded.counted.fill(true);
        }
        Ok(encoded)
    }

    fn encode_text(&self, text: &str) -> Result<Encoded, HfError> {
        let eos = self.tokenizer.eos_id()?;
        let mut ids = self.tokenizer.encode(text, true)?;
        if ids.last() != Some(&eos) {
            ids.push(eos);
        }
        Ok(Encoded { counted: vec![true; ids.len()], ids })
    }

    fn encode_pair(&self, prompt: &str, completion: &str) -> Result<Encoded, HfError> {
        let eos = self.tokenizer.eos_id()?;
        let mut ids = self.tokenizer.encode(prompt, true)?;
        // Some tokenizers end every text; a prompt goes on.
        if ids.last() == Some(&eos) && self.tokenizer.encode(prompt, false)?.last() != Some(&eos) {
            ids.pop();
        }
        let prompt_length = ids.len();
        ids.extend(self.tokenizer.encode(completion, false)?);
        if ids.last() != Some(&eos) || ids.len() == prompt_length {
            ids.push(eos);
        }
        let counted = (0..ids.len()).map(|index| index >= prompt_length).collect();
        Ok(Encoded { ids, counted })
    }

    fn encode_chat(
        &self,
        messages: &[serde_json::Value],
        tools: &serde_json::Value,
        train_on_inputs: bool,
    ) -> Result<Encoded, HfError> {
        // The files of a model without a template are refused before this.
        let Some(chat) = self.chat else { return Ok(Encoded { ids: Vec::new(), counted: Vec::new() }) };
        if train_on_inputs {
            // Works for templates too in which answers cannot be told apart.
            let ids = self.tokenizer.encode(&chat.render_with_tools(messages, false, tools)?, false)?;
            return Ok(Encoded { counted: vec![true; ids.len()], ids });
        }
        let rendered = chat.render_with_spans(messages, tools)?;
        let encoding = self.tokenizer.encode_with_offsets(&rendered.text, false)?;
        let answers: Vec<Range<usize>> = rendered.assistant.into_iter().map(|span| span.range).collect();
        let counted =
            encoding.offsets.iter().map(|offsets| answers.iter().any(|answer| overlaps(offsets, answer))).collect();
        Ok(Encoded { ids: encoding.ids, counted })
    }
}

/// Whether any byte of a token lies in a span. A token of blanks alone may come with an empty range at its end.
fn overlaps(token: &Range<usize>, span: &Range<usize>) -> bool {
    let start = token.start.min(token.end.saturating_sub(1));
    token.end > span.start && start < span.end
}

fn kind_of_failure(error: &HfError) -> &'static str {
    match error {
        HfError::Tokenizer { .. } => "refused by the tokenizer",
        _ => "refused by the chat template",
    }
}

/// Reads and tokenises files on all cores, with a progress bar on a terminal.
///
/// # Errors
/// A file cannot be read, a record is bad under `on_bad_record = "error"`, or no record is left.
pub fn tokenize_files(files: &[PathBuf], config: &DataConfig, encoder: &Encoder<'_>) -> Result<Dataset, DataError> {
    let sizes: Vec<u64> =
        files.iter().map(|path| std::fs::metadata(path).map_or(0, |metadata| metadata.len())).collect();
    let bar = progress_bar(sizes.iter().sum());
    let mut reader = RecordReader::new(files, config);
    let mut collected = Collected::default();
    let mut checked = None;
    while let Some(chunk) = reader.next_chunk()? {
        if checked != Some((chunk.file, chunk.format)) {
            check_format(&files[chunk.file], chunk.format, encoder)?;
            checked = Some((chunk.file, chunk.format));
        }
        let done: u64 = sizes[..chunk.file].iter().sum();
        bar.set_position(done + (sizes[chunk.file] as f64 * chunk.fraction) as u64);
        collected.add(chunk, files, config, encoder)?;
    }
    bar.finish_and_clear();
    if collected.documents.is_empty() {
        return Err(DataError::NothingLeft {
            skipped: collected.report.skipped_count(),
            reasons: collected.report.reasons(),
        });
    }
    let data_files = files
        .iter()
        .zip(collected.numbering)
        .map(|(path, numbering)| DataFile { path: path.clone(), numbering })
        .collect();
    Ok(Dataset::new(Arc::new(collected.tokens), collected.documents, data_files, Arc::new(collected.report)))
}

fn check_format(path: &std::path::Path, format: Format, encoder: &Encoder<'_>) -> Result<(), DataError> {
    if format == Format::Messages && encoder.chat.is_none() {
        let hint = "use the instruction-tuned model, put a chat_template.jinja into the model's folder, or use `prompt`/`completion` records";
        return Err(bad_file(path, "has `messages`, but the model has no chat template", hint));
    }
    Ok(encoder.check(format)?)
}

/// Bytes of the files; drawn on stderr where that is a terminal.
fn progress_bar(total_bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(total_bytes).with_message("tokenising");
    match ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// What was tokenised so far.
#[derive(Default)]
struct Collected {
    tokens: Tokens,
    documents: Vec<Document>,
    report: ReadReport,
    numbering: Vec<Numbering>,
}

impl Collected {
    fn add(
        &mut self,
        chunk: Chunk,
        files: &[PathBuf],
        config: &DataConfig,
        encoder: &Encoder<'_>,
    ) -> Result<(), DataError> {
        let Chunk { file, numbering, records, .. } = chunk;
        self.numbering.resize(file + 1, numbering);
        let pieces = config.packing.then_some(config.max_seq_length);
        let encoded: Vec<_> = records
            .into_par_iter()
            .map(|parsed| {
                let fitted = parsed.record.and_then(|record| {
                    let encoded = encoder.encode(&record, config.train_on_inputs)?;
                    match (&record, pieces) {
                        (Record::Text(_), Some(longest)) => cut(encoded, longest),
                        _ => truncate(encoded, config.max_seq_length),
                    }
                });
                (parsed.position, parsed.number, fitted)
            })
            .collect();
        for (position, record, fitted) in encoded {
            let location = || numbering.location(&files[file], position);
            match fitted {
                Ok(fitted) => self.push(fitted, Document { start: 0, length: 0, record, file, position }),
                Err(bad) if config.on_bad_record == OnBadRecord::Error => {
                    return Err(DataError::Record { location: location(), bad });
                }
                Err(bad) => self.report.skip(&location(), &bad),
            }
        }
        Ok(())
    }

    fn push(&mut self, fitted: Fitted, template: Document) {
        self.report.truncated += u64::from(fitted.lost > 0);
        self.report.truncated_tokens += fitted.lost as u64;
        self.report.cut += u64::from(fitted.lengths.len() > 1);
        let mut start = self.tokens.ids.len();
        for length in fitted.lengths {
            self.documents.push(Document { start, length, ..template });
            start += length;
        }
        self.tokens.ids.extend(fitted.encoded.ids);
        self.tokens.counted.extend(fitted.encoded.counted);
    }
}

/// A record that fits into rows.
struct Fitted {
    encoded: Encoded,
    /// Lengths of its documents; their sum is the number of ids.
    lengths: Vec<usize>,
    /// Tokens that were cut off.
    lost: usize,
}

fn truncate(mut encoded: Encoded, longest: usize) -> Result<Fitted, BadRecord> {
    let lost = encoded.ids.len().saturating_sub(longest);
    encoded.ids.truncate(longest);
    encoded.counted.truncate(longest);
    if !encoded.counted.iter().skip(1).any(|counted| *counted) {
        return Err(nothing_counts(lost, longest));
    }
    Ok(Fitted { lengths: vec![encoded.ids.len()], encoded, lost })
}

fn nothing_counts(lost: usize, longest: usize) -> BadRecord {
    if lost == 0 {
        return BadRecord::new("no target tokens", "no token counts in the loss: there is no answer")
            .with_hint("add an answer, or set train_on_inputs = true");
    }
    let reason = format!(
        "no token counts in the loss: the answer begins after the first {longest} tokens (the record has {})",
        longest + lost
    );
    BadRecord::new("no target tokens", reason)
        .with_hint("raise max_seq_length, or set on_bad_record = \"skip\" to leave such records out")
}

/// Pieces of at most `longest` tokens, none of a single token (nothing could be predicted in it).
fn cut(encoded: Encoded, longest: usize) -> Result<Fitted, BadRecord> {
    let total = encoded.ids.len();
    if total < 2 {
        return Err(nothing_counts(0, longest));
    }
    let mut lengths = vec![longest; total / longest];
    match (total % longest, lengths.last_mut()) {
        (0, _) => {}
        (1, Some(last)) => {
            *last -= 1;
            lengths.push(2);
        }
        (rest, _) => lengths.push(rest),
    }
    Ok(Fitted { encoded, lengths, lost: 0 })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::data::testing::{chat_template, encoder, tokenizer, write};
    use crate::data::{Paths, load};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const BOS: u32 = 1;
    const EOS: u32 = 2;

    fn pair(prompt: &str, completion: &str) -> Record {
        Record::PromptCompletion { prompt: prompt.to_owned(), completion: completion.to_owned() }
    }

    #[test]
    fn texts_begin_and_end_with_special_tokens_and_count_whole() {
        let tokenizer = tokenizer();
        let encoded = encoder(&tokenizer).encode(&Record::Text("some words".into()), false).unwrap();
        let inside = tokenizer.encode("some words", false).unwrap();
        assert_eq!(encoded.ids, [&[BOS], inside.as_slice(), &[EOS]].concat());
        assert!(encoded.counted.iter().all(|counted| *counted));
    }

    #[test]
    fn completions_count_with_their_end() {
        let tokenizer = tokenizer();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap();
        let encoded = encoder(&tokenizer).encode(&pair("2 + 2 =", " 4"), false).unwrap();
        assert_eq!(encoded.ids, [&[BOS], ids("2 + 2 =").as_slice(), &ids(" 4"), &[EOS]].concat());
        let prompt = 1 + ids("2 + 2 =").len();
        assert!(encoded.counted[..prompt].iter().all(|counted| !counted));
        assert!(encoded.counted[prompt..].iter().all(|counted| *counted));
        let everything = encoder(&tokenizer).encode(&pair("2 + 2 =", " 4"), true).unwrap();
        assert_eq!(everything.ids, encoded.ids);
        assert!(everything.counted.iter().all(|counted| *counted));
        let bare = encoder(&tokenizer).encode(&pair("", "4"), false).unwrap();
        assert_eq!((bare.ids[0], bare.counted[0]), (BOS, false));
    }

    #[test]
    fn assistant_turns_count_with_their_end() {
        let (tokenizer, chat) = (tokenizer(), chat_template());
        let encoder = Encoder { tokenizer: &tokenizer, chat: Some(&chat) };
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages = vec![
            message("user", "one  "),
            message("assistant", "two."),
            message("user", "three"),
            message("assistant", "  four"),
        ];
        let record = Record::Messages { messages: messages.clone(), tools: Value::Null };
        let encoded = encoder.encode(&record, false).unwrap();
        assert_eq!(
            encoded.ids,
            tokenizer.encode(&chat.render(&messages, false).unwrap(), false).unwrap(),
            "nothing is added to the template's text"
        );
        assert_eq!(encoded.ids.iter().filter(|id| **id == BOS).count(), 4);
        let mut answers = Vec::new();
        for (id, counted) in encoded.ids.iter().zip(&encoded.counted) {
            if *counted {
                answers.push(*id);
            }
        }
        let text = tokenizer.decode(&answers, false).unwrap();
        assert!(text.contains("two.</s>") && text.contains("four</s>"), "{text}");
        assert!(
            !text.contains("one") && !text.contains("three") && !text.contains("assistant") && !text.contains("<s>"),
            "{text}"
        );
        assert_eq!(answers.iter().filter(|id| **id == EOS).count(), 2);
        assert!(encoder.encode(&record, true).unwrap().counted.iter().all(|counted| *counted));
    }

    #[test]
    fn tokens_of_blanks_belong_where_their_bytes_are() {
        assert!(overlaps(&(3..5), &(4..8)) && overlaps(&(5..6), &(4..8)) && overlaps(&(7..9), &(4..8)));
        assert!(!overlaps(&(2..4), &(4..8)) && !overlaps(&(8..9), &(4..8)));
        assert!(!overlaps(&(4..4), &(4..8)), "a blank that ends where the answer begins");
        assert!(overlaps(&(8..8), &(4..8)), "a blank at the end of the answer");
        assert!(!overlaps(&(0..0), &(0..8)));
    }

    #[test]
    fn conversations_need_a_template() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(&folder, "a.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}");
        let tokenizer = tokenizer();
        let chat = chat_template();
        let run = |chat, train_on_inputs| {
            let config = DataConfig { train_on_inputs, ..DataConfig::default() };
            load("train", &Paths::One(path.clone()), &config, &Encoder { tokenizer: &tokenizer, chat }, None)
                .map_err(|error| error.to_string())
        };
        assert!(run(None, false).unwrap_err().contains("has `messages`, but the model has no chat template"));
        let error = run(Some(&chat), false).unwrap_err();
        assert!(error.contains("a.jsonl:1: no token counts in the loss: there is no answer"), "{error}");
        assert!(run(Some(&chat), true).is_ok());
    }

    #[test]
    fn long_records_are_cut_or_truncated() {
        let folder = tempfile::tempdir().unwrap();
        let long = "word ".repeat(100);
        let tokenizer = tokenizer();
        let total = tokenizer.encode(&long, false).unwrap().len() + 2;
        let path = write(&folder, "a.jsonl", format!("{{\"text\": \"{long}\"}}\n").as_bytes());
        let config = DataConfig { max_seq_length: 16, ..DataConfig::default() };
        let dataset = load("train", &Paths::One(path.clone()), &config, &encoder(&tokenizer), None).unwrap();
        assert_eq!(dataset.statistics().tokens as usize, total);
        assert_eq!((dataset.report().cut, dataset.report().truncated, dataset.statistics().records), (1, 0, 1));
        let config = DataConfig { packing: false, ..config };
        let dataset = load("train", &Paths::One(path), &config, &encoder(&tokenizer), None).unwrap();
        assert_eq!(
            (dataset.statistics().tokens, dataset.report().truncated, dataset.report().truncated_tokens as usize),
            (16, 1, total - 16)
        );

        let config = DataConfig { packing: true, ..config };
        let path =
            write(&folder, "b.jsonl", format!("{{\"prompt\": \"hi\", \"completion\": \"{long}\"}}\n").as_bytes());
        let dataset = load("train", &Paths::One(path), &config, &encoder(&tokenizer), None).unwrap();
        assert_eq!(
            (dataset.statistics().documents, dataset.report().truncated),
            (1, 1),
            "an answer without its prompt teaches nothing"
        );
        let path =
            write(&folder, "c.jsonl", format!("{{\"prompt\": \"{long}\", \"completion\": \"hi\"}}\n").as_bytes());
        let error = load("train", &Paths::One(path), &config, &encoder(&tokenizer), None).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("c.jsonl:1: no token counts in the loss: the answer begins after the first 16 tokens"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("raise max_seq_length"));
    }

    proptest! {
        #[test]
        fn pieces_hold_every_token_and_something_to_predict(total in 2usize..200, longest in 4usize..20) {
            let encoded = Encoded { ids: (0..total as u32).collect(), counted: vec![true; total] };
            let fitted = cut(encoded, longest).unwrap();
            prop_assert_eq!(fitted.lengths.iter().sum::<usize>(), total);
            prop_assert!(fitted.lengths.iter().all(|length| (2..=longest).contains(length)));
        }

        #[test]
        fn no_text_is_lost(prompt in "[^\0]{0,40}", completion in "[^\0]{0,20}[a-z][^\0]{0,20}") {
            let tokenizer = tokenizer();
            let encoded = encoder(&tokenizer).encode(&pair(&prompt, &completion), false).unwrap();
            prop_assert_eq!(encoded.ids.len(), encoded.counted.len());
            let counted: Vec<u32> = encoded.ids.iter().zip(&encoded.counted).filter(|(_, counted)| **counted).map(|(id, _)| *id).collect();
            prop_assert_eq!(counted.last(), Some(&EOS));
        }
    }
}
