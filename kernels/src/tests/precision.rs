//! bf16 and f16: the error of an operation against f32 on the same rounded inputs is at most twice that of the plain version in
//! low precision (the rule of the flash-attention tests). Inputs and bounds are those of training: unit variance.

use burn::backend::Flex;
use burn::tensor::DType;
use burn_flex::FlexTensor;

use super::{Random, cast, error, integers};
use crate::{
    Activation, AttentionHints, LowRankOps, Maybe, attention, block_rotation, column_scale, cross_entropy, gated, gemm,
    rms_norm, rotary,
};

/// Of f32: where the plain version happens to round exactly.
const A_FEW_ULPS: f64 = 5e-7;

const DTYPES: [DType; 2] = [DType::BF16, DType::F16];

/// `operation` and `plain` on rounded inputs, both against `plain` on the same values in f32.
#[track_caller]
fn assert_precise<const N: usize>(
    what: &str,
    inputs: [FlexTensor; N],
    operation: impl Fn([FlexTensor; N]) -> Vec<FlexTensor>,
    plain: impl Fn([FlexTensor; N]) -> Vec<FlexTensor>,
) {
    for dtype in DTYPES {
        let low = inputs.clone().map(|x| cast(&x, dtype));
        let wide = low.clone().map(|x| cast(&x, DType::F32));
        let (got, low, exact) = (operation(low.clone()), plain(low), plain(wide));
        for (i, exact) in exact.iter().enumerate() {
            let (ours, theirs) = (error(&got[i], exact), error(&low[i], exact));
            if std::env::var_os("SHOW_ERRORS").is_some() {
                eprintln!("{ours:9.2e} of {theirs:9.2e}  {what} {i} {dtype:?}");
            }
            assert_eq!(got[i].dtype(), low[i].dtype(), "{what} {i}: element type");
            assert!(ours <= 2.0 * theirs + A_FEW_ULPS, "{what} {i} {dtype:?}: error {ours:.2e}, plain {theirs:.2e}");
        }
    }
}

#[test]
fn gemm_is_as_exact_as_the_plain_product() {
    let mut random = Random::new(1);
    let inputs = [random.tensor(&[33, 200]), random.tensor(&[200, 65]), random.tensor(&[33, 65])];
    assert_precise(
        "gemm",
        inputs,
        |[a, b, c]| vec![Flex::gemm(a, b, Maybe::Given(c), 0.5)],
        |[a, b, c]| vec![gemm::reference::<Flex>(a, b, Some(c), 0.5)],
    );
}

#[test]
fn rms_norm_is_as_exact_as_the_plain_version() {
    let mut random = Random::new(2);
    let inputs = [random.tensor(&[33, 200]), random.tensor(&[200]), random.tensor(&[33, 200])];
    assert_precise(
        "rms_norm",
        inputs,
        |[x, gamma, dy]| {
            let (dx, d_gamma) = Flex::rms_norm_backward(x.clone(), gamma.clone(), dy, 1e-5, 0.0);
            vec![Flex::rms_norm(x, gamma, 1e-5, 0.0), dx, d_gamma]
        },
        |[x, gamma, dy]| {
            let (dx, d_gamma) = rms_norm::backward_reference::<Flex>(x.clone(), gamma.clone(), dy, 1e-5, 0.0);
            vec![rms_norm::reference::<Flex>(x, gamma, 1e-5, 0.0), dx, d_gamma]
        },
    );
}

#[test]
fn column_scale_is_as_exact_as_the_plain_version() {
    let mut random = Random::new(7);
    let inputs = [random.tensor(&[33, 200]), random.tensor(&[200]), random.tensor(&[33, 200])];
    assert_precise(
        "column_scale",
        inputs,
        |[z, c, dy]| {
            let (y, kept) = Flex::column_scale(z, c.clone(), Maybe::Absent);
            let (dz, dc) = Flex::column_scale_backward(kept, c, dy, false);
            vec![y, dz, dc]
        },
        |[z, c, dy]| {
            let (y, kept) = column_scale::reference::<Flex>(z, c.clone(), None);
            let (dz, dc) = column_scale::backward_reference::<Flex>(kept, c, dy);
            vec![y, dz, dc]
        },
    );
}

