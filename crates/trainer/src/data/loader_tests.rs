//! Tests of [`super::loader`]: what is in a batch, what is in an epoch, and that a resumed loader goes on exactly.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::loader::*;
use crate::data::testing::dataset;
use lowrank_models::{Batch, IGNORE};
use proptest::prelude::*;

const LONGEST: usize = 24;
const PAD: u32 = 0;

fn config() -> LoaderConfig {
    LoaderConfig {
        micro_batch_size: 2,
        max_seq_length: LONGEST,
        packing: true,
        shuffle: true,
        seed: 7,
        pad_id: PAD,
        pad_to_multiple_of: 8,
    }
}

/// Documents of the given lengths; no two tokens of the set are equal, so that every token can be found again.
fn documents(lengths: &[usize]) -> Vec<(Vec<u32>, Vec<bool>)> {
    let mut next = 1;
    let mut document = |length: usize| {
        let ids: Vec<u32> = (next..next + length as u32).collect();
        next += length as u32;
        let counted = ids.iter().map(|id| id % 3 != 0).collect();
        (ids, counted)
    };
    lengths.iter().map(|length| document(*length)).collect()
}

/// Checks a batch against the contract of [`Batch`] and returns its tokens in reading order.
fn tokens_of(batch: &Batch, documents: &[(Vec<u32>, Vec<bool>)]) -> Vec<u32> {
    let size = batch.rows * batch.cols;
    assert_eq!([batch.input_ids.len(), batch.targets.len(), batch.positions.len(), batch.first_key.len()], [size; 4]);
    let mut found = Vec::new();
    for index in 0..size {
        let (column, id) = ((index % batch.cols) as i32, batch.input_ids[index]);
        let (target, position, first) = (batch.targets[index], batch.positions[index], batch.first_key[index]);
        if id == PAD as i32 {
            assert_eq!((target, position, first), (IGNORE, 0, column));
            continue;
        }
        let (document, offset) = documents
            .iter()
            .enumerate()
            .find_map(|(number, (ids, _))| Some((number, ids.iter().position(|other| *other as i32 == id)?)))
            .unwrap();
        let (ids, counted) = &documents[document];
        assert_eq!(position as usize, offset);
        assert_eq!(column - first, position, "a document sees its own tokens only");
        let expected = if counted.get(offset + 1) == Some(&true) { ids[offset + 1] as i32 } else { IGNORE };
        assert_eq!(target, expected, "the target is the next token of the same document, or none");
        assert!(batch.records.contains(&(document as u64)));
        found.push(id as u32);
    }
    found
}

#[test]
fn a_packed_batch_by_hand() {
    let documents = vec![
        (vec![11, 12, 13], vec![true; 3]),
        (vec![21, 22], vec![false, true]),
        (vec![31, 32, 33, 34], vec![false, false, true, true]),
    ];
    let config = LoaderConfig { max_seq_length: 6, shuffle: false, ..config() };
    let data = dataset(&documents);
    let mut loader = Loader::new(data.clone(), config).unwrap();
    let batch = loader.next_batch().unwrap();
    assert_eq!((batch.rows, batch.cols), (2, 6));
    assert_eq!(batch.input_ids, [11, 12, 13, 21, 22, 0, 31, 32, 33, 34, 0, 0]);
    assert_eq!(batch.targets, [12, 13, -100, 22, -100, -100, -100, 33, 34, -100, -100, -100]);
    assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 0, 0]);
    assert_eq!(batch.first_key, [0, 0, 0, 3, 3, 5, 0, 0, 0, 0, 4, 5]);
    assert_eq!(batch.records, [0, 1, 2]);
    assert_eq!(batch.target_count() as u64, data.statistics().target_tokens);
    assert_eq!(loader.efficiency(), 9.0 / 12.0);
    assert_eq!((loader.epoch(), loader.progress(), loader.batches_per_epoch(0)), (0, 1.0, Some(1)));
    assert_eq!(loader.next_batch().unwrap(), batch, "without shuffling every epoch is the same");
    assert_eq!(loader.epoch(), 1);
}

#[test]
fn padded_rows_are_as_wide_as_they_must_be() {
    let documents = documents(&[3, 9, 17, 23]);
    let width = |max_seq_length, multiple| -> Vec<usize> {
        let config = LoaderConfig {
            packing: false,
            max_seq_length,
            pad_to_multiple_of: multiple,
            micro_batch_size: 2,
            ..config()
        };
        Evaluation::new(dataset(&documents), config).unwrap().batches().map(|batch| batch.cols).collect()
    };
    assert_eq!(width(100, 8), [24, 16]);
    assert_eq!(width(100, 1), [23, 9]);
    assert_eq!(width(23, 8), [23, 16], "never beyond max_seq_length");
}

