//! What the kernels promise, on every instruction set of this machine, against references in `f64` that are written from
//! the definitions and share no code with them.
//!
//! The unsafe blocks of the portable path are checked by Miri, those of AVX2 by Valgrind (which hides AVX-512):
//!
//! ```text
//! export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-tree-borrows -Zmiri-ignore-leaks" # crossbeam, which rayon uses
//! PROPTEST_CASES=1 cargo +nightly miri test -p sedac-kernels --test kernels
//! PROPTEST_CASES=6 valgrind --error-exitcode=1 target/debug/deps/kernels-<hash> --test-threads=1
//! ```

#![allow(
    clippy::cast_sign_loss, // sizes from shares, none of them negative
    clippy::many_single_char_names, // the letters of the formulas
)]

mod accuracy;
mod case;
mod errors;
mod laws;
mod linear;
mod numbers;
mod panels;
mod probe;
mod reference;
mod spec;
mod teams;
