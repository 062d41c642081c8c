//! Every operation on a Vulkan device (software is enough) against the CPU: result and gradients, tiny shapes.
//! LOWRANK_TEST_DEVICE (wgpu) names another device of the build: cuda, vulkan; LOWRANK_TEST_ONLY runs the operations whose
//! names contain it.
//!
//! One test, because compiling a pipeline costs seconds on a software device and the cache lives in the process.
//! Without a Vulkan driver the test says so and stops.

#![cfg(all(feature = "flex", feature = "wgpu"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::time::Instant;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use lowrank_kernels as kernels;
use lowrank_kernels::adam8::{Adam8, Moments8};
use lowrank_kernels::packed::{self, Format, Layout, Nested, Order, Scales};
use lowrank_kernels::{Activation, AdamW, AttentionHints, AttentionRoute, KnownKeys, Packed};

#[path = "vulkan/products.rs"]
mod products;

/// Relative bound in f32: sums run in another order than on the CPU.
const TOLERANCE: f64 = 1e-5;
/// Both sides compute in f32 and round once: neighbours at most, half a unit of the largest value from each to the sum.
const HALF_TOLERANCE: f64 = 1.0 / 1024.0;

/// Products of f16, where the CPU rounds other intermediates: six times what software Vulkan was seen to be off.
const HALF_PRODUCT_TOLERANCE: f64 = 3e-3;

/// Factors of ten bits (TF32) in the products of CUDA: half an ulp is 5e-4.
#[cfg(feature = "cuda")]
const TENSOR_CORE_TOLERANCE: f64 = 2e-3;

/// The device that is tested, and the bound on it.
fn tested() -> (Device, f64) {
    match std::env::var("LOWRANK_TEST_DEVICE").as_deref() {
        #[cfg(feature = "cuda")]
        Ok("cuda") => (Device::cuda(0), TENSOR_CORE_TOLERANCE),
        #[cfg(feature = "vulkan")]
        Ok("vulkan") => (Device::vulkan(Default::default()), TOLERANCE),
        Ok("wgpu") | Err(_) => (Device::wgpu(Default::default()), TOLERANCE),
        Ok(name) => panic!("LOWRANK_TEST_DEVICE is {name}, which this build does not have"),
    }
}

/// Asking the GPU library for a device without a driver would panic, so the driver's manifest is looked up first.
fn has_driver() -> bool {
    let named = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].iter().any(|name| std::env::var_os(name).is_some());
    let folders = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d"];
    named || folders.iter().any(|folder| std::fs::read_dir(folder).is_ok_and(|mut files| files.next().is_some()))
}

// Products are 8 x 8 x 8, except for those in products.rs: every other size is tuned and compiled anew.

/// A repeatable number in `-1..1` for each index.
fn number(seed: usize, i: usize) -> f32 {
    let mixed = (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) as u32;
    let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x2c1b_3c6d);
    ((mixed ^ (mixed >> 13)) as f32 / u32::MAX as f32) * 2.0 - 1.0
}

/// A trained leaf.
fn leaf<const D: usize>(seed: usize, dims: [usize; D], device: &Device) -> Tensor<D> {
    constant(seed, dims, device).require_grad()
}

fn constant<const D: usize>(seed: usize, dims: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = (0..dims.iter().product()).map(|i| number(seed, i)).collect();
    Tensor::from_data(TensorData::new(values, dims), device)
}

fn integers<const D: usize>(values: Vec<i32>, dims: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values, dims), device)
}

/// The values of `out`, then of the gradient of every leaf for a fixed output gradient.
fn collect<const D: usize>(out: Tensor<D>, leaves: Vec<Gradient>, device: &Device) -> Vec<Vec<f32>> {
    let dims: [usize; D] = out.dims();
    let dtype = FloatDType::from(out.dtype());
    let grads = kernels::backward_from(out.clone(), constant(99, dims, device).cast(dtype));
    let mut all = vec![values(out)];
    all.extend(leaves.iter().map(|leaf| leaf(&grads)));
    all
}

type Gradient = Box<dyn Fn(&burn::tensor::Gradients) -> Vec<f32>>;

