"""Which type of faiss index to build: what each takes in memory and on disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src.utils import PerceptError

INDEX_KINDS = ("Flat", "SQfp16", "SQ8", "IVF-PQ")

# Bytes of a code of IVF-PQ, the most exact first. A code has at most one byte for 8 numbers.
CODE_BYTES = (64, 48, 32, 24, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class IndexPlan:
    """A type of index for a number of rows, and what it takes.

    Attributes:
        kind: one of INDEX_KINDS.
        factory: the same for faiss.index_factory.
        mapped: whether searches read it from disk.
        memory: bytes.
        disk: bytes, metadata apart.
        candidates: rows that are scored again with their embeddings for each one asked for.
        lists: of IVF-PQ; 0 for others.
        probes: lists that a query looks into.
        fits: whether it needs no more memory than allowed.
    """

    kind: str
    factory: str
    mapped: bool
    memory: float
    disk: float
    candidates: int
    lists: int
    probes: int
    fits: bool


def list_index_plans(rows: int, dim: int, memory_gb: float) -> list[IndexPlan]:
    """Estimate what each type of index takes, the most exact one first.

    Bytes a row are faiss's: 4 dim (Flat), 2 dim (SQfp16), dim (SQ8), and a code of about dim / 12
    bytes with an 8-byte id (IVF-PQ, whose lists have a centre of 4 dim bytes each). Embeddings, 2
    dim bytes a row, are on disk besides. docs/large_index.md has measurements.
    """
    stored = 2.0 * dim * rows  # bytes of the embeddings on disk
    plans = []
    for kind, row_bytes, candidates in (
        ("Flat", 4.0 * dim, 1),
        ("SQfp16", 2.0 * dim, 2),
        ("SQ8", 1.0 * dim, 4),
    ):
        memory = row_bytes * rows
        fits = memory <= memory_gb * 1e9
        plans.append(IndexPlan(kind, kind, False, memory, memory + stored, candidates, 0, 0, fits))
    log_lists = np.floor(np.log2(max(rows, 1) ** 0.5 * 4))
    lists = int(2 ** np.clip(log_lists, 4, 18))
    probes = int(np.clip(lists // 64, 8, 256))
    code = _code_bytes(dim)
    centres = 4 * dim * (lists + dim + 256)  # of lists, the rotation, and codes
    codes = rows * (code + 8.0)
    in_memory = IndexPlan(
        kind="IVF-PQ",
        factory=f"OPQ{code},IVF{lists},PQ{code}x8",
        mapped=False,
        memory=codes + centres,
        disk=codes + centres + stored,
        candidates=16,
        lists=lists,
        probes=probes,
        fits=codes + centres <= memory_gb * 1e9,
    )
    on_disk = dataclasses.replace(
        in_memory, mapped=True, memory=float(centres), fits=centres <= memory_gb * 1e9
    )
    return [*plans, in_memory, on_disk]


def _code_bytes(dim: int) -> int:
    """Bytes of a code: the largest of CODE_BYTES that divides dim."""
    for code in CODE_BYTES:
        if dim % code == 0 and code <= max(1, dim // 8):
            return code
    return 1


def choose_index(
    rows: int, dim: int, memory_gb: float = 4.0, kind: str = "auto", mapped: bool = False
) -> tuple[IndexPlan, pd.DataFrame]:
    """Choose the most exact index that fits into memory, or the kind that was asked for.

    Args:
        rows: images.
        dim: of an embedding.
        memory_gb: for the index, in GB (10^9 bytes).
        kind: auto or one of INDEX_KINDS.
        mapped: read it from disk while searching, whatever its type.

    Returns:
        The plan, and a table of all plans with what each takes.

    Raises:
        PerceptError: an unknown kind, or nothing fits.
    """
    if kind != "auto" and kind not in INDEX_KINDS:
        raise PerceptError(
            f"There is no index of the kind {kind!r}: choose auto or one of"
            f" {', '.join(INDEX_KINDS)}."
        )
    plans = list_index_plans(rows, dim, memory_gb)
    allowed = [plan for plan in plans if kind in ("auto", plan.kind)]
    # an index of a kind that was asked for may also lie on disk; the last plan always does
    always_fits = kind != "auto"
    fitting = [
        plan for plan in allowed if plan.fits or (always_fits and (mapped or plan is plans[-1]))
    ]
    if not fitting:
        least_gb = min(plan.memory for plan in allowed) / 1e9
        raise PerceptError(
            f"{rows:,} rows of {dim} numbers need at least {least_gb:.2g} GB as {kind}, and"
            f" {memory_gb:g} GB are given: give more, or another kind (IVF-PQ is smallest)."
        )
    chosen = fitting[0]
    table = pd.DataFrame([_plan_row(plan, plan is chosen) for plan in plans])
    if mapped:
        chosen = dataclasses.replace(chosen, mapped=True)
    return chosen, table


def _plan_row(plan: IndexPlan, is_chosen: bool) -> dict[str, str | float | bool]:
    return {
        "kind": plan.kind,
        "faiss": plan.factory,
        "searched in": "disk" if plan.mapped else "memory",
        "memory (GB)": plan.memory / 1e9,
        "disk with embeddings (GB)": plan.disk / 1e9,
        "fits": plan.fits,
        "chosen": is_chosen,
    }
