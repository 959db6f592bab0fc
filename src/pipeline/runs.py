"""Running all stages of a recipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import parameters, utils
from src.pipeline.console import show
from src.pipeline.recipes import (
    find_notebook,
    list_stages,
    read_cost,
    read_stage_parameters,
    select_stages,
)
from src.pipeline.stages import is_finished, iterate_stages, parse_launcher, run_stage


def run_recipe(
    recipe: str,
    overrides: dict[str, Any],
    first: str = "",
    force: bool = False,
    files: Sequence[str] = (),
    launch: str = "",
    last: str = "",
    without: Sequence[str] = (),
) -> Path:
    """Run every stage of a recipe that is not finished, and return results/<run>/."""
    launcher = parse_launcher(launch)
    stages, overrides = select_stages(recipe, overrides, first, files, last, without)
    results = utils.HOME / "results" / overrides["model_name"]
    reached, begun = not first, time.time()
    for number, (stage, values, stamp, mark) in enumerate(
        iterate_stages(recipe, overrides, stages), 1
    ):
        results.mkdir(parents=True, exist_ok=True)
        reached = reached or stage.startswith(first)
        done = is_finished(stamp, mark)
        if (done and not (force and reached)) or not reached:
            show(
                f"[{number}/{len(stages)}] {stage}:"
                f" {'finished before, skipped' if done else 'skipped, as --from asks'}",
            )
        else:
            show(f"[{number}/{len(stages)}] {stage} ...")
            seconds = run_stage(stage, values, results, mark, launcher)
            show(f"[{number}/{len(stages)}] {stage}: {seconds:.0f} s")
        if last and stage.startswith(last):
            break
    show(f"Finished in {time.time() - begun:.0f} s. Look at:")
    for name in (
        "contact_sheet.png",
        "report.html",
        "metrics.json",
        "comparison.csv",
        "figures/comparison.png",
    ):
        if (results / name).exists():
            show(f"  {results / name}")
    show(f"  {results}/*.ipynb (the executed notebooks)")
    return results


def dry_run(
    recipe: str,
    overrides: dict[str, Any],
    first: str = "",
    files: Sequence[str] = (),
    last: str = "",
    without: Sequence[str] = (),
) -> None:
    """Print what the stages of a recipe will need; nothing is loaded, downloaded or written."""
    from src.pipeline.dryrun import plan_stage

    stages, overrides = select_stages(recipe, overrides, first, files, last, without)
    earlier: dict[str, Any] = {}  # what reconstructs is told by what was trained
    for stage in stages:
        known = parameters.parse_parameters(
            parameters.read_parameters_cell(find_notebook(stage)), stage
        )
        earlier |= {name: p.default for name, p in known.items()} | read_stage_parameters(
            stage, recipe, overrides
        )
        if first and stage < first:
            continue
        needed = plan_stage(stage, earlier)
        show(needed or f"{stage} trains no network and writes little")
        show(f"  time: {read_cost(stage)}")
        if last and stage.startswith(last):
            break


def list_recipes() -> None:
    """Print recipes, their stages and what these cost."""
    for folder in sorted(path for path in parameters.RECIPES.iterdir() if path.is_dir()):
        show(f"{folder.name}{'  (also --mini)' if (folder / 'mini').is_dir() else ''}")
        for stage in list_stages(folder.name):
            show(f"  {stage:24} {read_cost(stage)}")
