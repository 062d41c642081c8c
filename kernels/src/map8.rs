//! The dynamic 8-bit maps (arXiv 2110.02861, section 2), as bitsandbytes defines them: 256 sorted values, and for any
//! number the code of the nearest of them.
//!
//! The signed map splits `[0.1, 1]` into `2^i` equal intervals for i = 0..6 and takes their middles times `10^(i - 6)`
//! with both signs, the unsigned one takes `2^(i + 1)` intervals and the positive sign only; both get 0 and 1. So
//! seven decades are covered, and values near the largest are the most exact.
//!
//! A number exactly between two map values goes to the lower one. bitsandbytes on a GPU decides the same way; its CPU
//! path first rounds to a grid of 2 / 65535, so codes of numbers within 1.6e-5 of a middle may differ from these.

use std::sync::LazyLock;

/// Cells are the numbers with equal sign, exponent and leading seven bits of the mantissa.
const CELL_SHIFT: u32 = 16;
/// The cell of 2^-24: everything smaller belongs to it too, as the smallest boundary is 1.6e-7 > 2^-23.
const LOWEST: u32 = (127 - 24) << 7;
/// The cell of 1: everything larger belongs to it too.
const HIGHEST: u32 = 127 << 7;
/// Cells of both signs.
const CELLS: usize = 2 * (HIGHEST - LOWEST + 1) as usize;

/// 256 sorted values and what is needed to find the nearest quickly.
#[derive(Clone, Debug)]
pub struct Map {
    /// By code.
    pub values: [f32; 256],
    /// `bounds[c]` is the largest f32 whose nearest value is that of a code of at most c.
    bounds: [f32; 256],
    /// The code of the smallest number of each cell. No cell holds more than one boundary.
    cells: [u8; CELLS],
}

static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

impl Map {
    /// From -0.99296875 to 1, zero at 127: for first moments and weights.
    pub fn signed() -> &'static Self {
        &SIGNED
    }

    /// From 0 to 1, zero at 0: for second moments.
    pub fn unsigned() -> &'static Self {
        &UNSIGNED
    }

    fn new(signed: bool) -> Self {
        let values = values(signed);
        let mut bounds = [f32::INFINITY; 256];
        for (bound, pair) in bounds.iter_mut().zip(values.windows(2)) {
            let middle = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0; // exact
            let rounded = middle as f32;
            *bound = if f64::from(rounded) > middle { rounded.next_down() } else { rounded };
        }
        let mut cells = [0; CELLS];
        for (index, cell) in cells.iter_mut().enumerate() {
            let key = LOWEST + (index / 2) as u32;
            let first = if key == LOWEST { 0.0 } else { f32::from_bits(key << CELL_SHIFT) };
            let last = if key == HIGHEST { f32::INFINITY } else { f32::from_bits((key + 1) << CELL_SHIFT).next_down() };
            let smallest = if index % 2 == 0 { first } else { -last };
            *cell = bounds.partition_point(|bound| *bound < smallest) as u8;
        }
        Self { values, bounds, cells }
    }

    /// The code of the value nearest to a number; the lower one in the middle of two. Not-a-number gets some code.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> u8 {
        let bits = x.to_bits();
        let key = ((bits & 0x7fff_ffff) >> CELL_SHIFT).clamp(LOWEST, HIGHEST) - LOWEST;
        let low = self.cells[((key << 1) | (bits >> 31)) as usize];
        low + u8::from(x > self.bounds[usize::from(low)])
    }

    /// For each code the largest number that it is the nearest value of: the code of a number is how many of these are
    /// below it.
    pub fn bounds(&self) -> &[f32; 256] {
        &self.bounds
    }

    /// The code of 0.
    #[inline(always)]
    pub fn zero(&self) -> u8 {
        self.nearest(0.0)
    }
}

