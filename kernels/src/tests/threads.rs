//! Results do not depend on the number of threads, to the bit: a run can be repeated on another machine of the same kind.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::{Random, View, integers, values_of};
use crate::adamw::AdamW;
use crate::{Activation, AttentionHints, LowRankOps, Maybe, Tensors};

#[track_caller]
fn assert_same_bits(what: &str, operation: impl Fn() -> Vec<FlexTensor> + Sync) {
    let run = |threads: usize| -> Vec<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let bits = |tensor: &FlexTensor| values_of(tensor).iter().map(|value| value.to_bits()).collect();
        pool.install(|| operation().iter().map(bits).collect())
    };
    let one = run(1);
    for threads in [2, 3, 8] {
        assert!(one == run(threads), "{what}: other bits with {threads} threads than with one");
    }
}

#[test]
fn products() {
    let mut random = Random::new(1);
    // square, the shapes of a low-rank layer, long inner sizes (which a parallel product could split), odd
    for (m, k, n) in [
        (256, 256, 256),
        (512, 576, 16),
        (16, 512, 576),
        (512, 16, 576),
        (64, 5000, 48),
        (8, 9000, 8),
        (1, 576, 1536),
        (131, 577, 259),
    ] {
        for view in [View::Packed, View::Swapped] {
            let (a, b, c) = (random.view(&[m, k], view), random.view(&[k, n], view), random.tensor(&[m, n]));
            assert_same_bits(&format!("gemm {m} {k} {n} {view:?}"), || {
                vec![
                    Flex::gemm(a.clone(), b.clone(), Maybe::Absent, 1.0),
                    Flex::gemm(a.clone(), b.clone(), Maybe::Given(c.clone()), 0.3),
                ]
            });
        }
    }
}

#[test]
fn row_operations() {
    let mut random = Random::new(2);
    let (x, y, z) = (random.tensor(&[300, 577]), random.tensor(&[300, 577]), random.tensor(&[300, 577]));
    let gamma = random.tensor(&[577]);
    assert_same_bits("rms_norm", || {
        let (dx, d_gamma) = Flex::rms_norm_backward(x.clone(), gamma.clone(), y.clone(), 1e-5, 0.0);
        vec![Flex::rms_norm(x.clone(), gamma.clone(), 1e-5, 0.0), dx, d_gamma]
    });
    assert_same_bits("column_scale", || {
        let (y, kept) = Flex::column_scale(x.clone(), gamma.clone(), Maybe::Absent);
        let (dz, dc) = Flex::column_scale_backward(kept, gamma.clone(), z.clone(), false);
        vec![y, dz, dc]
    });
    let (w, factors) = (random.tensor(&[300, 577]), [random.tensor(&[300, 8]), random.tensor(&[8, 577])]);
    assert_same_bits("directed_linear", || {
        let [down, up] = factors.clone();
        let (u, lengths, c) = Flex::directed_weight(w.clone(), down, up, gamma.clone(), 0.5);
        vec![u, lengths, c, Flex::column_dots(x.clone(), y.clone())]
    });
    let (wide, turn) = (random.tensor(&[600, 96]), random.tensor(&[3, 32, 32]));
    assert_same_bits("block_rotation", || {
        vec![
            Flex::block_rotation(wide.clone(), turn.clone()),
            Flex::block_rotation_gradient(wide.clone(), wide.clone(), 32),
        ]
    });
    let (basis, lambda, scales) = (random.tensor(&[16, 577]), random.tensor(&[16, 36]), random.tensor(&[36, 577]));
    let d_basis = random.tensor(&[576, 577]);
    assert_same_bits("scaled_basis", || {
        let (d_lambda, d_scales) =
            Flex::scaled_basis_backward(basis.clone(), lambda.clone(), scales.clone(), d_basis.clone());
        vec![Flex::scaled_basis(basis.clone(), lambda.clone(), scales.clone()), d_lambda, d_scales]
    });
    for act in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        assert_same_bits("gated", || {
            let (d_gate, d_up) = Flex::gated_backward(x.clone(), y.clone(), z.clone(), act);
            vec![Flex::gated(x.clone(), y.clone(), act), d_gate, d_up]
        });
    }
    let targets = integers(&(0..300).map(|i| i - 9).collect::<Vec<_>>(), &[300]);
    assert_same_bits("cross_entropy", || {
        let (loss, gradient) = Flex::cross_entropy(x.clone(), targets.clone(), 0.0);
        vec![loss, gradient]
    });
    let rule =
        AdamW { learning_rate: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.0, step: 1, gradient_scale: 1.0 };
    let square = super::place(&values_of(&z).iter().map(|z| z * z).collect::<Vec<_>>(), &[300, 577], View::Packed);
    assert_same_bits("adamw", || {
        let [p, m, v, g] = [&x, &y, &square, &z].map(|tensor| Tensors(vec![tensor.clone()]));
        let (p, m, v) = Flex::adamw(p, m, v, g, Maybe::Absent, rule);
        [p, m, v].into_iter().flat_map(|list| list.0).collect()
    });
    assert_same_bits("sums", || [true, false].map(|squared| Flex::sums(Tensors(vec![x.clone()]), squared)).to_vec());
    let (heads, cos, sin) = (random.tensor(&[3, 100, 4, 16]), random.tensor(&[300, 8]), random.tensor(&[300, 8]));
    assert_same_bits("rotary", || vec![Flex::rotary(heads.clone(), cos.clone(), sin.clone(), 1.0)]);
}

#[test]
fn attention() {
    let mut random = Random::new(3);
    let (q, k, v) = (random.tensor(&[2, 150, 6, 16]), random.tensor(&[2, 150, 2, 16]), random.tensor(&[2, 150, 2, 16]));
    let dy = random.tensor(&[2, 150, 6, 16]);
    let causal: Vec<i32> = (0..300).flat_map(|row| [0, row % 150 + 1]).collect();
    let ranges = integers(&causal, &[2, 150, 2]);
    assert_same_bits("attention", || {
        let (q, k, v, ranges) = (q.clone(), k.clone(), v.clone(), ranges.clone());
        let hints = AttentionHints::default();
        let (out, lse) = Flex::range_attention(q.clone(), k.clone(), v.clone(), ranges.clone(), 0.25, 0.0, hints);
        let (dq, dk, dv) =
            Flex::range_attention_backward(q, k, v, out.clone(), lse.clone(), dy.clone(), ranges, 0.25, 0.0, hints);
        vec![out, lse, dq, dk, dv]
    });
}
