"""Readers: one module for each source format, with `read(source, dataset, subj, **options)` and `write(...)`.

`read` turns a source into the prepared layout of `src.data` and returns the folder of the subject; `write`
makes the source format from arrays (the mini world is written as MindEye's shards, and tests read what they
wrote). To add a format, add a module with these two functions and name it here.
"""

from types import ModuleType

from src.readers import digits69, mindeye, npz

READERS: dict[str, ModuleType] = {"mindeye": mindeye, "digits69": digits69, "npz": npz}

__all__ = ["READERS", "digits69", "mindeye", "npz"]
