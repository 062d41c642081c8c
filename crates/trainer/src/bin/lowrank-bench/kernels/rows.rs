//! THE LIST of kernels that are timed and compared; a new one is a row here. Flops and bytes are those of its header: what has
//! to be computed and moved at least, each tensor read or written once.

use burn::backend::Dispatch;
use burn::tensor::{FloatDType, Int, Tensor};
use lowrank_kernels::{
    self as kernels, Activation, AttentionHints, AttentionRoute, KnownKeys, LowRankOps, Packed, Rounding,
};
use lowrank_train::device::ChosenDevice;

use super::inputs::Inputs;
use thin::By;

mod optimizer;
mod thin;

/// Sizes of a model and of what goes through it at once.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub name: &'static str,
    pub batch: usize,
    pub seq: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub rank: usize,
}

impl Sizes {
    pub const LLAMA_1B: Self = Self {
        name: "llama-1b",
        batch: 4,
        seq: 2048,
        hidden: 2048,
        ffn: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocab: 128_256,
        rank: 16,
    };
    pub const LLAMA_8B: Self = Self { name: "llama-8b", hidden: 4096, ffn: 14336, head_dim: 128, ..Self::LLAMA_1B };
    /// Nothing is a power of two: the edges of tiles.
    pub const ODD: Self = Self {
        name: "odd",
        batch: 2,
        seq: 19,
        hidden: 72,
        ffn: 104,
        heads: 6,
        kv_heads: 2,
        head_dim: 24,
        vocab: 131,
        rank: 5,
    };
    /// What the fast paths of kernels are made for.
    pub const EVEN: Self = Self {
        name: "even",
        batch: 2,
        seq: 128,
        hidden: 256,
        ffn: 512,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab: 1024,
        rank: 16,
    };

    fn tokens(&self) -> usize {
        self.batch * self.seq
    }
}

/// An output of any number of axes.
pub enum Out {
    D1(Tensor<1>),
    D2(Tensor<2>),
    D4(Tensor<4>),
    Indices(Tensor<1, Int>),
    /// Codes of a weight. They stand for `|w| + |w^ - w|`, which does not change where a value lies in the middle of two codes, of
    /// which devices that divide inexactly may take either.
    Rounded {
        weight: Tensor<2>,
        codes: Box<Packed>,
    },
}

impl Out {
    /// Its values in f32 on the host.
    pub fn values(self) -> Vec<f32> {
        let data = match self {
            Out::D1(tensor) => tensor.cast(FloatDType::F32).into_data(),
            Out::D2(tensor) => tensor.cast(FloatDType::F32).into_data(),
            Out::D4(tensor) => tensor.cast(FloatDType::F32).into_data(),
            Out::Indices(tensor) => return tensor.into_data().iter::<f32>().collect(),
            Out::Rounded { weight, codes } => {
                (weight.clone().abs() + (codes.dense(FloatDType::F32) - weight).abs()).into_data()
            }
        };
        data.try_to_vec::<f32>().unwrap_or_else(|_| unreachable!("cast to f32 just before"))
    }
}

/// A kernel on its inputs.
pub struct Work {
    /// For people.
    pub shape: String,
    pub flops: f64,
    pub bytes: f64,
    /// Whether it multiplies matrices, which some devices do with shorter factors.
    pub is_product: bool,
    /// Runs it once.
    pub call: Box<dyn FnMut() -> Vec<Out>>,
}

/// A kernel.
pub struct Row {
    pub name: &'static str,
    /// Whether its results are the same on all devices, so that they can be compared.
    pub is_repeatable: bool,
    /// Whether it is only there for tensor cores in 16 bits.
    pub needs_fragments: bool,
    pub prepare: fn(&mut Inputs, &Sizes) -> anyhow::Result<Work>,
}

const fn row(name: &'static str, prepare: fn(&mut Inputs, &Sizes) -> anyhow::Result<Work>) -> Row {
    Row { name, is_repeatable: true, needs_fragments: false, prepare }
}

impl Row {
    /// Whether a device has it in a type.
    pub fn is_on(&self, chosen: &ChosenDevice, dtype: FloatDType) -> bool {
        !self.needs_fragments || (chosen.description.starts_with("cuda") && dtype != FloatDType::F32)
    }
}

