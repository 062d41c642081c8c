//! From the configuration of a run and the `config.json` of its model to what decides its memory. No weight is read.
//!
//! A new adapter adds an arm to `adapter_of`: which factors it has, of what sizes, and which of them are trained. A new
//! optimiser adds one in `optimizers.rs`. Encoders for classification are in `classifier.rs`.

use lowrank_models::config::DecoderConfig;
use lowrank_models::hf::{self, peft::MethodConfig};

use super::ledger::Category;
use super::model::{Adapter, Block, Format, Linear, LowRank, Model, Parameter, Stem};
use super::operations::{Machine, Shape};
use super::optimizers::{methods, store};
use super::pass::Setup;
use super::{Subject, classifier};
use crate::classification::save_whole;
use crate::config::{Dtype, GradientCheckpointing, QuantizationConfig, RunConfig};
use crate::error::Problem;

/// Name of the embedding's module.
const EMBEDDING: &str = "model.embed_tokens";
/// Name of the head's module.
const HEAD: &str = "lm_head";

/// What a run on a machine has in memory.
///
/// # Errors
/// A pattern that is no regular expression; a model that is no transformer.
pub fn describe<'a>(config: &RunConfig, subject: impl Into<Subject<'a>>, machine: Machine) -> Result<Setup, Problem> {
    let subject = subject.into();
    let (training, width) = (&config.training, bytes_of(config.dtype));
    let mut peft = peft_of(config)?;
    if let (Some(peft), Subject::Classifier { config: model, fresh }, None) = (&mut peft, subject, &config.init_adapter)
    {
        save_whole(peft, model, fresh)?;
    }
    let packed = config.quantization.as_ref().map(packing).transpose()?;
    let parts = Parts { peft: peft.as_ref(), packed, width };
    let rows = training.micro_batch_size;
    let Described { mut model, cols, inputs, counted } = match subject {
        Subject::Decoder(decoder) => {
            let (cols, model) = (config.data.max_seq_length, Builder { decoder, parts: &parts }.model());
            // The last token of a sequence predicts nothing.
            Described { model, cols, inputs: 4 * rows * cols, counted: rows * cols - rows.min(rows * cols) }
        }
        Subject::Classifier { config: model, .. } => classifier::described(config, model, &parts)?,
    };
    model.shared = parts.peft.map(|peft| shared(peft, &model)).unwrap_or_default();
    let shape = Shape { rows, cols };
    let methods = methods(config, &model, shape.tokens())?;
    store(&mut model, &config.optimizer, &methods);
    Ok(Setup {
        machine,
        width,
        shape,
        counted,
        inputs,
        head_chunk: training.head_chunk_tokens.unwrap_or_else(|| subject.head_chunk()),
        micro_batches: training.gradient_accumulation_steps,
        steps: training.max_steps,
        rebuilds: training.gradient_checkpointing == GradientCheckpointing::Block,
        immediate: crate::optimizer::updates_immediately(config),
        methods,
        model,
    })
}

/// A model with the sizes of a micro batch.
pub(super) struct Described {
    /// The model, without what its adapters share.
    pub model: Model,
    /// Tokens of a sequence, patches of an image.
    pub cols: usize,
    /// Bytes of ids or pixels.
    pub inputs: usize,
    /// Rows with a loss.
    pub counted: usize,
}

/// Bytes of a value.
fn bytes_of(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 | Dtype::F16 => 2,
    }
}

/// The adapter's settings in peft's terms: of the folder to go on from, or of the table.
fn peft_of(config: &RunConfig) -> Result<Option<hf::AdapterConfig>, Problem> {
    match (&config.init_adapter, &config.adapter) {
        (Some(folder), _) => hf::AdapterConfig::from_folder(folder)
            .map(Some)
            .map_err(|error| Problem::config(format!("cannot use the adapter {}", folder.display())).source(error)),
        (None, Some(adapter)) => crate::attach::settings(config, adapter).map(Some),
        (None, None) => Ok(None),
    }
}

