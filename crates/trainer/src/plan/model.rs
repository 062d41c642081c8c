//! What a model is made of, as far as memory is concerned: parameters with their storage, linear layers with their adapters.

use super::ledger::Category;

/// How the values of a weight lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// So many bytes a value.
    Dense(usize),
    /// Codes of so many bits, with a scale for every group.
    Packed {
        /// Bits of a code.
        bits: usize,
        /// Values of a group.
        group: usize,
        /// Bits that a group takes beside its codes.
        group_bits: usize,
    },
}

impl Format {
    /// f32.
    pub const F32: Self = Self::Dense(4);
    /// NF4 in blocks of 64 with scales in 8 bits, which have an f32 scale for each 256 of them: 4.127 bits a value.
    pub const NF4: Self = Self::Packed { bits: 4, group: 64, group_bits: 8 };

    /// Integer codes with a scale in f32 and a zero of a byte for every group.
    pub fn groups(bits: usize, group: usize) -> Self {
        Self::Packed { bits, group, group_bits: 40 }
    }

    /// Bytes of so many values.
    pub fn bytes(self, values: usize) -> usize {
        match self {
            Self::Dense(width) => width * values,
            Self::Packed { bits, group, group_bits } => {
                let groups = values.div_ceil(group);
                let second = if group_bits == 8 { 4 * groups.div_ceil(256) } else { 0 };
                (bits * values).div_ceil(8) + (group_bits * groups).div_ceil(8) + second
            }
        }
    }

    /// For a table: `f32`, `16 bits`, `4.13 bits`.
    pub fn name(self) -> String {
        const MANY: usize = 1 << 20;
        match self {
            Self::Dense(4) => "f32".to_owned(),
            Self::Dense(width) => format!("{} bits", 8 * width),
            Self::Packed { .. } => {
                format!("{:.2} bits", 8.0 * self.bytes(MANY) as f64 / MANY as f64)
            }
        }
    }

    /// Bytes of a value, where each has a place of its own.
    pub fn width(self) -> Option<usize> {
        match self {
            Self::Dense(width) => Some(width),
            Self::Packed { .. } => None,
        }
    }
}

/// A parameter as the optimiser sees it: a matrix; a vector is one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its name, as in a gradient.
    pub name: String,
    /// `[m, n]`.
    pub dims: [usize; 2],
    /// How it is stored.
    pub format: Format,
    /// Whether it gets a gradient.
    pub trained: bool,
    /// [`Category::Weights`] or [`Category::Adapter`].
    pub category: Category,
    /// The parameter whose memory this one uses, if it has none of its own.
    pub memory: Option<String>,
}

impl Parameter {
    /// m n.
    pub fn values(&self) -> usize {
        self.dims[0] * self.dims[1]
    }

    /// What it takes.
    pub fn bytes(&self) -> usize {
        self.format.bytes(self.values())
    }
}

/// The adapter of a linear layer, by what its factors are and which of them are trained.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant)] // one a layer, while a plan is made
pub enum Adapter {
    /// `s (((D(x) A) M) B) * c` beside the base.
    LowRank(LowRank),
    /// `(x (W + s A B)) * (m / n)`
    Dora {
        /// A and B.
        delta: LowRank,
        /// m, `[1, d_out]`.
        magnitude: Parameter,
        /// Squared lengths of the base's columns, `[1, d_out]`, frozen.
        squares: Parameter,
    },
    /// `x (W + s sum_b B_b diag(lambda_b) A diag(gamma_b))`
    RandLora {
        /// `[r, n]`.
        lambda: Parameter,
        /// `[n, m]`, for m the smaller side.
        gamma: Parameter,
        /// The columns that this size of layer uses, `[D, n r]`, shared.
        large: Parameter,
        /// Whether the smaller side is that of the inputs.
        is_small_first: bool,
        /// Whether inputs are dropped in training.
        drops: bool,
    },
    /// `x R W`, R a product of reflections.
    Hra {
        /// `[d_in, r]`.
        vectors: Parameter,
    },
    /// `x R W`, R block-diagonal.
    Oft {
        /// Upper triangles, `[blocks, b (b - 1) / 2]`.
        weight: Parameter,
        /// b.
        block: usize,
        /// Powers of Q that the tape keeps, the rotation included.
        powers: usize,
    },
}

