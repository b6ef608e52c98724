//! `CascadeController` and `ForwardPass` for Python; the law lives in `sedac-core`.
//!
//! Every method that works on a batch releases the interpreter lock. A pass is locked only while that lock is
//! released: a thread that waited for the pass while holding the interpreter could otherwise block the one at work.

use std::sync::{Mutex, PoisonError};

use numpy::{
    ndarray::Array2, IntoPyArray, PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2,
    PyUntypedArrayMethods,
};
use pyo3::{exceptions::PyValueError, prelude::*};
use sedac_core::{CascadeConfig, LayerConfig};

use crate::{
    arrays::{as_slice, to_py},
    parameter_block::ParameterBlock,
};

type Layer = (u32, f32, f32, f32);
type Outcome<'py> = (
    Bound<'py, PyArray1<bool>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray2<f32>>,
    Bound<'py, PyArray2<u8>>,
);
type Plan<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);

/// The state of one forward pass.
#[pyclass(frozen, module = "sedac_hf._rust")]
pub(crate) struct ForwardPass(Mutex<sedac_core::ForwardPass>);

impl ForwardPass {
    /// Works on the state with the interpreter lock released.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut sedac_core::ForwardPass) -> T + Send,
    ) -> T {
        // The core leaves a pass whole even where it panics, so a poisoned lock is still good.
        py.detach(|| work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[pymethods]
impl ForwardPass {
    #[getter]
    fn n_tokens(&self, py: Python<'_>) -> usize {
        self.with(py, |pass| pass.n_tokens())
    }

    #[getter]
    fn next_checkpoint(&self, py: Python<'_>) -> usize {
        self.with(py, |pass| pass.next_checkpoint())
    }

    #[getter]
    fn confidence<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.with(py, |pass| pass.confidence().to_vec()).into_pyarray(py)
    }

    #[getter]
    fn exit_layer<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        self.with(py, |pass| pass.exit_layer()).into_pyarray(py)
    }

    #[getter]
    fn ratio<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.with(py, |pass| pass.ratio()).into_pyarray(py)
    }

    #[getter]
    fn exited<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<bool>> {
        self.with(py, |pass| pass.exited()).into_pyarray(py)
    }

    #[getter]
    fn failed<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<bool>> {
        self.with(py, |pass| pass.failed()).into_pyarray(py)
    }
}

/// The law and its shared thresholds.
#[pyclass(frozen, module = "sedac_hf._rust")]
pub(crate) struct CascadeController(sedac_core::CascadeController);

#[pymethods]
impl CascadeController {
    #[new]
    fn new(
        layers: Vec<Layer>,
        alpha: f32,
        confidence_decay: f32,
        soft_exit: bool,
        n_levels: u8,
    ) -> PyResult<Self> {
        let layers = layers.into_iter().map(|(layer_idx, target, threshold, weight)| {
            LayerConfig::new(layer_idx, target, threshold, weight)
        });
        let config = CascadeConfig::new(layers.collect())
            .and_then(|config| config.with_alpha(alpha))
            .and_then(|config| config.with_confidence_decay(confidence_decay))
            .and_then(|config| config.with_soft_exit(soft_exit).with_n_levels(n_levels))
            .map_err(to_py)?;
        Ok(Self(sedac_core::CascadeController::new(config)))
    }

    #[getter]
    fn thresholds<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.0.thresholds().into_pyarray(py)
    }

    #[getter]
    fn cut_points<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.0.config().keep_levels().cut_points().to_vec().into_pyarray(py)
    }

    fn begin(&self, py: Python<'_>, n_tokens: usize) -> PyResult<ForwardPass> {
        let pass = py.detach(|| self.0.begin(n_tokens)).map_err(to_py)?;
        Ok(ForwardPass(Mutex::new(pass)))
    }

    fn owns(&self, py: Python<'_>, state: &ForwardPass) -> bool {
        state.with(py, |pass| self.0.owns(pass))
    }

    fn step<'py>(
        &self,
        py: Python<'py>,
        state: &ForwardPass,
        checkpoint_idx: usize,
        risk: PyReadonlyArray1<'py, f32>,
    ) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let risk = as_slice("risk", &risk)?;
        let levels = state.with(py, |pass| self.0.step(pass, checkpoint_idx, risk)).map_err(to_py)?;
        Ok(levels.into_pyarray(py))
    }

    fn evaluate_batch<'py>(
        &self,
        py: Python<'py>,
        risk: PyReadonlyArray2<'py, f32>,
    ) -> PyResult<Outcome<'py>> {
        let [n_checkpoints, n_tokens] = [risk.shape()[0], risk.shape()[1]];
        if n_checkpoints != self.0.config().n_checkpoints() {
            let want = self.0.config().n_checkpoints();
            return Err(PyValueError::new_err(format!("`risk` must have {want} rows, got {n_checkpoints}")));
        }
        let risk = as_slice("risk", &risk)?;
        let decisions = py.detach(|| self.0.evaluate_batch(risk, n_tokens)).map_err(to_py)?;
        let shape = (n_checkpoints, n_tokens);
        let ratios = Array2::from_shape_vec(shape, decisions.ratios).expect("one ratio per risk");
        let levels = Array2::from_shape_vec(shape, decisions.levels).expect("one level per risk");
        Ok((
            decisions.should_exit.into_pyarray(py),
            decisions.exit_layer.into_pyarray(py),
            decisions.accumulated_confidence.into_pyarray(py),
            ratios.into_pyarray(py),
            levels.into_pyarray(py),
        ))
    }

    fn update_threshold(
        &self,
        py: Python<'_>,
        checkpoint_idx: usize,
        samples: PyReadonlyArray1<'_, f32>,
        quantile: f64,
    ) -> PyResult<f32> {
        let samples = as_slice("samples", &samples)?;
        py.detach(|| self.0.update_threshold(checkpoint_idx, samples, Some(quantile))).map_err(to_py)
    }

    fn set_thresholds(&self, values: PyReadonlyArray1<'_, f32>) -> PyResult<()> {
        self.0.set_thresholds(as_slice("values", &values)?).map_err(to_py)
    }

    fn parameter_block(&self, py: Python<'_>) -> ParameterBlock {
        ParameterBlock(py.detach(|| self.0.parameter_block()))
    }

    fn plan<'py>(&self, py: Python<'py>, levels: PyReadonlyArray1<'py, u8>) -> PyResult<Plan<'py>> {
        let levels = as_slice("levels", &levels)?;
        let plan = py.detach(|| self.0.plan(levels)).map_err(to_py)?;
        Ok((plan.order.into_pyarray(py), plan.at_least.into_pyarray(py)))
    }
}
