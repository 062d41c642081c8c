//! DCT-AdamW against its formulas in f64 on the host.
#![allow(clippy::unwrap_used)]
use burn::tensor::FloatDType;

use super::selection::Sources;
use super::*;
use crate::Directions;
use crate::optim::host_oracle::{Host, RULE, assert_resumes, device, random};

fn optimizer(config: &DctAdamWConfig, dims: [usize; 2]) -> DctAdamW {
    DctAdamW::new(config.clone(), "w", 3, dims, DctBases::default())
}

fn small() -> DctAdamWConfig {
    DctAdamWConfig { rank: 3, ..DctAdamWConfig::default() }
}

fn q(d: usize) -> Host {
    Host::of(&linalg::dct::basis(d, &Device::flex()))
}

/// Some columns of Q.
fn columns(q: &Host, indices: &[u32]) -> Host {
    Host::new(q.rows, indices.len(), |i, j| q.at(i, indices[j] as usize))
}

/// Six steps against the formulas, all on the input side; `flip` runs the optimiser on the transposed problem.
fn compare(config: &DctAdamWConfig, flip: bool) {
    let (m, n, r) = (6, 9, config.rank);
    let turned = |host: &Host| if flip { host.t() } else { host.clone() };
    let mut dct = optimizer(config, if flip { [n, m] } else { [m, n] });
    let (b1, b2) = config.betas;
    let q = q(m);
    let mut weight = device(&turned(&Host::of(&random(7, m, n))));
    let (mut first, mut second) = (Host::zeros(r, n), Host::zeros(r, n));
    let mut error = Host::zeros(m, n);
    let mut old: Option<Vec<u32>> = None;
    for t in 1..=6 {
        let gradient = Host::of(&random(t as u64, m, n));
        let before = turned(&Host::of(&weight));
        weight = dct.step(weight, device(&turned(&gradient)), RULE);
        let a = gradient.map(|g| 0.5 * g).zip(&error, |g, e| g + e);
        if t == 1 || t % config.update_proj_gap as i32 == 0 {
            let s = q.t().mul(&a);
            let power = if config.score == Score::L1 { 1 } else { 2 };
            let score = |i: usize| (0..n).map(|j| s.at(i, j).abs().powi(power)).sum::<f64>();
            let mut order: Vec<usize> = (0..m).collect();
            order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            let mut chosen: Vec<u32> = order[..r].iter().map(|&index| index as u32).collect();
            chosen.sort_unstable();
            assert_eq!(dct.indices().unwrap(), chosen);
            if let (Some(old), true) = (&old, config.rotate_subspace) {
                // The explicit O^T M.
                let o = columns(&q, old).t().mul(&columns(&q, &chosen));
                first = o.t().mul(&first);
                second = o.t().mul(&second).map(f64::abs);
            }
            old = Some(chosen);
        }
        let p = columns(&q, old.as_ref().unwrap());
        let low = p.t().mul(&a);
        if config.error_feedback {
            error = a.zip(&p.mul(&low), |a, inside| a - inside);
            turned(&Host::of(dct.error.as_ref().unwrap())).assert_close(&error, 1e-5);
        }
        first = first.zip(&low, |m, r| b1 * m + (1.0 - b1) * r);
        second = second.zip(&low, |v, r| b2 * v + (1.0 - b2) * r * r);
        let (c1, c2) = (1.0 - b1.powi(t), 1.0 - b2.powi(t));
        let step = p.mul(&first.zip(&second, |m, v| (m / c1) / ((v / c2).sqrt() + config.eps)));
        let expected = before.zip(&step, |w, u| (1.0 - 0.05 * 0.1) * w - 0.05 * u);
        turned(&Host::of(&weight)).assert_close(&expected, 1e-5);
        // Contraction, and what is lost is exactly what is not kept.
        let lost = a.zip(&p.mul(&low), |a, inside| a - inside).norm().powi(2);
        assert!((lost - (a.norm().powi(2) - low.norm().powi(2))).abs() < 1e-4 * a.norm().powi(2));
        if config.score == Score::L2 && config.update_proj_gap == 1 {
            assert!(lost <= (1.0 - r as f64 / m as f64) * a.norm().powi(2) * 1.000_01);
        }
    }
}

