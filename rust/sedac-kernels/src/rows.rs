//! The few rows of a call: inputs widened once, outputs split into the parts that tasks write.

use std::sync::Mutex;

use crate::{element::Element, products::Inputs, team::Team};

/// All inputs as `f32`.
pub(crate) fn widened<T: Element>(x: &[T]) -> Vec<f32> {
    x.iter().map(|v| v.to_f32()).collect()
}

impl<'a, T, const N: usize> Inputs<'a, T, N> {
    /// N rows of equal length, each in both types.
    pub(crate) fn new(own: &'a [T], wide: &'a [f32]) -> Self {
        let length = own.len() / N;
        Self {
            own: std::array::from_fn(|n| &own[n * length..(n + 1) * length]),
            wide: std::array::from_fn(|n| &wide[n * length..(n + 1) * length]),
        }
    }
}

/// Parts of the outputs `[N][m]`: part i holds columns `i * width..` of all rows. Each part is locked by one task.
pub(crate) type Parts<'a, T, const N: usize> = Vec<Mutex<[&'a mut [T]; N]>>;

pub(crate) fn split_outputs<T, const N: usize>(y: &mut [T], width: usize) -> Parts<'_, T, N> {
    let length = y.len() / N;
    let mut rows = y.chunks_exact_mut(length.max(1));
    let mut parts: [_; N] = std::array::from_fn(|_| rows.next().unwrap_or_default().chunks_mut(width));
    (0..length.div_ceil(width))
        .map(|_| Mutex::new(std::array::from_fn(|n| parts[n].next().unwrap_or_default())))
        .collect()
}

/// Output elements that one task computes, at least: less is not worth handing out.
const LEAST_PER_TASK: usize = 32;
/// Tasks a thread, so that a thread that was held up leaves its share to others.
const TASKS_PER_THREAD: usize = 8;

/// How many of `outputs` rows of a weight one task computes.
pub(crate) fn tasks_of(outputs: usize, team: &dyn Team) -> usize {
    outputs.div_ceil(TASKS_PER_THREAD * team.threads()).next_multiple_of(LEAST_PER_TASK)
}
