"""`svl-report`: what finished runs say, from the manifests in the store alone.

* A report is a pure function of the store: nothing is measured, loaded or downloaded, and it can be made again.
* A table holds only what can be compared: one model, one set of benchmarks, one sample limit.
* Runs that differ in the seed alone are one row: mean and standard deviation. A single run shows its standard error.
* Numbers of the paper are never mixed with measured ones: they have columns of their own, which say so.
* Every file is written whole or not at all.
"""

from svl.report.command import main as main