pub const ROWS: &[Row] = &[
    row("linear", linear),
    row("lowrank_linear", lowrank_linear),
    row("lowrank_linear, forward and backward", lowrank_linear_both),
    row("projected_linear, forward and backward", projected_linear_both),
    row("packed_linear", packed_linear),
    row("packed_linear, forward and backward", packed_linear_both),
    row("dequantise", dequantise),
    row("rms_norm", rms_norm),
    row("rms_norm_backward", rms_norm_backward),
    row("rotary", rotary),
    row("attention", |inputs, sizes| attention(inputs, sizes, AttentionRoute::Chosen)),
    row("attention by chunks", |inputs, sizes| attention(inputs, sizes, AttentionRoute::Chunks(0))),
    row("attention in registers", |inputs, sizes| attention(inputs, sizes, AttentionRoute::Registers)),
    Row {
        needs_fragments: true,
        ..row("attention in fragments", |inputs, sizes| attention(inputs, sizes, AttentionRoute::Fragments))
    },
    row("attention_backward", |inputs, sizes| attention_backward(inputs, sizes, AttentionRoute::Chosen)),
    row("attention_backward by chunks", |inputs, sizes| attention_backward(inputs, sizes, AttentionRoute::Chunks(0))),
    row("attention_backward in registers", |inputs, sizes| {
        attention_backward(inputs, sizes, AttentionRoute::Registers)
    }),
    Row {
        needs_fragments: true,
        ..row("attention_backward in fragments", |inputs, sizes| {
            attention_backward(inputs, sizes, AttentionRoute::Fragments)
        })
    },
    row("gated", gated),
    row("gated_backward", gated_backward),
    row("cross_entropy", cross_entropy),
    row("x A by the thin kernel", |inputs, sizes| thin::down(inputs, sizes, By::Kernel)),
    row("x A by matmul", |inputs, sizes| thin::down(inputs, sizes, By::Matmul)),
    row("x^T u by the thin kernel", |inputs, sizes| thin::gradient(inputs, sizes, By::Kernel)),
    row("x^T u by matmul", |inputs, sizes| thin::gradient(inputs, sizes, By::Matmul)),
    row("packed_linear, 1 token", |inputs, sizes| thin::few_packed(inputs, sizes, 1)),
    row("linear, 1 token", |inputs, sizes| thin::few_dense(inputs, sizes, 1)),
    row("packed_linear, 8 tokens", |inputs, sizes| thin::few_packed(inputs, sizes, 8)),
    row("linear, 8 tokens", |inputs, sizes| thin::few_dense(inputs, sizes, 8)),
    row("adamw", optimizer::adamw),
    row("adamw_all", optimizer::adamw_all),
    row("adam8", optimizer::adam8),
    Row { is_repeatable: false, ..row("stochastic_round", optimizer::stochastic_round) },
    row("pack_groups", |inputs, sizes| optimizer::pack_groups(inputs, sizes, Rounding::Nearest)),
    Row {
        is_repeatable: false,
        ..row("pack_groups, stochastic", |inputs, sizes| {
            optimizer::pack_groups(inputs, sizes, Rounding::Stochastic { seed: 1 })
        })
    },
    row("top_columns", optimizer::top_columns),
    row("sum_squares", optimizer::sum_squares),
    row("sum_squares_all", optimizer::sum_squares_all),
];

fn work(
    shape: String,
    flops: f64,
    bytes: f64,
    is_product: bool,
    call: impl FnMut() -> Vec<Out> + 'static,
) -> anyhow::Result<Work> {
    Ok(Work { shape, flops, bytes, is_product, call: Box::new(call) })
}

/// Products of sizes as a number.
fn product(sizes: &[usize]) -> f64 {
    sizes.iter().map(|&size| size as f64).product()
}

