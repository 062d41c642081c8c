//! Times every operation on the CPU at the shapes of SmolLM2-135M (512 tokens, sequences of 256), best and median of many runs.
//!
//! `cargo run --release -p lowrank-kernels --example cpu_ops [seconds per line] [filter]`
//!
//! GFLOP/s counts 2 per multiply-add, GB/s the bytes that must move at least once. A product is compared with the best product
//! of the list, a memory-bound line with the copy at the top.

#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use burn::backend::Flex;
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::TensorData;
use lowrank_kernels::{Activation, AdamW, LowRankOps, Maybe, Tensors};

type T = FloatTensor<Flex>;

/// A repeatable tensor of numbers in -1..1.
fn tensor(dims: &[usize]) -> T {
    let number = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) & 0xffff) as f32 / 32_768.0 - 1.0;
    let values: Vec<f32> = (0..dims.iter().product()).map(number).collect();
    Flex::float_from_data(TensorData::new(values, dims.to_vec()), &Default::default())
}

fn integers(values: Vec<i32>, dims: &[usize]) -> IntTensor<Flex> {
    Flex::int_from_data(TensorData::new(values, dims.to_vec()), &Default::default())
}

struct Bench {
    per_line: Duration,
    filter: String,
}

impl Bench {
    /// Runs `body` until the time is over; `prepare` is not timed.
    fn time<I>(&self, name: &str, work: Work, mut prepare: impl FnMut() -> I, mut body: impl FnMut(I)) {
        if !name.contains(&self.filter) {
            return;
        }
        body(prepare());
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < self.per_line || times.len() < 3 {
            let input = prepare();
            let one = Instant::now();
            body(input);
            times.push(one.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let (best, median) = (times[0], times[times.len() / 2]);
        let (amount, unit) = match work {
            Work::Flops(flops) => (flops as f64, "GFLOP/s"),
            Work::Bytes(bytes) => (bytes as f64, "GB/s"),
        };
        println!(
            "{name:34} best {:8.3} ms {:7.1}   median {:8.3} ms {:7.1} {unit}",
            best * 1e3,
            amount / best / 1e9,
            median * 1e3,
            amount / median / 1e9
        );
    }

    /// `[m, k] x [k, n]`; a transposed operand is a view of its `[n, k]` or `[k, m]` memory.
    fn product(&self, m: usize, k: usize, n: usize, layout: &str, accumulate: bool) {
        let a = if layout.contains("At") { Flex::float_transpose(tensor(&[k, m])) } else { tensor(&[m, k]) };
        let b = if layout.contains("Bt") { Flex::float_transpose(tensor(&[n, k])) } else { tensor(&[k, n]) };
        let name = format!("gemm {m}x{k}x{n} {layout}{}", if accumulate { " += " } else { "" });
        let mut addend = accumulate.then(|| tensor(&[m, n]));
        self.time(
            &name,
            Work::Flops(2 * m * k * n),
            || (),
            |()| {
                let c = Maybe::from_option(addend.take());
                let result = Flex::gemm(a.clone(), b.clone(), c, 1.0);
                addend = accumulate.then_some(result);
            },
        );
    }
}

#[derive(Clone, Copy)]
enum Work {
    Flops(usize),
    Bytes(usize),
}

fn main() {
    let mut args = std::env::args().skip(1);
    let seconds = args.next().and_then(|text| text.parse().ok()).unwrap_or(0.5);
    let bench = Bench { per_line: Duration::from_secs_f64(seconds), filter: args.next().unwrap_or_default() };
    let (t, d, ff, heads, groups, width, sequence, vocab, chunk, rank) =
        (512, 576, 1536, 9, 3, 64, 256, 49152, 128, 16);

    // The floor of memory-bound lines: a copy of 3 MB into memory in use.
    let (source, mut target) = (vec![1.0f32; t * ff], vec![0.0f32; t * ff]);
    bench.time(
        "copy, one thread",
        Work::Bytes(8 * t * ff),
        || (),
        |()| {
            target.copy_from_slice(std::hint::black_box(&source));
            std::hint::black_box(&mut target);
        },
    );

    for (m, k, n) in [
        (1024, 1024, 1024),
        (t, d, ff),
        (t, ff, d),
        (t, d, d),
        (t, d, groups * width),
        (chunk, d, vocab),
        (t, d, vocab),
    ] {
        bench.product(m, k, n, "", false);
    }
    bench.product(t, d, ff, "Bt", false);
    bench.product(t, ff, d, "Bt", false);
    bench.product(d, t, ff, "At", false);
    bench.product(chunk, vocab, d, "", false);
    bench.product(chunk, d, vocab, "Bt", false);
    for (m, k, n) in [
        (t, d, rank),
        (t, ff, rank),
        (t, rank, d),
        (t, rank, ff),
        (rank, t, d),
        (rank, t, ff),
        (d, t, rank),
        (ff, t, rank),
    ] {
        let layouts: &[&str] = if k == t { &["At"] } else { &["", "Bt"] };
        layouts.iter().for_each(|layout| bench.product(m, k, n, layout, k == rank));
    }

    // A projected backward pass (GaLore) of LLaMA-130M: x P, (x P)^T dy, the update P N, and the dense products beside them.
    let (t2, d2, ff2, r2) = (2048, 768, 2048, 200);
    for (m, n) in [(d2, d2), (d2, ff2), (ff2, d2)] {
        bench.product(t2, m, n, "", false);
        bench.product(m, t2, n, "At", false);
        bench.product(t2, m, r2, "", false);
        bench.product(r2, t2, n, "At", false);
        bench.product(m, 192, n, "", true);
    }

    let (x, gamma, dy) = (tensor(&[t, d]), tensor(&[d]), tensor(&[t, d]));
    bench.time(
        "rms_norm",
        Work::Bytes(8 * t * d),
        || (),
        |()| drop(Flex::rms_norm(x.clone(), gamma.clone(), 1e-5, 0.0)),
    );
    bench.time(
        "rms_norm backward",
        Work::Bytes(12 * t * d),
        || (),
        |()| {
            drop(Flex::rms_norm_backward(x.clone(), gamma.clone(), dy.clone(), 1e-5, 0.0));
        },
    );

    let (q, k, v) = (
        tensor(&[t / sequence, sequence, heads, width]),
        tensor(&[t / sequence, sequence, groups, width]),
        tensor(&[t / sequence, sequence, groups, width]),
    );
    let (cos, sin) = (tensor(&[t, width / 2]), tensor(&[t, width / 2]));
    bench.time(
        "rotary q",
        Work::Bytes(8 * t * d),
        || (),
        |()| drop(Flex::rotary(q.clone(), cos.clone(), sin.clone(), 1.0)),
    );

    let causal: Vec<i32> = (0..t).flat_map(|i| [0, (i % sequence) as i32 + 1]).collect();
    let ranges = integers(causal, &[t / sequence, sequence, 2]);
    let pairs = heads * (t / sequence) * sequence * (sequence + 1) / 2;
    for softcap in [0.0, 50.0] {
        let name = if softcap > 0.0 { " softcap" } else { "" };
        let forward = || {
            Flex::range_attention(q.clone(), k.clone(), v.clone(), ranges.clone(), 0.125, softcap, Default::default())
        };
        bench.time(&format!("attention{name}"), Work::Flops(4 * width * pairs), || (), |()| drop(forward()));
        let (out, lse) = forward();
        bench.time(
            &format!("attention backward{name}"),
            Work::Flops(10 * width * pairs),
            || (),
            |()| {
                drop(Flex::range_attention_backward(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    out.clone(),
                    lse.clone(),
                    q.clone(),
                    ranges.clone(),
                    0.125,
                    softcap,
                    Default::default(),
                ));
            },
        );
    }

    let (gate, up, d_act) = (tensor(&[t, ff]), tensor(&[t, ff]), tensor(&[t, ff]));
    for act in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        bench.time(
            &format!("gated {act:?}"),
            Work::Bytes(12 * t * ff),
            || (),
            |()| {
                drop(Flex::gated(gate.clone(), up.clone(), act));
            },
        );
        bench.time(
            &format!("gated backward {act:?}"),
            Work::Bytes(20 * t * ff),
            || (),
            |()| {
                drop(Flex::gated_backward(gate.clone(), up.clone(), d_act.clone(), act));
            },
        );
    }

    let (logits, targets) = (tensor(&[chunk, vocab]), integers((0..chunk as i32).collect(), &[chunk]));
    for softcap in [0.0, 30.0] {
        // reading twice and writing once is the floor of softmax with its gradient in place
        let name = if softcap > 0.0 { "cross_entropy softcap" } else { "cross_entropy" };
        let mut reused = Some(logits.clone());
        reused = reused.map(|x| Flex::float_mul_scalar(x, 1.0.into()));
        bench.time(
            name,
            Work::Bytes(12 * chunk * vocab),
            || (),
            |()| {
                let logits = reused.take().unwrap_or_else(|| logits.clone());
                reused = Some(Flex::cross_entropy(logits, targets.clone(), softcap).1);
            },
        );
    }

    let rule =
        AdamW { learning_rate: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, step: 1, gradient_scale: 1.0 };
    let list = |tensor: T| Tensors(vec![tensor]);
    let (gradient, second) = (tensor(&[d, ff]), Flex::float_abs(tensor(&[d, ff])));
    let mut state = Some((list(tensor(&[d, ff])), list(tensor(&[d, ff])), list(second)));
    bench.time(
        "adamw 576x1536",
        Work::Bytes(28 * d * ff),
        || (),
        |()| {
            state = state.take().map(|(p, m, v)| Flex::adamw(p, m, v, list(gradient.clone()), Maybe::Absent, rule));
        },
    );
    let squares = |()| drop(Flex::sums(list(gradient.clone()), true));
    bench.time("sum_squares 576x1536", Work::Bytes(4 * d * ff), || (), squares);

    let (x, w) = (tensor(&[t, d]), Flex::float_transpose(tensor(&[ff, d])));
    let (down, up) = (Flex::float_transpose(tensor(&[rank, d])), Flex::float_transpose(tensor(&[ff, rank])));
    bench.time(
        "lowrank_linear 576x1536 r16",
        Work::Flops(2 * t * (d * ff + rank * (d + ff))),
        || (),
        |()| {
            drop(Flex::lowrank_linear(
                x.clone(),
                w.clone(),
                Maybe::Absent,
                Maybe::Absent,
                down.clone(),
                up.clone(),
                2.0,
            ));
        },
    );
}