fn gradient_of<const D: usize>(leaf: &Tensor<D>) -> Gradient {
    let leaf = leaf.clone();
    Box::new(move |grads| values(leaf.grad(grads).expect("a gradient")))
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.cast(FloatDType::F32).into_data().try_to_vec::<f32>().unwrap()
}

/// A trained leaf in f16.
fn half<const D: usize>(seed: usize, dims: [usize; D], device: &Device) -> Tensor<D> {
    constant(seed, dims, device).cast(FloatDType::F16).require_grad()
}

fn linear(device: &Device) -> Vec<Vec<f32>> {
    let (x, w, bias) = (leaf(1, [8, 8], device), leaf(2, [8, 8], device), leaf(3, [8], device));
    let out = kernels::linear(x.clone(), w.clone().transpose(), Some(bias.clone()));
    collect(out, vec![gradient_of(&x), gradient_of(&w), gradient_of(&bias)], device)
}

fn lowrank_linear(device: &Device) -> Vec<Vec<f32>> {
    let (x, w) = (leaf(1, [8, 8], device), constant(2, [8, 8], device));
    let (down, up, mask) = (leaf(3, [8, 8], device), leaf(4, [8, 8], device), constant(5, [8, 8], device));
    let out = kernels::lowrank_linear(x.clone(), w, None, Some(mask), down.clone(), up.clone(), 1.5);
    collect(out, vec![gradient_of(&x), gradient_of(&down), gradient_of(&up)], device)
}

/// With a basis on both sides, and with a pending update on the input side.
fn projected_linear(device: &Device) -> Vec<Vec<f32>> {
    let (x, w) = (leaf(1, [8, 8], device), leaf(2, [8, 8], device));
    let [left, right, up] = [3, 4, 5].map(|seed| constant(seed, [8, 8], device));
    let both = kernels::projected_linear(x.clone(), w.clone(), None, Some(left.clone()), Some(right), None);
    let mut all = collect(both, vec![gradient_of(&x), gradient_of(&w)], device);
    let pending = kernels::projected_linear(x.clone(), w.clone(), None, Some(left), None, Some((up, 0.5)));
    all.extend(collect(pending, vec![gradient_of(&x), gradient_of(&w)], device));
    all
}

fn factored_linear(device: &Device) -> Vec<Vec<f32>> {
    let (x, w) = (leaf(1, [8, 8], device), constant(2, [8, 8], device));
    let slots = [leaf(3, [1, 1], device), leaf(4, [1, 1], device)];
    let out = kernels::factored_linear(x.clone(), w, None, None, slots[0].clone(), slots[1].clone());
    collect(out, vec![gradient_of(&x), gradient_of(&slots[0]), gradient_of(&slots[1])], device)
}

/// The weight of every format, 8 x 8 in blocks of 8 or 16; the numbers in its words are any.
fn packed_linear(device: &Device) -> Vec<Vec<f32>> {
    let [codes, bytes] = [8, 16].map(|count| (0..count).map(|i| (number(7, i) * 2e9) as i32).collect::<Vec<_>>());
    let values = |seed, count| packed::scales((0..count).map(|i| number(seed, i)).collect(), device);
    let layout = |format, block, nested| Layout { format, block, dims: [8, 8], order: Order::Outputs, nested };
    let plain = Scales::Table { table: values(3, 16), scale: values(4, 8) };
    let nested = Scales::Nested {
        table: values(3, 16),
        codes: packed::words(bytes[..2].to_vec(), device),
        map: values(5, 256),
        absmax: values(6, 2),
    };
    let affine = Scales::Affine { scale: values(4, 4), zero: packed::words(bytes[..1].to_vec(), device) };
    let weights = [
        Packed::new(layout(Format::Nf4, 8, None), packed::words(codes.clone(), device), plain),
        Packed::new(
            layout(Format::Nf4, 8, Some(Nested { block: 4, offset: 0.5 })),
            packed::words(codes.clone(), device),
            nested,
        ),
        Packed::new(layout(Format::Int4, 16, None), packed::words(codes, device), affine.clone()),
        Packed::new(layout(Format::Int8, 16, None), packed::words(bytes.clone(), device), affine.clone()),
        Packed::new(
            Layout { order: Order::Inputs, ..layout(Format::Int8, 16, None) },
            packed::words(bytes, device),
            affine,
        ),
    ];
    let run = |w: Packed| {
        let (x, down, up) = (leaf(1, [8, 8], device), leaf(3, [8, 8], device), leaf(4, [8, 8], device));
        let mut all = collect(kernels::linear(x.clone(), w.clone(), None), vec![gradient_of(&x)], device);
        let out = kernels::lowrank_linear(x.clone(), w.clone(), None, None, down.clone(), up.clone(), 1.5);
        all.extend(collect(out, vec![gradient_of(&x), gradient_of(&down), gradient_of(&up)], device));
        all.push(w.rows(3..8, FloatDType::F32).into_data().try_to_vec::<f32>().unwrap());
        all
    };
    weights.into_iter().flat_map(run).collect()
}

