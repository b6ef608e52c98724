"""Settings that every test runs under; set before torch is imported, and only where the caller set none."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # models here are small: more threads cost more than they give
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that the tests read is in the repository
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("SEDAC_MEASURE_COSTS", "0")  # cuts by stated rates: the same in every run
