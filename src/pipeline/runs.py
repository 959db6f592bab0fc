"""Running all stages of a recipe, and saying what they will need."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from src import utils
from src.files.ownership import lock_folder, remove_leftovers_below
from src.pipeline.console import show
from src.pipeline.needs import walk_stages
from src.pipeline.recipes import (
    list_recipes,
    list_stages,
    read_cost,
    select_stages,
)
from src.pipeline.stages import (
    StageRun,
    check_environment,
    find_stamp,
    iterate_stages,
    parse_launcher,
    run_stage,
)
from src.pipeline.warm import warm_kernels

# what a finished run points to, where it has made them
HIGHLIGHTS = (
    "contact_sheet.png",
    "report.html",
    "metrics.json",
    "comparison.csv",
    "figures/comparison.png",
)


def run_recipe(
    recipe: str,
    overrides: dict[str, Any],
    first: str = "",
    last: str = "",
    skip: Sequence[str] = (),
    files: Sequence[str] = (),
    launch: str = "",
    force: bool = False,
) -> Path:
    """Run every stage of a recipe that is not finished.

    Args:
        recipe, overrides, first, last, skip, files: as `select_stages`.
        launch: how stages that train are started, as --launch of run.py.
        force: whether to run finished stages again, from `first` on.

    Returns:
        results/<run>/.

    Raises:
        PerceptError: for what the recipe does not have, a run that another process is running, and
            with the sentence of a stage that fails.
    """
    check_environment()
    launcher = parse_launcher(launch)
    stages, overrides = select_stages(recipe, overrides, first, last, skip, files)
    results = utils.HOME / "results" / overrides["model_name"]
    start_time = time.time()
    stamps = find_stamp(overrides["model_name"], "").parent
    with lock_folder(stamps, f"running {recipe}"):
        for folder in (results, utils.HOME / "train_logs" / overrides["model_name"]):
            remove_leftovers_below(folder)
        runs = iterate_stages(recipe, overrides, stages)
        with warm_kernels(len(stages)):
            _run_stages(runs, len(stages), first, last, launcher, force)
    show(f"Finished in {time.time() - start_time:.0f} s. Look at:")
    for name in HIGHLIGHTS:
        if (results / name).exists():
            show(f"  {results / name}")
    show(f"  {results}/*.ipynb (the executed notebooks)")
    return results


def _run_stages(
    runs: Iterable[StageRun],
    n_stages: int,
    first: str,
    last: str,
    launcher: Sequence[str],
    force: bool,
) -> None:
    """Run the stages of a run that are not finished, a line for each."""
    has_begun = not first
    for number, run in enumerate(runs, 1):
        utils.make_folder(run.results)
        has_begun = has_begun or run.stage.startswith(first)
        title = f"[{number}/{n_stages}] {run.stage}"
        finished = run.is_finished()
        if has_begun and (force or not finished):
            show(f"{title} ...")
            seconds = run_stage(run, launcher)
            show(f"{title}: {seconds:.0f} s")
        elif finished:
            show(f"{title}: finished before, skipped")
        else:
            show(f"{title}: skipped, as --from asks")
        if last and run.stage.startswith(last):
            break


def print_plan(
    recipe: str,
    overrides: dict[str, Any],
    first: str = "",
    last: str = "",
    skip: Sequence[str] = (),
    files: Sequence[str] = (),
) -> None:
    """Print what the stages of a recipe will need; nothing is loaded, downloaded or written.

    Args:
        recipe, overrides, first, last, skip, files: as `select_stages`.
    """
    stages, overrides = select_stages(recipe, overrides, first, last, skip, files)
    from src.pipeline.dryrun import plan_stage

    for stage, values in walk_stages(recipe, stages, overrides):
        if first and stage < first:
            continue
        plan = plan_stage(stage, values)
        show(str(plan or f"{stage} trains no network and writes little"))
        show(f"  time: {read_cost(stage)}")
        if last and stage.startswith(last):
            break


def print_recipes() -> None:
    """Print the recipes, their stages and what these cost."""
    for folder in list_recipes():
        overlays = sorted(path.name for path in folder.iterdir() if path.is_dir())
        names = ["--mini" if name == "mini" else f"{folder.name}/{name}" for name in overlays]
        suffix = f"  (also {', '.join(names)})" if names else ""
        show(f"{folder.name}{suffix}")
        for stage in list_stages(folder.name):
            show(f"  {stage:24} {read_cost(stage)}")