impl Adapter {
    /// Its parameters.
    pub fn parameters(&self) -> Vec<&Parameter> {
        match self {
            Self::LowRank(delta) => delta.parameters(),
            Self::Dora { delta, magnitude, squares } => {
                delta.parameters().into_iter().chain([magnitude, squares]).collect()
            }
            Self::RandLora { lambda, gamma, large, .. } => vec![lambda, gamma, large],
            Self::Hra { vectors } => vec![vectors],
            Self::Oft { weight, .. } => vec![weight],
        }
    }
}

/// The additive low-rank delta: most methods.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// A, `[d_in, r]`.
    pub down: Parameter,
    /// M, `[r, q]`, or `[1, r]` for a diagonal.
    pub core: Option<Parameter>,
    /// B, `[q, d_out]`.
    pub up: Parameter,
    /// c, `[1, d_out]`.
    pub out_scale: Option<Parameter>,
    /// Frozen copies that belong to the start (A_0, B_0, M_0): held, not used by a step.
    pub held: Vec<Parameter>,
    /// Whether inputs are dropped in training.
    pub drops: bool,
}

impl LowRank {
    /// r.
    pub fn rank(&self) -> usize {
        self.down.dims[1]
    }

    /// Whether M or c is folded into B before each product.
    pub fn folds(&self) -> bool {
        self.core.is_some() || self.out_scale.is_some()
    }

    fn parameters(&self) -> Vec<&Parameter> {
        [Some(&self.down), self.core.as_ref(), Some(&self.up), self.out_scale.as_ref()]
            .into_iter()
            .flatten()
            .chain(&self.held)
            .collect()
    }
}

/// A linear layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// W, `[d_in, d_out]`.
    pub weight: Parameter,
    /// b, `[1, d_out]`.
    pub bias: Option<Parameter>,
    /// What an adapter adds.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// All of its parameters.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let adapter = self.adapter.as_ref().map(Adapter::parameters).unwrap_or_default();
        [&self.weight].into_iter().chain(&self.bias).chain(adapter).collect()
    }
}

/// A transformer block.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// q, k, v, o, gate, up, down; of an encoder without a gate.
    pub linears: Vec<Linear>,
    /// Norms of the residual stream in the order in which they act: two, or four with sandwich norms; of an encoder gain and shift
    /// of each.
    pub norms: Vec<Parameter>,
    /// Norms of the query and key heads.
    pub head_norms: Option<[Parameter; 2]>,
}

impl Block {
    /// All of its parameters.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let linears = self.linears.iter().flat_map(Linear::parameters);
        linears.chain(&self.norms).chain(self.head_norms.iter().flatten()).collect()
    }

    /// Whether it has something to train.
    pub fn is_trained(&self) -> bool {
        self.parameters().iter().any(|parameter| parameter.trained)
    }
}

/// What is more than the rows of one table before the first block.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant)] // one a model
pub enum Stem {
    /// Nothing: a decoder.
    Tokens,
    /// A norm of the sum over all tables, gain and shift.
    Texts([Parameter; 2]),
    /// A linear map of patches, of which an image has so many.
    Patches(Linear, usize),
}

/// What an encoder for classification does that a decoder does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoder {
    /// Norms come before the layers and not after the sums.
    pub norms_first: bool,
    /// The outputs of embeddings, attention and feed-forward layers are dropped in training.
    pub drops: bool,
    /// So are the inputs of the head's last map.
    pub head_drops: bool,
}

