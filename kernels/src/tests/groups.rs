use burn::backend::Flex;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use burn_flex::FlexTensor;

use super::{Random, VIEWS, View, place, values_of};
use crate::groups::{encode, grid, reference, top};
use crate::packed::{Format, Layout, Order, Scales};
use crate::{LowRankOps, Rounding};

fn layout(format: Format, block: usize, dims: [usize; 2]) -> Layout {
    Layout { format, block, dims, order: Order::Inputs, nested: None }
}

fn words_of(tensor: &FlexTensor) -> Vec<i32> {
    tensor.storage::<i32>().to_vec()
}

/// The codes of some words.
fn codes_of(words: &[i32], bits: usize, count: usize) -> Vec<u8> {
    let code = |i: usize| (words[i * bits / 32] as u32 >> (i * bits % 32)) as u8 & ((1u16 << bits) - 1) as u8;
    (0..count).map(code).collect()
}

const CASES: [(Format, usize, [usize; 2]); 7] = [
    (Format::Int8, 256, [40, 72]),
    (Format::Int8, 32, [7, 13]),
    (Format::Int4, 64, [30, 50]),
    (Format::Int4, 8, [3, 7]),
    (Format::Int8, 4096, [1, 1]),
    (Format::Int4, 24, [1, 25]),
    (Format::Int8, 64, [130, 67]),
];

/// Nearest rounding has the same bits as the reference; both have those of the functions for the host.
#[test]
fn words_scales_and_zeros_are_those_of_the_reference_and_of_the_host() {
    let mut random = Random::new(41);
    for (format, block, dims) in CASES {
        let (layout, bits, len) = (layout(format, block, dims), format.bits(), dims[0] * dims[1]);
        for (view, offset) in VIEWS.into_iter().zip([0.0, 1.5, -1.5]) {
            let values: Vec<f32> = random.values(len).iter().map(|x| 0.3 * x + offset).collect();
            let tensor = place(&values, &dims, view);
            let seed = 7u64 << 60;
            let (words, scale, zero) = Flex::pack_groups(tensor.clone(), layout, Rounding::Nearest);
            let (drawn, ..) = Flex::pack_groups(tensor.clone(), layout, Rounding::Stochastic { seed });
            let plain = reference::<Flex>(tensor, layout, Rounding::Nearest);
            let what = format!("{layout:?} {view:?}");
            assert_eq!(values_of(&scale), values_of(&plain.1), "{what}: scales");
            assert_eq!(words_of(&zero), words_of(&plain.2), "{what}: zeros");
            assert_eq!(words_of(&words), words_of(&plain.0), "{what}: words");
            for (rounding, words) in [(Rounding::Nearest, words), (Rounding::Stochastic { seed }, drawn)] {
                let (codes, zeros) =
                    (codes_of(&words_of(&words), bits, len), codes_of(&words_of(&zero), 8, scale.layout().shape()[0]));
                for (i, values) in values.chunks(block).enumerate() {
                    let (step, shift) = grid(values, top(bits));
                    assert_eq!((values_of(&scale)[i], zeros[i]), (step, shift), "{what}: group {i}");
                    let mut expected = vec![0; values.len()];
                    encode(values, step, shift, top(bits), rounding.after(i * block), &mut expected);
                    assert_eq!(codes[i * block..][..values.len()], expected, "{what}: group {i}");
                }
            }
        }
    }
}

/// The mean of many draws is the value, and the two neighbours are all that is drawn.
#[test]
fn draws_of_kernel_and_reference_keep_the_mean() {
    let (count, layout) = (65536, layout(Format::Int4, 65536, [256, 256]));
    let mut values = vec![0.217f32; count];
    (values[0], values[count - 1]) = (-1.0, 2.0);
    let tensor = place(&values, &[256, 256], View::Packed);
    let run: [fn(FlexTensor, Layout, Rounding) -> _; 2] = [Flex::pack_groups, reference::<Flex>];
    let mut drawn = vec![];
    for (run, seed) in run.into_iter().zip([1, 2]) {
        let (words, scale, zero) = run(tensor.clone(), layout, Rounding::Stochastic { seed });
        let (step, shift) = (values_of(&scale)[0], words_of(&zero)[0] as u8);
        let codes = codes_of(&words_of(&words), 4, count);
        let got: Vec<f64> =
            codes[1..count - 1].iter().map(|&q| f64::from((f32::from(q) - f32::from(shift)) * step)).collect();
        let below = f64::from((0.217f32 / step).floor() * step);
        assert!(got.iter().all(|&v| (v - below).abs() < 1e-6 || (v - below - f64::from(step)).abs() < 1e-6));
        let mean = got.iter().sum::<f64>() / got.len() as f64;
        let variance = got.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / got.len() as f64;
        // Four standard errors of the mean.
        assert!(
            variance > 0.0 && (mean - f64::from(0.217f32)).abs() < 4.0 * (variance / got.len() as f64).sqrt(),
            "{mean}"
        );
        drawn.push(codes);
    }
    let again = Flex::pack_groups(tensor, layout, Rounding::Stochastic { seed: 1 });
    assert_eq!(codes_of(&words_of(&again.0), 4, count), drawn[0]);
}

#[test]
fn weights_come_in_both_orders_and_nothing_is_nothing() {
    let mut random = Random::new(42);
    let (device, values) = (Device::flex(), random.values(24 * 20));
    let weight = Tensor::<2>::from_data(TensorData::new(values, [24, 20]), &device);
    for order in [Order::Inputs, Order::Outputs] {
        let layout = Layout { order, ..layout(Format::Int8, 32, [24, 20]) };
        let packed = crate::pack_groups(weight.clone(), layout, Rounding::Nearest);
        let Scales::Affine { scale, .. } = packed.scales() else { panic!("groups have a scale and a zero") };
        let largest = scale.clone().max().into_scalar::<f32>();
        let error = (packed.dense(FloatDType::F32) - weight.clone()).abs().max().into_scalar::<f32>();
        assert!(error <= 0.5 * largest * 1.001 && error > 0.0, "{order:?}: {error} of {largest}");
    }
    let nothing =
        crate::pack_groups(Tensor::zeros([0, 4], &device), layout(Format::Int4, 8, [0, 4]), Rounding::Nearest);
    assert_eq!((nothing.codes().dims(), nothing.dims()), ([0], [0, 4]));
}

/// Values that are not finite do no harm to other groups.
#[test]
fn what_is_not_finite_stays_in_its_group() {
    let mut random = Random::new(43);
    let layout = layout(Format::Int8, 32, [4, 32]);
    let values = random.values(128);
    let clean = Flex::pack_groups(place(&values, &[4, 32], View::Packed), layout, Rounding::Nearest);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = values.clone();
        values[40] = bad;
        let got = Flex::pack_groups(place(&values, &[4, 32], View::Packed), layout, Rounding::Nearest);
        let (got, clean) = (words_of(&got.0), words_of(&clean.0));
        assert_eq!((&got[..8], &got[16..]), (&clean[..8], &clean[16..]));
    }
}

#[test]
fn rounding_takes_halves_to_even() {
    // A grid of whole steps: -128 to 127.
    let values: Vec<f32> = (-1024..1017).map(|i| i as f32 / 8.0).collect();
    let (mut codes, zero) = (vec![0; values.len()], 128);
    encode(&values, 1.0, zero, top(8), Rounding::Nearest, &mut codes);
    for (value, code) in values.iter().zip(codes) {
        assert_eq!(f32::from(code) - 128.0, value.round_ties_even(), "{value}");
    }
}
