//! Which kernel does a product on a GPU: counted on paper, to be settled by measuring.
//!
//! | variable | values | for |
//! | --- | --- | --- |
//! | `LOWRANK_THIN` | `kernel`, `matmul` | products with few rows or columns, see `gpu/thin/` |
//! | `LOWRANK_PACKED` | `codes`, `panels` | products with packed weights, see `gpu/codes.rs` |
//! | `LOWRANK_ATTENTION` | `fragments`, `registers`, `chunks` | attention, see `gpu/attention/` |
//!
//! Each forces one way wherever it can run; they are read once. On the CPU all ways are the same.

use std::sync::LazyLock;

use crate::packed::Layout;

/// The most columns (or rows) of a thin product. With more, its f32 arithmetic outside of tensor cores takes longer than cubek's
/// few cubes: 27 us against about 45 at 32 columns of a 4096 x 4096 product, 54 at 64.
const THIN: usize = 32;
/// The most tokens that are multiplied by codes. Each decodes anew in f32 arithmetic, 2 flops a value and token.
const FEW: usize = 8;

/// Who does `a b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Product {
    /// The kernel for thin products.
    Thin,
    /// Burn's matmul.
    Matmul,
}

/// Who does a product with a packed weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packed {
    /// A kernel that decodes as it multiplies.
    Codes,
    /// Burn's matmul, on dequantised panels.
    Panels,
}

/// Who does attention; the first where nothing is forced. What a device cannot do goes by chunks.
#[cfg(all(feature = "gpu", feature = "flex"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attention {
    /// Tiles in tensor cores.
    Fragments,
    /// Tiles in registers.
    Registers,
    /// Burn's products, and kernels between them.
    Chunks,
}

fn forced(variable: &str) -> Option<String> {
    std::env::var(variable).ok()
}

/// For a result `[m, n]`; `is_sum` where something is added to it (or types differ), which only a matmul does.
pub(crate) fn product(m: usize, n: usize, is_sum: bool) -> Product {
    static FORCED: LazyLock<Option<String>> = LazyLock::new(|| forced("LOWRANK_THIN"));
    match (FORCED.as_deref(), m.min(n)) {
        _ if is_sum => Product::Matmul,
        (Some("kernel"), _) => Product::Thin,
        (Some("matmul"), _) => Product::Matmul,
        (_, 0..=1) => Product::Matmul, // cubek has kernels for vectors
        (_, 2..=THIN) => Product::Thin,
        _ => Product::Matmul,
    }
}

#[cfg(all(feature = "gpu", feature = "flex"))]
pub(crate) fn attention() -> Attention {
    static FORCED: LazyLock<Option<String>> = LazyLock::new(|| forced("LOWRANK_ATTENTION"));
    match FORCED.as_deref() {
        Some("registers") => Attention::Registers,
        Some("chunks") => Attention::Chunks,
        _ => Attention::Fragments,
    }
}

/// For so many tokens.
pub(crate) fn packed(tokens: usize, layout: &Layout) -> Packed {
    static FORCED: LazyLock<Option<String>> = LazyLock::new(|| forced("LOWRANK_PACKED"));
    let whole_words = layout.stored()[1].is_multiple_of(layout.format.per_word());
    match (FORCED.as_deref(), tokens) {
        _ if !whole_words => Packed::Panels,
        (Some("codes"), _) => Packed::Codes,
        (Some("panels"), _) => Packed::Panels,
        (_, 0..=FEW) => Packed::Codes,
        _ => Packed::Panels,
    }
}
