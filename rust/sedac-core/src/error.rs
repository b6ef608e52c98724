//! What can be wrong with a configuration or a call.

/// Every error of this crate; the message says what must hold and what was got.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A cascade without checkpoints.
    #[error("`layer_configs` must hold at least one checkpoint, got none")]
    NoCheckpoints,
    /// A cascade of more checkpoints than [`MAX_CHECKPOINTS`](crate::MAX_CHECKPOINTS).
    #[error("`layer_configs` must hold at most 255 checkpoints, got {got}")]
    TooManyCheckpoints {
        /// Checkpoints given.
        got: usize,
    },
    /// Checkpoints that are not in layer order, or the same layer twice.
    #[error("`layer_configs[{place}].layer_idx` must be above the one before it ({previous}), got {got}")]
    LayerOrder {
        /// Place in the list.
        place: usize,
        /// `layer_idx` of the checkpoint before.
        previous: u32,
        /// `layer_idx` of this one.
        got: u32,
    },
    /// A number outside its range.
    #[error("`{field}` must be {must}, got {got}")]
    OutOfRange {
        /// The field, with its place where it is one of a list.
        field: String,
        /// What must hold.
        must: &'static str,
        /// The value.
        got: f64,
    },
    /// A slice of the wrong length.
    #[error("`{name}` must have {expected} values, got {got}")]
    Length {
        /// The argument.
        name: &'static str,
        /// Its length as it must be.
        expected: usize,
        /// Its length as it is.
        got: usize,
    },
    /// A checkpoint out of order, or one more than the cascade has.
    #[error("`checkpoint_idx` must come in order: expected {expected} of {n_checkpoints}, got {got}")]
    CheckpointOrder {
        /// The next checkpoint of the pass; `n_checkpoints` where the pass is over.
        expected: usize,
        /// Checkpoints of the cascade.
        n_checkpoints: usize,
        /// The checkpoint named.
        got: usize,
    },
    /// A checkpoint that the cascade does not have.
    #[error("`checkpoint_idx` must be below {n_checkpoints}, got {got}")]
    CheckpointIndex {
        /// Checkpoints of the cascade.
        n_checkpoints: usize,
        /// The checkpoint named.
        got: usize,
    },
    /// A pass that another controller began.
    #[error("the pass must come from `begin` of this very controller")]
    ForeignPass,
    /// A level above the number of levels.
    #[error("`levels` must be 0..{n_levels}, got {got}")]
    Level {
        /// Levels of the cascade.
        n_levels: u8,
        /// The highest level found.
        got: u8,
    },
    /// More tokens than memory has room for.
    #[error("no memory for a pass over {n_tokens} tokens")]
    TooManyTokens {
        /// Tokens asked for.
        n_tokens: usize,
    },
}

impl Error {
    pub(crate) fn out_of_range(field: impl Into<String>, must: &'static str, got: impl Into<f64>) -> Self {
        Self::OutOfRange { field: field.into(), must, got: got.into() }
    }
}

/// An error unless `got` values are `expected`.
pub(crate) fn check_length(name: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Length { name, expected, got })
}