/// Vectors and single values, more rows than cubes (65535, and 512 of the backward), one value, and a transposed input.
fn rms_norm(device: &Device) -> Vec<Vec<f32>> {
    let run = |dims: [usize; 2]| {
        let (x, gamma) = (leaf(1, dims, device), leaf(2, [dims[1]], device));
        let out = kernels::rms_norm(x.clone(), gamma.clone(), 1e-5, 1.0);
        collect(out, vec![gradient_of(&x), gradient_of(&gamma)], device)
    };
    let mut all: Vec<_> = [[6, 10], [600, 2], [1, 1]].into_iter().flat_map(run).collect();
    let tall = constant(1, [65_600, 2], device);
    all.push(values(kernels::rms_norm(tall, constant(2, [2], device), 1e-5, 1.0)));
    let (x, gamma) = (leaf(1, [7, 5], device), leaf(2, [7], device));
    let out = kernels::rms_norm(x.clone().transpose(), gamma.clone(), 1e-5, 0.0);
    all.extend(collect(out, vec![gradient_of(&x), gradient_of(&gamma)], device));
    for dims in [[6, 10], [600, 2]] {
        let (x, frozen) = (leaf(1, dims, device), constant(2, [dims[1]], device));
        all.extend(collect(kernels::rms_norm(x.clone(), frozen, 1e-5, 1.0), vec![gradient_of(&x)], device));
    }
    all
}

fn lowrank_shift(device: &Device) -> Vec<Vec<f32>> {
    let [x, down, up] = [1, 2, 3].map(|seed| leaf(seed, [8, 8], device));
    let out = kernels::lowrank_shift(x.clone(), down.clone(), up.clone(), -1.5);
    collect(out, vec![gradient_of(&x), gradient_of(&down), gradient_of(&up)], device)
}

fn column_scale(device: &Device) -> Vec<Vec<f32>> {
    let (z, c, bias) = (leaf(1, [6, 10], device), leaf(2, [10], device), constant(3, [10], device));
    let run = |bias: Option<Tensor<1>>| {
        collect(kernels::column_scale(z.clone(), c.clone(), bias), vec![gradient_of(&z), gradient_of(&c)], device)
    };
    [None, Some(bias)].into_iter().flat_map(run).collect()
}

fn block_rotation(device: &Device) -> Vec<Vec<f32>> {
    let (x, turn) = (leaf(1, [8, 16], device), leaf(2, [2, 8, 8], device));
    collect(kernels::block_rotation(x.clone(), turn.clone()), vec![gradient_of(&x), gradient_of(&turn)], device)
}

fn scaled_basis(device: &Device) -> Vec<Vec<f32>> {
    let (a, lambda, gamma) = (constant(1, [2, 5], device), leaf(2, [2, 3], device), leaf(3, [3, 5], device));
    let out = kernels::scaled_basis(a, lambda.clone(), gamma.clone());
    collect(out, vec![gradient_of(&lambda), gradient_of(&gamma)], device)
}

fn rms_norm_f16(device: &Device) -> Vec<Vec<f32>> {
    let (x, gamma) = (half(1, [5, 12], device), half(2, [12], device));
    let out = kernels::rms_norm(x.clone(), gamma.clone(), 1e-5, 1.0);
    collect(out, vec![gradient_of(&x), gradient_of(&gamma)], device)
}

