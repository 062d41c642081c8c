//! What every start promises: equalities of the papers' linear algebra, checked in f32.
#![allow(clippy::unwrap_used)]

use burn::module::Param;
use burn::tensor::Tensor;

use super::corda::{Corda, CordaMethod};
use super::eora::Eora;
use super::lora_sb::LoraSb;
use super::lora_xs::LoraXs;
use super::olora::Olora;
use super::pissa::Pissa;
use super::start::row;
use super::svfit::Svfit;
use super::testing::*;
use super::{Site, StartError, Statistics};
use crate::linalg::{self, svd};
use crate::{Delta, LowRank, Projection};

/// f32 against f32, normwise; the worst seen is 2.5e-7.
const NEAR: f64 = 1e-6;
/// Remainders and defects, in which roundings of a whole decomposition gather.
const CLOSE: f64 = 1e-5;
const SHAPES: [[usize; 2]; 3] = [[24, 24], [20, 33], [33, 20]];

fn ab(delta: &LowRank) -> Tensor<2> {
    product(&delta.down.val(), &delta.up.val())
}

fn values(delta: &LowRank) -> (Tensor<2>, Tensor<2>) {
    (delta.down.val(), delta.up.val())
}

fn diagonal(values: &[f64]) -> Tensor<2> {
    Tensor::eye(values.len(), &device()) * row(values.iter().copied(), &device())
}

