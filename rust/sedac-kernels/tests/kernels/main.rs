//! What the kernels promise, on every instruction set of this machine, against references in `f64` that are written from
//! the definitions and share no code with them.

#![allow(clippy::many_single_char_names)] // the letters of the formulas

mod accuracy;
mod case;
mod errors;
mod laws;
mod linear;
mod reference;
mod teams;