#[test]
fn steps_follow_the_formulas() {
    for config in [
        small(),
        DctAdamWConfig { update_proj_gap: 3, ..small() },
        DctAdamWConfig { score: Score::L1, update_proj_gap: 2, ..small() },
        DctAdamWConfig { error_feedback: true, ..small() },
        DctAdamWConfig { rotate_subspace: false, ..small() },
    ] {
        compare(&config, false);
        compare(&config, true);
    }
}

#[test]
fn no_other_directions_do_better() {
    let gradient = random(4, 5, 8);
    let mut dct = optimizer(&DctAdamWConfig { rank: 2, ..small() }, [5, 8]);
    dct.step(random(1, 5, 8), gradient.clone(), RULE);
    let (q, g) = (q(5), Host::of(&gradient));
    let kept = |indices: &[u32]| columns(&q, indices).t().mul(&g).norm();
    let ours = kept(&dct.indices().unwrap());
    for a in 0..5 {
        for b in 0..a {
            assert!(kept(&[b, a]) <= ours + 1e-6);
        }
    }
    let energy = dct.report().energy.unwrap();
    assert!((energy - (ours / g.norm()).powi(2)).abs() < 1e-5);
}

#[test]
fn all_directions_lose_nothing() {
    let mut dct = optimizer(&DctAdamWConfig { rank: 9, error_feedback: true, ..small() }, [4, 6]);
    dct.step(random(1, 4, 6), random(2, 4, 6), RULE);
    assert_eq!(dct.indices().unwrap(), [0, 1, 2, 3]);
    assert!(Host::of(dct.error.as_ref().unwrap()).norm() < 1e-5);
}

/// Moments follow their directions, whichever are new; the share that was kept is what the indices say.
#[test]
fn moments_follow_their_directions() {
    let device = Device::flex();
    for (old, new) in [([1, 4, 7], [1, 4, 7]), ([1, 4, 7], [0, 4, 9]), ([1, 4, 7], [4, 5, 7]), ([1, 2, 3], [4, 5, 6])] {
        let sources = Sources::of(&indices_on(&new, &device), indices_on(&old, &device));
        let moment = Host::of(&random(5, 3, 4));
        for axis in [0, 1] {
            let turned = |host: &Host| if axis == 0 { host.clone() } else { host.t() };
            let moved = turned(&Host::of(&sources.moved(self::device(&turned(&moment)), axis)));
            let expected = Host::new(3, 4, |i, j| match old.iter().position(|&index| index == new[i]) {
                Some(source) => moment.at(source, j),
                None => 0.0,
            });
            moved.assert_close(&expected, 0.0);
        }
        let kept = new.iter().filter(|&index| old.contains(index)).count();
        assert_eq!(sources.is_kept.sum().into_scalar::<i32>() as usize, kept);
    }
}

#[test]
fn factor_scores_are_those_of_the_gradient() {
    // t = 2 < 5 * 8 / 13 takes the Gram matrix, t = 40 the sketch.
    for dims in [[5, 8], [8, 5]] {
        for tokens in [2, 40] {
            let dct = optimizer(&small(), dims);
            let (x, dy) = (random(1, tokens, dims[0]), random(2, tokens, dims[1]));
            let g = Host::of(&x).t().mul(&Host::of(&dy));
            let all = if dims[0] < dims[1] { q(5).t().mul(&g) } else { q(5).t().mul(&g.t()) };
            let exact = all.norms(1);
            let scores = linalg::host(dct.factor_scores(&x, &dy));
            assert_eq!(scores.len(), 5);
            let total: f64 = exact.iter().map(|norm| norm * norm).sum();
            for (score, norm) in scores.iter().zip(exact) {
                // A sketched score has a relative deviation of sqrt(2 / 32); the bound is four of them.
                let bound = if tokens == 2 { 1e-5 * total } else { norm * norm };
                assert!((f64::from(*score) - norm * norm).abs() <= bound, "{score} {}", norm * norm);
            }
        }
    }
}

