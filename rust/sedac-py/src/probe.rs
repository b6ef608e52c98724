//! `ProbeKernel` for Python: a probe of `sedac-kernels` on the memory of torch tensors.
//!
//! Addresses and their promise are those of [`crate::memory`].

#![allow(unsafe_code)]

use half::{bf16, f16};
use numpy::PyArray1;
use pyo3::prelude::*;
use sedac_kernels::{risks, Element, Isa, Probe};

use crate::memory::{matrix, slice, to_py, Dtype, Placed};

/// One probe.
#[pyclass(frozen, module = "sedac_hf._rust")]
pub(crate) struct ProbeKernel {
    isa: Isa,
    dtype: Dtype,
    norm: (usize, usize, f32),
    down: Placed,
    rest: (usize, usize, usize),
}

#[pymethods]
impl ProbeKernel {
    /// `dtype` is that of the hidden states; all parameters are float32. `norm`: addresses of weight and bias, and eps;
    /// `rest`: addresses of down's bias, of the output's weight and of its bias.
    #[new]
    fn new(
        dtype: &str,
        norm: (usize, usize, f32),
        down: Placed,
        rest: (usize, usize, usize),
    ) -> PyResult<Self> {
        Ok(Self { isa: Isa::detect(), dtype: Dtype::named(dtype)?, norm, down, rest })
    }

    /// The risk of each of so many rows of x at this address.
    fn run<'py>(&self, py: Python<'py>, x: usize, rows: usize) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let mut found = [0.0; sedac_kernels::MAX_ROWS];
        let found = found.get_mut(..rows).ok_or(sedac_kernels::Error::Rows { got: rows }).map_err(to_py)?;
        match self.dtype {
            Dtype::F32 => self.run_as::<f32>(x, found),
            Dtype::Bf16 => self.run_as::<bf16>(x, found),
            Dtype::F16 => self.run_as::<f16>(x, found),
        }
        .map_err(to_py)?;
        Ok(PyArray1::from_slice(py, found))
    }
}

impl ProbeKernel {
    fn run_as<T: Element>(&self, x: usize, found: &mut [f32]) -> Result<(), sedac_kernels::Error> {
        let (_, rank, d, _) = self.down;
        // SAFETY: the promise of `kernels`.
        unsafe {
            let probe = Probe {
                norm_weight: slice(self.norm.0, d),
                norm_bias: slice(self.norm.1, d),
                eps: self.norm.2,
                down: matrix(self.down)?,
                down_bias: slice(self.rest.0, rank),
                out: slice(self.rest.1, rank),
                out_bias: slice::<f32>(self.rest.2, 1)[0],
            };
            risks::<T>(self.isa, &probe, slice(x, found.len() * d), found)
        }
    }
}
