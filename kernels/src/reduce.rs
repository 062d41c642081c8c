//! Sums of all values of some tensors, or of their squares: the building stone of a global gradient norm.

use burn::backend::{Backend, tensor::FloatTensor};

use crate::Tensors;
use crate::plain::Plain;

/// One f32 number for each tensor of any shape.
pub(crate) fn reference<B: Backend>(x: Tensors<B>, squared: bool) -> FloatTensor<B> {
    let sum = |x| {
        let x = Plain::<B>(x).f32();
        B::float_sum(if squared { (x.clone() * x).0 } else { x.0 })
    };
    B::float_cat(x.0.into_iter().map(sum).collect(), 0)
}

#[cfg(feature = "flex")]
pub(crate) fn cpu(x: Tensors<burn_flex::Flex>, squared: bool) -> burn_flex::FlexTensor {
    let sums: Vec<f32> = x.0.into_iter().map(|x| if squared { sum_squares(x) } else { sum(x) }).collect();
    let count = sums.len();
    crate::cpu::from_vec(sums, &[count])
}

#[cfg(feature = "flex")]
fn sum(x: burn_flex::FlexTensor) -> f32 {
    crate::cpu::values(&crate::cpu::dense(x)).iter().map(|&x| f64::from(x)).sum::<f64>() as f32
}

/// Chunks in f32, their sum in f64: the same for every number of threads.
#[cfg(feature = "flex")]
fn sum_squares(x: burn_flex::FlexTensor) -> f32 {
    use crate::cpu::{dense, dot, map_rows, values};

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
    partial.into_iter().sum::<f64>() as f32
}
