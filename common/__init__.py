"""What soco.py and rpca.py share.

metric.py     what a change of a weight costs the loss: one currency for both methods
layers.py     the weights that are compressed, and putting others in their place
sparse.py     the layer that rpca.py stores; soco.py's stands there
folder.py     the saved folder
processes.py  several devices, under torchrun
cli.py        flags, bad input, loading a model, the report of a run
"""
import os


class UserError(ValueError):
    """Input that cannot be used. A command prints its message, one line that says the way out, and exits with 2."""


def bar(items, progress, **words):
    """A progress bar over items, if asked for and if standard error is a terminal."""
    from tqdm import tqdm
    return tqdm(items, disable=None if progress and is_first() else True, leave=False, **words)


def is_first():
    """Whether this is the first, or only one, of the processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
