//! The compiled module `sedac_hf._rust`: registers what its modules offer, and nothing else.

mod arrays;
mod controller;
mod kernels;
mod machine;
mod memory;
mod openmp;
mod parameter_block;
mod probe;
mod strips;

use pyo3::prelude::*;

/// The compiled core of `sedac_hf`; use it through `sedac_hf.control`.
#[pymodule(gil_used = false)]
mod _rust {
    #[pymodule_export]
    use crate::controller::{CascadeController, ForwardPass};
    #[pymodule_export]
    use crate::kernels::{py_product, FfnKernel, LinearKernel};
    #[pymodule_export]
    use crate::machine::{instruction_sets, read_memory, read_rows, set_openmp};
    #[pymodule_export]
    use crate::parameter_block::ParameterBlock;
    #[pymodule_export]
    use crate::probe::ProbeKernel;
    #[pymodule_export]
    use crate::strips::StripPlanner;
    #[pymodule_export]
    const MAX_ROWS: usize = sedac_kernels::MAX_ROWS;
}
