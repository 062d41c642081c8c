//! What [`super`] computes on the host as well: places in fragments and distances of rows.

use std::collections::BTreeSet;

use super::*;

/// Every number of a fragment leaves once, in vectors that end with its rows.
#[test]
fn units_share_a_fragment_in_vectors_of_any_size() {
    for size in [1, 2, 4, WIDEST] {
        let mut seen = [0; SIDE * SIDE];
        for turn in 0..SIDE * SIDE / size / 32 {
            for unit in 0..32 {
                let (row, column) = place_in_fragment(unit, turn, size);
                assert_eq!(row * SIDE + column, (unit + turn * 32) * size, "where the scratch holds it");
                assert!(column + size <= SIDE);
                (0..size).for_each(|n| seen[row * SIDE + column + n] += 1);
            }
        }
        assert_eq!(seen, [1; SIDE * SIDE], "vectors of {size}");
    }
}

/// Rows of 16 bytes below each other, as a fragment is read and a tile filled, lie in different banks; so do rows of sums
/// that units walk along, but for two that share one.
#[test]
fn rows_of_a_tile_meet_all_banks() {
    for width in (32..=256).step_by(32) {
        let quarters = (0..8).map(|row| row * padded(width, Form::Fragments) * 2 / 16 % 8);
        assert_eq!(quarters.collect::<BTreeSet<_>>().len(), 8, "a row of {width} numbers");
        assert!((padded(width, Form::Fragments) * 2).is_multiple_of(16));
        let sums = (0..8).map(|row| row * padded_sums(width, Form::Fragments) % 32 / 4);
        assert_eq!(sums.collect::<BTreeSet<_>>().len(), 8, "a row of {width} sums");
    }
}
