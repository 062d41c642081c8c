//! Weights that are stored as 4-bit or 8-bit codes, and the linear layer on them.
//!
//! The `[d_out, d_in]` matrix as it lies on disk is flattened row by row and cut into blocks that share a scale; codes fill i32
//! words from the lowest bits on, so that they work on every backend. With [`Order::Inputs`] it is the `[d_in, d_out]` matrix.
//!
//! | format | value of a code q | bits a value |
//! | --- | --- | --- |
//! | [`Format::Nf4`], [`Format::Fp4`] | `table[q] a` | `4 + 32 / block` |
//! | the same, nested | `table[q] (map[p] a_p + offset)`: the scale is a code p too | `4 + 8 / block + 32 / (256 block)` |
//! | [`Format::Int8`], [`Format::Int4`] | `(q - z) a` | `bits + 40 / block` |
//!
//! A product never holds the whole weight: a panel of rows of the flattened matrix S is dequantised into a scratch buffer and
//! used at once.
//!
//! * `y[:, panel] = x S_panel^T + b`: forward where S is `[d_out, d_in]`, backward where it is `[d_in, d_out]`
//! * `dx += dy[:, panel] S_panel`: the other one. The codes get no gradient, and x is not saved.
//!
//! On the CPU a panel has half a million values in f32, whatever the type of x; elsewhere it has up to 2^26 values in the
//! type of x. Dequantising is bound by memory: 0.5 byte read and the value written, once per product (`gpu/codes.rs`). For up to
//! 8 tokens a GPU multiplies by the codes themselves, which are read once and never written as values (`gpu/thin/`).

use std::ops::Range;

use burn::backend::{Backend, Dispatch, ExtensionType, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};

pub(crate) mod autodiff;
#[cfg(feature = "flex")]
pub(crate) mod cpu;
pub(crate) mod reference;

use crate::LowRankOps;

/// What a code means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 4 bits: quantiles of the normal distribution.
    Nf4,
    /// 4 bits: a float with one sign, two exponent and one mantissa bits.
    Fp4,
    /// 8 bits with a zero point.
    Int8,
    /// 4 bits with a zero point.
    Int4,
}

impl Format {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        if self == Self::Int8 { 8 } else { 4 }
    }

    /// Codes in a word.
    pub fn per_word(self) -> usize {
        32 / self.bits()
    }
}

/// Which matrix is flattened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// `[d_out, d_in]`, as a weight lies on disk.
    #[default]
    Outputs,
    /// `[d_in, d_out]`, as an optimiser sees it.
    Inputs,
}

/// Scales that are codes themselves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nested {
    /// Scales that share a scale.
    pub block: usize,
    /// Added to every scale.
    pub offset: f32,
}

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layout {
    /// What a code means.
    pub format: Format,
    /// Consecutive values that share a scale, a multiple of 8; the last block may have fewer.
    pub block: usize,
    /// `[d_in, d_out]`.
    pub dims: [usize; 2],
    /// Which matrix is flattened.
    pub order: Order,
    /// Where scales are codes too.
    pub nested: Option<Nested>,
}

impl Layout {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.dims[0] * self.dims[1]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows and columns of the flattened matrix.
    pub fn stored(&self) -> [usize; 2] {
        let [d_in, d_out] = self.dims;
        match self.order {
            Order::Outputs => [d_out, d_in],
            Order::Inputs => [d_in, d_out],
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.len().div_ceil(self.block)
    }

    /// Words of the codes.
    pub fn words(&self) -> usize {
        self.len().div_ceil(self.format.per_word())
    }
}

/// The scales of a packed weight.
#[allow(clippy::large_enum_variant)] // one per layer
#[derive(Clone, Debug)]
pub enum Scales {
    /// `table[q] scale`.
    Table {
        /// The values of the codes, `[16]`.
        table: Tensor<1>,
        /// One a block.
        scale: Tensor<1>,
    },
    /// `table[q] (map[p] absmax + offset)`.
    Nested {
        /// The values of the codes, `[16]`.
        table: Tensor<1>,
        /// p of each block, four in a word.
        codes: Tensor<1, Int>,
        /// The values of these codes, `[256]`.
        map: Tensor<1>,
        /// One per block of scales.
        absmax: Tensor<1>,
    },
    /// `(q - zero) scale`.
    Affine {
        /// One a block.
        scale: Tensor<1>,
        /// One a block, four in a word.
        zero: Tensor<1, Int>,
    },
}

/// A packed `[d_in, d_out]` weight.
#[derive(Clone, Debug)]
pub struct Packed {
    layout: Layout,
    codes: Tensor<1, Int>,
    scales: Scales,
}

impl Packed {
    /// From words and scales in f32.
    ///
    /// # Panics
    /// Where sizes are not those of the layout.
    pub fn new(layout: Layout, codes: Tensor<1, Int>, scales: Scales) -> Self {
        let (blocks, words) = (layout.blocks(), |count: usize| count.div_ceil(4));
        assert!(layout.block > 0 && layout.block.is_multiple_of(8), "blocks of {} values", layout.block);
        assert_eq!(codes.dims(), [layout.words()], "words of codes");
        let is_table = matches!(layout.format, Format::Nf4 | Format::Fp4);
        match (&scales, layout.nested) {
            (Scales::Table { table, scale }, None) if is_table => {
                assert_eq!((table.dims(), scale.dims()), ([16], [blocks]), "table and scales");
            }
            (Scales::Nested { table, codes, map, absmax }, Some(nested)) if is_table => {
                assert_eq!((table.dims(), map.dims()), ([16], [256]), "tables");
                let expected = ([words(blocks)], [blocks.div_ceil(nested.block)]);
                assert_eq!((codes.dims(), absmax.dims()), expected, "scale codes and their scales");
            }
            (Scales::Affine { scale, zero }, None) if !is_table => {
                assert_eq!((scale.dims(), zero.dims()), ([blocks], [words(blocks)]), "scales and zero points");
            }
            _ => assert_eq!(is_table, !is_table, "the scales are those of another format than {:?}", layout.format),
        }
        Self { layout, codes, scales }
    }

