//! Times the products that have two ways on a GPU, each way beside its floor, at the shapes of Llama 8B.
//!
//! `cargo run --release -p lowrank-kernels --features cuda --example gpu_products [tokens] [GB/s of the device] [GFLOP/s] [type]`
//!
//! The floor of a line is its bytes over the first number or its flops over the second, whichever takes longer. A line is the median of
//! batches that are queued without waiting, so launches overlap as in a training step. `LOWRANK_THIN=matmul` and
//! `LOWRANK_PACKED=panels` choose the other way in a run of the whole program; here both are called by name.

#![allow(clippy::print_stdout, clippy::expect_used)]

use std::time::{Duration, Instant};

use burn::backend::Dispatch;
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use lowrank_kernels::packed::{self, Format, Layout, Nested, Order, Scales};
use lowrank_kernels::{self as kernels, LowRankOps, Packed};

/// Calls between two waits.
const BATCH: usize = 20;

struct Bench {
    device: Device,
    dtype: FloatDType,
    bytes_per_second: f64,
    flops_per_second: f64,
}

impl Bench {
    fn random(&self, m: usize, n: usize) -> Tensor<2> {
        Tensor::<2>::random([m, n], Distribution::Normal(0.0, 1.0), &self.device).cast(self.dtype)
    }

    fn time(&self, name: &str, bytes: usize, flops: usize, mut body: impl FnMut() -> Tensor<2>) {
        let mut batch = || {
            let start = Instant::now();
            (0..BATCH).for_each(|_| drop(body()));
            self.device.sync().expect("the device works");
            start.elapsed().as_secs_f64() / BATCH as f64
        };
        batch(); // compiles and tunes
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < Duration::from_millis(300) || times.len() < 5 {
            times.push(batch());
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let floor = (bytes as f64 / self.bytes_per_second).max(flops as f64 / self.flops_per_second);
        println!("| {name} | {:.1} | {:.1} | {:.0} % |", median * 1e6, floor * 1e6, 100.0 * floor / median);
    }

    /// `[m, k] x [k, n]` by the kernel for thin products and by Burn's matmul; `a` is given as it lies.
    fn thin(&self, name: &str, a: Tensor<2>, b: Tensor<2>) {
        let ([m, k], n) = (a.dims(), b.dims()[1]);
        let (bytes, flops) = (self.dtype_bytes() * (m * k + k * n + m * n), 2 * m * k * n);
        self.time(&format!("{name} {m} x {k} x {n}, thin kernel"), bytes, flops, || {
            let (a, b) = (a.clone().into_dispatch(), b.clone().into_dispatch());
            Tensor::from_dispatch(Dispatch::thin_product(a, b, 0.5))
        });
        self.time(&format!("{name} {m} x {k} x {n}, matmul"), bytes, flops, || a.clone().matmul(b.clone()) * 0.5);
    }

    fn dtype_bytes(&self) -> usize {
        if self.dtype == FloatDType::F32 { 4 } else { 2 }
    }

    /// nf4 with scales that are codes, as QLoRA stores a matrix.
    fn weight(&self, d_in: usize, d_out: usize) -> Packed {
        let nested = Some(Nested { block: 256, offset: 0.5 });
        let layout = Layout { format: Format::Nf4, block: 64, dims: [d_in, d_out], order: Order::Outputs, nested };
        let word = |i: usize| (i.wrapping_mul(2_654_435_761) >> 3) as i32;
        let words = |count: usize| packed::words((0..count).map(word).collect(), &self.device);
        let scales = |count: usize| packed::scales((0..count).map(|i| i as f32 / 256.0).collect(), &self.device);
        let (blocks, table) = (layout.blocks(), scales(16));
        let absmax = scales(blocks.div_ceil(256));
        let scales = Scales::Nested { table, codes: words(blocks.div_ceil(4)), map: scales(256), absmax };
        Packed::new(layout, words(layout.words()), scales)
    }

    fn packed(&self, d_in: usize, d_out: usize, tokens: usize) {
        let (w, values) = (self.weight(d_in, d_out), d_in * d_out);
        let (stored, wide) = (w.bytes(), self.dtype_bytes() * values);
        self.time(&format!("panel of {d_in} x {d_out}"), stored + wide, 0, || w.rows(0..d_out, self.dtype));
        for tokens in [1, 8, tokens] {
            let (x, flops) = (self.random(tokens, d_in), 2 * tokens * values);
            let name = format!("x W {tokens} x {d_in} x {d_out}");
            self.time(&format!("{name}, nf4"), stored, flops, || kernels::linear(x.clone(), w.clone(), None));
            let dense = w.dense(self.dtype);
            self.time(&format!("{name}, dense"), wide, flops, || kernels::linear(x.clone(), dense.clone(), None));
        }
    }
}

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(not(feature = "cuda"))]
    Device::wgpu(Default::default())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, otherwise: f64| arguments.get(i).and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let dtype = match arguments.get(3).map(String::as_str) {
        Some("f32") => FloatDType::F32,
        Some("f16") => FloatDType::F16,
        _ => FloatDType::BF16,
    };
    let (tokens, gigabytes, gigaflops) = (number(0, 4096.0) as usize, number(1, 4800.0), number(2, 989e3));
    let bench = Bench { device: device(), dtype, bytes_per_second: gigabytes * 1e9, flops_per_second: gigaflops * 1e9 };
    println!("| product, {dtype:?} | us | floor, us | of the floor |\n| --- | --- | --- | --- |");
    for rank in [8, 16, 32, 64] {
        for width in [4096, 14336] {
            let x = bench.random(tokens, width);
            bench.thin("x A", x.clone(), bench.random(width, rank));
            bench.thin("dy B^T", x.clone(), bench.random(rank, width).transpose());
            bench.thin("x^T u", x.clone().transpose(), bench.random(tokens, rank));
            bench.thin("h^T dy", bench.random(tokens, rank).transpose(), x);
        }
    }
    for (d_in, d_out) in [(4096, 4096), (4096, 14336), (14336, 4096)] {
        bench.packed(d_in, d_out, tokens);
    }
}
