//! Batches of full rows from a corpus that is read while training.
//!
//! The documents of a corpus, one after the other, each between its begin- and end-of-text tokens, fill the rows
//! without a gap: a row is full, and a document that does not fit goes on in the next row. As in packed rows
//! elsewhere, no token sees another document, positions count from the beginning of a document's part in its row, and
//! the last token of a part predicts nothing. A new pass goes on in the row in which the last one ended.
//!
//! A thread reads, tokenises on all cores and packs, a few batches ahead. Each batch comes with the position behind it,
//! which is all that a resumed run needs: the piece of text that was under way is tokenised again.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use lowrank_models::{Batch, IGNORE};
use rayon::prelude::*;

use super::OnBadRecord;
use super::corpus::{Corpus, PIECE_BYTES, Piece, PieceReader, StreamPosition};
use super::error::DataError;
use super::loader::LoaderConfig;
use super::record::BadRecord;

/// Batches that wait to be trained on.
const BATCHES_AHEAD: usize = 4;

/// Text that is tokenised together, once the stream runs; the first chunk is one piece, for a quick start.
const CHUNK_BYTES: usize = 1 << 20;

/// Skipped documents that are named one by one.
const SKIPPED_SHOWN: u64 = 10;

/// A batch and where the next one begins.
type Packed = (Batch, StreamPosition);

/// Batches of a corpus, pass after pass.
#[derive(Debug)]
pub(super) struct Stream {
    corpus: Corpus,
    shuffle: Option<u64>,
    position: StreamPosition,
    batches: Receiver<Result<Packed, DataError>>,
}

impl Stream {
    /// A stream that stands at a position.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(corpus: &Corpus, config: &LoaderConfig, position: StreamPosition) -> Result<Self, DataError> {
        let shuffle = config.shuffle.then_some(config.seed);
        let (sender, batches) = sync_channel(BATCHES_AHEAD);
        let (reading, rows, cols, pad) =
            (corpus.clone(), config.micro_batch_size, config.max_seq_length, config.pad_id);
        std::thread::Builder::new()
            .name("training-data".to_owned())
            .spawn(move || {
                let packer = Packer::new(rows, cols, pad);
                if let Err(error) = produce(&reading, shuffle, position, packer, &sender) {
                    // Nobody listens any more: the run is over.
                    let _ = sender.send(Err(error));
                }
            })
            .map_err(|error| DataError::Stream { reason: format!("no thread for it: {error}") })?;
        Ok(Self { corpus: corpus.clone(), shuffle, position, batches })
    }

    /// The next batch.
    ///
    /// # Errors
    /// A file cannot be read or has changed, a bad record under `on_bad_record = "error"`, or a pass without a usable
    /// document.
    pub fn next_batch(&mut self) -> Result<Batch, DataError> {
        let Ok(received) = self.batches.recv() else {
            return Err(DataError::Stream { reason: "its thread has ended".to_owned() });
        };
        let (batch, position) = received?;
        self.position = position;
        Ok(batch)
    }

    /// The corpus.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// Where the next batch begins.
    pub fn position(&self) -> StreamPosition {
        self.position
    }

    /// Passes done, with the share of the current one.
    pub fn progress(&self) -> f64 {
        self.corpus.progress(&self.position, self.shuffle)
    }
}

