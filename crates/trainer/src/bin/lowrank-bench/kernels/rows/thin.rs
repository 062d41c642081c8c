//! Products with one thin side, each way beside the other.

use burn::backend::Dispatch;
use burn::tensor::Tensor;
use lowrank_kernels::{self as kernels, LowRankOps};

use super::{Inputs, Out, Sizes, Work, product, work};

/// Who multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The kernel for thin products.
    Kernel,
    /// Burn's matmul.
    Matmul,
}

/// `alpha a b` for a thin b; `a` is given as it lies.
fn thin(inputs: &Inputs, [a, b]: [Tensor<2>; 2], by: By) -> anyhow::Result<Work> {
    const ALPHA: f32 = 0.5;
    let ([m, k], n) = (a.dims(), b.dims()[1]);
    let bytes = inputs.width() * (product(&[m, k]) + product(&[k, n]) + product(&[m, n]));
    work(format!("{m} x {k} x {n}"), 2.0 * product(&[m, k, n]), bytes, true, move || {
        let (a, b) = (a.clone(), b.clone());
        vec![Out::D2(match by {
            By::Kernel => Tensor::from_dispatch(Dispatch::thin_product(a.into_dispatch(), b.into_dispatch(), ALPHA)),
            By::Matmul => a.matmul(b) * ALPHA,
        })]
    })
}

/// `x A`
pub fn down(inputs: &mut Inputs, s: &Sizes, by: By) -> anyhow::Result<Work> {
    let (x, a) = (inputs.tensor([s.tokens(), s.hidden]), inputs.tensor([s.hidden, s.rank]));
    thin(inputs, [x, a], by)
}

/// `x^T u`, the gradient of A.
pub fn gradient(inputs: &mut Inputs, s: &Sizes, by: By) -> anyhow::Result<Work> {
    let (x, u): (Tensor<2>, _) = (inputs.tensor([s.tokens(), s.hidden]), inputs.tensor([s.tokens(), s.rank]));
    thin(inputs, [x.transpose(), u], by)
}

/// `x W` for few tokens on codes.
pub fn few_packed(inputs: &mut Inputs, s: &Sizes, tokens: usize) -> anyhow::Result<Work> {
    let (m, n) = (s.hidden, s.ffn);
    let (x, w) = (inputs.tensor([tokens, m]), inputs.packed([m, n])?);
    let bytes = inputs.width() * product(&[tokens, m + n]) + w.bytes() as f64;
    work(format!("{tokens} x {m} x {n}, nf4"), 2.0 * product(&[tokens, m, n]), bytes, true, move || {
        vec![Out::D2(kernels::linear(x.clone(), w.clone(), None))]
    })
}

/// The same on values, as they lie on disk.
pub fn few_dense(inputs: &mut Inputs, s: &Sizes, tokens: usize) -> anyhow::Result<Work> {
    let (m, n) = (s.hidden, s.ffn);
    let (x, w): (_, Tensor<2>) = (inputs.tensor([tokens, m]), inputs.tensor([n, m]));
    let bytes = inputs.width() * (product(&[tokens, m + n]) + product(&[m, n]));
    work(format!("{tokens} x {m} x {n}"), 2.0 * product(&[tokens, m, n]), bytes, true, move || {
        vec![Out::D2(kernels::linear(x.clone(), w.clone().transpose(), None))]
    })
}
