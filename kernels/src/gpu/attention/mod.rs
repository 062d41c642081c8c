//! Attention on a GPU; equations in `crate::attention`. Two ways, one chooser.
//!
//! | way | products | scores in memory | flops forward, backward | file |
//! | --- | --- | --- | --- | --- |
//! | chunks | Burn's, tuned on the device | `b h c sk` | `4 b h d N`, `10 b h d N` | `chunks.rs` |
//! | tiles | ours, in fragments (`cmma`) or registers | none | `4 b h d N`, `14 b h d N` | `tiles_forward.rs`, `tiles_backward.rs` |
//!
//! N pairs of a query and a key are computed: for chunks those of the band that the host knows, all `sq sk` without one; for tiles
//! those of every tile's own ranges, read on the device.
//!
//! b = 1, h = 32, g = 8, sq = sk = 2048, causal (N = 2.1 M), bf16, on 989 TFLOP/s and 4.8 TB/s (H200 data sheet):
//!
//! | d | forward flops, floor | backward flops (10 b h d N), floor | bytes of q k v out, floor | scores of the chunks, floor |
//! | --- | --- | --- | --- | --- |
//! | 64 | 17.2 G, 17 us | 43 G, 43 us | 21 MB, 4 us | 1.1 GB, 224 us; backward 1.7 GB, 364 us |
//! | 128 | 34.4 G, 35 us | 86 G, 87 us | 42 MB, 9 us | the same |
//!
//! So attention is bound by arithmetic and the chunks by their scores, 16 bytes a pair forward (f32 written and read twice, weights
//! written and read) and 26 backward: tiles in fragments win from about 15 % of the arithmetic's rate on, and take no memory. So
//! they are chosen where a device has them. **No speed was measured on a GPU yet.** Chunks and registers were compared with the
//! CPU on software Vulkan; fragments ran only as C++ for CUDA on the CPU (`codegen/emulated.rs`). Hence `trial.rs`: a device shows in a
//! small case that it computes what the CPU does before its tiles are chosen. [`AttentionRoute`] is the switch by which a test or a
//! bench compares all three, `LOWRANK_ATTENTION` that of a run.
//!
//! What ptxas 12.9 makes of the fragment form for sm_90a at d = 128, 128 units, no spills: forward of 64 queries by 64 keys 158
//! registers and 68 KB of shared memory (three cubes a multiprocessor), query gradient 64 x 32 124 and 81 KB, key gradient 125
//! and 86 KB (two). Tiles come in and are filled by 128 bits, results leave by as many: a unit fills a tile of 64 x 128 by 8
//! stores. A width that 8 does not divide goes by narrower vectors; registers are filled value by value.

pub(super) mod chunks;
pub(super) mod product;
pub(super) mod rows;
pub(super) mod tile;
pub(super) mod tiles_backward;
pub(super) mod tiles_forward;
#[cfg(feature = "flex")]
mod trial;

#[cfg(feature = "flex")]
use std::sync::Once;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};

use self::product::Form;
use self::tile::Tile;
use super::launch::{dense, element};
use crate::attention::{AttentionHints, AttentionRoute};
#[cfg(feature = "flex")]
use crate::route;

/// Sizes and factors of one call.
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
    /// Checks every shape once; the kernels rely on it.
    fn of([q, k, v, ranges]: &[CubeTensor; 4], scale: f32, softcap: f32) -> Self {
        let (qd, kd) = (q.meta.shape(), k.meta.shape());
        assert_eq!(kd.to_vec(), [qd[0], kd[1], kd[2], qd[3]], "shape of k");
        assert_eq!(v.meta.shape(), kd, "shape of v");
        assert_eq!(ranges.meta.shape().to_vec(), [qd[0], qd[1], 2], "shape of ranges");
        assert!(qd[2].is_multiple_of(kd[2]), "query heads are a multiple of key heads");
        assert!(q.dtype == k.dtype && q.dtype == v.dtype, "q, k and v have one type");
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
    fn repeats(&self) -> usize {
        self.heads / self.groups
    }
}

/// Which kernels run.
enum Way {
    /// Queries of a chunk, 0 for as many as its memory allows.
    Chunks(usize),
    Tiles(Tile),
}

/// The chooser.
fn choose(route: AttentionRoute, s: &Sizes, q: &CubeTensor, bytes: fn(&Tile, usize) -> usize) -> Way {
    let tile = match route {
        AttentionRoute::Chosen => return chosen(s, q, bytes),
        AttentionRoute::Chunks(length) => return Way::Chunks(length),
        AttentionRoute::Registers => tile(Form::Registers, s, q, bytes),
        AttentionRoute::Fragments => tile(Form::Fragments, s, q, bytes),
    };
    assert!(tile.is_some(), "{route:?} has no tile for heads of {} numbers of {:?} on this device", s.width, q.dtype);
    tile.map_or(Way::Chunks(0), Way::Tiles)
}

