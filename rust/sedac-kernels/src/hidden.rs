//! Hidden values of single units: gate's and up's rows against the inputs.

use crate::{
    arch::{Kernel, Simd},
    element::Element,
    products::{dots, four_dots, Inputs},
    site::{Ffn, Need},
};

/// Hidden values of `units`, written to `hidden[n][unit - first]`.
pub(crate) struct Hide<'a, 'b, T, const N: usize> {
    pub(crate) weights: &'a Ffn<'a, T>,
    pub(crate) inputs: Inputs<'a, T, N>,
    pub(crate) units: &'a [Need],
    pub(crate) next: &'a [Need],
    pub(crate) first: usize,
    pub(crate) hidden: &'a mut [&'b mut [f32]; N],
}

impl<T: Element, const N: usize> Kernel for Hide<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { weights, inputs, units, next, first, hidden } = self;
        let mut fours = units.chunks_exact(4);
        for (i, four) in fours.by_ref().enumerate() {
            let later = upcoming(units, next, 4 * i + 4);
            let four = [four[0], four[1], four[2], four[3]];
            store(four_units(simd, weights, &inputs, four, rows_of(weights, later)), four, first, hidden);
        }
        for &need in fours.remainder() {
            store([one_unit(simd, weights, &inputs, need)], [need], first, hidden);
        }
    }
}

/// Puts the values of some units where they belong.
#[inline(always)]
pub(crate) fn store<const R: usize, const N: usize>(
    values: [[f32; N]; R],
    units: [Need; R],
    first: usize,
    hidden: &mut [&mut [f32]; N],
) {
    for (values, (unit, _)) in values.iter().zip(units) {
        for (n, value) in values.iter().enumerate() {
            hidden[n][unit as usize - first] = *value;
        }
    }
}

/// The two units that come at `at` and after, of this block and the next; the last one again where there is none.
#[inline(always)]
pub(crate) fn upcoming(units: &[Need], next: &[Need], at: usize) -> [usize; 2] {
    let last = units.last().map_or(0, |need| need.0 as usize);
    std::array::from_fn(|i| {
        let need = units.get(at + i).or_else(|| next.get((at + i).wrapping_sub(units.len())));
        need.map_or(last, |need| need.0 as usize)
    })
}

/// Gate's and up's rows of two units; without a gate, up's rows twice.
#[inline(always)]
pub(crate) fn rows_of<'a, T: Copy>(weights: &Ffn<'a, T>, [a, b]: [usize; 2]) -> [&'a [T]; 4] {
    let gate = weights.gate.as_ref().unwrap_or(&weights.up);
    [gate.row_near(a), weights.up.row_near(a), gate.row_near(b), weights.up.row_near(b)]
}

/// Hidden values of four units `[unit][row]`; `near` are brought near meanwhile.
#[inline(always)]
pub(crate) fn four_units<S: Simd, T: Element, const N: usize>(
    simd: S,
    weights: &Ffn<'_, T>,
    inputs: &Inputs<'_, T, N>,
    needs: [Need; 4],
    near: [&[T]; 4],
) -> [[f32; N]; 4] {
    let [a, b, c, d] = needs.map(|need| need.0 as usize);
    let up = |unit: usize| weights.up.row(unit);
    let Some(gate) = weights.gate else {
        let z = four_dots(simd, [up(a), up(b), up(c), up(d)], inputs, near);
        let mut values = [[0.0; N]; 4];
        for i in 0..4 {
            values[i] = finish(weights, needs[i], None, z[i]);
        }
        return values;
    };
    let gate = |unit: usize| gate.row(unit);
    // The second pair's rows are read next, so they come first; the caller's come after.
    let later = [gate(c), up(c), gate(d), up(d)];
    let first = four_dots(simd, [gate(a), up(a), gate(b), up(b)], inputs, later);
    let second = four_dots(simd, later, inputs, near);
    [
        finish(weights, needs[0], Some(first[0]), first[1]),
        finish(weights, needs[1], Some(first[2]), first[3]),
        finish(weights, needs[2], Some(second[0]), second[1]),
        finish(weights, needs[3], Some(second[2]), second[3]),
    ]
}

/// Hidden value of one unit for each row.
#[inline(always)]
pub(crate) fn one_unit<S: Simd, T: Element, const N: usize>(
    simd: S,
    weights: &Ffn<'_, T>,
    inputs: &Inputs<'_, T, N>,
    need: Need,
) -> [f32; N] {
    let unit = need.0 as usize;
    if let Some(gate) = weights.gate {
        let [g, u] = dots(simd, [gate.row(unit), weights.up.row(unit)], inputs, []);
        return finish(weights, need, Some(g), u);
    }
    let [u] = dots(simd, [weights.up.row(unit)], inputs, []);
    finish(weights, need, None, u)
}

/// Biases, activation and product; 0 for the rows that do not need the unit.
#[inline(always)]
fn finish<T: Element, const N: usize>(
    weights: &Ffn<'_, T>,
    (unit, rows): Need,
    gate: Option<[f32; N]>,
    mut up: [f32; N],
) -> [f32; N] {
    let bias_of = |bias: Option<&[T]>| bias.map_or(0.0, |bias| bias[unit as usize].to_f32());
    let up_bias = bias_of(weights.up_bias);
    up = up.map(|z| z + up_bias);
    if let Some(mut gate) = gate {
        let gate_bias = bias_of(weights.gate_bias);
        gate = gate.map(|z| z + gate_bias);
        weights.activation.apply(&mut gate);
        up.iter_mut().zip(gate).for_each(|(u, g)| *u *= g);
    } else {
        weights.activation.apply(&mut up);
    }
    for (n, value) in up.iter_mut().enumerate() {
        if rows >> n & 1 == 0 {
            *value = 0.0;
        }
    }
    up
}