/// A model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// None for a causal language model.
    pub encoder: Option<Encoder>,
    /// Embeddings, `[rows, hidden]`: of tokens first; of images the class token and the positions.
    pub tables: Vec<Parameter>,
    /// A and B of an adapter on the first of them.
    pub embedding_adapter: Vec<Parameter>,
    /// What else comes before the blocks.
    pub stem: Stem,
    /// Blocks.
    pub blocks: Vec<Block>,
    /// Norm before the head: a gain; of ViT gain and shift; none in BERT.
    pub norm: Vec<Parameter>,
    /// The maps of the head; none where it is the embedding.
    pub head: Vec<Linear>,
    /// Frozen tensors that the adapters of several layers share.
    pub shared: Vec<Parameter>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Logits of a row.
    pub vocab: usize,
    /// Query heads, key heads, width of a head.
    pub heads: [usize; 3],
    /// Width of the feed-forward layer.
    pub inner: usize,
    /// Tables of rotary angles.
    pub ropes: usize,
    /// Different windows of the layers.
    pub windows: usize,
}

impl Model {
    /// All parameters, what is shared first.
    pub fn parameters(&self) -> Vec<&Parameter> {
        let blocks = self.blocks.iter().flat_map(Block::parameters);
        let head = self.head.iter().flat_map(Linear::parameters);
        self.shared.iter().chain(self.stem_parameters()).chain(&self.norm).chain(blocks).chain(head).collect()
    }

    /// Those before the first block.
    pub fn stem_parameters(&self) -> Vec<&Parameter> {
        let rest = match &self.stem {
            Stem::Tokens => vec![],
            Stem::Texts(norm) => norm.iter().collect(),
            Stem::Patches(linear, _) => linear.parameters(),
        };
        self.tables.iter().chain(&self.embedding_adapter).chain(rest).collect()
    }

    /// Changes the parameters of the base.
    pub fn for_each_parameter(&mut self, change: &mut dyn FnMut(&mut Parameter)) {
        let linears = self.blocks.iter_mut().flat_map(|block| {
            let norms = block.norms.iter_mut().chain(block.head_norms.iter_mut().flatten());
            norms.chain(
                block.linears.iter_mut().flat_map(|linear| [&mut linear.weight].into_iter().chain(&mut linear.bias)),
            )
        });
        let head = self.head.iter_mut().flat_map(|linear| [&mut linear.weight].into_iter().chain(&mut linear.bias));
        let stem: Vec<&mut Parameter> = match &mut self.stem {
            Stem::Tokens => vec![],
            Stem::Texts(norm) => norm.iter_mut().collect(),
            Stem::Patches(linear, _) => [&mut linear.weight].into_iter().chain(&mut linear.bias).collect(),
        };
        self.tables.iter_mut().chain(stem).chain(&mut self.norm).chain(linears).chain(head).for_each(change);
    }

    /// Whether something before the first block is trained.
    pub fn stem_is_trained(&self) -> bool {
        self.stem_parameters().iter().any(|parameter| parameter.trained)
    }

    /// The linear layers of blocks and head.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(|block| &block.linears).chain(&self.head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 4 + 8/64 + 32/(64 256) bits.
    #[test]
    fn nf4_with_double_quantisation_takes_4_127_bits_a_value() {
        let values = 1 << 20;
        let bits = 8.0 * Format::NF4.bytes(values) as f64 / values as f64;
        assert!((bits - 4.126_953).abs() < 1e-6, "{bits}");
        assert_eq!((Format::F32.bytes(10), Format::Dense(2).bytes(10)), (40, 20));
        let int4 = Format::Packed { bits: 4, group: 32, group_bits: 32 };
        assert_eq!(int4.bytes(64), 32 + 8);
        let names: Vec<String> =
            [Format::F32, Format::Dense(2), Format::NF4, int4].into_iter().map(Format::name).collect();
        assert_eq!(names, ["f32", "16 bits", "4.13 bits", "5.00 bits"]);
    }
}
