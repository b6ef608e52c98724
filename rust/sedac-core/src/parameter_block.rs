//! The law in whole numbers: what a device needs to run it, computed from a cascade and its thresholds.
//!
//! A captured graph cannot ask the host for a level, and two devices do not round a division or a tanh alike. So the
//! device runs this *twin* of the law: the risk is quantised once, by a multiplication with a power of two and a
//! floor, which are exact on every device; all that follows is integer arithmetic. [`ParameterBlock`]'s
//! methods are its oracle.
//!
//! # The numbers
//!
//! Confidence is kept as a whole number of [`unit`](ParameterBlock::unit)s `2^-F`, a risk as a whole number of *steps*
//! `2^-s`, with a scale of its own at each checkpoint. With `d = threshold - (q << 16)`, at each checkpoint
//!
//! ```text
//! C = (C * decay + d * factor) >> 30       decay = gamma * 2^30, factor = w / (tau * 2^s) * 2^(F + 14)
//! ```
//!
//! in 64 bits; the shift rounds down, once. `threshold` is `tau` in steps with 16 bits more. Levels come from comparing
//! C with the cut points, rounded up to units: a tie exits, as in the law.
//!
//! # The range of a risk
//!
//! A risk has 15 bits. The range is as wide as it must be for a risk above it to settle the rest of the pass: C is then
//! below everything that counts, at this checkpoint and the later ones, whatever else the pass brings. Such a token is
//! *sunk*: it does not exit any more (with gamma 0: not at this checkpoint). Where that would need a range so wide that
//! the steps became coarse (a small gamma reaches far), the range ends earlier, and a sunk token may keep more than the
//! law asks, never less. The same holds where the law's floor of -1e6 on a confidence comes into play: the twin has none.
//!
//! # Distance from the float law
//!
//! Two cascades whose C differ by at most [`distance`](ParameterBlock::distance) give the same level unless C lies that
//! near a cut point or target. The greatest part of it is the step of the risk: `w / tau * 2^-s`, 0.0001 with the
//! design's defaults.

use crate::{
    config::CascadeConfig,
    resolution::{distance, drops, lowest, power_of_two, size, step_exponent, unit_bits, RISK_BEYOND},
};

/// What a NaN or infinite risk is quantised to.
pub const RISK_UNUSABLE: i16 = -1;

/// State of a token that had an unusable risk in this pass: full width to the end.
pub const STATE_FAILED: i32 = i32::MIN;

/// State of a token that had a risk beyond the range: below every confidence.
pub const STATE_SUNK: i32 = i32::MIN + 1;

/// State of a token that a hard exit has latched.
pub const STATE_LATCHED: i32 = i32::MAX;

/// Bits of the decay and of the products below the unit.
pub(crate) const PRODUCT_BITS: u32 = 30;
/// Bits of a threshold below the step of the risk.
pub(crate) const THRESHOLD_BITS: u32 = 16;

/// One checkpoint of the twin; the module's page says what the numbers stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointParameters {
    /// s: a quantised risk counts steps of `2^-s`.
    pub step_exponent: i32,
    /// tau in steps, times 2^16.
    pub threshold: i64,
    /// Units of C per step, times 2^14; 0 where the weight is 0.
    pub factor: i64,
    /// Quantised risk from which a token sinks; above every quantised risk where the weight is 0.
    pub sinks_from: i64,
    /// C from which the token exits, in units.
    pub target: i64,
}

/// The law of one controller at one moment, in whole numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterBlock {
    pub(crate) checkpoints: Vec<CheckpointParameters>,
    pub(crate) decay: i64,
    pub(crate) soft_exit: bool,
    pub(crate) cut_points: Vec<i64>,
    unit_bits: i32,
    distance: Vec<f64>,
}

