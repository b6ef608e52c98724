//! `NumPy` arrays as slices, without copying, and errors as Python exceptions.

use numpy::{ndarray::Dimension, Element, PyArrayMethods, PyReadonlyArray, PyUntypedArrayMethods};
use pyo3::{exceptions::PyValueError, prelude::*};

/// The array's memory, read in C order.
///
/// The caller's Python must not write to the array while the slice lives; `sedac_hf.control` says so.
pub(crate) fn as_slice<'a, T: Element, D: Dimension>(
    name: &str,
    array: &'a PyReadonlyArray<'_, T, D>,
) -> PyResult<&'a [T]> {
    if !array.is_c_contiguous() {
        return Err(PyValueError::new_err(format!(
            "`{name}` must be C-contiguous, got strides {:?}",
            array.strides()
        )));
    }
    if !array.is_empty() && !array.data().is_aligned() {
        return Err(PyValueError::new_err(format!("`{name}` must be aligned in memory")));
    }
    Ok(array.as_slice()?)
}

/// The core's error as a `ValueError`; `sedac_hf.control.rust_engine` gives it its class.
pub(crate) fn to_py(error: sedac_core::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}
