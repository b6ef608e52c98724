//! The memory of torch tensors.
//!
//! Tensors come as addresses: torch's bf16 has no `NumPy` type, and making views costs more than a call. Whoever makes a
//! kernel (`sedac_hf.ops` alone) keeps the tensors alive and unmoved as long as the kernel, with the sizes
//! that it states; whoever runs it gives addresses of as many rows as it says, aligned, of which the outputs are nobody
//! else's until the call returns (they may hold anything: the compiler knows nothing of memory from torch's allocator).
//! Rust cannot see any of this: it is the caller's promise, which the unsafe blocks of the other modules rest on.

#![allow(unsafe_code)]

use pyo3::{exceptions::PyValueError, prelude::*};
use sedac_kernels::Matrix;

/// Address, rows, columns and distance of the rows in elements.
pub(crate) type Placed = (usize, usize, usize, usize);

pub(crate) fn to_py(error: sedac_kernels::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
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
