"""The errors that sedac-hf raises on purpose.

Every message says what must hold, what was got and what to do. Each class also derives from the built-in
exception that a caller would reasonably catch.
"""


class SedacError(Exception):
    """Base of all errors that sedac-hf raises on purpose."""


class ConfigError(SedacError, ValueError):
    """A configuration value, argument or environment variable is out of its range."""


class ControllerError(SedacError, ValueError):
    """An array given to a controller has the wrong shape, dtype, layout or index."""


class UnsupportedModelError(SedacError, ValueError):
    """A model has no FFN that can be cut, or its structure cannot be followed."""


class CalibrationError(SedacError, ValueError):
    """Calibration cannot give a policy that can be trusted: too little text, a foreign tokenizer, NaN logits, ..."""


class EvaluationError(SedacError, ValueError):
    """An evaluation was asked for that cannot give a meaningful figure."""


class LoadError(SedacError, OSError):
    """A saved SEDAC model or adapter is missing, damaged, or belongs to another base."""
