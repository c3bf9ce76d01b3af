"""Puts the repository first on the module path; imported first by every tool.

`torchrun tools/train.py` starts with tools/ on the path, and a foreign package called `models` or `engine` must
not win over ours.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