/// How a quantised base is held, and which layers are.
fn packing(quantization: &QuantizationConfig) -> Result<(Format, hf::AdapterConfig), Problem> {
    let (_, group) = quantization.group();
    let (bits, group_bits) = match quantization {
        QuantizationConfig::Nf4(table) => (4, if table.double_quant { 8 } else { 32 }),
        QuantizationConfig::Int8(_) => (8, 40),
        QuantizationConfig::Int4(_) => (4, 40),
    };
    Ok((Format::Packed { bits, group, group_bits }, crate::session::quantized_modules(quantization)?))
}

/// What makes parameters and layers of names and sizes.
#[derive(Clone)]
pub(super) struct Parts<'a> {
    pub peft: Option<&'a hf::AdapterConfig>,
    pub packed: Option<(Format, hf::AdapterConfig)>,
    pub width: usize,
}

struct Builder<'a> {
    decoder: &'a DecoderConfig,
    parts: &'a Parts<'a>,
}

impl Builder<'_> {
    fn model(&self) -> Model {
        let c = self.decoder;
        // As in peft, a tied head gets its own handle where head and embedding are to differ.
        let differ = |peft: &hf::AdapterConfig| peft.saves(HEAD) || peft.saves(EMBEDDING) || peft.targets(HEAD);
        let has_head = !c.tie_word_embeddings || self.parts.peft.is_some_and(differ);
        let head = has_head.then(|| self.parts.linear(HEAD, c.hidden_size, c.vocab_size, false));
        let embedding = self.parts.parameter(&format!("{EMBEDDING}.weight"), [c.vocab_size, c.hidden_size]);
        let head = head.map(|mut head| {
            if c.tie_word_embeddings && !embedding.trained && !head.weight.trained {
                head.weight.memory = Some(embedding.name.clone());
            }
            head
        });
        let mut windows: Vec<Option<usize>> = c.layers.iter().map(|layer| layer.window).collect();
        windows.sort_unstable();
        windows.dedup();
        Model {
            encoder: None,
            tables: vec![embedding],
            embedding_adapter: self.parts.embedding_adapter(EMBEDDING, [c.vocab_size, c.hidden_size]),
            stem: Stem::Tokens,
            blocks: (0..c.num_layers).map(|index| self.block(index)).collect(),
            norm: vec![self.parts.parameter("model.norm.weight", [1, c.hidden_size])],
            head: head.into_iter().collect(),
            shared: vec![],
            hidden: c.hidden_size,
            vocab: c.vocab_size,
            heads: [c.num_heads, c.num_kv_heads, c.head_dim],
            inner: c.intermediate_size,
            ropes: c.ropes.len(),
            windows: windows.len(),
        }
    }

    fn block(&self, index: usize) -> Block {
        let c = self.decoder;
        let at = |part: &str| format!("model.layers.{index}.{part}");
        let (hidden, q, kv, inner) =
            (c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size);
        let norm = |part: &str, width: usize| self.parts.parameter(&at(&format!("{part}.weight")), [1, width]);
        let linear = |part: &str, d_in, d_out, has_bias| self.parts.linear(&at(part), d_in, d_out, has_bias);
        let between = ["pre_feedforward_layernorm", "post_feedforward_layernorm"];
        let sandwich = between.iter().filter(|_| c.sandwich_norms).map(|part| norm(part, hidden));
        Block {
            linears: vec![
                linear("self_attn.q_proj", hidden, q, c.qkv_bias),
                linear("self_attn.k_proj", hidden, kv, c.qkv_bias),
                linear("self_attn.v_proj", hidden, kv, c.qkv_bias),
                linear("self_attn.o_proj", q, hidden, c.o_bias),
                linear("mlp.gate_proj", hidden, inner, c.mlp_bias),
                linear("mlp.up_proj", hidden, inner, c.mlp_bias),
                linear("mlp.down_proj", inner, hidden, c.mlp_bias),
            ],
            norms: ["input_layernorm", "post_attention_layernorm"]
                .iter()
                .map(|part| norm(part, hidden))
                .chain(sandwich)
                .collect(),
            head_norms: c.qk_norm.then(|| ["self_attn.q_norm", "self_attn.k_norm"].map(|part| norm(part, c.head_dim))),
        }
    }
}

