//! The output as a sum of down's columns, each times its unit's hidden value.

use crate::{
    arch::{Kernel, Simd},
    element::Element,
    hidden::{four_units, one_unit, rows_of, store, upcoming},
    matrix::Matrix,
    products::{add_rows, Inputs},
    site::{Ffn, Need},
};

/// Fours of units whose hidden values are computed before the first of their columns is read. A core has fewer places of
/// memory to read at a time then: on an AMD EPYC (Zen 5) a whole FFN in bf16 takes 5 to 9% less time than with each four's
/// columns right after its hidden values, and one with a third of its units 2 to 8% (two builds in turn, by hand).
const TURN: usize = 64;

/// Adds what `units` contribute to `sums[n]`; writes their hidden values to `hidden[n][unit - first]` if asked to.
pub(crate) struct AddUnits<'a, 'b, T, const N: usize> {
    pub(crate) weights: &'a Ffn<'a, T>,
    pub(crate) down: Matrix<'a, T>,
    pub(crate) inputs: Inputs<'a, T, N>,
    pub(crate) units: &'a [Need],
    pub(crate) next: &'a [Need],
    pub(crate) sums: [&'a mut [f32]; N],
    pub(crate) first: usize,
    pub(crate) hidden: Option<&'a mut [&'b mut [f32]; N]>,
}

impl<T: Element, const N: usize> Kernel for AddUnits<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { weights, down, inputs, units, next, mut sums, first, mut hidden } = self;
        let (fours, rest) = units.as_chunks::<4>();
        let columns = |four: &[Need; 4]| four.map(|(unit, _)| down.row(unit as usize));
        let mut kept = [[[0.0; N]; 4]; TURN];
        for (i, turn) in fours.chunks(TURN).enumerate() {
            for (j, (four, values)) in turn.iter().zip(&mut kept).enumerate() {
                let later = upcoming(units, next, 4 * (i * TURN + j) + 4);
                let near = if j + 1 < turn.len() { rows_of(weights, later) } else { columns(&turn[0]) };
                *values = four_units(simd, weights, &inputs, *four, near);
            }
            for (j, (four, values)) in turn.iter().zip(&kept).enumerate() {
                let ahead = if let Some(four) = turn.get(j + 1) {
                    columns(four)
                } else {
                    rows_of(weights, upcoming(units, next, 4 * (i * TURN + j) + 4))
                };
                add_rows(simd, *values, columns(four), &mut sums, ahead);
                if let Some(hidden) = hidden.as_deref_mut() {
                    store(*values, *four, first, hidden);
                }
            }
        }
        for &need in rest {
            let values = [one_unit(simd, weights, &inputs, need)];
            add_rows(simd, values, [down.row(need.0 as usize)], &mut sums, []);
            if let Some(hidden) = hidden.as_deref_mut() {
                store(values, [need], first, hidden);
            }
        }
    }
}

/// `outputs[n][i] = bias[from + i] + sum over parts`, in the parts' order; a part is `[N][length]`.
pub(crate) struct SumParts<'a, 'b, T, const N: usize> {
    pub(crate) parts: &'a [f32],
    pub(crate) bias: Option<&'a [T]>,
    pub(crate) length: usize,
    pub(crate) from: usize,
    pub(crate) outputs: &'a mut [&'b mut [T]; N],
}

impl<T: Element, const N: usize> Kernel for SumParts<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        const PIECE: usize = 64;
        let Self { parts, bias, length, from, outputs } = self;
        for (n, output) in outputs.iter_mut().enumerate() {
            for (piece, output) in output.chunks_mut(PIECE).enumerate() {
                let at = from + piece * PIECE;
                let mut totals = [0.0f32; PIECE];
                for part in parts.chunks_exact(N * length) {
                    let part = &part[n * length + at..][..output.len()];
                    for (total, value) in totals.iter_mut().zip(part) {
                        *total += value;
                    }
                }
                for (i, (output, total)) in output.iter_mut().zip(totals).enumerate() {
                    *output = T::from_f32(total + bias.map_or(0.0, |bias| bias[at + i].to_f32()));
                }
            }
        }
    }
}
