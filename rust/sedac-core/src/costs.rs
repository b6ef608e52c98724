//! What a dense product costs, as a table.

use crate::Error;

/// Seconds of one product over a grid of token and unit counts.
///
/// Between the grid's points the logarithm is interpolated, bilinearly in the logarithms of tokens and units. Below the
/// grid its edge holds (a call has a least cost); above it the time is in proportion.
#[derive(Clone, Debug)]
pub struct CostGrid {
    // All three as natural logarithms.
    tokens: Vec<f64>,
    units: Vec<f64>,
    seconds: Vec<f64>,
}

impl CostGrid {
    /// A grid of `tokens.len()` rows and `units.len()` columns; axes ascending, everything finite and above 0.
    pub fn new(tokens: &[f64], units: &[f64], seconds: &[f64]) -> Result<Self, Error> {
        for (field, axis) in [("tokens", tokens), ("units", units)] {
            let rising = axis.windows(2).all(|pair| pair[0] < pair[1]);
            if axis.is_empty() || !rising {
                return Err(Error::out_of_range(field, "one or more ascending numbers", axis.len() as f64));
            }
        }
        let expected = tokens.len() * units.len();
        if seconds.len() != expected {
            return Err(Error::Length { name: "seconds", expected, got: seconds.len() });
        }
        let ln = |field: &str, values: &[f64]| {
            let odd = values.iter().find(|value| !(value.is_finite() && **value > 0.0));
            match odd {
                Some(&value) => Err(Error::out_of_range(field, "finite and above 0", value)),
                None => Ok(values.iter().map(|value| value.ln()).collect::<Vec<f64>>()),
            }
        };
        Ok(Self {
            tokens: ln("tokens", tokens)?,
            units: ln("units", units)?,
            seconds: ln("seconds", seconds)?,
        })
    }

    /// Seconds of a product of `tokens` rows and `units` hidden units; none takes no time.
    #[must_use]
    pub fn seconds(&self, tokens: usize, units: usize) -> f64 {
        if tokens == 0 || units == 0 {
            return 0.0;
        }
        let (row, down, above) = place(&self.tokens, (tokens as f64).ln());
        let (column, across, beyond) = place(&self.units, (units as f64).ln());
        let columns = self.units.len();
        let along = |row: usize| {
            let left = self.seconds[row * columns + column];
            let right = self.seconds[row * columns + (column + 1).min(columns - 1)];
            left + (right - left) * across
        };
        let upper = along(row);
        let lower = along((row + 1).min(self.tokens.len() - 1));
        (upper + (lower - upper) * down + above + beyond).exp()
    }
}

/// Cell of `value` on an axis, the share of the way through it, and how far `value` is above the axis.
fn place(axis: &[f64], value: f64) -> (usize, f64, f64) {
    let last = axis.len() - 1;
    let inside = value.max(axis[0]).min(axis[last]);
    let cell = axis.partition_point(|&point| point <= inside).saturating_sub(1).min(last.saturating_sub(1));
    let size = axis[(cell + 1).min(last)] - axis[cell];
    let share = if size > 0.0 { (inside - axis[cell]) / size } else { 0.0 };
    (cell, share, (value - axis[last]).max(0.0))
}