    /// How it is packed.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The words of the codes.
    pub fn codes(&self) -> &Tensor<1, Int> {
        &self.codes
    }

    /// The scales.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        self.layout.dims
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.codes.device()
    }

    /// Bytes of codes, scales and tables.
    pub fn bytes(&self) -> usize {
        let sizes = match &self.scales {
            Scales::Table { table, scale } => table.dims()[0] + scale.dims()[0],
            Scales::Nested { table, codes, map, absmax } => {
                table.dims()[0] + codes.dims()[0] + map.dims()[0] + absmax.dims()[0] + 1
            }
            Scales::Affine { scale, zero } => scale.dims()[0] + zero.dims()[0],
        };
        4 * (self.codes.dims()[0] + sizes)
    }

    /// All values, `[d_in, d_out]`: a view of the flattened matrix. For merging, starts and the update of one layer, never for
    /// all layers at once.
    pub fn dense(&self, dtype: FloatDType) -> Tensor<2> {
        let values = self.rows(0..self.layout.stored()[0], dtype);
        match self.layout.order {
            Order::Outputs => values.transpose(),
            Order::Inputs => values,
        }
    }

    /// The values of some rows of the flattened matrix: outputs, `[rows, d_in]`, or inputs, `[rows, d_out]`.
    ///
    /// # Panics
    /// Where there are fewer rows.
    pub fn rows(&self, rows: Range<usize>, dtype: FloatDType) -> Tensor<2> {
        let stored = self.layout.stored();
        assert!(rows.end <= stored[0], "rows {rows:?} of {stored:?}");
        Tensor::from_dispatch(Dispatch::dequantise(self.clone().into_parts(), rows.start, rows.len(), dtype))
    }

    /// The primitives.
    pub(crate) fn into_parts(self) -> PackedParts<Dispatch> {
        let (layout, codes) = (self.layout, self.codes.into_dispatch());
        match self.scales {
            Scales::Table { table, scale } => {
                PackedParts::Table { codes, table: table.into_dispatch(), scale: scale.into_dispatch(), layout }
            }
            Scales::Nested { table, codes: scale_codes, map, absmax } => PackedParts::Nested {
                codes,
                table: table.into_dispatch(),
                scale_codes: scale_codes.into_dispatch(),
                map: map.into_dispatch(),
                absmax: absmax.into_dispatch(),
                layout,
            },
            Scales::Affine { scale, zero } => {
                PackedParts::Affine { codes, scale: scale.into_dispatch(), zero: zero.into_dispatch(), layout }
            }
        }
    }
}

/// Words as a tensor; codes are i32 on every device.
pub fn words(words: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let len = words.len();
    Tensor::from_data(TensorData::new(words, [len]), (device, DType::I32))
}

/// Scales as a tensor; they are f32 whatever the type of the run.
pub fn scales(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32))
}

/// A packed weight in the signature of an operation.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "gpu"))]
pub enum PackedParts<B: Backend> {
    /// See [`Scales::Table`].
    Table {
        /// Codes.
        codes: IntTensor<B>,
        /// Values of the codes.
        table: FloatTensor<B>,
        /// One a block.
        scale: FloatTensor<B>,
        /// How they are packed.
        layout: Layout,
    },
    /// See [`Scales::Nested`].
    Nested {
        /// Codes.
        codes: IntTensor<B>,
        /// Values of the codes.
        table: FloatTensor<B>,
        /// Codes of the scales.
        scale_codes: IntTensor<B>,
        /// Values of these codes.
        map: FloatTensor<B>,
        /// One per block of scales.
        absmax: FloatTensor<B>,
        /// How they are packed.
        layout: Layout,
    },
    /// See [`Scales::Affine`].
    Affine {
        /// Codes.
        codes: IntTensor<B>,
        /// One a block.
        scale: FloatTensor<B>,
        /// One a block.
        zero: IntTensor<B>,
        /// How they are packed.
        layout: Layout,
    },
}

impl<B: Backend> PackedParts<B> {
    /// How it is packed.
    pub fn layout(&self) -> Layout {
        match self {
            Self::Table { layout, .. } | Self::Nested { layout, .. } | Self::Affine { layout, .. } => *layout,
        }
    }
}

#[cfg(feature = "gpu")]
impl PackedPartsMetadata {
    /// How it is packed.
    pub(crate) fn layout(&self) -> Layout {
        match self {
            Self::Table { layout, .. } | Self::Nested { layout, .. } | Self::Affine { layout, .. } => *layout,
        }
    }
}

/// A weight in whatever form it is held, whose gradient, if any, does not arrive at its own node.
#[derive(Clone, Debug)]
pub(crate) enum Operand<B: LowRankOps> {
    /// The values, `[d_in, d_out]`.
    Dense(FloatTensor<B>),
    /// Codes; in a box, because the tape keeps one for each layer.
    Packed(Box<PackedParts<B>>),
    /// The identity: no product at all.
    Identity,
}
