//! What the tests of the adapters share.
#![allow(clippy::unwrap_used)]

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};

use super::Site;
pub(crate) use crate::linalg::host;
use crate::random::Stream;

/// Independent normals that depend on the name.
pub(crate) fn normal(name: &str, rows: usize, cols: usize) -> Tensor<2> {
    Stream::new(11, name).normal_tensor(rows, cols, 1.0, &Device::flex())
}

/// A site without statistics.
pub(crate) fn site<'a>(module: &'a str, weight: &Tensor<2>) -> Site<'a> {
    Site { module, weight: weight.clone(), residual: None, seed: 1, stream: Stream::new(1, module), statistics: None }
}

/// `|a - b| <= tolerance |b|` in the Frobenius norm.
#[track_caller]
pub(crate) fn assert_close<const D: usize>(a: Tensor<D>, b: Tensor<D>, tolerance: f64) {
    assert_eq!(a.dims(), b.dims());
    let flat = |t: Tensor<D>| {
        let n = t.shape().num_elements();
        host(t.reshape([1, n]))
    };
    let (a, b) = (flat(a), flat(b));
    let square = |x: f32| f64::from(x).powi(2);
    let distance = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum::<f64>().sqrt();
    let size = b.iter().map(|&b| square(b)).sum::<f64>().sqrt();
    assert!(distance <= tolerance * size.max(1e-30), "differ by {distance:e} of {size:e}");
}

struct Count(usize);

impl ModuleVisitor for Count {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.clone().train().is_require_grad() {
            self.0 += param.shape().num_elements();
        }
    }
}

/// Values of all trained parameters.
pub(crate) fn trained_values<M: Module>(module: &M) -> usize {
    let mut count = Count(0);
    module.visit(&mut count);
    count.0
}

/// Compares a gradient on the tape with central differences along three random directions. The loss is `<C, y>` with C
/// random, summed in f64; the step of 1e-2 leaves an error of about 1e-4 from rounding and from the third derivative.
#[track_caller]
pub(crate) fn check_gradient<M: Module, const D: usize, const E: usize>(
    module: &M,
    run: impl Fn(&M) -> Tensor<D>,
    of: impl Fn(&M) -> Param<Tensor<E>>,
    with: impl Fn(M, Tensor<E>) -> M,
) {
    let at = of(module).val();
    let device = at.device();
    let stream = Stream::new(5, "check_gradient");
    let random =
        |which: u64, n: usize| -> Vec<f32> { (0..n as u64).map(|i| stream.normal((which << 32) + i) as f32).collect() };
    let lifted = module.clone().train();
    let out = run(&lifted);
    let outer = random(0, out.shape().num_elements());
    let outer_tensor: Tensor<1> = Tensor::from_data(outer.as_slice(), &device);
    let weighted = out.clone() * Tensor::from_inner(outer_tensor.reshape(out.shape()));
    let gradient = of(&lifted).val().grad(&weighted.sum().backward()).unwrap();
    let n = at.shape().num_elements();
    let gradient = host(gradient.reshape([1, n]));
    let loss = |value: Tensor<E>| {
        let out = run(&with(module.clone(), value));
        let count = out.shape().num_elements();
        host(out.reshape([1, count])).iter().zip(&outer).map(|(y, c)| f64::from(*y) * f64::from(*c)).sum::<f64>()
    };
    for which in 1..4 {
        let direction = random(which, n);
        let tensor: Tensor<1> = Tensor::from_data(direction.as_slice(), &device);
        let step = tensor.reshape(at.shape()) * 1e-2;
        let slope = (loss(at.clone() + step.clone()) - loss(at.clone() - step)) / 2e-2;
        let want = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum::<f64>();
        let size = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        assert!((slope - want).abs() < 2e-3 * size, "slope {slope}, gradient {want}, |gradient| {size}");
    }
}
