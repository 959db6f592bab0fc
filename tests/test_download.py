"""Downloads against local servers: what is listed, fetched, resumed, checked, refused; mirrors;
recipes; the hub's cache.
"""

import dataclasses
import hashlib
import re
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from servers import LFS_FROM, hub_server, s3_server

import run
from src import miniworld, parameters, pretrained, utils
from src.data.subject import open_subject
from src.miniworld.formats import SourceData
from src.miniworld.formats import nsd as nsd_format
from src.pipeline.download import (
    BUNDLES,
    MOVED_REPOS,
    RECIPE_EXTRAS,
    Bundle,
    FilePattern,
    PlannedDownload,
    fetch,
    fetch_files,
    fetch_planned,
    find_moved_repo,
    format_downloads,
    list_files,
    plan,
    plan_downloads,
    transfer,
)
from src.pipeline.download.bundles import name_parts
from src.pipeline.download.plan import find_torch_home
from src.pipeline.needs import collect_needs
from src.pipeline.recipes import list_recipes
from src.pretrained.base import locate_model
from src.pretrained.metric_networks import ARCHITECTURES
from src.readers import nsd
from src.utils import PerceptError

NSD, MINDEYE2 = ("dataset", "pscotti/naturalscenesdataset"), ("dataset", "pscotti/mindeyev2")
CLIP, VD = ("model", "openai/clip-vit-large-patch14"), ("model", "shi-labs/versatile-diffusion")
TAR = "webdataset_avg_split/train/train_subj01_0.tar"


def content(seed, size):
    return np.random.default_rng(seed).bytes(size)


def shards(layout="webdataset_avg_split", train=3):
    files_by_path = {
        f"{layout}/train/train_subj{s:02d}_{i}.tar": content(10 * s + i, 5000)
        for s in (1, 5)
        for i in range(train)
    }
    files_by_path |= {
        f"{layout}/{split}/{split}_subj{s:02d}_0.tar": content(s, 3000)
        for s in (1, 5)
        for split in ("val", "test")
    }
    return files_by_path | {
        f"{layout}/metadata_subj{s:02d}.json": b'{"totals": {}}' for s in (1, 5)
    }


def checkpoints():
    names = (
        "prior_257_final_subj01_bimixco_softclip_byol",
        "prior_1x768_final_subj01_bimixco_softclip_byol",
        "autoencoder_subj01_4x_locont_no_reconst",
    )
    files = ("last.pth", "last.pth", "epoch120.pth")
    files_by_path = {
        f"mindeye_models/{name}/{file}": content(i, 2000)
        for i, (name, file) in enumerate(zip(names, files, strict=True))
    }
    return files_by_path | {f"mindeye_models/{names[0]}/replication.pth": content(9, 9000)}


def mini_model(name, *folders):
    """A committed miniature, under the names of the real repository, with files beside it that
    nobody needs.
    """
    top = Path(locate_model(name, "mini"))
    paths = [
        p
        for p in top.rglob("*")
        if p.is_file() and (not folders or p.relative_to(top).parts[0] in folders)
    ]
    files_by_path = {str(p.relative_to(top)): p.read_bytes() for p in paths}
    return files_by_path | {
        "pytorch_model.bin": b"code",
        "flax_model.msgpack": b"x",
        "README.md": b"x",
        "pretrained_pth/vd.pth": b"x",
    }


@pytest.fixture
def hub():
    repos = {
        NSD: shards() | checkpoints() | {"README.md": b"hello", "wholebrain.tar": content(3, 4000)}
    }
    with hub_server(repos, page=4) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------- what is fetched
def test_the_shards_of_one_subject_and_nothing_else(hub, tmp_path):
    expected = {path for path in shards() if "subj05" in path}
    listed = fetch("mindeye", tmp_path / "to", subj=5, mirror=hub.url, dry_run=True)
    assert (
        {f.path for f in listed} == expected
        and {f.size for f in listed} == {5000, 3000, 14}
        and not (tmp_path / "to").exists()
    )
    fetched = fetch("mindeye", tmp_path / "to", subj=5, mirror=hub.url)
    assert below(tmp_path / "to") == expected and all(f.is_complete for f in fetched)
    for path in expected:
        assert (tmp_path / "to" / path).read_bytes() == hub.repos[NSD][path]
    assert {f.checksum.partition(":")[0] for f in fetched} == {"sha256", "git"}
    hub.log.clear()
    fetch("mindeye", tmp_path / "to", subj=5, mirror=hub.url)
    assert not [entry for entry in hub.log if entry[1].startswith("/cdn")], (
        "nothing is fetched twice"
    )


def test_the_early_shards_come_from_their_commit(hub, tmp_path):
    hub.repos[NSD] |= shards("webdataset")
    with pytest.raises(PerceptError, match=r"no such revision.*at 1234"):
        fetch("mindeye_early", tmp_path, subj=1, mirror=hub.url, revision="1234")
    fetch(
        "mindeye_early",
        tmp_path,
        subj=1,
        mirror=hub.url,
        revision="9947586218b6b7c8cab804009ddca5045249a38d",
    )
    assert below(tmp_path) == {
        path for path in shards("webdataset") if re.search(r"(train|val)_subj01", path)
    }
    addresses = [where for _, where, *_ in hub.log if "/revision/" in where]
    assert addresses[-1].endswith("/9947586218b6b7c8cab804009ddca5045249a38d")


