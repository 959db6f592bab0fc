"""The command line: one stage a call, in one or several processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

import torch

from src.utils import make_folder, write_errors

from . import data
from .autoencoder import train_vae
from .blip import train_blip
from .category_classifier import train_classifier
from .clip import train_clip
from .diffusion import train_flow
from .exports import SINGLE_EXPORTS, export_all
from .flows import STARTING_FLOWS, load_flow_data
from .git import train_git
from .gnet import train_gnet
from .laion_prior import train_laion_prior
from .metric_networks import METRIC_NETWORKS, train_metric_network
from .sentence import train_sentence
from .teacher import train_teacher
from .training import Options
from .unclip import train_unclip

DIFFUSION_STAGES = ("image", *STARTING_FLOWS)

STAGES: dict[str, Callable[..., None]] = {  # each called with options and rank
    "vae": train_vae,
    "clip": train_clip,
    "blip": train_blip,
    "git": train_git,
    "judge": train_classifier,
    "teacher": train_teacher,
    "laion_prior": train_laion_prior,
    "unclip": train_unclip,
    "sentence": train_sentence,
    "gnet": train_gnet,
    **{name: partial(train_metric_network, name) for name in METRIC_NETWORKS},
    **{name: partial(train_flow, name) for name in DIFFUSION_STAGES},
}


def run_stage(rank: int, stage: str, options: Options) -> None:
    """Train one stage in this process, which is one of `options.processes`."""
    torch.set_num_threads(options.threads)
    data.shrink_image_sets(options.share)
    if not torch.cuda.is_available():
        # The backward pass of the fused attention for CPUs takes as long as all the rest together.
        torch.backends.cuda.enable_flash_sdp(False)
    if options.processes > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29533")
        torch.distributed.init_process_group("gloo", rank=rank, world_size=options.processes)
    STAGES[stage](options, rank)


def prepare_caches(stage: str, share: float) -> None:
    """Draw images and compute conditions once, before several processes read them."""
    data.shrink_image_sets(share)
    sets = ("train", "check")
    if stage in ("judge", *METRIC_NETWORKS):
        sets = ("judge", "judge_check")
    for name in sets:
        data.load_images(name)
    if stage in DIFFUSION_STAGES:
        for name in sets:
            load_flow_data(stage, name)


def parse_arguments(description: str) -> tuple[str, Options]:
    """Stage and options of the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "export", *SINGLE_EXPORTS])
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="wall time in all, earlier runs of the stage counted in",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="processes that share the gradients (two beat two threads on two cores)",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batch", type=int, default=64, help="samples a process and step (diffusion)"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of the images, for a quick look (with a PERCEPT_HOME of its own)",
    )
    arguments = vars(parser.parse_args())
    return arguments.pop("stage"), Options(**arguments)


def main(description: str) -> None:
    """Run the stage that the command line names.

    Args:
        description: of the command, for --help.
    """
    stage, options = parse_arguments(description)
    make_folder(data.WORK)
    with write_errors(data.WORK / stage):
        dispatch(stage, options)


def dispatch(stage: str, options: Options) -> None:
    """Run a stage, or all exports."""
    if stage == "export":
        export_all()
    elif stage in SINGLE_EXPORTS:
        SINGLE_EXPORTS[stage]()
    elif options.processes > 1:
        prepare_caches(stage, options.share)
        arguments = (stage, options)
        torch.multiprocessing.spawn(run_stage, arguments, nprocs=options.processes)
    else:
        run_stage(0, stage, options)
