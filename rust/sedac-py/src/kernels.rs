//! `FfnKernel`, `LinearKernel` and `product` for Python: `sedac-kernels` on the memory of torch tensors.

#![allow(unsafe_code)]

use half::{bf16, f16};
use pyo3::prelude::*;
use sedac_kernels::{ffn, linear, product, Activation, Down, Element, Ffn, Isa, Point, Shadow, Team, Used};

use crate::{
    machine::{isa, with_team},
    memory::{matrix, slice, slice_mut, to_py, Dtype, Placed},
};

/// Addresses of the shadow's codes, scales, bias (0: none) and unit norms.
type PlacedShadow = (usize, usize, usize, usize);

/// One FFN.
#[pyclass(frozen, module = "sedac_hf._rust")]
pub(crate) struct FfnKernel {
    isa: Isa,
    dtype: Dtype,
    activation: Activation,
    gate: Option<Placed>,
    up: Placed,
    down: Placed,
    down_by_columns: bool,
    biases: (usize, usize, usize),
    shadow: Option<PlacedShadow>,
}

#[pymethods]
impl FfnKernel {
    #[new]
    #[pyo3(signature = (dtype, activation, gate, up, down, down_by_columns, biases, shadow, isa_name = None))]
    #[allow(clippy::too_many_arguments)] // one per part of an FFN
    fn new(
        dtype: &str,
        activation: &str,
        gate: Option<Placed>,
        up: Placed,
        down: Placed,
        down_by_columns: bool,
        biases: (usize, usize, usize),
        shadow: Option<PlacedShadow>,
        isa_name: Option<&str>,
    ) -> PyResult<Self> {
        let activation = activation.parse().map_err(to_py)?;
        let (isa, dtype) = (isa(isa_name)?, Dtype::named(dtype)?);
        Ok(Self { isa, dtype, activation, gate, up, down, down_by_columns, biases, shadow })
    }

    /// Rows of x and y at these addresses, each with its (width, `importance_min`): (units needed, units read).
    #[pyo3(signature = (x, y, points, threads, hidden = 0))]
    fn run(
        &self,
        py: Python<'_>,
        x: usize,
        y: usize,
        points: Vec<(usize, f32)>,
        threads: usize,
        hidden: usize,
    ) -> PyResult<(usize, usize)> {
        let points: Vec<_> =
            points.into_iter().map(|(width, importance_min)| Point { width, importance_min }).collect();
        let used = py.detach(|| {
            with_team(threads, |team| match self.dtype {
                Dtype::F32 => self.run_as::<f32>(team, x, y, &points, hidden),
                Dtype::Bf16 => self.run_as::<bf16>(team, x, y, &points, hidden),
                Dtype::F16 => self.run_as::<f16>(team, x, y, &points, hidden),
            })
        });
        let used = used.map_err(to_py)?;
        Ok((used.needed, used.read))
    }
}

impl FfnKernel {
    fn run_as<T: Element>(
        &self,
        team: &dyn Team,
        x: usize,
        y: usize,
        points: &[Point],
        hidden: usize,
    ) -> Result<Used, sedac_kernels::Error> {
        let (_, units, d, _) = self.up;
        // SAFETY: the caller's promise. The shadow's sizes are those that `Shadow::new` asks for.
        unsafe {
            let bias = |address: usize, length: usize| (address != 0).then(|| slice::<T>(address, length));
            let down = matrix(self.down)?;
            let weights = Ffn {
                gate: self.gate.map(|gate| matrix(gate)).transpose()?,
                up: matrix(self.up)?,
                down: if self.down_by_columns { Down::Columns(down) } else { Down::Rows(down) },
                gate_bias: bias(self.biases.0, units),
                up_bias: bias(self.biases.1, units),
                down_bias: bias(self.biases.2, d),
                activation: self.activation,
            };
            let shadow = self.shadow.map(|(codes, scales, bias, norms)| {
                let (blocks, groups) = (units.div_ceil(16), d.div_ceil(64));
                Shadow::new(
                    slice(codes, blocks * groups * 512),
                    slice(scales, blocks * groups * 16),
                    (bias != 0).then(|| slice(bias, units)),
                    slice(norms, units),
                    d,
                )
            });
            let rows = points.len();
            let hidden = (hidden != 0).then(|| slice_mut(hidden, rows * units));
            let (x, y) = (slice(x, rows * d), slice_mut(y, rows * d));
            ffn(self.isa, team, &weights, shadow.transpose()?, points, x, y, hidden)
        }
    }
}

/// One linear map.
#[pyclass(frozen, module = "sedac_hf._rust")]
pub(crate) struct LinearKernel {
    isa: Isa,
    dtype: Dtype,
    weight: Placed,
    bias: usize,
}

#[pymethods]
impl LinearKernel {
    #[new]
    #[pyo3(signature = (dtype, weight, bias, isa_name = None))]
    fn new(dtype: &str, weight: Placed, bias: usize, isa_name: Option<&str>) -> PyResult<Self> {
        Ok(Self { isa: isa(isa_name)?, dtype: Dtype::named(dtype)?, weight, bias })
    }

    /// So many rows of x and y at these addresses.
    fn run(&self, py: Python<'_>, x: usize, y: usize, rows: usize, threads: usize) -> PyResult<()> {
        py.detach(|| {
            with_team(threads, |team| match self.dtype {
                Dtype::F32 => self.run_as::<f32>(team, x, y, rows),
                Dtype::Bf16 => self.run_as::<bf16>(team, x, y, rows),
                Dtype::F16 => self.run_as::<f16>(team, x, y, rows),
            })
        })
        .map_err(to_py)
    }
}

impl LinearKernel {
    fn run_as<T: Element>(
        &self,
        team: &dyn Team,
        x: usize,
        y: usize,
        rows: usize,
    ) -> Result<(), sedac_kernels::Error> {
        let (_, outputs, inputs, _) = self.weight;
        // SAFETY: the caller's promise.
        unsafe {
            let bias = (self.bias != 0).then(|| slice(self.bias, outputs));
            let (x, y) = (slice(x, rows * inputs), slice_mut(y, rows * outputs));
            linear::<T>(self.isa, team, matrix(self.weight)?, bias, x, y, rows)
        }
    }
}

/// `y = x M + b` in bf16 for any number of rows: x, y and b (0: none) are addresses.
#[pyfunction(name = "product")]
#[pyo3(signature = (matrix, bias, x, y, rows, threads, isa_name = None))]
#[allow(clippy::too_many_arguments)] // one argument per thing that a call is about
pub(crate) fn py_product(
    py: Python<'_>,
    matrix: Placed,
    bias: usize,
    x: usize,
    y: usize,
    rows: usize,
    threads: usize,
    isa_name: Option<&str>,
) -> PyResult<()> {
    let isa = isa(isa_name)?;
    let (_, inputs, outputs, _) = matrix;
    py.detach(|| {
        with_team(threads, |team| {
            // SAFETY: the caller's promise.
            unsafe {
                let bias = (bias != 0).then(|| slice(bias, outputs));
                let (x, y) = (slice(x, rows * inputs), slice_mut(y, rows * outputs));
                product(isa, team, self::matrix(matrix)?, bias, x, y, rows)
            }
        })
    })
    .map_err(to_py)
}
