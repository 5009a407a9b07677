"""The script that makes the shipped pair, importable as its own modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny_pair"))
