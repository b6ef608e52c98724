//! How finely the law in whole numbers counts: ranges and steps of the risks, units of C, and what that costs.
//!
//! Everything here is f64 arithmetic on a cascade's numbers, done once per [`ParameterBlock`](crate::ParameterBlock).

use crate::{accumulator::CONFIDENCE_FLOOR, config::CascadeConfig};

/// Bits of a quantised risk.
pub const RISK_BITS: u32 = 15;

/// A quantised risk that is at or above the end of the range.
pub const RISK_BEYOND: i16 = i16::MAX;

/// Confidences stay within plus and minus 2^30 units, so that products stay within 2^61.
const STATE_BITS: i32 = 30;
/// float32's own resolution near 1: finer units would say nothing.
const MOST_UNIT_BITS: i32 = 24;
/// A range need not lower C by more than this, or by four times the highest C where that is more.
const DEEPEST_DROP: f64 = 16.0;

/// The size of a step or unit of so many bits.
pub(crate) fn size(bits: i32) -> f64 {
    power_of_two(-bits)
}

/// `2^exponent`, a normal number; put together from bits, because a library's exp2 need not be exact everywhere.
pub(crate) fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(u64::from((exponent + 1023).unsigned_abs()) << 52)
}

/// The law's C is never below this, whatever the risks.
pub(crate) fn lowest(weights: &[f64]) -> f64 {
    f64::from(CONFIDENCE_FLOOR) * weights.iter().sum::<f64>()
}

/// How far a risk at the end of each checkpoint's range must at least lower C.
pub(crate) fn drops(config: &CascadeConfig, gamma: f64, weights: &[f64]) -> Vec<f64> {
    let highest: Vec<f64> = weights
        .iter()
        .scan(0.0, |c, w| {
            *c = gamma * *c + w;
            Some(*c)
        })
        .collect();
    let least_cut = f64::from(*config.keep_levels().cut_points().last().expect("two levels or more"));
    let counts_from = |j: usize| {
        match f64::from(config.layers()[j].target_exit_rate) {
            target if config.soft_exit() => target.max(least_cut),
            target if target <= lowest(weights) => f64::INFINITY, // every usable risk exits: C does not matter
            target => target,
        }
    };
    let deepest = DEEPEST_DROP.max(4.0 * highest.iter().copied().fold(0.0, f64::max));
    (0..weights.len())
        .map(|i| {
            let mut carried = 1.0;
            let mut drop = 1.9 * weights[i]; // for the log: threshold updates follow risks up to 1.9 thresholds
            for (j, highest) in highest.iter().enumerate().skip(i) {
                if carried > 0.0 {
                    drop = drop.max((highest - counts_from(j)) / carried);
                }
                carried *= gamma;
            }
            drop.min(deepest)
        })
        .collect()
}

/// The finest step with which 15 bits reach the risk that lowers C by `drop`.
pub(crate) fn step_exponent(((drop, weight), threshold): ((&f64, &f64), &f64)) -> i32 {
    // A weight of 0 makes no use of its risk; the log does.
    let range = if *weight > 0.0 { threshold * (drop / weight) } else { 4.0 * threshold };
    // The exponent of a normal f64 is the floor of its logarithm, without a rounding.
    let exponent = |x: f64| (x.to_bits() >> 52) as i32 - 1023;
    exponent(f64::from(RISK_BEYOND) / range).clamp(-126, 126)
}

pub(crate) fn unit_bits(depth: f64) -> i32 {
    let fits = |bits: i32| depth * power_of_two(bits) <= power_of_two(STATE_BITS);
    (-STATE_BITS..=MOST_UNIT_BITS).rev().find(|&bits| fits(bits)).unwrap_or(-STATE_BITS)
}

/// Per checkpoint, by induction over the law's `C = gamma * C + w * conf`.
pub(crate) fn distance(
    gamma: f64,
    weights: &[f64],
    thresholds: &[f64],
    step_exponents: &[i32],
    depths: &[f64],
    unit_bits: i32,
) -> Vec<f64> {
    let (mut far, mut depth) = (0.0, 0.0);
    (0..weights.len())
        .map(|i| {
            depth += depths[i];
            // The floor of the risk, and the rounding of the threshold.
            let risk = weights[i] / thresholds[i] * size(step_exponents[i]) * (1.0 + power_of_two(-17));
            // The shift's floor; `factor` off by half, times |d| < 2^31; `decay` off by half, times |C| <= 2^30 units.
            let rounding = 2.5 * size(unit_bits);
            // What float32 itself loses: four roundings of numbers no larger than twice the depth.
            let float = 8.0 * power_of_two(-24) * depth;
            far = gamma * far + risk + rounding + float;
            far
        })
        .collect()
}
