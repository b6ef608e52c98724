"""What lies in a saved folder, and on the Hub: written, replaced, read back, and checked against its base.

A full save holds the base's own weight files beside ours, an adapter names its base and revision instead. So base
weights are always loaded by the base's class, whatever its format, quantization or device map.
"""

CONFIG_FILE = "config.json"
TENSORS_FILE = "sedac.safetensors"
REPORT_FILE = "calibration_report.json"
FINGERPRINT_FILE = "base_fingerprint.json"
CARD_FILE = "README.md"
