"""The tiny run as an experiment file: TINY_TEXT names the folder of its text, and with TINY_FEW_MATRICES few are sparse."""

import os
from pathlib import Path

from tiny import few_matrices, tiny_config

if "TINY_FEW_MATRICES" in os.environ:
    few = few_matrices()
    few.__enter__()  # to the process's end


def get_config(variant="test"):
    text = Path(os.environ["TINY_TEXT"])
    return tiny_config(text, text.parent / "cache")
