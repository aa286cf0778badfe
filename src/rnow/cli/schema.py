"""`rnow schema`: config.yml described for editors."""

from __future__ import annotations

import sys


def print_schema() -> None:
    """Print a JSON Schema of config.yml, with which an editor completes and explains its keys: rnow schema > .config.schema.json"""
    from rnow.config.json_schema import schema_text

    sys.stdout.write(schema_text())
