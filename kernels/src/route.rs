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

/// The way that a variable forces. Another value than its names is said and left aside.
fn forced<T: Copy>(variable: &str, ways: &[(&str, T)]) -> Option<T> {
    let value = std::env::var(variable).ok()?;
    let found = ways.iter().find(|(name, _)| *name == value).map(|&(_, way)| way);
    match found {
        Some(_) => tracing::info!("{variable} = {value}"),
        None => {
            let names: Vec<&str> = ways.iter().map(|&(name, _)| name).collect();
            tracing::warn!("{variable} is \"{value}\", expected {}: it is ignored", names.join(" or "));
        }
    }
    found
}

/// For a result `[m, n]`; `is_sum` where something is added to it (or types differ), which only a matmul does.
pub(crate) fn product(m: usize, n: usize, is_sum: bool) -> Product {
    static FORCED: LazyLock<Option<Product>> =
        LazyLock::new(|| forced("LOWRANK_THIN", &[("kernel", Product::Thin), ("matmul", Product::Matmul)]));
    match (*FORCED, m.min(n)) {
        _ if is_sum => Product::Matmul,
        (Some(way), _) => way,
        (None, 2..=THIN) => Product::Thin,
        // cubek has kernels for vectors
        (None, _) => Product::Matmul,
    }
}

/// On devices that can do it.
#[cfg(all(feature = "gpu", feature = "flex"))]
pub(crate) fn attention() -> Attention {
    static FORCED: LazyLock<Option<Attention>> = LazyLock::new(|| {
        let ways =
            [("fragments", Attention::Fragments), ("registers", Attention::Registers), ("chunks", Attention::Chunks)];
        forced("LOWRANK_ATTENTION", &ways)
    });
    FORCED.unwrap_or(Attention::Fragments)
}

/// For so many tokens.
pub(crate) fn packed(tokens: usize, layout: &Layout) -> Packed {
    static FORCED: LazyLock<Option<Packed>> =
        LazyLock::new(|| forced("LOWRANK_PACKED", &[("codes", Packed::Codes), ("panels", Packed::Panels)]));
    let has_whole_words = layout.stored()[1].is_multiple_of(layout.format.per_word());
    match (*FORCED, tokens) {
        _ if !has_whole_words => Packed::Panels,
        (Some(way), _) => way,
        (None, 0..=FEW) => Packed::Codes,
        (None, _) => Packed::Panels,
    }
}
