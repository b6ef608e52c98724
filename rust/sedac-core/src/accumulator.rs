//! The law: one checkpoint's risks accumulated into confidence, exits and levels. It is written here and nowhere else.

use crate::{
    config::{CascadeConfig, MAX_CHECKPOINTS},
    schedule::{soft_exit_ratio, KeepLevels},
};

/// One checkpoint's confidence never falls below this, so that a huge risk cannot make C overflow.
pub const CONFIDENCE_FLOOR: f32 = -1e6;

/// Tokens that are advanced together: their confidences and levels stay in the first-level cache.
const BLOCK: usize = 1024;

const FAILED: u8 = 1;
const EXITED: u8 = 2;

/// The state of a batch's tokens, as parallel arrays.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    pub(crate) confidence: Vec<f32>,
    /// Place of the first checkpoint whose condition held, plus one; 0: none.
    first_exit: Vec<u8>,
    flags: Vec<u8>,
}

impl Tokens {
    /// The state before the first checkpoint; None where memory has no room.
    pub(crate) fn new(n_tokens: usize) -> Option<Self> {
        Some(Self {
            confidence: filled(0.0, n_tokens)?,
            first_exit: filled(0, n_tokens)?,
            flags: filled(0, n_tokens)?,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.flags.len()
    }

    /// `layer_idx` of the first checkpoint whose condition held, -1 if none did.
    pub(crate) fn exit_layer(&self, config: &CascadeConfig) -> Vec<i64> {
        let mut layers = [-1; MAX_CHECKPOINTS + 1];
        for (place, layer) in layers[1..].iter_mut().zip(config.layers()) {
            *place = i64::from(layer.layer_idx);
        }
        self.first_exit.iter().map(|&first| layers[usize::from(first)]).collect()
    }

    pub(crate) fn failed(&self) -> impl Iterator<Item = bool> + '_ {
        self.flags.iter().map(|flags| flags & FAILED != 0)
    }

    pub(crate) fn exited(&self) -> impl Iterator<Item = bool> + '_ {
        self.flags.iter().map(|flags| flags & EXITED != 0)
    }

    /// Confidence and flags of consecutive tokens, `size` at a time.
    pub(crate) fn chunks(&self, size: usize) -> impl Iterator<Item = (&[f32], &[u8])> {
        self.confidence.chunks(size).zip(self.flags.chunks(size))
    }

    /// Views of consecutive tokens, `size` at a time.
    pub(crate) fn chunks_mut(&mut self, size: usize) -> impl Iterator<Item = TokensMut<'_>> {
        let confidence = self.confidence.chunks_mut(size);
        let first_exit = self.first_exit.chunks_mut(size);
        let flags = self.flags.chunks_mut(size);
        confidence.zip(first_exit).zip(flags).map(|((confidence, first_exit), flags)| TokensMut {
            confidence,
            first_exit,
            flags,
        })
    }
}

fn filled<T: Clone>(value: T, len: usize) -> Option<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).ok()?;
    values.resize(len, value);
    Some(values)
}

/// Consecutive tokens of a batch.
pub(crate) struct TokensMut<'a> {
    confidence: &'a mut [f32],
    first_exit: &'a mut [u8],
    flags: &'a mut [u8],
}

impl TokensMut<'_> {
    /// The skipped share of each token, written to `ratios`.
    pub(crate) fn write_ratios(&self, soft_exit: bool, ratios: &mut [f32]) {
        write_ratios(soft_exit, self.confidence, self.flags, ratios);
    }
}

/// The skipped share of each token, written to `ratios`. All slices have one length.
pub(crate) fn write_ratios(soft_exit: bool, confidence: &[f32], flags: &[u8], ratios: &mut [f32]) {
    for ((ratio, &c), flags) in ratios.iter_mut().zip(confidence).zip(flags) {
        *ratio = match flags & EXITED != 0 {
            true if soft_exit => soft_exit_ratio(c),
            true => 1.0,
            false => 0.0,
        };
    }
}

/// One checkpoint of the law, with its threshold as read for this step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step<'a> {
    keep_levels: &'a KeepLevels,
    soft_exit: bool,
    decay: f32,
    weight: f32,
    target: f32,
    mark: u8,
    threshold: f32,
}

impl<'a> Step<'a> {
    pub(crate) fn new(config: &'a CascadeConfig, checkpoint_idx: usize, threshold: f32) -> Self {
        let layer = &config.layers()[checkpoint_idx];
        Self {
            keep_levels: config.keep_levels(),
            soft_exit: config.soft_exit(),
            decay: config.confidence_decay(),
            weight: layer.confidence_weight,
            target: layer.target_exit_rate,
            mark: checkpoint_idx as u8 + 1,
            threshold,
        }
    }

    /// Advances the tokens over this checkpoint and writes their levels. All slices have one length.
    pub(crate) fn advance(&self, risk: &[f32], tokens: &mut TokensMut<'_>, levels: &mut [u8]) {
        let blocks = risk
            .chunks(BLOCK)
            .zip(tokens.confidence.chunks_mut(BLOCK))
            .zip(tokens.first_exit.chunks_mut(BLOCK))
            .zip(tokens.flags.chunks_mut(BLOCK))
            .zip(levels.chunks_mut(BLOCK));
        for ((((risk, confidence), first_exit), flags), levels) in blocks {
            self.accumulate(risk, confidence, first_exit, flags);
            if self.soft_exit {
                self.keep_levels.assign(confidence, levels);
            } else {
                levels.fill(0);
            }
            let full = self.keep_levels.n_levels();
            for (level, flags) in levels.iter_mut().zip(&*flags) {
                *level = if flags & EXITED != 0 { *level } else { full };
            }
        }
    }

    fn accumulate(&self, risk: &[f32], confidence: &mut [f32], first_exit: &mut [u8], flags: &mut [u8]) {
        let Self { soft_exit, decay, weight, target, mark, threshold, .. } = *self;
        let latches = if soft_exit { 0 } else { EXITED };
        for (((&risk, c), first), flags) in risk.iter().zip(confidence).zip(first_exit).zip(flags) {
            let live = risk.is_finite() & (*flags & FAILED == 0);
            let risk = if risk > 0.0 { risk } else { 0.0 };
            let local = (threshold - risk) / threshold;
            let local = if local > CONFIDENCE_FLOOR { local } else { CONFIDENCE_FLOOR };
            let accumulated = decay * *c + weight * local;
            *c = if live { accumulated } else { *c };
            let held = live & (*c >= target);
            let exited = held | (live & (*flags & latches != 0));
            *first = if held & (*first == 0) { mark } else { *first };
            *flags = (u8::from(!live) * FAILED) | (u8::from(exited) * EXITED);
        }
    }
}
