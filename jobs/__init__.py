"""Jobs: one file, one recipe and a main.

Putting ``platform/`` on the path here makes ``python -m jobs.digits`` work from a bare upload, on a cluster
that has shoal's dependencies but not shoal.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("shoal") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))