/// Vectors and single values, one pair, heads before positions, and an input that nothing else holds.
fn rotary(device: &Device) -> Vec<Vec<f32>> {
    let tables = |tokens, half| [2, 3].map(|seed| constant(seed, [tokens, half], device));
    let run = |dims: [usize; 4]| {
        let (x, [cos, sin]) = (leaf(1, dims, device), tables(dims[0] * dims[1], dims[3] / 2));
        let mut all = collect(kernels::rotary(x.clone(), cos, sin), vec![gradient_of(&x)], device);
        all.push(values(x)); // it was held
        all
    };
    let mut all: Vec<_> = [[2, 3, 2, 8], [1, 3, 2, 6], [1, 1, 1, 2]].into_iter().flat_map(run).collect();
    let (x, [cos, sin]) = (leaf(1, [2, 3, 5, 8], device), tables(10, 4));
    let out = kernels::rotary(x.clone().swap_dims(1, 2), cos.clone(), sin.clone());
    all.extend(collect(out, vec![gradient_of(&x)], device));
    let out = kernels::rotary(x.clone().swap_dims(1, 2) * 2.0, cos, sin);
    all.extend(collect(out, vec![gradient_of(&x)], device));
    all
}

fn rotary_f16(device: &Device) -> Vec<Vec<f32>> {
    let x = half(1, [2, 3, 2, 8], device);
    let out = kernels::rotary(x.clone(), constant(2, [6, 4], device), constant(3, [6, 4], device));
    collect(out, vec![gradient_of(&x)], device)
}

fn attention(device: &Device) -> Vec<Vec<f32>> {
    let (q, k, v) = (leaf(1, [1, 8, 4, 8], device), leaf(2, [1, 8, 2, 8], device), leaf(3, [1, 8, 2, 8], device));
    // two packed documents, a window of two in the second; the last row sees nothing
    let ranges = integers(vec![0, 1, 0, 2, 0, 3, 3, 4, 3, 5, 3, 6, 5, 7, 7, 7], [1, 8, 2], device);
    let out = kernels::attention(q.clone(), k.clone(), v.clone(), ranges, 0.35, 2.0);
    collect(out, vec![gradient_of(&q), gradient_of(&k), gradient_of(&v)], device)
}

/// One call of attention; four query heads share two key heads, and the operands are transposed views, as in models.
#[derive(Clone, Copy)]
struct Attention {
    route: AttentionRoute,
    dtype: FloatDType,
    softcap: f32,
    queries: usize,
    keys: usize,
    /// Numbers of a head.
    width: usize,
    known: KnownKeys,
    /// The keys that a query sees.
    range: fn(i32) -> [i32; 2],
}

impl Attention {
    /// Two chunks of 8 queries against 8 keys, so that the products are those that `attention` has tuned already.
    fn chunks() -> Self {
        let (route, known) = (AttentionRoute::Chunks(8), KnownKeys::Unknown);
        let range = |i| [i % 4, i % 4 + 1 + i % 5];
        Self { route, dtype: FloatDType::F32, softcap: 0.0, queries: 16, keys: 8, width: 8, known, range }
    }
    /// A causal chunk that knows the other half of 16 keys to be out of its reach.
    fn first_half() -> Self {
        let known = KnownKeys::Band { offset: 0, window: None };
        Self { queries: 8, keys: 16, known, range: |i| [0, i + 1], ..Self::chunks() }
    }
    /// Four queries after 8 keys of a cache, in windows of 5: keys 4 to 11 of 16.
    fn window() -> Self {
        let known = KnownKeys::Band { offset: 8, window: Some(5) };
        Self { queries: 4, known, range: |i| [i + 4, i + 9], ..Self::first_half() }
    }
    /// 70 causal queries: several tiles and a rest; heads of 24, which are filled up to 32.
    fn tiles() -> Self {
        let (route, range) = (AttentionRoute::Registers, |i| [0, i + 1]);
        Self { route, queries: 70, keys: 70, width: 24, range, ..Self::chunks() }
    }
    /// The last 13 queries of 70, in windows of 20.
    fn tiles_window() -> Self {
        Self { queries: 13, range: |i| [i + 38, i + 58], ..Self::tiles() }
    }
    /// Packed documents of 9 tokens, windows of 5 in them; query 20 and one with a range beyond the last key see nothing.
    fn tiles_packed() -> Self {
        let range = |i| match i {
            20 => [20, 20],
            69 => [70, 80],
            _ => [(i / 9 * 9).max(i - 4), i + 1],
        };
        Self { softcap: 2.0, range, ..Self::tiles() }
    }
    fn half(self) -> Self {
        Self { dtype: FloatDType::F16, ..self }
    }

