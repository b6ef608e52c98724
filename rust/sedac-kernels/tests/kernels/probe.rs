//! The probe: what it computes, a row at a time.

use half::{bf16, f16};
use proptest::prelude::*;
use sedac_kernels::{risks, Error, Isa, Matrix, Probe, MAX_ROWS};

use crate::numbers::{Float, Random};

struct Case<T> {
    d: usize,
    rank: usize,
    norm_weight: Vec<f32>,
    norm_bias: Vec<f32>,
    down: Vec<f32>,
    down_bias: Vec<f32>,
    out: Vec<f32>,
    out_bias: f32,
    x: Vec<T>,
}

const EPS: f32 = 1e-5;

impl<T: Float> Case<T> {
    fn of(d: usize, rank: usize, rows: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        Self {
            d,
            rank,
            norm_weight: random.values(d, 1.5),
            norm_bias: random.values(d, 0.5),
            down: random.values(rank * d, 0.3),
            down_bias: random.values(rank, 0.5),
            out: random.values(rank, 0.7),
            out_bias: random.uniform(),
            x: random.values(rows * d, 3.0),
        }
    }

    fn run(&self, isa: Isa, rows: std::ops::Range<usize>) -> Vec<f32> {
        let probe = Probe {
            norm_weight: &self.norm_weight,
            norm_bias: &self.norm_bias,
            eps: EPS,
            down: Matrix::contiguous(&self.down, self.rank, self.d).expect("fits"),
            down_bias: &self.down_bias,
            out: &self.out,
            out_bias: self.out_bias,
        };
        let mut found = vec![f32::NAN; rows.len()];
        risks(isa, &probe, &self.x[rows.start * self.d..rows.end * self.d], &mut found).expect("fits");
        found
    }

    /// The definition in `f64`: the risk, and the sum of the sizes of what is added up on the way to it.
    fn wanted(&self, row: usize) -> (f64, f64) {
        let x: Vec<f64> = self.x[row * self.d..(row + 1) * self.d].iter().map(|v| v.exact()).collect();
        let mean = x.iter().sum::<f64>() / self.d as f64;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / self.d as f64;
        let scale = (variance + f64::from(EPS)).sqrt();
        let (mut z, mut size) = (f64::from(self.out_bias), 1.0);
        for r in 0..self.rank {
            let (mut product, mut sizes) = (f64::from(self.down_bias[r]), 0.0);
            for (k, v) in x.iter().enumerate() {
                let normed =
                    (v - mean) / scale * f64::from(self.norm_weight[k]) + f64::from(self.norm_bias[k]);
                product += normed * f64::from(self.down[r * self.d + k]);
                sizes += (normed * f64::from(self.down[r * self.d + k])).abs();
            }
            let out = f64::from(self.out[r]);
            z += out * 0.5 * product * (1.0 + erf(product / 2f64.sqrt()));
            size += out.abs() * (sizes + 1.0);
        }
        (z.exp().ln_1p(), size)
    }
}

/// The error function by its Taylor series; beyond 5 it is 1 to within 2e-12.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn agrees<T: Float>(d: usize, rank: usize, rows: usize, seed: u64) -> Result<(), TestCaseError> {
    let case = Case::<T>::of(d, rank, rows, seed);
    for isa in Isa::available() {
        let found = case.run(isa, 0..rows);
        for (row, &risk) in found.iter().enumerate() {
            let (wanted, size) = case.wanted(row);
            let error = (f64::from(risk) - wanted).abs();
            prop_assert!(error <= 2e-6 * size, "{}: risk {risk:e}, not {wanted:e}", isa.name());
            prop_assert_eq!(risk.to_bits(), case.run(isa, row..row + 1)[0].to_bits());
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_risk_is_what_its_definition_says(
        d in 1_usize..300, rank in 1_usize..70, rows in 1_usize..=4, seed in any::<u64>()
    ) {
        agrees::<f32>(d, rank, rows, seed)?;
        agrees::<bf16>(d, rank, rows, seed)?;
        agrees::<f16>(d, rank, rows, seed)?;
    }

    #[test]
    fn what_is_not_finite_gives_a_risk_that_is_not(
        d in 1_usize..100, at in 0_usize..100, value in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)]
    ) {
        let mut case = Case::<f32>::of(d, 5, 2, 7);
        case.x[at % d] = value;
        for isa in Isa::available() {
            let found = case.run(isa, 0..2);
            prop_assert!(!found[0].is_finite() && found[1].is_finite(), "{}: {found:?}", isa.name());
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let case = Case::<f32>::of(6, 3, 1, 1);
    let probe = Probe {
        norm_weight: &case.norm_weight,
        norm_bias: &case.norm_bias,
        eps: EPS,
        down: Matrix::contiguous(&case.down, 3, 6).expect("fits"),
        down_bias: &case.down_bias,
        out: &case.out,
        out_bias: 0.0,
    };
    let short = Probe { out: &case.out[..2], ..probe };
    let run = |probe: &Probe<'_>, x: usize, rows: usize| {
        risks(Isa::detect(), probe, &vec![0.0; x], &mut vec![0.0; rows])
    };
    assert!(matches!(run(&short, 6, 1), Err(Error::Size { what: "out", .. })));
    assert!(matches!(run(&probe, 7, 1), Err(Error::Size { what: "x", .. })));
    assert_eq!(run(&probe, 0, 0), Err(Error::Rows { got: 0 }));
    assert_eq!(run(&probe, 6 * (MAX_ROWS + 1), MAX_ROWS + 1), Err(Error::Rows { got: MAX_ROWS + 1 }));
    assert_eq!(run(&probe, 6 * MAX_ROWS, MAX_ROWS), Ok(()));
}
