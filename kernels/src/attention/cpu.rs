//! Attention on the CPU: tiles of query rows against the keys they can see, products by `gemm` on the heads' own strides.
//!
//! Forward tasks are (sequence, head); backward tasks are (sequence, key/value head), so that no two tasks add to the same
//! gradient. A score tile is `QUERY_ROWS x visible keys` of f32 and stays in the second-level cache up to about 4k keys.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::cpu::{
    LANES, Matrix, Rows, assert_shape, dense, dot, exp, from_vec, integers, max, outputs, restore, sum, tanh, values,
    vectorised,
};

/// Query rows of one tile.
const QUERY_ROWS: usize = 64;

/// Sizes and strides shared by every task.
#[derive(Clone, Copy)]
struct Sizes {
    sequences: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    groups: usize,
    width: usize,
    scale: f32,
    softcap: f32,
}

impl Sizes {
    /// Checks every shape once; the tasks rely on it.
    fn of(q: &FlexTensor, k: &FlexTensor, v: &FlexTensor, ranges: &[i32], scale: f32, softcap: f32) -> Self {
        let (qd, kd) = (q.layout().shape().to_vec(), k.layout().shape().to_vec());
        assert_shape("k", k, &[qd[0], kd[1], kd[2], qd[3]]);
        assert_shape("v", v, &kd);
        assert_eq!(ranges.len(), 2 * qd[0] * qd[1], "two numbers in `ranges` for each query");
        assert!(qd[2].is_multiple_of(kd[2]), "query heads are a multiple of key heads");
        Self {
            sequences: qd[0],
            queries: qd[1],
            keys: kd[1],
            heads: qd[2],
            groups: kd[2],
            width: qd[3],
            scale,
            softcap,
        }
    }
    /// Whether every range lies within what the caller promised.
    fn keeps(&self, ranges: &[i32], known: super::KnownKeys) -> bool {
        (0..self.sequences * self.queries).all(|row| {
            let (first, end) = range_of(ranges, row, self.keys);
            let allowed = known.of(row % self.queries..row % self.queries + 1, self.keys);
            first == end || (allowed.start <= first && end <= allowed.end)
        })
    }
    /// Offset of query row `i` of a head; rows are `heads * width` apart.
    fn query(&self, sequence: usize, i: usize, head: usize) -> usize {
        ((sequence * self.queries + i) * self.heads + head) * self.width
    }
    /// Offset of key row `j` of a group; rows are `groups * width` apart.
    fn key(&self, sequence: usize, j: usize, group: usize) -> usize {
        ((sequence * self.keys + j) * self.groups + group) * self.width
    }
    fn query_rows(&self, data: &[f32], sequence: usize, i: usize, head: usize, rows: usize) -> Matrix {
        let at = self.query(sequence, i, head);
        Matrix::raw(data[at..].as_ptr(), rows, self.width, self.heads * self.width, 1)
    }
    fn key_rows(&self, data: &[f32], sequence: usize, j: usize, group: usize, rows: usize) -> Matrix {
        let at = self.key(sequence, j, group);
        Matrix::raw(data[at..].as_ptr(), rows, self.width, self.groups * self.width, 1)
    }
}

fn transposed(m: &Matrix) -> Matrix {
    Matrix { data: m.data, rows: m.cols, cols: m.rows, row_stride: m.col_stride, col_stride: m.row_stride }
}

/// `out = alpha a b (+ out)` on this thread.
///
/// # Safety
/// As [`crate::cpu::gemm`].
unsafe fn product(a: &Matrix, b: &Matrix, out: *mut f32, out_row_stride: usize, alpha: f32, accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        crate::cpu::gemm(
            a.rows,
            b.cols,
            a.cols,
            out,
            out_row_stride as isize,
            1,
            accumulate,
            a,
            b,
            alpha,
            gemm::Parallelism::None,
        );
    }
}

/// Visible keys of one query row; `(0, 0)` for none.
fn range_of(ranges: &[i32], row: usize, keys: usize) -> (usize, usize) {
    let (first, end) = (ranges[2 * row].max(0) as usize, ranges[2 * row + 1].max(0) as usize);
    if first < end.min(keys) { (first, end.min(keys)) } else { (0, 0) }
}

/// The smallest range that holds the ranges of `count` rows.
fn span_of(ranges: &[i32], row: usize, count: usize, keys: usize) -> (usize, usize) {
    let all = (row..row + count).map(|row| range_of(ranges, row, keys)).filter(|(first, end)| first < end);
    let (first, end) = all.fold((usize::MAX, 0), |(a, b), (first, end)| (a.min(first), b.max(end)));
    if first == usize::MAX { (0, 0) } else { (first, end) }
}

