//! Convolutions with an adapter: starts, the cheap forms against the merged kernel, gradients, what is refused.
#![allow(clippy::unwrap_used)]
use burn::tensor::Device;

use super::*;
use crate::adapters::checks::{assert_close, check_gradient, host, normal, trained_values};

const LORA: LoraConvSettings = LoraConvSettings { r: 3, scale: 1.5, dropout: 0.0, init: LoraInit::KaimingUniform };
const TUCKER: TuckerConvSettings = TuckerConvSettings { ranks: [3, 2, 2, 1], scale: 4.0, dropout: 0.0 };

fn random(name: &str, dims: [usize; 4]) -> Tensor<4> {
    normal(name, 1, dims.iter().product()).reshape(dims)
}

/// Kernels of 3 x 2, with every combination of geometries.
fn bases() -> Vec<ConvProjection> {
    let bias: Tensor<1> = Tensor::from_floats([0.1, -0.2, 0.3, 0.4, -0.5], &Device::flex());
    let base = || ConvProjection::frozen(random("w", [5, 4, 3, 2]), Some(bias.clone()));
    vec![
        base(),
        ConvProjection { stride: [2, 1], ..base() },
        ConvProjection { padding: [1, 2], ..base() },
        ConvProjection { dilation: [2, 3], ..base() },
        ConvProjection { stride: [2, 2], padding: [1, 1], dilation: [2, 1], ..base() },
    ]
}

fn moved(mut conv: ConvProjection) -> ConvProjection {
    conv.delta = Some(match conv.delta.take().unwrap() {
        ConvDelta::Lora(lora) => {
            let up = random("up", lora.up.dims());
            ConvDelta::Lora(LoraConv { up: lora.up.map(|_| up), ..lora })
        }
        ConvDelta::Tucker(tucker) => {
            let core = random("core", tucker.core.dims());
            ConvDelta::Tucker(TuckerConv { core: tucker.core.map(|_| core), ..tucker })
        }
    });
    conv
}

fn attached(mut conv: ConvProjection, is_tucker: bool) -> ConvProjection {
    if is_tucker {
        conv.attach_tucker(TUCKER, "layer", 1).unwrap();
        assert_eq!(trained_values(&conv), TUCKER.parameters([5, 4, 3, 2]));
    } else {
        conv.attach_lora(LORA, "layer", 1).unwrap();
        assert_eq!(trained_values(&conv), LORA.parameters([5, 4, 3, 2]));
    }
    conv
}

#[test]
fn starts_as_the_base_and_cheap_forms_equal_the_merged_kernel() {
    let x = random("x", [2, 4, 9, 8]);
    for base in bases() {
        let plain = base.forward(x.clone(), true);
        for is_tucker in [false, true] {
            let conv = attached(base.clone(), is_tucker);
            assert_close(conv.forward(x.clone(), true), plain.clone(), 0.0);
            let conv = moved(conv);
            let y = conv.forward(x.clone(), false);
            let mut merged = conv;
            merged.merge();
            assert!(merged.delta.is_none());
            assert_close(merged.forward(x.clone(), false), y.clone(), 2e-6);
            let distance = host((y - plain.clone()).abs().max().reshape([1, 1]))[0];
            assert!(distance > 0.1);
        }
    }
}

#[test]
fn the_tucker_kernel_is_its_sum() {
    let conv = moved(attached(bases().remove(0), true));
    let Some(ConvDelta::Tucker(tucker)) = &conv.delta else { unreachable!() };
    let flat = |t: Tensor<4>| {
        let n = t.shape().num_elements();
        host(t.reshape([1, n]))
    };
    let [r1, r0, r2, r3] = tucker.core.dims();
    let core = flat(tucker.core.val());
    let [p0, p1, p2, p3] = [&tucker.down, &tucker.up, &tucker.rows, &tucker.columns].map(|p| host(p.val()));
    let mut want = vec![];
    for at in 0..5 * 4 * 3 * 2 {
        let (o, i, h, w) = (at / 24, at / 6 % 4, at / 2 % 3, at % 2);
        let mut sum = 0.0f64;
        for (index, &value) in core.iter().enumerate() {
            let (b, a, c, d) = (index / (r0 * r2 * r3), index / (r2 * r3) % r0, index / r3 % r2, index % r3);
            let factors = [value, p0[a * 4 + i], p1[o * r1 + b], p2[h * r2 + c], p3[w * r3 + d]];
            sum += factors.into_iter().map(f64::from).product::<f64>();
        }
        want.push((4.0 * sum) as f32);
    }
    let want = Tensor::<1>::from_data(want.as_slice(), &Device::flex()).reshape([5, 4, 3, 2]);
    assert_close(conv.delta.unwrap().delta(), want, 2e-6);
}

fn tucker_with(mut conv: ConvProjection, change: impl FnOnce(TuckerConv) -> TuckerConv) -> ConvProjection {
    conv.delta = conv.delta.map(|delta| match delta {
        ConvDelta::Tucker(tucker) => ConvDelta::Tucker(change(tucker)),
        ConvDelta::Lora(_) => unreachable!(),
    });
    conv
}

fn tucker_of(conv: &ConvProjection) -> TuckerConv {
    match &conv.delta {
        Some(ConvDelta::Tucker(tucker)) => tucker.clone(),
        _ => unreachable!(),
    }
}