#[test]
fn block_rotation_is_as_exact_as_the_plain_version() {
    let mut random = Random::new(8);
    assert_precise(
        "block_rotation",
        [random.tensor(&[33, 24]), random.tensor(&[3, 8, 8]), random.tensor(&[33, 24])],
        |[x, turn, dy]| vec![Flex::block_rotation(x.clone(), turn), Flex::block_rotation_gradient(x, dy, 8)],
        |[x, turn, dy]| {
            let gradient = block_rotation::gradient_reference::<Flex>(x.clone(), dy, 8);
            vec![block_rotation::reference::<Flex>(x, turn), gradient]
        },
    );
}

#[test]
fn rotary_is_as_exact_as_the_plain_version() {
    let mut random = Random::new(3);
    let (cos, sin) = (random.tensor(&[10, 8]), random.tensor(&[10, 8]));
    assert_precise(
        "rotary",
        [random.tensor(&[2, 5, 3, 16])],
        |[x]| vec![Flex::rotary(x, cos.clone(), sin.clone(), 1.0)],
        |[x]| vec![rotary::reference::<Flex>(x, cos.clone(), sin.clone(), 1.0)],
    );
}

#[test]
fn gated_is_as_exact_as_the_plain_version() {
    let mut random = Random::new(4);
    for act in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        let inputs = [random.tensor(&[33, 200]), random.tensor(&[33, 200]), random.tensor(&[33, 200])];
        assert_precise(
            &format!("gated {act:?}"),
            inputs,
            |[gate, up, dy]| {
                let (d_gate, d_up) = Flex::gated_backward(gate.clone(), up.clone(), dy, act);
                vec![Flex::gated(gate, up, act), d_gate, d_up]
            },
            |[gate, up, dy]| {
                let (d_gate, d_up) = gated::backward_reference::<Flex>(gate.clone(), up.clone(), dy, act);
                vec![gated::reference::<Flex>(gate, up, act), d_gate, d_up]
            },
        );
    }
}

#[test]
fn cross_entropy_is_as_exact_as_the_plain_version() {
    let mut random = Random::new(5);
    let targets = integers(&(0..33).map(|i| i * 7 - 10).collect::<Vec<_>>(), &[33]);
    let both = |(loss, gradient)| vec![loss, gradient];
    assert_precise(
        "cross_entropy",
        [random.tensor(&[33, 300])],
        |[logits]| both(Flex::cross_entropy(logits, targets.clone(), 0.0)),
        |[logits]| both(cross_entropy::reference::<Flex>(logits, targets.clone(), 0.0)),
    );
}

#[test]
fn attention_is_as_exact_as_the_plain_version() {
    let mut random = Random::new(6);
    let (q, k, v) = (random.tensor(&[2, 70, 4, 16]), random.tensor(&[2, 70, 2, 16]), random.tensor(&[2, 70, 2, 16]));
    let causal: Vec<i32> = (0..140).flat_map(|row| [0, row % 70 + 1]).collect();
    let ranges = integers(&causal, &[2, 70, 2]);
    let three = |(dq, dk, dv)| vec![dq, dk, dv];
    assert_precise(
        "attention",
        [q, k, v, random.tensor(&[2, 70, 4, 16])],
        |[q, k, v, dy]| {
            let (ranges, hints) = (ranges.clone(), AttentionHints::default());
            let (out, lse) = Flex::range_attention(q.clone(), k.clone(), v.clone(), ranges.clone(), 0.25, 0.0, hints);
            let grads = Flex::range_attention_backward(q, k, v, out.clone(), lse, dy, ranges, 0.25, 0.0, hints);
            [vec![out], three(grads)].concat()
        },
        |[q, k, v, dy]| {
            let (out, lse) = attention::reference::<Flex>(q.clone(), k.clone(), v.clone(), ranges.clone(), 0.25, 0.0);
            let grads = attention::backward_reference::<Flex>(q, k, v, out.clone(), lse, dy, ranges.clone(), 0.25, 0.0);
            [vec![out], three(grads)].concat()
        },
    );
}
