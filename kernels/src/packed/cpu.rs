//! Packed weights on the CPU: codes are looked up two at a time, and panels go through one scratch buffer.

use burn::backend::Flex;
use burn::backend::ops::IntTensorOps;
use burn::tensor::{DType, FloatDType, IntDType};
use burn_flex::FlexTensor;

use super::{Format, Layout, Order, PackedParts};
use crate::cpu::{Matrix, Rows, as_f32, assert_shape, dense, for_chunks, output, restore, values};

/// Values of a panel: 2 MiB of f32, which the cores share in their caches.
const PANEL: usize = 1 << 19;
/// Rows of a panel of very wide rows.
const LEAST_ROWS: usize = 16;

/// Readable memory of a packed weight.
struct Memory {
    codes: FlexTensor,
    scale: Vec<f32>,
    /// Zero point of each block, 0 where values come from a table.
    zero: Vec<f32>,
    /// The values of the two (or one) codes of each byte, before zero and scale.
    pairs: Box<[[f32; 2]; 256]>,
    layout: Layout,
}

/// The words of a tensor, contiguous i32.
fn contiguous(words: FlexTensor) -> FlexTensor {
    let words = if words.dtype() == DType::I32 { words } else { Flex::int_cast(words, IntDType::I32) };
    if words.is_contiguous() { words } else { words.to_contiguous() }
}

fn words(tensor: &FlexTensor) -> &[i32] {
    let (start, end) = tensor.layout().contiguous_offsets().unwrap_or((0, 0));
    &tensor.storage::<i32>()[start..end]
}

/// The bytes of packed 8-bit codes.
fn bytes(tensor: FlexTensor, count: usize) -> Vec<u8> {
    words(&contiguous(tensor)).iter().flat_map(|word| word.to_le_bytes()).take(count).collect()
}

impl Memory {
    fn of(w: PackedParts<Flex>) -> Self {
        let layout = w.layout();
        let blocks = layout.blocks();
        let (codes, scale, zero, table) = match w {
            PackedParts::Table { codes, table, scale, .. } => {
                (codes, values(&dense(scale)).to_vec(), vec![0.0; blocks], Some(table))
            }
            PackedParts::Nested { codes, table, scale_codes, map, absmax, .. } => {
                (codes, nested_scales(scale_codes, map, absmax, layout), vec![0.0; blocks], Some(table))
            }
            PackedParts::Affine { codes, scale, zero, .. } => {
                let zero = bytes(zero, blocks).into_iter().map(f32::from).collect();
                (codes, values(&dense(scale)).to_vec(), zero, None)
            }
        };
        let codes = contiguous(codes);
        // The loops below do not check again.
        assert_shape("the codes", &codes, &[layout.words()]);
        assert_eq!((scale.len(), zero.len()), (blocks, blocks), "scales of a packed weight");
        let pairs = Box::new(pairs(layout.format, table.map(dense).as_ref().map(values)));
        Self { codes, scale, zero, pairs, layout }
    }

    /// Writes the values from number `first` on.
    fn read(&self, first: usize, out: &mut [f32]) {
        let (codes, len) = (words(&self.codes), out.len());
        let rows = Rows(out.as_mut_ptr());
        for_chunks(
            len,
            #[inline(always)]
            |range| {
                // SAFETY: chunks are disjoint and inside `out`.
                let out = unsafe { rows.slice(range.start, range.len()) };
                self.read_blocks(codes, first + range.start, out);
            },
        );
    }

    #[inline(always)]
    fn read_blocks(&self, codes: &[i32], first: usize, out: &mut [f32]) {
        let block = self.layout.block;
        let (mut at, mut done) = (first, 0);
        while done < out.len() {
            let index = at / block;
            let here = (out.len() - done).min((index + 1) * block - at);
            let out = &mut out[done..done + here];
            let (zero, scale) = (self.zero[index], self.scale[index]);
            match self.layout.format.bits() {
                8 => read_words::<4, 1>(
                    codes,
                    at,
                    out,
                    #[inline(always)]
                    |byte| [(self.pairs[usize::from(byte)][0] - zero) * scale],
                ),
                _ => read_words::<8, 2>(
                    codes,
                    at,
                    out,
                    #[inline(always)]
                    |byte| self.pairs[usize::from(byte)].map(|value| (value - zero) * scale),
                ),
            }
            (at, done) = (at + here, done + here);
        }
    }
}

/// The values of codes `at..` of one block, `PER` codes a word and `N` a byte.
#[inline(always)]
fn read_words<const PER: usize, const N: usize>(
    codes: &[i32],
    at: usize,
    out: &mut [f32],
    value: impl Fn(u8) -> [f32; N],
) {
    let one = |at: usize| value(codes[at / PER].to_le_bytes()[at % PER / N])[at % N];
    let head = (at.next_multiple_of(PER) - at).min(out.len());
    let (head, body) = out.split_at_mut(head);
    for (i, out) in head.iter_mut().enumerate() {
        *out = one(at + i);
    }
    let at = at + head.len();
    let (whole, tail) = body.as_chunks_mut::<PER>();
    let words = &codes[at / PER..];
    for (out, word) in whole.iter_mut().zip(words) {
        for (out, byte) in out.as_chunks_mut::<N>().0.iter_mut().zip(word.to_le_bytes()) {
            *out = value(byte);
        }
    }
    let at = at + whole.len() * PER;
    for (i, out) in tail.iter_mut().enumerate() {
        *out = one(at + i);
    }
}

/// The values of the codes in each byte.
fn pairs(format: Format, table: Option<&[f32]>) -> [[f32; 2]; 256] {
    let value = |code: usize| table.map_or(code as f32, |table| table[code]);
    std::array::from_fn(|byte| match format {
        Format::Int8 => [byte as f32, 0.0],
        _ => [value(byte & 15), value(byte >> 4)],
    })
}

