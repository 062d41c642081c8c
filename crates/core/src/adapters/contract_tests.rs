//! What every adapter promises, whatever its method: the same checks for every row of [`rows`].
#![allow(clippy::unwrap_used)]

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use lowrank_kernels as kernels;

use super::contract_rows::{CLOSE, Inputs, Row, Start, rows};
use super::testing::{assert_near, distance, norm, normal, site, statistics, weight};
use crate::linalg;
use crate::random::Stream;
use crate::{Delta, Projection};

const SHAPES: [[usize; 2]; 5] = [[64, 64], [48, 80], [80, 48], [7, 5], [1, 17]];
/// Calls `check` for every method on every shape with a rank of 1, of 3 and the largest.
fn each(mut check: impl FnMut(&Row, &str, Projection, Delta, usize)) {
    for row in rows() {
        for [d_in, d_out] in SHAPES {
            let (weight, measured, k) = (weight(d_in, d_out), statistics(d_in, d_out), d_in.min(d_out));
            let mut ranks = vec![1, 3.min(k), k];
            ranks.dedup();
            for r in ranks {
                let site = site(&weight, Some(&measured), None);
                let Some((delta, count)) = (row.make)(&site, r) else { continue };
                let bias = normal("bias", 1, d_out).reshape([d_out]);
                let projection = Projection::frozen(weight.clone(), Some(bias));
                check(&row, &format!("{} [{d_in}, {d_out}] r {r}", row.name), projection, delta, count);
            }
        }
    }
}

/// Trained values in the order of the fields, with the gradients of a pass where there was one.
#[derive(Default)]
struct Trained<'a> {
    dims: Vec<Vec<usize>>,
    gradients: Option<&'a burn::tensor::Gradients>,
    found: Vec<Vec<f32>>,
    frozen_with_gradient: usize,
}

impl ModuleVisitor for Trained<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.and_then(|gradients| param.val().grad(gradients));
        let is_trained = match self.gradients {
            Some(_) => param.val().is_require_grad(), // on the tape
            None => param.clone().train().is_require_grad(),
        };
        if !is_trained {
            self.frozen_with_gradient += usize::from(gradient.is_some());
            return;
        }
        self.dims.push(param.dims().to_vec());
        let values = gradient.map(|gradient| gradient.into_data().try_to_vec::<f32>().unwrap());
        self.found.extend(values);
    }
}

fn trained<M: Module>(module: &M) -> Vec<Vec<usize>> {
    let mut walk = Trained::default();
    module.visit(&mut walk);
    walk.dims
}

/// Adds `length` times a fixed direction to the trained tensor of this index; to all of them without an index.
struct Nudge {
    only: Option<usize>,
    length: f64,
    seen: usize,
}

fn direction(index: usize, count: usize) -> Vec<f64> {
    let stream = Stream::new(17, &format!("direction {index}"));
    (0..count).map(|i| stream.normal(i as u64)).collect()
}

impl ModuleMapper for Nudge {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.clone().train().is_require_grad() {
            return param;
        }
        let index = self.seen;
        self.seen += 1;
        if self.only.is_some_and(|only| only != index) {
            return param;
        }
        param.map(|value| {
            let (shape, device) = (value.shape(), value.device());
            let step = direction(index, shape.num_elements());
            let step: Vec<f32> = step.iter().map(|v| (v * self.length) as f32).collect();
            value + Tensor::<D>::from_data(TensorData::new(step, shape), &device)
        })
    }
}

fn nudge(delta: &Delta, only: Option<usize>, length: f64) -> Delta {
    delta.clone().map(&mut Nudge { only, length, seen: 0 })
}

/// The adapter after some training: nothing is zero any more.
fn moved(delta: &Delta) -> Delta {
    nudge(delta, None, 0.1)
}

fn plain(projection: &Projection, x: Tensor<2>) -> Tensor<2> {
    projection.forward(x, false)
}

fn adapted(projection: &Projection, delta: Delta) -> Projection {
    let mut projection = projection.clone();
    projection.attach(delta);
    projection
}

#[test]
fn the_list_and_the_rows_name_the_same_methods() {
    let mut tested: Vec<&str> = rows().iter().map(|row| row.name.split(',').next().unwrap()).collect();
    tested.dedup();
    let listed: Vec<&str> = super::METHODS.iter().map(|(name, _, _)| *name).collect();
    assert_eq!(tested, listed);
}

#[test]
fn the_start_is_what_the_method_says() {
    each(|row, case, projection, delta, _| {
        let x = normal("x", 6, projection.dims()[0]);
        let (before, after) = (plain(&projection, x.clone()), adapted(&projection, delta).forward(x, true));
        match row.start {
            Start::Same => assert_eq!(linalg::host(after), linalg::host(before), "{case}"),
            Start::Near(limit) => assert_near(case, &after, &before, limit),
            Start::Moved => assert!(distance(&after, &before) > 1e-5, "{case}: the start does nothing"),
        }
    });
}

