//! The lazy gap, the codes of a basis, and training on codes against training on their values.
#![allow(clippy::unwrap_used, clippy::panic)]

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Gradients};
use lowrank_kernels as kernels;

use super::*;
use crate::base::PackedBase;
use crate::optim::{Galore, GaloreConfig, Optimizer, ProjType, RuleConfig, StepRule, Weights, adamw::AdamWConfig};
use crate::quant::Quantisation;
use crate::random::Stream;
use crate::{Base, Projection};

/// With a direction that never moves and a gap of 200: refreshes at 0, 200, .. 1000 (six, five similarities), then at
/// 1200, 1600, 3200 and 6400.
#[test]
fn the_gap_doubles_from_the_sixth_refresh_on() {
    let config = Quantised::default();
    let mut lazy = LazyGap::new(&config, 200);
    let basis = Tensor::<2>::from_floats([[1.0, 0.0], [0.0, 1.0]], &burn::tensor::Device::flex());
    let mut refreshes = vec![];
    for step in 0..8000u64 {
        if step.is_multiple_of(lazy.gap()) {
            refreshes.push(step);
            lazy.watch(&config, Some(&basis));
        }
    }
    assert_eq!(refreshes, [0, 200, 400, 600, 800, 1000, 1200, 1600, 3200, 6400]);
}

#[test]
fn the_threshold_itself_doubles_and_four_values_never_do() {
    let config = Quantised::default();
    let mut lazy = LazyGap::new(&config, 10);
    for _ in 0..4 {
        lazy.push(&config, 1.0);
    }
    assert_eq!(lazy.gap(), 10);
    let mut lazy = LazyGap::new(&Quantised { cos_threshold: 0.5, ..config.clone() }, 10);
    for _ in 0..5 {
        lazy.push(&Quantised { cos_threshold: 0.5, ..config.clone() }, 0.5);
    }
    assert_eq!(lazy.gap(), 20);
}

#[test]
fn the_sign_of_a_direction_does_not_matter() {
    let config = Quantised::default();
    let mut lazy = LazyGap::new(&config, 10);
    let device = burn::tensor::Device::flex();
    for step in 0..6 {
        let sign = if step % 2 == 0 { 1.0 } else { -1.0 };
        lazy.watch(&config, Some(&Tensor::<2>::from_floats([[sign], [0.0]], &device)));
    }
    assert_eq!(lazy.gap(), 20);
}

/// Measured on a random orthonormal 4096 x 1024 basis: error 0.109, `||P^T P - I||` 0.17; here a smaller one.
#[test]
fn an_int4_basis_is_a_tenth_off() {
    let device = burn::tensor::Device::flex();
    let basis = linalg::orthonormal(linalg::gaussian(1, "basis", 1024, 64, 1.0, &device));
    let config = Quantised::default();
    let [Some(packed), None] = config.pack(Basis { left: Some(basis.clone()), right: None }) else { panic!("P") };
    let values = 1024 * 64;
    assert_eq!(packed.bytes(), values / 2 + 5 * values / 256);
    let through = packed.dense(FloatDType::F32);
    let error = linalg::host(through - basis.clone()).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let relative = error / 64f64.sqrt();
    assert!((0.08..0.14).contains(&relative), "{relative}");
}

/// A basis comes back from a state to the bit.
#[test]
fn a_basis_survives_a_checkpoint() {
    let device = Device::flex();
    for (bits, group, order) in [(4, 256, LEFT), (4, 32, RIGHT), (8, 64, RIGHT)] {
        let config = Quantised { basis_bits: bits, group, ..Quantised::default() };
        let basis = linalg::gaussian(2, "basis", 70, 9, 1.0, &device);
        let both = Basis { left: Some(basis.clone()), right: Some(basis) };
        let [left, right] = config.pack(both).map(Option::unwrap);
        let packed = if order == LEFT { left } else { right };
        let mut state = State::default();
        save_basis("side", &packed, &mut state);
        let back = config.restore_basis("side", [70, 9], order, &mut state.clone()).unwrap().unwrap();
        assert_eq!(to_groups(&back), to_groups(&packed));
        assert_eq!(linalg::host(back.dense(FloatDType::F32)), linalg::host(packed.dense(FloatDType::F32)));
        let error = config.restore_basis("side", [700, 9], order, &mut state.clone()).unwrap_err();
        assert!(error.starts_with("side.scale has shape"), "{error}");
        state.bytes.insert("side.codes".to_owned(), vec![0; 3]);
        let error = config.restore_basis("side", [70, 9], order, &mut state).unwrap_err();
        assert!(error.starts_with("the codes and zeros of side are (3, "), "{error}");
    }
}