    /// Output, gradients and log-sum-exp.
    fn run(self, device: &Device) -> Vec<Vec<f32>> {
        let (q, k) =
            (leaf(1, [1, 4, self.queries, self.width], device), leaf(2, [1, 2, self.keys, self.width], device));
        let v = leaf(3, [1, 2, self.keys, self.width], device);
        let view = |x: &Tensor<4>| x.clone().cast(self.dtype).swap_dims(1, 2);
        let ranges = (0..self.queries as i32).flat_map(self.range).collect();
        let ranges = integers(ranges, [1, self.queries, 2], device);
        let hints = AttentionHints { keys: self.known, route: self.route };
        let (out, lse) = kernels::attention_with(view(&q), view(&k), view(&v), ranges, 0.125, self.softcap, hints);
        let out = out.cast(FloatDType::F32);
        let mut all = collect(out, vec![gradient_of(&q), gradient_of(&k), gradient_of(&v)], device);
        // A row that sees nothing has -1e30, beside which no error of another would count.
        all.push(lse.clamp_min(-10.0).into_data().try_to_vec::<f32>().unwrap());
        all
    }
}

fn attention_by_chunks(device: &Device) -> Vec<Vec<f32>> {
    let cases = [Attention::chunks(), Attention::first_half(), Attention::window()];
    cases.into_iter().flat_map(|case| case.run(device)).collect()
}

fn attention_in_tiles(device: &Device) -> Vec<Vec<f32>> {
    let cases = [Attention::tiles(), Attention::tiles_window(), Attention::tiles_packed()];
    cases.into_iter().flat_map(|case| case.run(device)).collect()
}

fn attention_in_f16(device: &Device) -> Vec<Vec<f32>> {
    let cases = [Attention::chunks(), Attention::tiles()].map(Attention::half);
    cases.into_iter().flat_map(|case| case.run(device)).collect()
}

fn gated(device: &Device) -> Vec<Vec<f32>> {
    let run = |act, dims| {
        let (gate, up) = (leaf(1, dims, device), leaf(2, dims, device));
        let out = kernels::gated(gate.clone(), up.clone(), act);
        collect(out, vec![gradient_of(&gate), gradient_of(&up)], device)
    };
    let acts = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];
    let mut all: Vec<_> = acts.into_iter().flat_map(|act| run(act, [6, 10])).collect();
    all.extend([[3, 7], [1, 1]].into_iter().flat_map(|dims| run(Activation::Silu, dims)));
    let (gate, up) = (leaf(1, [6, 4], device), leaf(2, [4, 6], device));
    let out = kernels::gated(gate.clone().transpose(), up.clone(), Activation::Silu);
    all.extend(collect(out, vec![gradient_of(&gate), gradient_of(&up)], device));
    all
}

fn gated_f16(device: &Device) -> Vec<Vec<f32>> {
    let (gate, up) = (half(1, [6, 12], device), half(2, [6, 12], device));
    let out = kernels::gated(gate.clone(), up.clone(), Activation::Silu);
    collect(out, vec![gradient_of(&gate), gradient_of(&up)], device)
}

/// Single values and vectors, rows longer than a cube, large logits, ignored rows; logits that are held and that are
/// not.
fn cross_entropy(device: &Device) -> Vec<Vec<f32>> {
    let run = |dims: [usize; 2], targets: Vec<i32>, factor: f32, softcap| {
        let logits = leaf(1, dims, device);
        let scaled = if factor == 1.0 { logits.clone() } else { logits.clone() * factor };
        let out = kernels::cross_entropy(scaled, integers(targets, [dims[0]], device), softcap);
        let mut all = collect(out, vec![gradient_of(&logits)], device);
        all.push(values(logits)); // they were held
        all
    };
    let cases = [
        run([4, 11], vec![0, -100, 10, 5], 1.0, 3.0),
        run([3, 5000], vec![4999, 1234, -100], 20.0, 0.0),
        run([2, 8], vec![7, 0], 1e4, 0.0),
        run([2, 8], vec![-1, -1], 1.0, 0.0),
        run([1, 1], vec![0], 1.0, 2.0),
    ];
    cases.into_iter().flatten().collect()
}

