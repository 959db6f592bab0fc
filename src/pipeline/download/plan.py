"""What a recipe needs, listed first and then fetched."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from src import parameters, utils
from src.pipeline.download.bundles import (
    BUNDLES,
    RECIPE_EXTRAS,
    RECIPE_OPTIONS,
    find_bundle,
    name_parts,
)
from src.pipeline.download.files import Bundle, RemoteFile
from src.pipeline.download.listing import FilesNotFound, find_cache_folder, list_files
from src.pipeline.download.transfer import fetch_files
from src.pipeline.needs import RecipeNeeds, collect_needs
from src.pipeline.recipes import list_parameters, list_recipes
from src.utils import UsageError, atomic


@dataclass(frozen=True)
class PlannedDownload:
    """A bundle with its place and its files.

    Attributes:
        name: of the part of a recipe, or of the bundle.
        bundle: which.
        folder: where the files go.
        files: all of the bundle; empty where the subject has none.
        revision: branch, tag or commit, "" for the bundle's.
    """

    name: str
    bundle: Bundle
    folder: Path
    files: list[RemoteFile]
    revision: str = ""


def fetch(
    name: str,
    folder: str | Path,
    *,
    subj: int = 1,
    mirror: str = "",
    revision: str = "",
    dry_run: bool = False,
    **options: Any,
) -> list[RemoteFile]:
    """Fetch a bundle into a folder; files that are complete already are left.

    Args:
        name: of a bundle in BUNDLES, or the id of a model on the hub.
        folder: where the files go, under the paths that they have in their repository (frozen
            models: in the layout of the hub's cache).
        subj: number of the subject.
        mirror: address of a hub mirror or S3 server, or a folder with the files under the same
            paths.
        revision: branch, tag or commit, by default the bundle's.
        dry_run: only list.
        options: those of the bundle, e.g. `num_sessions`.

    Returns:
        All files of the bundle, fetched or not.

    Raises:
        PerceptError: see `list_files` and `fetch_files`.
    """
    bundle, target = find_bundle(name), utils.resolve(str(folder))
    files = list_files(bundle, target, subj=subj, mirror=mirror, revision=revision, **options)
    download = PlannedDownload(name, bundle, target, files, revision)
    if not dry_run:
        fetch_planned(download)
    return files


def fetch_planned(download: PlannedDownload) -> None:
    """Fetch what has been planned, and tell the hub's cache of a model that is whole."""
    fetch_files(download.files, download.folder)
    bundle = download.bundle
    if bundle.in_hub_cache:
        top = find_cache_folder(download.folder, bundle.repo)
        snapshot = download.files[0].local.relative_to(top / "snapshots").parts[0]
        with atomic(top / "refs" / (download.revision or bundle.revision)) as temporary:
            temporary.write_text(snapshot)


def plan_downloads(
    recipe: str,
    *,
    only: str = "",
    to: str = "",
    mirror: str = "",
    overrides: dict[str, Any] | None = None,
) -> list[PlannedDownload]:
    """What a recipe needs, listed and not yet fetched.

    Args:
        recipe: a recipe, whose stages say what they load (`collect_needs`), else a name that
            `find_bundle` knows.
        only: some of the recipe's parts, separated by commas; "" for all.
        to: folder that stands for HOME, e.g. to carry away; the hub's cache is then <to>/hub.
        mirror: as for `fetch`.
        overrides: subj, data_path, vd_cache_dir, revision, the options of the bundles, and of a
            recipe all parameters of its stages, as texts or values.

    Raises:
        UsageError: for unknown names.
        PerceptError: see `list_files`.
    """
    overrides = dict(overrides or {})
    needs = _collect(recipe, overrides)
    parts = {recipe: recipe}
    if needs:
        parts = name_parts([*needs.bundles, *RECIPE_EXTRAS.get(recipe, [])])
    chosen = parameters.parse_names(only, list(parts), "--only") or set(parts)
    bundles = {part: find_bundle(name) for part, name in parts.items() if part in chosen}
    values = _read_values(bundles.values(), recipe, overrides, needs)
    revision = str(values["revision"])
    if revision and len(bundles) > 1:
        raise UsageError("revision belongs to one repository: choose a single part with --only.")
    subjects = needs.subjects if needs else [int(values["subj"])]
    downloads = []
    for part, bundle in bundles.items():
        folder = _choose_folder(bundle, str(values.get(bundle.folder_parameter, "")), to)
        options = {name: value for name, value in values.items() if name in bundle.options}
        options |= {"mirror": mirror, "revision": revision}
        files: dict[Path, RemoteFile] = {}
        for subj in subjects if bundle.is_of_subjects else [int(values["subj"])]:
            try:
                listed = list_files(bundle, folder, subj=subj, **options)
            except FilesNotFound:
                if only or not bundle.optional:
                    raise
                listed = []
            files |= {file.local: file for file in listed}
        downloads.append(PlannedDownload(part, bundle, folder, list(files.values()), revision))
    return downloads


def _collect(recipe: str, overrides: dict[str, Any]) -> RecipeNeeds | None:
    """What a recipe needs; None for what is no recipe.

    Raises:
        UsageError: for what is no bundle either, and for a recipe that needs nothing.
    """
    recipes = [path.name for path in list_recipes()]
    if recipe in BUNDLES and recipe not in recipes or "/" in recipe:
        return None
    needs = None
    if recipe in recipes:
        names = list_parameters(recipe)
        chosen = {name: value for name, value in overrides.items() if name in names}
        needs = collect_needs(recipe, chosen)
    if needs is None or not needs.bundles:
        fetchable = [name for name in recipes if collect_needs(name, {}).bundles]
        raise UsageError(
            f"Nothing is known to download for '{recipe}': choose one of {', '.join(fetchable)}, a"
            f" bundle of {', '.join(BUNDLES)}, or a hub id."
        )
    return needs


def _read_values(
    bundles: Iterable[Bundle],
    recipe: str,
    overrides: dict[str, Any],
    needs: RecipeNeeds | None,
) -> dict[str, Any]:
    """The subject, the places and the options of the bundles: defaults, those of the recipe, then
    what -p sets.
    """
    names = set(list_parameters(recipe)) if needs else set()
    defaults: dict[str, Any] = {"subj": 1, "revision": ""}
    for bundle in bundles:
        defaults |= bundle.options
        if bundle.folder_parameter:
            defaults[bundle.folder_parameter] = ""
    for name, value in RECIPE_OPTIONS.get(recipe, {}).items():
        if name in defaults:
            defaults[name] = value
    if needs and "num_sessions" in defaults:
        defaults["num_sessions"] = needs.num_sessions
    parameters.check_parameter_names(overrides, [*defaults, *names], "-p")
    values = dict(defaults)
    for name in defaults.keys() & overrides.keys():
        value = overrides[name]
        parameter = parameters.Parameter(name, defaults[name], "")
        values[name] = parameters.coerce(parameter, value, "-p")
    return values


def _choose_folder(bundle: Bundle, path: str, to: str) -> Path:
    """The folder of a bundle.

    Args:
        bundle: which.
        path: that its parameter gives, "" for the one where the recipes look.
        to: folder that stands for HOME, "" for HOME.
    """
    home = Path(to).expanduser().resolve() if to else None
    if bundle.kind == "web":
        return (home or find_torch_home()) / "hub" / "checkpoints"
    if not bundle.folder and not path:
        return home / "hub" if home else Path(constants.HF_HUB_CACHE)
    path = path or bundle.folder
    if home and not Path(path).expanduser().is_absolute():
        return home / path
    return utils.resolve(path)


def find_torch_home() -> Path:
    """The folder of torch's own cache, which it calls TORCH_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser()


def format_downloads(downloads: Iterable[PlannedDownload]) -> str:
    """A table of what is planned: file, size, whether it is complete, and where each bundle goes;
    with the terms and the totals.
    """
    lines, total, missing = [], 0, 0
    for download in downloads:
        lines.append(f"{download.name}: {download.bundle.title} -> {download.folder}")
        lines.append(f"  terms: {download.bundle.terms}")
        if not download.files:
            lines.append("  (none for this subject)")
        for file in download.files:
            size, path = _format_bytes(file.size), file.local.relative_to(download.folder)
            lines.append(f"  {size:>9}  {_describe_state(file):<24}  {path}")
            total += file.size
            missing += file.size - file.fetched_bytes
    lines.append(f"total {_format_bytes(total)}, to fetch {_format_bytes(missing)}")
    return "\n".join(lines)


def _describe_state(file: RemoteFile) -> str:
    """How much of a file is there, in words."""
    if file.is_complete:
        return "there"
    if file.fetched_bytes:
        return f"{_format_bytes(file.fetched_bytes)} of it are there"
    return "to fetch"


def _format_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