def test_checkpoints_go_where_the_notebooks_look(hub, tmp_path):
    fetch("mindeye_checkpoints", tmp_path, mirror=hub.url)
    assert below(tmp_path) == {
        path.removeprefix("mindeye_models/") for path in checkpoints() if "replication" not in path
    }
    fetch("mindeye_checkpoints", tmp_path / "some", mirror=hub.url, names="prior_1x768")
    assert below(tmp_path / "some") == {"prior_1x768_final_subj01_bimixco_softclip_byol/last.pth"}


def test_a_missing_shard_is_named(hub, tmp_path):
    del hub.repos[NSD]["webdataset_avg_split/train/train_subj01_1.tar"]
    with pytest.raises(
        PerceptError, match=r"train shards of subject 1 up to number 2, but not number 1"
    ):
        fetch("mindeye", tmp_path, mirror=hub.url)
    with pytest.raises(PerceptError, match="has no train shards of subject 7"):
        fetch("mindeye", tmp_path, subj=7, mirror=hub.url)
    with pytest.raises(
        PerceptError, match="has no train shards of subject 1 .*webdataset_avg_new/train"
    ):
        fetch("mindeye_new", tmp_path, mirror=hub.url)


def test_the_minimal_part_of_mindeye2(tmp_path):
    files = {f"wds/subj{s:02d}/train/{i}.tar": content(i, 1500) for s in (1, 2) for i in range(4)}
    files |= {
        f"wds/subj{s:02d}/{split}/0.tar": content(s, 1500)
        for s in (1, 2)
        for split in ("test", "new_test")
    }
    files |= {f"betas_all_subj{s:02d}_fp32_renorm.hdf5": content(s, 1600) for s in (1, 2)}
    top = (
        "coco_images_224_float16.hdf5",
        "COCO_73k_subj_indices.hdf5",
        "brain_region_masks.hdf5",
        "shared1000.npy",
        "subj01_annots.npy",
        "zavychromaxl_v30.safetensors",
    )
    evals = (
        "all_images.pt",
        "all_captions.pt",
        "all_git_generated_captions.pt",
        "final/final_all_recons.pt",
    )
    files |= {
        name: b"small"
        for name in (
            *top,
            *(f"evals/{name}" for name in evals),
            "train_logs/final/last.pth",
            "train_logs/other/last.pth",
        )
    }
    with hub_server({MINDEYE2: files}) as hub:
        fetch("mindeye2", tmp_path / "one", subj=2, mirror=hub.url)
        small_files = {
            *top[:4],
            *(f"evals/{name}" for name in evals[:3]),
            "betas_all_subj02_fp32_renorm.hdf5",
            "wds/subj02/new_test/0.tar",
        }
        assert below(tmp_path / "one") == small_files | {"wds/subj02/train/0.tar"}
        fetch(
            "mindeye2", tmp_path / "all", subj=2, mirror=hub.url, num_sessions=0, checkpoint="final"
        )
        assert below(tmp_path / "all") == small_files | {
            f"wds/subj02/train/{i}.tar" for i in range(4)
        } | {"train_logs/final/last.pth"}
        with pytest.raises(PerceptError, match="has no session 5 of subject 2"):
            fetch("mindeye2", tmp_path / "many", subj=2, mirror=hub.url, num_sessions=5)


def test_a_frozen_model_lands_in_the_hubs_cache_and_loads_offline(tmp_path):
    with hub_server({CLIP: mini_model("clip")}) as hub:
        fetch("clip", tmp_path, mirror=hub.url)
    got = {Path(path).name for path in below(tmp_path)}
    assert (
        "model.safetensors" in got
        and "config.json" in got
        and not got & {"pytorch_model.bin", "flax_model.msgpack", "README.md"}
    )
    place = hf_hub_download(CLIP[1], "config.json", cache_dir=tmp_path, local_files_only=True)
    assert (
        Path(place).read_bytes() == (pretrained.MINI_MODELS / "clip" / "config.json").read_bytes()
    )
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(
        CLIP[1], cache_dir=tmp_path, local_files_only=True
    )
    original = transformers.CLIPVisionModelWithProjection.from_pretrained(
        pretrained.MINI_MODELS / "clip"
    )
    assert all(
        bool((a == b).all())
        for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )


def test_of_a_large_model_only_the_named_folders(tmp_path):
    with hub_server({VD: mini_model("versatile_diffusion")}) as hub:
        fetch("versatile_diffusion", tmp_path, mirror=hub.url)
    folders = {Path(path).parts[3] for path in below(tmp_path) if "snapshots" in path}
    assert folders == {"vae", "image_unet", "scheduler"}
    vae = diffusers.AutoencoderKL.from_pretrained(
        VD[1], subfolder="vae", cache_dir=tmp_path, local_files_only=True
    )
    assert utils.count_parameters(vae) > 0


