use burn::backend::tensor::FloatTensor;
use burn::backend::{AutodiffBackend, Flex};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_flex::FlexTensor;

use super::{
    F32, Random, Tape, VIEWS, View, assert_close, assert_same_gradients, differentiate, integers, leaves, other_owners,
    place, values_of,
};
use crate::packed::{Format, Layout, Nested, Order, PackedParts, Scales, reference, scales, words};
use crate::{LowRankOps, Maybe, Packed};

/// A packed weight and the values that its codes stand for, in the order in which they are flattened.
struct Case {
    name: String,
    parts: PackedParts<Flex>,
    values: Vec<f32>,
}

/// Words of codes from bytes, and the codes.
fn codes(random: &mut Random, count: usize, bits: usize) -> (Vec<i32>, Vec<usize>) {
    let per_word = 32 / bits;
    let words: Vec<i32> =
        (0..count.div_ceil(per_word)).map(|_| (random.uniform() * f64::from(u32::MAX)) as u32 as i32).collect();
    let code = |i: usize| (words[i / per_word] as u32 >> (bits * (i % per_word))) as usize & ((1 << bits) - 1);
    let codes = (0..count).map(code).collect();
    (words, codes)
}

impl Case {
    fn new(random: &mut Random, format: Format, block: usize, nested: Option<usize>, dims: [usize; 2]) -> Self {
        Self::ordered(random, format, block, nested, dims, Order::Outputs)
    }

    fn ordered(
        random: &mut Random,
        format: Format,
        block: usize,
        nested: Option<usize>,
        dims: [usize; 2],
        order: Order,
    ) -> Self {
        let nested = nested.map(|block| Nested { block, offset: 0.7 });
        let layout = Layout { format, block, dims, order, nested };
        let (blocks, len) = (layout.blocks(), layout.len());
        let vector = |values: &[f32]| place(values, &[values.len()], View::Packed);
        let (code_words, codes_) = codes(random, len, format.bits());
        let code_words = integers(&code_words, &[layout.words()]);
        let (second_words, seconds) = codes(random, blocks, 8);
        let second_words = integers(&second_words, &[blocks.div_ceil(4)]);
        let (table, scale) = (random.values(16), random.values(blocks));
        let (parts, value): (_, Box<dyn Fn(usize) -> f32>) = match (format, nested) {
            (Format::Int8 | Format::Int4, _) => (
                PackedParts::Affine { codes: code_words, scale: vector(&scale), zero: second_words, layout },
                Box::new(|i| (codes_[i] as f32 - seconds[i / block] as f32) * scale[i / block]),
            ),
            (_, None) => (
                PackedParts::Table { codes: code_words, table: vector(&table), scale: vector(&scale), layout },
                Box::new(|i| table[codes_[i]] * scale[i / block]),
            ),
            (_, Some(nested)) => {
                let (map, absmax) = (random.values(256), random.values(blocks.div_ceil(nested.block)));
                let parts = PackedParts::Nested {
                    codes: code_words,
                    table: vector(&table),
                    scale_codes: second_words,
                    map: vector(&map),
                    absmax: vector(&absmax),
                    layout,
                };
                let (table, codes_, seconds) = (table.clone(), codes_.clone(), seconds.clone());
                let scale = move |b: usize| map[seconds[b]] * absmax[b / nested.block] + nested.offset;
                (parts, Box::new(move |i| table[codes_[i]] * scale(i / block)))
            }
        };
        let values = (0..len).map(value).collect();
        Self { name: format!("{format:?} {block} {nested:?} {dims:?} {order:?}"), parts, values }
    }

    /// The flattened matrix.
    fn stored(&self) -> FlexTensor {
        place(&self.values, &self.parts.layout().stored(), View::Packed)
    }

    /// W, `[d_in, d_out]`.
    fn weight(&self) -> FlexTensor {
        use burn::backend::ops::FloatTensorOps;
        match self.parts.layout().order {
            Order::Outputs => Flex::float_transpose(self.stored()),
            Order::Inputs => self.stored(),
        }
    }

