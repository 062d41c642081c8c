//! The orthonormal DCT-II basis: directions fixed in advance, from which a method selects.
//!
//! `Q[i, j] = sqrt(2 / d) cos(pi j (2i + 1) / (2d))`, column 0 times `sqrt(1/2)`; `Q^T Q = I`. Direction j is a
//! **column**, a cosine of j half periods, so `x Q` is the DCT-II of every row of x. (With rows as directions `x Q`
//! would be the DCT-III.)

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use burn::tensor::{Device, Tensor, TensorData};

/// Q, `[d, d]`.
pub fn basis(d: usize, device: &Device) -> Tensor<2> {
    // The angle is a multiple of pi / (2d), so 4d cosines hold all of them, each from an argument below 2 pi.
    let cosines = (0..4 * d).map(|k| (PI * k as f64 / (2 * d) as f64).cos()).collect::<Vec<_>>();
    let scale = (2.0 / d as f64).sqrt();
    let mut values = Vec::with_capacity(d * d);
    for i in 0..d {
        values.extend((0..d).map(|j| {
            let first = if j == 0 { FRAC_1_SQRT_2 } else { 1.0 };
            (scale * first * cosines[j * (2 * i + 1) % (4 * d)]) as f32
        }));
    }
    Tensor::from_data(TensorData::new(values, [d, d]), device)
}
