//! What every method owes the optimiser of a run.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor};

use super::*;
use crate::linalg::host;

fn matrix(rows: usize, cols: usize, name: &str) -> Tensor<2> {
    Stream::new(3, name).normal_tensor(rows, cols, 1.0, &Device::flex())
}

fn galore(config: GaloreConfig) -> Optimizer {
    let mut optimizer = Optimizer::adamw(AdamWConfig::default());
    optimizer.manage("w", Box::new(Galore::new(config, "w", 1, [12, 9], 0)));
    optimizer
}

/// One step on the factors of a gradient; `clip` on the host, or on the device.
fn step(optimizer: &mut Optimizer, weight: Tensor<2>, number: u64, clip: f64, on_device: bool) -> Tensor<2> {
    let (x, dy) = (matrix(20, 12, &format!("x {number}")), matrix(20, 9, &format!("dy {number}")));
    let collected = match optimizer.begin(number, &|_| 1).remove("w").unwrap() {
        Gradient::Factors { .. } => optimizer.observe("w", x, dy),
        Gradient::Projected { left: Some(left), .. } => x.matmul(left.values(FloatDType::F32)).transpose().matmul(dy),
        _ => unreachable!("this configuration projects on the input side"),
    };
    let rule = |gradient_scale| StepRule { learning_rate: 0.1, weight_decay: 0.0, gradient_scale };
    match on_device {
        true => {
            let factor = Tensor::from_data([clip as f32], &Device::flex());
            optimizer.clip(factor);
            optimizer.step("w", weight, collected, rule(1.0))
        }
        false => optimizer.step("w", weight, collected, rule(clip)),
    }
}

/// A factor that only the device knows makes the step and the report of the same factor on the host, whichever way the norm is
/// known.
#[test]
fn a_factor_on_the_device_is_that_of_the_host() {
    for norm in [galore::Norm::Hybrid, galore::Norm::Exact, galore::Norm::Projected] {
        let config = || GaloreConfig { rank: 4, update_proj_gap: 2, norm, ..GaloreConfig::default() };
        let (mut a, mut b) = (galore(config()), galore(config()));
        let (mut of_host, mut of_device) = (matrix(12, 9, "w"), matrix(12, 9, "w"));
        for number in 0..4 {
            of_host = step(&mut a, of_host, number, 0.25, false);
            of_device = step(&mut b, of_device, number, 0.25, true);
            assert_eq!(host(of_host.clone()), host(of_device.clone()), "{norm:?}");
            let (a, b) = (a.reports()["w"].energy.unwrap(), b.reports()["w"].energy.unwrap());
            assert!((a / b - 1.0).abs() < 1e-6, "{norm:?}: {a} {b}");
        }
    }
}

/// A step whose gradient is not finite is forgotten, also where it was to choose the basis: the first one, and a later one with
/// moments that follow the basis.
#[test]
fn a_step_that_is_left_out_leaves_nothing_behind() {
    for moments in [galore::Moments::Keep, galore::Moments::Rotate] {
        let config = GaloreConfig { rank: 4, update_proj_gap: 2, moments, ..GaloreConfig::default() };
        let mut optimizer = galore(config);
        let mut weight = matrix(12, 9, "w");
        for number in 0..6 {
            if number % 2 == 0 {
                assert!(matches!(optimizer.begin(number, &|_| 1)["w"], Gradient::Factors { .. }));
                let bad = matrix(20, 9, "dy") * f32::INFINITY;
                optimizer.observe("w", matrix(20, 12, "x"), bad);
                optimizer.leave_out();
            }
            weight = step(&mut optimizer, weight, number, 1.0, false);
            assert!(host(weight.clone()).iter().all(|value| value.is_finite()), "{moments:?}, step {number}");
        }
    }
}
