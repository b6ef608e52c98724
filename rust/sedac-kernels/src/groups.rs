//! Rows in groups of up to six, whose running sums fit the registers together.
//!
//! Of a call with more rows, the groups take turns at each piece of the weights while it is in a core's cache, so that
//! memory is read once. A group knows nothing of the others, and a row's bits do not depend on its group.

use crate::{products::Inputs, site::Need, Point};

/// Most rows of a group.
pub(crate) const GROUP_ROWS: usize = 6;
/// What the groups take turns at: a quarter of the second-level cache of today's servers.
const PIECE_BYTES: usize = 1 << 18;

/// Calls a method that has the number of rows as a constant.
macro_rules! with_rows {
    ($rows:expr, $on:ident.$method:ident($($argument:expr),*)) => {
        match $rows {
            1 => $on.$method::<1>($($argument),*),
            2 => $on.$method::<2>($($argument),*),
            3 => $on.$method::<3>($($argument),*),
            4 => $on.$method::<4>($($argument),*),
            5 => $on.$method::<5>($($argument),*),
            _ => $on.$method::<{ $crate::groups::GROUP_ROWS }>($($argument),*),
        }
    };
}
pub(crate) use with_rows;

/// Rows of each group but the last, which may have fewer: groups of one size, as few as can be.
pub(crate) fn rows_of_group(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(GROUP_ROWS).max(1)).max(1)
}

/// How many items of a weight, of so many bytes each, the groups take turns at: a multiple of four.
pub(crate) fn piece_of(item_bytes: usize) -> usize {
    (PIECE_BYTES / item_bytes.max(1) / 4 * 4).max(4)
}

/// One past the last unit that a row can use.
pub(crate) fn widest(points: &[Point]) -> usize {
    points.iter().map(|point| point.width).max().unwrap_or(0)
}

/// The rows of one group, and the units that they need, by block.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a, T> {
    pub(crate) points: &'a [Point],
    pub(crate) x: &'a [T],
    pub(crate) wide: &'a [f32],
    pub(crate) chosen: &'a [Vec<Need>],
}

impl<'a, T> Group<'a, T> {
    pub(crate) fn inputs<const N: usize>(&self) -> Inputs<'a, T, N> {
        Inputs::new(self.x, self.wide)
    }

    /// Units `from..to` of those that block `b` needs, or fewer, and what probably comes next on this thread.
    pub(crate) fn some(&self, b: usize, from: usize, to: usize, threads: usize) -> [&'a [Need]; 2] {
        let units = self.chosen[b].as_slice();
        let (units, later) = units.split_at(to.min(units.len()));
        let next_block = || self.chosen.get(b + threads).map_or(&[] as &[Need], Vec::as_slice);
        [&units[from.min(units.len())..], if later.is_empty() { next_block() } else { later }]
    }
}

/// A slice of all rows, as the slices of their groups; empty ones where a row has no length.
pub(crate) fn split<E>(all: &mut [E], row_length: usize, rows: usize) -> impl Iterator<Item = &mut [E]> {
    let of_group = rows_of_group(rows);
    let mut pieces = all.chunks_mut((of_group * row_length).max(1));
    (0..rows.div_ceil(of_group)).map(move |_| pieces.next().unwrap_or_default())
}
