//! Whether tiles are trusted on a device: before they are chosen there, both passes of a small case are compared with the CPU.
//!
//! What a fragment holds where is up to each device's compiler, and wrong numbers would look like a model that learns badly. One
//! trial a process for each width and type of heads: some milliseconds, and kernels that are needed anyway.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::backend::Flex;
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::tensor::{DType, FloatDType, IntDType, TensorData};
use burn_cubecl::CubeBackend;
use burn_cubecl::ops::into_data_sync;
use burn_cubecl::tensor::CubeTensor;

use super::product::Form;
use super::tile::Tile;
use super::{Sizes, tile, tiles_backward, tiles_forward};
use crate::attention::{NOTHING_SEEN, backward_reference, reference};

type Key = (String, Form, DType, usize, bool);

static TRIED: LazyLock<Mutex<HashMap<Key, bool>>> = LazyLock::new(Mutex::default);

/// Whether tiles of this form compute on this device what the CPU does, with heads as those of `like`.
pub(super) fn passes(form: Form, s: &Sizes, like: &CubeTensor) -> bool {
    let key = (format!("{:?}", like.device), form, like.dtype, s.width, s.softcap > 0.0);
    let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    *tried.entry(key).or_insert_with(|| {
        let (worst, allowed) = (distance(form, s, like), allowed(like.dtype));
        let heads = format!("attention with heads of {} numbers of {:?}", s.width, like.dtype);
        match worst <= allowed {
            true => tracing::info!("{heads}: {form:?} in tiles, within {worst:.1e} of the CPU"),
            false => tracing::warn!(
                "{heads}: {form:?} in tiles are off by {worst:.1e} on this device (allowed: {allowed:.0e}), so attention goes by \
                 chunks; please report this with the output of `lowrank-train doctor`"
            ),
        }
        worst <= allowed
    })
}

/// A few times what rounding to the type leaves in sums of some dozen products; a wrong place in a fragment is off by the
/// size of the numbers themselves.
fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 4e-2,
        DType::F16 => 5e-3,
        _ => 1e-4,
    }
}

/// Sequences with more queries than the largest tile has and no multiple of any: whole, and with a window.
const QUERIES: usize = 70;
const WINDOW: usize = 21;

/// Largest distance of an output from that of the CPU, as a share of the output's largest number.
fn distance(form: Form, s: &Sizes, like: &CubeTensor) -> f64 {
    let small = Sizes { sequences: 2, queries: QUERIES, keys: QUERIES, heads: 4, groups: 2, ..*s };
    let shape = |heads: usize| [2, QUERIES, heads, s.width];
    // the multiples of 1/16 below 2 are exact in every type
    let value = |seed: usize, i: usize| (((i + 17) * (2 * seed + 7919) % 1009) % 63) as f32 / 16.0 - 31.0 / 16.0;
    let values = |seed: usize, heads: usize| {
        let count = shape(heads).iter().product();
        TensorData::new((0..count).map(|i| value(seed, i)).collect::<Vec<f32>>(), shape(heads))
    };
    let first = |i: usize| if i < QUERIES { 0 } else { (i - QUERIES).saturating_sub(WINDOW - 1) };
    // the fourth row sees nothing
    let range = |i: usize| if i == 3 { [0, 0] } else { [first(i) as i32, (i % QUERIES) as i32 + 1] };
    let ranges = TensorData::new((0..2 * QUERIES).flat_map(range).collect::<Vec<i32>>(), [2, QUERIES, 2]);
    let inputs = [values(1, 4), values(2, 2), values(3, 2), values(4, 4)];

    let [q, k, v, d_out] = inputs.clone().map(|data| Flex::float_from_data(data, &Default::default()));
    let host_ranges = Flex::int_from_data(ranges.clone(), &Default::default());
    let (scale, softcap) = (s.scale, s.softcap);
    let (out, lse) = reference::<Flex>(q.clone(), k.clone(), v.clone(), host_ranges.clone(), scale, softcap);
    let (dq, dk, dv) =
        backward_reference::<Flex>(q, k, v, out.clone(), lse.clone(), d_out, host_ranges, scale, softcap);
    let want = [out, lse, dq, dk, dv].map(|x| floats(burn::backend::read_sync(Flex::float_into_data(x)).ok()));

    let [q, k, v, d_out] =
        inputs.map(|data| CubeBackend::float_cast(CubeBackend::float_from_data(data, &like.device), type_of(like)));
    let ranges = CubeBackend::int_cast(CubeBackend::int_from_data(ranges, &like.device), IntDType::I32);
    let inputs = [q, k, v, ranges];
    let mut got = vec![];
    if let Some(t) = tile(form, &small, like, Tile::forward_bytes) {
        let (out, lse) = tiles_forward::forward(small, t, inputs.clone());
        got.extend([out.clone(), lse.clone()]);
        if let Some(t) = tile(form, &small, like, Tile::backward_bytes) {
            let (dq, dk, dv) = tiles_backward::backward(small, t, inputs, [out, lse, d_out]);
            got.extend([dq, dk, dv]);
        }
    }
    let got = got.into_iter().map(|x| floats(Some(into_data_sync(CubeBackend::float_cast(x, FloatDType::F32)))));
    got.zip(&want).map(|(got, want)| apart(&got, want)).fold(0.0, worse)
}

fn type_of(like: &CubeTensor) -> FloatDType {
    like.dtype.into()
}

/// Nothing for what cannot be read, which no comparison passes.
fn floats(data: Option<TensorData>) -> Vec<f32> {
    data.and_then(|data| data.try_to_vec::<f32>().ok()).unwrap_or_default()
}

fn apart(got: &[f32], want: &[f32]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let is_seen = |x: f32| x > NOTHING_SEEN / 2.0;
    let largest = want.iter().copied().filter(|&x| is_seen(x)).fold(0.0f32, |largest, x| largest.max(x.abs()));
    let off = got.iter().zip(want).map(|(&got, &want)| match is_seen(want) {
        true => f64::from((got - want).abs()),
        false if is_seen(got) => f64::INFINITY,
        false => 0.0,
    });
    off.fold(0.0, worse) / f64::from(largest)
}

/// The larger; a number that is none is larger than any.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b <= a { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_is_a_share_of_the_largest_number_seen() {
        assert_eq!(apart(&[1.0, -4.0, NOTHING_SEEN], &[1.0, -2.0, NOTHING_SEEN]), 1.0);
        assert_eq!(apart(&[1.0, 2.0], &[NOTHING_SEEN, 2.0]), f64::INFINITY);
        assert_eq!(apart(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert!(apart(&[f32::NAN, 1.0], &[0.0, 1.0]).is_nan());
        assert!(worse(f64::NAN, 1.0).is_nan() && worse(1.0, f64::NAN).is_nan());
    }
}
