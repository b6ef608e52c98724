//! The definitions in `f64`, each value with a bound of the error that `f32` arithmetic may make.
//!
//! A sum of n terms that is computed in `f32`, in any order, is off by at most about n roundings of the sum of the
//! terms' sizes. [`SPARE`] covers the few roundings around such a sum. Half types add the rounding of the result alone:
//! weights and inputs are exact in `f32`, and so are the products of two halves.

use sedac_kernels::Activation;

use crate::{
    case::Case,
    numbers::{Float, Strided},
};

/// Relative error of one `f32` rounding.
const ROUNDING: f64 = 1.0 / (1 << 24) as f64;
const SPARE: usize = 8;
/// Products of subnormal numbers may be lost: some instructions take them for 0.
const LOST: f64 = 1e-36;

/// A value and the largest error that a kernel may make.
pub(crate) type Value = (f64, f64);

/// A sum of terms, of which each is exact.
pub(crate) fn sum(terms: impl Iterator<Item = f64>) -> Value {
    let (mut total, mut size, mut count) = (0.0, 0.0, SPARE);
    for term in terms {
        total += term;
        size += term.abs();
        count += 1;
    }
    (total, count as f64 * ROUNDING * size + LOST)
}

pub(crate) fn add((a, ea): Value, b: f64) -> Value {
    (a + b, ea + ROUNDING * (a + b).abs())
}

pub(crate) fn multiply((a, ea): Value, (b, eb): Value) -> Value {
    (a * b, a.abs() * eb + b.abs() * ea + ea * eb + ROUNDING * (a * b).abs())
}

/// The error function: its Taylor series, or a continued fraction of what is missing to 1.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 2.5 {
        let (mut power, mut total) = (x, x);
        for n in 1..80 {
            power *= -x * x / f64::from(n);
            total += power / f64::from(2 * n + 1);
        }
        return total * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let fraction = (1..80).rev().fold(a, |below, k| a + 0.5 * f64::from(k) / below);
    (1.0 - (-a * a).exp() / fraction / std::f64::consts::PI.sqrt()).copysign(x)
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// The activation; its slope is at most 1.13, except where it is a square.
pub(crate) fn activate(activation: Activation, (z, error): Value) -> Value {
    let positive = if z < 0.0 { 0.0 } else { z };
    let value = match activation {
        Activation::Silu => z * sigmoid(z),
        Activation::Gelu => 0.5 * z * (1.0 + erf(z / std::f64::consts::SQRT_2)),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (z + 0.044_715 * z.powi(3));
            0.5 * z * (1.0 + inner.tanh())
        }
        Activation::QuickGelu => z * sigmoid(1.702 * z),
        Activation::Relu => positive,
        Activation::ReluSquared => positive * positive,
    };
    if activation == Activation::ReluSquared {
        return (value, 2.0 * (positive + error) * error + ROUNDING * value);
    }
    (value, 1.13 * error + 8.0 * ROUNDING * z.abs().max(1.0))
}

/// Importance of each unit for row n.
pub(crate) fn importances<T: Float>(case: &Case<T>, n: usize) -> Vec<Value> {
    let (f, d) = (case.spec.units, case.spec.hidden_size);
    let groups = d.div_ceil(64);
    let x: Vec<f32> = case.x[n * d..(n + 1) * d].iter().map(|v| v.to_f32()).collect();
    let broken = x.iter().any(|v| !v.is_finite());
    // Rounding to 8 bits is part of the definition, and it is in f32.
    let scale = x.iter().map(|v| v.abs()).fold(0.0, f32::max) / 127.0;
    let rounded = |i: usize| {
        let at_most_127 = if scale == 0.0 { x[i] } else { x[i] / scale };
        f64::from(at_most_127.round_ties_even().clamp(-127.0, 127.0))
    };
    let x8: Vec<f64> = (0..d).map(rounded).collect();
    let importance = |unit: usize| {
        if broken {
            return (f64::NAN, 0.0);
        }
        let (block, lane) = (unit / 16, unit % 16);
        let of_group = |g: usize| -> f64 {
            let bytes = &case.codes[(block * groups + g) * 512..][..512];
            let code = |i: usize| {
                let byte = bytes[i % 32 / 4 * 64 + lane * 4 + i % 4];
                f64::from(if i < 32 { byte & 15 } else { byte >> 4 }) - 8.0
            };
            let products = (0..64).filter(|i| g * 64 + i < d).map(|i| code(i) * x8[g * 64 + i]);
            products.sum::<f64>() * f64::from(case.scales[(block * groups + g) * 16 + lane].to_f32())
        };
        let mut z = multiply(sum((0..groups).map(of_group)), (f64::from(scale), 0.0));
        if let Some(bias) = &case.shadow_bias {
            z = add(z, f64::from(bias[unit]));
        }
        let (value, error) = activate(case.spec.activation, z);
        multiply((value.abs(), error), (f64::from(case.unit_norm[unit]), 0.0))
    };
    (0..f).map(importance).collect()
}

