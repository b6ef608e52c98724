"""``python -m sedac_hf.integrations.lm_eval``: the command ``lm_eval`` with the model "sedac"."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
