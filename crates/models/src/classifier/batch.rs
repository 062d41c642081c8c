//! The host-side input of a classifier, and the same on a device.

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use lowrank_core::lowrank::cast;

use super::config::{ClassifierConfig, Trunk};
use crate::encoder::Grid;

/// What is classified; every vector is row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Token ids.
    Text {
        /// Sequences.
        rows: usize,
        /// Tokens of a sequence.
        cols: usize,
        /// Token ids, `[rows, cols]`.
        ids: Vec<i32>,
        /// Token types: which text of a pair a token is of, `[rows, cols]`.
        types: Vec<i32>,
        /// 1 for tokens, 0 for padding, `[rows, cols]`. The tokens of a row stand together.
        mask: Vec<i32>,
    },
    /// Pixels, normalised as the model wants them.
    Image {
        /// Images.
        rows: usize,
        /// Colour channels.
        channels: usize,
        /// Pixels from top to bottom.
        height: usize,
        /// Pixels from left to right.
        width: usize,
        /// `[rows, channels, height, width]`.
        pixels: Vec<f32>,
    },
}

impl Input {
    /// Sequences or images.
    pub fn rows(&self) -> usize {
        match self {
            Self::Text { rows, .. } | Self::Image { rows, .. } => *rows,
        }
    }
}

/// What the classifier should say, one entry a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Labels {
    /// Number of the class, or [`IGNORE`](crate::IGNORE).
    Classes(Vec<i32>),
    /// A number to come close to (regression).
    Values(Vec<f32>),
}

impl Labels {
    /// Rows that are trained on.
    pub fn counted(&self) -> Vec<usize> {
        match self {
            Self::Classes(classes) => (0..classes.len()).filter(|&row| classes[row] >= 0).collect(),
            Self::Values(values) => (0..values.len()).collect(),
        }
    }
}

/// A micro batch.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierBatch {
    /// What is classified.
    pub input: Input,
    /// What the classifier should say.
    pub labels: Labels,
    /// Indices of the data records inside, for messages.
    pub records: Vec<u64>,
}

impl ClassifierBatch {
    /// Rows that are trained on.
    pub fn target_count(&self) -> usize {
        self.labels.counted().len()
    }

    /// Tokens that are not padding, or images.
    pub fn token_count(&self) -> usize {
        match &self.input {
            Input::Text { mask, .. } => mask.iter().filter(|&&is_token| is_token != 0).count(),
            Input::Image { rows, .. } => *rows,
        }
    }
}

/// A batch on the device: plain tensors, never on the tape.
#[derive(Clone, Debug)]
pub struct ClassifierInputs {
    /// Shape of the hidden states and what their positions see; one column where there is no attention.
    pub grid: Grid,
    /// The input itself.
    pub data: InputData,
}

/// What the stem starts from.
#[allow(clippy::large_enum_variant)] // one a batch
#[derive(Clone, Debug)]
pub enum InputData {
    /// `[rows * cols]` each.
    Text {
        /// Token ids.
        ids: Tensor<1, Int>,
        /// Token types.
        types: Tensor<1, Int>,
        /// Rows of the position embedding.
        positions: Tensor<1, Int>,
    },
    /// `[rows, channels, height, width]` in the compute type.
    Image(Tensor<4>),
}

impl ClassifierInputs {
    /// Moves a batch to the device.
    pub fn new(batch: &ClassifierBatch, config: &ClassifierConfig, dtype: FloatDType, device: &Device) -> Self {
        match &batch.input {
            Input::Text { rows, cols, ids, types, mask } => {
                let tensor = |values: Vec<i32>| {
                    let count = values.len();
                    Tensor::<1, Int>::from_data(TensorData::new(values, [count]), device)
                };
                let positions = positions(config, ids, *cols);
                let data = InputData::Text {
                    ids: tensor(ids.clone()),
                    types: tensor(types.clone()),
                    positions: tensor(positions),
                };
                let ranges = mask.chunks(*cols).flat_map(|row| visible(row).repeat(*cols)).collect();
                Self { grid: grid(*rows, *cols, ranges, device), data }
            }
            Input::Image { rows, channels, height, width, pixels } => {
                let cols = config.columns();
                let dims = [*rows, *channels, *height, *width];
                let pixels = Tensor::<4>::from_data(TensorData::new(pixels.clone(), dims), device);
                let ranges = [0, cols as i32].repeat(rows * cols);
                Self { grid: grid(*rows, cols, ranges, device), data: InputData::Image(cast(pixels, dtype)) }
            }
        }
    }
}

fn grid(rows: usize, cols: usize, ranges: Vec<i32>, device: &Device) -> Grid {
    Grid { rows, cols, ranges: Tensor::from_data(TensorData::new(ranges, [rows, cols, 2]), device) }
}

/// First token of a row and the one after its last; a row of padding alone sees its first position.
fn visible(mask: &[i32]) -> [i32; 2] {
    let first = mask.iter().position(|&is_token| is_token != 0);
    let last = mask.iter().rposition(|&is_token| is_token != 0);
    match (first, last) {
        (Some(first), Some(last)) => [first as i32, last as i32 + 1],
        _ => [0, 1],
    }
}

/// Rows of the position embedding: the column, or in RoBERTa the count of tokens that are no padding, from `padding + 1` on.
fn positions(config: &ClassifierConfig, ids: &[i32], cols: usize) -> Vec<i32> {
    let padding = match &config.trunk {
        Trunk::Text(text) => text.counts_after,
        _ => None,
    };
    let Some(padding) = padding else {
        return (0..ids.len()).map(|index| (index % cols) as i32).collect();
    };
    let row = |ids: &[i32]| {
        let mut position = padding;
        let next = |&id: &i32| {
            if id == padding {
                return padding;
            }
            position += 1;
            position
        };
        ids.iter().map(next).collect::<Vec<i32>>()
    };
    ids.chunks(cols).flat_map(row).collect()
}