/// Whether a row uses a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Yes,
    No,
    /// Its importance is within rounding of the threshold: the definition lets it fall on either side.
    Either,
}

/// What a call must give for one row.
pub(crate) struct Expected {
    pub(crate) uses: Vec<Use>,
    /// Hidden value of each unit if it is used.
    pub(crate) hidden: Vec<Value>,
    pub(crate) y: Vec<Value>,
}

pub(crate) fn expected<T: Float>(case: &Case<T>, n: usize) -> Expected {
    let (f, d) = (case.spec.units, case.spec.hidden_size);
    let point = case.points[n];
    let least = f64::from(point.importance_min);
    let mut uses = vec![Use::Yes; f];
    if least > 0.0 {
        for (used, (importance, error)) in uses.iter_mut().zip(importances(case, n)) {
            if (importance - least).abs() <= error {
                *used = Use::Either;
            } else if importance < least {
                *used = Use::No;
            }
        }
    }
    uses.iter_mut().skip(point.width).for_each(|used| *used = Use::No);
    let x = &case.x[n * d..(n + 1) * d];
    let product = |weight: &Strided<T>, bias: &Option<Vec<T>>, unit: usize| {
        let z = sum(x.iter().enumerate().map(|(i, x)| weight.at(unit, i) * x.exact()));
        add(z, bias.as_ref().map_or(0.0, |bias| bias[unit].exact()))
    };
    let hidden = (0..f).map(|unit| {
        let up = product(&case.up, &case.up_bias, unit);
        match &case.gate {
            Some(gate) => {
                let z = product(gate, &case.gate_bias, unit);
                multiply(activate(case.spec.activation, z), up)
            }
            None => activate(case.spec.activation, up),
        }
    });
    let hidden: Vec<_> = hidden.collect();
    let units_of = |which| (0..f).filter(|&unit| uses[unit] == which).collect::<Vec<_>>();
    let (sure, open) = (units_of(Use::Yes), units_of(Use::Either));
    let y = (0..d).map(|i| {
        let down = |unit: usize| {
            if case.spec.down_by_columns {
                case.down.at(unit, i)
            } else {
                case.down.at(i, unit)
            }
        };
        let mut y = sum(sure.iter().map(|&unit| hidden[unit].0 * down(unit)));
        y.1 += sure.iter().map(|&unit| hidden[unit].1 * down(unit).abs()).sum::<f64>();
        y.1 +=
            open.iter().map(|&unit| (hidden[unit].0.abs() + hidden[unit].1) * down(unit).abs()).sum::<f64>();
        let bias = case.down_bias.as_ref().map_or(0.0, |bias| bias[i].exact());
        rounded::<T>(add(y, bias))
    });
    let y = y.collect();
    Expected { uses, hidden, y }
}

/// After rounding to T.
pub(crate) fn rounded<T: Float>((value, error): Value) -> Value {
    (value, error + T::ROUNDING * (value.abs() + error) + T::SMALLEST)
}

/// Whether a kernel's value is right; where the definition gives no number, neither may the kernel.
pub(crate) fn is_right(got: f64, (value, error): Value) -> bool {
    if value.is_nan() {
        return got.is_nan();
    }
    (got - value).abs() <= error
}