#[test]
fn merging_changes_no_output() {
    each(|_, case, projection, delta, _| {
        let adapted = adapted(&projection, moved(&delta));
        let mut merged = adapted.clone();
        merged.merge();
        assert!(merged.delta.is_none(), "{case}");
        for tokens in [1, 6] {
            let x = normal("x", tokens, projection.dims()[0]);
            assert_near(case, &adapted.forward(x.clone(), false), &merged.forward(x, false), CLOSE);
        }
    });
}

#[test]
fn the_trained_values_are_as_many_as_the_method_says() {
    each(|_, case, projection, delta, count| {
        let adapted = adapted(&projection, delta);
        let found: usize = trained(&adapted).iter().map(|dims| dims.iter().product::<usize>()).sum();
        assert_eq!(found, count, "{case}");
    });
}

/// `sum(y * g)` in f64.
fn inner(y: &Tensor<2>, g: &[f64]) -> f64 {
    linalg::host(y.clone()).iter().zip(g).map(|(&y, g)| f64::from(y) * g).sum()
}

/// The derivative at 0 by central differences, the error of second order removed.
fn slope(h: f64, f: &dyn Fn(f64) -> f64) -> f64 {
    let central = |h: f64| (f(h) - f(-h)) / (2.0 * h);
    (4.0 * central(h / 2.0) - central(h)) / 3.0
}

#[test]
fn gradients_are_those_of_the_output() {
    each(|row, case, projection, delta, _| {
        let ([d_in, d_out], delta) = (projection.dims(), moved(&delta));
        let adapted = adapted(&projection, delta.clone());
        let x = normal("x", 5, d_in);
        let g = normal("g", 5, d_out);
        let lifted = adapted.clone().train();
        let input = Tensor::from_inner(x.clone()).require_grad();
        let out = lifted.forward(input.clone(), true);
        let mut gradients = kernels::backward_from(out, Tensor::from_inner(g.clone()));
        let dx = input.grad_remove(&mut gradients).unwrap();
        let mut walk = Trained { gradients: Some(&gradients), ..Trained::default() };
        lifted.visit(&mut walk);
        assert_eq!(walk.frozen_with_gradient, 0, "{case}");
        assert_eq!(walk.found.len(), walk.dims.len(), "{case}: a trained tensor without a gradient");

        let g: Vec<f64> = linalg::host(g).into_iter().map(f64::from).collect();
        let base = adapted.weight.values();
        let inputs = Inputs { x: x.clone(), weight: base, bias: projection.bias.as_ref().unwrap().val() };
        let output = |now: &Delta| match row.held {
            Some(held) => held(&delta, now, &inputs),
            None => Projection { delta: Some(now.clone()), ..adapted.clone() }.forward(x.clone(), false),
        };
        // What a rounding of the output becomes in a difference; the worst seen is a third of what is allowed.
        let length = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let rounding = norm(&output(&delta)) * length(&g) / (g.len() as f64).sqrt() / row.step;
        let check = |what: &str, found: f64, wanted: f64| {
            let allowed = 1e-4 * wanted.abs() + 4e-6 * rounding;
            let error = (found - wanted).abs();
            assert!(error <= allowed, "{case}, {what}: {wanted} by the backward pass, {found} by differences");
        };
        for (index, gradient) in walk.found.iter().enumerate() {
            let step = direction(index, gradient.len());
            let wanted: f64 = gradient.iter().zip(&step).map(|(&a, b)| f64::from(a) * b).sum();
            let found = slope(row.step, &|h| inner(&output(&nudge(&delta, Some(index), h)), &g));
            check(&format!("tensor {index}"), found, wanted);
        }
        let step = normal("step", 5, d_in);
        let wanted = linalg::host(dx.clone() * step.clone()).iter().map(|&v| f64::from(v)).sum();
        let found = slope(row.step, &|h| inner(&adapted.forward(x.clone() + step.clone() * h, false), &g));
        check("x", found, wanted);
    });
}

#[test]
fn dropout_is_for_training() {
    each(|_, case, projection, delta, _| {
        let x = normal("x", 6, projection.dims()[0]);
        let mut adapted = adapted(&projection, moved(&delta));
        let without = adapted.forward(x.clone(), true);
        let base = Projection { delta: None, ..adapted.clone() }.forward(x.clone(), false);
        adapted.delta.as_mut().unwrap().set_dropout(0.5);
        if adapted.dropout() == 0.0 {
            return; // a method without dropout
        }
        assert_near(case, &adapted.forward(x.clone(), false), &without, CLOSE);
        let dropped = adapted.forward(x.clone(), true);
        assert!(norm(&dropped).is_finite(), "{case}");
        if distance(&without, &base) > 1e-3 {
            // 6 d_in inputs, each kept with probability 1/2: all of them about once in 2^6 for d_in = 1.
            assert!(projection.dims()[0] == 1 || distance(&dropped, &without) > 1e-6, "{case}");
        }
        adapted.delta.as_mut().unwrap().set_dropout(1.0);
        assert_near(case, &adapted.forward(x, true), &base, CLOSE);
    });
}