#[test]
fn projected_and_full_gradients_give_the_same_steps() {
    // With few tokens the scores are exact, so both select the same directions.
    for (dims, gap, micro_batches) in [([6, 9], 1, 1), ([6, 9], 3, 2), ([9, 6], 3, 1), ([9, 6], 1, 1)] {
        let config = DctAdamWConfig { update_proj_gap: gap, ..small() };
        let mut full = optimizer(&config, dims);
        let mut projected = optimizer(&DctAdamWConfig { projected: true, ..config }, dims);
        let mut weight = random(7, dims[0], dims[1]);
        let mut copy = weight.clone();
        for t in 0..7u64 {
            let collect = projected.collect(micro_batches);
            let (mut whole, mut low): (Option<Tensor<2>>, Option<Tensor<2>>) = (None, None);
            for batch in 0..micro_batches as u64 {
                // The first micro batch dominates, so that its selection is that of the sum.
                let size = if batch == 0 { 1.0 } else { 1e-3 };
                let x = random(100 + 10 * t + batch, 3, dims[0]) * size;
                let dy = random(200 + 10 * t + batch, 3, dims[1]);
                let g = kernels::gemm(x.clone().transpose(), dy.clone(), None, 1.0);
                let part = match &collect {
                    Gradient::Factors { .. } => projected.observe(x, dy),
                    Gradient::Projected { left, right, .. } => {
                        let values = |side: &Option<Directions>| side.as_ref().map(|side| side.values(FloatDType::F32));
                        let basis = Basis { left: values(left), right: values(right) };
                        basis.project(g.clone())
                    }
                    Gradient::Full => unreachable!("projected"),
                };
                whole = Some(whole.map_or(g.clone(), |sum| sum + g));
                low = Some(low.map_or(part.clone(), |sum| sum + part));
            }
            let is_refresh = t == 0 || (t + 1) % gap == 0;
            assert_eq!(matches!(collect, Gradient::Factors { .. }), is_refresh, "step {t}");
            assert!(matches!(full.collect(micro_batches), Gradient::Full));
            weight = full.step(weight, whole.unwrap(), RULE);
            copy = projected.step(copy, low.unwrap(), RULE);
            assert_eq!(full.indices(), projected.indices(), "step {t}");
            Host::of(&copy).assert_close(&Host::of(&weight), 1e-5);
        }
        assert_eq!(full.state_bytes(), projected.state_bytes());
    }
}

#[test]
fn bases_are_shared_by_size() {
    let (bases, device) = (DctBases::default(), Device::flex());
    for d in [4, 6, 4] {
        assert_eq!(bases.clone().get(d, &device).dims(), [d, d]);
    }
    assert_eq!(bases.bytes(), 4 * (16 + 36));
}

#[test]
fn a_restored_optimiser_continues_bit_by_bit() {
    for split in [0, 1, 3, 4] {
        for config in [
            small(),
            DctAdamWConfig { update_proj_gap: 3, ..small() },
            DctAdamWConfig { error_feedback: true, ..small() },
        ] {
            assert_resumes(|| Box::new(optimizer(&config, [5, 4])), [5, 4], split, 8);
        }
    }
    let mut dct = optimizer(&small(), [4, 6]);
    dct.step(random(1, 4, 6), random(2, 4, 6), RULE);
    assert_eq!(dct.state_bytes(), 4 * (2 * 3 * 6 + 3));
    let mut state = dct.save();
    state.bytes.insert("indices".to_owned(), vec![1, 0, 0, 0]);
    assert!(optimizer(&small(), [4, 6]).restore(state).unwrap_err().contains("indices"));
}

#[test]
fn a_restored_projected_optimiser_collects_the_same() {
    let config = DctAdamWConfig { projected: true, update_proj_gap: 10, ..small() };
    let mut dct = optimizer(&config, [4, 6]);
    assert!(matches!(dct.collect(1), Gradient::Factors { .. }));
    let low = dct.observe(random(1, 8, 4), random(2, 8, 6));
    let weight = dct.step(random(3, 4, 6), low, RULE);
    let mut fresh = optimizer(&config, [4, 6]);
    fresh.restore(dct.save()).unwrap();
    let mut results = vec![];
    for dct in [&mut dct, &mut fresh] {
        let Gradient::Projected { left: Some(left), right: None, .. } = dct.collect(1) else {
            unreachable!("no refresh")
        };
        let left = left.values(FloatDType::F32);
        let low = kernels::gemm(left.transpose(), random(4, 4, 6), None, 1.0);
        results.push(linalg::host(dct.step(weight.clone(), low, RULE)));
    }
    assert_eq!(results[0], results[1]);
}

#[test]
fn impossible_combinations_are_refused() {
    let config = DctAdamWConfig { projected: true, ..small() };
    assert!(config.check().is_ok());
    assert!(DctAdamWConfig { error_feedback: true, ..config.clone() }.check().is_err());
    assert!(DctAdamWConfig { score: Score::L1, ..config }.check().is_err());
}
