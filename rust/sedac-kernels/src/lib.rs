//! Decode kernels for CPUs: a cut FFN, a plain linear map and a probe, for a few rows.
//!
//! With few rows a decoder's time is the time of reading its weights. These kernels read each weight once, at the
//! speed of memory, and read nothing that a token does not use: [`ffn`] decides by a 4-bit [`Shadow`] which hidden units
//! each row needs and touches the rows and columns of those units only; [`linear`] runs what is left of a decode step,
//! [`risks`] the probe that decides about the next.
//!
//! - Weights are `f32`, `bf16` or `f16` slices of the caller's memory, never copied; sums are in `f32`.
//! - [`Isa`] is the instruction set, found at run time; all of them give results equal to plain Rust's up to the rounding
//!   of sums.
//! - [`Team`] is where threads come from. Results do not depend on it: not on the number of threads, nor on their
//!   timing. Nor do a row's results depend on the other rows of the call.
//!
//! ```
//! use sedac_kernels::{ffn, Activation, Down, Ffn, Isa, Matrix, Point, Serial};
//!
//! // 2 inputs, 3 units: down(relu(up x))
//! let (up, down) = ([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0, 10.0, 10.0]);
//! let weights = Ffn {
//!     gate: None,
//!     up: Matrix::contiguous(&up, 3, 2)?,
//!     down: Down::Columns(Matrix::contiguous(&down, 3, 2)?),
//!     gate_bias: None,
//!     up_bias: None,
//!     down_bias: None,
//!     activation: Activation::Relu,
//! };
//! let mut y = [0.0f32; 2];
//! let two_units = Point { width: 2, importance_min: 0.0 };
//! let used = ffn(Isa::detect(), &Serial, &weights, None, &[two_units], &[3.0, 4.0], &mut y, None)?;
//! assert_eq!((y, used.read), ([3.0, 4.0], 2));
//! # Ok::<(), sedac_kernels::Error>(())
//! ```
#![deny(unsafe_code)] // but for the instructions of `arch`, and loads whose bounds were checked before the loop
#![allow(
    clippy::inline_always, // a kernel must be inlined into the function that switches its instructions on
    clippy::many_single_char_names, // the letters of the formulas
    clippy::needless_range_loop, // loops over several small arrays at once, which the compiler unrolls
)]

mod activation;
mod arch;
mod columns;
mod element;
mod error;
mod ffn;
mod groups;
mod hidden;
mod linear;
mod matrix;
mod panels;
mod probe;
mod products;
mod read;
mod rows;
mod runs;
mod shadow;
mod site;
mod steps;
mod team;

pub use activation::Activation;
pub use arch::Isa;
pub use element::Element;
pub use error::Error;
pub use ffn::{ffn, Used};
pub use linear::linear;
pub use matrix::Matrix;
pub use panels::product;
pub use probe::{risks, Probe};
pub use read::{read, read_rows};
pub use shadow::Shadow;
pub use site::{Down, Ffn, Point};
pub use team::{drain, OwnThreads, Serial, Team};

/// Most rows of a call: with more, weights are used often enough that matrix products are the better way.
pub const MAX_ROWS: usize = 16;