fn linear(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, m, n) = (s.tokens(), s.hidden, s.ffn);
    let (x, w) = (inputs.tensor([t, m]), inputs.tensor([n, m]));
    let bytes = inputs.width() * (product(&[t, m]) + product(&[m, n]) + product(&[t, n]));
    work(format!("{t} x {m} x {n}"), 2.0 * product(&[t, m, n]), bytes, true, move || {
        vec![Out::D2(kernels::linear(x.clone(), w.clone().transpose(), None))]
    })
}

/// x, W, A, B.
fn lowrank_inputs(inputs: &mut Inputs, s: &Sizes) -> [Tensor<2>; 4] {
    let dims = [[s.tokens(), s.hidden], [s.ffn, s.hidden], [s.hidden, s.rank], [s.rank, s.ffn]];
    dims.map(|dims| inputs.tensor(dims))
}

fn lowrank_linear(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, m, n, r) = (s.tokens(), s.hidden, s.ffn, s.rank);
    let [x, w, down, up] = lowrank_inputs(inputs, s);
    let flops = 2.0 * product(&[t, m, n]) + 2.0 * product(&[t, r]) * (m + n) as f64;
    let numbers = product(&[t, m]) + product(&[m, n]) + product(&[t, n]) + product(&[r, m + n]);
    let bytes = inputs.width() * numbers;
    work(format!("{t} x {m} x {n}, r {r}"), flops, bytes, true, move || {
        let (w, down, up) = (w.clone().transpose(), down.clone(), up.clone());
        vec![Out::D2(kernels::lowrank_linear(x.clone(), w, None, None, down, up, 1.5))]
    })
}

fn lowrank_linear_both(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, m, n, r) = (s.tokens(), s.hidden, s.ffn, s.rank);
    let [x, w, down, up] = lowrank_inputs(inputs, s);
    let dy = inputs.tensor([t, n]);
    let flops = 4.0 * product(&[t, m, n]) + 6.0 * product(&[t, r]) * (m + n) as f64;
    let moved = 3.0 * product(&[t, m]) + 2.0 * product(&[m, n]) + 2.0 * product(&[t, n]);
    let bytes = inputs.width() * (moved + 3.0 * product(&[r, m + n]));
    work(format!("{t} x {m} x {n}, r {r}"), flops, bytes, true, move || {
        let [x, down, up] = [&x, &down, &up].map(Inputs::leaf);
        let w = Tensor::from_inner(w.clone()).transpose();
        let y = kernels::lowrank_linear(x.clone(), w, None, None, down.clone(), up.clone(), 1.5);
        gradients(y, dy.clone(), [x, down, up])
    })
}

/// The output and the gradients of the leaves.
fn gradients<const N: usize>(y: Tensor<2>, dy: Tensor<2>, leaves: [Tensor<2>; N]) -> Vec<Out> {
    let mut gradients = kernels::backward_from(y.clone(), Tensor::from_inner(dy));
    let mut outs = vec![Out::D2(y.inner())];
    outs.extend(leaves.iter().filter_map(|leaf| leaf.grad_remove(&mut gradients)).map(Out::D2));
    outs
}

fn projected_linear_both(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, m, n, r) = (s.tokens(), s.hidden, s.ffn, s.hidden / 4);
    let (x, w, basis, dy) =
        (inputs.tensor([t, m]), inputs.tensor([m, n]), inputs.tensor([m, r]), inputs.tensor([t, n]));
    let flops = 4.0 * product(&[t, m, n]) + 2.0 * product(&[t, r]) * (m + n) as f64;
    let moved = 2.0 * (product(&[t, m]) + product(&[m, n]) + product(&[t, n])) + product(&[m, r]) + product(&[r, n]);
    let bytes = inputs.width() * moved;
    work(format!("{t} x {m} x {n}, r {r}"), flops, bytes, true, move || {
        let [x, w] = [&x, &w].map(Inputs::leaf);
        let basis = Tensor::from_inner(basis.clone());
        let y = kernels::projected_linear(x.clone(), w.clone(), None, Some(basis), None, None);
        gradients(y, dy.clone(), [x, w])
    })
}

