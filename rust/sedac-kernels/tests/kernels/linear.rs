//! The linear map: what it computes, and on what its bits do not depend.

use half::{bf16, f16};
use proptest::{collection::vec, prelude::*};
use sedac_kernels::{linear, read, read_rows, Isa, Matrix, Serial, Team, MAX_ROWS};

use crate::{
    numbers::{Float, Random, Strided},
    reference::{add, is_right, rounded, sum},
    teams::teams,
};

#[derive(Clone, Debug)]
struct Spec {
    outputs: usize,
    inputs: usize,
    gap: usize,
    bias: bool,
    rows: usize,
    seed: u64,
}

struct Case<T> {
    rows: usize,
    weight: Strided<T>,
    bias: Option<Vec<T>>,
    x: Vec<T>,
}

impl<T: Float> Case<T> {
    fn of(spec: &Spec) -> Self {
        let mut random = Random(spec.seed);
        let weight = Strided::random(spec.outputs, spec.inputs, spec.gap, 0.3, &mut random);
        let bias = spec.bias.then(|| random.values(spec.outputs, 0.5));
        Self { rows: spec.rows, weight, bias, x: random.values(spec.rows * spec.inputs, 1.5) }
    }

    fn run(&self, isa: Isa, team: &dyn Team, rows: std::ops::Range<usize>) -> Vec<T> {
        let mut y = vec![T::from_f32(f32::NAN); rows.len() * self.weight.rows];
        let x = &self.x[rows.start * self.weight.columns..rows.end * self.weight.columns];
        linear(isa, team, self.weight.matrix(), self.bias.as_deref(), x, &mut y, rows.len()).expect("fits");
        y
    }
}

fn spec() -> impl Strategy<Value = Spec> {
    let gap = prop_oneof![Just(0_usize), 1_usize..40];
    (0_usize..200, 0_usize..300, gap, any::<bool>(), 1..=MAX_ROWS, any::<u64>())
        .prop_map(|(outputs, inputs, gap, bias, rows, seed)| Spec { outputs, inputs, gap, bias, rows, seed })
}

fn agrees<T: Float>(spec: &Spec) -> Result<(), TestCaseError> {
    let case = Case::<T>::of(spec);
    let (outputs, inputs) = (spec.outputs, spec.inputs);
    for isa in Isa::available() {
        let y = case.run(isa, &Serial, 0..case.rows);
        for (at, y) in y.iter().enumerate() {
            let (n, i) = (at / outputs, at % outputs);
            let product = sum((0..inputs).map(|k| case.weight.at(i, k) * case.x[n * inputs + k].exact()));
            let wanted = add(product, case.bias.as_ref().map_or(0.0, |bias| bias[i].exact()));
            let right = is_right(y.exact(), rounded::<T>(wanted));
            prop_assert!(right, "{}: y[{n}][{i}] is {:e}, not {wanted:?}", isa.name(), y.exact());
        }
        let bits = |y: &[T]| y.iter().map(|value| value.bits()).collect::<Vec<_>>();
        let wanted = bits(&y);
        for team in teams() {
            prop_assert_eq!(&wanted, &bits(&case.run(isa, team.as_ref(), 0..case.rows)));
        }
        for n in 0..case.rows {
            let alone = bits(&case.run(isa, &Serial, n..n + 1));
            prop_assert_eq!(&wanted[n * outputs..(n + 1) * outputs], &alone);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_linear_map_is_what_its_definition_says_whoever_runs_it(spec in spec()) {
        agrees::<f32>(&spec)?;
        agrees::<bf16>(&spec)?;
        agrees::<f16>(&spec)?;
    }

    #[test]
    fn reading_reads_all(length in 0_usize..1000, seed in any::<u64>()) {
        let data: Vec<f32> = Random(seed).values(length, 1.0);
        let total = sum(data.iter().map(|&value| f64::from(value)));
        for isa in Isa::available() {
            prop_assert!(is_right(f64::from(read(isa, &Serial, &data)), total), "{}", isa.name());
        }
    }

    #[test]
    fn reading_rows_reads_those_rows_and_no_other(
        (length, gap) in (0_usize..200, 0_usize..3),
        rows in vec(0_u32..9, 0..20),
        seed in any::<u64>(),
    ) {
        let stride = length + gap;
        let first: Vec<f32> = Random(seed).values(9 * stride, 1.0);
        let second: Vec<f32> = Random(seed ^ 1).values(9 * stride, 1.0);
        let matrices = [&first, &second].map(|data| Matrix::new(data, 9, length, stride).expect("it fits"));
        let values = rows.iter().flat_map(|&row| matrices.iter().flat_map(move |matrix| matrix.row(row as usize)));
        let total = sum(values.map(|&value| f64::from(value)));
        for isa in Isa::available() {
            // Of several tasks the sum of one is returned; a row is one task.
            let sums = rows.iter().map(|&row| f64::from(read_rows(isa, &Serial, &matrices, &[row])));
            prop_assert!(is_right(sums.sum(), total), "{}", isa.name());
        }
    }
}
