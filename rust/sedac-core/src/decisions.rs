//! What a whole batch of passes decided.

/// The cascade's answer for one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExitDecision {
    /// Whether the exit holds at the last checkpoint.
    pub should_exit: bool,
    /// `layer_idx` of the first checkpoint whose condition held, -1 if none did.
    pub exit_layer: i64,
    /// C after the last checkpoint.
    pub accumulated_confidence: f32,
    /// Share of FFN hidden units skipped after the last checkpoint.
    pub soft_exit_ratio: f32,
}

/// The answers for a batch, as arrays.
#[derive(Clone, Debug, PartialEq)]
pub struct Decisions {
    /// Per token: whether the exit holds at the last checkpoint.
    pub should_exit: Vec<bool>,
    /// Per token: `layer_idx` of the first checkpoint whose condition held, -1 if none did.
    pub exit_layer: Vec<i64>,
    /// Per token: C after the last checkpoint.
    pub accumulated_confidence: Vec<f32>,
    /// Share skipped after each checkpoint, row by row: `[n_checkpoints * n_tokens]`.
    pub ratios: Vec<f32>,
    /// The same as keep levels.
    pub levels: Vec<u8>,
}

impl Decisions {
    /// Number of tokens.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.should_exit.len()
    }

    /// Per token: the share skipped after the last checkpoint.
    #[must_use]
    pub fn soft_exit_ratio(&self) -> &[f32] {
        &self.ratios[self.ratios.len() - self.n_tokens()..]
    }

    /// One token's answer, None past the end.
    #[must_use]
    pub fn get(&self, token: usize) -> Option<ExitDecision> {
        Some(ExitDecision {
            should_exit: *self.should_exit.get(token)?,
            exit_layer: self.exit_layer[token],
            accumulated_confidence: self.accumulated_confidence[token],
            soft_exit_ratio: self.soft_exit_ratio()[token],
        })
    }
}