fn packed_linear(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, m, n) = (s.tokens(), s.hidden, s.ffn);
    let (x, w) = (inputs.tensor([t, m]), inputs.packed([m, n])?);
    let bytes = inputs.width() * (product(&[t, m]) + product(&[t, n])) + w.bytes() as f64;
    work(format!("{t} x {m} x {n}, nf4"), 2.0 * product(&[t, m, n]), bytes, true, move || {
        vec![Out::D2(kernels::linear(x.clone(), w.clone(), None))]
    })
}

fn packed_linear_both(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, m, n) = (s.tokens(), s.hidden, s.ffn);
    let (x, w, dy) = (inputs.tensor([t, m]), inputs.packed([m, n])?, inputs.tensor([t, n]));
    let bytes = 2.0 * (inputs.width() * (product(&[t, m]) + product(&[t, n])) + w.bytes() as f64);
    work(format!("{t} x {m} x {n}, nf4"), 4.0 * product(&[t, m, n]), bytes, true, move || {
        let x = Inputs::leaf(&x);
        gradients(kernels::linear(x.clone(), w.clone(), None), dy.clone(), [x])
    })
}

fn dequantise(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (m, n) = (s.hidden, s.ffn);
    let (w, dtype) = (inputs.packed([m, n])?, inputs.dtype());
    let bytes = w.bytes() as f64 + inputs.width() * product(&[m, n]);
    work(format!("{n} x {m}, nf4"), product(&[m, n]), bytes, false, move || vec![Out::D2(w.rows(0..n, dtype))])
}

fn rms_norm(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, d) = (s.tokens(), s.hidden);
    let (x, gamma) = (inputs.tensor([t, d]), inputs.tensor([d]));
    work(format!("{t} x {d}"), 4.0 * product(&[t, d]), 2.0 * inputs.width() * product(&[t, d]), false, move || {
        vec![Out::D2(kernels::rms_norm(x.clone(), gamma.clone(), 1e-5, 0.0))]
    })
}

fn rms_norm_backward(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, d) = (s.tokens(), s.hidden);
    let (x, gamma, dy) = (inputs.tensor([t, d]), inputs.tensor([d]), inputs.tensor([t, d]));
    work(format!("{t} x {d}"), 10.0 * product(&[t, d]), 3.0 * inputs.width() * product(&[t, d]), false, move || {
        let (x, gamma, dy) = (x.clone().into_dispatch(), gamma.clone().into_dispatch(), dy.clone().into_dispatch());
        let (dx, d_gamma) = Dispatch::rms_norm_backward(x, gamma, dy, 1e-5, 0.0);
        vec![Out::D2(Tensor::from_dispatch(dx)), Out::D1(Tensor::from_dispatch(d_gamma))]
    })
}

fn rotary(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, h, d) = (s.tokens(), s.heads, s.head_dim);
    let (x, cos, sin) = (inputs.tensor([s.batch, s.seq, h, d]), inputs.precise([t, d / 2]), inputs.precise([t, d / 2]));
    let bytes = 2.0 * inputs.width() * product(&[t, h, d]) + 4.0 * product(&[t, d]);
    work(format!("{t} x {h} x {d}"), 3.0 * product(&[t, h, d]), bytes, false, move || {
        vec![Out::D4(kernels::rotary(x.clone(), cos.clone(), sin.clone()))]
    })
}

/// q, k, v and causal ranges; floats of all of them; multiplications of the two products, of which a causal mask leaves half.
fn attention_inputs(inputs: &mut Inputs, s: &Sizes) -> ([Tensor<4>; 3], Tensor<3, burn::tensor::Int>, f64, f64) {
    let dims = [s.heads, s.kv_heads, s.kv_heads].map(|heads| [s.batch, s.seq, heads, s.head_dim]);
    let qkv = dims.map(|dims| inputs.tensor(dims));
    let ranges = (0..s.batch).flat_map(|_| (0..s.seq as i32).flat_map(|i| [0, i + 1])).collect();
    let floats = product(&[s.tokens(), s.heads + 2 * s.kv_heads, s.head_dim]);
    let products = product(&[s.batch, s.heads, s.head_dim, s.seq]) * (s.seq + 1) as f64;
    (qkv, inputs.integers(ranges, [s.batch, s.seq, 2]), floats, products)
}

