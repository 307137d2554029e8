"""Ports: models of the paper that transformers does not have, in the style of its own folders.

After `import svl`, transformers' Auto classes know them. They read original checkpoints and run none of the code that
comes with those. Adding one means a folder here with a function `register`.
"""


def register() -> None:
    """Make the ports known to transformers' Auto classes; once is enough, more often does no harm."""
    from svl.models import qwen_vl

    for port in (qwen_vl,):
        port.register()