const NAME: &str = "layer.weight";
const DIMS: [usize; 2] = [40, 72];
const GROUP: usize = 64;
const TOKENS: usize = 30;

fn optimizer(proj_type: ProjType, exact: bool) -> Optimizer {
    let config = GaloreConfig {
        rank: 6,
        update_proj_gap: 3,
        proj_type,
        exact,
        rule: RuleConfig::adamw8bit(),
        quantised: Some(Quantised { group: GROUP, ..Quantised::default() }),
        tokens: TOKENS,
        ..GaloreConfig::default()
    };
    let adamw = AdamWConfig { betas: (0.9, 0.95), eps: 1e-8, form: crate::optim::AdamForm::Hf };
    let mut optimizer = Optimizer::adamw(adamw).with_weights(Weights::Int8 { group: GROUP }, 5);
    optimizer.manage(NAME, Box::new(Galore::new(config, NAME, 5, DIMS, 0)));
    optimizer
}

/// One step of `||x W - target||^2 / 2`; returns the outputs.
fn train(projection: &mut Projection, optimizer: &mut Optimizer, step: u64) -> Vec<f32> {
    let device = Device::flex();
    let [m, n] = DIMS;
    let x = linalg::gaussian(100 + step, "x", TOKENS, m, 1.0, &device);
    let target = linalg::gaussian(200 + step, "target", TOKENS, n, 1.0, &device);
    projection.gradient = optimizer.begin(step, &|_| 1).remove(NAME).unwrap();
    let mut lifted = projection.clone().train();
    lifted.lift_slots();
    let out = lifted.forward(Tensor::from_inner(x), true);
    let values = linalg::host(out.clone().inner());
    let mut gradients: Gradients = kernels::backward_from(out.clone(), Tensor::from_inner(out.inner() - target));
    let collected = match (&lifted.weight, lifted.take_gradient(&mut gradients)) {
        (_, Some(collected)) => collected,
        (Base::Dense(weight), None) if weight.val().grad(&gradients).is_some() => {
            weight.val().grad_remove(&mut gradients).unwrap()
        }
        _ => {
            let (x, dy) = lifted.take_factors(&mut gradients).unwrap();
            optimizer.observe(NAME, x, dy)
        }
    };
    let rule = StepRule { learning_rate: 0.05, weight_decay: 0.01, gradient_scale: 0.5 };
    projection.weight = match &projection.weight {
        Base::Packed(base) => Base::Packed(optimizer.step_packed(NAME, base, collected, rule)),
        Base::Dense(weight) => {
            Base::Dense(weight.clone().map(|value| optimizer.step(NAME, value, collected.clone(), rule)))
        }
    };
    values
}

fn codes() -> PackedBase {
    let values = linalg::gaussian(1, "weight", DIMS[0], DIMS[1], 0.1, &Device::flex());
    PackedBase::trained(values, Quantisation::trained(GROUP), FloatDType::F32)
}

