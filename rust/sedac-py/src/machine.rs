//! Instruction sets and threads of the kernels, and plain reads of memory to compare their times with.

#![allow(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use pyo3::{exceptions::PyValueError, prelude::*};
use sedac_kernels::{Isa, OwnThreads, Serial, Team};

use crate::{
    memory::{matrix, slice, to_py, Placed},
    openmp::{self, OpenMp},
};

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

pub(crate) fn isa(name: Option<&str>) -> PyResult<Isa> {
    let Some(name) = name else { return Ok(Isa::detect()) };
    Isa::available().into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
        let have = instruction_sets().join(", ");
        PyValueError::new_err(format!("`isa` must be one of this machine's ({have}), got {name:?}"))
    })
}

/// Runs with a team of so many threads.
pub(crate) fn with_team<R>(threads: usize, work: impl FnOnce(&dyn Team) -> R) -> R {
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

/// Reads so many bytes at this address, a multiple of 4, and nothing else; for benchmarks.
#[pyfunction]
pub(crate) fn read_memory(py: Python<'_>, address: usize, bytes: usize, threads: usize) -> f32 {
    py.detach(|| {
        with_team(threads, |team| {
            // SAFETY: the caller's promise; any bytes are `f32` numbers.
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
    // SAFETY: the caller's promise; any bytes are `f32` numbers.
    let (matrices, rows) = unsafe {
        let matrices: Result<Vec<_>, _> = matrices.into_iter().map(|placed| matrix::<f32>(placed)).collect();
        (matrices.map_err(to_py)?, slice(rows, n_rows))
    };
    Ok(py
        .detach(|| with_team(threads, |team| sedac_kernels::read_rows(Isa::detect(), team, &matrices, rows))))
}