    fn on_tape(&self) -> PackedParts<Tape> {
        let lift = |tensor: FlexTensor| <Tape as AutodiffBackend>::from_inner(tensor);
        match self.parts.clone() {
            PackedParts::Table { codes, table, scale, layout } => {
                PackedParts::Table { codes, table: lift(table), scale: lift(scale), layout }
            }
            PackedParts::Nested { codes, table, scale_codes, map, absmax, layout } => PackedParts::Nested {
                codes,
                table: lift(table),
                scale_codes,
                map: lift(map),
                absmax: lift(absmax),
                layout,
            },
            PackedParts::Affine { codes, scale, zero, layout } => {
                PackedParts::Affine { codes, scale: lift(scale), zero, layout }
            }
        }
    }

    /// `[d_in, d_out]` as a constant of the tape.
    fn constant(&self) -> FloatTensor<Tape> {
        <Tape as AutodiffBackend>::from_inner(self.weight())
    }
}

/// Every format, both orders; blocks that straddle rows, a short last block, one output, one value, rows that end inside a word.
fn cases(random: &mut Random) -> Vec<Case> {
    let kinds = [
        (Format::Nf4, 64, None),
        (Format::Fp4, 32, None),
        (Format::Nf4, 64, Some(256)),
        (Format::Nf4, 32, Some(4)),
        (Format::Int8, 256, None),
        (Format::Int4, 64, None),
    ];
    let dims = [[64, 8], [70, 5], [96, 33], [200, 129], [3, 1], [1, 1], [1, 40], [257, 3]];
    let all = kinds.into_iter().flat_map(|kind| dims.map(|dims| (kind, dims)));
    all.flat_map(|((format, block, nested), dims)| {
        let mut case = |order| Case::ordered(random, format, block, nested, dims, order);
        [case(Order::Outputs), case(Order::Inputs)]
    })
    .collect()
}

#[test]
fn values_are_those_of_the_codes_on_both_routes() {
    for case in cases(&mut Random::new(1)) {
        let [count, cols] = case.parts.layout().stored();
        let all = case.stored();
        let got = Flex::dequantise(case.parts.clone(), 0, count, FloatDType::F32);
        assert_eq!(values_of(&got), case.values, "{}", case.name);
        let plain = reference::dequantise::<Flex>(&case.parts, 0, count, FloatDType::F32);
        assert_eq!(values_of(&plain), case.values, "{} by the reference", case.name);
        let (first, rows) = (count / 3, count - count / 3);
        let some = Flex::dequantise(case.parts.clone(), first, rows, FloatDType::BF16);
        let plain = reference::dequantise::<Flex>(&case.parts, first, rows, FloatDType::BF16);
        assert_eq!((some.dtype(), values_of(&some)), (DType::BF16, values_of(&plain)), "{}", case.name);
        let low = super::cast(&all, DType::BF16);
        assert_eq!(values_of(&some), values_of(&low)[first * cols..], "{}", case.name);
    }
}

#[test]
fn products_and_gradients_are_those_of_the_dense_weight() {
    let mut random = Random::new(2);
    for case in cases(&mut random) {
        let [d_in, d_out] = case.parts.layout().dims;
        for (view, tokens) in VIEWS.into_iter().zip([17, 1, 5]) {
            let inputs = [random.view(&[tokens, d_in], view), random.view(&[d_out], view)];
            let dy = random.view(&[tokens, d_out], view);
            for count in [1, 2] {
                let bias =
                    |x: &[FloatTensor<Tape>]| if count == 2 { Maybe::Given(x[1].clone()) } else { Maybe::Absent };
                assert_same_gradients(
                    &format!("{} {view:?} {count}", case.name),
                    &inputs[..count],
                    &dy,
                    F32,
                    |x| Tape::packed_linear(x[0].clone(), case.on_tape(), bias(x)),
                    |x| Tape::dense_linear(x[0].clone(), case.constant(), bias(x)),
                );
            }
        }
    }
}