/// On every side, with projected and with dense gradients: the same outputs and the same weights, bit by bit, as on a dense weight
/// that goes through the same codes.
#[test]
fn codes_train_as_their_values_do() {
    let cases = [
        (ProjType::Input, false),
        (ProjType::Output, false),
        (ProjType::Full, false),
        (ProjType::Std, true),
        (ProjType::ReverseStd, true),
    ];
    for (proj_type, exact) in cases {
        let start = codes();
        let values = start.weight.dense(FloatDType::F32);
        let first = linalg::host(values.clone());
        let mut packed = Projection::on(Base::Packed(start), None);
        let mut dense = Projection::on(Base::dense(values), None);
        dense.weight = match dense.weight {
            Base::Dense(weight) => Base::Dense(weight.set_require_grad(true)),
            other => other,
        };
        let (mut with_codes, mut with_values) = (optimizer(proj_type, exact), optimizer(proj_type, exact));
        for step in 0..8 {
            let outputs = train(&mut packed, &mut with_codes, step);
            assert_eq!(outputs, train(&mut dense, &mut with_values, step), "{proj_type:?} {exact} step {step}");
            let (got, want) = (linalg::host(packed.weight.values()), linalg::host(dense.weight.values()));
            assert_eq!(got, want, "{proj_type:?} {exact} step {step}");
            assert_ne!(got, first);
        }
        assert_eq!(with_codes.state_bytes(), with_values.state_bytes());
        assert!(packed.weight.trained_codes().is_some());
    }
}

/// The mean of many roundings of an updated weight is that weight: each value within 5 standard errors of a fair choice between two
/// codes, their sum within 4. Values less than a step from the ends of their group's range are left out: codes end there.
#[test]
fn rounding_after_a_step_is_unbiased() {
    const TIMES: u64 = 400;
    let base = codes();
    let update = linalg::gaussian(9, "update", DIMS[0], DIMS[1], 1e-4, &Device::flex());
    let values = base.weight.dense(FloatDType::F32) + update;
    let want = linalg::host(values.clone());
    let count = want.len();
    let (mut sum, mut squares, mut scales) = (vec![0.0f64; count], vec![0.0f64; count], vec![]);
    for time in 0..TIMES {
        let rounding = Stream::new(4, NAME).rounding(time * count as u64);
        let rounded = base.rounded(values.clone(), rounding);
        scales = to_groups(&rounded.weight).unwrap().scale;
        for (i, value) in linalg::host(rounded.weight.dense(FloatDType::F32)).into_iter().enumerate() {
            sum[i] += f64::from(value);
            squares[i] += f64::from(value).powi(2);
        }
    }
    let (times, mut seen, mut off, mut variance) = (TIMES as f64, 0, 0.0, 0.0);
    for (i, &value) in want.iter().enumerate() {
        let group = &want[i / GROUP * GROUP..(i / GROUP + 1) * GROUP];
        let step = scales[i / GROUP];
        let (low, high) = (group.iter().copied().fold(0.0, f32::min), group.iter().copied().fold(0.0, f32::max));
        if value - low < step || high - value < step {
            continue;
        }
        let mean = sum[i] / times;
        let error = mean - f64::from(value);
        assert!(error.abs() < 5.0 * 0.5 * f64::from(step) / times.sqrt(), "{mean} for {value}, steps of {step}");
        (seen, off) = (seen + 1, off + error);
        variance += (squares[i] / times - mean * mean).max(0.0) / times;
    }
    assert!(seen > 2500 && variance > 0.0 && off.abs() < 4.0 * variance.sqrt(), "{off} of {seen}, {}", variance.sqrt());
}

/// A basis of 4 bits and 8-bit moments: what the state costs.
#[test]
fn the_state_is_counted_as_it_is_held() {
    let mut packed = Projection::on(Base::Packed(codes()), None);
    let mut with_codes = optimizer(ProjType::Input, false);
    train(&mut packed, &mut with_codes, 0);
    let ([m, n], r, s) = (DIMS, 6, 8);
    let basis = m * r / 2 + (m * r).div_ceil(GROUP) * 4 + (m * r).div_ceil(GROUP).next_multiple_of(4) + 4 * m * s;
    assert_eq!(with_codes.state_bytes(), basis + 8 * r * n); // fewer than 4096 values keep f32 moments
    assert_eq!(packed.weight.bytes(), m * n + 5 * m * n / GROUP + 3);
}