impl ParameterBlock {
    pub(crate) fn new(config: &CascadeConfig, thresholds: &[f32]) -> Self {
        let gamma = f64::from(config.confidence_decay());
        let weights: Vec<f64> = config.layers().iter().map(|l| f64::from(l.confidence_weight)).collect();
        let thresholds: Vec<f64> = thresholds.iter().copied().map(f64::from).collect();
        let step_exponents: Vec<i32> =
            drops(config, gamma, &weights).iter().zip(&weights).zip(&thresholds).map(step_exponent).collect();

        // No confidence of a token that has not sunk is further from 0 than the sum of these.
        let depth = |i: usize| {
            weights[i] * (f64::from(RISK_BEYOND) * size(step_exponents[i]) / thresholds[i]).max(1.0)
        };
        let depths: Vec<f64> = (0..weights.len()).map(depth).collect();
        let unit_bits = unit_bits(depths.iter().sum());
        let units = power_of_two(unit_bits);

        let lowest = lowest(&weights);
        let checkpoint = |i: usize| {
            let target = f64::from(config.layers()[i].target_exit_rate);
            let steps = thresholds[i] / size(step_exponents[i]);
            CheckpointParameters {
                step_exponent: step_exponents[i],
                threshold: (steps * f64::from(1 << THRESHOLD_BITS)).round() as i64,
                factor: (weights[i] / steps * units * f64::from(1 << (PRODUCT_BITS - THRESHOLD_BITS))).round()
                    as i64,
                sinks_from: i64::from(RISK_BEYOND) + i64::from(weights[i] == 0.0),
                // A target that the law reaches with the largest of risks holds for sunk tokens too.
                target: if target <= lowest { i64::from(STATE_SUNK) } else { in_units(target, units) },
            }
        };
        let hard_cut = if config.soft_exit() { None } else { Some(i64::from(STATE_FAILED)) };
        let cut = |&cut: &f32| hard_cut.unwrap_or_else(|| in_units(f64::from(cut), units));
        Self {
            checkpoints: (0..weights.len()).map(checkpoint).collect(),
            decay: (gamma * f64::from(1 << PRODUCT_BITS)).round() as i64,
            soft_exit: config.soft_exit(),
            cut_points: config.keep_levels().cut_points().iter().map(cut).collect(),
            unit_bits,
            distance: distance(gamma, &weights, &thresholds, &step_exponents, &depths, unit_bits),
        }
    }

    /// The checkpoints, in layer order.
    #[must_use]
    pub fn checkpoints(&self) -> &[CheckpointParameters] {
        &self.checkpoints
    }

    /// `gamma * 2^30`.
    #[must_use]
    pub fn decay(&self) -> i64 {
        self.decay
    }

    /// Whether exits are graded; otherwise they latch.
    #[must_use]
    pub fn soft_exit(&self) -> bool {
        self.soft_exit
    }

    /// `cut_points()[m]`: C in units from which an exit reaches level `m`. Never for level 0 of a soft exit; always
    /// for a hard exit, which goes to level 0.
    #[must_use]
    pub fn cut_points(&self) -> &[i64] {
        &self.cut_points
    }

    /// The block as a table for a device, one row per checkpoint: threshold, factor, `sinks_from`, target, decay,
    /// whether exits latch (1 or 0), and the cut points from level 0 up. The step exponents are not among them: a
    /// device multiplies by [`risk_scale`](Self::risk_scale).
    #[must_use]
    pub fn table(&self) -> Vec<i64> {
        let row = |checkpoint: &CheckpointParameters| {
            let CheckpointParameters { threshold, factor, sinks_from, target, .. } = *checkpoint;
            let shared = [self.decay, i64::from(!self.soft_exit)];
            let cut_points = self.cut_points.iter().copied();
            [threshold, factor, sinks_from, target].into_iter().chain(shared).chain(cut_points)
        };
        self.checkpoints.iter().flat_map(row).collect()
    }

    /// `2^s` of each checkpoint: a risk times this, rounded down, is its number of steps.
    #[must_use]
    pub fn risk_scale(&self) -> Vec<f32> {
        self.checkpoints.iter().map(|checkpoint| power_of_two(checkpoint.step_exponent) as f32).collect()
    }

    /// What one unit of C stands for.
    #[must_use]
    pub fn unit(&self) -> f64 {
        size(self.unit_bits)
    }

    /// The full level.
    #[must_use]
    pub fn n_levels(&self) -> u8 {
        self.cut_points.len() as u8
    }

    /// Per checkpoint: C of a token that has not sunk is at most this far from the float law's C.
    #[must_use]
    pub fn distance(&self) -> &[f64] {
        &self.distance
    }
}

/// Units, rounded up; what no token reaches, or every one that has not sunk, ends beside the sentinels.
fn in_units(confidence: f64, units: f64) -> i64 {
    (confidence * units).ceil().clamp(f64::from(STATE_SUNK + 1), f64::from(STATE_LATCHED)) as i64
}