pub(crate) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    ranges: FlexTensor,
    scale: f32,
    softcap: f32,
    known: super::KnownKeys,
) -> (FlexTensor, FlexTensor) {
    let dtype = q.dtype();
    let (q, k, v, ranges) = (dense(q), dense(k), dense(v), integers(ranges));
    let s = Sizes::of(&q, &k, &v, &ranges, scale, softcap);
    assert!(s.keeps(&ranges, known), "`ranges` reach beyond what {known:?} allows");
    let (q, k, v) = (values(&q), values(&k), values(&v));
    let dims = [s.sequences, s.queries, s.heads, s.width];
    let (out, lse) = outputs(&dims, &dims[..3], |out, lse| {
        let (out, lse) = (Rows(out), Rows(lse));
        (0..s.sequences * s.heads).into_par_iter().for_each(|task| {
            forward_head(&s, q, k, v, &ranges, out, lse, task / s.heads, task % s.heads);
        });
    });
    (restore(out, dtype), lse)
}

fn forward_head(
    s: &Sizes,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    ranges: &[i32],
    out: Rows,
    lse: Rows,
    sequence: usize,
    head: usize,
) {
    let group = head / (s.heads / s.groups);
    let mut tile = vec![0.0f32; QUERY_ROWS.min(s.queries) * s.keys];
    for i in (0..s.queries).step_by(QUERY_ROWS) {
        let rows = QUERY_ROWS.min(s.queries - i);
        let row = sequence * s.queries + i;
        let (first, end) = span_of(ranges, row, rows, s.keys);
        let span = end - first;
        // SAFETY: every row of this head in this tile is written by this task alone.
        let written = |r: usize| unsafe { out.slice(s.query(sequence, i + r, head), s.width) };
        if span == 0 {
            (0..rows).for_each(|r| written(r).fill(0.0));
        } else {
            let queries = s.query_rows(q, sequence, i, head, rows);
            let keys = s.key_rows(k, sequence, first, group, span);
            // SAFETY: the tile holds rows * span values; the views were cut from checked slices.
            unsafe { product(&queries, &transposed(&keys), tile.as_mut_ptr(), span, s.scale, false) };
        }
        for r in 0..rows {
            let (lo, hi) = range_of(ranges, row + r, s.keys);
            let scores = &mut tile[r * span..(r + 1) * span];
            let log_sum = vectorised(
                #[inline(always)]
                || softmax(scores, lo.max(first) - first, hi.max(first) - first, s.softcap),
            );
            // SAFETY: one value a row and head.
            unsafe { lse.slice((row + r) * s.heads + head, 1)[0] = log_sum };
        }
        if span > 0 {
            let weights = Matrix::raw(tile.as_ptr(), rows, span, span, 1);
            let keys = s.key_rows(v, sequence, first, group, span);
            let at = s.query(sequence, i, head);
            // SAFETY: rows of this head only, `heads * width` apart, all inside the output.
            unsafe { product(&weights, &keys, out.0.add(at), s.heads * s.width, 1.0, false) };
        }
    }
}

/// Caps, masks and normalises one row of scores in place; returns its log-sum-exp.
#[inline(always)]
fn softmax(scores: &mut [f32], lo: usize, hi: usize, softcap: f32) -> f32 {
    if lo == hi {
        scores.fill(0.0);
        return super::NOTHING_SEEN;
    }
    let whole = whole_vectors(lo, hi, scores.len());
    if softcap > 0.0 {
        let inverse = 1.0 / softcap;
        for score in &mut scores[lo..whole] {
            *score = softcap * tanh(*score * inverse);
        }
    }
    let max = max(&scores[lo..hi]);
    for score in &mut scores[lo..whole] {
        *score = exp(*score - max);
    }
    scores[..lo].fill(0.0);
    scores[hi..].fill(0.0);
    let total = sum(&scores[lo..hi]);
    let inverse = 1.0 / total;
    for score in &mut scores[lo..whole] {
        *score *= inverse;
    }
    max + total.ln()
}

/// The end of `lo..hi` rounded up to whole vectors inside the row: what lies behind `hi` is computed and thrown away, which is
/// cheaper than a remainder one by one.
#[inline(always)]
fn whole_vectors(lo: usize, hi: usize, len: usize) -> usize {
    (lo + (hi - lo).next_multiple_of(LANES)).min(len)
}

