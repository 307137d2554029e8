"""`svl-report`: what finished runs say, from the manifests in the store alone.

* A report is a pure function of the store: nothing is measured, loaded or downloaded, and it can be made again.
* A table holds only what can be compared: one model, one set of benchmarks, one sample limit.
* Runs that differ in the seed alone are one row: their mean, with its standard error over questions and seeds.
* Numbers of the paper are never mixed with measured ones: they have columns of their own, which say so.
* Every file is written whole or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `svl-report`, see svl.report.command; Ctrl-C ends in one line from the first import on."""
    try:
        from svl.report import command

        return command.main(argv)
    except KeyboardInterrupt:
        print("svl-report: interrupted", file=sys.stderr)
        return 130
