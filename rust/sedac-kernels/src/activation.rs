//! Activations, in plain `f32` arithmetic without branches, so that loops over them run in vector registers.

use std::str::FromStr;

use crate::Error;

/// The activation of an FFN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `z * sigmoid(z)`.
    Silu,
    /// `z * Phi(z)`, by the error function.
    Gelu,
    /// GELU in its tanh form.
    GeluTanh,
    /// `z * sigmoid(1.702 z)`.
    QuickGelu,
    /// `max(z, 0)`.
    Relu,
    /// `max(z, 0)^2`.
    ReluSquared,
}

impl Activation {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Self); 6] = [
        ("silu", Self::Silu),
        ("gelu", Self::Gelu),
        ("gelu_tanh", Self::GeluTanh),
        ("quick_gelu", Self::QuickGelu),
        ("relu", Self::Relu),
        ("relu_squared", Self::ReluSquared),
    ];

    /// The activation of each value, in place.
    #[inline(always)]
    pub(crate) fn apply(self, values: &mut [f32]) {
        match self {
            Self::Silu => each(values, silu),
            Self::Gelu => each(values, gelu),
            Self::GeluTanh => each(values, gelu_tanh),
            Self::QuickGelu => each(values, |z| z * sigmoid(1.702 * z)),
            Self::Relu => each(values, relu),
            Self::ReluSquared => each(values, |z| relu(z) * relu(z)),
        }
    }
}

impl FromStr for Activation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, activation)| *activation).ok_or_else(|| Error::Activation(name.to_owned()))
    }
}

#[inline(always)]
fn each(values: &mut [f32], function: impl Fn(f32) -> f32) {
    for value in values {
        *value = function(*value);
    }
}

/// 1.5 * 2^23: adding it rounds a small number to an integer, ties to even, which the low bits then hold.
pub(crate) const ROUNDER: f32 = 12_582_912.0;

/// A number stays a number: unlike `f32::max`, a NaN is passed on.
#[inline(always)]
fn relu(z: f32) -> f32 {
    if z < 0.0 {
        0.0
    } else {
        z
    }
}

/// `e^x`, relative error 2e-7, for x in -87..=88; clipped outside.
///
/// Cody-Waite reduction and a polynomial of degree 6 (Moshier, Cephes library, `expf`).
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    (p * r * r + r + 1.0) * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

#[inline(always)]
fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}

#[inline(always)]
fn silu(z: f32) -> f32 {
    z / (1.0 + exp(-z))
}

#[inline(always)]
fn gelu_tanh(z: f32) -> f32 {
    // 0.5 (1 + tanh(u)) = sigmoid(2u)
    z * sigmoid(1.595_769 * (z + 0.044_715 * z * z * z))
}

#[inline(always)]
fn gelu(z: f32) -> f32 {
    0.5 * z * (1.0 + erf(z * std::f32::consts::FRAC_1_SQRT_2))
}

/// The error function by a rational minimax approximation on -4..=4, beyond which it is 1 in `f32`.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let mut p = -2.726_142_4e-10;
    for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906_5e-4, -2.954_6e-3, -1.609_603_3e-2] {
        p = p * s + c;
    }
    let mut q = -1.456_607_2e-5;
    for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2] {
        q = q * s + c;
    }
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;

    fn largest_error(activation: Activation, exact: impl Fn(f64) -> f64) -> f64 {
        let grid = (-4000..=4000).map(|i| i as f32 * 0.005);
        grid.map(|z| {
            let mut got = [z];
            activation.apply(&mut got);
            (f64::from(got[0]) - exact(f64::from(z))).abs() / f64::from(z.abs().max(1.0))
        })
        .fold(0.0, f64::max)
    }

    fn sigmoid64(z: f64) -> f64 {
        1.0 / (1.0 + (-z).exp())
    }

    #[test]
    fn activations_are_right_to_a_few_roundings() {
        assert!(largest_error(Activation::Silu, |z| z * sigmoid64(z)) < 3e-7);
        assert!(largest_error(Activation::QuickGelu, |z| z * sigmoid64(1.702 * z)) < 3e-7);
        let tanh_form = |z: f64| z * sigmoid64(2.0 * 0.797_884_560_802_865_4 * (z + 0.044_715 * z * z * z));
        assert!(largest_error(Activation::GeluTanh, tanh_form) < 4e-7);
        assert!(largest_error(Activation::Relu, |z| z.max(0.0)) == 0.0);
        assert!(largest_error(Activation::ReluSquared, |z| z.max(0.0).powi(2)) < 2e-6);
        assert!(largest_error(Activation::Gelu, |z| 0.5 * z * (1.0 + erf64(z / 2f64.sqrt()))) < 4e-7);
    }

    /// The error function by its Taylor series, or its continued fraction where that converges faster.
    fn erf64(x: f64) -> f64 {
        if x.abs() < 3.0 {
            let (mut term, mut sum) = (x, x);
            for n in 1..100 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            return sum * 2.0 / std::f64::consts::PI.sqrt();
        }
        let a = x.abs();
        let fraction = (1..60).rev().fold(a, |below, k| a + f64::from(k) / 2.0 / below);
        let tail = (-a * a).exp() / fraction / std::f64::consts::PI.sqrt();
        x.signum() * (1.0 - tail)
    }

    #[test]
    fn no_number_stays_no_number() {
        for (name, activation) in Activation::ALL {
            let mut value = [f32::NAN];
            activation.apply(&mut value);
            assert!(value[0].is_nan(), "{name}");
        }
    }
}
