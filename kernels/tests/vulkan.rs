//! Every operation on a Vulkan device (software is enough) against the CPU: result and gradients, tiny shapes.
//!
//! One test, because compiling a pipeline costs seconds on a software device and the cache lives in the process. Without a
//! Vulkan driver the test says so and stops.

#![cfg(all(feature = "flex", feature = "wgpu"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::time::Instant;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use lowrank_kernels as kernels;
use lowrank_kernels::packed::{self, Format, Layout, Nested, Scales};
use lowrank_kernels::{Activation, AdamW, Packed};

#[path = "vulkan/products.rs"]
mod products;

/// Relative bound in f32: sums run in another order than on the CPU.
const TOLERANCE: f64 = 1e-5;
/// The same in f16: one unit in the last place of the largest value.
const TOLERANCE_F16: f64 = 1.0 / 1024.0;

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
    let grads = kernels::backward_from(out.clone(), constant(99, dims, device));
    let mut all = vec![out.into_data().try_to_vec::<f32>().unwrap()];
    all.extend(leaves.iter().map(|leaf| leaf(&grads)));
    all
}

type Gradient = Box<dyn Fn(&burn::tensor::Gradients) -> Vec<f32>>;

fn gradient_of<const D: usize>(leaf: &Tensor<D>) -> Gradient {
    let leaf = leaf.clone();
    Box::new(move |grads| leaf.grad(grads).expect("a gradient").into_data().try_to_vec::<f32>().unwrap())
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
    let layout = |format, block, nested| Layout { format, block, dims: [8, 8], nested };
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
        Packed::new(layout(Format::Int8, 16, None), packed::words(bytes, device), affine),
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

fn rms_norm(device: &Device) -> Vec<Vec<f32>> {
    let (x, gamma) = (leaf(1, [6, 10], device), leaf(2, [10], device));
    collect(kernels::rms_norm(x.clone(), gamma.clone(), 1e-5, 1.0), vec![gradient_of(&x), gradient_of(&gamma)], device)
}

fn rotary(device: &Device) -> Vec<Vec<f32>> {
    let x = leaf(1, [2, 3, 2, 8], device);
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

fn gated(device: &Device) -> Vec<Vec<f32>> {
    let (gate, up) = (leaf(1, [6, 10], device), leaf(2, [6, 10], device));
    let run = |act| {
        collect(kernels::gated(gate.clone(), up.clone(), act), vec![gradient_of(&gate), gradient_of(&up)], device)
    };
    [Activation::Silu, Activation::GeluTanh, Activation::Gelu].into_iter().flat_map(run).collect()
}

fn cross_entropy(device: &Device) -> Vec<Vec<f32>> {
    let logits = leaf(1, [4, 11], device);
    let out = kernels::cross_entropy(logits.clone(), integers(vec![0, -100, 10, 5], [4], device), 3.0);
    collect(out, vec![gradient_of(&logits)], device)
}

fn adamw(device: &Device) -> Vec<Vec<f32>> {
    let [p, m, g] = [1, 2, 3].map(|seed| constant(seed, [6, 10], device));
    let second = g.clone() * g.clone();
    let rule =
        AdamW { learning_rate: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, step: 2, gradient_scale: 0.5 };
    let (p, m, v) = kernels::adamw(p, m, second, g, rule);
    [p, m, v].into_iter().map(|tensor| tensor.into_data().try_to_vec::<f32>().unwrap()).collect()
}

fn sum_squares(device: &Device) -> Vec<Vec<f32>> {
    vec![kernels::sum_squares(constant(1, [6, 10], device)).into_data().try_to_vec::<f32>().unwrap()]
}

#[test]
fn operations_agree_with_the_cpu() {
    if !has_driver() {
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
    let operations: [(&str, fn(&Device) -> Vec<Vec<f32>>); 16] = [
        ("linear", linear),
        ("lowrank_linear", lowrank_linear),
        ("projected_linear", projected_linear),
        ("factored_linear", factored_linear),
        ("packed_linear", packed_linear),
        ("thin products", products::thin),
        ("thin products in f16", products::thin_in_f16),
        ("packed products", products::packed),
        ("packed products in f16", products::packed_in_f16),
        ("rms_norm", rms_norm),
        ("rotary", rotary),
        ("attention", attention),
        ("gated", gated),
        ("cross_entropy", cross_entropy),
        ("adamw", adamw),
        ("sum_squares", sum_squares),
    ];
    for (name, operation) in operations {
        let start = Instant::now();
        let want = operation(&Device::flex().autodiff());
        let got = operation(&Device::wgpu(Default::default()).autodiff());
        assert_eq!(got.len(), want.len());
        let tolerance = if name.ends_with("f16") { TOLERANCE_F16 } else { TOLERANCE };
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let largest = want.iter().fold(0.0f64, |max, &w| max.max(f64::from(w).abs()));
            let worst = got.iter().zip(want).map(|(&g, &w)| (f64::from(g) - f64::from(w)).abs());
            let worst = worst.fold(0.0, |max, d| if d.is_finite() { f64::max(max, d) } else { f64::INFINITY });
            assert_eq!(got.len(), want.len(), "{name} {i}");
            assert!(worst <= tolerance * largest, "{name} {i}: off by {worst:.2e} of {largest:.2e}");
        }
        eprintln!("{name}: {:.1} s", start.elapsed().as_secs_f64());
    }
}