/// Reads, tokenises and packs until nobody wants batches any more.
fn produce(
    corpus: &Corpus,
    shuffle: Option<u64>,
    from: StreamPosition,
    mut packer: Packer,
    sender: &SyncSender<Result<Packed, DataError>>,
) -> Result<(), DataError> {
    let mut reader = PieceReader::new(corpus.text(), shuffle, from);
    let (mut skip, mut chunk) = (from.skip, PIECE_BYTES);
    let mut skipped = Skipped::default();
    let mut pass = PassCount { pass: from.pass, tokens: 0, from_start: from.file == 0 && from.offset == 0 };
    loop {
        let pieces = reader.next_pieces(chunk)?;
        chunk = (2 * chunk).min(CHUNK_BYTES);
        let encoded: Vec<Result<Vec<u32>, BadRecord>> = pieces.par_iter().map(|piece| corpus.encode(piece)).collect();
        for (piece, ids) in pieces.iter().zip(encoded) {
            pass.enter(piece.at.pass, &skipped)?;
            let ids = match ids {
                _ if skipped.holds(piece) => continue,
                Ok(ids) => ids,
                Err(bad) if corpus.on_bad_record() == OnBadRecord::Error => {
                    return Err(DataError::Record { location: corpus.text().describe_record(piece.record), bad });
                }
                Err(bad) => {
                    skipped.add(corpus, piece, &bad);
                    continue;
                }
            };
            pass.tokens += ids.len() as u64;
            let first = std::mem::take(&mut skip);
            for (index, &id) in ids.iter().enumerate().skip(first) {
                packer.push(id, index == 0 && !piece.at.inside, piece.record);
                if packer.is_full() {
                    let position = StreamPosition { skip: index + 1, ..piece.at };
                    if sender.send(Ok((packer.take(), position))).is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// Tokens of the pass under way.
struct PassCount {
    pass: u64,
    tokens: u64,
    from_start: bool,
}

impl PassCount {
    /// Notes which pass a piece belongs to.
    ///
    /// # Errors
    /// The pass that it ends had no token: there never will be a batch.
    fn enter(&mut self, pass: u64, skipped: &Skipped) -> Result<(), DataError> {
        if pass == self.pass {
            return Ok(());
        }
        if self.from_start && self.tokens == 0 {
            return Err(DataError::NothingLeft { skipped: skipped.count, reasons: skipped.first.clone() });
        }
        *self = Self { pass, tokens: 0, from_start: true };
        Ok(())
    }
}

/// Documents that were left out.
#[derive(Default)]
struct Skipped {
    count: u64,
    first: String,
    /// The document of the last bad piece: what follows of it is left out too.
    current: Option<(u64, u64)>,
}

impl Skipped {
    fn holds(&self, piece: &Piece) -> bool {
        piece.at.inside && self.current == Some((piece.at.pass, piece.record))
    }

    fn add(&mut self, corpus: &Corpus, piece: &Piece, bad: &BadRecord) {
        self.current = Some((piece.at.pass, piece.record));
        self.count += 1;
        let location = corpus.text().describe_record(piece.record);
        if self.count == 1 {
            self.first = format!("first {location}: {bad}");
        }
        if self.count <= SKIPPED_SHOWN {
            tracing::warn!("skipped {location}: {bad}");
        }
        if self.count == SKIPPED_SHOWN {
            tracing::warn!("further skipped records are not shown");
        }
    }
}

/// Fills the rows of a batch with tokens.
struct Packer {
    batch: Batch,
    empty: Batch,
    /// Index of the next token.
    next: usize,
    /// Column in which the document's part of the current row begins.
    part: usize,
}

impl Packer {
    fn new(rows: usize, cols: usize, pad_id: u32) -> Self {
        let size = rows * cols;
        let empty = Batch {
            rows,
            cols,
            input_ids: vec![pad_id as i32; size],
            targets: vec![IGNORE; size],
            positions: vec![0; size],
            first_key: vec![0; size],
            records: Vec::new(),
        };
        Self { batch: empty.clone(), empty, next: 0, part: 0 }
    }

    fn push(&mut self, id: u32, begins_document: bool, record: u64) {
        let (index, column) = (self.next, self.next % self.batch.cols);
        let batch = &mut self.batch;
        if begins_document || column == 0 {
            self.part = column;
        } else {
            batch.targets[index - 1] = id as i32;
        }
        batch.input_ids[index] = id as i32;
        batch.positions[index] = (column - self.part) as i32;
        batch.first_key[index] = self.part as i32;
        if batch.records.last() != Some(&record) {
            batch.records.push(record);
        }
        self.next += 1;
    }

    fn is_full(&self) -> bool {
        self.next == self.batch.input_ids.len()
    }

    fn take(&mut self) -> Batch {
        self.next = 0;
        let mut batch = std::mem::replace(&mut self.batch, self.empty.clone());
        batch.records.sort_unstable();
        batch.records.dedup();
        batch
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
