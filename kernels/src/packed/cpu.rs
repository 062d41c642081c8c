//! Packed weights on the CPU: codes are looked up two at a time, and panels go through one scratch buffer.

use burn::backend::Flex;
use burn::backend::ops::IntTensorOps;
use burn::tensor::{DType, FloatDType, IntDType};
use burn_flex::FlexTensor;

use super::{Format, Layout, PackedParts};
use crate::cpu::{Matrix, Rows, as_f32, assert_shape, dense, for_chunks, output, restore, values};

/// Values of a panel: 2 MiB of f32, which the cores share in their caches.
const PANEL: usize = 1 << 19;
/// Outputs of a panel of very wide rows.
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
pub(crate) fn contiguous(words: FlexTensor) -> FlexTensor {
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

/// The values of outputs `first..first + rows`, `[rows, d_in]`.
pub(crate) fn dequantise(w: PackedParts<Flex>, first: usize, rows: usize, dtype: FloatDType) -> FlexTensor {
    let memory = Memory::of(w);
    let [d_in, d_out] = memory.layout.dims;
    assert!(first + rows <= d_out, "outputs {first} and {rows} more of {d_out}");
    let panel = output(&[rows, d_in], |out| {
        // SAFETY: `output` has room for all values; they are only written.
        memory.read(first * d_in, unsafe { std::slice::from_raw_parts_mut(out, rows * d_in) });
    });
    restore(panel, dtype.into())
}

/// Runs `body` with first output, number of outputs and values of every panel.
fn for_panels(memory: &Memory, mut body: impl FnMut(usize, usize, &[f32])) {
    let [d_in, d_out] = memory.layout.dims;
    let rows = (PANEL / d_in.max(1)).max(LEAST_ROWS).min(d_out);
    let mut scratch = vec![0.0; rows * d_in];
    for first in (0..d_out).step_by(rows.max(1)) {
        let rows = rows.min(d_out - first);
        let panel = &mut scratch[..rows * d_in];
        memory.read(first * d_in, panel);
        body(first, rows, panel);
    }
}

/// `x W + b`.
pub(crate) fn linear(x: FlexTensor, w: PackedParts<Flex>, bias: Option<FlexTensor>) -> FlexTensor {
    let (dtype, memory) = (x.dtype(), Memory::of(w));
    let (x, bias) = (as_f32(x), bias.map(dense));
    let x = Matrix::of(&x);
    let [d_in, d_out] = memory.layout.dims;
    assert_eq!(x.cols, d_in, "inner sizes of a product");
    if let Some(bias) = &bias {
        assert_shape("the bias", bias, &[d_out]);
    }
    let y = output(&[x.rows, d_out], |out| {
        if let Some(bias) = &bias {
            for row in 0..x.rows {
                // SAFETY: row `row` of the output.
                unsafe { out.add(row * d_out).copy_from_nonoverlapping(values(bias).as_ptr(), d_out) };
            }
        }
        for_panels(&memory, |first, rows, panel| {
            let panel = Matrix::raw(panel.as_ptr(), d_in, rows, 1, d_in);
            let threads = crate::gemm::threads(x.rows * d_in * rows);
            // SAFETY: the panel is `[rows, d_in]`, seen transposed; columns `first..first + rows` of the output lie inside
            // it and were written before where the product is added to them.
            unsafe {
                let out = out.add(first);
                crate::cpu::gemm(x.rows, rows, d_in, out, d_out as isize, 1, bias.is_some(), &x, &panel, 1.0, threads);
            }
        });
    });
    restore(y, dtype)
}

/// `dy W^T`.
pub(crate) fn input_gradient(dy: FlexTensor, w: PackedParts<Flex>) -> FlexTensor {
    let (dtype, memory) = (dy.dtype(), Memory::of(w));
    let dy = as_f32(dy);
    let dy = Matrix::of(&dy);
    let [d_in, d_out] = memory.layout.dims;
    assert_eq!(dy.cols, d_out, "inner sizes of a product");
    let dx = output(&[dy.rows, d_in], |out| {
        if d_out == 0 {
            // SAFETY: `output` has room for all values.
            unsafe { out.write_bytes(0, dy.rows * d_in) };
        }
        for_panels(&memory, |first, rows, panel| {
            let panel = Matrix::raw(panel.as_ptr(), rows, d_in, d_in, 1);
            // SAFETY: columns `first..first + rows` of dy, whose view was checked.
            let start = unsafe { dy.data.offset(first as isize * dy.col_stride) };
            let columns = Matrix { data: start, rows: dy.rows, cols: rows, ..dy };
            let threads = crate::gemm::threads(dy.rows * d_in * rows);
            // SAFETY: the views lie inside their buffers, and the output is read only after the first panel wrote it.
            unsafe {
                crate::cpu::gemm(dy.rows, d_in, rows, out, d_in as isize, 1, first > 0, &columns, &panel, 1.0, threads);
            }
        });
    });
    restore(dx, dtype)
}
