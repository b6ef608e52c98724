//! Every instruction set against the definition, so that each also equals plain Rust within the sum of both bounds.

use half::{bf16, f16};
use proptest::prelude::*;
use sedac_kernels::{Isa, Serial};

use crate::{
    case::{Case, Outcome},
    numbers::Float,
    reference::{expected, is_right, Use},
    spec::{large, spec, Input, Spec},
};

fn agrees<T: Float>(case: &Case<T>, isa: Isa, got: &Outcome<T>) -> Result<(), TestCaseError> {
    let (f, d) = (case.spec.units, case.spec.hidden_size);
    let (mut least, mut most, mut by_any) = (0, 0, vec![Use::No; f]);
    for n in 0..case.rows() {
        let row = expected(case, n);
        let count = |which| row.uses.iter().filter(|&&used| used == which).count();
        least += count(Use::Yes);
        most += count(Use::Yes) + count(Use::Either);
        for (any, &used) in by_any.iter_mut().zip(&row.uses) {
            if *any != Use::Yes && used != Use::No {
                *any = used;
            }
        }
        for (unit, &used) in row.uses.iter().enumerate() {
            let hidden = got.hidden[n * f + unit];
            let unused = hidden.to_bits() == 0;
            // An infinite input has infinite products, whose sums the definition does not give an order.
            let broken = case.spec.rows[n].input == Input::Infinite;
            let right = broken || is_right(f64::from(hidden), row.hidden[unit]);
            let ok = match used {
                Use::Yes => right,
                Use::No => unused,
                Use::Either => right || unused,
            };
            let wanted = (used, row.hidden[unit]);
            prop_assert!(ok, "{}: hidden[{n}][{unit}] is {hidden:e}, not {wanted:?}", isa.name());
        }
        if case.spec.rows[n].input == Input::Infinite {
            continue;
        }
        for (i, &wanted) in row.y.iter().enumerate() {
            let y = got.y[n * d + i].exact();
            prop_assert!(is_right(y, wanted), "{}: y[{n}][{i}] is {y:e}, not {wanted:?}", isa.name());
        }
    }
    prop_assert!((least..=most).contains(&got.used.needed), "{}: {:?}", isa.name(), got.used);
    let count = |which| by_any.iter().filter(|&&used| used == which).count();
    let least = count(Use::Yes);
    prop_assert!((least..=least + count(Use::Either)).contains(&got.used.read));
    Ok(())
}

fn all_agree<T: Float>(spec: &Spec) -> Result<(), TestCaseError> {
    let case = Case::<T>::of(spec);
    for isa in Isa::available() {
        agrees(&case, isa, &case.run(isa, &Serial, 0..case.rows()))?;
    }
    Ok(())
}

proptest! {
    #[test]
    fn an_ffn_is_what_its_definition_says(spec in spec()) {
        all_agree::<f32>(&spec)?;
        all_agree::<bf16>(&spec)?;
        all_agree::<f16>(&spec)?;
    }
}

#[test]
#[cfg_attr(miri, ignore)]
fn a_large_ffn_as_well() {
    for spec in large() {
        all_agree::<bf16>(&spec).expect("within rounding");
        all_agree::<f32>(&spec).expect("within rounding");
    }
}