/// More values than a panel has, whose rows end inside words and blocks; and the reference in small panels.
#[test]
fn panels_make_up_the_whole() {
    let mut random = Random::new(3);
    let kinds = [
        (Format::Nf4, Some(256), [1001, 600], Order::Outputs),
        (Format::Int4, None, [40_003, 35], Order::Outputs),
        (Format::Int8, None, [8192, 65], Order::Outputs),
        (Format::Int8, None, [601, 1001], Order::Inputs),
        (Format::Int4, None, [35, 40_003], Order::Inputs),
    ];
    for (format, nested, dims, order) in kinds {
        let case = Case::ordered(&mut random, format, 64, nested, dims, order);
        let [d_in, d_out] = dims;
        // Of the size of a weight after training, so that the sums are of order one.
        let x = random.tensor(&[3, d_in]);
        let (dy, bias) = (random.tensor(&[3, d_out]), random.tensor(&[d_out]));
        let dense = Flex::dense_linear(x.clone(), case.weight(), Maybe::Given(bias.clone()));
        let transposed = <Flex as burn::backend::ops::FloatTensorOps<Flex>>::float_transpose(case.weight());
        let dx = Flex::gemm(dy.clone(), transposed, Maybe::Absent, 1.0);
        let got = Flex::packed_linear(x.clone(), case.parts.clone(), Maybe::Given(bias.clone()));
        assert_close(&format!("{} y", case.name), &got, &dense, F32);
        let got = Flex::packed_linear_backward(dy.clone(), case.parts.clone());
        assert_close(&format!("{} dx", case.name), &got, &dx, F32);
        let got = reference::linear::<Flex>(x, case.parts.clone(), Some(bias), 100_000);
        assert_close(&format!("{} y by the reference", case.name), &got, &dense, F32);
        let got = reference::input_gradient::<Flex>(dy, case.parts.clone(), 100_000);
        assert_close(&format!("{} dx by the reference", case.name), &got, &dx, F32);
    }
}

/// A trained weight that is held as codes: everything as with the dense weight, but that the gradient arrives at a placeholder.
#[test]
fn collected_gradients_of_codes_are_those_of_the_dense_weight() {
    let mut random = Random::new(7);
    let (tokens, r) = (6, 3);
    for order in [Order::Outputs, Order::Inputs] {
        let case = Case::ordered(&mut random, Format::Int8, 32, None, [40, 21], order);
        let inputs = [random.tensor(&[tokens, 40]), case.weight(), random.tensor(&[21])];
        let dy = random.tensor(&[tokens, 21]);
        let constant = |dims: &[usize], random: &mut Random| <Tape as AutodiffBackend>::from_inner(random.tensor(dims));
        let (left, right) = (constant(&[40, r], &mut random), constant(&[21, r], &mut random));
        let up = constant(&[r, 21], &mut random);
        for (sides, keep) in [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (1, 0.8), (3, 0.8)] {
            let part = |given: bool, tensor: &FloatTensor<Tape>| Maybe::from_option(given.then(|| tensor.clone()));
            let (p, q) = (|| part(sides & 1 > 0, &left), || part(sides & 2 > 0, &right));
            let pending = || part(keep != 1.0, &up);
            // The placeholder is the dense weight: only its node is used.
            assert_same_gradients(
                &format!("{} {sides} {keep}", case.name),
                &inputs,
                &dy,
                F32,
                |x| {
                    let ([x, slot], bias) = ([0, 1].map(|i| x[i].clone()), Maybe::Given(x[2].clone()));
                    Tape::packed_projected_linear(x, case.on_tape(), bias, p(), q(), pending(), keep, slot)
                },
                |x| {
                    let ([x, w], bias) = ([0, 1].map(|i| x[i].clone()), Maybe::Given(x[2].clone()));
                    Tape::projected_linear(x, w, bias, p(), q(), pending(), keep)
                },
            );
        }
        let slots = [inputs[0].clone(), dy.clone(), dy.clone()];
        assert_same_gradients(
            &format!("{} factors", case.name),
            &slots,
            &dy,
            F32,
            |x| {
                let [x, a, b] = [0, 1, 2].map(|i| x[i].clone());
                let none = || Maybe::Absent;
                Tape::packed_factored_linear(x, case.on_tape(), none(), none(), none(), 1.0, a, b)
            },
            |x| {
                let [x, a, b] = [0, 1, 2].map(|i| x[i].clone());
                let none = || Maybe::Absent;
                Tape::factored_linear(x, case.constant(), none(), none(), none(), 1.0, a, b)
            },
        );
    }
}

