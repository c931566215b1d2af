"""One module per stage, each run as `python -m experiments.NAME --preset PRESET`; see README.md."""
