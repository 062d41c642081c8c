//! What the starts share: checks of a site, and the pieces of a decomposition as factors.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{Site, StartError};
use crate::linalg;

/// Refuses a rank that a `[d_in, d_out]` weight does not have.
pub(super) fn check_rank(site: &Site<'_>, method: &'static str, r: usize) -> Result<(), StartError> {
    let [d_in, d_out] = site.dims();
    match (1..=d_in.min(d_out)).contains(&r) {
        true => Ok(()),
        false => Err(StartError::Rank { method, module: site.module.to_owned(), r, d_in, d_out }),
    }
}

/// Refuses an s of which the start takes the root.
pub(super) fn check_scale(site: &Site<'_>, method: &'static str, scale: f32) -> Result<(), StartError> {
    match scale > 0.0 && scale.is_finite() {
        true => Ok(()),
        false => Err(StartError::Scale { method, module: site.module.to_owned(), scale: scale.to_string() }),
    }
}

/// C of the site, with the mean of its diagonal, which is above 0.
pub(super) fn covariance(site: &Site<'_>, method: &'static str) -> Result<(Tensor<2>, f64), StartError> {
    let what = "the covariance of the inputs";
    let found = site.statistics.and_then(|statistics| statistics.covariance.clone());
    let covariance = found.ok_or_else(|| missing(site, method, what))?;
    let mean = mean_diagonal(&covariance);
    match mean > 0.0 && mean.is_finite() {
        true => Ok((covariance, mean)),
        false => {
            Err(StartError::NothingMeasured { method, module: site.module.to_owned(), what, got: mean.to_string() })
        }
    }
}

/// The summed gradient of the site, which is not zero.
pub(super) fn gradient(site: &Site<'_>, method: &'static str) -> Result<Tensor<2>, StartError> {
    let what = "the gradient of the weight";
    let found = site.statistics.and_then(|statistics| statistics.gradient.clone());
    let gradient = found.ok_or_else(|| missing(site, method, what))?;
    let largest = linalg::host(gradient.clone().abs().max().reshape([1, 1])).first().copied().unwrap_or(0.0);
    let sum = linalg::host(gradient.clone().sum().reshape([1, 1])).first().copied().unwrap_or(0.0);
    match largest > 0.0 && largest.is_finite() && sum.is_finite() {
        true => Ok(gradient),
        false => {
            let got = if sum.is_finite() { largest } else { sum }.to_string();
            Err(StartError::NothingMeasured { method, module: site.module.to_owned(), what, got })
        }
    }
}

fn missing(site: &Site<'_>, method: &'static str, what: &'static str) -> StartError {
    StartError::NeedsCalibration { method, module: site.module.to_owned(), what }
}

fn mean_diagonal(c: &Tensor<2>) -> f64 {
    let n = c.dims()[0];
    let diagonal = Tensor::<1, Int>::arange_step(0..(n * n) as i64, n + 1, &c.device());
    let values = linalg::host(c.clone().reshape([n * n]).select(0, diagonal).reshape([1, n]));
    values.iter().map(|&value| f64::from(value)).sum::<f64>() / n as f64
}

/// Values as `[1, n]`.
pub(super) fn row(values: impl IntoIterator<Item = f64>, device: &Device) -> Tensor<2> {
    let values = values.into_iter().map(|value| value as f32).collect::<Vec<_>>();
    let width = values.len();
    Tensor::from_data(TensorData::new(values, [1, width]), device)
}

/// The same values row after row in memory: the order of a sum must not depend on whether a factor was read
/// from a file.
pub(super) fn in_rows(t: Tensor<2>) -> Tensor<2> {
    let (dims, device) = (t.dims(), t.device());
    Tensor::from_data(TensorData::new(linalg::host(t), dims), &device)
}
