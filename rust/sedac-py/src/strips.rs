//! `StripPlanner` for Python; what it does is told in `sedac-core`.

use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::{exceptions::PyValueError, prelude::*};
use sedac_core::CostGrid;

use crate::arrays::{as_slice, to_py};

type Ends = Vec<(usize, usize)>;

/// Cuts batches of mixed widths by cost.
#[pyclass(frozen, module = "sedac_hf._rust")]
pub(crate) struct StripPlanner(sedac_core::StripPlanner);

#[pymethods]
impl StripPlanner {
    #[new]
    #[pyo3(signature = (tokens, units, prior, measured=None))]
    fn new(
        tokens: PyReadonlyArray1<'_, f64>,
        units: PyReadonlyArray1<'_, f64>,
        prior: PyReadonlyArray2<'_, f64>,
        measured: Option<PyReadonlyArray2<'_, f64>>,
    ) -> PyResult<Self> {
        let (tokens, units) = (as_slice("tokens", &tokens)?, as_slice("units", &units)?);
        let grid = |name: &str, seconds: &PyReadonlyArray2<'_, f64>| {
            let (got, want) = (seconds.shape().to_vec(), [tokens.len(), units.len()]);
            if got != want {
                return Err(PyValueError::new_err(format!("`{name}` must have shape {want:?}, got {got:?}")));
            }
            CostGrid::new(tokens, units, as_slice(name, seconds)?).map_err(to_py)
        };
        let measured = measured.map(|seconds| grid("measured", &seconds)).transpose()?;
        Ok(Self(sedac_core::StripPlanner::new(grid("prior", &prior)?, measured)))
    }

    fn seconds(&self, tokens: usize, units: usize) -> f64 {
        self.0.seconds(tokens, units)
    }

    fn strips(&self, ends: Ends) -> PyResult<Vec<(usize, usize, usize, usize)>> {
        let strips = self.0.strips(&ends).map_err(to_py)?;
        Ok(strips.iter().map(|strip| (strip.lo, strip.hi, strip.tokens, strip.whole)).collect())
    }

    fn groups(&self, ends: Ends) -> PyResult<Vec<(usize, usize, usize)>> {
        let groups = self.0.groups(&ends).map_err(to_py)?;
        Ok(groups.iter().map(|group| (group.lo, group.hi, group.width)).collect())
    }
}