/// The sorted map. The order of the operations and their f32 rounding are those of the reference.
fn values(signed: bool) -> [f32; 256] {
    const SCALES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut values = [0.0; 256]; // zero is one of them
    values[1] = 1.0;
    let mut filled = 2;
    for (decade, scale) in SCALES.into_iter().enumerate() {
        let intervals = if signed { 1usize << decade } else { 2 << decade };
        let step = (1.0 - 0.1f32) / intervals as f32;
        // Counted from the nearer end, with one rounding.
        let boundary = |i: usize| match i < intervals.div_ceil(2) {
            true => step.mul_add(i as f32, 0.1),
            false => step.mul_add(-((intervals - i) as f32), 1.0),
        };
        for i in 0..intervals {
            let value = scale * ((boundary(i) + boundary(i + 1)) / 2.0);
            values[filled] = value;
            filled += 1;
            if signed {
                values[filled] = -value;
                filled += 1;
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

/// The largest magnitude; 0 for nothing.
pub fn largest_magnitude(values: &[f32]) -> f32 {
    // Independent lanes, so that the compiler may use vector registers.
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let magnitude = value.abs();
            *lane = if magnitude > *lane { magnitude } else { *lane };
        }
    }
    rest.iter().map(|value| value.abs()).chain(lanes).fold(0.0, f32::max)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::tests::Random;

    /// By comparison with every value, in f64.
    fn slow(map: &Map, x: f32) -> u8 {
        let distance = |code: usize| (f64::from(x) - f64::from(map.values[code])).abs();
        (0..256).fold(0, |best, code| if distance(code) < distance(best) { code } else { best }) as u8
    }

    #[test]
    fn the_maps_have_the_published_values() {
        let (signed, unsigned) = (Map::signed(), Map::unsigned());
        assert_eq!((signed.values[0], signed.values[127], signed.values[255]), (-0.992_968_74, 0.0, 1.0));
        assert_eq!((unsigned.values[0], unsigned.values[255]), (0.0, 1.0));
        assert!((signed.values[128] - 5.5e-7).abs() < 1e-12 && (unsigned.values[1] - 3.25e-7).abs() < 1e-12);
        assert_eq!((signed.zero(), unsigned.zero()), (127, 0));
        for map in [signed, unsigned] {
            assert!(map.values.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn every_code_is_the_nearest_to_its_value_and_boundaries_are_exact() {
        for map in [Map::signed(), Map::unsigned()] {
            for code in 0..=255u8 {
                assert_eq!(map.nearest(map.values[usize::from(code)]), code);
                let bound = map.bounds[usize::from(code)];
                if code < 255 {
                    for x in [bound.next_down(), bound, bound.next_up()] {
                        assert_eq!(map.nearest(x), slow(map, x), "{x:e}");
                    }
                    assert_eq!((map.nearest(bound), map.nearest(bound.next_up())), (code, code + 1));
                }
            }
        }
    }

    #[test]
    fn no_cell_holds_two_boundaries() {
        for map in [Map::signed(), Map::unsigned()] {
            let mut cells: Vec<_> = map.bounds[..255]
                .iter()
                .map(|bound| {
                    let bits = bound.to_bits();
                    (bits >> 31, ((bits & 0x7fff_ffff) >> CELL_SHIFT).clamp(LOWEST, HIGHEST))
                })
                .collect();
            cells.sort_unstable();
            assert!(cells.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }

    #[test]
    fn the_lookup_equals_the_search_everywhere() {
        let mut random = Random::new(3);
        for map in [Map::signed(), Map::unsigned()] {
            for _ in 0..20_000 {
                let x = ((2.0 * random.uniform() - 1.0) * 10f64.powf(-8.0 * random.uniform())) as f32;
                assert_eq!(map.nearest(x), slow(map, x), "{x:e}");
            }
            for x in [0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 2.0, -2.0, 1e-7, f32::MIN_POSITIVE] {
                assert_eq!(map.nearest(x), slow(map, x), "{x:e}");
            }
        }
    }
}
