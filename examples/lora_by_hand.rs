//! A LoRA on one matrix, without a model: learns a rank-2 change of a frozen weight from examples.
//!
//!     cargo run --release -p lowrank-examples --bin lora_by_hand

use std::io::Write;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use lowrank_core::adapters::lora::{Lora, LoraInit};
use lowrank_core::optim::adamw::StepRule;
use lowrank_core::optim::{AdamW, AdamWConfig};
use lowrank_core::random::Stream;
use lowrank_core::{Delta, Projection};
use lowrank_models::parameters::{self, Named};

fn main() -> anyhow::Result<()> {
    let device = Device::flex();
    let random = |name: &str, rows, cols| Stream::new(1, name).normal_tensor(rows, cols, 0.3, &device);
    let weight = random("weight", 16, 24);
    let target = weight.clone() + random("a", 16, 2).matmul(random("b", 2, 24));

    let mut projection = Projection::frozen(weight, None);
    let lora = Lora { r: 2, scale: Lora::scale(4.0, 2, false), dropout: 0.0, init: LoraInit::KaimingUniform };
    projection.attach(Delta::LowRank(lora.init(16, 24, Stream::new(1, "lora"), &device)));
    let mut optimizer = AdamW::new(AdamWConfig::default());

    for step in 0..300 {
        let x = Stream::new(step, "x").normal_tensor(64, 16, 1.0, &device);
        let lifted = projection.clone().train();
        let error = lifted.forward(Tensor::from_inner(x.clone()), true) - Tensor::from_inner(x.matmul(target.clone()));
        let loss = (error.clone() * error).mean();
        let shown = loss.clone().inner().into_scalar::<f32>();
        let mut tape = loss.backward();
        let mut gradients = Named::new();
        parameters::take_gradients(&lifted, "", &mut tape, &mut gradients);
        drop(lifted);
        let rule = StepRule { learning_rate: 0.02, weight_decay: 0.0, gradient_scale: 1.0 };
        projection = parameters::map(projection, "", |name, value| match gradients.remove(name) {
            Some(gradient) => optimizer.step(name, value, gradient, rule),
            None => value,
        });
        if step % 50 == 0 {
            writeln!(std::io::stdout(), "step {step:3}  loss {shown:.6}")?;
        }
    }
    projection.merge();
    let left = (projection.weight.values() - target).abs().max().into_scalar::<f32>();
    writeln!(std::io::stdout(), "largest difference between the merged weight and the target: {left:.4}")?;
    Ok(())
}
