#![allow(clippy::unwrap_used)]

use burn::tensor::TensorData;

use super::*;
use crate::linalg::host;

fn device() -> Device {
    Device::flex()
}

fn normal(name: &str, rows: usize, cols: usize) -> Tensor<2> {
    Stream::new(9, name).normal_tensor(rows, cols, 1.0, &device())
}

fn streams() -> [Stream; 3] {
    ["signs", "permutation", "gains"].map(|part| Stream::new(4, part))
}

fn map(length: usize, dims: usize) -> Fastfood {
    Fastfood::new(length, dims, streams(), &Hadamard::default(), &device())
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[track_caller]
fn assert_near(a: &[f32], b: &[f32], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let (distance, size) = (dot(&difference, &difference).sqrt(), dot(b, b).sqrt());
    assert!(distance <= tolerance * size.max(1e-30), "differ by {distance:e} of {size:e}");
}

/// Column j of P.
fn column(map: &Fastfood, dims: usize, j: usize) -> Vec<f32> {
    let unit: Vec<f32> = (0..dims).map(|i| if i == j { 1.0 } else { 0.0 }).collect();
    host(map.apply(Tensor::from_data(TensorData::new(unit, [1, dims]), &device())))
}

#[test]
fn the_transform_is_that_of_walsh_and_hadamard() {
    let hadamard = Hadamard::default();
    for length in [1usize, 2, 8, 64, 128, 256, 4096, 32768] {
        let x = normal("x", 1, length);
        let once = hadamard.transform(x.clone());
        let mut want: Vec<f64> = host(x.clone()).into_iter().map(f64::from).collect();
        walsh_hadamard(&mut want);
        let want: Vec<f32> = want.into_iter().map(|v| v as f32).collect();
        assert_near(&host(once.clone()), &want, 1e-6);
        assert_near(&host(hadamard.transform(once)), &host(x * length as f32), 2e-6); // H H = L
    }
}

#[test]
fn the_adjoint_is_the_adjoint() {
    for (length, dims) in [(1, 1), (5, 3), (64, 64), (300, 20), (1000, 1), (12, 40), (4096, 100)] {
        let map = map(length, dims);
        let (v, u) = (normal("v", 1, dims), normal("u", 1, length));
        let forth = dot(&host(map.apply(v.clone())), &host(u.clone()));
        let back = dot(&host(v.clone()), &host(map.adjoint(u.clone())));
        let size = dot(&host(v.clone()), &host(v)).sqrt() * dot(&host(u.clone()), &host(u)).sqrt();
        assert!((forth - back).abs() < 1e-6 * size, "{length} {dims}: {forth} {back}");
    }
}

#[test]
fn columns_have_unit_norm() {
    for (length, dims, low, high) in [(256, 20, 0.99999, 1.00001), (300, 20, 0.8, 1.2), (200, 20, 0.8, 1.2)] {
        let map = map(length, dims);
        for j in 0..dims {
            let column = column(&map, dims, j);
            let norm = dot(&column, &column).sqrt();
            assert!((low..high).contains(&norm), "column {j} of {length}: {norm}");
        }
    }
}

/// The five matrices, multiplied out in f64 from the same streams.
#[test]
fn it_is_the_product_of_its_five_matrices() {
    let (length, dims, width) = (13usize, 5usize, 16usize);
    let [signs, order, gains] = streams();
    let sign = |i: usize| if signs.bits(i as u64) >> 63 == 0 { 1.0 } else { -1.0 };
    let mut places: Vec<usize> = (0..width).collect();
    for i in (1..width).rev() {
        places.swap(i, (order.bits(i as u64) % (i as u64 + 1)) as usize);
    }
    let gain: Vec<f64> = (0..width as u64).map(|i| gains.normal(i)).collect();
    let norm = (gain.iter().map(|g| g * g).sum::<f64>() * width as f64).sqrt() * (length as f64 / width as f64).sqrt();
    let h = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let map = map(length, dims);
    for j in 0..dims {
        let want: Vec<f32> = (0..length)
            .map(|i| {
                let path = |k: usize| h(i, k) * gain[k] * h(places[k], j) * sign(j);
                ((0..width).map(path).sum::<f64>() / norm) as f32
            })
            .collect();
        assert_near(&column(&map, dims, j), &want, 1e-6);
    }
}

#[test]
fn it_is_linear_and_truncates_what_is_longer_than_the_target() {
    let map_of = |dims| map(300, dims);
    let (a, b) = (normal("a", 1, 20), normal("b", 1, 20));
    let map = map_of(20);
    let sum = map.apply(a.clone() * 2.0 - b.clone());
    assert_near(&host(sum), &host(map.apply(a) * 2.0 - map.apply(b)), 2e-6);
    let small = super::tests::map(3, 10);
    let v = normal("v", 1, 10);
    let head = Tensor::cat(vec![v.clone().narrow(1, 0, 4), Tensor::zeros([1, 6], &device())], 1);
    assert_eq!(host(small.apply(v)), host(small.apply(head)));
    assert!(host(small.adjoint(normal("u", 1, 3)))[4..].iter().all(|&g| g == 0.0));
}

fn rule(learning_rate: f64) -> StepRule {
    StepRule { learning_rate, weight_decay: 0.0, gradient_scale: 1.0 }
}

/// Two matrices that are pulled to targets: dW = W - target.
struct Pair {
    subspace: Subspace,
    methods: [Intrinsic; 2],
    weights: [Tensor<2>; 2],
}

const DIMS: [[usize; 2]; 2] = [[6, 9], [16, 8]];

impl Pair {
    fn new(said: bool) -> Self {
        let config = IntrinsicConfig { dims: 12, said, ..IntrinsicConfig::default() };
        let subspace = Subspace::new(config, 3, 2, &device()).unwrap();
        let methods = [0, 1].map(|i| subspace.matrix(["a", "b"][i], DIMS[i]));
        Self { subspace, methods, weights: DIMS.map(|[m, n]| normal("w", m, n)) }
    }

    fn step(&mut self, rule: StepRule) -> Vec<Tensor<1>> {
        let collect = |method: &mut Intrinsic| {
            assert!(matches!(method.collect(1), Gradient::Factors { .. }));
        };
        self.methods.iter_mut().for_each(collect);
        let mut collected = vec![];
        for (method, weight) in self.methods.iter_mut().zip(&self.weights) {
            let [m, n] = weight.dims();
            let dy = weight.clone() - normal("target", m, n);
            collected.push(method.observe(Tensor::eye(m, &device()), dy));
        }
        let norms = self.methods.iter().zip(&collected).map(|(m, c)| m.squared_norm(c)).collect();
        for (i, collected) in collected.into_iter().enumerate() {
            self.weights[i] = self.methods[i].step(self.weights[i].clone(), collected, rule);
        }
        norms
    }

    fn values(&self) -> Vec<Vec<f32>> {
        self.weights.iter().map(|weight| host(weight.clone())).collect()
    }
}

#[test]
fn the_weights_are_the_start_plus_the_map_of_v() {
    for said in [false, true] {
        let mut pair = Pair::new(said);
        let start = pair.weights.clone();
        assert_eq!(pair.subspace.v().dims(), [1, if said { 10 } else { 12 }]);
        pair.step(rule(0.0));
        assert_eq!(pair.values(), start.clone().map(host).to_vec()); // v = 0: nothing moves
        for _ in 0..20 {
            pair.step(rule(0.05));
        }
        for (i, first) in start.iter().enumerate() {
            let want = first.clone() + pair.methods[i].offset();
            assert_near(&host(pair.weights[i].clone()), &host(want), 1e-6);
            let lam = pair.methods[i].lam().map(|lam| host(lam)[0]);
            assert_eq!(lam.is_some_and(|lam| lam != 1.0), said);
        }
    }
}

#[test]
fn the_gradient_of_v_is_the_sum_over_all_matrices() {
    let mut pair = Pair::new(true);
    for _ in 0..3 {
        pair.step(rule(0.1)); // lam and v away from their start
    }
    let v = pair.subspace.v();
    let mut want = Tensor::<2>::zeros([1, 10], &device());
    let mut of_lam = vec![];
    for (method, weight) in pair.methods.iter().zip(&pair.weights) {
        let [m, n] = weight.dims();
        let projected = method.map.adjoint((weight.clone() - normal("target", m, n)).reshape([1, m * n]));
        want = want + projected.clone() * method.lam().unwrap();
        of_lam.push(dot(&host(projected), &host(v.clone())));
    }
    let norms: Vec<f32> = pair.step(rule(0.0)).into_iter().map(|n| host(n.reshape([1, 1]))[0]).collect();
    let want = host(want);
    let expected = [dot(&want, &want) + of_lam[0].powi(2), of_lam[1].powi(2)];
    for (norm, expected) in norms.iter().zip(expected) {
        assert!((f64::from(*norm) - expected).abs() < 1e-4 * expected, "{norm} {expected}");
    }
}

#[test]
fn a_restored_run_goes_on_to_the_bit() {
    for said in [false, true] {
        let mut through = Pair::new(said);
        for _ in 0..4 {
            through.step(rule(0.05));
        }
        let mut resumed = Pair::new(said);
        resumed.weights = through.weights.clone();
        // The matrix that holds v comes last.
        for i in [1, 0] {
            resumed.methods[i].restore(through.methods[i].save()).unwrap();
        }
        for _ in 0..3 {
            through.step(rule(0.05));
            resumed.step(rule(0.05));
        }
        assert_eq!(through.values(), resumed.values());
        let error = Pair::new(said).methods[0].restore(State::default()).unwrap_err();
        assert_eq!(error, "v is missing");
    }
}

#[test]
fn budgets_that_leave_nothing_are_refused() {
    let config = IntrinsicConfig { dims: 3, said: true, ..IntrinsicConfig::default() };
    assert_eq!(
        Subspace::new(config, 1, 3, &device()).unwrap_err(),
        "dims is 3, expected more than 3 (one of them for each matrix, the others for v)"
    );
    let config = IntrinsicConfig { dims: 0, ..IntrinsicConfig::default() };
    assert_eq!(Subspace::new(config, 1, 3, &device()).unwrap_err(), "dims is 0, expected more than 0");
}

/// What share of the first loss is gone: ten groups of a hundred coordinates that must each sum to a given value.
fn reached(dims: usize, seed: u64) -> f64 {
    let config = IntrinsicConfig { dims, ..IntrinsicConfig::default() };
    let subspace = Subspace::new(config, seed, 1, &device()).unwrap();
    let mut method = subspace.matrix("groups", [10, 100]);
    let mut weight = Tensor::<2>::zeros([10, 100], &device());
    let target = normal("sums", 10, 1);
    let loss = |missing: &Tensor<2>| dot(&host(missing.clone()), &host(missing.clone()));
    let steps = 500;
    for step in 0..steps {
        method.collect(1);
        let missing = weight.clone().sum_dim(1) - target.clone();
        let collected = method.observe(Tensor::eye(10, &device()), missing.expand([10, 100]));
        weight = method.step(weight, collected, rule(0.1 * (1.0 - step as f64 / f64::from(steps))));
    }
    1.0 - loss(&(weight.sum_dim(1) - target.clone())) / loss(&target)
}

#[test]
fn ten_constraints_need_ten_dimensions() {
    let runs: Vec<(usize, f64)> =
        [3, 5, 8, 20].into_iter().flat_map(|dims| [1, 2].map(|seed| (dims, reached(dims, seed)))).collect();
    let target = Target::share(1.0, 0.99);
    assert_eq!(smallest(target, &runs, Summary::Mean), Some(20), "{runs:?}");
    assert_eq!(smallest(target, &runs, Summary::Best), Some(20), "{runs:?}");
    assert!(runs.iter().filter(|(dims, _)| *dims == 20).all(|(_, reached)| *reached > 0.999), "{runs:?}");
}
