//! The oracle of the law in whole numbers, and the check of what a device decided.
//!
//! The arithmetic is that of [`ParameterBlock`]'s page, token by token; a device must give these very numbers.

use crate::{
    error::check_length,
    parameter_block::{
        CheckpointParameters, ParameterBlock, PRODUCT_BITS, RISK_UNUSABLE, STATE_FAILED, STATE_LATCHED,
        STATE_SUNK, THRESHOLD_BITS,
    },
    resolution::{power_of_two, RISK_BEYOND},
    schedule::soft_exit_ratio,
    Error,
};

/// What a replayed log says; arrays are checkpoint after checkpoint, `[n_checkpoints * n_tokens]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// Logged levels that are not those of the law.
    pub mismatches: usize,
    /// Whether the exit holds, by the law.
    pub exited: Vec<bool>,
    /// Share of hidden units to skip, by the law.
    pub ratios: Vec<f32>,
}

impl ParameterBlock {
    /// Quantises risks: `floor(risk * 2^s)`, at most [`RISK_BEYOND`]; a negative risk reads as 0, a NaN or infinite
    /// one becomes [`RISK_UNUSABLE`].
    pub fn quantise(&self, checkpoint_idx: usize, risk: &[f32]) -> Result<Vec<i16>, Error> {
        let scale = power_of_two(self.checkpoint(checkpoint_idx)?.step_exponent) as f32;
        let quantised = |&risk: &f32| {
            if risk.is_finite() {
                (risk * scale).floor().clamp(0.0, f32::from(RISK_BEYOND)) as i16
            } else {
                RISK_UNUSABLE
            }
        };
        Ok(risk.iter().map(quantised).collect())
    }

    /// The least risk that is quantised to each value, NaN for an unusable one.
    pub fn dequantise(&self, checkpoint_idx: usize, risk_q: &[i16]) -> Result<Vec<f32>, Error> {
        let scale = power_of_two(-self.checkpoint(checkpoint_idx)?.step_exponent) as f32;
        let risk = |&q: &i16| if q < 0 { f32::NAN } else { f32::from(q) * scale };
        Ok(risk_q.iter().map(risk).collect())
    }

    /// Advances tokens over one checkpoint: their states (0 before the first one) in place; returns their levels.
    pub fn step(&self, checkpoint_idx: usize, states: &mut [i32], risk_q: &[i16]) -> Result<Vec<u8>, Error> {
        self.checkpoint(checkpoint_idx)?;
        check_length("risk_q", states.len(), risk_q.len())?;
        let advance = |(state, &q): (&mut i32, &i16)| {
            let (next, level) = self.advance(checkpoint_idx, *state, q);
            *state = next;
            level
        };
        Ok(states.iter_mut().zip(risk_q).map(advance).collect())
    }

    /// Decides logged passes again: `risk_q` and `levels` hold `n_tokens` values per checkpoint, checkpoint after
    /// checkpoint.
    pub fn replay(&self, risk_q: &[i16], levels: &[u8], n_tokens: usize) -> Result<Replay, Error> {
        let n_values = self.checkpoints.len().saturating_mul(n_tokens);
        check_length("risk_q", n_values, risk_q.len())?;
        check_length("levels", n_values, levels.len())?;
        let mut states = vec![0; n_tokens];
        let mut replay = Replay {
            mismatches: 0,
            exited: Vec::with_capacity(n_values),
            ratios: Vec::with_capacity(n_values),
        };
        let rows = risk_q.chunks(n_tokens.max(1)).zip(levels.chunks(n_tokens.max(1)));
        for (checkpoint_idx, (risk_q, levels)) in rows.enumerate() {
            for ((state, &q), &logged) in states.iter_mut().zip(risk_q).zip(levels) {
                let (next, level) = self.advance(checkpoint_idx, *state, q);
                *state = next;
                let exited = self.exited(checkpoint_idx, next);
                replay.mismatches += usize::from(level != logged);
                replay.exited.push(exited);
                replay.ratios.push(if exited { self.ratio(next) } else { 0.0 });
            }
        }
        Ok(replay)
    }

    fn checkpoint(&self, checkpoint_idx: usize) -> Result<&CheckpointParameters, Error> {
        let n_checkpoints = self.checkpoints.len();
        self.checkpoints
            .get(checkpoint_idx)
            .ok_or(Error::CheckpointIndex { n_checkpoints, got: checkpoint_idx })
    }

    /// One token over one checkpoint: its state and its level.
    fn advance(&self, checkpoint_idx: usize, state: i32, risk_q: i16) -> (i32, u8) {
        let parameters = &self.checkpoints[checkpoint_idx];
        let q = i64::from(risk_q);
        let distance = parameters.threshold - (q << THRESHOLD_BITS);
        let accumulated = (i64::from(state) * self.decay + distance * parameters.factor) >> PRODUCT_BITS;
        let sunk = q >= parameters.sinks_from || (state == STATE_SUNK && self.decay > 0);
        let confidence = if sunk { i64::from(STATE_SUNK) } else { accumulated };

        let failed = risk_q < 0 || state == STATE_FAILED;
        let exited = !failed && (confidence >= parameters.target || state == STATE_LATCHED);
        let reached = self.cut_points.iter().filter(|&&cut| confidence >= cut).count() as u8;
        let level = if exited { self.n_levels() - reached } else { self.n_levels() };
        let next = match exited {
            _ if failed => STATE_FAILED,
            true if !self.soft_exit => STATE_LATCHED,
            _ => confidence as i32,
        };
        (next, level)
    }

    /// Whether the exit holds in a state that this checkpoint left.
    fn exited(&self, checkpoint_idx: usize, state: i32) -> bool {
        state != STATE_FAILED && i64::from(state) >= self.checkpoints[checkpoint_idx].target
    }

    /// The skipped share of an exited token; a sunk one, whose C is unknown but low, skips nothing.
    fn ratio(&self, state: i32) -> f32 {
        match state {
            STATE_LATCHED => 1.0,
            STATE_SUNK => 0.0,
            _ => soft_exit_ratio((f64::from(state) * self.unit()) as f32),
        }
    }
}
