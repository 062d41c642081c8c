//! Thin products and products with packed weights: odd shapes, every layout in memory, f32 and f16.

use burn::backend::Dispatch;
use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_kernels::packed::{self, Format, Layout, Nested, Order, Scales};
use lowrank_kernels::{self as kernels, LowRankOps, Packed};

use super::{constant, number};

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.cast(FloatDType::F32).into_data().try_to_vec::<f32>().unwrap()
}

/// How a matrix lies in memory.
#[derive(Clone, Copy)]
enum Lies {
    Rows,
    Columns,
    /// In the middle of a wider matrix.
    Apart,
}

fn matrix(seed: usize, [m, n]: [usize; 2], lies: Lies, dtype: FloatDType, device: &Device) -> Tensor<2> {
    let new = |dims: [usize; 2]| constant(seed, dims, device).inner().cast(dtype);
    match lies {
        Lies::Rows => new([m, n]),
        Lies::Columns => new([n, m]).transpose(),
        Lies::Apart => new([m, n + 3]).narrow(1, 2, n),
    }
}

fn product(a: Tensor<2>, b: Tensor<2>) -> Vec<f32> {
    values(Tensor::<2>::from_dispatch(Dispatch::thin_product(a.into_dispatch(), b.into_dispatch(), 0.5)))
}

/// `(m, k, n)` and the two layouts: along rows and along columns, with the thin side on the right and on the left, sums in
/// one part and in several, more columns than a cube takes.
pub fn thin(device: &Device) -> Vec<Vec<f32>> {
    use Lies::{Apart, Columns, Rows};
    let cases = [
        ([33, 1030, 5], Rows, Rows),
        ([33, 1028, 16], Rows, Columns),
        ([35, 41, 1], Apart, Apart),
        ([33, 130, 16], Columns, Rows),
        ([264, 70, 5], Columns, Columns),
        ([20, 40, 36], Rows, Rows),
        ([3, 64, 70], Rows, Columns),
        ([1, 3, 1], Rows, Rows),
    ];
    let run = |dtype, ([m, k, n], a, b): ([usize; 3], Lies, Lies)| {
        product(matrix(1, [m, k], a, dtype, device), matrix(2, [k, n], b, dtype, device))
    };
    cases.into_iter().map(|case| run(FloatDType::F32, case)).collect()
}

/// The same in f16.
pub fn thin_in_f16(device: &Device) -> Vec<Vec<f32>> {
    let cases = [([33, 1028, 16], Lies::Rows), ([264, 70, 5], Lies::Columns)];
    let run = |([m, k, n], lies): ([usize; 3], Lies)| {
        let a = matrix(1, [m, k], lies, FloatDType::F16, device);
        product(a, matrix(2, [k, n], Lies::Rows, FloatDType::F16, device))
    };
    cases.into_iter().map(run).collect()
}

fn weight(
    format: Format,
    block: usize,
    nested: Option<usize>,
    order: Order,
    dims: [usize; 2],
    device: &Device,
) -> Packed {
    let layout = Layout { format, block, dims, order, nested: nested.map(|block| Nested { block, offset: 0.5 }) };
    let words =
        |seed, count: usize| packed::words((0..count).map(|i| (number(seed, i) * 2e9) as i32).collect(), device);
    let scales = |seed, count| packed::scales((0..count).map(|i| number(seed, i)).collect(), device);
    let (blocks, codes) = (layout.blocks(), words(7, layout.words()));
    let scales = match (format, nested) {
        (Format::Int8 | Format::Int4, _) => {
            Scales::Affine { scale: scales(4, blocks), zero: words(8, blocks.div_ceil(4)) }
        }
        (_, None) => Scales::Table { table: scales(3, 16), scale: scales(4, blocks) },
        (_, Some(block)) => Scales::Nested {
            table: scales(3, 16),
            codes: words(8, blocks.div_ceil(4)),
            map: scales(5, 256),
            absmax: scales(6, blocks.div_ceil(block)),
        },
    };
    Packed::new(layout, codes, scales)
}

/// Few tokens by the codes in both directions, and panels: blocks that straddle rows, rows of odd length (value by value), and
/// both orders.
pub fn packed(device: &Device) -> Vec<Vec<f32>> {
    let cases = [
        (Format::Nf4, 64, None, Order::Outputs, [264, 70]),
        (Format::Nf4, 64, Some(4), Order::Outputs, [264, 70]),
        (Format::Int4, 16, None, Order::Outputs, [24, 33]),
        (Format::Int8, 16, None, Order::Inputs, [33, 132]),
        (Format::Fp4, 8, None, Order::Outputs, [13, 5]),
    ];
    let run = |(format, block, nested, order, [d_in, d_out]): (Format, usize, Option<usize>, Order, [usize; 2])| {
        let w = weight(format, block, nested, order, [d_in, d_out], device);
        let mut all = vec![values(w.dense(FloatDType::F32)), values(w.rows(1..3, FloatDType::F32))];
        for tokens in if d_in == 264 { vec![1, 7] } else { vec![3] } {
            let x = constant(1, [tokens, d_in], device).require_grad();
            let y = kernels::linear(x.clone(), w.clone(), Some(constant(2, [d_out], device)));
            let grads = kernels::backward_from(y.clone(), constant(9, [tokens, d_out], device));
            all.extend([values(y), values(x.grad(&grads).expect("a gradient"))]);
        }
        all
    };
    cases.into_iter().flat_map(run).collect()
}

/// The same in f16.
pub fn packed_in_f16(device: &Device) -> Vec<Vec<f32>> {
    let w = weight(Format::Nf4, 64, Some(4), Order::Outputs, [264, 70], device);
    let x = constant(1, [3, 264], device).cast(FloatDType::F16);
    vec![values(w.dense(FloatDType::F16)), values(kernels::linear(x, w, None))]
}