#[test]
fn adapters_on_packed_weights_get_the_gradients_of_the_dense_weight() {
    let mut random = Random::new(4);
    for case in cases(&mut random) {
        let [d_in, d_out] = case.parts.layout().dims;
        for masked in [false, true] {
            let (tokens, r) = (6, 3);
            let inputs = [
                random.tensor(&[tokens, d_in]),
                random.tensor(&[d_in, r]),
                random.tensor(&[r, d_out]),
                random.tensor(&[d_out]),
            ];
            let mask = random.tensor(&[tokens, d_in]);
            let mask = || Maybe::from_option(masked.then(|| <Tape as AutodiffBackend>::from_inner(mask.clone())));
            let dy = random.tensor(&[tokens, d_out]);
            let bias = |x: &[FloatTensor<Tape>]| Maybe::Given(x[3].clone());
            assert_same_gradients(
                &format!("{} masked {masked}", case.name),
                &inputs,
                &dy,
                F32,
                |x| {
                    let [input, down, up] = [0, 1, 2].map(|i| x[i].clone());
                    Tape::packed_lowrank_linear(input, case.on_tape(), bias(x), mask(), down, up, 1.7)
                },
                |x| {
                    let [input, down, up] = [0, 1, 2].map(|i| x[i].clone());
                    Tape::lowrank_linear(input, case.constant(), bias(x), mask(), down, up, 1.7)
                },
            );
        }
    }
}

#[test]
fn the_input_is_not_saved_and_low_precision_inputs_keep_their_type() {
    let mut random = Random::new(5);
    let case = Case::new(&mut random, Format::Nf4, 64, Some(256), [40, 12]);
    let x = random.tensor(&[6, 40]);
    let input = leaves(std::slice::from_ref(&x), &[true]);
    let out = Tape::packed_linear(input[0].clone(), case.on_tape(), Maybe::Absent);
    drop(input);
    assert_eq!(other_owners(&x), 0);
    drop(out);
    let low = super::cast(&x, DType::BF16);
    let (y, grads) =
        differentiate(std::slice::from_ref(&low), &[true], &super::cast(&random.tensor(&[6, 12]), DType::BF16), |x| {
            Tape::packed_linear(x[0].clone(), case.on_tape(), Maybe::Absent)
        });
    assert_eq!((y.dtype(), grads[0].as_ref().unwrap().dtype()), (DType::BF16, DType::BF16));
}

#[test]
fn tensors_on_a_plain_device_serve_inputs_on_the_tape() {
    let mut random = Random::new(6);
    let device = Device::flex();
    let layout = Layout { format: Format::Int8, block: 32, dims: [5, 7], order: Order::Outputs, nested: None };
    let (code_words, _) = codes(&mut random, layout.len(), 8);
    let (zero, _) = codes(&mut random, layout.blocks(), 8);
    let affine = Scales::Affine { scale: scales(random.values(layout.blocks()), &device), zero: words(zero, &device) };
    let packed = Packed::new(layout, words(code_words, &device), affine);
    assert_eq!((packed.dims(), packed.bytes()), ([5, 7], 36 + 8 + 4));
    let dense = packed.dense(FloatDType::F32);
    assert_eq!(dense.dims(), [5, 7]);
    let values = |tensor: Tensor<2>| tensor.into_data().try_to_vec::<f32>().unwrap();
    assert_eq!(values(packed.rows(2..4, FloatDType::F32)), values(dense.clone().transpose().slice([2..4, 0..5])));
    let x = Tensor::<2>::ones([3, 5], &device.autodiff()).require_grad();
    let y = crate::linear(x.clone(), packed.clone(), None);
    let grads = crate::backward_from(y.clone(), Tensor::ones([3, 7], &Device::flex().autodiff()));
    let want = Tensor::<2>::ones([3, 7], &Device::flex()).matmul(dense.clone().transpose());
    let got = values(x.grad(&grads).unwrap());
    assert!(got.iter().zip(values(want)).all(|(got, want)| (got - want).abs() <= 1e-5 * want.abs().max(1.0)));
    let want = values(Tensor::<2>::ones([3, 5], &Device::flex()).matmul(dense));
    assert!(values(y.inner()).iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-5 * want.abs().max(1.0)));
}

#[test]
#[should_panic(expected = "words of codes")]
fn too_few_codes_are_refused() {
    let device = Device::flex();
    let layout = Layout { format: Format::Nf4, block: 64, dims: [16, 4], order: Order::Outputs, nested: None };
    let table = Scales::Table { table: scales(vec![0.0; 16], &device), scale: scales(vec![1.0], &device) };
    Packed::new(layout, words(vec![0; 7], &device), table);
}
