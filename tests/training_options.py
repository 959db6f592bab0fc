"""The options of `fit` by their names alone, grouped as it takes them."""

from dataclasses import fields

from src.training.options import Batching, Checkpointing, Execution, Optimisation, Reporting

GROUPS = {
    "batching": Batching,
    "optimisation": Optimisation,
    "execution": Execution,
    "checkpointing": Checkpointing,
    "reporting": Reporting,
}


def group_options(**options):
    """Keyword arguments of `fit`; names that belong to no group stay as they are."""
    grouped = {}
    for name, group in GROUPS.items():
        names = {field.name for field in fields(group)} & set(options)
        grouped[name] = group(**{name: options.pop(name) for name in names})
    return grouped | options
