"""Calibration: from text and a budget to a policy (probes, schedule, law), with a report of what it costs."""

from sedac_hf.calibration.pipeline import calibrate as calibrate
from sedac_hf.calibration.report import CalibrationReport as CalibrationReport
from sedac_hf.calibration.report import CheckpointReport as CheckpointReport
