//! What can be wrong with a call.

/// A call that does not fit its matrices.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A slice or a matrix has the wrong size.
    #[error("`{what}` must have {wanted}, got {got}")]
    Size {
        /// The argument.
        what: &'static str,
        /// What it must hold.
        wanted: String,
        /// What it holds.
        got: String,
    },
    /// More rows than the kernels run, or none.
    #[error("a call must have 1 to {max} rows, got {got}", max = crate::MAX_ROWS)]
    Rows {
        /// Rows of the call.
        got: usize,
    },
    /// A name that is no activation.
    #[error("`activation` must be one of silu, gelu, gelu_tanh, quick_gelu, relu, relu_squared, got {0:?}")]
    Activation(String),
    /// A row chooses by importance and there is no shadow.
    #[error("a row with an importance above 0 needs a shadow")]
    NoShadow,
}

impl Error {
    pub(crate) fn size(what: &'static str, wanted: impl ToString, got: impl ToString) -> Self {
        Self::Size { what, wanted: wanted.to_string(), got: got.to_string() }
    }
}
