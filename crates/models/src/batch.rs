//! The host-side input of a causal language model.

/// Target of a position that is not trained on.
pub const IGNORE: i32 = -100;

/// A micro batch; every vector is row-major `[rows, cols]`.
///
/// Padding has the target [`IGNORE`], position 0 and sees only itself. A packed row holds several documents; the last token of
/// each has the target [`IGNORE`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Sequences.
    pub rows: usize,
    /// Tokens of a sequence.
    pub cols: usize,
    /// Token ids.
    pub input_ids: Vec<i32>,
    /// The id each position must predict (labels already shifted by one), or [`IGNORE`].
    pub targets: Vec<i32>,
    /// Rotary position: the index inside the document.
    pub positions: Vec<i32>,
    /// First column of the same row the position may attend to.
    pub first_key: Vec<i32>,
    /// Indices of the data records inside, for messages.
    pub records: Vec<u64>,
}

impl Batch {
    /// One batch from plain rows of ids and labels as transformers takes them: unshifted, padded, optional mask (1 for tokens).
    /// Positions count from 0 in every row, padding included, as transformers numbers them in training.
    pub fn from_rows(ids: &[Vec<i32>], labels: &[Vec<i32>], mask: Option<&[Vec<i32>]>) -> Self {
        let (rows, cols) = (ids.len(), ids.first().map_or(0, Vec::len));
        let mut batch = Self { rows, cols, ..Self::default() };
        for row in 0..rows {
            let first = mask.and_then(|mask| mask[row].iter().position(|&is_token| is_token != 0)).unwrap_or(0);
            for col in 0..cols {
                let is_token = mask.is_none_or(|mask| mask[row][col] != 0);
                let target = labels.get(row).and_then(|labels| labels.get(col + 1)).copied().unwrap_or(IGNORE);
                batch.input_ids.push(ids[row][col]);
                batch.targets.push(target);
                batch.positions.push(if is_token { col as i32 } else { 0 });
                batch.first_key.push(if is_token { first as i32 } else { col as i32 });
            }
            batch.records.push(row as u64);
        }
        batch
    }

    /// Positions that are trained on.
    pub fn target_count(&self) -> usize {
        self.targets.iter().filter(|&&target| target >= 0).count()
    }

    /// Positions that are not padding.
    ///
    /// Padding sees only itself, has no target, and nothing after it in its row sees it: a document's first token is seen by
    /// its second, or is alone in its document.
    pub fn token_count(&self) -> usize {
        (0..self.input_ids.len()).filter(|&i| !self.is_padding(i)).count()
    }

    fn is_padding(&self, index: usize) -> bool {
        let column = (index % self.cols.max(1)) as i32;
        let sees_itself_only = self.first_key[index] == column && self.positions[index] == 0;
        let is_last = column + 1 == self.cols as i32;
        let is_seen = !is_last && self.first_key[index + 1] <= column;
        sees_itself_only && self.targets[index] < 0 && !is_seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_of_a_document_is_no_padding() {
        let batch = Batch {
            rows: 1,
            cols: 5,
            input_ids: vec![1, 7, 1, 8, 3],
            targets: vec![IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
            positions: vec![0, 1, 0, 1, 0],
            first_key: vec![0, 0, 2, 2, 4],
            records: vec![0, 1],
        };
        assert_eq!(batch.token_count(), 4);
    }
}
