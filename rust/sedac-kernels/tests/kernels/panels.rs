//! The product with a matrix that lies by inputs.

use half::bf16;
use proptest::prelude::*;
use sedac_kernels::{product, Error, Isa, Matrix, Serial, Team};

use crate::{
    numbers::{Float, Random, Strided},
    reference::{add, is_right, rounded, sum},
    teams::teams,
};

struct Case {
    matrix: Strided<bf16>,
    bias: Option<Vec<bf16>>,
    x: Vec<bf16>,
}

impl Case {
    fn run(&self, isa: Isa, team: &dyn Team, rows: std::ops::Range<usize>) -> Vec<u16> {
        let (inputs, outputs) = (self.matrix.rows, self.matrix.columns);
        let mut y = vec![bf16::NAN; rows.len() * outputs];
        let x = &self.x[rows.start * inputs..rows.end * inputs];
        product(isa, team, self.matrix.matrix(), self.bias.as_deref(), x, &mut y, rows.len()).expect("fits");
        y.into_iter().map(bf16::to_bits).collect()
    }
}

proptest! {
    #[test]
    fn a_product_is_what_its_definition_says_whoever_runs_it(
        (inputs, outputs, gap) in (0_usize..200, 0_usize..700, prop_oneof![Just(0_usize), 1_usize..40]),
        (rows, bias, seed) in (0_usize..20, any::<bool>(), any::<u64>()),
    ) {
        let mut random = Random(seed);
        let matrix = Strided::random(inputs, outputs, gap, 0.3, &mut random);
        let bias = bias.then(|| random.values(outputs, 0.5));
        let case = Case { matrix, bias, x: random.values(rows * inputs, 1.5) };
        for isa in Isa::available() {
            let y = case.run(isa, &Serial, 0..rows);
            for (at, &bits) in y.iter().enumerate() {
                let (n, i) = (at / outputs, at % outputs);
                let terms = (0..inputs).map(|k| case.matrix.at(k, i) * case.x[n * inputs + k].exact());
                let wanted = add(sum(terms), case.bias.as_ref().map_or(0.0, |bias| bias[i].exact()));
                let got = bf16::from_bits(bits).exact();
                prop_assert!(is_right(got, rounded::<bf16>(wanted)), "{}: y[{n}][{i}] is {got:e}, not {wanted:?}", isa.name());
            }
            for team in teams() {
                prop_assert_eq!(&y, &case.run(isa, team.as_ref(), 0..rows));
            }
            for n in 0..rows {
                prop_assert_eq!(&y[n * outputs..(n + 1) * outputs], &case.run(isa, &Serial, n..n + 1));
            }
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let numbers = [bf16::ONE; 12];
    let matrix = Matrix::contiguous(&numbers, 3, 4).expect("fits");
    let run = |x: usize, y: usize, bias: usize| {
        let mut y = vec![bf16::ZERO; y];
        product(Isa::detect(), &Serial, matrix, Some(&numbers[..bias]), &numbers[..x], &mut y, 2)
    };
    assert_eq!(run(6, 8, 4), Ok(()));
    for (x, y, bias) in [(5, 8, 4), (6, 7, 4), (6, 8, 3)] {
        assert!(matches!(run(x, y, bias), Err(Error::Size { .. })), "{x} {y} {bias}");
    }
}
