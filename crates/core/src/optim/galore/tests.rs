//! The equalities of projected training: everything that is exact in exact arithmetic, checked in f32.
//!
//! The task of most tests is a linear regression: `loss = ||x W - y||^2 / 2`, so `dy = x W - y` and `dW = x^T dy`. A method
//! is driven as a training step drives it: it says what it wants collected, and gets that from x and dy.
#![allow(clippy::unwrap_used, clippy::panic)]

use burn::tensor::Device;

use super::*;
use crate::linalg;
use crate::optim::q_galore::Quantised;
use crate::optim::{AdamForm, AdamW, AdamWConfig, ProjType, RuleConfig};

/// f32 against f32, normwise; the worst seen is a third of it.
const CLOSE: f64 = 1e-5;

fn device() -> Device {
    Device::flex()
}

fn normal(seed: u64, rows: usize, cols: usize) -> Tensor<2> {
    linalg::gaussian(seed, "test", rows, cols, 1.0, &device())
}

fn product(a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    kernels::gemm(a.clone(), b.clone(), None, 1.0)
}

fn norm(a: &Tensor<2>) -> f64 {
    linalg::host(a.clone()).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

#[track_caller]
fn assert_near(what: &str, got: &Tensor<2>, want: &Tensor<2>, limit: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let error = norm(&(got.clone() - want.clone())) / norm(want).max(1e-30);
    assert!(error <= limit, "{what}: relative error {error:.2e}, allowed {limit:.0e}");
}

fn adam(form: AdamForm) -> RuleConfig {
    RuleConfig::AdamW { betas: (0.9, 0.99), eps: 1e-6, form }
}

fn exact(rank: usize, gap: u64, proj_type: ProjType) -> GaloreConfig {
    GaloreConfig {
        rank,
        update_proj_gap: gap,
        proj_type,
        exact: true,
        align_sign: false,
        rule: adam(AdamForm::Hf),
        ..GaloreConfig::default()
    }
}

/// The projected form of [`exact`].
fn projected(rank: usize, gap: u64, proj_type: ProjType) -> GaloreConfig {
    GaloreConfig { exact: false, ..exact(rank, gap, proj_type) }
}

const RULE: StepRule = StepRule { learning_rate: 0.02, weight_decay: 0.0, gradient_scale: 1.0 };

/// What a backward pass hands over.
fn collect(collect: &Gradient, method: &mut dyn MatrixOptimizer, x: &Tensor<2>, dy: &Tensor<2>) -> Tensor<2> {
    match collect {
        Gradient::Full => product(&x.clone().transpose(), dy),
        Gradient::Factors { .. } => method.observe(x.clone(), dy.clone()),
        Gradient::Projected { left, right, .. } => {
            let rows = left.as_ref().map_or(x.clone(), |left| product(x, &left.values(FloatDType::F32)));
            let columns = right.as_ref().map_or(dy.clone(), |right| product(dy, &right.values(FloatDType::F32)));
            product(&rows.transpose(), &columns)
        }
    }
}

/// One step on micro batches `(x, dy)`.
fn step(
    method: &mut dyn MatrixOptimizer,
    weight: Tensor<2>,
    batches: &[(Tensor<2>, Tensor<2>)],
    rule: StepRule,
) -> Tensor<2> {
    let wanted = method.collect(batches.len());
    let sum = batches.iter().map(|(x, dy)| collect(&wanted, method, x, dy)).reduce(|sum, part| sum + part);
    method.step(weight, sum.unwrap(), rule)
}

/// A regression with `tokens` inputs a step, the same for every method.
struct Task {
    dims: [usize; 2],
    tokens: usize,
}

impl Task {
    fn start(&self) -> Tensor<2> {
        normal(1, self.dims[0], self.dims[1]) * 0.3
    }

    fn batch(&self, step: u64, weight: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let [m, n] = self.dims;
        let x = normal(100 + step, self.tokens, m);
        let target = product(&x, &normal(2, m, n)) + normal(200 + step, self.tokens, n) * 0.1;
        let dy = product(&x, weight) - target;
        (x, dy)
    }

    fn run(&self, method: &mut dyn MatrixOptimizer, steps: u64, rule: StepRule) -> Tensor<2> {
        self.run_from(method, self.start(), 0, steps, rule)
    }

    fn run_from(
        &self,
        method: &mut dyn MatrixOptimizer,
        start: Tensor<2>,
        from: u64,
        to: u64,
        rule: StepRule,
    ) -> Tensor<2> {
        (from..to).fold(start, |weight, at| {
            let batch = self.batch(at, &weight);
            step(method, weight, &[batch], rule)
        })
    }
}

const TASK: Task = Task { dims: [24, 36], tokens: 50 };

fn galore(config: GaloreConfig, dims: [usize; 2]) -> Galore {
    Galore::new(config, "w", 7, dims, 0)
}

/// E3: what is collected is linear: micro batches sum to the whole, on an ordinary step and on a refresh.
#[test]
fn collected_gradients_add_up() {
    let (x, dy) = TASK.batch(0, &TASK.start());
    let halves: Vec<_> =
        [0..20, 20..50].map(|rows| (x.clone().slice([rows.clone(), 0..24]), dy.clone().slice([rows, 0..36]))).into();
    for side in [ProjType::Input, ProjType::Output, ProjType::Full] {
        let mut method = galore(projected(6, 100, side), TASK.dims);
        step(&mut method, TASK.start(), &[(x.clone(), dy.clone())], RULE);
        let wanted = method.collect(2);
        let whole = collect(&wanted, &mut method, &x, &dy);
        let parts: Vec<_> = halves.iter().map(|(x, dy)| collect(&wanted, &mut method, x, dy)).collect();
        assert_near("sum", &(parts[0].clone() + parts[1].clone()), &whole, CLOSE);
    }
}

/// E4, E5: with tokens enough for the range finder to be exact (fewer than its columns), the projected method follows the
/// published one step by step, refreshes included, on either side and on both.
#[test]
fn the_trajectory_is_the_published_one() {
    let task = Task { dims: [24, 36], tokens: 12 };
    for side in [ProjType::Std, ProjType::ReverseStd, ProjType::Input, ProjType::Output, ProjType::Full] {
        for weight_decay in [0.0, 0.1] {
            let rule = StepRule { weight_decay, ..RULE };
            // On both sides R is diagonal at a refresh, and a small eps makes steps of the rounding beside the diagonal.
            let eps = if side == ProjType::Full { 0.1 } else { 1e-6 };
            let adam = RuleConfig::AdamW { betas: (0.9, 0.99), eps, form: AdamForm::Hf };
            let with_eps = |config: GaloreConfig| galore(GaloreConfig { rule: adam.clone(), ..config }, task.dims);
            let published = task.run(&mut with_eps(exact(6, 5, side)), 20, rule);
            let ours = task.run(&mut with_eps(projected(6, 5, side)), 20, rule);
            // Adam turns rounding into steps where a gradient nearly vanishes, so the bound is that of a trajectory.
            assert_near(&format!("{side:?}"), &(ours - task.start()), &(published - task.start()), 2e-3);
        }
    }
}

/// E4 alone, in one step: same W, P, M, V and gradient give the same W.
#[test]
fn an_ordinary_step_is_the_published_one() {
    for side in [ProjType::Input, ProjType::Output, ProjType::Full] {
        let mut published = galore(exact(6, 100, side), TASK.dims);
        let weight = TASK.run(&mut published, 3, RULE);
        let mut ours = galore(projected(6, 100, side), TASK.dims);
        ours.restore(published.save()).unwrap();
        let batch = TASK.batch(3, &weight);
        let want = step(&mut published, weight.clone(), std::slice::from_ref(&batch), RULE);
        let got = step(&mut ours, weight, &[batch], RULE);
        assert_near(&format!("{side:?}"), &got, &want, 1e-6);
    }
}

/// E6: ordinary automatic differentiation of a frozen adapter with B = 0 gives R as the gradient of B, and the same dx.
#[test]
fn r_is_the_gradient_of_a_frozen_adapter() {
    let ([m, n], r) = (TASK.dims, 6);
    let (x, dy) = TASK.batch(0, &TASK.start());
    let basis = linalg::orthonormal(normal(5, m, r));
    let lift = |tensor: &Tensor<2>| Tensor::from_inner(tensor.clone());
    let (input, up) = (lift(&x).require_grad(), lift(&Tensor::zeros([r, n], &device())).require_grad());
    let weight = TASK.start();
    let plain = input.clone().matmul(lift(&weight)) + input.clone().matmul(lift(&basis)).matmul(up.clone());
    let mut gradients = (plain * lift(&dy)).sum().backward();
    let (want_dx, want) = (input.grad_remove(&mut gradients).unwrap(), up.grad_remove(&mut gradients).unwrap());
    let (input, trained) = (lift(&x).require_grad(), lift(&weight).require_grad());
    let y = kernels::projected_linear(input.clone(), trained.clone(), None, Some(basis), None, None);
    let mut gradients = kernels::backward_from(y, lift(&dy));
    assert_near("R", &trained.grad_remove(&mut gradients).unwrap(), &want, CLOSE);
    assert_near("dx", &input.grad_remove(&mut gradients).unwrap(), &want_dx, CLOSE);
}

/// E7, E8: GaLore between refreshes is a LoRA with a frozen orthonormal A: merged after every step, or only at the end, with
/// and without decoupled decay (`W = c W_0 + P B`).
#[test]
fn galore_is_a_frozen_adapter_between_refreshes() {
    for weight_decay in [0.0, 0.3] {
        let rule = StepRule { weight_decay, ..RULE };
        let mut method = galore(projected(6, 1000, ProjType::Input), TASK.dims);
        let want = TASK.run(&mut method, 40, rule);
        let basis = method.basis().unwrap().left.clone().unwrap();
        let scale = method.config.scale;
        let (mut reset, mut deferred) = (adam(AdamForm::Hf).build(0), adam(AdamForm::Hf).build(0));
        let (mut merged, mut shrunk, mut up) = (TASK.start(), 1.0, Tensor::zeros([6, 36], &device()));
        for at in 0..40 {
            let keep = 1.0 - rule.learning_rate * weight_decay;
            let low = |weight: &Tensor<2>| {
                let (x, dy) = TASK.batch(at, weight);
                product(&product(&x, &basis).transpose(), &dy)
            };
            let update = reset.step(low(&merged), rule.learning_rate) * scale;
            merged = (merged - product(&basis, &update)) * keep;
            let effective = TASK.start() * shrunk + product(&basis, &up);
            let update = deferred.step(low(&effective), rule.learning_rate) * scale;
            (up, shrunk) = ((up - update) * keep, shrunk * keep);
        }
        let moved = want - TASK.start();
        assert_near("reset", &(merged - TASK.start()), &moved, 2e-4);
        let effective = TASK.start() * shrunk + product(&basis, &up);
        assert_near("deferred", &(effective - TASK.start()), &moved, 2e-4);
    }
}

/// E8 in the method itself: updates that reach the weight at refreshes only give the same trajectory, refreshes, decay and
/// lagged refreshes over two micro batches included.
#[test]
fn deferred_updates_are_the_same_updates() {
    for (weight_decay, parts) in [(0.0, 1), (0.3, 1), (0.3, 2)] {
        let rule = StepRule { weight_decay, ..RULE };
        let run = |merge: Merge| {
            let mut method = galore(GaloreConfig { merge, ..projected(6, 5, ProjType::Input) }, TASK.dims);
            let mut weight = TASK.start();
            for at in 0..17 {
                let mut effective = weight.clone();
                if let Some(Gradient::Projected { left: Some(left), pending: Some((up, keep)), .. }) = method.serving()
                {
                    effective = weight.clone() * keep + product(&left.values(FloatDType::F32), &up);
                }
                let batches: Vec<_> = (0..parts).map(|part| TASK.batch(2 * at + part, &effective)).collect();
                let before = weight.clone();
                weight = step(&mut method, weight, &batches, rule);
                let is_refresh = at % 5 == 0 && at > 0;
                let is_kept = norm(&(weight.clone() - before)) == 0.0;
                assert_eq!(is_kept, merge == Merge::Deferred && !is_refresh, "step {at}");
            }
            method.settle(weight)
        };
        let (want, got) = (run(Merge::Eager), run(Merge::Deferred));
        assert_near("W", &(got - TASK.start()), &(want - TASK.start()), 1e-3);
    }
}

/// E9: a clipped gradient has the same basis and the same multiple of R.
#[test]
fn scaling_the_gradient_scales_r_and_keeps_the_basis() {
    let (x, dy) = TASK.batch(0, &TASK.start());
    let bases = [1.0, 0.25].map(|scale| {
        let mut method = galore(projected(6, 5, ProjType::Input), TASK.dims);
        method.collect(1);
        let collected = method.observe(x.clone(), dy.clone() * scale);
        (method.basis().unwrap().left.clone().unwrap(), collected)
    });
    assert_near("P", &bases[1].0, &bases[0].0, 1e-4);
    assert_near("R", &(bases[1].1.clone() * 4.0), &bases[0].1, 1e-4);
}

/// E10: coupled decay commutes with the projection: `R + l P^T W = P^T (dW + l W)`.
#[test]
fn coupled_decay_is_projected_too() {
    let (x, dy) = TASK.batch(0, &TASK.start());
    let basis = Basis { left: Some(linalg::orthonormal(normal(5, 24, 6))), right: None };
    let dense = product(&x.clone().transpose(), &dy) + TASK.start() * 0.1;
    let low = basis.project(product(&x.transpose(), &dy)) + basis.project(TASK.start()) * 0.1;
    assert_near("R", &low, &basis.project(dense), CLOSE);
}

/// E11: the norm from the factors. More tokens than a tile holds, so several tiles are summed.
#[test]
fn the_ghost_norm_is_the_norm() {
    for (tokens, m, n) in [(50, 24, 36), (1100, 12, 9), (1, 3, 2)] {
        let (x, dy) = (normal(1, tokens, m), normal(2, tokens, n));
        let want = norm(&product(&x.clone().transpose(), &dy));
        let got = scalar(&ghost_norm(&x, &dy)).sqrt();
        assert!((got - want).abs() < 1e-4 * want, "{got} {want}");
    }
}

/// E12 and the sketch of the norm: without bias, and the basis keeps it from varying as a plain sketch would.
#[test]
fn the_hybrid_norm_is_unbiased() {
    let (x, dy) = TASK.batch(0, &TASK.start());
    let want = norm(&product(&x.clone().transpose(), &dy)).powi(2);
    for side in [ProjType::Input, ProjType::Output, ProjType::Full] {
        let draws = 200;
        let estimates: Vec<f64> = (0..draws)
            .map(|seed| {
                let mut method = Galore::new(projected(12, 5, side), "w", seed, TASK.dims, 0);
                method.collect(1);
                let collected = method.observe(x.clone(), dy.clone());
                scalar(&method.squared_norm(&collected))
            })
            .collect();
        let mean = estimates.iter().sum::<f64>() / draws as f64;
        let variance = estimates.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (draws - 1) as f64;
        let standard_error = (variance / draws as f64).sqrt();
        assert!((mean - want).abs() < 3.0 * standard_error, "{side:?}: {mean} {want} {standard_error}");
        // A plain sketch of s = 8 columns has a relative deviation near sqrt(2 / 8) on a gradient of rank one.
        assert!(variance.sqrt() / want < 0.15, "{side:?}: {}", variance.sqrt() / want);
    }
}

/// `norm = exact` knows the norm, on refreshes and between them; `projected` that of R.
#[test]
fn the_other_norms_are_what_they_say() {
    for (kind, is_whole) in [(Norm::Exact, true), (Norm::Projected, false)] {
        let mut method = galore(GaloreConfig { norm: kind, ..projected(6, 3, ProjType::Input) }, TASK.dims);
        let mut weight = TASK.start();
        for at in 0..5 {
            let (x, dy) = TASK.batch(at, &weight);
            let wanted = method.collect(1);
            let collected = collect(&wanted, &mut method, &x, &dy);
            let dense = product(&x.transpose(), &dy);
            let want = if is_whole { norm(&dense) } else { norm(&method.basis().unwrap().project(dense)) };
            let got = scalar(&method.squared_norm(&collected)).sqrt();
            assert!((got - want).abs() < 1e-4 * want, "{kind:?}, step {at}: {got} {want}");
            weight = method.step(weight, collected, RULE);
        }
    }
}

/// E15: with P = I and scale 1 the step is plain AdamW of the same form, to the bit.
#[test]
fn the_identity_as_basis_is_plain_adamw() {
    let dims = [12, 20];
    let task = Task { dims, tokens: 30 };
    let config = GaloreConfig { scale: 1.0, norm: Norm::Projected, ..projected(12, 1000, ProjType::Input) };
    let mut method = galore(config, dims);
    let mut plain = AdamW::new(AdamWConfig { betas: (0.9, 0.99), eps: 1e-6, form: AdamForm::Hf });
    let mut weight = task.run(&mut method, 1, RULE);
    let mut state = method.save();
    state.tensors.insert("left".to_owned(), Tensor::eye(12, &device()));
    state.tensors.retain(|key, _| key == "left"); // no moments: both start here
    state.numbers.retain(|key, _| !key.starts_with("rule."));
    state.numbers.insert("rule.step".to_owned(), 0);
    method.restore(state).unwrap();
    let mut other = weight.clone();
    for at in 1..8 {
        let (x, dy) = task.batch(at, &weight);
        let gradient = product(&x.clone().transpose(), &dy);
        weight = step(&mut method, weight, &[(x, dy)], RULE);
        other = plain.step("w", other, gradient, RULE);
        assert_near("W", &weight, &other, 1e-7);
    }
}

/// E16: a signed permutation of P's columns, with M and V moved along, changes nothing.
#[test]
fn signed_permutations_of_the_basis_change_nothing() {
    let mut method = galore(projected(6, 1000, ProjType::Input), TASK.dims);
    let weight = TASK.run(&mut method, 3, RULE);
    let order = [3usize, 0, 5, 1, 4, 2];
    let mut turn = vec![0.0f32; 36];
    for (to, &from) in order.iter().enumerate() {
        turn[from * 6 + to] = if to % 2 == 0 { -1.0 } else { 1.0 };
    }
    let turn = Tensor::<2>::from_data(burn::tensor::TensorData::new(turn, [6, 6]), &device());
    let mut state = method.save();
    for (key, value) in state.tensors.iter_mut() {
        let turned = match (key.as_str(), value.dims()) {
            ("left", _) => product(value, &turn),
            (key, [6, 36]) if key.contains("second") => product(&turn.clone().abs().transpose(), value),
            (_, [6, 36]) => product(&turn.clone().transpose(), value),
            _ => continue,
        };
        *value = turned;
    }
    let mut turned = galore(projected(6, 1000, ProjType::Input), TASK.dims);
    turned.restore(state).unwrap();
    let want = TASK.run_from(&mut method, weight.clone(), 3, 8, RULE);
    let got = TASK.run_from(&mut turned, weight, 3, 8, RULE);
    assert_near("W", &got, &want, CLOSE);
}

/// E17: a linear rule does not see any rotation of the basis.
#[test]
fn a_linear_rule_is_invariant_under_rotation() {
    let config = GaloreConfig {
        rule: RuleConfig::Sgd { momentum: 0.9, nesterov: false },
        ..projected(6, 1000, ProjType::Input)
    };
    let rule = StepRule { learning_rate: 1e-3, ..RULE };
    let mut method = galore(config.clone(), TASK.dims);
    let weight = TASK.run(&mut method, 3, rule);
    let turn = linalg::orthonormal(normal(9, 6, 6));
    let mut state = method.save();
    for (key, value) in state.tensors.iter_mut() {
        let moved = if key == "left" { product(value, &turn) } else { product(&turn.clone().transpose(), value) };
        *value = moved;
    }
    let mut turned = galore(config, TASK.dims);
    turned.restore(state).unwrap();
    let want = TASK.run_from(&mut method, weight.clone(), 3, 8, rule);
    let got = TASK.run_from(&mut turned, weight, 3, 8, rule);
    assert_near("W", &got, &want, CLOSE);
}

/// E18: the order of tokens and padding rows of zeros change nothing, at a refresh or between.
#[test]
fn the_order_of_tokens_and_padding_change_nothing() {
    let order: Vec<i32> = (0..50).map(|i| (i * 7) % 50).collect();
    let rows = Tensor::<1, burn::tensor::Int>::from_data(burn::tensor::TensorData::new(order, [50]), &device());
    let (mut plain, mut shuffled) =
        (galore(projected(6, 2, ProjType::Input), TASK.dims), galore(projected(6, 2, ProjType::Input), TASK.dims));
    let (mut a, mut b) = (TASK.start(), TASK.start());
    for at in 0..5 {
        let (x, dy) = TASK.batch(at, &a);
        a = step(&mut plain, a, &[(x, dy)], RULE);
        let (x, dy) = TASK.batch(at, &b);
        let pad = |t: Tensor<2>| {
            let columns = t.dims()[1];
            Tensor::cat(vec![t.select(0, rows.clone()), Tensor::zeros([5, columns], &device())], 0)
        };
        b = step(&mut shuffled, b, &[(pad(x), pad(dy))], RULE);
    }
    assert_near("W", &(b - TASK.start()), &(a - TASK.start()), 1e-3);
}

/// E19: without decay a step moves W only inside the subspace, and j refreshes by a rank of at most j r.
#[test]
fn updates_stay_in_the_subspace() {
    let rank = 4;
    let mut method = galore(projected(rank, 3, ProjType::Input), TASK.dims);
    let mut weight = TASK.start();
    for at in 0..6 {
        let before = weight.clone();
        let batch = TASK.batch(at, &weight);
        weight = step(&mut method, weight, &[batch], RULE);
        let moved = weight.clone() - before;
        let inside = method.basis().unwrap().back(method.basis().unwrap().project(moved.clone()));
        assert_near("moved", &inside, &moved, CLOSE);
    }
    let values = linalg::svd(weight - TASK.start(), 24).values;
    assert!(values[2 * rank] < 1e-5 * values[0], "{values:?}");
}

/// The refresh happens at steps 0, gap, 2 gap; an offset moves the later ones.
#[test]
fn refreshes_come_on_time() {
    for (offset, want) in [(0, vec![0, 4, 8]), (1, vec![0, 3, 7]), (3, vec![0, 1, 5, 9])] {
        let mut method = Galore::new(projected(6, 4, ProjType::Input), "w", 7, TASK.dims, offset);
        let mut found = vec![];
        let mut weight = TASK.start();
        for at in 0..10 {
            let before = method.report().refreshes;
            let batch = TASK.batch(at, &weight);
            weight = step(&mut method, weight, &[batch], RULE);
            if method.report().refreshes > before {
                found.push(at);
            }
        }
        assert_eq!(found, want);
    }
}

/// A refresh over several micro batches: `dense` and a first micro batch that is all there is are exact; `lagged` finds the
/// subspace of the summed gradient for the next step.
#[test]
fn accumulation_and_refresh_work_together() {
    let task = Task { dims: [24, 36], tokens: 8 };
    let weight = task.start();
    let batches: Vec<_> = (0..3).map(|at| task.batch(at, &weight)).collect();
    let sum = batches.iter().map(|(x, dy)| product(&x.clone().transpose(), dy)).reduce(|a, b| a + b).unwrap();
    let best = linalg::svd(sum.clone(), 24);
    let dense = GaloreConfig { accumulation: Accumulation::Dense, ..projected(6, 5, ProjType::Input) };
    let mut method = galore(dense, task.dims);
    let got = step(&mut method, weight.clone(), &batches, RULE);
    let want = galore(exact(6, 5, ProjType::Input), task.dims).step_on(weight.clone(), sum.clone());
    assert_near("dense", &got, &want, CLOSE);
    // Lagged: after the second refresh the basis holds what 24 directions of 22 columns can of the sum.
    let lagged = GaloreConfig { accumulation: Accumulation::Lagged, ..projected(6, 1, ProjType::Input) };
    let mut method = galore(lagged, task.dims);
    step(&mut method, weight.clone(), &batches, RULE);
    step(&mut method, weight.clone(), &batches, RULE);
    let captured = norm(&method.basis().unwrap().project(sum)).powi(2);
    let possible: f64 = best.values[..6].iter().map(|s| s * s).sum();
    assert!(captured > 0.95 * possible, "{captured} of {possible}");
}

impl Galore {
    fn step_on(&mut self, weight: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
        assert!(matches!(self.collect(1), Gradient::Full));
        self.step(weight, gradient, RULE)
    }
}

/// A randomised refresh captures nearly what an exact one does on data with a decaying spectrum, from the cold and warm.
#[test]
fn a_randomised_refresh_is_nearly_exact() {
    let (m, n, r, tokens) = (200, 160, 24, 300);
    let decay =
        Tensor::<1>::from_floats((0..m).map(|i| 1.0 / (1.0 + i as f32)).collect::<Vec<_>>().as_slice(), &device());
    let x = normal(3, tokens, m) * decay.reshape([1, m]);
    let dy = normal(4, tokens, n);
    let dense = product(&x.clone().transpose(), &dy);
    let possible: f64 = linalg::svd(dense.clone(), r).values.iter().map(|s| s * s).sum();
    for side in [ProjType::Input, ProjType::Output] {
        let mut method = galore(projected(r, 1, side), [m, n]);
        for pass in ["cold", "warm"] {
            method.collect(1);
            let collected = method.observe(x.clone(), dy.clone());
            let captured = norm(&method.basis().unwrap().project(dense.clone())).powi(2);
            assert!(captured > 0.97 * possible, "{side:?} {pass}: {captured} of {possible}");
            method.step(Tensor::zeros([m, n], &device()), collected, RULE);
        }
    }
}

/// A saved and restored method goes on to the bit: in a gap, at a refresh, with every rule and with Q-GaLore's extras.
#[test]
fn a_restored_method_goes_on_to_the_bit() {
    let rules = [
        adam(AdamForm::Hf),
        RuleConfig::adamw8bit(),
        RuleConfig::adafactor(),
        RuleConfig::Sgd { momentum: 0.9, nesterov: false },
        RuleConfig::muon(),
    ];
    let configs = rules.into_iter().map(|rule| GaloreConfig { rule, ..projected(6, 4, ProjType::Input) }).chain([
        GaloreConfig {
            quantised: Some(Quantised { queue_size: 2, ..Default::default() }),
            ..projected(6, 2, ProjType::Input)
        },
        GaloreConfig { moments: Moments::Rotate, ..projected(6, 3, ProjType::Output) },
        exact(6, 4, ProjType::Full),
    ]);
    for config in configs {
        for cut in [1, 4, 6, 8] {
            let mut whole = galore(config.clone(), TASK.dims);
            let middle = TASK.run(&mut whole, cut, RULE);
            let mut resumed = galore(config.clone(), TASK.dims);
            resumed.restore(whole.save()).unwrap();
            let want = TASK.run_from(&mut whole, middle.clone(), cut, 10, RULE);
            let got = TASK.run_from(&mut resumed, middle, cut, 10, RULE);
            assert_eq!(linalg::host(got), linalg::host(want), "{config:?}, cut at {cut}");
        }
    }
}

/// Moments carried into the new coordinates keep the first moment's part inside the new subspace.
#[test]
fn rotated_moments_follow_the_subspace() {
    let config = GaloreConfig { moments: Moments::Rotate, ..projected(6, 3, ProjType::Input) };
    let mut method = galore(config, TASK.dims);
    let weight = TASK.run(&mut method, 3, RULE);
    let old = method.basis().unwrap().clone();
    let momentum = old.back(method.rule.momentum().unwrap());
    let (x, dy) = TASK.batch(3, &weight);
    method.collect(1);
    method.observe(x, dy);
    method.turn_moments(); // as the step does first
    let new = method.basis().unwrap();
    assert_near("M", &method.rule.momentum().unwrap(), &new.project(momentum), 1e-4);
}

/// A gradient of fewer tokens than the rank: the basis is filled up, stays orthonormal, and the run goes on.
#[test]
fn few_tokens_are_enough() {
    let task = Task { dims: [24, 36], tokens: 3 };
    for side in [ProjType::Input, ProjType::Output, ProjType::Full] {
        let mut method = galore(projected(8, 2, side), task.dims);
        let weight = task.run(&mut method, 5, RULE);
        assert!(norm(&weight).is_finite());
        for basis in [&method.basis().unwrap().left, &method.basis().unwrap().right].into_iter().flatten() {
            let gram = product(&basis.clone().transpose(), basis);
            assert_near("P^T P", &gram, &Tensor::eye(8, &device()), CLOSE);
        }
    }
}