/// `sum_{i >= r} s_i^2`, as a norm.
fn tail(values: &[f64], r: usize) -> f64 {
    values[r..].iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The base of a layer after the delta was attached.
fn base(weight: &Tensor<2>, delta: LowRank) -> Tensor<2> {
    let mut projection = Projection::frozen(weight.clone(), None);
    projection.attach(Delta::LowRank(delta));
    projection.weight.values()
}

/// The rank-2r form over the unchanged weight: `[A | A_0]`, `[B; -B_0]`, the same s.
fn doubled(delta: &LowRank) -> LowRank {
    let start = delta.start.as_ref().unwrap();
    let down = Tensor::cat(vec![delta.down.val(), start.down.val()], 1);
    let up = Tensor::cat(vec![delta.up.val(), -start.up.val()], 0);
    LowRank::new(down, up, delta.scale, 0.0)
}

/// The start is exact, and after some training the rank-2r form over W is the same layer.
fn check_exact_start(weight: &Tensor<2>, delta: LowRank) {
    let residual = base(weight, delta.clone());
    let (down, up) = values(&delta);
    assert_near("start", &(residual.clone() + product(&down, &up) * delta.scale), weight, NEAR);
    let noise = |factor: &Tensor<2>, name| factor.clone() + normal(name, factor.dims()[0], factor.dims()[1]) * 0.1;
    let (a, b) = (noise(&down, "a"), noise(&up, "b"));
    let trained = LowRank { down: Param::from_tensor(a), up: Param::from_tensor(b), ..delta };
    assert_near("rank 2r", &(weight.clone() + doubled(&trained).delta()), &(residual + trained.delta()), NEAR);
}

#[test]
fn pissa_moves_the_leading_part_of_the_weight() {
    for [d_in, d_out] in SHAPES {
        let (weight, r) = (weight(d_in, d_out), 5);
        let exact = svd(weight.clone(), d_in);
        for (scale, niter) in [(1.0f32, None), (2.5, None), (0.5, Some(16))] {
            let delta = Pissa { r, scale, dropout: 0.0, niter }.init(&site(&weight, None, None)).unwrap();
            check_exact_start(&weight, delta.clone());
            // The spectrum is flat, so the randomised part is a little less than the best.
            let limit = if niter.is_some() { 1e-3 } else { CLOSE };
            let (down, up) = values(&delta);
            let square = diagonal(&exact.values[..r].iter().map(|v| v / f64::from(scale)).collect::<Vec<_>>());
            assert_near("A^T A", &product(&t(&down), &down), &square, limit);
            assert_near("B B^T", &product(&up, &t(&up)), &square, limit);
            let rest = norm(&base(&weight, delta));
            assert!((rest / tail(&exact.values, r) - 1.0).abs() < limit, "{rest}");
        }
        let whole = Pissa { r: d_in.min(d_out), scale: 2.0, dropout: 0.0, niter: None };
        let delta = whole.init(&site(&weight, None, None)).unwrap();
        assert!(norm(&base(&weight, delta)) < CLOSE * norm(&weight));
    }
}

#[test]
fn olora_moves_the_first_steps_of_a_qr() {
    for [d_in, d_out] in SHAPES {
        let (weight, r) = (weight(d_in, d_out), 5);
        let delta = Olora { r, scale: 1.5, dropout: 0.0 }.init(&site(&weight, None, None)).unwrap();
        check_exact_start(&weight, delta.clone());
        let (down, up) = values(&delta);
        assert!(defect(&t(&up)) < CLOSE);
        // R is upper triangular and W^T = Q R up to the columns that Q has not reached.
        for (i, line) in linalg::host(t(&down)).chunks(d_in).enumerate() {
            assert!(line[..i].iter().all(|entry| entry.abs() < 1e-5) && line[i] > 0.0);
        }
        assert_near("first rows", &ab(&delta).narrow(0, 0, r), &weight.clone().narrow(0, 0, r), NEAR);
        let whole = Olora { r: d_in.min(d_out), scale: 1.0, dropout: 0.0 };
        let delta = whole.init(&site(&weight, None, None)).unwrap();
        assert!(norm(&base(&weight, delta)) < CLOSE * norm(&weight));
    }
}

fn corda(weight: &Tensor<2>, covariance: Tensor<2>, method: CordaMethod, scale: f32, r: usize) -> LowRank {
    let statistics = Statistics { covariance: Some(covariance), gradient: None, samples: 1 };
    Corda { r, scale, dropout: 0.0, method }.init(&site(weight, Some(&statistics), None)).unwrap()
}

#[test]
fn corda_moves_a_projection_of_the_weight() {
    for [d_in, d_out] in SHAPES {
        let (weight, r) = (weight(d_in, d_out), 5);
        let covariance = statistics(d_in, d_out).covariance.unwrap();
        for (method, scale) in [(CordaMethod::Ipm, 1.0f32), (CordaMethod::Kpm, 2.0)] {
            let delta = corda(&weight, covariance.clone(), method, scale, r);
            check_exact_start(&weight, delta.clone());
            // s A B = W U U^T with U the normalised rows of B.
            let (_, up) = values(&delta);
            let lengths = up.clone().square().sum_dim(1).sqrt();
            let u = t(&(up / lengths));
            assert!(defect(&u) < CLOSE);
            let moved = product(&product(&weight, &u), &t(&u));
            assert_near("s A B", &(ab(&delta) * scale), &moved, NEAR);
            // Inputs of another size change nothing.
            let scaled = corda(&weight, covariance.clone() * 49.0, method, scale, r);
            assert_near("scaled inputs", &ab(&scaled), &ab(&delta), 1e-4);
        }
        // C = I: the leading part of W, as PiSSA.
        let plain = corda(&weight, Tensor::eye(d_in, &device()), CordaMethod::Ipm, 1.0, r);
        let pissa = Pissa { r, scale: 1.0, dropout: 0.0, niter: None }.init(&site(&weight, None, None)).unwrap();
        assert_near("C = I", &ab(&plain), &ab(&pissa), 1e-4);
    }
}

#[test]
fn corda_leaves_the_least_error_for_the_covariance() {
    for [d_in, d_out] in SHAPES {
        let (weight, r) = (weight(d_in, d_out), 6);
        let covariance = statistics(d_in, d_out).covariance.unwrap();
        let mean = linalg::host(covariance.clone() * Tensor::eye(d_in, &device())).iter().sum::<f32>() / d_in as f32;
        let damped = covariance.clone() + Tensor::<2>::eye(d_in, &device()) * (0.01 * mean);
        let exact = svd(product(&damped, &weight), d_in);
        let top = ab(&corda(&weight, covariance.clone(), CordaMethod::Ipm, 1.0, r));
        let error = norm(&product(&damped, &(weight.clone() - top)));
        assert!((error / tail(&exact.values, r) - 1.0).abs() < 1e-4, "{error}");
        // The r smallest triples hold exactly what the others leave.
        let low = ab(&corda(&weight, covariance, CordaMethod::Kpm, 1.0, r));
        let kept = norm(&product(&damped, &low));
        let k = exact.values.len();
        assert!((kept / tail(&exact.values, k - r) - 1.0).abs() < 1e-3, "{kept}");
    }
}

#[test]
fn corda_survives_a_single_direction_and_weights_without_rank() {
    let d = 40;
    let weight = weight(d, 24);
    let big = row((0..d).map(|i| if i == 0 { 1e7 } else { 1e-7 }), &device());
    let q = linalg::orthonormal(normal("rotation", d, d));
    let covariance = product(&(q.clone() * big), &t(&q));
    for method in [CordaMethod::Ipm, CordaMethod::Kpm] {
        check_exact_start(&weight, corda(&weight, covariance.clone(), method, 1.0, 4));
    }
    // A weight of rank 3 and the zero weight: the small triples are all zero.
    let thin = product(&normal("thin", d, 3), &normal("thin too", 3, 24));
    let delta = corda(&thin, covariance.clone(), CordaMethod::Kpm, 1.0, 6);
    assert!(norm(&ab(&delta)) < 1e-4 * norm(&thin));
    let nothing = corda(&Tensor::zeros([d, 24], &device()), covariance, CordaMethod::Ipm, 1.0, 6);
    assert!(norm(&ab(&nothing)) == 0.0 && norm(&nothing.up.val()).is_finite());
}

fn eora(lost: &Tensor<2>, covariance: &Tensor<2>, r: usize) -> LowRank {
    let [d_in, d_out] = lost.dims();
    let statistics = Statistics { covariance: Some(covariance.clone()), gradient: None, samples: 1 };
    let site = site(&weight(d_in, d_out), Some(&statistics), Some(lost.clone()));
    Eora { r, dropout: 0.0, trained: true }.init(&site).unwrap()
}

#[test]
fn eora_leaves_the_least_error_of_the_outputs() {
    for [d_in, d_out] in SHAPES {
        let k = d_in.min(d_out);
        let lost = normal("lost", d_in, d_out) * 0.1;
        // Fewer inputs than d_in as well: C is then singular.
        for tokens in [7, 3 * d_in] {
            let x = normal("x", tokens, d_in) * row((0..d_in).map(|i| 10f64.powf(i as f64 / d_in as f64)), &device());
            let covariance = product(&t(&x), &x);
            let exact = svd(product(&x, &lost), k);
            let mut before = f64::INFINITY;
            for r in [1, 3, 6, k] {
                let repaired = ab(&eora(&lost, &covariance, r));
                let error = norm(&product(&x, &(lost.clone() - repaired)));
                let least = tail(&exact.values, r.min(exact.values.len()));
                assert!((error - least).abs() < 2e-5 * exact.values[0], "r {r}: {error} {least}");
                assert!(error <= before + 1e-5);
                before = error;
                let plain = svd(lost.clone(), r);
                let plain = product(&(plain.left * row(plain.values, &device())), &t(&plain.right));
                assert!(error <= norm(&product(&x, &(lost.clone() - plain))) * (1.0 + CLOSE) + 1e-4);
            }
            if d_out <= d_in {
                assert_near("r = k", &ab(&eora(&lost, &covariance, k)), &lost, NEAR);
            }
            let more = eora(&lost, &(covariance.clone() * 1e6), 4);
            assert_near("scale of C", &more.down.val(), &eora(&lost, &covariance, 4).down.val(), 1e-3);
        }
        let plain = eora(&lost, &Tensor::eye(d_in, &device()), 4);
        let best = svd(lost.clone(), 4);
        let best = product(&(best.left * row(best.values, &device())), &t(&best.right));
        assert_near("C = I", &ab(&plain), &best, 1e-4);
        assert_near(
            "balance",
            &product(&plain.up.val(), &t(&plain.up.val())),
            &product(&t(&plain.down.val()), &plain.down.val()),
            1e-4,
        );
        let none = eora(&Tensor::zeros([d_in, d_out], &device()), &Tensor::eye(d_in, &device()), 4);
        assert!(norm(&none.down.val()) == 0.0 && norm(&none.up.val()) == 0.0);
    }
}

#[test]
fn eora_follows_a_rotation_of_its_inputs() {
    let (lost, d) = (normal("lost", 18, 12), 18);
    let covariance = statistics(d, 12).covariance.unwrap();
    let q = linalg::orthonormal(normal("rotation", d, d));
    let turned = eora(&product(&q, &lost), &product(&product(&q, &covariance), &t(&q)), 4);
    assert_near("A turns", &ab(&turned), &product(&q, &ab(&eora(&lost, &covariance, 4))), 1e-4);
}

#[test]
fn lora_xs_moves_within_the_leading_part() {
    for [d_in, d_out] in SHAPES {
        let (weight, r) = (weight(d_in, d_out), 5);
        let site = site(&weight, None, None);
        let delta = LoraXs { r, scale: 2.0, dropout: 0.0 }.init(&site).unwrap();
        let exact = svd(weight.clone(), r);
        let (down, up) = values(&delta);
        assert!(defect(&down) < CLOSE);
        let squares = diagonal(&exact.values.iter().map(|value| value * value).collect::<Vec<_>>());
        assert_near("B B^T", &product(&up, &t(&up)), &squares, NEAR);
        assert!(norm(&delta.delta()) < 1e-3 * norm(&weight));
        let core = delta.core.as_ref().unwrap().val();
        assert!((norm(&core) / (1e-5 * r as f64) - 1.0).abs() < 0.5);
        let again = LoraXs { r, scale: 2.0, dropout: 0.0 }.init(&site).unwrap();
        assert_eq!(linalg::host(core), linalg::host(again.core.as_ref().unwrap().val()));
        // M = -I / s takes the top out, any M stays within its span.
        let top = product(&down, &up);
        let with = |core| LowRank::new(down.clone(), up.clone(), 2.0, 0.0).with_core(core);
        let out = with(Tensor::eye(r, &device()) * -0.5);
        assert_near("removed", &out.delta(), &-top, NEAR);
        let any = with(normal("core", r, r)).delta();
        let [left, right] = [&exact.left, &exact.right].map(|basis| product(basis, &t(basis)));
        assert_near("span", &product(&product(&left, &any), &right), &any, NEAR);
    }
}

#[test]
fn lora_sb_starts_at_the_first_step() {
    for [d_in, d_out] in SHAPES {
        let (weight, eta, r) = (weight(d_in, d_out), 3e-4, 6);
        let statistics = statistics(d_in, d_out);
        let step = statistics.gradient.clone().unwrap().sign() * -eta;
        let nonzero = linalg::host(step.clone()).iter().filter(|value| **value != 0.0).count() as f64;
        assert!(nonzero < (d_in * d_out) as f64);
        assert!((norm(&step) / (eta * nonzero.sqrt()) - 1.0).abs() < CLOSE);
        let exact = svd(step.clone(), d_in);
        let site = site(&weight, Some(&statistics), None);
        for scale in [1.0f32, 4.0] {
            let delta = LoraSb { r, scale, dropout: 0.0, eta }.init(&site).unwrap();
            let (down, up) = values(&delta);
            assert!(defect(&down) < CLOSE && defect(&t(&up)) < CLOSE);
            let core = delta.core.as_ref().unwrap().val() * scale;
            assert_near("M", &core, &diagonal(&exact.values[..r]), NEAR);
            let rest = norm(&(delta.delta() - step.clone()));
            assert!((rest / tail(&exact.values, r) - 1.0).abs() < CLOSE, "{rest}");
        }
        let whole = LoraSb { r: d_in.min(d_out), scale: 1.0, dropout: 0.0, eta }.init(&site).unwrap();
        assert_near("r = k", &whole.delta(), &step, NEAR);
    }
}

#[test]
fn svfit_is_diagonal_in_the_singular_basis() {
    for [d_in, d_out] in SHAPES {
        let (weight, k) = (weight(d_in, d_out), d_in.min(d_out));
        let site = site(&weight, None, None);
        let delta = Svfit { r: 5, dropout: 0.0 }.init(&site).unwrap();
        assert_eq!(norm(&delta.delta()), 0.0, "the start is the base to the bit");
        let sigma = delta.core.as_ref().unwrap().val();
        assert_near("S_r", &sigma, &row((0..5).map(|i| spectrum(i, k)), &device()), NEAR);
        // A file holds A^T [r, d_in], B^T [d_out, r] and sigma: what is read back is the same to the bit.
        let (down, up) = values(&delta);
        let reread = |t: Tensor<2>| {
            let dims = t.dims();
            Tensor::<2>::from_data(burn::tensor::TensorData::new(linalg::host(t), dims), &device())
        };
        let change = row([0.3, -0.2, 0.0, 1.5, -2.0], &device());
        let trained = sigma.clone() + change.clone();
        let (stored_down, stored_up) = (reread(t(&down)).transpose(), reread(t(&up)).transpose());
        let loaded = Svfit { r: 5, dropout: 0.0 }.stored(stored_down, reread(trained.clone()), stored_up, &weight);
        let kept = LowRank { core: Some(Param::from_tensor(trained)), ..delta };
        assert_eq!(linalg::host(loaded.delta()), linalg::host(kept.delta()));
        let inside = product(&product(&t(&down), &kept.delta()), &t(&up));
        assert_near("diagonal", &inside, &(Tensor::eye(5, &device()) * change), NEAR);
        // All values 0: nothing is left of W. Twice as large: W is doubled.
        let whole = Svfit { r: k, dropout: 0.0 }.init(&site).unwrap();
        let with = |factor: f32| {
            let core = Param::from_tensor(whole.core.as_ref().unwrap().val() * factor);
            weight.clone() + LowRank { core: Some(core), ..whole.clone() }.delta()
        };
        assert!(norm(&with(0.0)) < CLOSE * norm(&weight));
        assert_near("doubled", &with(2.0), &(weight.clone() * 2.0), NEAR);
    }
}

#[test]
fn what_a_start_lacks_is_named() {
    let weight = weight(12, 8);
    let rank = |result: Result<LowRank, StartError>| matches!(result, Err(StartError::Rank { d_in: 12, d_out: 8, .. }));
    let measured = statistics(12, 8);
    let full: Site<'_> = site(&weight, Some(&measured), Some(weight.clone()));
    for r in [0, 9] {
        assert!(rank(Pissa { r, scale: 1.0, dropout: 0.0, niter: None }.init(&full)));
        assert!(rank(Olora { r, scale: 1.0, dropout: 0.0 }.init(&full)));
        assert!(rank(Corda { r, scale: 1.0, dropout: 0.0, method: CordaMethod::Kpm }.init(&full)));
        assert!(rank(Eora { r, dropout: 0.0, trained: true }.init(&full)));
        assert!(rank(LoraXs { r, scale: 1.0, dropout: 0.0 }.init(&full)));
        assert!(rank(LoraSb { r, scale: 1.0, dropout: 0.0, eta: 1e-3 }.init(&full)));
        assert!(rank(Svfit { r, dropout: 0.0 }.init(&full)));
    }
    let bare = site(&weight, None, None);
    let needs = |result: Result<LowRank, StartError>| matches!(result, Err(StartError::NeedsCalibration { .. }));
    let sb = LoraSb { r: 2, scale: 1.0, dropout: 0.0, eta: 1e-3 };
    let corda = Corda { r: 2, scale: 1.0, dropout: 0.0, method: CordaMethod::Ipm };
    let eora = Eora { r: 2, dropout: 0.0, trained: false };
    assert!(needs(corda.init(&bare)) && needs(sb.init(&bare)));
    assert!(matches!(eora.init(&bare), Err(StartError::NeedsResidual { .. })));
    let zero = Statistics {
        covariance: Some(Tensor::zeros([12, 12], &device())),
        gradient: Some(Tensor::zeros([12, 8], &device())),
        samples: 1,
    };
    let empty = site(&weight, Some(&zero), Some(weight.clone()));
    let nothing = |result: Result<LowRank, StartError>| matches!(result, Err(StartError::NothingMeasured { .. }));
    assert!(nothing(corda.init(&empty)) && nothing(sb.init(&empty)) && nothing(eora.init(&empty)));
    let bad = Statistics { gradient: Some(Tensor::full([12, 8], f32::NAN, &device())), ..zero.clone() };
    assert!(nothing(sb.init(&site(&weight, Some(&bad), None))));
    let text = Pissa { r: 9, scale: 1.0, dropout: 0.0, niter: None }.init(&full).unwrap_err().to_string();
    assert!(text.contains("up_proj") && text.contains("between 1 and 8") && text.contains("got 9"), "{text}");
    let negative = Pissa { r: 2, scale: -1.0, dropout: 0.0, niter: None }.init(&full);
    assert!(matches!(negative, Err(StartError::Scale { .. })));
}
