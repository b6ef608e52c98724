//! Reading memory and nothing else: the floor that decode kernels are measured against.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};

use crate::{
    arch::{Isa, Kernel, Simd},
    matrix::Matrix,
    runs::RUNS,
    team::Team,
};

/// Numbers that one task reads.
const PER_TASK: usize = 1 << 16;
/// How far ahead, in bytes, each run is asked for; the best of 1024, 2048 and 4096 on an AMD EPYC (Zen 3).
const AHEAD: usize = 1024;
/// Runs of memory that a task reads at once; one run gave 25 GB/s where four gave 34 (Zen 3, two threads).
const STREAMS: usize = 4;
/// Tasks that rows are shared out as.
const TASKS_OF_ROWS: usize = 32;

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

/// The sum of some rows of matrices, row by row in all of them, as fast as the team can read rows that lie apart.
///
/// # Panics
///
/// If a matrix has no such row.
pub fn read_rows(isa: Isa, team: &dyn Team, matrices: &[Matrix<'_, f32>], rows: &[u32]) -> f32 {
    let per_task = rows.len().div_ceil(TASKS_OF_ROWS).max(1);
    let total = AtomicU32::new(0);
    team.run(rows.len().div_ceil(per_task), &|task| {
        let (from, to) = (task * per_task, rows.len().min((task + 1) * per_task));
        total.store(isa.run(SumRows { matrices, rows: &rows[from..to] }).to_bits(), Ordering::Relaxed);
    });
    f32::from_bits(total.into_inner())
}

struct SumRows<'a> {
    matrices: &'a [Matrix<'a, f32>],
    rows: &'a [u32],
}

impl Kernel for SumRows<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let each = self.rows.len() / RUNS;
        let mut total = 0.0;
        for i in 0..each {
            for matrix in self.matrices {
                // The next rows of the same matrix: what is in between takes longer than memory to answer.
                let row = |i: usize, r: usize| matrix.row(self.rows[r * each + i.min(each - 1)] as usize);
                let rows: [&[f32]; RUNS] = std::array::from_fn(|r| row(i, r));
                total += sum_of(simd, rows, std::array::from_fn(|r| row(i + 1, r)));
            }
        }
        for &row in &self.rows[RUNS * each..] {
            for matrix in self.matrices {
                let row = matrix.row(row as usize);
                total += sum_of(simd, [row], [row]);
            }
        }
        total
    }
}

/// The sum of rows of one length; `next` are asked for meanwhile.
#[inline(always)]
fn sum_of<S: Simd, const R: usize>(simd: S, rows: [&[f32]; R], next: [&[f32]; R]) -> f32 {
    let (ones, zero) = (simd.splat(1.0), simd.splat(0.0));
    let (mut sums, step) = ([[zero; 2]; R], 2 * S::LANES);
    let length = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == length));
    let whole = length / step * step;
    let mut at = 0;
    while at < whole {
        for r in 0..R {
            simd.prefetch(next[r], at);
            // SAFETY: at + step <= whole <= the row's length.
            unsafe {
                sums[r][0] = simd.mul_add(simd.load(rows[r], at), ones, sums[r][0]);
                sums[r][1] = simd.mul_add(simd.load(rows[r], at + S::LANES), ones, sums[r][1]);
            }
        }
        at += step;
    }
    let rest: f32 = rows.iter().flat_map(|row| &row[whole..]).sum();
    sums.iter().fold(rest, |total, sums| total + simd.sum(sums[0], sums[1]))
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let data = self.0;
        let ones = simd.splat(1.0);
        let step = 2 * S::LANES;
        // Several runs at once: memory serves them faster than one.
        let length = data.len() / STREAMS / step * step;
        let runs: [&[f32]; STREAMS] = std::array::from_fn(|i| &data[i * length..][..length]);
        let mut sums = [[simd.splat(0.0); 2]; STREAMS];
        let mut at = 0;
        while at < length {
            for (run, sums) in runs.iter().zip(&mut sums) {
                simd.prefetch(run, at + AHEAD / 4);
                // SAFETY: at + step <= length, which is the run's.
                unsafe {
                    sums[0] = simd.mul_add(simd.load(run, at), ones, sums[0]);
                    sums[1] = simd.mul_add(simd.load(run, at + S::LANES), ones, sums[1]);
                }
            }
            at += step;
        }
        let rest: f32 = data[STREAMS * length..].iter().sum();
        sums.iter().fold(rest, |total, sums| total + simd.sum(sums[0], sums[1]))
    }
}
