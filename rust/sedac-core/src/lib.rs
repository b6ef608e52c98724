//! The cascade of SEDAC: risks at a few checkpoint layers in, a keep level per token out.
//!
//! Small probes predict at each *checkpoint layer* how much a token's output would suffer if the FFNs after it were
//! cut. [`CascadeController`] accumulates *confidence* over the checkpoints and answers, per token, with the *ratio*
//! of FFN hidden units to skip, given as one of a few keep *levels*. This crate knows no Python and no tensors.
//!
//! # Key types
//!
//! - [`CascadeConfig`]: checkpoints and settings, validated when built; [`LayerConfig`] is one checkpoint.
//! - [`CascadeController`]: the law and the shared, atomic thresholds.
//! - [`ForwardPass`]: the state of one pass over a batch; any number may be alive at once.
//! - [`LevelPlan`]: a batch sorted by level.
//! - [`ParameterBlock`]: the law in whole numbers, for devices that cannot ask the host; with its oracle.
//! - [`StripPlanner`]: where to cut the products of a sorted batch, by a [`CostGrid`] of measured times.
//!
//! # Usage, and what each step costs
//!
//! 1. Build a controller once (microseconds).
//! 2. [`begin`](CascadeController::begin) a pass: one allocation of 6 bytes per token.
//! 3. [`step`](CascadeController::step) at each checkpoint: about 2 ns per token on one core, no tanh.
//! 4. [`plan`](CascadeController::plan) the batch: about 4 ns per token.
//! 5. Ask a [`StripPlanner`] once per stretch and set of widths: a few microseconds.
//! 6. Optionally [`update_threshold`](CascadeController::update_threshold): a selection over the samples and one
//!    compare-exchange.
//!
//! ```
//! use sedac_core::{CascadeConfig, CascadeController, LayerConfig};
//!
//! let config = CascadeConfig::new(vec![
//!     LayerConfig::new(3, 0.2, 0.8, 0.3),
//!     LayerConfig::new(6, 0.5, 1.0, 0.4),
//! ])?;
//! let controller = CascadeController::new(config);
//! let mut pass = controller.begin(2)?;
//! let levels = controller.step(&mut pass, 0, &[0.0, f32::NAN])?;
//! assert_eq!(levels, [6, 8]); // the first token keeps 6/8 of the units; a risk that is no number keeps them all
//! # Ok::<(), sedac_core::Error>(())
//! ```
#![forbid(unsafe_code)]

mod accumulator;
mod config;
mod controller;
mod costs;
mod decisions;
mod error;
mod parallel;
mod parameter_block;
mod pass;
mod plan;
mod resolution;
mod schedule;
mod strips;
mod thresholds;
mod twin;

pub use accumulator::CONFIDENCE_FLOOR;
pub use config::{CascadeConfig, LayerConfig, MAX_CHECKPOINTS, WEIGHT_CEILING};
pub use controller::CascadeController;
pub use costs::CostGrid;
pub use decisions::{Decisions, ExitDecision};
pub use error::Error;
pub use parameter_block::{
    CheckpointParameters, ParameterBlock, RISK_UNUSABLE, STATE_FAILED, STATE_LATCHED, STATE_SUNK,
};
pub use pass::ForwardPass;
pub use plan::LevelPlan;
pub use resolution::{RISK_BEYOND, RISK_BITS};
pub use schedule::{KeepLevels, MAX_LEVELS};
pub use strips::{RowGroup, Strip, StripPlanner, WORTH_A_CHANGE};
pub use thresholds::THRESHOLD_FLOOR;
pub use twin::Replay;
