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
    arch::{Block, Kernel, Simd, GROUP, GROUP_BYTES, LANE_UNITS},
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

/// Which of the units `lo..hi` each row needs, in ascending order; `lo` is a multiple of [`LANE_UNITS`].
pub(crate) struct Choose<'a> {
    pub(crate) shadow: Shadow<'a>,
    pub(crate) activation: Activation,
    pub(crate) rows: &'a [Int8Row],
    pub(crate) points: &'a [Point],
    pub(crate) lo: usize,
    pub(crate) hi: usize,
    /// Receives the units that some row needs, and for each a bit per row that does.
    pub(crate) chosen: &'a mut Vec<Need>,
}

impl Kernel for Choose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { shadow, activation, rows, points, lo, hi, chosen } = self;
        chosen.clear();
        for block in lo / LANE_UNITS..hi.div_ceil(LANE_UNITS) {
            let first = block * LANE_UNITS;
            let mut needs = [0u8; LANE_UNITS];
            for (n, (row, point)) in rows.iter().zip(points).enumerate() {
                let here = point.width.min(hi).saturating_sub(first).min(LANE_UNITS);
                if here == 0 {
                    continue;
                }
                let importance = if point.importance_min > 0.0 {
                    block_importance(simd, &shadow, activation, row, block)
                } else {
                    [f32::INFINITY; LANE_UNITS]
                };
                for (need, importance) in needs[..here].iter_mut().zip(importance) {
                    // A NaN keeps its unit: a row that is broken must not look healthy because it was cut.
                    let unneeded = importance < point.importance_min;
                    *need |= u8::from(!unneeded) << n;
                }
            }
            for (i, &need) in needs.iter().enumerate() {
                if need != 0 {
                    chosen.push(((first + i) as u32, need));
                }
            }
        }
    }
}

#[inline(always)]
fn block_importance<S: Simd>(
    simd: S,
    shadow: &Shadow<'_>,
    activation: Activation,
    row: &Int8Row,
    block: usize,
) -> [f32; LANE_UNITS] {
    let groups = shadow.hidden_size.div_ceil(GROUP);
    let (codes, _) = shadow.codes.as_chunks();
    let (scales, _) = shadow.scales.as_chunks();
    let of_block = block * groups..(block + 1) * groups;
    let mut z = simd.block_products(&Block {
        codes: &codes[of_block.clone()],
        scales: &scales[of_block],
        x: &row.codes,
        corrections: &row.corrections,
    });
    for value in &mut z {
        *value *= row.scale;
    }
    let first = block * LANE_UNITS;
    let here = shadow.units().saturating_sub(first).min(LANE_UNITS);
    if let Some(bias) = shadow.bias {
        for (value, bias) in z.iter_mut().zip(&bias[first..first + here]) {
            *value += bias;
        }
    }
    activation.apply(&mut z);
    for (value, norm) in z.iter_mut().zip(&shadow.unit_norm[first..first + here]) {
        *value = value.abs() * norm;
    }
    z
}
