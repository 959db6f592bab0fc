"""Run a recipe: its stages in order, each a notebook executed by papermill.

    python run.py list                                    # recipes, stages and their cost
    python run.py mindeye --mini                          # the miniature: no data, no GPU needed
    python run.py mindeye -p subj 5 -p data_path /nsd     # overrides, for all stages that have them
    python run.py mindeye --dry-run                       # what it needs: parameters, memory, disk
    python run.py mindeye --mini -f my.yaml               # a file of overrides, laid under -p
    python run.py mindeye --mini --from 03 --force        # again from stage 03
    python run.py mindeye --mini --to 02                  # end with stage 02; without it, go on
    python run.py mindeye2_small --mini --without 04      # leave a stage out
    python run.py mindeye --launch launch/eight_gpus.yaml # train in several processes
    python run.py download mindeye -p subj 5 --dry-run    # the files that the recipe needs
    python run.py sweep launch/sweeps/roi_sets_mini.yaml  # a recipe at every point of a grid

- The stages of a recipe are the files in recipes/<system>/; with --mini, recipes/<system>/mini/ is
  laid over it.
- Each executed notebook lands in results/<run>/. A stage whose notebook, parameters, code and
  earlier stages are unchanged, and whose files are still there, is skipped, so an interrupted run
  goes on where it stopped. When a stage runs, those after it run again.
- docs/launching.md, docs/downloads.md and docs/sweeps.md say more.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from src.command_line import CommandLine
from src.pipeline.runs import print_plan, print_recipes, run_recipe
from src.utils import PerceptError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's; returns the exit code."""
    if arguments is None:
        arguments = sys.argv[1:]
    commands = {"download": download_command, "sweep": sweep_command}
    command = arguments[0] if arguments else ""
    if command in commands:
        return commands[command](arguments[1:])
    return recipe_command(arguments)


def recipe_command(arguments: Sequence[str]) -> int:
    """`run.py <recipe>` and `run.py list`."""
    parser = CommandLine(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", help="a recipe, or `list`; `download` and `sweep` have a --help of their own")
    add("--mini", action="store_true", help="lay the recipe's miniature overlay over it")
    file_help = "YAML file of overrides (repeatable; later ones win, -p wins over all)"
    add("-f", dest="files", action="append", default=[], metavar="FILE", help=file_help)
    parser.add_pairs("override one parameter; the value may begin with a dash")
    from_help = "begin at this stage, taking the earlier ones as they are"
    add("--from", dest="first", default="", metavar="NN", help=from_help)
    add("--to", dest="last", default="", metavar="NN", help="end with this stage")
    add("--without", dest="skip", default="", metavar="NN,NN", help="leave out these stages")
    force_help = "run finished stages again (with --from: from there on)"
    add("--force", action="store_true", help=force_help)
    plan_help = "only tell what the stages will need: parameters, memory, disk"
    add("--dry-run", action="store_true", help=plan_help)
    launch_help = (
        "train in several processes: an accelerate config of launch/, or a command before the"
        " script"
    )
    add("--launch", default="", metavar="HOW", help=launch_help)
    args = parser.parse_args(arguments)
    if args.recipe == "list":
        print_recipes()
        return 0
    recipe = f"{args.recipe}/mini" if args.mini else args.recipe
    skip = [stage for stage in args.skip.split(",") if stage]
    selection = (recipe, dict(args.pairs), args.first, args.last, skip, args.files)
    if args.dry_run:
        print_plan(*selection)
    else:
        run_recipe(*selection, launch=args.launch, force=args.force)
    return 0


def download_command(arguments: Sequence[str]) -> int:
    """`run.py download`: say what would be fetched, and fetch it."""
    parser = CommandLine(
        prog="run.py download",
        description="Fetch what a recipe needs; files that are there are left (docs/downloads.md).",
    )
    add = parser.add_argument
    name_help = "a recipe, a bundle (docs/downloads.md), or the id of a model on the hub"
    add("name", help=name_help)
    parser.add_pairs("subj, data_path, vd_cache_dir, num_sessions, ...")
    only_help = "some parts of a recipe, e.g. shards,checkpoints"
    add("--only", default="", metavar="PARTS", help=only_help)
    mirror_help = "a folder with the files, or the address of a mirror of the hub or of S3"
    add("--mirror", default="", help=mirror_help)
    to_help = "folder that takes the place of PERCEPT_HOME, e.g. to carry away"
    add("--to", default="", metavar="FOLDER", help=to_help)
    add("--dry-run", action="store_true", help="only list files and sizes")
    args = parser.parse_args(arguments)

    from src.pipeline.download import fetch_planned, format_downloads, plan_downloads

    warnings.showwarning = show_warning  # type: ignore[assignment]
    downloads = plan_downloads(
        args.name,
        only=args.only,
        to=args.to,
        mirror=args.mirror,
        overrides=dict(args.pairs),
    )
    print(format_downloads(downloads), flush=True)
    if not args.dry_run:
        for download in downloads:
            fetch_planned(download)
    return 0


def sweep_command(arguments: Sequence[str]) -> int:
    """`run.py sweep`: run the points of a grid file that are not finished."""
    parser = CommandLine(
        prog="run.py sweep",
        description=(
            "Run a recipe at every point of a grid; called again it goes on (docs/sweeps.md)."
        ),
    )
    add = parser.add_argument
    add("grid", help="YAML file, e.g. launch/sweeps/roi_sets_mini.yaml")
    jobs_help = "points at a time, by default one a GPU, without GPUs one a core"
    add("--jobs", type=int, default=0, metavar="N", help=jobs_help)
    only_help = "only the points of these numbers (--list shows them), and no report"
    add("--only", default="", metavar="I[,J]", help=only_help)
    list_help = "only show the points with their state, and the sbatch line"
    add("--list", action="store_true", help=list_help)
    add("--force", action="store_true", help="run finished points and the report again")
    plan_help = "only tell what one point will need, the first: parameters, memory, disk"
    add("--dry-run", action="store_true", help=plan_help)
    launch_help = (
        "as without sweep: how stages that train are started, e.g. python, which lets SIGTERM save"
        " any state"
    )
    add("--launch", default="", metavar="HOW", help=launch_help)
    args = parser.parse_args(arguments)

    from src.pipeline.stages import parse_launcher
    from src.pipeline.sweep import (
        Sweep,
        parse_point_numbers,
        print_point_plan,
        run_sweep,
        show_points,
    )

    sweep = Sweep(args.grid)
    numbers = parse_point_numbers(args.only, len(sweep.grid.points))
    if args.jobs < 0:
        raise UsageError(f"--jobs takes a number of at least 1 (it was {args.jobs}).")
    parse_launcher(args.launch)
    if args.list:
        show_points(sweep)
        return 0
    if args.dry_run:
        print_point_plan(sweep)
        return 0
    failures = run_sweep(sweep, numbers, args.jobs, args.force, args.launch)
    for label, message in failures.items():
        print(f"failed: {label}: {message}", file=sys.stderr)
    return 1 if failures else 0


def show_warning(message: Warning | str, *details: object) -> None:
    """Show a warning as one sentence, without its place in the code."""
    print(f"run.py: {message}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PerceptError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # the reader of `run.py list | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; the same command goes on where it stopped.")
