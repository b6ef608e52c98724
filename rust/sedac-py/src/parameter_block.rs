//! `ParameterBlock` for Python: the law in whole numbers, its oracle and its replay; all of it lives in `sedac-core`.

use numpy::{
    ndarray::Array2, IntoPyArray, PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2,
    PyUntypedArrayMethods,
};
use pyo3::{exceptions::PyValueError, prelude::*};

use crate::arrays::{as_slice, to_py};

type Step<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<u8>>);
type Replay<'py> = (usize, Bound<'py, PyArray2<bool>>, Bound<'py, PyArray2<f32>>);

/// The law of one controller at one moment, in whole numbers.
#[pyclass(frozen, module = "sedac_hf._rust")]
pub(crate) struct ParameterBlock(pub(crate) sedac_core::ParameterBlock);

#[pymethods]
impl ParameterBlock {
    #[getter]
    fn table<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray2<i64>> {
        let table = self.0.table();
        let rows = self.0.checkpoints().len();
        let columns = table.len() / rows;
        Array2::from_shape_vec((rows, columns), table).expect("rows of one length").into_pyarray(py)
    }

    #[getter]
    fn risk_scale<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.0.risk_scale().into_pyarray(py)
    }

    #[getter]
    fn unit(&self) -> f64 {
        self.0.unit()
    }

    #[getter]
    fn distance<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        self.0.distance().to_vec().into_pyarray(py)
    }

    fn quantise<'py>(
        &self,
        py: Python<'py>,
        checkpoint_idx: usize,
        risk: PyReadonlyArray1<'py, f32>,
    ) -> PyResult<Bound<'py, PyArray1<i16>>> {
        let risk = as_slice("risk", &risk)?;
        let risk_q = py.detach(|| self.0.quantise(checkpoint_idx, risk)).map_err(to_py)?;
        Ok(risk_q.into_pyarray(py))
    }

    fn dequantise<'py>(
        &self,
        py: Python<'py>,
        checkpoint_idx: usize,
        risk_q: PyReadonlyArray1<'py, i16>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let risk_q = as_slice("risk_q", &risk_q)?;
        let risk = py.detach(|| self.0.dequantise(checkpoint_idx, risk_q)).map_err(to_py)?;
        Ok(risk.into_pyarray(py))
    }

    fn step<'py>(
        &self,
        py: Python<'py>,
        checkpoint_idx: usize,
        states: PyReadonlyArray1<'py, i32>,
        risk_q: PyReadonlyArray1<'py, i16>,
    ) -> PyResult<Step<'py>> {
        let mut states = as_slice("states", &states)?.to_vec();
        let risk_q = as_slice("risk_q", &risk_q)?;
        let levels = py.detach(|| self.0.step(checkpoint_idx, &mut states, risk_q)).map_err(to_py)?;
        Ok((states.into_pyarray(py), levels.into_pyarray(py)))
    }

    fn replay<'py>(
        &self,
        py: Python<'py>,
        risk_q: PyReadonlyArray2<'py, i16>,
        levels: PyReadonlyArray2<'py, u8>,
    ) -> PyResult<Replay<'py>> {
        let shape = (risk_q.shape()[0], risk_q.shape()[1]);
        let n_checkpoints = self.0.checkpoints().len();
        if shape.0 != n_checkpoints || levels.shape() != risk_q.shape() {
            return Err(PyValueError::new_err(format!(
                "`risk_q` and `levels` must have one shape of {n_checkpoints} rows, got {:?} and {:?}",
                risk_q.shape(),
                levels.shape()
            )));
        }
        let (risk_q, levels) = (as_slice("risk_q", &risk_q)?, as_slice("levels", &levels)?);
        let replay = py.detach(|| self.0.replay(risk_q, levels, shape.1)).map_err(to_py)?;
        let exited = Array2::from_shape_vec(shape, replay.exited).expect("one exit per risk");
        let ratios = Array2::from_shape_vec(shape, replay.ratios).expect("one ratio per risk");
        Ok((replay.mismatches, exited.into_pyarray(py), ratios.into_pyarray(py)))
    }
}
