//! The two inner loops: products of rows with inputs, and sums of rows.
//!
//! A product's bits do not depend on how many rows or inputs are computed at once, so that a row of a batch gets what it
//! would get alone: every product has one running sum per lane, and a sum of rows is one chain of multiply-adds in
//! the rows' order, in which a row with factor 0 changes nothing.

#![allow(unsafe_code)]

use crate::{arch::Simd, element::Element};

/// A multiple of the elements that any instruction set takes in one step: products of rows that are cut at such a place
/// have the bits of the whole rows' products if what was cut off is 0.
pub(crate) const STEP: usize = 64;

/// The inputs of a call: as they came, and as `f32`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a, T, const N: usize> {
    pub(crate) own: [&'a [T]; N],
    pub(crate) wide: [&'a [f32]; N],
}

/// `rows[r] . inputs[n]` for four rows; `ahead` are brought near on the way.
#[inline(always)]
pub(crate) fn four_dots<S: Simd, T: Element, const N: usize>(
    simd: S,
    rows: [&[T]; 4],
    inputs: &Inputs<'_, T, N>,
    ahead: [&[T]; 4],
) -> [[f32; N]; 4] {
    if 4 * N <= S::SUMS {
        return dots(simd, rows, inputs, ahead);
    }
    let [first, second] = [[rows[0], rows[1]], [rows[2], rows[3]]];
    let first = dots(simd, first, inputs, ahead);
    let second = dots(simd, second, inputs, []);
    [first[0], first[1], second[0], second[1]]
}

/// The same for any number of rows whose running sums fit the registers. Inputs that are `f32` alone have an empty `own`.
#[inline(always)]
pub(crate) fn dots<S: Simd, T: Element, const R: usize, const N: usize, const P: usize>(
    simd: S,
    rows: [&[T]; R],
    inputs: &Inputs<'_, T, N>,
    ahead: [&[T]; P],
) -> [[f32; N]; R] {
    if !inputs.own[0].is_empty() && T::as_bf16(rows[0]).is_some() {
        let (rows, own) = (rows.map(in_bf16), inputs.own.map(in_bf16));
        if let Some(products) = simd.dots_bf16(rows, own, ahead.map(in_bf16)) {
            return products;
        }
    }
    dots_wide(simd, rows, inputs.wide, ahead)
}

#[inline(always)]
fn in_bf16<T: Element>(elements: &[T]) -> &[half::bf16] {
    T::as_bf16(elements).unwrap_or_default()
}

/// The same with `f32` inputs, whatever the rows' type.
#[inline(always)]
pub(crate) fn dots_wide<S: Simd, T: Element, const R: usize, const N: usize, const P: usize>(
    simd: S,
    rows: [&[T]; R],
    inputs: [&[f32]; N],
    ahead: [&[T]; P],
) -> [[f32; N]; R] {
    let length = inputs[0].len();
    const { assert!(STEP.is_multiple_of(S::LANES)) };
    let whole = length / S::LANES * S::LANES;
    let rows = rows.map(|row| &row[..length]);
    let inputs = inputs.map(|x| &x[..length]);
    let mut sums = [[simd.splat(0.0); N]; R];
    let mut k = 0;
    while N == 1 && k + 2 * S::LANES <= whole {
        // SAFETY: k + 2 * LANES <= whole <= length, to which every row and input was cut above.
        unsafe { add_dots::<S, T, R, N, P, 2>(simd, rows, inputs, ahead, k, &mut sums) };
        k += 2 * S::LANES;
    }
    while k < whole {
        // SAFETY: the same for k + LANES.
        unsafe { add_dots::<S, T, R, N, P, 1>(simd, rows, inputs, ahead, k, &mut sums) };
        k += S::LANES;
    }
    let mut products = simd.totals(sums);
    if whole < length {
        for (row, products) in rows.iter().zip(&mut products) {
            for (input, product) in inputs.iter().zip(products) {
                let rest = row[whole..].iter().zip(&input[whole..]);
                *product += rest.map(|(w, x)| w.to_f32() * x).sum::<f32>();
            }
        }
    }
    products
}

/// Adds elements `k..k + LANES * V` of the products to the sums.
///
/// # Safety
///
/// Every row and input has these elements.
#[inline(always)]
unsafe fn add_dots<S: Simd, T: Element, const R: usize, const N: usize, const P: usize, const V: usize>(
    simd: S,
    rows: [&[T]; R],
    inputs: [&[f32]; N],
    ahead: [&[T]; P],
    k: usize,
    sums: &mut [[S::F32s; N]; R],
) {
    for row in ahead {
        for at in (0..V * S::LANES).step_by(64 / size_of::<T>()) {
            simd.prefetch(row, k + at);
        }
    }
    let mut loaded = [[simd.splat(0.0); V]; R];
    for r in 0..R {
        for v in 0..V {
            // SAFETY: the caller's.
            loaded[r][v] = unsafe { T::load(simd, rows[r], k + v * S::LANES) };
        }
    }
    for n in 0..N {
        for v in 0..V {
            // SAFETY: the caller's.
            let input = unsafe { simd.load(inputs[n], k + v * S::LANES) };
            for r in 0..R {
                sums[r][n] = simd.mul_add(loaded[r][v], input, sums[r][n]);
            }
        }
    }
}

/// `sums[n] += factors[r][n] * rows[r]`, r in order; `ahead` are brought near on the way.
#[inline(always)]
pub(crate) fn add_rows<S: Simd, T: Element, const R: usize, const N: usize, const P: usize>(
    simd: S,
    factors: [[f32; N]; R],
    rows: [&[T]; R],
    sums: &mut [&mut [f32]; N],
    ahead: [&[T]; P],
) {
    let length = sums[0].len();
    assert!(sums.iter().all(|sum| sum.len() == length));
    let whole = length / S::LANES * S::LANES;
    let rows = rows.map(|row| &row[..length]);
    let mut splats = [[simd.splat(0.0); N]; R];
    for r in 0..R {
        for n in 0..N {
            splats[r][n] = simd.splat(factors[r][n]);
        }
    }
    let mut k = 0;
    while k < whole {
        for row in ahead {
            simd.prefetch(row, k); // each line several times: a core whose queue of misses is full drops a request
        }
        // SAFETY: k + LANES <= whole <= length, to which every row was cut and which every sum has (asserted above).
        unsafe {
            let mut loaded = [simd.splat(0.0); R];
            for r in 0..R {
                loaded[r] = T::load(simd, rows[r], k);
            }
            for (n, sum) in sums.iter_mut().enumerate() {
                let mut total = simd.load(sum, k);
                for r in 0..R {
                    total = simd.mul_add(splats[r][n], loaded[r], total);
                }
                simd.store(total, sum, k);
            }
        }
        k += S::LANES;
    }
    for k in whole..length {
        for (n, sum) in sums.iter_mut().enumerate() {
            for r in 0..R {
                sum[k] += factors[r][n] * rows[r][k].to_f32();
            }
        }
    }
}
