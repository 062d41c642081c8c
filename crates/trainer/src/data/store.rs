//! Tokenised data in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::packing::Random;
use super::record::BadRecord;
use super::source::Numbering;

/// One run of tokens that attends to nothing outside itself: a record, or a piece of a long text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document {
    /// Index of its first token in the store.
    pub start: usize,
    /// Its tokens.
    pub length: usize,
    /// Number of its record over all files, from 0, skipped ones included.
    pub record: u64,
    /// Index of the record's file.
    pub file: usize,
    /// Line, element or row of the record.
    pub position: u64,
}

/// A data file of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// How its positions are counted.
    pub numbering: Numbering,
}

/// The tokens of some files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Ids of all documents, one after the other.
    pub ids: Vec<u32>,
    /// For each id whether predicting it counts in the loss.
    pub counted: Vec<bool>,
}

/// What happened while the files were read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadReport {
    /// Records that were longer than a row and lost their end.
    pub truncated: u64,
    /// Tokens that were lost this way.
    pub truncated_tokens: u64,
    /// Texts that were longer than a row and became several documents.
    pub cut: u64,
    /// Records that were left out, by reason.
    pub skipped: BTreeMap<String, Skipped>,
}

/// Records that were left out for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// How many.
    pub count: u64,
    /// The first of them: place, field and reason.
    pub first: String,
}

impl ReadReport {
    /// Counts a record that is left out.
    pub fn skip(&mut self, location: &str, bad: &BadRecord) {
        let reason = match bad.field.as_str() {
            "" => bad.kind.to_owned(),
            field => format!("`{field}`: {}", bad.kind),
        };
        let entry =
            self.skipped.entry(reason).or_insert_with(|| Skipped { count: 0, first: format!("{location}: {bad}") });
        entry.count += 1;
    }

    /// How many records were left out.
    pub fn skipped_count(&self) -> u64 {
        self.skipped.values().map(|skipped| skipped.count).sum()
    }

    /// The reasons with their counts, in words.
    pub fn reasons(&self) -> String {
        let reasons: Vec<String> = self
            .skipped
            .iter()
            .map(|(reason, skipped)| format!("{} x {reason}, first {}", skipped.count, skipped.first))
            .collect();
        reasons.join("; ")
    }
}

/// Sizes of a data set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Records in use.
    pub records: u64,
    /// Documents: records and pieces of long texts.
    pub documents: u64,
    /// Tokens of all documents.
    pub tokens: u64,
    /// Tokens whose prediction counts in the loss.
    pub target_tokens: u64,
    /// Tokens of the longest document.
    pub longest: u64,
}

/// Tokenised documents that a loader draws from; at least one.
#[derive(Debug, Clone)]
pub struct Dataset {
    tokens: Arc<Tokens>,
    documents: Vec<Document>,
    files: Arc<[DataFile]>,
    report: Arc<ReadReport>,
    statistics: Statistics,
    fingerprint: String,
}

impl Dataset {
    pub(super) fn new(
        tokens: Arc<Tokens>,
        documents: Vec<Document>,
        files: Arc<[DataFile]>,
        report: Arc<ReadReport>,
    ) -> Self {
        let statistics = measure(&tokens, &documents);
        let fingerprint = fingerprint(&tokens, &documents);
        Self { tokens, documents, files, report, statistics, fingerprint }
    }

    /// The documents in file order.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// The ids of a document and whether predicting each counts in the loss.
    pub fn tokens_of(&self, document: usize) -> (&[u32], &[bool]) {
        let Document { start, length, .. } = self.documents[document];
        (&self.tokens.ids[start..start + length], &self.tokens.counted[start..start + length])
    }

    /// Number of tokens of a document.
    pub fn length_of(&self, document: usize) -> usize {
        self.documents[document].length
    }

    /// Sizes.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// What was truncated and skipped while the files were read; of a split, both halves have the report of the whole.
    pub fn report(&self) -> &ReadReport {
        &self.report
    }

    /// A hash of all ids, of what counts, and of where documents end, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Where a record came from, as `train.jsonl:17`.
    pub fn describe_record(&self, record: u64) -> String {
        let Some(document) = self.documents.iter().find(|document| document.record == record) else {
            return format!("record {record}");
        };
        let file = &self.files[document.file];
        file.numbering.location(&file.path, document.position)
    }

    /// The files, in order.
    pub fn files(&self) -> &[DataFile] {
        &self.files
    }

    pub(super) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Two data sets: without `held_out` records chosen at random, and those records; both in file order.
    pub(super) fn split(self, held_out: u64, seed: u64) -> (Dataset, Dataset) {
        let mut records: Vec<u64> = self.documents.iter().map(|document| document.record).collect();
        records.dedup();
        Random::new(&[seed, 0x5b11]).shuffle(&mut records);
        let chosen: BTreeSet<u64> = records.into_iter().take(held_out as usize).collect();
        let (eval, train) = self.documents.into_iter().partition(|document| chosen.contains(&document.record));
        let part = |documents| Dataset::new(self.tokens.clone(), documents, self.files.clone(), self.report.clone());
        (part(train), part(eval))
    }

    /// Tells the user what was read.
    pub(super) fn log(&self, name: &str) {
        let Statistics { records, documents, tokens, target_tokens, longest } = self.statistics;
        tracing::info!(
            "{name} data: {records} records, {documents} documents, {tokens} tokens ({target_tokens} targets), longest {longest}"
        );
        let report = &self.report;
        if report.truncated > 0 {
            tracing::warn!(
                "{name} data: {} records were longer than max_seq_length and lost their last {} tokens",
                report.truncated,
                report.truncated_tokens
            );
        }
        if report.cut > 0 {
            tracing::info!(
                "{name} data: {} texts were longer than max_seq_length and were cut into pieces",
                report.cut
            );
        }
        if !report.skipped.is_empty() {
            tracing::warn!("{name} data: {} records were skipped: {}", report.skipped_count(), report.reasons());
        }
    }
}

fn measure(tokens: &Tokens, documents: &[Document]) -> Statistics {
    let mut statistics = Statistics { documents: documents.len() as u64, ..Statistics::default() };
    let mut last_record = None;
    for document in documents {
        let counted = &tokens.counted[document.start..document.start + document.length];
        // Nothing predicts the first token of a document.
        statistics.target_tokens += counted.iter().skip(1).filter(|counted| **counted).count() as u64;
        statistics.tokens += document.length as u64;
        statistics.longest = statistics.longest.max(document.length as u64);
        statistics.records += u64::from(last_record != Some(document.record));
        last_record = Some(document.record);
    }
    statistics
}

fn fingerprint(tokens: &Tokens, documents: &[Document]) -> String {
    let mut hash = Sha256::new();
    let mut bytes = Vec::new();
    for document in documents {
        let range = document.start..document.start + document.length;
        bytes.clear();
        bytes.extend((document.length as u64).to_le_bytes());
        bytes.extend(tokens.ids[range.clone()].iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(tokens.counted[range].iter().map(|counted| u8::from(*counted)));
        hash.update(&bytes);
    }
    hexadecimal(&hash.finalize())
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