fn lora_of(conv: &ConvProjection) -> LoraConv {
    match &conv.delta {
        Some(ConvDelta::Lora(lora)) => lora.clone(),
        _ => unreachable!(),
    }
}

fn lora_with(conv: ConvProjection, change: impl FnOnce(LoraConv) -> LoraConv) -> ConvProjection {
    let lora = change(lora_of(&conv));
    ConvProjection { delta: Some(ConvDelta::Lora(lora)), ..conv }
}

#[test]
fn gradients_agree_with_differences_and_the_base_has_none() {
    let x = random("x", [2, 4, 7, 6]);
    let run = |conv: &ConvProjection| conv.forward(x.clone(), false);
    let base = bases().remove(4);
    let lora = moved(attached(base.clone(), false));
    check_gradient(&lora, run, |c| lora_of(c).down, |c, v| lora_with(c, |l| LoraConv { down: l.down.map(|_| v), ..l }));
    check_gradient(&lora, run, |c| lora_of(c).up, |c, v| lora_with(c, |l| LoraConv { up: l.up.map(|_| v), ..l }));
    let tucker = moved(attached(base, true));
    check_gradient(
        &tucker,
        run,
        |c| tucker_of(c).core,
        |c, v| tucker_with(c, |t| TuckerConv { core: t.core.map(|_| v), ..t }),
    );
    check_gradient(
        &tucker,
        run,
        |c| tucker_of(c).down,
        |c, v| tucker_with(c, |t| TuckerConv { down: t.down.map(|_| v), ..t }),
    );
    check_gradient(
        &tucker,
        run,
        |c| tucker_of(c).up,
        |c, v| tucker_with(c, |t| TuckerConv { up: t.up.map(|_| v), ..t }),
    );
    check_gradient(
        &tucker,
        run,
        |c| tucker_of(c).rows,
        |c, v| tucker_with(c, |t| TuckerConv { rows: t.rows.map(|_| v), ..t }),
    );
    check_gradient(
        &tucker,
        run,
        |c| tucker_of(c).columns,
        |c, v| tucker_with(c, |t| TuckerConv { columns: t.columns.map(|_| v), ..t }),
    );
    for conv in [lora, tucker] {
        let lifted = conv.train();
        let gradients = lifted.forward(x.clone(), false).sum().backward();
        assert!(lifted.weight.val().grad(&gradients).is_none());
        assert!(lifted.bias.unwrap().val().grad(&gradients).is_none());
    }
}

#[test]
fn dropout_is_of_the_deltas_input_alone() {
    let x = random("x", [2, 4, 9, 8]);
    for is_tucker in [false, true] {
        let base = bases().remove(0);
        let mut conv = moved(attached(base.clone(), is_tucker));
        conv.delta.as_mut().unwrap().set_dropout(1.0);
        assert_close(conv.forward(x.clone(), true), base.forward(x.clone(), true), 0.0);
        let full = conv.forward(x.clone(), false);
        assert!(host((full - base.forward(x.clone(), true)).abs().max().reshape([1, 1]))[0] > 0.1);
    }
}

#[test]
fn groups_and_empty_ranks_are_refused() {
    let mut conv = ConvProjection { groups: 2, ..ConvProjection::frozen(random("w", [4, 2, 3, 3]), None) };
    let error = conv.attach_lora(LORA, "stem.conv", 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "stem.conv: lora cannot adapt a convolution of 2 groups, only of 1; exclude the module"
    );
    assert_eq!(conv.forward(random("x", [1, 4, 5, 5]), false).dims(), [1, 4, 3, 3]); // the base itself has groups
    let mut conv = ConvProjection::frozen(random("w", [4, 2, 3, 3]), None);
    let settings = TuckerConvSettings { ranks: [2, 2, 0, 1], ..TUCKER };
    let error = conv.attach_tucker(settings, "stem", 1).unwrap_err();
    assert_eq!(error.to_string(), "stem: r_rows of tucker is 0, expected at least 1");
}

#[test]
fn ranks_of_rows_and_columns_end_at_the_kernel() {
    for [kh, kw] in [[1, 1], [3, 1], [2, 2]] {
        let mut conv = ConvProjection::frozen(random("w", [5, 4, kh, kw]), None);
        let settings = TuckerConvSettings { ranks: [3, 2, 2, 2], ..TUCKER };
        conv.attach_tucker(settings, "layer", 1).unwrap();
        assert_eq!(tucker_of(&conv).core.dims(), [2, 3, 2.min(kh), 2.min(kw)]);
        assert_eq!(trained_values(&conv), settings.parameters([5, 4, kh, kw]));
    }
}

#[test]
fn the_factor_of_a_lora_starts_as_it_is_told() {
    let mut conv = ConvProjection::frozen(random("w", [4, 50, 3, 3]), None);
    let fan = 50.0 * 9.0;
    for (init, variance) in [(LoraInit::KaimingUniform, 1.0 / (3.0 * fan)), (LoraInit::Gaussian, 1.0 / 9.0)] {
        conv.attach_lora(LoraConvSettings { init, ..LORA }, "layer", 1).unwrap();
        let values = host(lora_of(&conv).down.val().reshape([1, 3 * 450]));
        let got = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / values.len() as f64;
        // Relative standard error sqrt(2 / n) or less, four of them at n = 1350.
        assert!((got / variance - 1.0).abs() < 0.16, "{got} for {variance}");
    }
}
