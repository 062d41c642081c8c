//! What a classifier consists of, told once: the list of its modules by segment. The names and shapes in a file, how fresh
//! values start, and the modules themselves all follow from it.

/// What a module is, and its sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// `[d_in, d_out]`, on disk `[d_out, d_in]`, and a bias.
    Linear {
        /// Input width.
        d_in: usize,
        /// Output width.
        d_out: usize,
        /// Whether there is a bias.
        bias: bool,
    },
    /// A linear map of the pixels of a patch, on disk the convolution `[d_out, channels, height, width]`, and a bias.
    Patches {
        /// Channels, height and width of a patch.
        patch: [usize; 3],
        /// Output width.
        d_out: usize,
    },
    /// Gain and shift of a layer norm.
    Norm {
        /// Width.
        width: usize,
    },
    /// An embedding, `[rows, width]`.
    Table {
        /// Number of entries.
        rows: usize,
        /// Width of an entry.
        width: usize,
    },
    /// Values without a module of their own, `[1, rows, width]`; their name has no `.weight`.
    Tokens {
        /// Number of tokens.
        rows: usize,
        /// Width of a token.
        width: usize,
    },
    /// A convolution without bias, `[d_out, d_in, kernel, kernel]`, padded to keep the size at stride 1.
    Conv {
        /// Input channels.
        d_in: usize,
        /// Output channels.
        d_out: usize,
        /// Side of the kernel.
        kernel: usize,
        /// Step of the kernel.
        stride: usize,
    },
    /// A batch norm: gain, shift, and the statistics it was trained with.
    BatchNorm {
        /// Channels.
        width: usize,
    },
}

/// How a tensor starts where no file has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// Normal with the configuration's `initializer_range`.
    Normal,
    /// Normal with this deviation.
    Deviation(f64),
    /// All ones.
    One,
    /// All zeros.
    Zero,
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its name in memory.
    pub name: String,
    /// Its shape on disk.
    pub shape: Vec<usize>,
    /// Held as a matrix with its axes swapped.
    pub flipped: bool,
    /// How it starts afresh.
    pub start: Start,
}

/// A module and its name within its segment.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Name; may hold dots.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

impl Part {
    /// A module.
    pub fn new(name: impl Into<String>, kind: Kind) -> Self {
        Self { name: name.into(), kind }
    }

    /// Its tensors, with names that begin with `prefix`.
    pub fn tensors(&self, prefix: &str) -> Vec<TensorSpec> {
        let module = join(prefix, &self.name);
        let spec = |suffix: &str, shape: &[usize], flipped: bool, start: Start| TensorSpec {
            name: format!("{module}{suffix}"),
            shape: shape.to_vec(),
            flipped,
            start,
        };
        match self.kind {
            Kind::Linear { d_in, d_out, bias } => {
                let mut tensors = vec![spec(".weight", &[d_out, d_in], true, Start::Normal)];
                if bias {
                    tensors.push(spec(".bias", &[d_out], false, Start::Zero));
                }
                tensors
            }
            Kind::Patches { patch: [channels, height, width], d_out } => vec![
                spec(".weight", &[d_out, channels, height, width], true, Start::Normal),
                spec(".bias", &[d_out], false, Start::Zero),
            ],
            Kind::Norm { width } => {
                vec![spec(".weight", &[width], false, Start::One), spec(".bias", &[width], false, Start::Zero)]
            }
            Kind::Table { rows, width } => vec![spec(".weight", &[rows, width], false, Start::Normal)],
            Kind::Tokens { rows, width } => vec![spec("", &[1, rows, width], false, Start::Normal)],
            Kind::Conv { d_in, d_out, kernel, .. } => {
                // Kaiming's normal start by fan-out, for the ReLU that follows.
                let deviation = (2.0 / (d_out * kernel * kernel) as f64).sqrt();
                vec![spec(".weight", &[d_out, d_in, kernel, kernel], false, Start::Deviation(deviation))]
            }
            Kind::BatchNorm { width } => vec![
                spec(".weight", &[width], false, Start::One),
                spec(".bias", &[width], false, Start::Zero),
                spec(".running_mean", &[width], false, Start::Zero),
                spec(".running_var", &[width], false, Start::One),
            ],
        }
    }
}

/// Modules that run together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Segment {
    /// What their names begin with; may be empty.
    pub name: String,
    /// The modules in order.
    pub parts: Vec<Part>,
}

impl Segment {
    /// The tensors of all modules.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.parts.iter().flat_map(|part| part.tensors(&self.name)).collect()
    }
}

/// All modules of a classifier.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Layout {
    /// From the input to the first hidden state.
    pub stem: Segment,
    /// The blocks in order.
    pub blocks: Vec<Segment>,
    /// From the last hidden state to the logits; its last module is the linear map to the classes.
    pub head: Segment,
}

impl Layout {
    /// Every tensor of a checkpoint, in model order.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let blocks = self.blocks.iter().flat_map(Segment::tensors);
        self.stem.tensors().into_iter().chain(blocks).chain(self.head.tensors()).collect()
    }
}

/// `a.b`, or the one that is not empty.
pub fn join(prefix: &str, name: &str) -> String {
    match (prefix, name) {
        ("", name) => name.to_owned(),
        (prefix, "") => prefix.to_owned(),
        (prefix, name) => format!("{prefix}.{name}"),
    }
}
