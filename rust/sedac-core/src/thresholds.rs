//! Thresholds shared by every pass of a controller: lock-free, and no update is ever lost.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// No threshold is ever lower, so that the law's division stays meaningful.
pub const THRESHOLD_FLOOR: f32 = 1e-6;

/// One f32 per checkpoint, kept as bits in an atomic word.
///
/// Relaxed ordering suffices: each threshold stands for itself and publishes no other memory.
#[derive(Debug)]
pub(crate) struct Thresholds(Vec<AtomicU32>);

impl Thresholds {
    pub(crate) fn new(initial: impl Iterator<Item = f32>) -> Self {
        Self(initial.map(|value| AtomicU32::new(value.to_bits())).collect())
    }

    pub(crate) fn get(&self, checkpoint_idx: usize) -> f32 {
        f32::from_bits(self.0[checkpoint_idx].load(Relaxed))
    }

    pub(crate) fn set(&self, checkpoint_idx: usize, value: f32) {
        self.0[checkpoint_idx].store(value.to_bits(), Relaxed);
    }

    pub(crate) fn to_vec(&self) -> Vec<f32> {
        (0..self.0.len()).map(|i| self.get(i)).collect()
    }

    /// `tau <- max((1 - alpha) * tau + alpha * aim, floor)`; returns the new threshold.
    ///
    /// A load followed by a store would lose what another thread wrote in between; the exchange below succeeds only
    /// where the threshold still is the one that the new value was made from.
    pub(crate) fn blend(&self, checkpoint_idx: usize, alpha: f32, aim: f32) -> f32 {
        let cell = &self.0[checkpoint_idx];
        let mut seen = cell.load(Relaxed);
        loop {
            let blended = (1.0 - alpha) * f32::from_bits(seen) + alpha * aim;
            let new = if blended > THRESHOLD_FLOOR { blended } else { THRESHOLD_FLOOR };
            match cell.compare_exchange_weak(seen, new.to_bits(), Relaxed, Relaxed) {
                Ok(_) => return new,
                Err(now) => seen = now,
            }
        }
    }
}

/// Quantile of the finite samples by linear interpolation in f64, rounded to f32 once; None without finite samples.
///
/// NaN and infinite samples are dropped: a failed probe is no evidence about risk.
pub(crate) fn quantile(samples: &[f32], quantile: f64) -> Option<f32> {
    let mut finite: Vec<f32> = samples.iter().copied().filter(|sample| sample.is_finite()).collect();
    let last = finite.len().checked_sub(1)?;
    let position = last as f64 * quantile;
    let below = position.floor();
    #[allow(clippy::cast_sign_loss)] // 0 <= below <= last
    let (_, &mut low, above) = finite.select_nth_unstable_by(below as usize, f32::total_cmp);
    let high = above.iter().copied().min_by(f32::total_cmp).unwrap_or(low);
    Some((f64::from(low) + (f64::from(high) - f64::from(low)) * (position - below)) as f32)
}
