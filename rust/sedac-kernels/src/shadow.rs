//! The shadow: 4-bit codes of the rows that decide, and which units a row of activations needs.
//!
//! ```text
//! importance[u] = |act(z[u] + bias[u])| * unit_norm[u]
//! z[u]          = scale_x * sum over groups g of scale[u][g] * sum over i in g of (code[u][i] - 8) * x8[i]
//! x8            = round(x / scale_x),  scale_x = max|x| / 127
//! ```
//!
//! Codes are interleaved by [`LANE_UNITS`] units so that a vector holds four elements of each: block by block
//! `[groups][8][16 units][4 bytes]`, where byte i of quad q holds element `4 q + i` of the group in its low half and
//! `32 + 4 q + i` in its high half. Scales lie `[groups][16 units]` a block. The last block is filled up with zeros.

use half::bf16;

use crate::{
    activation::{Activation, ROUNDER},
    arch::{Blocks, Kernel, Simd, GROUP, GROUP_BYTES, LANE_UNITS},
    runs::{Runs, RUNS},
    site::{Need, Point},
    Error,
};

/// A shadow in somebody else's memory.
#[derive(Clone, Copy, Debug)]
pub struct Shadow<'a> {
    codes: &'a [u8],
    scales: &'a [bf16],
    bias: Option<&'a [f32]>,
    unit_norm: &'a [f32],
    hidden_size: usize,
}

impl<'a> Shadow<'a> {
    /// The shadow of `unit_norm.len()` units of `hidden_size` inputs each.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] where a slice does not fit.
    pub fn new(
        codes: &'a [u8],
        scales: &'a [bf16],
        bias: Option<&'a [f32]>,
        unit_norm: &'a [f32],
        hidden_size: usize,
    ) -> Result<Self, Error> {
        let (units, groups) = (unit_norm.len(), hidden_size.div_ceil(GROUP));
        let blocks = units.div_ceil(LANE_UNITS);
        for (what, got, wanted) in [
            ("codes", codes.len(), blocks * groups * GROUP_BYTES),
            ("scales", scales.len(), blocks * groups * LANE_UNITS),
            ("bias", bias.map_or(units, <[f32]>::len), units),
        ] {
            if got != wanted {
                return Err(Error::size(what, wanted, got));
            }
        }
        Ok(Self { codes, scales, bias, unit_norm, hidden_size })
    }

    /// Number of units.
    #[must_use]
    pub fn units(&self) -> usize {
        self.unit_norm.len()
    }

    /// Number of inputs of a unit.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }
}

/// A row of activations, rounded to 8 bits.
pub(crate) struct Int8Row {
    codes: Vec<[i8; GROUP]>,
    /// What the offset of the codes adds to each group's sum, with the sign turned.
    corrections: Vec<i32>,
    scale: f32,
}

impl Int8Row {
    pub(crate) fn of(x: &[f32]) -> Self {
        // Compared as bits, in which order a NaN is above all numbers; and no comparison waits for the one before.
        let most = x.iter().map(|v| v.abs().to_bits()).max().unwrap_or(0);
        let scale = f32::from_bits(most) / 127.0;
        let divisor = if scale == 0.0 { 1.0 } else { scale };
        let mut codes = vec![[0i8; GROUP]; x.len().div_ceil(GROUP)];
        for (codes, x) in codes.iter_mut().zip(x.chunks(GROUP)) {
            for (code, v) in codes.iter_mut().zip(x) {
                let rounded = (v / divisor).clamp(-127.0, 127.0) + ROUNDER;
                *code = rounded.to_bits() as i8;
            }
        }
        let corrections = codes.iter().map(|codes| -8 * codes.iter().map(|&c| i32::from(c)).sum::<i32>());
        Self { corrections: corrections.collect(), codes, scale }
    }
}

/// Which of the units `from..to` each row needs, in the order that [`crate::runs`] says.
pub(crate) struct Choose<'a> {
    pub(crate) shadow: Shadow<'a>,
    pub(crate) activation: Activation,
    pub(crate) rows: &'a [Int8Row],
    pub(crate) points: &'a [Point],
    pub(crate) runs: Runs,
    /// Receives the units that some row needs, and for each a bit per row that does.
    pub(crate) chosen: &'a mut Vec<Need>,
}

impl Kernel for Choose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { shadow, activation, rows, points, runs, chosen } = self;
        chosen.clear();
        for at in (0..runs.length).step_by(LANE_UNITS) {
            let mut needs = [[0u8; LANE_UNITS]; RUNS];
            for (n, (row, point)) in rows.iter().zip(points).enumerate() {
                let mut importance = [[f32::INFINITY; LANE_UNITS]; RUNS];
                if point.importance_min > 0.0 {
                    let mut firsts = [0; RUNS];
                    for r in 0..RUNS {
                        firsts[r] = runs.unit(at, r);
                    }
                    importance = importances(simd, &shadow, activation, row, firsts);
                }
                for r in 0..RUNS {
                    let here = point.width.min(runs.to).saturating_sub(runs.unit(at, r)).min(LANE_UNITS);
                    for (need, importance) in needs[r][..here].iter_mut().zip(importance[r]) {
                        // A NaN keeps its unit: a row that is broken must not look healthy because it was cut.
                        let unneeded = importance < point.importance_min;
                        *need |= u8::from(!unneeded) << n;
                    }
                }
            }
            for i in 0..LANE_UNITS {
                for r in 0..RUNS {
                    if needs[r][i] != 0 {
                        chosen.push((runs.unit(at + i, r) as u32, needs[r][i]));
                    }
                }
            }
        }
    }
}

/// Importance of the [`LANE_UNITS`] units from each of `firsts` on; where there are none, anything.
#[inline(always)]
fn importances<S: Simd>(
    simd: S,
    shadow: &Shadow<'_>,
    activation: Activation,
    row: &Int8Row,
    firsts: [usize; RUNS],
) -> [[f32; LANE_UNITS]; RUNS] {
    let groups = shadow.hidden_size.div_ceil(GROUP);
    let (codes, _) = shadow.codes.as_chunks();
    let (scales, _) = shadow.scales.as_chunks();
    let last = shadow.units().div_ceil(LANE_UNITS).saturating_sub(1);
    let blocks = firsts.map(|first| (first / LANE_UNITS).min(last));
    let mut z = simd.block_products(&Blocks {
        codes: blocks.map(|block| &codes[block * groups..(block + 1) * groups]),
        scales: blocks.map(|block| &scales[block * groups..(block + 1) * groups]),
        x: &row.codes,
        corrections: &row.corrections,
    });
    for (z, first) in z.iter_mut().zip(firsts) {
        let here = shadow.units().saturating_sub(first).min(LANE_UNITS);
        for value in z.iter_mut() {
            *value *= row.scale;
        }
        if let Some(bias) = shadow.bias {
            for (value, bias) in z[..here].iter_mut().zip(bias.get(first..).unwrap_or_default()) {
                *value += bias;
            }
        }
        activation.apply(z);
        for (value, norm) in z[..here].iter_mut().zip(shadow.unit_norm.get(first..).unwrap_or_default()) {
            *value = value.abs() * norm;
        }
    }
    z
}
