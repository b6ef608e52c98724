//! The few rows of a call: inputs widened once, outputs split into the parts that tasks write.

use std::sync::Mutex;

use crate::{
    arch::{Isa, Kernel, Simd},
    element::Element,
    groups::piece_of,
    products::Inputs,
    team::Team,
};

/// All inputs as `f32`.
pub(crate) fn widened<T: Element>(isa: Isa, x: &[T]) -> Vec<f32> {
    let mut wide = vec![0.0; x.len()];
    isa.run(Widen { from: x, to: &mut wide });
    wide
}

struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Element> Kernel for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    #[allow(unsafe_code)] // element by element, a row of `f16` took as long as the rest of what runs on one thread
    fn run<S: Simd>(self, simd: S) {
        let Self { from, to } = self;
        assert_eq!(from.len(), to.len());
        let whole = from.len() / S::LANES * S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            // SAFETY: k + LANES <= whole <= the length of both.
            unsafe { simd.store(T::load(simd, from, k), to, k) };
        }
        for (wide, v) in to[whole..].iter_mut().zip(&from[whole..]) {
            *wide = v.to_f32();
        }
    }
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

/// How many of `outputs` rows of a weight, of so many bytes each, one task computes for this number of groups.
pub(crate) fn tasks_of(outputs: usize, team: &dyn Team, groups: usize, row_bytes: usize) -> usize {
    if groups > 1 {
        return piece_of(row_bytes);
    }
    let even = outputs.div_ceil(TASKS_PER_THREAD * team.threads());
    even.next_multiple_of(LEAST_PER_TASK).max(LEAST_PER_TASK)
}