#[test]
fn another_position_is_refused_with_every_difference() {
    let data = dataset(&documents(&[5, 6, 7]));
    let state = Loader::new(data.clone(), config()).unwrap().state();
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<LoaderState>(&json).unwrap(), state);

    let other = dataset(&documents(&[5, 6, 8]));
    let changed = LoaderConfig { micro_batch_size: 4, seed: 8, ..config() };
    let error = Loader::resume(other, changed, &state).unwrap_err().to_string();
    for part in
        ["content of the data: ", "micro_batch_size: 2 in the checkpoint, 4 now", "seed: 7 in the checkpoint, 8 now"]
    {
        assert!(error.contains(part), "{error}");
    }
    assert!(!error.contains("packing"), "{error}");
    let beyond = LoaderState { position: 9, ..state };
    let error = Loader::resume(data, config(), &beyond).unwrap_err().to_string();
    assert!(error.contains("position: 9 in the checkpoint, but the epoch has 1 batches"), "{error}");
}

#[test]
fn sizes_of_zero_and_rows_too_short_are_refused() {
    let data = dataset(&documents(&[5, 6]));
    let error = Loader::new(data.clone(), LoaderConfig { micro_batch_size: 0, ..config() }).unwrap_err().to_string();
    assert_eq!(error, "data.micro_batch_size is 0, must be at least 1");
    let error = Evaluation::new(data, LoaderConfig { max_seq_length: 5, ..config() }).unwrap_err().to_string();
    assert!(error.contains("documents of up to 6 tokens"), "{error}");
}

proptest! {
    #[test]
    fn an_epoch_holds_every_token_once(
        lengths in prop::collection::vec(1usize..=LONGEST, 1..60),
        packing: bool, shuffle: bool, seed: u64, micro_batch_size in 1usize..5,
    ) {
        let documents = documents(&lengths);
        let data = dataset(&documents);
        let config = LoaderConfig { packing, shuffle, seed, micro_batch_size, ..config() };
        let mut loader = Loader::new(data.clone(), config.clone()).unwrap();
        let all: Vec<u32> = documents.iter().flat_map(|(ids, _)| ids.clone()).collect();
        for epoch in 0..3 {
            let batches: Vec<Batch> = (0..loader.batches_per_epoch(epoch).unwrap()).map(|_| loader.next_batch().unwrap()).collect();
            prop_assert_eq!(loader.epoch(), epoch);
            let targets: usize = batches.iter().map(Batch::target_count).sum();
            prop_assert_eq!(targets as u64, data.statistics().target_tokens);
            let mut found: Vec<u32> = batches.iter().flat_map(|batch| tokens_of(batch, &documents)).collect();
            found.sort_unstable();
            prop_assert_eq!(&found, &all);
            prop_assert!(batches.iter().all(|batch| (1..=micro_batch_size).contains(&batch.rows) && batch.cols <= LONGEST));
        }
        let mut found: Vec<u32> = Evaluation::new(data, config).unwrap().batches().flat_map(|batch| tokens_of(&batch, &documents)).collect();
        found.sort_unstable();
        prop_assert_eq!(&found, &all);
    }

    #[test]
    fn a_resumed_loader_gives_the_same_batches(
        lengths in prop::collection::vec(1usize..=LONGEST, 1..40),
        packing: bool, shuffle: bool, seed: u64, stop in 0usize..80,
    ) {
        let data = dataset(&documents(&lengths));
        let config = LoaderConfig { packing, shuffle, seed, ..config() };
        let mut whole = Loader::new(data.clone(), config.clone()).unwrap();
        for _ in 0..stop {
            whole.next_batch().unwrap();
        }
        let saved = serde_json::to_string(&whole.state()).unwrap();
        let mut resumed = Loader::resume(data, config, &serde_json::from_str(&saved).unwrap()).unwrap();
        for _ in 0..40 {
            prop_assert_eq!(whole.next_batch().unwrap(), resumed.next_batch().unwrap());
            prop_assert_eq!(whole.state(), resumed.state());
        }
    }

    #[test]
    fn epochs_and_seeds_differ(seed: u64, packing: bool) {
        let data = dataset(&documents(&[10; 50]));
        let config = LoaderConfig { packing, seed, ..config() };
        let mut loader = Loader::new(data.clone(), config.clone()).unwrap();
        let count = loader.batches_per_epoch(0).unwrap();
        let first: Vec<Batch> = (0..count).map(|_| loader.next_batch().unwrap()).collect();
        let second: Vec<Batch> = (0..count).map(|_| loader.next_batch().unwrap()).collect();
        let mut other = Loader::new(data, LoaderConfig { seed: seed ^ 1, ..config }).unwrap();
        let third: Vec<Batch> = (0..count).map(|_| other.next_batch().unwrap()).collect();
        prop_assert_ne!(&first, &second);
        prop_assert_ne!(&first, &third);
    }
}
