//! Sum of squares of all values: the building stone of a global gradient norm.

use burn::backend::{Backend, tensor::FloatTensor};

use crate::plain::Plain;

/// `[1]` f32 from a tensor of any shape.
pub(crate) fn reference<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let x = Plain::<B>(x).f32();
    B::float_sum((x.clone() * x).0)
}

/// Chunks in f32, their sum in f64: the same for every number of threads.
#[cfg(feature = "flex")]
pub(crate) fn cpu(x: burn_flex::FlexTensor) -> burn_flex::FlexTensor {
    use crate::cpu::{dense, dot, from_vec, map_rows, values};

    const WIDTH: usize = 512;
    let x = dense(x);
    let x = values(&x);
    let partial = map_rows(
        x.len().div_ceil(WIDTH),
        #[inline(always)]
        |range| {
            let x = &x[range.start * WIDTH..(range.end * WIDTH).min(x.len())];
            let mut total = 0.0f64;
            for row in x.chunks(WIDTH) {
                total += f64::from(dot(row, row));
            }
            total
        },
    );
    from_vec(vec![partial.into_iter().sum::<f64>() as f32], &[1])
}
