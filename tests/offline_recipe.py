"""Run by test_offline.py in a process of its own: fetch what a recipe needs from a folder that
stands for the public servers, refuse every connection from then on, and run all its stages.

    python tests/offline_recipe.py <recipe> <folder of the mirror> <name=value> ...
"""

import os
import runpy
import socket
import sys

import matplotlib

matplotlib.use("Agg")


def refuse(self, address, *_):
    raise ConnectionRefusedError(f"the network is off: {address}")


def main():
    from test_unclip import TINY_UNET, TINY_VAE

    from src.pipeline.download import fetch_planned, plan_downloads
    from src.pipeline.recipes import read_stage_parameters, select_stages
    from src.pretrained import unclip
    from src.utils import ROOT

    recipe, mirror, *pairs = sys.argv[1:]
    overrides = dict(pair.split("=", 1) for pair in pairs)
    for download in plan_downloads(recipe, mirror=mirror, overrides=overrides):
        fetch_planned(download)
        print(f"fetched {download.name}: {len(download.files)} files", flush=True)
    socket.socket.connect = refuse
    socket.socket.connect_ex = refuse
    unclip.UNET, unclip.VAE = TINY_UNET, TINY_VAE
    stages, merged = select_stages(recipe, overrides)
    os.chdir(ROOT)
    for stage in stages:
        values = read_stage_parameters(stage, recipe, merged)
        flags = [f"--{name}={value}" for name, value in values.items() if name != "recipe"]
        sys.argv = [f"notebooks/{stage}.py", "--recipe", recipe, *flags]
        print(f"stage {stage}", flush=True)
        runpy.run_path(sys.argv[0], run_name="__main__")
    print("all stages have run", flush=True)


if __name__ == "__main__":
    main()