/// What a causal model tells the kernel.
fn causal(route: AttentionRoute) -> AttentionHints {
    AttentionHints { keys: KnownKeys::Band { offset: 0, window: None }, route }
}

fn attention_shape(s: &Sizes) -> String {
    format!("{} x {}, {} heads of {}, {} of keys", s.batch, s.seq, s.heads, s.head_dim, s.kv_heads)
}

fn attention(inputs: &mut Inputs, s: &Sizes, route: AttentionRoute) -> anyhow::Result<Work> {
    let ([q, k, v], ranges, floats, products) = attention_inputs(inputs, s);
    let bytes = inputs.width() * (floats + product(&[s.tokens(), s.heads, s.head_dim]));
    let scale = 1.0 / (s.head_dim as f32).sqrt();
    work(attention_shape(s), 2.0 * products, bytes, true, move || {
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        vec![Out::D4(kernels::attention_with(q, k, v, ranges.clone(), scale, 0.0, causal(route)).0)]
    })
}

fn attention_backward(inputs: &mut Inputs, s: &Sizes, route: AttentionRoute) -> anyhow::Result<Work> {
    let ([q, k, v], ranges, floats, products) = attention_inputs(inputs, s);
    let d_out = inputs.tensor([s.batch, s.seq, s.heads, s.head_dim]);
    let bytes = inputs.width() * (2.0 * floats + 2.0 * product(&[s.tokens(), s.heads, s.head_dim]));
    let scale = 1.0 / (s.head_dim as f32).sqrt();
    let primitives = move || [&q, &k, &v].map(|tensor| tensor.clone().into_dispatch());
    let [pq, pk, pv] = primitives();
    let (out, lse) = Dispatch::range_attention(pq, pk, pv, ranges.clone().into_dispatch(), scale, 0.0, causal(route));
    // five products instead of two
    work(attention_shape(s), 5.0 * products, bytes, true, move || {
        let ([q, k, v], ranges) = (primitives(), ranges.clone().into_dispatch());
        let d_out = d_out.clone().into_dispatch();
        let (out, lse, hints) = (out.clone(), lse.clone(), causal(route));
        let (dq, dk, dv) = Dispatch::range_attention_backward(q, k, v, out, lse, d_out, ranges, scale, 0.0, hints);
        [dq, dk, dv].map(|gradient| Out::D4(Tensor::from_dispatch(gradient))).into()
    })
}

fn gated(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, d) = (s.tokens(), s.ffn);
    let (gate, up) = (inputs.tensor([t, d]), inputs.tensor([t, d]));
    work(format!("{t} x {d}"), 8.0 * product(&[t, d]), 3.0 * inputs.width() * product(&[t, d]), false, move || {
        vec![Out::D2(kernels::gated(gate.clone(), up.clone(), Activation::Silu))]
    })
}

fn gated_backward(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, d) = (s.tokens(), s.ffn);
    let tensors = [0; 3].map(|_| inputs.tensor([t, d]));
    work(format!("{t} x {d}"), 12.0 * product(&[t, d]), 5.0 * inputs.width() * product(&[t, d]), false, move || {
        let [gate, up, dy] = tensors.clone().map(Tensor::into_dispatch);
        let (d_gate, d_up) = Dispatch::gated_backward(gate, up, dy, Activation::Silu);
        vec![Out::D2(Tensor::from_dispatch(d_gate)), Out::D2(Tensor::from_dispatch(d_up))]
    })
}

/// Loss and gradient of a chunk of logits.
fn cross_entropy(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (n, vocab) = (s.tokens().min(1024), s.vocab);
    let logits = inputs.tensor([n, vocab]);
    let targets = inputs.integers((0..n).map(|i| (i * 7 % vocab) as i32).collect(), [n]);
    let values = product(&[n, vocab]);
    work(format!("{n} x {vocab}"), 6.0 * values, 2.0 * inputs.width() * values, false, move || {
        let (logits, targets) = (logits.clone().into_dispatch(), targets.clone().into_dispatch());
        let (loss, gradient) = Dispatch::cross_entropy(logits, targets, 0.0);
        vec![Out::D1(Tensor::from_dispatch(loss)), Out::D2(Tensor::from_dispatch(gradient))]
    })
}