fn cross_entropy_f16(device: &Device) -> Vec<Vec<f32>> {
    let logits = half(1, [3, 12], device);
    let out = kernels::cross_entropy(logits.clone() * 4.0, integers(vec![11, -1, 0], [3], device), 0.0);
    collect(out, vec![gradient_of(&logits)], device)
}

/// Tensors that nothing else holds are overwritten; others keep their values.
fn adamw(device: &Device) -> Vec<Vec<f32>> {
    let rule =
        AdamW { learning_rate: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, step: 2, gradient_scale: 0.5 };
    let run = |dims: [usize; 2], is_held: bool| {
        let [p, m, g] = [1, 2, 3].map(|seed| constant(seed, dims, device));
        let v = constant(4, dims, device).abs();
        let held = if is_held { vec![p.clone(), m.clone(), v.clone()] } else { vec![] };
        let (p, m, v) = kernels::adamw(p, m, v, g.clone(), rule);
        [p, m, v, g].into_iter().chain(held).map(values).collect::<Vec<_>>()
    };
    let mut all: Vec<_> = [([6, 10], false), ([6, 10], true), ([3, 7], true), ([1, 1], false)]
        .into_iter()
        .flat_map(|(dims, is_held)| run(dims, is_held))
        .collect();
    let [p, m, v, g] = [1, 2, 3, 4].map(|seed| constant(seed, [5, 8], device).abs());
    let turned = kernels::adamw(p.transpose(), m.transpose(), v.transpose(), g.transpose(), rule);
    all.extend([turned.0, turned.1, turned.2].map(values));
    // vectors of several widths in turns, more of one width than a launch takes, and several cubes of one tensor
    let sizes = [[6, 10], [300, 8], [3, 7], [1, 1]].into_iter().chain((1..20).map(|rows| [rows, 4]));
    let sets = sizes.map(|dims| [1, 2, 3, 4].map(|seed| constant(seed, dims, device).abs())).collect();
    let factor = Tensor::from_floats([0.25], device);
    all.extend(kernels::adamw_all(sets, Some(factor), rule).into_iter().flatten().map(values));
    all
}

/// Three steps, so that codes that were written are read.
fn adam8_steps(dims: [usize; 2], block: usize, is_held: bool, dtype: FloatDType, device: &Device) -> Vec<Vec<f32>> {
    let mut state = (constant(1, dims, device).cast(dtype), Moments8::zeros(dims[0] * dims[1], block, device));
    let mut held = vec![];
    for step in 1..=3 {
        if is_held {
            held.push(state.clone());
        }
        let rule = Adam8 { learning_rate: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, step };
        let gradient = constant(10 + step as usize, dims, device).cast(dtype);
        state = kernels::adam8(state.0, gradient, state.1, rule);
    }
    held.push(state);
    let all = held.into_iter().flat_map(|(parameter, moments)| {
        let [(first, first_scale), (second, second_scale)] = moments.to_host();
        let codes = first.into_iter().chain(second).map(f32::from).collect();
        [values(parameter), first_scale, second_scale, codes]
    });
    all.collect()
}

/// One block and a part of one, several blocks, one value; single values and vectors of two and four.
fn adam8(device: &Device) -> Vec<Vec<f32>> {
    let cases = [([3, 87], 256, false), ([8, 64], 128, true), ([1, 6], 4, true), ([1, 1], 4, false)];
    let run = |(dims, block, is_held)| adam8_steps(dims, block, is_held, FloatDType::F32, device);
    cases.into_iter().flat_map(run).collect()
}

fn adam8_f16(device: &Device) -> Vec<Vec<f32>> {
    let run = |dims| adam8_steps(dims, 64, false, FloatDType::F16, device);
    [[5, 20], [3, 7]].into_iter().flat_map(run).collect()
}

