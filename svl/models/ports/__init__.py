"""Ports: models of the paper that transformers does not have, in the style of its own folders.

Importing this package makes them known to transformers' Auto classes; loading a model with svl does so, too. They read
original checkpoints and run none of the code that comes with those. Adding one means a folder here whose `register`
does the same for it.
"""

from svl.models.ports import mplug_owl2, qwen_vl

for port in (mplug_owl2, qwen_vl):
    port.register()