impl Parts<'_> {
    /// A parameter of the base: trained where there is no adapter, or where `modules_to_save` says so.
    pub(super) fn parameter(&self, name: &str, dims: [usize; 2]) -> Parameter {
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let trained = self.peft.is_none_or(|peft| peft.saves(module));
        let category = if trained && self.peft.is_some() { Category::Adapter } else { Category::Weights };
        // What is trained is f32 whatever the type of the run.
        let format = Format::Dense(if trained { 4 } else { self.width });
        Parameter { name: name.to_owned(), dims, format, trained, category, memory: None }
    }

    pub(super) fn linear(&self, module: &str, d_in: usize, d_out: usize, has_bias: bool) -> Linear {
        let targeted = self.peft.filter(|peft| peft.targets(module) && !peft.saves(module));
        let mut weight = self.parameter(&format!("{module}.weight"), [d_in, d_out]);
        if let Some((format, packed)) = &self.packed
            && packed.targets(module)
            && !weight.trained
        {
            weight.format = *format;
        }
        Linear {
            weight,
            bias: has_bias.then(|| self.parameter(&format!("{module}.bias"), [1, d_out])),
            adapter: targeted.map(|peft| adapter_of(peft, module, [d_in, d_out])),
        }
    }

    /// A and B on an embedding, `[rows, hidden]`.
    pub(super) fn embedding_adapter(&self, module: &str, [rows, hidden]: [usize; 2]) -> Vec<Parameter> {
        let Some(peft) = self.peft.filter(|peft| peft.targets(module) && !peft.saves(module)) else { return vec![] };
        let r = peft.rank_of(module);
        vec![factor(module, "down", [rows, r], true), factor(module, "up", [r, hidden], true)]
    }
}

/// Frozen bases that the layers share: as large as the largest layer needs.
fn shared(peft: &hf::AdapterConfig, model: &Model) -> Vec<Parameter> {
    let adapted = model.linears().filter(|linear| linear.adapter.is_some());
    let sizes: Vec<[usize; 2]> = adapted.map(|linear| linear.weight.dims).collect();
    let largest = |of: fn(&[usize; 2]) -> usize| sizes.iter().map(of).max().unwrap_or(0);
    let (d_in, d_out) = (largest(|dims| dims[0]), largest(|dims| dims[1]));
    let basis = |name: &str, dims: [usize; 2]| factor("shared", name, dims, false);
    match peft.method {
        // The slices of smaller layers are views.
        MethodConfig::Vera { .. } => {
            vec![basis("down", [d_in, peft.r]), basis("up", [peft.r, d_out])]
        }
        MethodConfig::RandLora { .. } => {
            let (m, wide) = (d_in.min(d_out), d_in.max(d_out));
            let mut found =
                vec![basis("small", [peft.r, m]), basis("large", [wide, m.div_ceil(peft.r.max(1)) * peft.r])];
            for dims in sizes {
                let (name, dims) = randlora_slice(dims, peft.r);
                let slice = basis(&name, dims);
                if !found.contains(&slice) {
                    found.push(slice);
                }
            }
            found
        }
        _ => vec![],
    }
}

/// A factor of an adapter, in f32.
fn factor(module: &str, part: &str, dims: [usize; 2], trained: bool) -> Parameter {
    let name = format!("{module}.delta.{part}");
    Parameter { name, dims, format: Format::F32, trained, category: Category::Adapter, memory: None }
}

