//! `lowrank-bench gemm`: Burn's matrix product on the shapes of the linear layers of Llama 1B and 8B.
//!
//! Three products a layer, as a step makes them of `x [t, d_in]`, `W [d_out, d_in]` (as it lies in a checkpoint) and
//! `dy [t, d_out]`: forward `y = x W^T`, input gradient `dx = dy W`, weight gradient `dW = dy^T x`. Each is `2 t d_in d_out`
//! flops. `scripts/bench/peer_gemm.py` times the same through torch.

use burn::tensor::{DType, Device, Distribution, Tensor};
use lowrank_train::device;

use crate::timing::{Effort, time};

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long, default_value = "auto")]
    device: String,
    #[arg(long, default_value = "bf16", value_parser = ["bf16", "f16", "f32"])]
    dtype: String,
    /// Rows of x.
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Two small shapes, few repeats: a look at whether it runs.
    #[arg(long)]
    quick: bool,
}

/// Name, d_in, d_out of each kind of layer.
const SHAPES: &[(&str, usize, usize)] = &[
    ("1B q, o", 2048, 2048),
    ("1B k, v", 2048, 512),
    ("1B gate, up", 2048, 8192),
    ("1B down", 8192, 2048),
    ("1B head", 2048, 128256),
    ("8B q, o", 4096, 4096),
    ("8B k, v", 4096, 1024),
    ("8B gate, up", 4096, 14336),
    ("8B down", 14336, 4096),
    ("8B head", 4096, 128256),
];

const QUICK_SHAPES: &[(&str, usize, usize)] = &[("quick", 32, 64)];

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let chosen = device::choose(&arguments.device)?;
    let dtype = device::compute_type(super::run_dtype(&arguments.dtype), &chosen)?;
    let (shapes, effort, tokens) = match arguments.quick {
        true => (QUICK_SHAPES, Effort::QUICK, arguments.tokens.min(16)),
        false => (SHAPES, Effort::FULL, arguments.tokens),
    };
    for &(layer, d_in, d_out) in shapes {
        let layer = Layer::new(layer, [tokens, d_in, d_out], DType::from(dtype), &chosen.device);
        for (product, call) in layer.products() {
            let timing = time(&chosen.device, effort, 4, call)?;
            let flops = 2.0 * (tokens * d_in * d_out) as f64;
            crate::deliver(
                &chosen.description,
                serde_json::json!({
                    "bench": "gemm",
                    "program": "lowrank",
                    "layer": layer.name,
                    "product": product,
                    "shape": [tokens, d_in, d_out],
                    "dtype": arguments.dtype,
                    "ms": timing.median * 1e3,
                    "ms_min": timing.min * 1e3,
                    "ms_max": timing.max * 1e3,
                    "tflops": flops / timing.median / 1e12,
                }),
            )?;
        }
    }
    Ok(())
}

struct Layer {
    name: &'static str,
    x: Tensor<2>,
    w: Tensor<2>,
    dy: Tensor<2>,
}

type Product<'a> = (&'static str, Box<dyn FnMut() -> Tensor<2> + 'a>);

impl Layer {
    /// Random values: a card's clock, and so its rate, depends on what it multiplies.
    fn new(name: &'static str, [tokens, d_in, d_out]: [usize; 3], dtype: DType, device: &Device) -> Self {
        let random = |dims| Tensor::random(dims, Distribution::Normal(0.0, 1.0), (device, dtype));
        Self { name, x: random([tokens, d_in]), w: random([d_out, d_in]), dy: random([tokens, d_out]) }
    }

    fn products(&self) -> [Product<'_>; 3] {
        let Self { x, w, dy, .. } = self;
        [
            ("forward", Box::new(|| x.clone().matmul(w.clone().transpose()))),
            ("dx", Box::new(|| dy.clone().matmul(w.clone()))),
            ("dW", Box::new(|| dy.clone().transpose().matmul(x.clone()))),
        ]
    }
}
