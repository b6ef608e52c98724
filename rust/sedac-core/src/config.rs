//! Checkpoints and settings of a cascade, validated when built.

use crate::{schedule::KeepLevels, thresholds::THRESHOLD_FLOOR, Error};

/// No confidence weight is higher, so that C stays finite (and `0 * C` stays 0) over any cascade.
pub const WEIGHT_CEILING: f32 = 1e6;

/// Most checkpoints of a cascade: a token's first exit is kept in a byte.
pub const MAX_CHECKPOINTS: usize = 255;

/// One checkpoint of the cascade.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerConfig {
    /// Decoder layer after which the probe reads the hidden state.
    pub layer_idx: u32,
    /// A token exits where its confidence is at least this; finite.
    pub target_exit_rate: f32,
    /// Risk at which the confidence is 0; finite, at least [`THRESHOLD_FLOOR`].
    pub initial_threshold: f32,
    /// Weight of this checkpoint's confidence; 0 to [`WEIGHT_CEILING`].
    pub confidence_weight: f32,
    /// Quantile of the risks that threshold updates follow; in \[0, 1\].
    pub quantile: f64,
}

impl LayerConfig {
    /// A checkpoint whose threshold updates follow the target, clipped to \[0, 1\].
    #[must_use]
    pub fn new(
        layer_idx: u32,
        target_exit_rate: f32,
        initial_threshold: f32,
        confidence_weight: f32,
    ) -> Self {
        let quantile = f64::from(target_exit_rate).clamp(0.0, 1.0);
        Self { layer_idx, target_exit_rate, initial_threshold, confidence_weight, quantile }
    }

    fn check(&self, place: usize) -> Result<(), Error> {
        let field = |name: &str| format!("layer_configs[{place}].{name}");
        if !self.target_exit_rate.is_finite() {
            return Err(Error::out_of_range(field("target_exit_rate"), "finite", self.target_exit_rate));
        }
        check_threshold(|| field("initial_threshold"), self.initial_threshold)?;
        if !(0.0..=WEIGHT_CEILING).contains(&self.confidence_weight) {
            let must = "0 to 1e6";
            return Err(Error::out_of_range(field("confidence_weight"), must, self.confidence_weight));
        }
        check_unit_interval(|| field("quantile"), self.quantile)
    }
}

/// A validated cascade: checkpoints in layer order, and the settings of the law.
#[derive(Clone, Debug)]
pub struct CascadeConfig {
    layers: Vec<LayerConfig>,
    alpha: f32,
    confidence_decay: f32,
    soft_exit: bool,
    keep_levels: KeepLevels,
}

impl CascadeConfig {
    /// A cascade with the default settings: alpha 0.1, decay 0.9, soft exit, 8 keep levels.
    pub fn new(layers: Vec<LayerConfig>) -> Result<Self, Error> {
        if layers.is_empty() {
            return Err(Error::NoCheckpoints);
        }
        if layers.len() > MAX_CHECKPOINTS {
            return Err(Error::TooManyCheckpoints { got: layers.len() });
        }
        for (place, layer) in layers.iter().enumerate() {
            layer.check(place)?;
            if place > 0 && layer.layer_idx <= layers[place - 1].layer_idx {
                let previous = layers[place - 1].layer_idx;
                return Err(Error::LayerOrder { place, previous, got: layer.layer_idx });
            }
        }
        let keep_levels = KeepLevels::new(8)?;
        Ok(Self { layers, alpha: 0.1, confidence_decay: 0.9, soft_exit: true, keep_levels })
    }

    /// Weight of the new quantile in threshold updates, in \[0, 1\].
    pub fn with_alpha(self, alpha: f32) -> Result<Self, Error> {
        check_unit_interval(|| "alpha".into(), alpha)?;
        Ok(Self { alpha, ..self })
    }

    /// The law's gamma, in \[0, 1\].
    pub fn with_confidence_decay(self, confidence_decay: f32) -> Result<Self, Error> {
        check_unit_interval(|| "confidence_decay".into(), confidence_decay)?;
        Ok(Self { confidence_decay, ..self })
    }

    /// Graded ratio, or (false) exits that skip the whole FFN and latch.
    #[must_use]
    pub fn with_soft_exit(self, soft_exit: bool) -> Self {
        Self { soft_exit, ..self }
    }

    /// Number of keep levels, 2 to [`MAX_LEVELS`](crate::MAX_LEVELS).
    pub fn with_n_levels(self, n_levels: u8) -> Result<Self, Error> {
        Ok(Self { keep_levels: KeepLevels::new(n_levels)?, ..self })
    }

    /// The checkpoints, in layer order.
    #[must_use]
    pub fn layers(&self) -> &[LayerConfig] {
        &self.layers
    }

    /// Number of checkpoints.
    #[must_use]
    pub fn n_checkpoints(&self) -> usize {
        self.layers.len()
    }

    /// Weight of the new quantile in threshold updates.
    #[must_use]
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// The law's gamma.
    #[must_use]
    pub fn confidence_decay(&self) -> f32 {
        self.confidence_decay
    }

    /// Whether exits are graded.
    #[must_use]
    pub fn soft_exit(&self) -> bool {
        self.soft_exit
    }

    /// The keep levels and their cut points.
    #[must_use]
    pub fn keep_levels(&self) -> &KeepLevels {
        &self.keep_levels
    }
}

pub(crate) fn check_threshold(field: impl FnOnce() -> String, value: f32) -> Result<(), Error> {
    if (THRESHOLD_FLOOR..f32::INFINITY).contains(&value) {
        return Ok(());
    }
    Err(Error::out_of_range(field(), "finite and at least 1e-6", value))
}

pub(crate) fn check_unit_interval(
    field: impl FnOnce() -> String,
    value: impl Into<f64>,
) -> Result<(), Error> {
    let value = value.into();
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::out_of_range(field(), "in [0, 1]", value))
}
