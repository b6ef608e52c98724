//! The state of one forward pass.

use std::sync::Arc;

use crate::{
    accumulator::{write_ratios, Tokens},
    config::CascadeConfig,
    parallel,
};

/// One forward pass over a batch: owned by the caller, advanced by [`step`](crate::CascadeController::step).
#[derive(Clone, Debug)]
pub struct ForwardPass {
    pub(crate) config: Arc<CascadeConfig>,
    pub(crate) next_checkpoint: usize,
    pub(crate) tokens: Tokens,
}

impl ForwardPass {
    /// Number of tokens.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The checkpoint that the next step must name.
    #[must_use]
    pub fn next_checkpoint(&self) -> usize {
        self.next_checkpoint
    }

    /// C of each token as of the last step.
    #[must_use]
    pub fn confidence(&self) -> &[f32] {
        &self.tokens.confidence
    }

    /// `layer_idx` of the first checkpoint whose condition held, -1 if none did.
    #[must_use]
    pub fn exit_layer(&self) -> Vec<i64> {
        self.tokens.exit_layer(&self.config)
    }

    /// Whether the exit holds as of the last step.
    #[must_use]
    pub fn exited(&self) -> Vec<bool> {
        self.tokens.exited().collect()
    }

    /// Whether a risk of this pass was NaN or infinite.
    #[must_use]
    pub fn failed(&self) -> Vec<bool> {
        self.tokens.failed().collect()
    }

    /// Share of hidden units skipped as of the last step; computed here, because levels do not need it.
    #[must_use]
    pub fn ratio(&self) -> Vec<f32> {
        let mut ratios = vec![0.0; self.n_tokens()];
        let chunks = self.tokens.chunks(parallel::CHUNK).zip(ratios.chunks_mut(parallel::CHUNK));
        parallel::for_each(chunks, self.n_tokens(), |((confidence, flags), ratios)| {
            write_ratios(self.config.soft_exit(), confidence, flags, ratios);
        });
        ratios
    }
}
