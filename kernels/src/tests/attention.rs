use burn::backend::{AutodiffBackend, Flex};
use burn_flex::FlexTensor;

use super::{F32, Random, Tape, VIEWS, View, assert_close, assert_same_gradients, differentiate, integers, values_of};
use crate::{AttentionHints, KnownKeys, LowRankOps, attention};

/// Who sees what.
#[derive(Clone, Copy, Debug)]
enum Mask {
    /// Query `i` of the last `sq` positions sees keys up to its own.
    Causal,
    /// All keys.
    Full,
    /// Documents of this length packed one after another.
    Packed(usize),
    /// Documents of 50 tokens, of which only the last few are seen.
    Window(usize),
    /// As `Packed(20)`, but the second half of the row is padding that sees nothing, or itself.
    Padding { sees_itself: bool },
    /// Ranges that end before they start or lie beyond the keys: nothing is seen, as with equal bounds.
    Nothing,
}

const MASKS: [Mask; 8] = [
    Mask::Causal,
    Mask::Full,
    Mask::Packed(7),
    Mask::Packed(40),
    Mask::Window(5),
    Mask::Padding { sees_itself: true },
    Mask::Padding { sees_itself: false },
    Mask::Nothing,
];

impl Mask {
    fn range(self, row: usize, queries: usize, keys: usize) -> (usize, usize) {
        let end = keys - queries + row + 1;
        let document = |length: usize| (row / length * length, end);
        match self {
            Mask::Causal => (0, end),
            Mask::Full => (0, keys),
            Mask::Packed(length) => document(length),
            Mask::Window(width) => (document(50).0.max(end.saturating_sub(width)), end),
            Mask::Padding { sees_itself } if row >= queries / 2 => (end - usize::from(sees_itself), end),
            Mask::Padding { .. } => document(20),
            Mask::Nothing => [(5, 5), (9, 3), (keys + 3, keys + 9)][row % 3],
        }
    }
    fn ranges(self, sequences: usize, queries: usize, keys: usize) -> FlexTensor {
        let values: Vec<i32> = (0..sequences * queries)
            .map(|row| self.range(row % queries, queries, keys))
            .flat_map(|(first, end)| [first as i32, end as i32])
            .collect();
        integers(&values, &[sequences, queries, 2])
    }
}

/// `(b, sq, sk, h, g, d)`: several query tiles with an odd tail, 1:1, 2:1 and 9:3 heads, one query against a cache, size 1.
const SHAPES: [(usize, usize, usize, usize, usize, usize); 6] = [
    (2, 130, 130, 2, 1, 16),
    (1, 33, 33, 9, 3, 8),
    (3, 5, 5, 2, 2, 5),
    (2, 1, 37, 4, 2, 16),
    (1, 3, 40, 1, 1, 64),
    (1, 1, 1, 1, 1, 1),
];

fn inputs(random: &mut Random, shape: (usize, usize, usize, usize, usize, usize), view: View) -> [FlexTensor; 3] {
    let (b, sq, sk, h, g, d) = shape;
    [random.view(&[b, sq, h, d], view), random.view(&[b, sk, g, d], view), random.view(&[b, sk, g, d], view)]
}

fn scale(d: usize) -> f32 {
    1.0 / (d as f32).sqrt()
}

#[test]
fn output_and_gradients_are_those_of_the_reference() {
    let mut random = Random::new(1);
    for shape in SHAPES {
        let (b, sq, sk, h, _, d) = shape;
        for (mask, softcap) in MASKS.into_iter().flat_map(|mask| [(mask, 0.0), (mask, 2.0)]) {
            let inputs = inputs(&mut random, shape, View::Packed);
            let dy = random.tensor(&[b, sq, h, d]);
            let ranges = mask.ranges(b, sq, sk);
            let what = format!("{shape:?} {mask:?} softcap {softcap}");
            assert_same_gradients(
                &what,
                &inputs,
                &dy,
                F32,
                |x| {
                    let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
                    Tape::range_attention(
                        q,
                        k,
                        v,
                        Tape::int_from_inner(ranges.clone()),
                        scale(d),
                        softcap,
                        Default::default(),
                    )
                    .0
                },
                |x| {
                    let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
                    attention::reference::<Tape>(q, k, v, Tape::int_from_inner(ranges.clone()), scale(d), softcap).0
                },
            );
        }
    }
}

/// Both passes on views, the log-sum-exp, and the backward in plain operations (which GPUs run).
#[test]
fn both_passes_are_those_of_the_reference_on_views() {
    let mut random = Random::new(2);
    for (shape, view) in SHAPES.into_iter().flat_map(|shape| VIEWS.map(|view| (shape, view))) {
        let (b, sq, sk, h, _, d) = shape;
        for (mask, softcap) in
            [(Mask::Packed(7), 0.0), (Mask::Window(5), 2.0), (Mask::Padding { sees_itself: false }, 0.0)]
        {
            let [q, k, v] = inputs(&mut random, shape, view);
            let (dy, ranges) = (random.view(&[b, sq, h, d], view), mask.ranges(b, sq, sk));
            let what = format!("{shape:?} {view:?} {mask:?} softcap {softcap}");
            let hints = AttentionHints::default();
            let (out, lse) =
                Flex::range_attention(q.clone(), k.clone(), v.clone(), ranges.clone(), scale(d), softcap, hints);
            let plain =
                attention::reference::<Flex>(q.clone(), k.clone(), v.clone(), ranges.clone(), scale(d), softcap);
            assert_close(&format!("{what}: out"), &out, &plain.0, F32);
            assert_close(&format!("{what}: log-sum-exp"), &lse, &plain.1, F32);
            let backward = |f: fn(_, _, _, _, _, _, _, _, _) -> _| {
                f(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    out.clone(),
                    lse.clone(),
                    dy.clone(),
                    ranges.clone(),
                    scale(d),
                    softcap,
                )
            };
            let ours: (FlexTensor, FlexTensor, FlexTensor) =
                backward(|q, k, v, out, lse, dy, ranges, scale, softcap| {
                    Flex::range_attention_backward(q, k, v, out, lse, dy, ranges, scale, softcap, Default::default())
                });
            let plain: (FlexTensor, FlexTensor, FlexTensor) = backward(attention::backward_reference::<Flex>);
            assert_close(&format!("{what}: dq"), &ours.0, &plain.0, F32);
            assert_close(&format!("{what}: dk"), &ours.1, &plain.1, F32);
            assert_close(&format!("{what}: dv"), &ours.2, &plain.2, F32);
        }
    }
}

