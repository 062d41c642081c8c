//! Which documents share a row and which rows share a batch.
//!
//! A row is a list of documents, a batch a list of rows. Every function here is a pure function of its arguments: the order
//! of an epoch follows from the seed and the number of the epoch alone, so that a resumed run rebuilds it.

use std::collections::BTreeMap;

/// The documents of one row, in order.
pub type Row = Vec<usize>;

/// Documents that are packed together: enough that rows fill up, few enough that an epoch stays well mixed.
pub const PACKING_WINDOW: usize = 8192;

/// Batches whose records are sorted by length together.
pub const LENGTH_WINDOW: usize = 32;

/// A small deterministic generator (SplitMix64), the same on every machine and in every version of this program.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// A generator whose stream depends on all parts of the seed.
    pub fn new(seed: &[u64]) -> Self {
        let mut random = Self { state: 0x6c6f_7772_616e_6b21 };
        for part in seed {
            random.state ^= *part;
            random.state = random.next_u64();
        }
        random
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (0 for a bound of 0); the bias is below `bound / 2^64`.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Brings the items into random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// Rows of at most `capacity` tokens, filled window by window: the longest document first, each into the fullest row that
/// still has room (best fit decreasing). Documents longer than `capacity` get a row of their own.
pub fn pack_best_fit(order: &[usize], length_of: impl Fn(usize) -> usize, capacity: usize) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for window in order.chunks(PACKING_WINDOW) {
        let mut window = window.to_vec();
        // Stable, so that documents of one length stay in the given order.
        window.sort_by_key(|document| std::cmp::Reverse(length_of(*document)));
        let mut with_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for document in window {
            let length = length_of(document);
            let (row, room) = match take_fullest(&mut with_room, length) {
                Some((row, room)) => (row, room - length),
                None => {
                    rows.push(Row::new());
                    (rows.len() - 1, capacity.saturating_sub(length))
                }
            };
            rows[row].push(document);
            with_room.entry(room).or_default().push(row);
        }
    }
    rows
}

/// Takes a row with the least room that is enough.
fn take_fullest(with_room: &mut BTreeMap<usize, Vec<usize>>, length: usize) -> Option<(usize, usize)> {
    let (&room, rows) = with_room.range_mut(length..).next()?;
    let row = rows.pop();
    if rows.is_empty() {
        with_room.remove(&room);
    }
    row.map(|row| (row, room))
}

/// Rows of at most `capacity` tokens that keep the order of the documents.
pub fn pack_in_order(order: &[usize], length_of: impl Fn(usize) -> usize, capacity: usize) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut room = 0;
    for &document in order {
        let length = length_of(document);
        match rows.last_mut() {
            Some(row) if length <= room => row.push(document),
            _ => {
                rows.push(vec![document]);
                room = capacity;
            }
        }
        room = room.saturating_sub(length);
    }
    rows
}

/// One document a row, `rows_per_batch` rows a batch; documents of similar length share a batch. Sorting happens inside
/// windows of [`LENGTH_WINDOW`] batches, so that an epoch stays mixed.
pub fn batch_by_length(order: &[usize], length_of: impl Fn(usize) -> usize, rows_per_batch: usize) -> Vec<Vec<Row>> {
    let mut batches = Vec::new();
    for window in order.chunks(rows_per_batch * LENGTH_WINDOW) {
        let mut window = window.to_vec();
        window.sort_by_key(|document| std::cmp::Reverse(length_of(*document)));
        batches.extend(window.chunks(rows_per_batch).map(one_each));
    }
    batches
}

/// One document a row, in the given order.
pub fn batch_in_order(order: &[usize], rows_per_batch: usize) -> Vec<Vec<Row>> {
    order.chunks(rows_per_batch).map(one_each).collect()
}

fn one_each(documents: &[usize]) -> Vec<Row> {
    documents.iter().map(|document| vec![*document]).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn best_fit_fills_rows() {
        let lengths = [6, 5, 5, 4, 3, 7];
        let order: Vec<usize> = (0..6).collect();
        assert_eq!(pack_best_fit(&order, |document| lengths[document], 10), vec![vec![5, 4], vec![0, 3], vec![1, 2]]);
        assert_eq!(
            pack_in_order(&order, |document| lengths[document], 10),
            vec![vec![0], vec![1, 2], vec![3, 4], vec![5]]
        );
    }

    #[test]
    fn the_generator_never_changes() {
        let mut random = Random::new(&[42, 0]);
        let mut items: Vec<usize> = (0..8).collect();
        random.shuffle(&mut items);
        assert_eq!(items, GOLDEN_ORDER);
        assert_ne!(Random::new(&[42, 1]).next_u64(), Random::new(&[42, 0]).next_u64());
        assert_ne!(Random::new(&[1, 2]).next_u64(), Random::new(&[2, 1]).next_u64());
        assert_eq!(Random::new(&[]).below(0), 0);
    }

    /// Resumed runs depend on this order: a change breaks old checkpoints.
    const GOLDEN_ORDER: [usize; 8] = [4, 2, 3, 6, 7, 5, 0, 1];

    #[test]
    fn windows_of_similar_length() {
        let lengths = [9, 1, 8, 2, 7];
        let order: Vec<usize> = (0..5).collect();
        assert_eq!(
            batch_by_length(&order, |document| lengths[document], 2),
            vec![vec![vec![0], vec![2]], vec![vec![4], vec![3]], vec![vec![1]]]
        );
        assert_eq!(batch_in_order(&order, 3), vec![vec![vec![0], vec![1], vec![2]], vec![vec![3], vec![4]]]);
    }

    proptest! {
        #[test]
        fn rows_hold_every_document_once_and_never_overflow(lengths in prop::collection::vec(1usize..64, 0..300)) {
            let order: Vec<usize> = (0..lengths.len()).collect();
            for rows in [pack_best_fit(&order, |d| lengths[d], 64), pack_in_order(&order, |d| lengths[d], 64)] {
                let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
                seen.sort_unstable();
                prop_assert_eq!(&seen, &order);
                prop_assert!(rows.iter().all(|row| row.iter().map(|d| lengths[*d]).sum::<usize>() <= 64));
                // Two rows that are both at most half full would have been one.
                let half_empty = rows.windows(2).filter(|pair| pair.iter().flatten().map(|d| lengths[*d]).sum::<usize>() <= 64).count();
                prop_assert_eq!(half_empty, 0);
            }
        }

        #[test]
        fn a_shuffle_is_a_permutation(seed: u64, count in 0usize..200) {
            let mut items: Vec<usize> = (0..count).collect();
            Random::new(&[seed]).shuffle(&mut items);
            items.sort_unstable();
            prop_assert_eq!(items, (0..count).collect::<Vec<usize>>());
        }
    }
}
