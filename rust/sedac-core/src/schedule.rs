//! The finite set of keep levels, and the confidences at which a token reaches them.

use crate::Error;

/// Most keep levels that a cascade may have.
pub const MAX_LEVELS: u8 = 64;

/// Keep levels 0..=n: level `l` keeps `l / n` of the hidden units; n keeps all, 0 exists for hard exits only.
///
/// A soft exit's keep is rounded *up* to a level. Since `1 - ratio = 1 / (1 + exp(4C - 2))` falls as C rises, a token
/// reaches level `m` or below where `C >= cut(m) = 0.5 + 0.25 ln((n - m) / m)`. The cut points are computed once in
/// f64 and rounded to f32, so that no engine needs tanh to decide.
#[derive(Clone, Debug, PartialEq)]
pub struct KeepLevels {
    n_levels: u8,
    cut_points: Vec<f32>,
}

impl KeepLevels {
    /// Keep levels 0..=`n_levels`, 2 to [`MAX_LEVELS`].
    pub fn new(n_levels: u8) -> Result<Self, Error> {
        if !(2..=MAX_LEVELS).contains(&n_levels) {
            return Err(Error::out_of_range("n_levels", "2 to 64", n_levels));
        }
        let cut = |m: u8| (0.5 + 0.25 * (f64::from(n_levels - m) / f64::from(m)).ln()) as f32;
        let cut_points = std::iter::once(f32::INFINITY).chain((1..n_levels).map(cut)).collect();
        Ok(Self { n_levels, cut_points })
    }

    /// The full level.
    #[must_use]
    pub fn n_levels(&self) -> u8 {
        self.n_levels
    }

    /// `cut_points()[m]`: C from which a soft exit reaches level `m`; descending, the first is infinite.
    #[must_use]
    pub fn cut_points(&self) -> &[f32] {
        &self.cut_points
    }

    /// Levels of soft exits at these confidences, written to `levels`.
    ///
    /// One comparison per level and token, level by level, so that the inner loop can run in vector registers.
    pub(crate) fn assign(&self, confidence: &[f32], levels: &mut [u8]) {
        levels.fill(self.n_levels);
        for &cut in &self.cut_points[1..] {
            for (level, &c) in levels.iter_mut().zip(confidence) {
                *level -= u8::from(c >= cut);
            }
        }
    }
}

/// The share of hidden units that a soft exit at confidence `c` skips.
pub(crate) fn soft_exit_ratio(c: f32) -> f32 {
    0.5 * (2.0 * c - 1.0).tanh() + 0.5
}