/// The scales of all blocks from their own codes.
fn nested_scales(codes: FlexTensor, map: FlexTensor, absmax: FlexTensor, layout: Layout) -> Vec<f32> {
    let (map, absmax) = (dense(map), dense(absmax));
    let (map, absmax) = (values(&map), values(&absmax));
    let (block, offset) = layout.nested.map_or((1, 0.0), |nested| (nested.block, nested.offset));
    let codes = bytes(codes, layout.blocks());
    codes.iter().enumerate().map(|(i, &code)| map[usize::from(code)] * absmax[i / block] + offset).collect()
}

/// The values of rows `first..first + rows` of the flattened matrix.
pub(crate) fn dequantise(w: PackedParts<Flex>, first: usize, rows: usize, dtype: FloatDType) -> FlexTensor {
    let memory = Memory::of(w);
    let [all, cols] = memory.layout.stored();
    assert!(first + rows <= all, "rows {first} and {rows} more of {all}");
    let panel = output(&[rows, cols], |out| {
        // SAFETY: `output` has room for all values; they are only written.
        memory.read(first * cols, unsafe { std::slice::from_raw_parts_mut(out, rows * cols) });
    });
    restore(panel, dtype.into())
}

/// Runs `body` with first row, number of rows and values of every panel.
fn for_panels(memory: &Memory, mut body: impl FnMut(usize, usize, &[f32])) {
    let [all, cols] = memory.layout.stored();
    let rows = (PANEL / cols.max(1)).max(LEAST_ROWS).min(all);
    let mut scratch = vec![0.0; rows * cols];
    for first in (0..all).step_by(rows.max(1)) {
        let rows = rows.min(all - first);
        let panel = &mut scratch[..rows * cols];
        memory.read(first * cols, panel);
        body(first, rows, panel);
    }
}

/// `x W + b`.
pub(crate) fn linear(x: FlexTensor, w: PackedParts<Flex>, bias: Option<FlexTensor>) -> FlexTensor {
    match w.layout().order {
        Order::Outputs => across(x, w, bias),
        Order::Inputs => along(x, w, bias),
    }
}

/// `dy W^T`.
pub(crate) fn input_gradient(dy: FlexTensor, w: PackedParts<Flex>) -> FlexTensor {
    match w.layout().order {
        Order::Outputs => along(dy, w, None),
        Order::Inputs => across(dy, w, None),
    }
}

/// Writes a bias to every row of an output, and checks its size.
fn fill(out: *mut f32, rows: usize, cols: usize, bias: Option<&FlexTensor>) {
    let Some(bias) = bias else { return };
    assert_shape("the bias", bias, &[cols]);
    for row in 0..rows {
        // SAFETY: row `row` of the output, which has `cols` values.
        unsafe { out.add(row * cols).copy_from_nonoverlapping(values(bias).as_ptr(), cols) };
    }
}

/// `x S^T + b` for the flattened matrix S.
fn across(x: FlexTensor, w: PackedParts<Flex>, bias: Option<FlexTensor>) -> FlexTensor {
    let (dtype, memory) = (x.dtype(), Memory::of(w));
    let (x, bias) = (as_f32(x), bias.map(dense));
    let x = Matrix::of(&x);
    let [all, cols] = memory.layout.stored();
    assert_eq!(x.cols, cols, "inner sizes of a product");
    let y = output(&[x.rows, all], |out| {
        fill(out, x.rows, all, bias.as_ref());
        for_panels(&memory, |first, rows, panel| {
            let panel = Matrix::raw(panel.as_ptr(), cols, rows, 1, cols);
            let threads = crate::gemm::threads(x.rows * cols * rows);
            // SAFETY: the panel is `[rows, cols]`, seen transposed; columns `first..first + rows` of the output lie inside
            // it and were written before where the product is added to them.
            unsafe {
                let out = out.add(first);
                crate::cpu::gemm(x.rows, rows, cols, out, all as isize, 1, bias.is_some(), &x, &panel, 1.0, threads);
            }
        });
    });
    restore(y, dtype)
}

/// `x S + b` for the flattened matrix S.
fn along(x: FlexTensor, w: PackedParts<Flex>, bias: Option<FlexTensor>) -> FlexTensor {
    let (dtype, memory) = (x.dtype(), Memory::of(w));
    let (x, bias) = (as_f32(x), bias.map(dense));
    let x = Matrix::of(&x);
    let [all, cols] = memory.layout.stored();
    assert_eq!(x.cols, all, "inner sizes of a product");
    let y = output(&[x.rows, cols], |out| {
        if all == 0 {
            // SAFETY: `output` has room for all values.
            unsafe { out.write_bytes(0, x.rows * cols) };
        }
        fill(out, x.rows, cols, bias.as_ref());
        for_panels(&memory, |first, rows, panel| {
            let panel = Matrix::raw(panel.as_ptr(), rows, cols, cols, 1);
            // SAFETY: columns `first..first + rows` of x, whose view was checked.
            let start = unsafe { x.data.offset(first as isize * x.col_stride) };
            let columns = Matrix { data: start, rows: x.rows, cols: rows, ..x };
            let threads = crate::gemm::threads(x.rows * cols * rows);
            let adds = first > 0 || bias.is_some();
            // SAFETY: the views lie inside their buffers, and the output is read only after the first panel or the bias
            // was written to it.
            unsafe {
                crate::cpu::gemm(x.rows, cols, rows, out, cols as isize, 1, adds, &columns, &panel, 1.0, threads);
            }
        });
    });
    restore(y, dtype)
}
