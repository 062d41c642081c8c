//! Folding deltas: products stay what they are, and the error that is told is the one that is made.

use burn::tensor::{Device, Tensor};
use lowrank_core::LowRank;
use lowrank_core::random::Stream;

use super::fold::{self, Folded, Limit};
use super::{Module, same_rank};

fn random(name: &str, rows: usize, cols: usize) -> Tensor<2> {
    Stream::new(7, name).normal_tensor(rows, cols, 1.0, &Device::flex())
}

fn norm(x: Tensor<2>) -> f64 {
    f64::from((x.clone() * x).sum().into_scalar::<f32>()).sqrt()
}

fn product(folded: &Folded) -> Tensor<2> {
    folded.down.clone().matmul(folded.up.clone())
}

#[test]
fn every_additive_form_is_a_product_over_the_unchanged_weight() {
    let (d_in, d_out, r, s) = (9, 7, 3, 0.5);
    let lora = || LowRank::new(random("a", d_in, r), random("b", r, d_out), s, 0.0);
    let two_ranks = LowRank::new(random("a", d_in, 5), random("b", 2, d_out), s, 0.0).with_core(random("m", 5, 2));
    for (what, delta, rank) in [
        ("lora", lora(), 3),
        ("core", lora().with_core(random("m", r, r)), 3),
        ("diagonal", lora().with_core(random("m", 1, r)).with_core_start(random("m0", 1, r)), 3),
        ("scale", lora().with_core(random("m", 1, r)).with_out_scale(random("c", 1, d_out)), 3),
        ("wide core", two_ranks, 2),
    ] {
        let (down, up) = fold::factors(&delta);
        assert_eq!((down.dims(), up.dims()), ([d_in, rank], [rank, d_out]), "{what}");
        let difference = norm(down.matmul(up) * s - delta.delta());
        assert!(difference <= 1e-5 * norm(delta.delta()), "{what}: {difference}");
    }
    // The base lost s A_0 B_0 at the start, which the product must take away once more.
    let started = lora().with_start();
    let (down, up) = fold::factors(&started);
    assert_eq!((down.dims(), up.dims()), ([d_in, 6], [6, d_out]));
    assert!(norm(down.matmul(up)) <= 1e-5 * norm(started.delta()), "an untrained adapter adds nothing");
}

#[test]
fn a_product_within_the_limit_is_left_alone() {
    let (down, up) = (random("a", 8, 3), random("b", 3, 6));
    for limit in [Limit::default(), Limit { rank: Some(3), tolerance: None }] {
        let folded = fold::fold_pair(down.clone(), up.clone(), limit);
        assert_eq!((norm(folded.down - down.clone()), norm(folded.up - up.clone()), folded.error), (0.0, 0.0, 0.0));
    }
}

/// A pair is cut as its product would be, and the error is the one that is told.
#[test]
fn the_stated_error_is_the_error() {
    for (d_in, d_out, r) in [(12, 9, 5), (9, 12, 5), (6, 20, 11)] {
        let (down, up) = (random("a", d_in, r), random("b", r, d_out));
        let delta = down.clone().matmul(up.clone());
        for limit in [
            Limit { rank: Some(2), tolerance: None },
            Limit { rank: None, tolerance: Some(0.4) },
            Limit { rank: Some(4), tolerance: Some(0.01) },
        ] {
            let pair = fold::fold_pair(down.clone(), up.clone(), limit);
            let dense = fold::fold_dense(delta.clone(), limit);
            assert_eq!(pair.down.dims(), dense.down.dims());
            assert!((pair.error - dense.error).abs() < 1e-5, "{} {}", pair.error, dense.error);
            for folded in [pair, dense] {
                let error = norm(product(&folded) - delta.clone()) / norm(delta.clone());
                assert!((error - folded.error).abs() < 1e-5, "{error}, told {}", folded.error);
            }
        }
    }
}

#[test]
fn zeros_make_ranks_equal_and_change_nothing() {
    let module = |name: &str, r: usize| Module {
        name: name.to_owned(),
        is_embedding: false,
        scale: 1.0,
        folded: fold::fold_pair(random(name, 6, r), random(name, r, 5), Limit::default()),
    };
    let mut modules = vec![module("a", 2), module("b", 4)];
    let before: Vec<Tensor<2>> = modules.iter().map(|module| product(&module.folded)).collect();
    same_rank(&mut modules);
    for (module, before) in modules.iter().zip(before) {
        assert_eq!((module.folded.down.dims(), module.folded.up.dims()), ([6, 4], [4, 5]));
        assert!(norm(product(&module.folded) - before) < 1e-6);
    }
}

#[test]
fn nothing_and_what_is_not_finite() {
    let nothing = fold::fold_dense(Tensor::zeros([4, 3], &Device::flex()), Limit::default());
    assert_eq!((nothing.down.dims(), norm(product(&nothing)), nothing.error), ([4, 1], 0.0, 0.0));
    let broken = random("a", 4, 3) * f32::NAN;
    assert!(fold::fold_dense(broken.clone(), Limit::default()).error.is_nan());
    let limit = Limit { rank: Some(1), tolerance: None };
    assert!(fold::fold_pair(broken, random("b", 3, 5), limit).error.is_nan());
}