/// One launch and two, vectors and single values, one value, a transposed matrix.
fn sum_squares(device: &Device) -> Vec<Vec<f32>> {
    let of = |x: Tensor<2>| values(kernels::sum_squares(x.inner())); // with a tape it is the reference
    let sizes = [[6, 10], [301, 301], [512, 513], [1, 1]];
    let mut all: Vec<_> = sizes.into_iter().map(|dims| of(constant(1, dims, device))).collect();
    all.push(of(constant::<2>(1, [6, 10], device).transpose()));
    all.push(of(constant::<2>(1, [6, 10], device).slice([1..4, 2..7])));
    all.push(of(constant::<2>(1, [6, 4], device).cast(FloatDType::F16)));
    // large ones among small ones, of several widths, more than a launch takes
    let sizes = [[6, 10], [5, 1], [301, 301], [512, 513], [3, 7]].into_iter().chain((1..40).map(|rows| [rows, 4]));
    let tensors = sizes.map(|dims| constant::<2>(dims[0], dims, device).inner()).collect();
    all.push(values(kernels::sum_squares_all(tensors)));
    all
}

/// The same random numbers on both sides: equal to the bit, subnormal values and the largest included.
fn stochastic_round(device: &Device) -> Vec<Vec<f32>> {
    let numbers: Vec<f32> = (0..300).map(|i| number(1, i) * 10f32.powi(i as i32 % 15 - 10)).collect();
    let mut edges = vec![0.0, -0.0, 65504.0, 65510.0, -65519.0, 6.1e-5, 5.9e-8, 1.0, f32::INFINITY, f32::NEG_INFINITY];
    edges.extend(&numbers);
    let run = |values: &[f32], dims: [usize; 2], seed| {
        let x = Tensor::<2>::from_data(TensorData::new(values.to_vec(), dims), device);
        self::values(kernels::stochastic_round(x, FloatDType::F16, seed))
    };
    vec![run(&edges, [31, 10], 7), run(&edges, [31, 10], 0xffff_ffff_ffff_fff0), run(&edges[1..], [1, 309], 7)]
}

/// Both widths and both orders, to the nearest and at random; one group and a part of one, groups of several passes, fours that are
/// not full. Codes, scales, zero points; where a device divides inexactly, a code may be another one than the CPU's.
fn pack_groups(device: &Device) -> Vec<Vec<f32>> {
    let bytes = |words: &Tensor<1, Int>| {
        let words = words.clone().into_data().try_to_vec::<i32>().unwrap();
        words.into_iter().flat_map(|word| word.to_le_bytes()).map(f32::from).collect::<Vec<_>>()
    };
    let cases = [
        (Format::Int8, 256, Order::Inputs, [3, 87]),
        (Format::Int8, 1024, Order::Inputs, [64, 68]),
        (Format::Int4, 64, Order::Outputs, [10, 60]),
        (Format::Int4, 32, Order::Inputs, [1, 33]),
    ];
    let run = |(format, block, order, dims): (Format, usize, Order, [usize; 2]), rounding| {
        let layout = Layout { format, block, dims, order, nested: None };
        let packed = kernels::pack_groups(constant(1, dims, device) + 0.3, layout, rounding);
        let Scales::Affine { scale, zero } = packed.scales() else { panic!("groups have a scale and a zero") };
        [bytes(packed.codes()), values(scale.clone()), bytes(zero)]
    };
    let roundings = [kernels::Rounding::Nearest, kernels::Rounding::Stochastic { seed: 0xffff_ffff_ffff_ff00 }];
    roundings.into_iter().flat_map(|rounding| cases.into_iter().flat_map(move |case| run(case, rounding))).collect()
}

/// Many equal scores, none at all, one, several tiles, what is not finite.
fn top_columns(device: &Device) -> Vec<Vec<f32>> {
    let run = |values: Vec<f32>, count: usize| {
        let scores = Tensor::<2>::from_data(TensorData::new(values.clone(), [1, values.len()]), device);
        let indices = kernels::top_columns(scores, count).into_data().try_to_vec::<i32>().unwrap();
        indices.into_iter().map(|index| index as f32).collect::<Vec<_>>()
    };
    let rough = |d: usize| (0..d).map(|i| (number(1, i) * 20.0).round()).collect::<Vec<_>>();
    let odd = vec![f32::NAN, f32::NEG_INFINITY, 1.0, -0.0, 0.0, f32::INFINITY, -1.0, -f32::NAN];
    let mut all = vec![run(rough(700), 300), run(rough(31), 31), run(rough(40), 1), run(vec![2.0], 1)];
    all.extend((1..=8).map(|count| run(odd.clone(), count)));
    all
}

