//! Bits that must not depend on what they have nothing to do with.

use half::{bf16, f16};
use proptest::prelude::*;
use sedac_kernels::{ffn, Isa, Serial};

use crate::{
    case::Case,
    numbers::Float,
    spec::{large, spec, Spec},
    teams::teams,
};

fn same_for_any_team<T: Float>(spec: &Spec) -> Result<(), TestCaseError> {
    let case = Case::<T>::of(spec);
    for isa in Isa::available() {
        let alone = case.run(isa, &Serial, 0..case.rows()).bits();
        prop_assert_eq!(&alone, &case.run(isa, &Serial, 0..case.rows()).bits(), "two runs");
        for (i, team) in teams().iter().enumerate() {
            prop_assert_eq!(&alone, &case.run(isa, team.as_ref(), 0..case.rows()).bits(), "team {}", i);
        }
    }
    Ok(())
}

fn same_in_any_batch<T: Float>(spec: &Spec) -> Result<(), TestCaseError> {
    let case = Case::<T>::of(spec);
    let (f, d) = (spec.units, spec.hidden_size);
    for isa in Isa::available() {
        let (used, y, hidden) = case.run(isa, &Serial, 0..case.rows()).bits();
        let mut needed = 0;
        for n in 0..case.rows() {
            let (alone, y_alone, hidden_alone) = case.run(isa, &Serial, n..n + 1).bits();
            prop_assert_eq!(&y[n * d..(n + 1) * d], &y_alone, "{}: y[{}]", isa.name(), n);
            prop_assert_eq!(&hidden[n * f..(n + 1) * f], &hidden_alone, "{}: hidden[{}]", isa.name(), n);
            prop_assert_eq!(alone.needed, alone.read);
            needed += alone.needed;
        }
        prop_assert_eq!(used.needed, needed);
    }
    Ok(())
}

proptest! {
    #[test]
    fn threads_change_nothing(spec in spec()) {
        same_for_any_team::<f32>(&spec)?;
        same_for_any_team::<bf16>(&spec)?;
    }

    #[test]
    fn other_rows_change_nothing(spec in spec()) {
        same_in_any_batch::<f32>(&spec)?;
        same_in_any_batch::<bf16>(&spec)?;
        same_in_any_batch::<f16>(&spec)?;
    }

    #[test]
    fn asking_for_hidden_values_changes_nothing(spec in spec()) {
        let case = Case::<bf16>::of(&spec);
        for isa in Isa::available() {
            let (used, wanted, _) = case.run(isa, &Serial, 0..case.rows()).bits();
            let mut y = vec![bf16::NAN; case.x.len()];
            let shadow = spec.shadow.then(|| case.shadow());
            let without = ffn(isa, &Serial, &case.weights(), shadow, &case.points, &case.x, &mut y, None);
            prop_assert_eq!(without, Ok(used));
            prop_assert_eq!(y.iter().map(|value| value.bits()).collect::<Vec<_>>(), wanted);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore)]
fn large_ffns_keep_to_it_as_well() {
    for spec in large() {
        same_for_any_team::<bf16>(&spec).expect("the same bits");
        same_in_any_batch::<f32>(&spec).expect("the same bits");
    }
}
