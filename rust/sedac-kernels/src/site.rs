//! One FFN: its weights in somebody else's memory, and what rows use of them.

use crate::{activation::Activation, matrix::Matrix, Error};

/// What one row uses: of the first `width` units those whose importance is at least `importance_min` (0: all).
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Point {
    pub width: usize,
    pub importance_min: f32,
}

/// A unit, and a bit for each row that needs it.
pub(crate) type Need = (u32, u8);

/// Down's weights.
#[derive(Clone, Copy, Debug)]
pub enum Down<'a, T> {
    /// `[units][hidden size]`: a unit's column is contiguous.
    Columns(Matrix<'a, T>),
    /// `[hidden size][units]`, as `nn.Linear` keeps it.
    Rows(Matrix<'a, T>),
}

/// The weights of one FFN: `down(act(gate x) * up x)`, or `down(act(up x))` without a gate.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Ffn<'a, T> {
    pub gate: Option<Matrix<'a, T>>,
    pub up: Matrix<'a, T>,
    pub down: Down<'a, T>,
    pub gate_bias: Option<&'a [T]>,
    pub up_bias: Option<&'a [T]>,
    pub down_bias: Option<&'a [T]>,
    pub activation: Activation,
}

impl<T: Copy> Ffn<'_, T> {
    /// Number of units.
    #[must_use]
    pub fn units(&self) -> usize {
        self.up.rows()
    }

    /// Length of an input and an output row.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.up.columns()
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let (f, d) = (self.units(), self.hidden_size());
        if d == 0 {
            return Err(Error::size("up", "at least one column", d));
        }
        let (down, down_wanted) = match &self.down {
            Down::Columns(down) => (down, (f, d)),
            Down::Rows(down) => (down, (d, f)),
        };
        for (what, matrix, wanted) in
            [("down", Some(down), down_wanted), ("gate", self.gate.as_ref(), (f, d))]
        {
            let got = matrix.map_or(wanted, |matrix| (matrix.rows(), matrix.columns()));
            if got != wanted {
                let size = |(rows, columns)| format!("{rows} x {columns}");
                return Err(Error::size(what, size(wanted), size(got)));
            }
        }
        for (what, bias, wanted) in
            [("gate_bias", self.gate_bias, f), ("up_bias", self.up_bias, f), ("down_bias", self.down_bias, d)]
        {
            if bias.is_some_and(|bias| bias.len() != wanted) {
                return Err(Error::size(what, wanted, bias.map_or(0, <[T]>::len)));
            }
        }
        Ok(())
    }
}
