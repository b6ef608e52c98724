//! Threads of an OpenMP runtime that is in the process already, so that our work and its owner's share one pool.
//!
//! After a parallel region the workers of libgomp spin for milliseconds, waiting for the next one. A second pool would
//! fight them for the cores (one FFN in the middle of a decode step took twice its time); a region entered here finds
//! them awake.

#![allow(unsafe_code)]

use std::{
    ffi::{c_uint, c_void},
    panic::{catch_unwind, AssertUnwindSafe},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use sedac_kernels::{drain, Team};

/// `GOMP_parallel(fn, data, num_threads, flags)` of GCC's OpenMP runtime, part of its ABI since GCC 4.9.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

static PARALLEL: AtomicUsize = AtomicUsize::new(0);

/// Keeps the address of `GOMP_parallel`; 0 forgets it.
pub(crate) fn set(address: usize) {
    PARALLEL.store(address, Ordering::Relaxed);
}

/// So many threads of the runtime, the caller's included.
pub(crate) struct OpenMp {
    parallel: Parallel,
    threads: usize,
}

impl OpenMp {
    /// None where no runtime is known.
    pub(crate) fn new(threads: usize) -> Option<Self> {
        let address = PARALLEL.load(Ordering::Relaxed);
        let symbol = std::ptr::with_exposed_provenance::<()>(address);
        // SAFETY: `sedac_hf.ops.threads` finds the address of that very symbol, in a library that stays loaded.
        let parallel = || unsafe { std::mem::transmute::<*const (), Parallel>(symbol) };
        (address != 0).then(|| Self { parallel: parallel(), threads })
    }
}

struct Region<'a> {
    next: AtomicUsize,
    tasks: usize,
    task: &'a (dyn Fn(usize) + Sync),
    failed: AtomicBool,
}

extern "C" fn work(region: *mut c_void) {
    // SAFETY: `run` passes a region that outlives the parallel section, and all threads only share it.
    let region = unsafe { &*region.cast::<Region<'_>>() };
    // A panic must not cross the runtime's frames.
    let done = catch_unwind(AssertUnwindSafe(|| drain(&region.next, region.tasks, region.task)));
    if done.is_err() {
        region.failed.store(true, Ordering::Relaxed);
    }
}

impl Team for OpenMp {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 {
            return (0..tasks).for_each(task);
        }
        let mut region = Region { next: AtomicUsize::new(0), tasks, task, failed: AtomicBool::new(false) };
        // Always all of them, as torch asks for: the runtime ends the threads that a smaller team leaves out, and starts new
        // ones for the next team.
        let threads = self.threads as c_uint;
        // SAFETY: the runtime calls `work` with this pointer on its threads and returns when all have left it. However many
        // threads it grants, all tasks are taken.
        unsafe { (self.parallel)(work, std::ptr::from_mut(&mut region).cast(), threads, 0) };
        assert!(!region.failed.load(Ordering::Relaxed), "a kernel task panicked");
    }
}