pub(crate) fn backward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    out: FlexTensor,
    lse: FlexTensor,
    d_out: FlexTensor,
    ranges: FlexTensor,
    scale: f32,
    softcap: f32,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let dtype = q.dtype();
    let (q, k, v, ranges) = (dense(q), dense(k), dense(v), integers(ranges));
    let (out, lse, d_out) = (dense(out), dense(lse), dense(d_out));
    let s = Sizes::of(&q, &k, &v, &ranges, scale, softcap);
    let (q_dims, k_dims) = ([s.sequences, s.queries, s.heads, s.width], [s.sequences, s.keys, s.groups, s.width]);
    assert_shape("the output", &out, &q_dims);
    assert_shape("the log-sum-exp", &lse, &q_dims[..3]);
    assert_shape("the gradient of the output", &d_out, &q_dims);
    let inputs = Inputs {
        q: values(&q),
        k: values(&k),
        v: values(&v),
        out: values(&out),
        lse: values(&lse),
        d_out: values(&d_out),
    };
    let k_len: usize = k_dims.iter().product();
    let (mut dk, mut dv) = (vec![0.0f32; k_len], vec![0.0f32; k_len]);
    let (dk_rows, dv_rows) = (Rows(dk.as_mut_ptr()), Rows(dv.as_mut_ptr()));
    let dq = crate::cpu::output(&q_dims, |dq| {
        let dq = Rows(dq);
        (0..s.sequences * s.groups).into_par_iter().for_each(|task| {
            let (sequence, group) = (task / s.groups, task % s.groups);
            let repeats = s.heads / s.groups;
            for head in group * repeats..(group + 1) * repeats {
                backward_head(&s, &inputs, &ranges, dq, dk_rows, dv_rows, sequence, group, head);
            }
        });
    });
    (restore(dq, dtype), restore(from_vec(dk, &k_dims), dtype), restore(from_vec(dv, &k_dims), dtype))
}

struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    d_out: &'a [f32],
}

fn backward_head(
    s: &Sizes,
    x: &Inputs,
    ranges: &[i32],
    dq: Rows,
    dk: Rows,
    dv: Rows,
    sequence: usize,
    group: usize,
    head: usize,
) {
    let tile_len = QUERY_ROWS.min(s.queries) * s.keys;
    let (mut weights, mut d_scores) = (vec![0.0f32; tile_len], vec![0.0f32; tile_len]);
    for i in (0..s.queries).step_by(QUERY_ROWS) {
        let rows = QUERY_ROWS.min(s.queries - i);
        let row = sequence * s.queries + i;
        let (first, end) = span_of(ranges, row, rows, s.keys);
        let span = end - first;
        if span == 0 {
            // SAFETY: rows of this head are written by this task alone.
            (0..rows).for_each(|r| unsafe { dq.slice(s.query(sequence, i + r, head), s.width) }.fill(0.0));
            continue;
        }
        let queries = s.query_rows(x.q, sequence, i, head, rows);
        let d_out = s.query_rows(x.d_out, sequence, i, head, rows);
        let (keys, vals) =
            (s.key_rows(x.k, sequence, first, group, span), s.key_rows(x.v, sequence, first, group, span));
        // SAFETY: both tiles hold rows * span values.
        unsafe {
            product(&queries, &transposed(&keys), weights.as_mut_ptr(), span, s.scale, false);
            product(&d_out, &transposed(&vals), d_scores.as_mut_ptr(), span, 1.0, false);
        }
        for r in 0..rows {
            let (lo, hi) = range_of(ranges, row + r, s.keys);
            let at = s.query(sequence, i + r, head);
            let delta = vectorised(
                #[inline(always)]
                || dot(&x.out[at..at + s.width], &x.d_out[at..at + s.width]),
            );
            let (p, ds) = (&mut weights[r * span..(r + 1) * span], &mut d_scores[r * span..(r + 1) * span]);
            let lse = x.lse[(row + r) * s.heads + head];
            vectorised(
                #[inline(always)]
                || row_gradient(p, ds, lo.max(first) - first, hi.max(first) - first, lse, delta, s.scale, s.softcap),
            );
        }
        let p = Matrix::raw(weights.as_ptr(), rows, span, span, 1);
        let ds = Matrix::raw(d_scores.as_ptr(), rows, span, span, 1);
        let (key_at, key_stride) = (s.key(sequence, first, group), s.groups * s.width);
        // SAFETY: this task alone touches this head's dq rows and this group's dk and dv rows.
        unsafe {
            product(&transposed(&p), &d_out, dv.0.add(key_at), key_stride, 1.0, true);
            product(&transposed(&ds), &queries, dk.0.add(key_at), key_stride, 1.0, true);
            product(&ds, &keys, dq.0.add(s.query(sequence, i, head)), s.heads * s.width, 1.0, false);
        }
    }
}

/// Turns a row of scaled scores into probabilities and a row of `dO V^T` into score gradients.
#[inline(always)]
fn row_gradient(p: &mut [f32], ds: &mut [f32], lo: usize, hi: usize, lse: f32, delta: f32, scale: f32, softcap: f32) {
    let whole = whole_vectors(lo, hi, p.len());
    let visible = p[lo..whole].iter_mut().zip(&mut ds[lo..whole]);
    if softcap > 0.0 {
        let inverse = 1.0 / softcap;
        for (p, ds) in visible {
            let t = tanh(*p * inverse);
            *p = exp(softcap * t - lse);
            *ds = *p * (*ds - delta) * scale * (1.0 - t * t);
        }
    } else {
        for (p, ds) in visible {
            *p = exp(*p - lse);
            *ds = *p * (*ds - delta) * scale;
        }
    }
    for row in [p, ds] {
        row[..lo].fill(0.0);
        row[hi..].fill(0.0);
    }
}
