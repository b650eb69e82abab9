"""The paper's experiments on a real model, against every baseline: `python -m bench.evidence --help`."""