def test_the_hubs_own_client_understands_the_server(hub, tmp_path):
    """Else the tests here would show that two pieces of our own agree with each other."""
    path = HfApi(endpoint=hub.url).hf_hub_download(
        NSD[1], TAR, repo_type="dataset", local_dir=tmp_path
    )
    assert Path(path).read_bytes() == hub.repos[NSD][TAR]


def test_tables_of_models_agree_with_what_is_loaded():
    for name, repo in pretrained.HUB.items():
        assert BUNDLES[name].repo == repo and BUNDLES[name].revision == pretrained.REVISIONS.get(
            repo, "main"
        )
    assert not set(MOVED_REPOS) & {bundle.repo for bundle in BUNDLES.values()} and not set(
        MOVED_REPOS
    ) & set(MOVED_REPOS.values())
    assert (
        BUNDLES["teacher"].folder == "data/teacher"
        and pretrained.TEACHER_FILE in BUNDLES["teacher"].patterns(subj=1)[0].description
    )


def test_a_withdrawn_id_is_mapped_with_a_message(tmp_path):
    repo = ("model", find_moved_repo("runwayml/stable-diffusion-v1-5")[0])
    assert repo[1] == pretrained.HUB["stable_diffusion"]
    with hub_server(
        {
            repo: {
                "model_index.json": b"{}",
                "vae/config.json": b"{}",
                "vae/diffusion_pytorch_model.bin": b"w",
                "v1-5-pruned.ckpt": b"w",
            }
        }
    ) as hub:
        with pytest.warns(UserWarning, match="withdrawn from the hub: stable-diffusion-v1-5/"):
            got = fetch("runwayml/stable-diffusion-v1-5", tmp_path, mirror=hub.url)
        assert {f.path for f in got} == {
            "model_index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.bin",
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not [f for f in fetch(repo[1], tmp_path, mirror=hub.url) if not f.is_complete]


# -------------------------------------------------------------------------------- resume and check
def test_a_broken_connection_is_resumed_by_range(hub, tmp_path):
    hub.cut[TAR] = [1234, 700]
    fetch("mindeye", tmp_path, mirror=hub.url)
    assert hub.requested_ranges(TAR) == ["", "bytes=1234-", "bytes=1934-"]
    assert (tmp_path / TAR).read_bytes() == hub.repos[NSD][TAR] and not list(
        tmp_path.rglob("*.part")
    )


def test_a_later_call_goes_on_with_the_part(hub, tmp_path):
    part = tmp_path / f"{TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.repos[NSD][TAR][:4000])
    listed = fetch("mindeye", tmp_path, mirror=hub.url, dry_run=True)
    assert "4 kB of it are there" in format_downloads(
        [PlannedDownload("shards", BUNDLES["mindeye"], tmp_path, listed)]
    )
    fetch("mindeye", tmp_path, mirror=hub.url)
    assert hub.requested_ranges(TAR) == ["bytes=4000-"]
    assert (tmp_path / TAR).read_bytes() == hub.repos[NSD][TAR]


def test_a_server_without_ranges_begins_again(hub, tmp_path):
    hub.ranges, hub.cut[TAR] = False, [1234]
    fetch("mindeye", tmp_path, mirror=hub.url)
    assert (tmp_path / TAR).read_bytes() == hub.repos[NSD][TAR]


def test_a_transfer_that_stays_truncated_keeps_its_part(hub, tmp_path):
    hub.cut[TAR] = [1234, *[0] * 20]
    with pytest.raises(PerceptError, match="server could not be reached|ended"):
        fetch("mindeye", tmp_path, mirror=hub.url)
    assert (tmp_path / f"{TAR}.part").stat().st_size == 1234 and not (tmp_path / TAR).exists()
    hub.cut.clear()
    fetch("mindeye", tmp_path, mirror=hub.url)
    assert hub.requested_ranges(TAR)[-1] == "bytes=1234-"
    assert (tmp_path / TAR).read_bytes() == hub.repos[NSD][TAR]


@pytest.mark.parametrize(
    "path, kind", [(TAR, "sha256"), ("webdataset_avg_split/metadata_subj01.json", "git")]
)
def test_wrong_content_is_refused_and_removed(hub, tmp_path, path, kind):
    hub.corrupted.add(path)
    with pytest.raises(PerceptError, match=rf"not the {kind} sum"):
        fetch("mindeye", tmp_path, mirror=hub.url)
    assert not (tmp_path / path).exists() and not (tmp_path / f"{path}.part").exists()
    hub.corrupted.clear()
    fetch("mindeye", tmp_path, mirror=hub.url)
    assert (tmp_path / path).read_bytes() == hub.repos[NSD][path]


def test_a_part_of_another_version_is_found_out(hub, tmp_path):
    for size, expected_error in ((4000, "sum"), (6000, None)):
        part = tmp_path / f"{TAR}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"x" * size)
        if expected_error:
            with pytest.raises(PerceptError, match=expected_error):
                fetch("mindeye", tmp_path, mirror=hub.url)
        fetch("mindeye", tmp_path, mirror=hub.url)
        assert (tmp_path / TAR).read_bytes() == hub.repos[NSD][TAR]
        (tmp_path / TAR).unlink()


def test_a_damaged_or_short_file_that_is_there_is_fetched_again(hub, tmp_path):
    fetch("mindeye", tmp_path, mirror=hub.url)
    for damage in (b"x" * 5000, b"short"):
        (tmp_path / TAR).write_bytes(damage)
        fetch("mindeye", tmp_path, mirror=hub.url)
        assert (tmp_path / TAR).read_bytes() == hub.repos[NSD][TAR]


def test_an_interrupt_keeps_the_part(hub, tmp_path, monkeypatch):
    hub.repos[NSD][TAR] = content(1, 4_000_000)
    files = list_files(BUNDLES["mindeye"], tmp_path, mirror=hub.url)
    append, has_begun = transfer._append_to_part, threading.Event()

    def slow(file, stop, bar):
        class Bar:
            def update(self, n):
                has_begun.set()
                time.sleep(0.02)

        append(file, stop, Bar())

    def interrupted(futures):
        assert has_begun.wait(5)
        time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "_append_to_part", slow)
    monkeypatch.setattr(transfer, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_files(files, tmp_path)
    parts = {p: p.stat().st_size for p in tmp_path.rglob("*.part")}
    assert 0 < parts[tmp_path / f"{TAR}.part"] < 4_000_000
    monkeypatch.undo()
    fetch_files(files, tmp_path)
    assert hub.requested_ranges(TAR)[-1].startswith("bytes=") and all(
        f.local.read_bytes() == hub.repos[NSD][f.path] for f in files
    )


def test_two_at_once_do_not_fetch_twice(hub, tmp_path):
    fetchers = [
        threading.Thread(target=fetch, args=("mindeye", tmp_path), kwargs={"mirror": hub.url})
        for _ in range(2)
    ]
    for one in fetchers:
        one.start()
    for one in fetchers:
        one.join()
    assert len(hub.requested_ranges(TAR)) == 1
    assert (tmp_path / TAR).read_bytes() == hub.repos[NSD][TAR]


# --------------------------------------------------------------------------------------- sentences
@pytest.mark.parametrize(
    "refused, message",
    [
        (
            (401, "RepoNotFound"),
            (
                r"does not show dataset pscotti/.*gated, private, or no longer under this id.*hf"
                r" auth login"
            ),
        ),
        ((401, ""), r"gated, private, or no longer"),
        ((403, "GatedRepo"), r"Access to dataset pscotti/.* is refused \(403\): ask for access"),
        ((404, "RepoNotFound"), r"no longer under this id"),
        ((503, ""), r"answered 503 .*try again later"),
    ],
)
def test_refusals(hub, tmp_path, refused, message):
    hub.refused[NSD[1]] = refused
    with pytest.raises(PerceptError, match=message) as caught:
        fetch("mindeye", tmp_path, mirror=hub.url)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_listed_and_gone(hub, tmp_path):
    hub.gone.add(TAR)
    with pytest.raises(PerceptError, match=rf"There is no {TAR} on the server \(404\)"):
        fetch("mindeye", tmp_path, mirror=hub.url)


def test_no_server(tmp_path):
    with pytest.raises(
        PerceptError,
        match="could not be reached for dataset pscotti/.*check the network, or give --mirror",
    ):
        fetch("mindeye", tmp_path, mirror="http://127.0.0.1:9")
    with pytest.raises(
        PerceptError, match="could not be reached for bucket natural-scenes-dataset"
    ):
        fetch("nsd", tmp_path, mirror="http://127.0.0.1:9")


def test_no_space(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(
        transfer.shutil,
        "disk_usage",
        lambda place: SimpleNamespace(free=transfer.SPARE_BYTES + 20_000),
    )
    with pytest.raises(PerceptError, match=r"No space for 0.00 GB on the disk of .* free some"):
        fetch("mindeye", tmp_path / "to", mirror=hub.url)
    assert not below(tmp_path)


def test_unknown_names(hub, tmp_path):
    with pytest.raises(
        PerceptError, match="nothing called 'mindy' to fetch: choose one of mindeye, "
    ):
        fetch("mindy", tmp_path)
    with pytest.raises(PerceptError, match="subj is 9"):
        fetch("mindeye", tmp_path, subj=9, mirror=hub.url)
    with pytest.raises(
        PerceptError,
        match="'sessions' is no option of .*choose among subj, num_sessions, checkpoint",
    ):
        fetch("mindeye2", tmp_path, mirror=hub.url, sessions=3)
    with pytest.raises(PerceptError, match="neither a folder nor an address"):
        fetch("mindeye", tmp_path, mirror="nowhere")
    with pytest.raises(PerceptError, match="Nothing is known to download for 'small_data'"):
        plan_downloads("small_data")


def test_a_token_goes_to_the_hub_and_not_to_a_mirror(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch("mindeye", tmp_path / "a", mirror=hub.url)
    assert hub.log and not any(token for *_, token in hub.log)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT sets
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    fetch("mindeye", tmp_path / "b")
    assert (tmp_path / "b" / TAR).exists() and any("hf_secret" in token for *_, token in hub.log)


# ----------------------------------------------------------------------------------------- folders
def test_a_folder_as_mirror_is_linked_or_copied(tmp_path, monkeypatch):
    for path, data in shards().items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(data)
    fetch("mindeye", tmp_path / "linked", mirror=str(tmp_path / "copy"))
    assert (tmp_path / "linked" / TAR).samefile(tmp_path / "copy" / TAR)

    def no_links(*_):
        raise OSError(18, "another disk")

    monkeypatch.setattr(transfer.os, "link", no_links)
    fetch("mindeye", tmp_path / "copied", mirror=str(tmp_path / "copy"))
    assert not (tmp_path / "copied" / TAR).samefile(tmp_path / "copy" / TAR)
    assert below(tmp_path / "copied") == {path for path in shards() if "subj01" in path}
    assert (tmp_path / "copied" / TAR).read_bytes() == shards()[TAR]
    (tmp_path / "copy" / TAR).unlink()
    with pytest.raises(
        PerceptError, match=r"copy has train shards of subject 1 up to number 2, but not number 0"
    ):
        fetch("mindeye", tmp_path / "third", mirror=str(tmp_path / "copy"))


def test_a_folder_with_several_repositories(tmp_path):
    for repo, files in ((CLIP, mini_model("clip")), (NSD, shards())):
        for path, data in files.items():
            (tmp_path / "copy" / repo[1] / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / repo[1] / path).write_bytes(data)
    fetch("clip", tmp_path / "hub", mirror=str(tmp_path / "copy"))
    assert hf_hub_download(
        CLIP[1], "config.json", cache_dir=tmp_path / "hub", local_files_only=True
    )
    assert len(fetch("mindeye", tmp_path / "to", mirror=str(tmp_path / "copy"))) == 6


# --------------------------------------------------------------------------------------------- NSD
BUCKET = "natural-scenes-dataset"


def nsd_objects():
    betas, subject_folder = (
        "nsddata_betas/ppdata/subj01/func1pt8mm/betas_fithrf_GLMdenoise_RR",
        "nsddata/ppdata/subj01",
    )
    files_by_path = {
        f"{betas}/betas_session{n:02d}.{ending}": content(n, 4000)
        for n in (1, 2, 3)
        for ending in ("hdf5", "nii.gz")
    }
    files_by_path |= {
        f"{betas}/ncsnr.nii.gz": b"n",
        f"{betas}/R2.nii.gz": b"n",
        f"{subject_folder}/behav/responses.tsv": b"SUBJECT",
        "nsddata/experiments/nsd/nsd_expdesign.mat": b"m",
    }
    files_by_path |= {
        f"{subject_folder}/{grid}/roi/{roi}.nii.gz": b"roi"
        for grid in ("func1pt8mm", "anat")
        for roi in ("nsdgeneral", "prf-visualrois", "streams")
    }
    files_by_path |= {
        f"{subject_folder}/transforms/anat0pt8-to-func1pt8.nii.gz": b"t",
        "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5": content(99, 6 * 2**20),
    }
    return files_by_path


@pytest.fixture
def s3():
    with s3_server(
        BUCKET, nsd_objects(), in_parts=["nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"]
    ) as url:
        yield url


def test_raw_nsd_from_a_bucket_without_credentials(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    files = fetch("nsd", tmp_path, mirror=s3)
    names = {Path(f.path).name for f in files}
    sessions = {f"betas_session{n:02d}.hdf5" for n in (1, 2, 3)}
    assert names == sessions | {
        "nsdgeneral.nii.gz",
        "ncsnr.nii.gz",
        "nsd_expdesign.mat",
        "responses.tsv",
        "nsd_stimuli.hdf5",
    }
    objects = nsd_objects()
    assert all((tmp_path / f.path).read_bytes() == objects[f.path] for f in files)
    sums = {Path(f.path).name: f.checksum for f in files}
    assert (
        sums["ncsnr.nii.gz"] == "md5:" + hashlib.md5(b"n").hexdigest()
        and sums["nsd_stimuli.hdf5"] == ""
    ), "S3 tells no sum of what came in parts"


def test_chosen_sessions_rois_and_the_anatomical_grid(s3, tmp_path):
    files = fetch(
        "nsd",
        tmp_path,
        mirror=s3,
        rois="prf-visualrois, streams",
        num_sessions=2,
        beta_format="nii.gz",
        anatomical=True,
        dry_run=True,
    )
    paths = {f.path for f in files}
    assert {Path(p).name for p in paths if "betas_session" in p} == {
        "betas_session01.nii.gz",
        "betas_session02.nii.gz",
    }
    assert {p for p in paths if "/roi/" in p} == {
        f"nsddata/ppdata/subj01/{g}/roi/{r}.nii.gz"
        for g in ("anat", "func1pt8mm")
        for r in ("prf-visualrois", "streams")
    }
    assert "nsddata/ppdata/subj01/transforms/anat0pt8-to-func1pt8.nii.gz" in paths
    with pytest.raises(PerceptError, match=r"has no session 4 \("):
        fetch("nsd", tmp_path, mirror=s3, num_sessions=4)
    with pytest.raises(PerceptError, match="has no .*roi/nowhere.nii.gz"):
        fetch("nsd", tmp_path, mirror=s3, rois="nowhere")
    with pytest.raises(PerceptError, match="beta_format is 'mgh': choose hdf5 or nii.gz"):
        fetch("nsd", tmp_path, mirror=s3, beta_format="mgh")


def test_s3_resumes_by_range_and_checks(s3, tmp_path, monkeypatch):
    (one,) = [
        f
        for f in list_files(BUNDLES["nsd"], tmp_path, mirror=s3)
        if f.path.endswith("session02.hdf5")
    ]
    offsets, opened = [], transfer.open_remote

    def record_start(file, start):
        offsets.append(start)
        return opened(file, start)

    monkeypatch.setattr(transfer, "open_remote", record_start)
    one.part.parent.mkdir(parents=True)
    one.part.write_bytes(nsd_objects()[one.path][:3000])
    with opened(one, 3000) as (offset, chunks):
        assert offset == 3000 and b"".join(chunks) == nsd_objects()[one.path][3000:], (
            "the server sent the rest alone"
        )
    fetch_files([one], tmp_path)
    assert offsets == [3000] and one.local.read_bytes() == nsd_objects()[one.path]
    one.local.unlink()
    one.part.write_bytes(b"x" * 3000)
    with pytest.raises(PerceptError, match="not the md5 sum"):
        fetch_files([one], tmp_path)
    assert not one.part.exists()


def test_a_bucket_that_is_not_there(s3, tmp_path):
    other = Bundle(
        "another bucket",
        "bucket",
        "no-such-bucket",
        "data/x",
        lambda subj: [FilePattern("a file", "a", "a/b")],
        "",
    )
    with pytest.raises(
        PerceptError, match=r"There is no bucket no-such-bucket on the server \(404\)"
    ):
        list_files(other, tmp_path, mirror=s3)


# ----------------------------------------------------------------------------------------- recipes
def world():
    laion = {f"vit-l-14/aesthetic/{name}": b"p" for name in ("best.pth", "prior_config.json")} | {
        "vit-l-14/laion2b/ema855M.pth": b"q"
    }
    variation = ("model", "lambdalabs/sd-image-variations-diffusers")
    return {
        NSD: shards() | shards("webdataset") | checkpoints(),
        MINDEYE2: {pretrained.TEACHER_FILE: content(5, 3000)},
        CLIP: mini_model("clip"),
        VD: mini_model("versatile_diffusion"),
        variation: mini_model("image_variation"),
        ("model", "nousr/conditioned-prior"): laion,
    }


def served(recipe):
    """The parts of a recipe that `world` has: all but the networks of the metrics."""
    parts = name_parts([*collect_needs(recipe, {}).bundles, *RECIPE_EXTRAS.get(recipe, [])])
    return ",".join(part for part, name in parts.items() if BUNDLES[name].kind != "web")


def test_recipes_fetch_what_they_need_where_they_look(tmp_path):
    with hub_server(world()) as hub:
        for recipe in ("mindeye", "mindeye_retrieval", "combined"):
            for one in plan_downloads(
                recipe, only=served(recipe), mirror=hub.url, to=str(tmp_path)
            ):
                fetch_planned(one)
    got = below(tmp_path)
    expected_paths = {f"data/nsd_source/{p}" for p in shards() if "subj01" in p} | {
        f"data/teacher/{pretrained.TEACHER_FILE}",
        "data/laion_prior/best.pth",
    }
    expected_paths |= {
        f"train_logs/{p.removeprefix('mindeye_models/')}"
        for p in checkpoints()
        if "replication" not in p
    }
    assert expected_paths <= got and any(
        p.startswith("data/nsd_early/webdataset/train/") for p in got
    )
    assert {Path(p).parts[1] for p in got if p.startswith("hub/")} == {
        f"models--{r[1].replace('/', '--')}" for r in (CLIP, VD)
    } | {"models--lambdalabs--sd-image-variations-diffusers"}
    assert (
        tmp_path / "hub" / "models--lambdalabs--sd-image-variations-diffusers" / "refs" / "v2.0"
    ).exists()


def test_overrides_move_things_and_only_chooses(hub, tmp_path):
    (planned,) = plan_downloads(
        "mindeye",
        only="shards",
        mirror=hub.url,
        overrides={"subj": "5", "data_path": str(tmp_path / "nsd")},
        to=str(tmp_path / "to"),
    )
    assert planned.folder == tmp_path / "nsd" and {f.path for f in planned.files} == {
        path for path in shards() if "subj05" in path
    }
    with pytest.raises(PerceptError, match="There is no parameter 'subject' .*did you mean 'subj'"):
        plan_downloads("mindeye", mirror=hub.url, overrides={"subject": "5"})
    with pytest.raises(PerceptError, match="--only does not know 'shard': choose among shards, "):
        plan_downloads("mindeye", only="shard", mirror=hub.url)
    with pytest.raises(PerceptError, match="revision belongs to one repository"):
        plan_downloads("mindeye", mirror=hub.url, overrides={"revision": "main"})


def without_networks(recipe, overrides):
    needs = collect_needs(recipe, overrides)
    kept = [name for name in needs.bundles if BUNDLES[name].kind != "web"]
    return dataclasses.replace(needs, bundles=kept)


def test_a_subject_without_released_networks(tmp_path, monkeypatch):
    with hub_server(world()) as hub:
        where = {"mirror": hub.url, "overrides": {"subj": 5}, "to": str(tmp_path)}
        monkeypatch.setattr(plan, "collect_needs", without_networks)
        planned = plan_downloads("mindeye", **where)
        assert {one.name for one in planned if not one.files} == {
            "checkpoints"
        } and "(none for this subject)" in format_downloads(planned)
        with pytest.raises(PerceptError, match="has no released checkpoints of subject 5"):
            plan_downloads("mindeye", only="checkpoints", mirror=hub.url, overrides={"subj": 5})


def test_what_a_bucket_gives_is_what_the_reader_needs(tmp_path):
    """The mini world as NSD's tree in a bucket: fetched without credentials, read, and the betas
    are those that were measured.
    """
    mini = miniworld.simulate(1, 20, 4, 6, trials_per_session=45)
    betas, trials = np.round(mini.scan.betas * 300) / np.float32(300), mini.scan.trials
    order = {image: row for row, image in enumerate(mini.image_ids.tolist())}
    trials = trials.assign(image=trials["image"].map(order))
    nsd_format.write(
        tmp_path / "bucket",
        1,
        SourceData(
            betas, trials, mini.images, np.arange(len(mini.images)), voxels=mini.scan.voxels
        ),
    )
    files = {
        str(path.relative_to(tmp_path / "bucket")): path.read_bytes()
        for path in (tmp_path / "bucket").rglob("*")
        if path.is_file()
    }
    with s3_server(BUCKET, files) as url:
        fetch("nsd", tmp_path / "nsd", mirror=url)
    nsd.read(
        tmp_path / "nsd", tmp_path / "prepared", 1, image_size=0, attributes={"protocol": "mini-6"}
    )
    subject = open_subject(tmp_path / "prepared", 1)
    np.testing.assert_allclose(subject.betas, betas, atol=1e-6)
    np.testing.assert_array_equal(subject.trials["image"], trials["image"])
    np.testing.assert_array_equal(
        subject.image_ids("test"), np.unique(trials.loc[trials["split"] == "test", "image"])
    )
    np.testing.assert_array_equal(
        subject.images(subject.image_ids("test")), mini.images[subject.image_ids("test")]
    )


def test_basic_ae_takes_raw_nsd(s3, tmp_path):
    (one,) = plan_downloads(
        "basic_ae", only="nsd", mirror=s3, to=str(tmp_path), overrides={"num_sessions": 1}
    )
    assert {Path(f.path).name for f in one.files} >= {
        "prf-visualrois.nii.gz",
        "betas_session01.nii.gz",
    } and one.folder == tmp_path / "data" / "nsd_raw"


def test_roi_voting_takes_the_regions_and_their_names(tmp_path):
    localisers = [f"floc-{what}" for what in ("faces", "bodies", "places", "words")]
    objects = nsd_objects() | {
        f"nsddata/ppdata/subj01/func1pt8mm/roi/{roi}.nii.gz": b"roi" for roi in localisers
    }
    objects |= {
        f"nsddata/freesurfer/subj01/label/{roi}.mgz.ctab": b"1 OFA"
        for roi in [*localisers, "Kastner2015"]
    }
    with s3_server(BUCKET, objects) as url:
        (one,) = plan_downloads(
            "roi_voting", only="nsd", mirror=url, to=str(tmp_path), overrides={"num_sessions": 1}
        )
        names = {Path(f.path).name for f in one.files}
    assert {n.removesuffix(".nii.gz") for n in names if n.endswith(".nii.gz")} == {
        "ncsnr",
        "nsdgeneral",
        "prf-visualrois",
        "streams",
        *localisers,
    }
    assert {n for n in names if n.endswith(".ctab")} == {
        f"{roi}.mgz.ctab" for roi in localisers
    } and "betas_session01.hdf5" in names
    with s3_server(BUCKET, nsd_objects()) as url, pytest.raises(PerceptError, match="floc-faces"):
        plan_downloads("roi_voting", only="nsd", mirror=url, to=str(tmp_path))


def test_blip_lands_in_the_hubs_cache_and_loads_offline(tmp_path):
    repo = pretrained.HUB["blip"]
    with hub_server({("model", repo): mini_model("blip")}) as hub:
        fetch("blip", tmp_path, mirror=hub.url)
    for cls in (transformers.BlipForConditionalGeneration, transformers.BlipProcessor):
        cls.from_pretrained(repo, cache_dir=tmp_path, local_files_only=True)


def test_every_bundle_and_recipe_is_described():
    recipes = [path.name for path in list_recipes() if collect_needs(path.name, {}).bundles]
    for recipe in recipes:
        needed = [*collect_needs(recipe, {}).bundles, *RECIPE_EXTRAS.get(recipe, [])]
        assert set(needed) <= set(BUNDLES) and len(name_parts(needed)) == len(needed)
    page = (utils.ROOT / "docs" / "downloads.md").read_text()
    for name in [*BUNDLES, *recipes]:
        assert f"`{name}`" in page, name
    for bundle in BUNDLES.values():
        assert bundle.terms.endswith(".") and bundle.patterns(subj=1)


def test_places_are_those_of_the_notebooks():
    default = parameters.parse_parameters(
        parameters.read_parameters_cell(parameters.NOTEBOOKS / "00_prepare_data.ipynb")
    )["data_path"].default
    for recipe in (path.name for path in list_recipes()):
        bundles = collect_needs(recipe, {}).bundles
        if bundles:  # what is fetched lies where the recipe reads it
            first = parameters.read_recipe(parameters.RECIPES / recipe / "00_prepare_data.yaml")
            assert BUNDLES[bundles[0]].folder == first.get("data_path", default), recipe


def test_addresses_of_the_metric_networks_are_those_they_load():
    for name, source in ARCHITECTURES.items():
        pattern = BUNDLES[name].patterns(subj=1)[0]
        assert source.url == f"https://{BUNDLES[name].repo}/{pattern.folder}"
    assert find_torch_home() / "hub" == Path(torch.hub.get_dir())


def test_sessions_and_subjects_are_those_of_the_recipe(tmp_path):
    files = {f"wds/subj{s:02d}/train/{i}.tar": b"t" for s in range(1, 9) for i in range(3)}
    files |= {f"wds/subj{s:02d}/new_test/0.tar": b"t" for s in range(1, 9)}
    files |= {f"betas_all_subj{s:02d}_fp32_renorm.hdf5": b"b" for s in range(1, 9)}
    top = ("coco_images_224_float16.hdf5", "COCO_73k_subj_indices.hdf5", "brain_region_masks.hdf5")
    files |= dict.fromkeys(top, b"x")
    with hub_server({MINDEYE2: files}) as hub:

        def fetched(recipe, **overrides):
            (one,) = plan_downloads(
                recipe, only="data", mirror=hub.url, to=str(tmp_path), overrides=overrides
            )
            return {f.path for f in one.files if f.path.startswith("wds") and "train" in f.path}

        assert fetched("mindeye2_small") == {"wds/subj01/train/0.tar"}
        assert fetched("mindeye2", subj=2, num_sessions=2) == {
            f"wds/subj02/train/{i}.tar" for i in range(2)
        }
        assert len(fetched("mindeye2")) == 3 and len(fetched("mindeye2_pretrain")) == 24


def test_what_the_issue_found_lacking_is_fetched():
    for recipe, names in {
        "basic_ae": ["clip"],
        "mindeye2_small": ["clip", "sdxl_configuration", "clip-bigG"],
        "mindeye2": ["clip", "teacher", "sdxl_configuration"],
        "mindeye2_pretrain": ["image_variation_vae", "teacher"],
        "roi_voting": ["stable_diffusion", "clip", "blip"],
    }.items():
        assert set(names) <= set(collect_needs(recipe, {}).bundles), recipe
    assert LFS_FROM < 2000


def test_the_command(tmp_path, monkeypatch, capsys):
    with hub_server(world()) as hub:
        arguments = [
            "mindeye",
            "--only",
            "shards,clip",
            "--mirror",
            hub.url,
            "--to",
            str(tmp_path / "to"),
        ]
        monkeypatch.setattr(sys, "argv", ["run.py", "download", *arguments, "--dry-run"])
        assert run.main() == 0
        output = capsys.readouterr().out
        assert (
            "to fetch" in output
            and TAR in output
            and "5 kB" in output
            and "Data Access Agreement" in output
            and not (tmp_path / "to").exists()
        )
        assert (
            run.main(["download", *arguments]) == 0
            and (tmp_path / "to" / "data" / "nsd_source" / TAR).exists()
        )
        capsys.readouterr()
        assert run.main(["download", *arguments]) == 0
        output = capsys.readouterr().out
        assert "to fetch 0 B" in output and " there " in output


def test_a_place_that_cannot_be_is_one_sentence(hub, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        PerceptError, match="The folder .*file/to could not be read or written .*Not a directory"
    ):
        fetch("mindeye", tmp_path / "file" / "to", mirror=hub.url)
