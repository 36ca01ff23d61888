"""The tiny run as an experiment file: TINY_TEXT names the folder of its text."""

import os
from pathlib import Path

from tiny import tiny_config


def get_config(variant="test"):
    text = Path(os.environ["TINY_TEXT"])
    return tiny_config(text, text.parent / "cache")
