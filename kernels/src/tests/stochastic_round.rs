use burn::backend::Flex;
use burn::tensor::{DType, FloatDType};

use super::{Random, View, place, values_of};
use crate::LowRankOps;

/// Every value goes to one of its two neighbours in bf16, and a thousand draws of it average to itself.
#[test]
fn the_mean_is_kept() {
    let mut random = Random::new(21);
    let numbers: Vec<f32> = (0..40).map(|i| random.normal() * 10f32.powi(i % 7 - 3)).collect();
    let draws = 2000;
    let repeated: Vec<f32> = (0..draws).flat_map(|_| numbers.clone()).collect();
    let x = place(&repeated, &[draws, numbers.len()], View::Packed);
    let kernels: [(&str, fn(burn_flex::FlexTensor, FloatDType, u64) -> burn_flex::FlexTensor); 2] =
        [("kernel", Flex::stochastic_round), ("reference", crate::stochastic_round::reference::<Flex>)];
    for (name, round) in kernels {
        let rounded = round(x.clone(), FloatDType::BF16, 7);
        assert_eq!(rounded.dtype(), DType::BF16);
        let rounded = values_of(&rounded);
        for (i, &number) in numbers.iter().enumerate() {
            let below = f32::from_bits(number.to_bits() & 0xffff_0000); // towards zero
            let above = f32::from_bits((number.to_bits() & 0xffff_0000) + 0x1_0000);
            let unit = f64::from((above - below).abs());
            let drawn: Vec<f32> = rounded.iter().skip(i).step_by(numbers.len()).copied().collect();
            assert!(drawn.iter().all(|&v| v == below || v == above), "{name}: {number}");
            let mean = drawn.iter().map(|&v| f64::from(v)).sum::<f64>() / draws as f64;
            // The deviation of one draw is at most half a unit; five standard errors of the mean.
            let allowed = 5.0 * 0.5 * unit / (draws as f64).sqrt();
            assert!((mean - f64::from(number)).abs() < allowed, "{name}: {number} became {mean}, unit {unit}");
        }
    }
}

#[test]
fn what_is_representable_stays_and_seeds_differ() {
    let exact = [0.0f32, 1.0, -2.5, 1024.0, f32::INFINITY, f32::NEG_INFINITY];
    let x = place(&exact, &[2, 3], View::Packed);
    assert_eq!(values_of(&Flex::stochastic_round(x, FloatDType::BF16, 3)), exact);
    let mut random = Random::new(22);
    let x = random.tensor(&[16, 16]);
    let [a, again, b] = [1, 1, 2].map(|seed| values_of(&Flex::stochastic_round(x.clone(), FloatDType::BF16, seed)));
    assert_eq!(a, again);
    assert_ne!(a, b);
}

/// In f16 too, the values below 2^-14 included; there a draw has 16 bits.
#[test]
fn the_mean_is_kept_in_f16() {
    let mut random = Random::new(23);
    let numbers: Vec<f32> = (0..60).map(|i| random.normal() * 10f32.powi(i % 12 - 8)).collect();
    let draws = 2000;
    let repeated: Vec<f32> = (0..draws).flat_map(|_| numbers.clone()).collect();
    let x = place(&repeated, &[draws, numbers.len()], View::Packed);
    let rounded = Flex::stochastic_round(x, FloatDType::F16, 7);
    assert_eq!(rounded.dtype(), DType::F16);
    let rounded = values_of(&rounded);
    for (i, &number) in numbers.iter().enumerate() {
        let unit = f64::from(number.abs()).log2().floor().max(-14.0).exp2() / 1024.0;
        let below = (f64::from(number) / unit).floor() * unit;
        let drawn: Vec<f64> = rounded.iter().skip(i).step_by(numbers.len()).map(|&v| f64::from(v)).collect();
        assert!(drawn.iter().all(|&v| v == below || v == below + unit), "{number}");
        let mean = drawn.iter().sum::<f64>() / draws as f64;
        // As above, and a draw of 13 bits and of 16 bits moves the mean by up to 2^-13 of a unit.
        let allowed = 5.0 * 0.5 * unit / (draws as f64).sqrt() + unit / 8192.0;
        assert!((mean - f64::from(number)).abs() < allowed, "{number} became {mean}, unit {unit}");
    }
    let edges = [0.0f32, -0.0, 65504.0, -65504.0, 65510.0, 6.103_515_6e-5, 5.960_464_5e-8, 1e6, f32::INFINITY];
    let x = place(&edges, &[3, 3], View::Packed);
    let expected =
        [0.0f32, -0.0, 65504.0, -65504.0, 65504.0, 6.103_515_6e-5, 5.960_464_5e-8, f32::INFINITY, f32::INFINITY];
    let got = values_of(&Flex::stochastic_round(x, FloatDType::F16, 3));
    assert_eq!(got.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), expected.map(f32::to_bits));
}
