//! The compiled module `sedac_hf._rust`: registers the classes of [`controller`], and nothing else.

mod arrays;
mod controller;

use pyo3::prelude::*;

/// The compiled core of `sedac_hf`; use it through `sedac_hf.control`.
#[pymodule(gil_used = false)]
mod _rust {
    #[pymodule_export]
    use crate::controller::{CascadeController, ForwardPass};
}