/// Tiles in fragments where the device has them and they pass their trial, unless `LOWRANK_ATTENTION` forces another way.
#[cfg(feature = "flex")]
fn chosen(s: &Sizes, q: &CubeTensor, bytes: fn(&Tile, usize) -> usize) -> Way {
    let form = match route::attention() {
        route::Attention::Chunks => return Way::Chunks(0),
        route::Attention::Registers => Form::Registers,
        route::Attention::Fragments => Form::Fragments,
    };
    match tile(form, s, q, bytes) {
        Some(tile) if trial::passes(form, s, q) => Way::Tiles(tile),
        Some(_) => Way::Chunks(0),
        None => {
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                let (width, dtype) = (s.width, q.dtype);
                tracing::info!(
                    "attention with heads of {width} numbers of {dtype:?}: by chunks, no {form:?} on this device"
                );
            });
            Way::Chunks(0)
        }
    }
}

/// Without a CPU to compare them with, tiles are not chosen.
#[cfg(not(feature = "flex"))]
fn chosen(_s: &Sizes, _q: &CubeTensor, _bytes: fn(&Tile, usize) -> usize) -> Way {
    Way::Chunks(0)
}

/// The largest tile that the device's shared memory holds; on devices with much of it two cubes share it.
fn tile(form: Form, s: &Sizes, q: &CubeTensor, bytes: fn(&Tile, usize) -> usize) -> Option<Tile> {
    let hardware = &q.client.properties().hardware;
    let shared = hardware.max_shared_memory_size;
    let budget = if shared >= 128 << 10 { shared / 2 } else { shared };
    if form == Form::Fragments && !has_fragments(q) {
        return None;
    }
    let sizes: &[(usize, usize)] =
        if s.width > 128 { &[(32, 32), (16, 16)] } else { &[(64, 64), (64, 32), (32, 32), (16, 16)] };
    let (depth, capped) = (s.width, s.softcap > 0.0);
    let width = depth.next_multiple_of(match form {
        Form::Registers => 16,
        Form::Fragments => 32,
    });
    let tile = |&(rows, keys): &(usize, usize)| Tile { form, rows, keys, depth, width, capped };
    sizes.iter().map(tile).find(|tile| tile.fits() && bytes(tile, q.dtype.size()) <= budget)
}

/// Whether 16 x 16 fragments of this type with f32 sums exist, in planes of 32.
fn has_fragments(q: &CubeTensor) -> bool {
    let properties = q.client.properties();
    let kind = element(q);
    let wanted =
        MmaConfig { a_type: kind, b_type: kind, cd_type: ElemType::Float(FloatKind::F32), m: 16, n: 16, k: 16 };
    let planes = (properties.hardware.plane_size_min, properties.hardware.plane_size_max);
    matches!(q.dtype, DType::F16 | DType::BF16)
        && planes == (32, 32)
        && properties.features.matmul.cmma.contains(&wanted)
}

pub(super) fn forward(
    inputs: [CubeTensor; 4],
    scale: f32,
    softcap: f32,
    hints: AttentionHints,
) -> (CubeTensor, CubeTensor) {
    let s = Sizes::of(&inputs, scale, softcap);
    let inputs = inputs.map(dense);
    match choose(hints.route, &s, &inputs[0], Tile::forward_bytes) {
        Way::Chunks(length) => chunks::forward(s, inputs, hints.keys, length),
        Way::Tiles(tile) => tiles_forward::forward(s, tile, inputs),
    }
}

/// `outputs` are the output of the forward, its log-sum-exp and the gradient of the output.
pub(super) fn backward(
    inputs: [CubeTensor; 4],
    outputs: [CubeTensor; 3],
    scale: f32,
    softcap: f32,
    hints: AttentionHints,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let s = Sizes::of(&inputs, scale, softcap);
    assert_eq!(outputs[2].meta.shape(), inputs[0].meta.shape(), "shape of the output's gradient");
    let (inputs, outputs) = (inputs.map(dense), outputs.map(dense));
    match choose(hints.route, &s, &inputs[0], Tile::backward_bytes) {
        Way::Chunks(length) => chunks::backward(s, inputs, outputs, hints.keys, length),
        Way::Tiles(tile) => tiles_backward::backward(s, tile, inputs, outputs),
    }
}
