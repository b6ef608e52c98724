//! The probe: from a row's hidden state to the risk of cutting what lies behind it.
//!
//! ```text
//! risk = softplus(out . gelu(down n + down_bias) + out_bias)
//! n    = (x - mean(x)) / sqrt(variance(x) + eps) * norm_weight + norm_bias
//! ```
//!
//! All in `f32`, whatever the hidden state's type, on the caller's thread: a probe is read in the time that other
//! threads take to join in. A hidden state that is not finite gives a risk that is not finite.

use crate::{
    activation::Activation,
    arch::{Isa, Kernel, Simd},
    element::Element,
    matrix::Matrix,
    products::dots_wide,
    rows::widened,
    Error, MAX_ROWS,
};

/// Running sums of a mean: as many as any vector register holds.
const SUMS: usize = 16;
/// From here on `softplus(z)` is `z` in `f32`.
const LINEAR_FROM: f32 = 20.0;

/// The parameters of one probe; slices of `norm` have the hidden size, those of `rank` the rows of `down`.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Probe<'a> {
    pub norm_weight: &'a [f32],
    pub norm_bias: &'a [f32],
    pub eps: f32,
    pub down: Matrix<'a, f32>,
    pub down_bias: &'a [f32],
    pub out: &'a [f32],
    pub out_bias: f32,
}

impl Probe<'_> {
    fn check(&self, x: usize, risks: usize) -> Result<(), Error> {
        let (rank, d) = (self.down.rows(), self.down.columns());
        if d == 0 {
            return Err(Error::size("down", "at least one column", d));
        }
        for (what, got, wanted) in [
            ("norm_weight", self.norm_weight.len(), d),
            ("norm_bias", self.norm_bias.len(), d),
            ("down_bias", self.down_bias.len(), rank),
            ("out", self.out.len(), rank),
            ("x", x, risks * d),
        ] {
            if got != wanted {
                return Err(Error::size(what, wanted, got));
            }
        }
        if !(1..=MAX_ROWS).contains(&risks) {
            return Err(Error::Rows { got: risks });
        }
        Ok(())
    }
}

/// The risk of each of `risks.len()` rows: x `[rows][hidden size]`.
///
/// # Errors
///
/// [`Error::Size`] where a slice does not fit, [`Error::Rows`] for more than [`MAX_ROWS`] rows or none.
pub fn risks<T: Element>(isa: Isa, probe: &Probe<'_>, x: &[T], risks: &mut [f32]) -> Result<(), Error> {
    probe.check(x.len(), risks.len())?;
    let mut wide = widened(isa, x);
    for (x, risk) in wide.chunks_exact_mut(probe.down.columns()).zip(risks) {
        let z = isa.run(Assess { probe, x });
        *risk = if z > LINEAR_FROM { z } else { z.exp().ln_1p() };
    }
    Ok(())
}

/// One row up to the softplus; x is normalised in place.
struct Assess<'a> {
    probe: &'a Probe<'a>,
    x: &'a mut [f32],
}

impl Kernel for Assess<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let Self { probe, x } = self;
        let count = x.len() as f32;
        let middle = total(x) / count;
        for value in x.iter_mut() {
            *value -= middle;
        }
        let scale = 1.0 / (total_of_squares(x) / count + probe.eps).sqrt();
        for ((value, weight), bias) in x.iter_mut().zip(probe.norm_weight).zip(probe.norm_bias) {
            *value = *value * scale * weight + bias;
        }
        let x = &*x;
        let mut z = probe.out_bias;
        let mut i = 0;
        while i < probe.down.rows() {
            let rows = [
                probe.down.row_near(i),
                probe.down.row_near(i + 1),
                probe.down.row_near(i + 2),
                probe.down.row_near(i + 3),
            ];
            let products = dots_wide(simd, rows, [x], []);
            let here = (probe.down.rows() - i).min(4);
            let mut hidden = [0.0; 4];
            for r in 0..here {
                hidden[r] = products[r][0] + probe.down_bias[i + r];
            }
            Activation::Gelu.apply(&mut hidden);
            for r in 0..here {
                z += hidden[r] * probe.out[i + r];
            }
            i += 4;
        }
        z
    }
}

#[inline(always)]
fn total(x: &[f32]) -> f32 {
    let (whole, rest) = x.as_chunks::<SUMS>();
    let mut sums = [0.0; SUMS];
    for part in whole {
        for i in 0..SUMS {
            sums[i] += part[i];
        }
    }
    added(&sums) + added(rest)
}

#[inline(always)]
fn total_of_squares(x: &[f32]) -> f32 {
    let (whole, rest) = x.as_chunks::<SUMS>();
    let mut sums = [0.0; SUMS];
    for part in whole {
        for i in 0..SUMS {
            sums[i] += part[i] * part[i];
        }
    }
    let mut last = 0.0;
    for value in rest {
        last += value * value;
    }
    added(&sums) + last
}

#[inline(always)]
fn added(values: &[f32]) -> f32 {
    let mut sum = 0.0;
    for value in values {
        sum += value;
    }
    sum
}
