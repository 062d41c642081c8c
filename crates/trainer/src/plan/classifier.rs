//! From the `config.json` of a classifier to what decides its memory: the list of its modules, as [`lowrank_models::classifier`]
//! loads them.

use lowrank_models::classifier::layout::{Kind, Part, Segment, join};
use lowrank_models::classifier::{ClassifierConfig, Trunk};

use super::model::{Block, Encoder, Linear, Model, Parameter, Stem};
use super::setup::{Described, Parts};
use crate::config::RunConfig;
use crate::error::Problem;

/// The model with the sizes of a full micro batch.
///
/// # Errors
/// A convolution net.
pub(super) fn described(
    config: &RunConfig,
    classifier: &ClassifierConfig,
    parts: &Parts<'_>,
) -> Result<Described, Problem> {
    let rows = config.training.micro_batch_size;
    let (cols, inputs) = match &classifier.trunk {
        Trunk::Text(text) => {
            let cols = config.data.max_seq_length.min(text.max_tokens());
            (cols, 3 * 4 * rows * cols) // tokens, types, positions
        }
        Trunk::Patches(image) => {
            let pixels = image.channels * image.image_size[0] * image.image_size[1];
            (classifier.columns(), parts.width * rows * pixels)
        }
        Trunk::Conv(_) => {
            let what = format!("the memory of a {} cannot be predicted", classifier.family.model_type);
            return Err(Problem::config(what).hint("only transformers can; the run itself logs its peak"));
        }
    };
    let Some(encoder) = classifier.encoder() else { unreachable!("a transformer has an encoder") };
    let (layout, hidden) = (classifier.layout(), encoder.hidden_size);
    // Blocks alone are packed.
    let dense = Parts { packed: None, ..parts.clone() };
    let (stem, head) = (Read { parts: &dense, segment: &layout.stem }, Read { parts: &dense, segment: &layout.head });
    let tables = stem.all(|part| matches!(part.kind, Kind::Table { .. } | Kind::Tokens { .. }), Read::values);
    let embedding = layout.stem.parts.iter().find_map(|part| match part.kind {
        Kind::Table { rows, width } => {
            Some(parts.embedding_adapter(&join(&layout.stem.name, &part.name), [rows, width]))
        }
        _ => None,
    });
    let model = Model {
        encoder: Some(Encoder {
            norms_first: encoder.norms_first,
            drops: encoder.dropout > 0.0,
            head_drops: classifier.head_dropout > 0.0,
        }),
        tables: tables.into_iter().flatten().collect(),
        embedding_adapter: embedding.unwrap_or_default(),
        stem: match (&classifier.trunk, stem.linears().pop()) {
            (Trunk::Patches(image), Some(linear)) => Stem::Patches(linear, image.num_patches()),
            _ => match <[Parameter; 2]>::try_from(stem.norms()) {
                Ok(norm) => Stem::Texts(norm),
                Err(_) => unreachable!("the embeddings of texts have one norm"),
            },
        },
        blocks: layout.blocks.iter().map(|segment| block(&Read { parts, segment })).collect(),
        norm: head.norms(),
        head: head.linears(),
        shared: vec![],
        hidden,
        vocab: classifier.labels.len(),
        heads: [encoder.num_heads, encoder.num_heads, hidden / encoder.num_heads],
        inner: encoder.intermediate_size,
        ropes: 0,
        windows: 1,
    };
    Ok(Described { model, cols, inputs, counted: rows })
}

fn block(read: &Read<'_>) -> Block {
    Block { linears: read.linears(), norms: read.norms(), head_norms: None }
}

/// The modules of a segment.
struct Read<'a> {
    parts: &'a Parts<'a>,
    segment: &'a Segment,
}

impl Read<'_> {
    fn all<T>(&self, wanted: fn(&Part) -> bool, make: fn(&Self, &Part) -> T) -> Vec<T> {
        self.segment.parts.iter().filter(|part| wanted(part)).map(|part| make(self, part)).collect()
    }

    /// The tensors of a module as matrices; vectors are one row.
    fn values(&self, part: &Part) -> Vec<Parameter> {
        let parameter = |spec: lowrank_models::classifier::layout::TensorSpec| {
            let last = spec.shape.last().copied().unwrap_or(1);
            self.parts.parameter(&spec.name, [spec.shape.iter().product::<usize>() / last.max(1), last])
        };
        part.tensors(&self.segment.name).into_iter().map(parameter).collect()
    }

    fn norms(&self) -> Vec<Parameter> {
        self.all(|part| matches!(part.kind, Kind::Norm { .. }), Self::values).into_iter().flatten().collect()
    }

    fn linears(&self) -> Vec<Linear> {
        self.all(|part| matches!(part.kind, Kind::Linear { .. } | Kind::Patches { .. }), Self::linear)
    }

    fn linear(&self, part: &Part) -> Linear {
        let module = join(&self.segment.name, &part.name);
        match part.kind {
            Kind::Linear { d_in, d_out, bias } => self.parts.linear(&module, d_in, d_out, bias),
            // No adapter sits on the map of patches.
            Kind::Patches { patch, d_out } => Linear {
                weight: self.parts.parameter(&format!("{module}.weight"), [patch.iter().product(), d_out]),
                bias: Some(self.parts.parameter(&format!("{module}.bias"), [1, d_out])),
                adapter: None,
            },
            _ => unreachable!("asked for linear layers"),
        }
    }
}
