"""Run a recipe: its stages in order, each a notebook executed by papermill.

    python run.py list                                   # recipes, stages, cost
    python run.py mindeye --mini                         # the miniature, no data and no GPU needed
    python run.py mindeye -p subj 5 -p data_path /nsd    # an override goes to every stage that has the name
    python run.py mindeye --dry-run                      # what it will need: parameters, memory, disk
    python run.py mindeye --mini -f my.yaml              # a file of overrides, laid over the recipe and under -p
    python run.py mindeye --mini --from 03 --force       # again from stage 03
    python run.py mindeye --mini --to 02                 # end with stage 02; the same without --to goes on from there
    python run.py mindeye2_small --mini --without 04     # leave a stage out
    python run.py download mindeye -p subj 5 --dry-run   # list what the recipe needs from the hub; without --dry-run, fetch it
    python run.py mindeye --launch launch/eight_gpus.yaml  # stages that train do so in several processes (docs/launching.md)
    python run.py sweep launch/sweeps/roi_sets_mini.yaml # a recipe at every point of a grid, side by side (docs/sweeps.md)

- The listing of recipes/<system>/ is the pipeline; with --mini, recipes/<system>/mini/ is laid over
  it.
- Each executed notebook lands in results/<run>/. A stage whose notebook, parameters, code and
  earlier stages are unchanged, and whose files are still there, is skipped, so an interrupted run
  goes on where it stopped. When a stage runs, those after it run again.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from src.pipeline.runs import dry_run, list_recipes, run_recipe
from src.pipeline.stages import parse_launcher
from src.pipeline.sweep import Sweep, prepare_data, run_points, show_points, write_report
from src.utils import PerceptError


def download(arguments: Sequence[str]) -> int:
    """Parse the command line of `run.py download`, say what would be fetched, and fetch it."""
    from src.pipeline.download import fetch_planned, format_downloads, plan_downloads

    parser = argparse.ArgumentParser(
        prog="run.py download",
        description="Fetch what a recipe needs; files that are there are left (docs/downloads.md).",
    )
    parser.add_argument(
        "what", help="a recipe, a bundle (docs/downloads.md), or the id of a model on the hub"
    )
    parser.add_argument(
        "-p",
        dest="pairs",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="subj, data_path, vd_cache_dir, num_sessions, ...",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PARTS",
        help="some parts of a recipe, e.g. shards,checkpoints",
    )
    parser.add_argument(
        "--mirror",
        default="",
        help="a folder with the files, or the address of a mirror of the hub or of S3",
    )
    parser.add_argument(
        "--to",
        default="",
        metavar="FOLDER",
        help="folder that takes the place of PERCEPT_HOME, e.g. to carry away",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list files and sizes")
    args = parser.parse_args(arguments)
    # the sentence alone
    warnings.showwarning = lambda message, *_: print(f"run.py: {message}", file=sys.stderr)  # type: ignore[assignment]
    planned = plan_downloads(
        args.what, only=args.only, to=args.to, mirror=args.mirror, overrides=dict(args.pairs)
    )
    print(format_downloads(planned), flush=True)
    for one in planned if not args.dry_run else []:
        fetch_planned(one)
    return 0


def sweep(arguments: Sequence[str]) -> int:
    """Parse the command line of `run.py sweep`, and run the points of a grid file that are not
    finished.
    """
    parser = argparse.ArgumentParser(
        prog="run.py sweep",
        description=(
            "Run a recipe at every point of a grid; called again it goes on (docs/sweeps.md)."
        ),
    )
    parser.add_argument("grid", help="YAML file, e.g. launch/sweeps/roi_sets_mini.yaml")
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="points at a time, by default one a GPU, without GPUs one a core",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="I[,J]",
        help="only the points of these numbers (--list shows them), and no report",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="only show the points with their state, and the sbatch line",
    )
    parser.add_argument(
        "--force", action="store_true", help="run finished points and the report again"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only tell what one point will need, the first: parameters, memory, disk",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="HOW",
        help=(
            "as without sweep: how stages that train are started, e.g. python, which lets SIGTERM"
            " save any state"
        ),
    )
    args = parser.parse_args(arguments)
    from src.pipeline.grid import missing_requirement

    told = Sweep(args.grid)
    points, numbers = told.grid.points, args.only.split(",") if args.only else []
    if args.jobs < 0 or [n for n in numbers if not n.strip().isdecimal() or int(n) >= len(points)]:
        raise PerceptError(
            f"--only takes numbers of points, 0 to {len(points) - 1} and separated by commas (it"
            f" was {args.only!r}), --jobs a number of at least 1."
        )
    parse_launcher(args.launch)
    if args.list or args.dry_run:
        (
            show_points(told)
            if args.list
            else dry_run(
                told.grid.recipe,
                told.merge_overrides(points[0]),
                told.stages[0],
                without=told.grid.without,
            )
        )
        return 0
    prepare_data(told)
    states = {point.label: told.state(point) for point in points}
    for reason in dict.fromkeys(
        missing_requirement(point.launch) for point in points if states[point.label] == "skipped"
    ):
        print(
            f"Skipped, as {reason}:"
            f" {', '.join(point.label for point in points if states[point.label] == 'skipped')}",
            flush=True,
        )
    if removed := told.write_ledger(states):
        print(f"No longer in {args.grid}, left as they are: {', '.join(removed)}", flush=True)
    failed = run_points(
        told,
        [points[int(n)] for n in numbers] or points,
        states,
        args.jobs,
        args.force,
        args.launch,
    )
    if not args.only and "finished" in states.values():
        write_report(told, args.force)
    for label, sentence in failed.items():
        print(f"failed: {label}: {sentence}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Parse the command line and run."""
    if sys.argv[1:2] == ["download"]:
        return download(sys.argv[2:])
    if sys.argv[1:2] == ["sweep"]:
        return sweep(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", help="a recipe, or `list`; `download` and `sweep` have a --help of their own"
    )
    parser.add_argument(
        "--mini", action="store_true", help="lay the recipe's miniature overlay over it"
    )
    parser.add_argument(
        "-f",
        dest="files",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of overrides (repeatable; later ones win, -p wins over all)",
    )
    parser.add_argument(
        "-p",
        dest="pairs",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="override one parameter",
    )
    parser.add_argument(
        "--from",
        dest="first",
        default="",
        metavar="NN",
        help="begin at this stage, taking the earlier ones as they are",
    )
    parser.add_argument("--to", dest="last", default="", metavar="NN", help="end with this stage")
    parser.add_argument("--without", default="", metavar="NN,NN", help="leave out these stages")
    parser.add_argument(
        "--force",
        action="store_true",
        help="run finished stages again (with --from: from there on)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only tell what the stages will need: parameters, memory, disk",
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="HOW",
        help=(
            "train in several processes: an accelerate config of launch/, or a command before the"
            " script"
        ),
    )
    args = parser.parse_args()
    if args.recipe == "list":
        list_recipes()
        sys.stdout.flush()
        return 0
    recipe, without = (
        args.recipe + ("/mini" if args.mini else ""),
        list(filter(None, args.without.split(","))),
    )
    if args.dry_run:
        dry_run(recipe, dict(args.pairs), args.first, args.files, args.last, without)
        return 0
    run_recipe(
        recipe,
        dict(args.pairs),
        args.first,
        args.force,
        args.files,
        args.launch,
        args.last,
        without,
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PerceptError as error:
        sys.exit(f"run.py: {error}")
    except BrokenPipeError:  # the reader of `run.py list | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; the same command goes on where it stopped.")