#[test]
fn a_row_that_sees_nothing_gives_zeros() {
    let mut random = Random::new(3);
    let shape = (1, 70, 70, 2, 1, 4);
    let [q, k, v] = inputs(&mut random, shape, View::Packed);
    let ranges = Mask::Nothing.ranges(1, 70, 70);
    let (out, _) = Flex::range_attention(q, k, v, ranges, 0.5, 0.0, Default::default());
    assert_eq!(values_of(&out), vec![0.0; 70 * 2 * 4]);
}

/// A document in a packed row gives what it gives alone.
#[test]
fn packed_documents_do_not_see_each_other() {
    let mut random = Random::new(4);
    let [q, k, v] = inputs(&mut random, (1, 80, 80, 2, 1, 8), View::Packed);
    let (packed, _) = Flex::range_attention(
        q.clone(),
        k.clone(),
        v.clone(),
        Mask::Packed(40).ranges(1, 80, 80),
        0.35,
        0.0,
        Default::default(),
    );
    let second = |x: FlexTensor| x.narrow(1, 40, 40);
    let (alone, _) = Flex::range_attention(
        second(q),
        second(k),
        second(v),
        Mask::Causal.ranges(1, 40, 40),
        0.35,
        0.0,
        Default::default(),
    );
    assert_close("second document", &second(packed), &alone, F32);
}

#[test]
fn only_trained_operands_get_gradients() {
    let mut random = Random::new(5);
    let inputs = inputs(&mut random, (1, 5, 5, 2, 1, 4), View::Packed);
    let (dy, ranges) = (random.tensor(&[1, 5, 2, 4]), Mask::Causal.ranges(1, 5, 5));
    for i in 0..3 {
        let tracked = [i == 0, i == 1, i == 2];
        let (_, grads) = differentiate(&inputs, &tracked, &dy, |x| {
            let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
            Tape::range_attention(q, k, v, Tape::int_from_inner(ranges.clone()), 0.5, 0.0, Default::default()).0
        });
        assert_eq!([grads[0].is_some(), grads[1].is_some(), grads[2].is_some()], tracked);
    }
}

#[test]
#[should_panic(expected = "shape")]
fn refuses_values_of_another_length_than_keys() {
    let mut random = Random::new(6);
    let [q, k, _] = inputs(&mut random, (1, 5, 5, 2, 1, 4), View::Packed);
    Flex::range_attention(
        q,
        k,
        random.tensor(&[1, 4, 1, 4]),
        Mask::Causal.ranges(1, 5, 5),
        0.5,
        0.0,
        Default::default(),
    );
}

#[test]
#[should_panic(expected = "ranges")]
fn refuses_ranges_of_another_length_than_queries() {
    let mut random = Random::new(7);
    let [q, k, v] = inputs(&mut random, (1, 5, 5, 2, 1, 4), View::Packed);
    Flex::range_attention(q, k, v, Mask::Causal.ranges(1, 4, 5), 0.5, 0.0, Default::default());
}

/// A band holds the ranges of a causal mask and of a window; the results do not change with it.
#[test]
fn a_promised_band_changes_nothing() {
    let mut random = Random::new(8);
    let [q, k, v] = inputs(&mut random, (1, 5, 9, 2, 1, 4), View::Packed);
    let run = |window: i32, keys| {
        let ranges = (0..5).flat_map(|i| [(i + 5 - window).max(0), i + 5]).collect::<Vec<i32>>();
        let ranges = integers(&ranges, &[1, 5, 2]);
        let hints = AttentionHints { keys, ..Default::default() };
        values_of(&Flex::range_attention(q.clone(), k.clone(), v.clone(), ranges, 0.5, 0.0, hints).0)
    };
    for (window, known) in [(9, None), (3, Some(3))] {
        assert_eq!(run(window, KnownKeys::Unknown), run(window, KnownKeys::Band { offset: 4, window: known }));
    }
}

#[test]
#[should_panic(expected = "`ranges` reach beyond")]
fn refuses_ranges_beyond_the_promised_band() {
    let mut random = Random::new(9);
    let [q, k, v] = inputs(&mut random, (1, 5, 5, 2, 1, 4), View::Packed);
    let hints = AttentionHints { keys: KnownKeys::Band { offset: 0, window: Some(2) }, ..Default::default() };
    Flex::range_attention(q, k, v, Mask::Causal.ranges(1, 5, 5), 0.5, 0.0, hints);
}

#[test]
fn a_band_is_the_union_over_its_queries() {
    let causal = KnownKeys::Band { offset: 0, window: None };
    assert_eq!([causal.of(0..4, 10), causal.of(8..12, 10)], [0..4, 0..10]);
    let window = KnownKeys::Band { offset: 5, window: Some(3) };
    assert_eq!([window.of(0..1, 10), window.of(2..4, 10), window.of(20..22, 10)], [3..6, 5..9, 10..10]);
    assert_eq!(KnownKeys::Unknown.of(2..3, 10), 0..10);
}
