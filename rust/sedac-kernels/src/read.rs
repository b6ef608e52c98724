//! Reading memory and nothing else: the floor that decode kernels are measured against.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};

use crate::{
    arch::{Isa, Kernel, Simd},
    team::Team,
};

/// Numbers that one task reads.
const PER_TASK: usize = 1 << 16;
/// How far ahead, in bytes, the reader asks for memory; the best of 0 to 8192 on an AMD EPYC.
const AHEAD: usize = 4096;

/// The sum of `data`, as fast as the team can read it.
pub fn read(isa: Isa, team: &dyn Team, data: &[f32]) -> f32 {
    let tasks = data.len().div_ceil(PER_TASK);
    let total = AtomicU32::new(0);
    team.run(tasks, &|task| {
        let from = task * PER_TASK;
        let piece = &data[from..data.len().min(from + PER_TASK)];
        // Something must be done with what was read, or it would not be read; which task is last does not matter.
        total.store(isa.run(Sum(piece)).to_bits(), Ordering::Relaxed);
    });
    f32::from_bits(total.into_inner())
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        const VECTORS: usize = 8;
        let data = self.0;
        let ones = simd.splat(1.0);
        let mut sums = [simd.splat(0.0); VECTORS];
        let step = VECTORS * S::LANES;
        let mut at = 0;
        while at + step <= data.len() {
            for line in (0..step).step_by(16) {
                simd.prefetch(data, at + line + AHEAD / 4);
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: at + step <= the length.
                *sum = simd.mul_add(unsafe { simd.load(data, at + i * S::LANES) }, ones, *sum);
            }
            at += step;
        }
        let rest: f32 = data[at..].iter().sum();
        sums.iter().fold(rest, |total, &sum| total + simd.sum(sum, simd.splat(0.0)))
    }
}
