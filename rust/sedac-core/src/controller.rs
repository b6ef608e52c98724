//! The controller: the law over a configuration and its shared thresholds.

use std::sync::Arc;

use crate::{
    accumulator::{Step, Tokens},
    config::{check_threshold, check_unit_interval, CascadeConfig},
    decisions::Decisions,
    error::check_length,
    parallel,
    parameter_block::ParameterBlock,
    pass::ForwardPass,
    plan::LevelPlan,
    thresholds::{quantile, Thresholds},
    Error,
};

/// Turns risks into levels. Shared by reference between threads; see the crate's page for the law's steps.
#[derive(Debug)]
pub struct CascadeController {
    config: Arc<CascadeConfig>,
    thresholds: Thresholds,
}

impl CascadeController {
    /// A controller with the configuration's initial thresholds.
    #[must_use]
    pub fn new(config: CascadeConfig) -> Self {
        let thresholds = Thresholds::new(config.layers().iter().map(|layer| layer.initial_threshold));
        Self { config: Arc::new(config), thresholds }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &CascadeConfig {
        &self.config
    }

    /// The thresholds now.
    #[must_use]
    pub fn thresholds(&self) -> Vec<f32> {
        self.thresholds.to_vec()
    }

    /// Replaces all thresholds, or none where one is out of range.
    pub fn set_thresholds(&self, values: &[f32]) -> Result<(), Error> {
        check_length("values", self.config.n_checkpoints(), values.len())?;
        for (i, &value) in values.iter().enumerate() {
            check_threshold(|| format!("values[{i}]"), value)?;
        }
        for (i, &value) in values.iter().enumerate() {
            self.thresholds.set(i, value);
        }
        Ok(())
    }

    /// Moves one threshold towards a quantile of observed risks; returns the threshold after the update.
    ///
    /// `quantile` defaults to the checkpoint's own. NaN and infinite samples are dropped; with none left the threshold
    /// stays. Lossless under concurrent callers.
    pub fn update_threshold(
        &self,
        checkpoint_idx: usize,
        samples: &[f32],
        q: Option<f64>,
    ) -> Result<f32, Error> {
        let layers = self.config.layers();
        let n_checkpoints = layers.len();
        let layer = layers
            .get(checkpoint_idx)
            .ok_or(Error::CheckpointIndex { n_checkpoints, got: checkpoint_idx })?;
        let q = q.unwrap_or(layer.quantile);
        check_unit_interval(|| "quantile".into(), q)?;
        Ok(match quantile(samples, q) {
            Some(aim) => self.thresholds.blend(checkpoint_idx, self.config.alpha(), aim),
            None => self.thresholds.get(checkpoint_idx),
        })
    }

    /// Starts a pass over `n_tokens` tokens.
    pub fn begin(&self, n_tokens: usize) -> Result<ForwardPass, Error> {
        let tokens = Tokens::new(n_tokens).ok_or(Error::TooManyTokens { n_tokens })?;
        Ok(ForwardPass { config: Arc::clone(&self.config), next_checkpoint: 0, tokens })
    }

    /// Whether this controller began the pass.
    #[must_use]
    pub fn owns(&self, pass: &ForwardPass) -> bool {
        Arc::ptr_eq(&self.config, &pass.config)
    }

    /// Advances a pass over one checkpoint and returns the level of each token. On an error the pass is as it was.
    pub fn step(
        &self,
        pass: &mut ForwardPass,
        checkpoint_idx: usize,
        risk: &[f32],
    ) -> Result<Vec<u8>, Error> {
        if !self.owns(pass) {
            return Err(Error::ForeignPass);
        }
        let n_checkpoints = self.config.n_checkpoints();
        let expected = pass.next_checkpoint;
        if checkpoint_idx != expected || expected >= n_checkpoints {
            return Err(Error::CheckpointOrder { expected, n_checkpoints, got: checkpoint_idx });
        }
        check_length("risk", pass.n_tokens(), risk.len())?;
        let step = Step::new(&self.config, checkpoint_idx, self.thresholds.get(checkpoint_idx));
        let mut levels = vec![0; risk.len()];
        let chunks = risk
            .chunks(parallel::CHUNK)
            .zip(pass.tokens.chunks_mut(parallel::CHUNK))
            .zip(levels.chunks_mut(parallel::CHUNK));
        parallel::for_each(chunks, risk.len(), |((risk, mut tokens), levels)| {
            step.advance(risk, &mut tokens, levels);
        });
        pass.next_checkpoint += 1;
        Ok(levels)
    }

    /// Decides whole passes: `risk` holds `n_tokens` values per checkpoint, checkpoint after checkpoint.
    ///
    /// The same as stepping through a pass, with the thresholds read once, at the start.
    pub fn evaluate_batch(&self, risk: &[f32], n_tokens: usize) -> Result<Decisions, Error> {
        let n_checkpoints = self.config.n_checkpoints();
        check_length("risk", n_checkpoints.saturating_mul(n_tokens), risk.len())?;
        let mut tokens = Tokens::new(n_tokens).ok_or(Error::TooManyTokens { n_tokens })?;
        let mut ratios = vec![0.0; risk.len()];
        let mut levels = vec![0; risk.len()];
        let steps: Vec<Step> =
            (0..n_checkpoints).map(|i| Step::new(&self.config, i, self.thresholds.get(i))).collect();

        let risk_chunks = chunks_of_rows(risk.chunks(n_tokens.max(1)).map(|row| row.chunks(parallel::CHUNK)));
        let ratio_chunks =
            chunks_of_rows(ratios.chunks_mut(n_tokens.max(1)).map(|row| row.chunks_mut(parallel::CHUNK)));
        let level_chunks =
            chunks_of_rows(levels.chunks_mut(n_tokens.max(1)).map(|row| row.chunks_mut(parallel::CHUNK)));
        let chunks = tokens.chunks_mut(parallel::CHUNK).zip(risk_chunks).zip(ratio_chunks).zip(level_chunks);
        parallel::for_each(chunks, risk.len(), |(((mut tokens, risk), ratios), levels)| {
            for (((step, risk), ratios), levels) in steps.iter().zip(risk).zip(ratios).zip(levels) {
                step.advance(risk, &mut tokens, levels);
                tokens.write_ratios(self.config.soft_exit(), ratios);
            }
        });
        Ok(Decisions {
            should_exit: tokens.exited().collect(),
            exit_layer: tokens.exit_layer(&self.config),
            accumulated_confidence: tokens.confidence,
            ratios,
            levels,
        })
    }

    /// The law with the thresholds of this moment, in whole numbers, for a device to run.
    #[must_use]
    pub fn parameter_block(&self) -> ParameterBlock {
        ParameterBlock::new(&self.config, &self.thresholds())
    }

    /// Sorts a batch by level.
    pub fn plan(&self, levels: &[u8]) -> Result<LevelPlan, Error> {
        LevelPlan::new(levels, self.config.keep_levels().n_levels())
    }
}

/// Chunks of several rows, turned about: the first chunk of every row, then the second, ...
fn chunks_of_rows<C: Iterator>(rows: impl Iterator<Item = C>) -> impl Iterator<Item = Vec<C::Item>> {
    let mut rows: Vec<C> = rows.collect();
    std::iter::from_fn(move || rows.iter_mut().map(Iterator::next).collect())
}
