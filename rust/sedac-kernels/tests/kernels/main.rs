//! What the kernels promise, on every instruction set of this machine, against references in `f64` that are written from
//! the definitions and share no code with them.

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
mod reference;
mod spec;
mod teams;