#[test]
fn operations_agree_with_the_cpu() {
    if std::env::var_os("LOWRANK_TEST_DEVICE").is_none() && !has_driver() {
        eprintln!("no Vulkan device: skipped");
        return;
    }
    // SAFETY: set before the first use of the GPU library, and this binary has one test.
    unsafe {
        std::env::set_var("CUBECL_AUTOTUNE_LEVEL", "minimal");
        if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
            std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir());
        }
    }
    type Operation = fn(&Device) -> Vec<Vec<f32>>;
    let (device, tolerance) = tested();
    let operations: &[(&str, Operation, f64)] = &[
        ("linear", linear, tolerance),
        ("lowrank_linear", lowrank_linear, tolerance),
        ("projected_linear", projected_linear, tolerance),
        ("factored_linear", factored_linear, tolerance),
        ("packed_linear", packed_linear, tolerance),
        ("thin products", products::thin, tolerance),
        ("thin products in f16", products::thin_in_f16, HALF_TOLERANCE),
        ("packed products", products::packed, tolerance),
        ("packed products in f16", products::packed_in_f16, HALF_TOLERANCE),
        ("lowrank_shift", lowrank_shift, tolerance),
        ("column_scale", column_scale, tolerance),
        ("block_rotation", block_rotation, tolerance),
        ("scaled_basis", scaled_basis, tolerance),
        ("rms_norm", rms_norm, tolerance),
        ("rms_norm in f16", rms_norm_f16, HALF_TOLERANCE),
        ("rotary", rotary, tolerance),
        ("rotary in f16", rotary_f16, HALF_TOLERANCE),
        ("attention", attention, tolerance),
        ("attention by chunks", attention_by_chunks, tolerance),
        ("attention in tiles", attention_in_tiles, tolerance),
        ("attention in f16", attention_in_f16, HALF_PRODUCT_TOLERANCE),
        ("gated", gated, tolerance),
        ("gated in f16", gated_f16, HALF_TOLERANCE),
        ("cross_entropy", cross_entropy, tolerance),
        ("cross_entropy in f16", cross_entropy_f16, HALF_TOLERANCE),
        ("adamw", adamw, tolerance),
        ("adam8", adam8, tolerance),
        ("adam8 in f16", adam8_f16, HALF_TOLERANCE),
        ("pack_groups", pack_groups, tolerance),
        ("top_columns", top_columns, 0.0),
        ("sum_squares", sum_squares, tolerance),
        ("stochastic_round", stochastic_round, 0.0),
    ];
    let only = std::env::var("LOWRANK_TEST_ONLY").unwrap_or_default();
    for &(name, operation, tolerance) in operations.iter().filter(|(name, ..)| name.contains(&only)) {
        let (start, mut closest) = (Instant::now(), 0.0f64);
        let want = operation(&Device::flex().autodiff());
        let got = operation(&device.clone().autodiff());
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let finite = want.iter().map(|&w| f64::from(w).abs()).filter(|w| w.is_finite());
            let largest = finite.fold(0.0, f64::max);
            let distance = |(&g, &w): (&f32, &f32)| if g == w { 0.0 } else { (f64::from(g) - f64::from(w)).abs() };
            let worst = got.iter().zip(want).map(distance);
            let worst = worst.fold(0.0, |max, d| if d.is_finite() { f64::max(max, d) } else { f64::INFINITY });
            assert_eq!(got.len(), want.len(), "{name} {i}");
            assert!(worst <= tolerance * largest, "{name} {i}: off by {worst:.2e} of {largest:.2e}");
            closest = closest.max(if worst > 0.0 { worst / largest } else { 0.0 });
        }
        eprintln!("{name}: {:.1} s, at most {closest:.1e} off", start.elapsed().as_secs_f64());
    }
}
