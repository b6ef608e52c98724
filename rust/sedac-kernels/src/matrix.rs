//! A matrix in somebody else's memory, row by row.

use crate::Error;

/// Rows of equal length, each contiguous, at a fixed distance from one another.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Row i is `data[i * stride..][..columns]`.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] where the rows overlap or do not fit into `data`.
    pub fn new(data: &'a [T], rows: usize, columns: usize, stride: usize) -> Result<Self, Error> {
        let before_last = rows.saturating_sub(1).checked_mul(stride);
        let needed =
            if rows == 0 { Some(0) } else { before_last.and_then(|before| before.checked_add(columns)) };
        if stride < columns || needed.is_none_or(|needed| data.len() < needed) {
            let wanted = format!("{rows} rows of {columns}, {stride} apart");
            return Err(Error::size("data", wanted, format!("{} elements", data.len())));
        }
        Ok(Self { data, rows, columns, stride })
    }

    /// Rows next to one another.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] where `data` is too short.
    pub fn contiguous(data: &'a [T], rows: usize, columns: usize) -> Result<Self, Error> {
        Self::new(data, rows, columns, columns)
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// One row.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    #[must_use]
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        &self.data[i * self.stride..][..self.columns]
    }

    /// One row, or the last one where there is no such row; for prefetching.
    #[inline(always)]
    pub(crate) fn row_near(&self, i: usize) -> &'a [T] {
        self.row(i.min(self.rows - 1))
    }
}
