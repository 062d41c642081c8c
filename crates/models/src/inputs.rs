//! A batch on the device: ids, rotary tables and the range of keys every position may see.

use burn::tensor::{Device, Int, Tensor, TensorData};
use lowrank_kernels::KnownKeys;

use crate::batch::Batch;
use crate::config::DecoderConfig;

/// What the segments of a decoder share during one pass. Plain tensors, never on the tape.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Sequences.
    pub rows: usize,
    /// Query tokens of a sequence.
    pub cols: usize,
    /// Token ids, `[rows * cols]`.
    pub ids: Tensor<1, Int>,
    /// Cosine and sine of each rope table, `[rows * cols, head_dim / 2]`.
    pub ropes: Vec<(Tensor<2>, Tensor<2>)>,
    /// Columns of the key cache before this batch.
    offset: usize,
    /// For each distinct window of the layers (`None` first): the visible keys, `[rows, cols, 2]`.
    ranges: Vec<(Option<usize>, Tensor<3, Int>)>,
}

impl Inputs {
    /// Moves a batch to the device. `offset` is the column of the key cache at which the batch starts (0 without a cache);
    /// `first_key` of the batch counts in columns of the cache.
    pub fn new(batch: &Batch, config: &DecoderConfig, offset: usize, device: &Device) -> Self {
        let tokens = batch.rows * batch.cols;
        let half = config.head_dim / 2;
        let table = |values| Tensor::<2>::from_data(TensorData::new(values, [tokens, half]), device);
        let ropes = (0..config.ropes.len())
            .map(|rope| {
                let (cos, sin) = config.rope_tables(rope, &batch.positions);
                (table(cos), table(sin))
            })
            .collect();
        let mut windows: Vec<Option<usize>> = config.layers.iter().map(|layer| layer.window).collect();
        windows.sort();
        windows.dedup();
        let ranges = windows.into_iter().map(|window| (window, ranges(batch, window, offset, device))).collect();
        let ids = Tensor::from_data(TensorData::new(batch.input_ids.clone(), [tokens]), device);
        Self { rows: batch.rows, cols: batch.cols, ids, ropes, offset, ranges }
    }

    /// The visible keys of a layer with this window.
    ///
    /// # Panics
    /// For a window that no layer of the configuration has.
    pub fn range(&self, window: Option<usize>) -> Tensor<3, Int> {
        let found = self.ranges.iter().find(|(candidate, _)| *candidate == window);
        found.map(|(_, range)| range.clone()).unwrap_or_else(|| unreachable!("ranges were made for every window"))
    }

    /// What holds for the visible keys of a layer with this window in every batch.
    pub fn known_keys(&self, window: Option<usize>) -> KnownKeys {
        KnownKeys::Band { offset: self.offset, window }
    }
}

/// A query at column i sees `max(first_key, i - window + 1) ..= i`.
fn ranges(batch: &Batch, window: Option<usize>, offset: usize, device: &Device) -> Tensor<3, Int> {
    let mut values = Vec::with_capacity(2 * batch.input_ids.len());
    for (index, &first) in batch.first_key.iter().enumerate() {
        let column = (offset + index % batch.cols) as i32;
        let from_window = window.map_or(0, |window| column - window as i32 + 1);
        values.extend([first.max(from_window).max(0), column + 1]);
    }
    Tensor::from_data(TensorData::new(values, [batch.rows, batch.cols, 2]), device)
}
