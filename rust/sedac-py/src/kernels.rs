//! `FfnKernel`, `LinearKernel` and `product` for Python: `sedac-kernels` on the memory of torch tensors.
//!
//! Tensors come as addresses: torch's bf16 has no `NumPy` type, and making views costs more than a call. Whoever makes a
//! kernel (`sedac_hf.ops` alone) keeps the tensors alive and unmoved as long as the kernel, with the sizes
//! that it states; whoever runs it gives addresses of as many rows as it says, aligned, of which the outputs are nobody
//! else's until the call returns (they may hold anything: the compiler knows nothing of memory from torch's allocator).
//! Rust cannot see any of this: it is the promise that the unsafe blocks below rest on.

#![allow(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use pyo3::{exceptions::PyValueError, prelude::*};
use sedac_kernels::{
    ffn, linear, product, Activation, Down, Element, Ffn, Isa, Matrix, OwnThreads, Point, Serial, Shadow,
    Team, Used,
};

use crate::openmp::{self, OpenMp};

/// Address, rows, columns and distance of the rows in elements.
pub(crate) type Placed = (usize, usize, usize, usize);
/// Addresses of the shadow's codes, scales, bias (0: none) and unit norms.
type PlacedShadow = (usize, usize, usize, usize);

pub(crate) fn to_py(error: sedac_kernels::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Names of the instruction sets of this machine, the one in use first.
#[pyfunction]
pub(crate) fn instruction_sets() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

/// Take threads from the OpenMP runtime whose `GOMP_parallel` is at this address; 0: from a pool of our own.
#[pyfunction]
pub(crate) fn set_openmp(address: usize) {
    openmp::set(address);
}

/// Reads so many bytes at this address, a multiple of 4, and nothing else; for benchmarks.
#[pyfunction]
pub(crate) fn read_memory(py: Python<'_>, address: usize, bytes: usize, threads: usize) -> f32 {
    py.detach(|| {
        with_team(threads, |team| {
            // SAFETY: the module's promise; any bytes are `f32` numbers.
            sedac_kernels::read(Isa::detect(), team, unsafe { slice(address, bytes / 4) })
        })
    })
}

/// Reads rows of matrices of `f32` numbers and nothing else; `rows` is the address of so many `u32` numbers. For
/// benchmarks.
#[pyfunction]
pub(crate) fn read_rows(
    py: Python<'_>,
    matrices: Vec<Placed>,
    rows: usize,
    n_rows: usize,
    threads: usize,
) -> PyResult<f32> {
    // SAFETY: the module's promise; any bytes are `f32` numbers.
    let (matrices, rows) = unsafe {
        let matrices: Result<Vec<_>, _> = matrices.into_iter().map(|placed| matrix::<f32>(placed)).collect();
        (matrices.map_err(to_py)?, slice(rows, n_rows))
    };
    Ok(py
        .detach(|| with_team(threads, |team| sedac_kernels::read_rows(Isa::detect(), team, &matrices, rows))))
}

pub(crate) fn isa(name: Option<&str>) -> PyResult<Isa> {
    let Some(name) = name else { return Ok(Isa::detect()) };
    Isa::available().into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
        let have = instruction_sets().join(", ");
        PyValueError::new_err(format!("`isa` must be one of this machine's ({have}), got {name:?}"))
    })
}

/// Runs with a team of so many threads.
fn with_team<R>(threads: usize, work: impl FnOnce(&dyn Team) -> R) -> R {
    static OWN: Mutex<Option<(u32, OwnThreads)>> = Mutex::new(None);
    if threads <= 1 {
        return work(&Serial);
    }
    if let Some(team) = OpenMp::new(threads) {
        return work(&team);
    }
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if own.as_ref().is_none_or(|(owner, team)| *owner != process || team.threads() != threads) {
        if let Some((owner, team)) = own.take() {
            if owner != process {
                std::mem::forget(team); // a forked child has the pool but not its threads
            }
        }
        *own = OwnThreads::new(threads).map(|team| (process, team));
    }
    match own.as_ref() {
        Some((_, team)) => work(team),
        None => work(&Serial),
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    pub(crate) fn named(name: &str) -> PyResult<Self> {
        match name {
            "float32" => Ok(Self::F32),
            "bfloat16" => Ok(Self::Bf16),
            "float16" => Ok(Self::F16),
            other => Err(PyValueError::new_err(format!(
                "`dtype` must be float32, bfloat16 or float16, got {other}"
            ))),
        }
    }
}

/// # Safety
///
/// `length` elements of type T, initialised, must be at `address` as long as the slice lives, and nobody may write them.
pub(crate) unsafe fn slice<'a, T>(address: usize, length: usize) -> &'a [T] {
    if length == 0 {
        return &[];
    }
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), length) }
}

/// # Safety
///
/// As [`slice`], and nobody else may read them either.
pub(crate) unsafe fn slice_mut<'a, T>(address: usize, length: usize) -> &'a mut [T] {
    if length == 0 {
        return &mut [];
    }
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), length) }
}

/// # Safety
///
/// As [`slice`], for every row.
pub(crate) unsafe fn matrix<'a, T: Copy>(
    (address, rows, columns, stride): Placed,
) -> Result<Matrix<'a, T>, sedac_kernels::Error> {
    let length = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
    // SAFETY: the caller's.
    Matrix::new(unsafe { slice(address, length) }, rows, columns, stride)
}

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
        // SAFETY: the module's promise. The shadow's sizes are those that `Shadow::new` asks for.
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
        // SAFETY: the module's promise.
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
            // SAFETY: the module's promise.
            unsafe {
                let bias = (bias != 0).then(|| slice(bias, outputs));
                let (x, y) = (slice(x, rows * inputs), slice_mut(y, rows * outputs));
                product(isa, team, self::matrix(matrix)?, bias, x, y, rows)
            }
        })
    })
    .map_err(to_py)
}