/// Name and sizes of the columns of RandLoRA's larger basis that layers of a size use.
fn randlora_slice([d_in, d_out]: [usize; 2], r: usize) -> (String, [usize; 2]) {
    let (m, wide) = (d_in.min(d_out), d_in.max(d_out));
    (format!("large.{m}x{wide}"), [wide, m.div_ceil(r.max(1)) * r])
}

/// What a method puts on a linear layer.
fn adapter_of(peft: &hf::AdapterConfig, module: &str, [d_in, d_out]: [usize; 2]) -> Adapter {
    use MethodConfig as M;
    let r = peft.rank_of(module);
    let drops = peft.lora_dropout > 0.0;
    let part = |name: &str, dims: [usize; 2], trained: bool| factor(module, name, dims, trained);
    let shared = |name: &str, of: &str, dims: [usize; 2]| Parameter {
        memory: Some(format!("shared.delta.{of}")),
        ..part(name, dims, false)
    };
    let pair = |r: usize, q: usize, trained: bool| LowRank {
        down: part("down", [d_in, r], trained),
        core: None,
        up: part("up", [q, d_out], trained),
        out_scale: None,
        held: vec![],
        drops,
    };
    // A start that takes a part out of the base keeps a copy of it.
    let started = |r: usize| LowRank {
        held: vec![part("start.down", [d_in, r], false), part("start.up", [r, d_out], false)],
        ..pair(r, r, true)
    };
    let cored = |core: [usize; 2]| LowRank { core: Some(part("core", core, true)), ..pair(r, r, false) };
    match &peft.method {
        M::Lora => Adapter::LowRank(pair(r, r, true)),
        M::Pissa { .. } | M::Olora | M::Corda { .. } => Adapter::LowRank(started(r)),
        M::Eora { trained } => Adapter::LowRank(pair(r, r, *trained)),
        M::LoraXs | M::LoraSb { .. } => Adapter::LowRank(cored([r, r])),
        M::Svfit => Adapter::LowRank(LowRank { held: vec![part("core_start", [1, r], false)], ..cored([1, r]) }),
        M::Vera { .. } => Adapter::LowRank(LowRank {
            down: shared("down", "down", [d_in, peft.r]),
            core: Some(part("core", [1, peft.r], true)),
            up: shared("up", "up", [peft.r, d_out]),
            out_scale: Some(part("out_scale", [1, d_out], true)),
            ..pair(r, r, false)
        }),
        M::Tucker { r_in, r_out, .. } => {
            Adapter::LowRank(LowRank { core: Some(part("core", [*r_in, *r_out], true)), ..pair(*r_in, *r_out, true) })
        }
        M::Dora => Adapter::Dora {
            delta: pair(r, r, true),
            magnitude: part("magnitude", [1, d_out], true),
            squares: part("weight_squares", [1, d_out], false),
        },
        M::RandLora { .. } => {
            let (m, n) = (d_in.min(d_out), d_in.min(d_out).div_ceil(peft.r.max(1)));
            let (slice, dims) = randlora_slice([d_in, d_out], peft.r);
            Adapter::RandLora {
                lambda: part("lambda", [peft.r, n], true),
                gamma: part("gamma", [n, m], true),
                large: shared("large", &slice, dims),
                is_small_first: d_in <= d_out,
                drops,
            }
        }
        M::Hra { .. } => Adapter::Hra { vectors: part("vectors", [d_in, r], true) },
        M::Oft { oft_block_size: b, use_cayley_neumann, num_cayley_neumann_terms: terms, block_share, .. } => {
            let rows = if *block_share { 1 } else { d_in / (*b).max(1) };
            Adapter::Oft {
                weight: part("weight", [rows, b * b.saturating_sub(1) / 2], true),
                block: *b,
                // Q and its powers but the last; the inverse instead in the exact form; and the rotation.
                powers: if *use_cayley_neumann { (*terms).max(3) - 1 } else { 4 },
            }
        }
    }
}
