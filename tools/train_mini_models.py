"""Train the miniature of everything that is frozen: VAE, CLIP, Versatile Diffusion (image and text
flow), image variations.

    python tools/train_mini_models.py vae --minutes 10          # each stage resumes from its own checkpoint
    python tools/train_mini_models.py clip --minutes 10
    python tools/train_mini_models.py image --minutes 60 --processes 2
    python tools/train_mini_models.py robust --minutes 25       # the image flow once more, from tokens as vague as a decoder's
    python tools/train_mini_models.py text --minutes 12         # text tokens instead of image tokens
    python tools/train_mini_models.py variation --minutes 12    # one CLIP embedding instead of all the tokens
    python tools/train_mini_models.py stable --minutes 6        # Stable Diffusion: the text encoder's hidden states
    python tools/train_mini_models.py unclip --minutes 40       # MindEye2's decoder: patch tokens instead of all projected tokens
    python tools/train_mini_models.py blip --minutes 20         # captions, of clear pictures and of washed-out ones
    python tools/train_mini_models.py git --minutes 15          # captions from an image encoder's tokens, clear and vague
    python tools/train_mini_models.py judge --minutes 5         # the classifier that judges the results
    python tools/train_mini_models.py sentence --minutes 4      # sentence embeddings, by which captions are compared
    python tools/train_mini_models.py gnet --minutes 15 --no-bf16  # the encoder from images to voxels, of the demo's simulated subjects
    python tools/train_mini_models.py teacher --minutes 12      # local embeddings for the low level's contrastive loss
    python tools/train_mini_models.py alexnet --minutes 5       # twins of the networks that metrics look through; likewise
                                                                # efficientnet_b1, inception_v3,
                                                                swav_resnet50
    python tools/train_mini_models.py laion_prior --minutes 4   # text to image embeddings, from which the combined model starts
    python tools/train_mini_models.py export                    # writes data/mini_models/ in the libraries' own format
    python tools/train_mini_models.py export_laion_prior        # of it, the text to image prior alone
    python tools/train_mini_models.py export_blip               # of it, the captioner alone
    python tools/train_mini_models.py export_unclip             # of it, MindEye2's decoder alone
    python tools/train_mini_models.py export_git                # of it, the captioner of tokens alone
    python tools/train_mini_models.py export_sentence           # of it, the sentence embeddings alone
    python tools/train_mini_models.py export_gnet               # of it, the encoder of voxels alone
    python tools/train_mini_models.py export_metric_networks    # of it, the twins of the metrics' networks alone

- The images come from src/miniworld.py with a seed of their own and only from combinations of
  object, colour and scene that the mini world's training split has: no frozen model has seen a
  combination of the validation or the test set, but for those that only judge results (judge, twins
  of the metrics' networks), which have images of their own.
- Every stage logs its quality on held-out images to train_logs/mini_models/<stage>.jsonl and
  checkpoints every two minutes.
- Latents and tokens are computed once. Diffusion predicts v, with timesteps drawn towards high
  noise, and keeps an average of its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.pipelines.deprecated import VersatileDiffusionPipeline
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
    UNetFlatConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

from src import miniworld, pretrained
from src.evaluation import brain_correlation
from src.losses import mixco_nce
from src.models import CaptionConverter, DiffusionPriorNetwork
from src.networks import FRESH_IN_LAION
from src.pretrained import gnet, judge_input, take_transformers, unclip
from src.pretrained import metric_networks as networks
from src.prior import BrainDiffusionPrior
from src.training import augment

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(os.environ.get("PERCEPT_HOME", ROOT)) / "train_logs" / "mini_models"
OUT = ROOT / "data" / "mini_models"
SEED, JUDGE_SEED = (
    7_000,
    9_000,
)  # the mini world of the demo uses another seed, so the images differ as well as the combinations
PATCH, DIM, CONTEXT = 8, 128, 40
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


# -------------------------------------------------------------------------------------------- data
DRAWN = {  # what each set of images is drawn from: (seed, split of the combinations, images)
    "train": [(SEED, "train", 40_000)],
    "check": [(SEED, "val", 512)],
    "laion": [(SEED, "train", 12_000)],  # the first of these, for the text to image prior
    # the judge knows every combination, in their natural shares, so that it leans towards none; its
    # images are seen by no
    # model that encodes or generates (the twins of the metrics' networks, which only look at
    # results too, are trained on them as well)
    "judge": [
        (JUDGE_SEED, "train", 30_000),
        (JUDGE_SEED, "val", 5_000),
        (JUDGE_SEED, "test", 5_000),
    ],
    "judge_check": [
        (JUDGE_SEED + 1, "train", 1_500),
        (JUDGE_SEED + 1, "val", 250),
        (JUDGE_SEED + 1, "test", 250),
    ],
}


def images(split: str) -> np.ndarray:
    """uint8 (images, height, width, 3) of one of `DRAWN`, drawn once."""
    path = WORK / f"images_{split}.npy"
    if not path.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        block = np.concatenate(
            [part for source in DRAWN[split] for part in miniworld.image_blocks(*source)]
        )
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, block)
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def pixels(block: np.ndarray) -> Tensor:
    """uint8 (batch, height, width, 3) -> float (batch, 3, height, width) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(block)).permute(0, 3, 1, 2).float() / 255


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def words(split: str) -> tuple[list[list[str]], np.ndarray]:
    """Five captions an image, and labels (images, 6): scene, kind, colour, pattern, light, place as
    indices.
    """
    captions, labels = [], []
    for what in (
        miniworld.compose(seed, i, source)
        for seed, source, count in DRAWN[split]
        for i in range(count)
    ):
        main = what.things[-1]
        captions.append(miniworld.caption(what))
        labels.append([what.scene, main.kind, main.colour, main.pattern, what.light, what.place])
    return captions, np.array(labels)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- the loop that every stage shares
class Average:
    """Exponential moving average of a module's parameters (decay .999, quicker at the beginning)."""

    def __init__(self, module: nn.Module):
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        decay = min(0.999, (1 + step) / (10 + step))
        for k, v in module.state_dict().items():
            (
                self.shadow[k].lerp_(v.detach().to(self.shadow[k].dtype), 1 - decay)
                if v.is_floating_point()
                else self.shadow[k].copy_(v)
            )


def train(
    stage: str, module: nn.Module, loss_of, check, args, lr: float, batch: int, rank: int = 0
) -> None:
    """Train `module` for args.minutes of wall time in all (earlier runs counted in), then leave its
    averaged weights in <stage>.pt.

    loss_of(rng, batch) -> scalar loss; check(module with averaged weights) -> dict of numbers to
    log.
    """
    path, log = WORK / f"{stage}.pt", WORK / f"{stage}.jsonl"
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=1e-2, betas=(0.9, 0.99))
    average, step, spent = Average(module), 0, 0.0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.shadow, step, spent = state["average"], state["step"], state["spent"]
    budget = args.minutes * 60
    rng = np.random.default_rng([SEED, step, rank])
    torch.manual_seed(SEED + step * 7 + rank)
    started, saved, checked, running = time.time() - spent, time.time(), time.time(), []
    while (elapsed := _agreed(time.time() - started)) < budget:
        for (
            group
        ) in optimizer.param_groups:  # warm up, then fall linearly over the last third of the time
            group["lr"] = (
                lr * min(1.0, (step + 1) / 200) * min(1.0, (1 - elapsed / budget) / 0.35 + 0.01)
            )
        with torch.autocast(device().type, dtype=torch.bfloat16, enabled=args.bf16):
            loss = loss_of(rng, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _share_gradients(trainable)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        step += 1
        running.append(loss.item())
        average.update(module, step)
        if rank == 0 and time.time() - saved > 120:
            _save(path, module, optimizer, average, step, time.time() - started)
            saved = time.time()
        if rank == 0 and time.time() - checked > 180:
            _log(log, module, average, check, step, time.time() - started, running, batch)
            checked, running = time.time(), []
    if rank == 0:
        _save(path, module, optimizer, average, step, time.time() - started)
        _log(log, module, average, check, step, time.time() - started, running, batch)


def _agreed(seconds: float) -> float:
    """The first process's clock, for all: the learning rate and the last step hang on it, and they
    must be the same everywhere.
    """
    if not torch.distributed.is_initialized():
        return seconds
    clock = torch.tensor(seconds, dtype=torch.float64)
    torch.distributed.broadcast(clock, 0)
    return float(clock)


def _share_gradients(parameters: list[nn.Parameter]) -> None:
    if torch.distributed.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(piece.view_as(p))


def _save(path: Path, module, optimizer, average, step, spent) -> None:
    state = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.shadow,
        "step": step,
        "spent": spent,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.rename(path)


def _log(log: Path, module, average, check, step, spent, running, batch) -> None:
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(average.shadow)
    module.eval()
    with torch.no_grad():
        row = {
            "step": step,
            "minutes": round(spent / 60, 2),
            "batch": batch,
            "loss": round(float(np.mean(running or [0])), 5),
            **check(module),
        }
    module.train()
    module.load_state_dict(kept)
    with open(log, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(log.stem, row, flush=True)


def averaged(stage: str, module: nn.Module) -> nn.Module:
    """Load the averaged weights that a stage left behind."""
    path = WORK / f"{stage}.pt"
    if not path.exists():
        sys.exit(f"{path} is missing: run the stage '{stage}' first")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    return module.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------- VAE
def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=miniworld.IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def train_vae(args, rank: int = 0) -> None:
    data, held = images("train"), pixels(images("check"))
    vae = new_vae().to(device())

    def loss_of(rng, batch):
        x = 2 * pixels(data[np.sort(rng.integers(len(data), size=batch))]).to(device()) - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        return F.mse_loss(y.float(), x) * 4 + F.l1_loss(y.float(), x) + 0.5 * edges + 1e-3 * kl

    def check(model):
        x = held.to(device())
        y = model.decode(model.encode(2 * x - 1).latent_dist.mode()).sample / 2 + 0.5
        return {
            "psnr": round(
                float(-10 * torch.log10(((y.clamp(0, 1) - x) ** 2).mean(dim=(1, 2, 3))).mean()), 3
            )
        }

    train("vae", vae, loss_of, check, args, lr=2e-3, batch=64, rank=rank)


# -------------------------------------------------------------------------------------------- CLIP
@cache
def new_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer learnt from the mini captions, in CLIP's own file format."""
    folder = WORK / "tokenizer"
    if not (folder / "vocab.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-")
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(
            (c for five in words("train")[0][:4000] for c in five), trainer
        )
        described = json.loads(tokenizer.to_str())["model"]
        vocabulary = [
            token for token, _ in sorted(described["vocab"].items(), key=lambda item: item[1])
        ]
        vocabulary += [t for t in [a + "</w>" for a in alphabet] if t not in vocabulary]
        vocabulary = [t for t in vocabulary if not t.startswith("<|")] + [
            "<|startoftext|>",
            "<|endoftext|>",
        ]  # EOS has the highest id
        merges = [" ".join(m) if isinstance(m, list) else m for m in described["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CONTEXT
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    text = {
        "hidden_size": DIM,
        "intermediate_size": 4 * DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "eos_token_id": eos,
        "bos_token_id": bos,
        "pad_token_id": eos,
        "projection_dim": DIM,
    }
    vision = {
        "hidden_size": DIM,
        "intermediate_size": 4 * DIM,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": miniworld.IMAGE_SIZE,
        "patch_size": PATCH,
        "projection_dim": DIM,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM))


def image_tokens(vision_model, projection, x: Tensor) -> Tensor:
    """All the projected tokens (batch, 1 + patches, dim), CLS first, of pixel values that CLIP's
    processor would give.
    """
    return projection(vision_model.post_layernorm(vision_model(pixel_values=x).last_hidden_state))


class ClipTrainer(nn.Module):
    """CLIP with what teaches it here: labels from the pooled vector, and each patch's own pixels
    from its token.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        sizes = [
            len(miniworld.SCENES),
            len(miniworld.KINDS),
            len(miniworld.COLOURS),
            len(miniworld.PATTERNS),
            len(miniworld.LIGHTS),
            3,
        ]
        self.heads = nn.ModuleList(nn.Linear(DIM, n) for n in sizes)
        self.pixels = nn.Linear(DIM, 3 * PATCH * PATCH)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = image_tokens(
            self.clip.vision_model, self.clip.visual_projection, normalised(x.cpu()).to(x.device)
        )
        text = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return tokens, text


def patches(x: Tensor) -> Tensor:
    """(batch, 3, height, width) -> (batch, patches, 3 * patch * patch)."""
    return F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)


def train_clip(args, rank: int = 0) -> None:
    data, held = images("train"), pixels(images("check"))
    tokenizer = new_tokenizer()
    (captions, labels), (check_captions, check_labels) = words("train"), words("check")
    encode = lambda texts: (
        tokenizer(
            texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
        ).input_ids
    )  # noqa: E731
    ids = torch.stack(
        [encode([five[k] for five in captions]) for k in range(5)], 1
    )  # (images, 5, context)
    model = ClipTrainer(new_clip(tokenizer)).to(device())

    def loss_of(rng, batch):
        index = np.sort(rng.integers(len(data), size=batch))
        x = pixels(data[index])
        x = (
            (x * torch.empty(batch, 3, 1, 1).uniform_(0.92, 1.08) + 0.02 * torch.randn_like(x))
            .clamp(0, 1)
            .to(device())
        )
        tokens, text = model(x, ids[index, rng.integers(5, size=batch)].to(device()))
        pooled = F.normalize(tokens[:, 0].float(), dim=-1)
        logits = (
            pooled
            @ F.normalize(text.float(), dim=-1).T
            * model.clip.logit_scale.exp().clamp(max=50)
        )
        target = torch.arange(batch, device=x.device)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        wanted = torch.from_numpy(labels[index]).to(x.device)
        named = sum(
            F.cross_entropy(head(tokens[:, 0]).float(), wanted[:, i])
            for i, head in enumerate(model.heads)
        )
        drawn = F.mse_loss(model.pixels(tokens[:, 1:]).float(), patches(2 * x - 1))
        return contrast + 0.7 * named + 3 * drawn

    def check(model):
        x = held.to(device())
        tokens, text = model(x, encode([five[0] for five in check_captions]).to(device()))
        similarity = F.normalize(tokens[:, 0], dim=-1) @ F.normalize(text, dim=-1).T
        hit = [
            float((similarity.argmax(d).cpu() == torch.arange(len(x))).float().mean())
            for d in (1, 0)
        ]
        right = [
            float(
                (head(tokens[:, 0]).argmax(1).cpu() == torch.from_numpy(check_labels[:, i]))
                .float()
                .mean()
            )
            for i, head in enumerate(model.heads)
        ]
        drawn = (
            F.mse_loss(model.pixels(tokens[:, 1:]), patches(2 * x - 1)) / patches(2 * x - 1).var()
        )
        names = ("scene", "kind", "colour", "pattern", "light", "place")
        return {
            "top1_of_512": [round(h, 3) for h in hit],
            "pixel_r2": round(1 - float(drawn), 3),
            **{n: round(r, 3) for n, r in zip(names, right, strict=True)},
        }

    train("clip", model, loss_of, check, args, lr=1e-3, batch=128, rank=rank)


# ---------------------------------------------------------------------------------- BLIP: captions
NAMING = (0, 1, 3, 4)  # those of the five captions that name kind, colour and scene
SCENE_WORDS = {
    "sandy": "beach"
}  # a word that tells the scene without being its name; every other caption holds the name itself


def word_ids(*more: str, last: tuple[str, ...] = ()) -> dict[str, int]:
    """The ids of BERT's special tokens, of every word of the mini captions and of some more, each
    of them whole.
    """
    some = (
        text
        for i in range(2_000)
        for text in miniworld.caption(miniworld.compose(SEED, i, "train"))
    )  # they hold every word many times
    known = sorted({word for text in some for word in text.split()} | set(more))
    return {
        token: i
        for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known, *last])
    }


@cache
def new_blip_tokenizer() -> BertTokenizer:
    """BLIP's kind of tokenizer over the words of the mini captions; [DEC] begins a caption, [SEP]
    ends it.
    """
    return BertTokenizer(
        vocab=word_ids("blurry", last=("[DEC]",)), bos_token="[DEC]", model_max_length=CONTEXT
    )


def new_blip(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    """A vision transformer as large as the mini CLIP's, and three blocks that write words while
    looking at its tokens.
    """
    sep = tokenizer.sep_token_id
    vision = {
        "hidden_size": DIM,
        "intermediate_size": 4 * DIM,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": miniworld.IMAGE_SIZE,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
        "initializer_range": 0.02,
    }
    text = {
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": sep,
        "eos_token_id": sep,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))


@torch.no_grad()
def look_as_clip(blip: BlipForConditionalGeneration, sample: Tensor) -> None:
    """Begin the vision tower with the mini CLIP's weights; where CLIP normalises its embeddings,
    BLIP gets their mean scale for `sample`.
    """
    clip = pretrained.Clipper("mini").model.model.vision_model
    mine, embeddings = blip.vision_model, clip.embeddings(normalised(sample))
    scale = clip.pre_layrnorm.weight.mean() / embeddings.std(dim=-1).mean()
    mine.embeddings.class_embedding.copy_(scale * clip.embeddings.class_embedding)
    mine.embeddings.position_embedding.copy_(scale * clip.embeddings.position_embedding.weight)
    mine.embeddings.patch_embedding.weight.copy_(scale * clip.embeddings.patch_embedding.weight)
    mine.embeddings.patch_embedding.bias.zero_()
    mine.post_layernorm.load_state_dict(clip.post_layernorm.state_dict())
    for taker, donor in zip(mine.encoder.layers, clip.encoder.layers, strict=True):
        attention = donor.self_attn
        for part in ("weight", "bias"):
            joined = torch.cat(
                [getattr(m, part) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
            )
            getattr(taker.self_attn.qkv, part).copy_(joined)
        taker.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(taker, name).load_state_dict(getattr(donor, name).state_dict())


LATENT_NOISE = (
    0.0,
    1.7,
    # log10 of the variance under which latents are seen: the guess keeps between .85 and .43 of
    # their
    # variance
)


def degraded(split: str, count: int = 12_000) -> np.ndarray:
    """uint8 (images, height, width, 3): the first images decoded from latents as vague as a
    decoder's guess (see `Vagueness`), made once.
    """
    path = WORK / f"degraded_{split}.npy"
    if not path.exists():
        vae, stored = (
            pretrained.LatentAutoencoder("mini", "stable_diffusion"),
            images(split)[:count],
        )
        vague = Vagueness(
            torch.cat(
                [vae.encode(pixels(part)) for part in np.array_split(images("train")[:6000], 24)]
            ).numpy()
        )
        torch.manual_seed(SEED + len(stored))
        parts = []
        for part in np.array_split(stored, max(1, len(stored) // 250)):
            latents = vague(
                vae.encode(pixels(part)), 10 ** torch.empty(len(part)).uniform_(*LATENT_NOISE)
            )
            parts.append((255 * vae.decode(latents)).round().byte().permute(0, 2, 3, 1).numpy())
        np.save(path, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def washed_out(x: Tensor) -> Tensor:
    """Images (batch, 3, height, width) blurred, drawn towards their own mean colour and under
    smooth noise, each to a degree of its own.
    """
    n = len(x)
    x = augment.K.RandomGaussianBlur((9, 9), (0.7, 2.5), p=1.0)(x)
    x = torch.lerp(x, x.mean((2, 3), keepdim=True), torch.empty(n, 1, 1, 1).uniform_(0, 0.6))
    noise = F.interpolate(torch.randn(n, 3, 8, 8), x.shape[-2:], mode="bilinear")
    return (x + 0.1 * torch.rand(n, 1, 1, 1) * noise).clamp(0, 1)


def named_in(caption: str) -> tuple[str, str, str]:
    """Scene, kind and colour that a caption names, "" where it names none; the main object comes
    first in every caption.
    """
    said = [SCENE_WORDS.get(word, word) for word in caption.split()]
    return tuple(
        next((word for word in said if word in answers), "") for answers in ANSWERS.values()
    )


def named_share(captions: list[str], labels: np.ndarray) -> dict[str, float]:
    """Share of captions that name what is shown; labels (images, >= 3): scene, kind, colour as
    indices.
    """
    said = np.array([named_in(caption) for caption in captions])
    return {
        q: round(float((said[:, i] == np.array(a)[labels[:, i]]).mean()), 4)
        for i, (q, a) in enumerate(ANSWERS.items())
    }


def train_blip(args, rank: int = 0) -> None:
    """Half of the pictures clear, half washed out (by the VAE's vague latents or by blur); what a
    caption of these says first is that they are blurry.
    """
    data, dim, (captions, _), (_, labels) = (
        images("train"),
        degraded("train"),
        words("train"),
        words("check"),
    )
    held = {"": pixels(images("check")), "degraded_": pixels(degraded("check"))}
    tokenizer = new_blip_tokenizer()
    blip = new_blip(tokenizer)
    look_as_clip(blip, pixels(data[:250]))
    blip.to(device())
    encode = lambda texts: (
        tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    )  # noqa: E731
    ids = [encode([five[k] for five in captions]) for k in NAMING] + [
        encode(["a blurry picture of " + five[0] for five in captions])
    ]
    ids = torch.stack(ids, 1)  # (images, captions, 24)
    ids[:, :, 0] = tokenizer.bos_token_id

    def loss_of(rng, batch):
        way = rng.choice(3, p=(0.5, 0.3, 0.2), size=batch)  # clear, vague latents, blur
        index = rng.integers(np.where(way == 1, len(dim), len(data)))
        x = torch.where(
            torch.from_numpy(way == 1)[:, None, None, None],
            pixels(dim[index % len(dim)]),
            pixels(data[index]),
        )
        x = torch.where(
            torch.from_numpy(way == 2)[:, None, None, None], washed_out(x), augment.tinted(x)
        )
        said = ids[
            index, np.where(way == 0, rng.integers(len(NAMING), size=batch), len(NAMING))
        ].to(device())
        seen = (said != tokenizer.pad_token_id).long()
        return blip(
            pixel_values=normalised(x).to(device()),
            input_ids=said,
            attention_mask=seen,
            labels=said.masked_fill(seen == 0, -100),
        ).loss

    def check(model):
        shares = {}
        for kind, x in held.items():
            made = tokenizer.batch_decode(
                model.generate(pixel_values=normalised(x).to(device()), max_length=20),
                skip_special_tokens=True,
            )
            shares |= {
                kind + question: share for question, share in named_share(made, labels).items()
            }
        return shares | {"says": made[0]}

    train("blip", blip, loss_of, check, args, lr=1e-3, batch=128, rank=rank)


# ---------------------------------------------------- GIT: captions from an image encoder's tokens
VIEW_NOISE = (
    -1.0,
    2.0,
)  # log10 of the variance, in units of that of the patch tokens, under which they are seen
WAYS = {
    "clear": 0.2,
    "degraded": 0.1,
    "converted": 0.2,
    "guessed": 0.25,
    "sampled": 0.25,
}  # how tokens are seen, and how often


@cache
def new_git_tokenizer() -> BertTokenizer:
    """GIT's kind of tokenizer over the words of the mini captions; [CLS] begins a caption, [SEP]
    ends it.
    """
    return BertTokenizer(
        vocab=word_ids(), bos_token="[CLS]", eos_token="[SEP]", model_max_length=CONTEXT
    )


def new_git(tokenizer: BertTokenizer) -> GitForCausalLM:
    """GIT with the mini CLIP's vision tower as its image encoder, and three blocks that write words
    after its tokens.
    """
    clip = pretrained.Clipper("mini").model.model.vision_model
    text = {
        "hidden_size": DIM,
        "intermediate_size": 4 * DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    shared = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "hidden_act",
    )
    git = GitForCausalLM(
        GitConfig(vision_config={name: getattr(clip.config, name) for name in shared}, **text)
    )
    git.git.image_encoder.vision_model.load_state_dict(clip.state_dict())
    git.git.image_encoder.requires_grad_(False)
    return git


@torch.no_grad()
def git_tokens(encoder: nn.Module, pictures: np.ndarray) -> np.ndarray:
    """uint8 (images, height, width, 3) -> what GIT's image encoder says of them, float16 (images, 1 +
    patches, dim).
    """
    parts = [
        encoder(normalised(pixels(part))).last_hidden_state.half().numpy()
        for part in np.array_split(pictures, max(1, len(pictures) // 500))
    ]
    return np.concatenate(parts)


def train_converter(
    patches: Tensor, wanted: Tensor, steps: int = 500, lr: float = 1e-2
) -> CaptionConverter:
    """The map from CLIP's patch tokens (images, patches, dim) to GIT's (images, 1 + patches, dim)
    that notebook 04 trains.
    """
    converter = CaptionConverter(
        patches.shape[1], wanted.shape[1], patches.shape[2], wanted.shape[2]
    )
    nn.init.eye_(
        converter.linear2.weight
    )  # both encoders began as one; from a random start some patches end with the wrong sign
    optimizer = torch.optim.Adam(converter.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(patches), (128,))
        loss = F.mse_loss(converter(patches[rows]), wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(
        f"converter: R2 {1 - loss.item() / float((wanted - wanted.mean(0)).square().mean()):.3f}",
        flush=True,
    )
    return converter.requires_grad_(False)


def any_class_token(x: Tensor) -> Tensor:
    """Tokens (batch, 1 + patches, dim), in half of them some mixture of the patches in the place of
    the class token.

    Patches say nothing about the class token, so every converter puts something else there:
    captions have to be read from the patches.
    """
    weights = torch.randn(len(x), 1, x.shape[1] - 1) * torch.rand(len(x), 1, 1)
    other = torch.cat([weights @ x[:, 1:], x[:, 1:]], 1)
    return torch.where(torch.rand(len(x), 1, 1) < 0.5, other, x)


def git_views(
    encoder: nn.Module, split: str, noise: tuple[float, float], guesses: int
) -> dict[str, Tensor]:
    """Tokens (images, 1 + patches, dim) by the way they are seen; the first `guesses` images only
    of those that a decoder would give.

    As a decoder gives them are the patch tokens: the estimate that errs least (see `Vagueness`), or
    a sample of what is still possible, as a diffusion prior draws it. Both reach GIT through the
    converter, as in notebook 04.
    """
    known = torch.from_numpy(git_tokens(encoder, images("train")[:6000])).float()
    converter, vague = train_converter(known[:, 1:], known), Vagueness(known[:, 1:].numpy())
    found = {
        way: torch.from_numpy(git_tokens(encoder, pictures))
        for way, pictures in (("clear", images(split)), ("degraded", degraded(split)))
    }
    found["converted"] = torch.cat(
        [converter(part.float()).half() for part in found["clear"][:, 1:].split(500)]
    )
    for way in ("guessed", "sampled"):
        parts = []
        for part in found["clear"][:guesses, 1:].float().split(500):
            levels = known.var() * 10 ** torch.empty(len(part)).uniform_(*noise)
            parts.append(converter(vague(part, levels, sample=way == "sampled")).half())
        found[way] = torch.cat(parts)
    return found


def train_git(args, rank: int = 0) -> None:
    """Train the words alone: the image encoder stays the mini CLIP's, and its tokens are made once,
    in all the ways they are seen (see `git_views`).

    What a caption says does not depend on how the tokens are seen.
    """
    (captions, _), (_, labels) = words("train"), words("check")
    tokenizer = new_git_tokenizer()
    git = new_git(tokenizer)
    encoder, git.git.image_encoder = git.git.image_encoder, pretrained.GivenTokens()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        seen, held = (
            git_views(encoder, "train", VIEW_NOISE, 20_000),
            git_views(encoder, "check", (1.0, 1.0), len(labels)),
        )
    ids = [
        tokenizer(
            [five[k] for five in captions],
            padding="max_length",
            max_length=CONTEXT,
            return_tensors="pt",
        ).input_ids
        for k in NAMING
    ]
    ids = torch.stack(ids, 1)  # (images, captions, positions)
    ids = ids[:, :, : int((ids != tokenizer.pad_token_id).sum(-1).max())]
    git.to(device())

    def loss_of(rng, batch):
        parts = []
        for way, count in zip(WAYS, rng.multinomial(batch, list(WAYS.values())), strict=True):
            index = rng.integers(len(seen[way]), size=count)
            x = seen[way][index].float()
            if way in ("converted", "guessed", "sampled"):
                x = any_class_token(x)
            parts.append((x, ids[index, rng.integers(len(NAMING), size=count)]))
        x, said = (torch.cat(some).to(device()) for some in zip(*parts, strict=True))
        known = (said != tokenizer.pad_token_id).long()
        return git(
            pixel_values=x[:, None],
            input_ids=said,
            attention_mask=known,
            labels=said.masked_fill(known == 0, -100),
        ).loss

    def check(model):
        shares = {}
        for way, x in held.items():
            made = tokenizer.batch_decode(
                model.generate(pixel_values=x[:, None].float().to(device()), max_length=20),
                skip_special_tokens=True,
            )
            shares |= {
                f"{way}_{question}": share for question, share in named_share(made, labels).items()
            } | {way: made[0]}
        return shares

    train("git", git, loss_of, check, args, lr=1e-3, batch=128, rank=rank)


# --------------------------------------------------------------------------------------- the judge
ANSWERS = {
    "scene": list(miniworld.SCENES),
    "kind": list(miniworld.KINDS),
    "colour": list(miniworld.COLOURS),
}


def new_judge() -> ResNetForImageClassification:
    """One network with the logits of three questions side by side: scene, kind and colour of the
    main object.
    """
    names = [f"{question}: {answer}" for question, answers in ANSWERS.items() for answer in answers]
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[2, 2, 2],
            layer_type="basic",
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )


def judge_share(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the logits (images, answers of all questions) whose answer is right; labels (images,
    >= 3): scene, kind, colour.
    """
    parts = logits.cpu().split([len(answers) for answers in ANSWERS.values()], dim=1)
    return {
        q: round(float((part.argmax(1) == labels[:, i]).float().mean()), 4)
        for i, (q, part) in enumerate(zip(ANSWERS, parts, strict=True))
    }


def blemished(x: Tensor) -> Tensor:
    """Images shifted, blurred, noisy and off in colour, so that the judge looks at what is shown
    and not at how cleanly it is painted.
    """
    n = len(x)
    move = torch.eye(2, 3).repeat(n, 1, 1)
    move[:, :, :2] *= torch.empty(n, 1, 1).uniform_(0.92, 1.08)
    move[:, :, 2] = torch.empty(n, 2).uniform_(-0.1, 0.1)
    x = F.grid_sample(
        x,
        F.affine_grid(move, list(x.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    x = torch.lerp(x, blurred, torch.rand(n, 1, 1, 1))
    x = x * torch.empty(n, 3, 1, 1).uniform_(0.94, 1.06) + torch.empty(n, 1, 1, 1).uniform_(
        -0.04, 0.04
    )
    return (x + 0.05 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)


def train_judge(args, rank: int = 0) -> None:
    data, held = images("judge"), pixels(images("judge_check"))
    labels, check_labels = (
        torch.from_numpy(words(split)[1][:, :3]) for split in ("judge", "judge_check")
    )
    judge, sizes = new_judge().to(device()), [len(answers) for answers in ANSWERS.values()]

    def loss_of(rng, batch):
        index = np.sort(rng.integers(len(data), size=batch))
        logits = (
            judge(judge_input(blemished(pixels(data[index]))).to(device()))
            .logits.float()
            .split(sizes, dim=1)
        )
        wanted = labels[index].to(device())
        return sum(
            F.cross_entropy(part, wanted[:, i], label_smoothing=0.05)
            for i, part in enumerate(logits)
        )

    def check(model):
        return judge_share(
            torch.cat([model(judge_input(x).to(device())).logits.cpu() for x in held.split(250)]),
            check_labels,
        )

    train("judge", judge, loss_of, check, args, lr=2e-3, batch=128, rank=rank)


# --------------------------------------------- sentence embeddings, by which captions are compared
SENTENCE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
ALIKE = torch.tensor(
    [0.25, 0.4, 0.2, 0.05, 0.05, 0.05]
)  # what two pictures' likeness is made of: scene, kind, colour, pattern, light, place


@cache
def new_sentence_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab=word_ids("blurry"), model_max_length=CONTEXT)


def new_sentence() -> BertModel:
    tokenizer = new_sentence_tokenizer()
    return BertModel(
        BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SENTENCE),
        add_pooling_layer=False,
    )


def sentence_vectors(bert: BertModel, captions: list[str]) -> Tensor:
    """Captions -> (captions, dim) of length one: the mean over the words, as sentence_transformers
    pools by default.
    """
    words_of = new_sentence_tokenizer()(
        captions, padding=True, truncation=True, return_tensors="pt"
    ).to(bert.device)
    kept = words_of["attention_mask"][..., None].float()
    return F.normalize(
        (bert(**words_of).last_hidden_state.float() * kept).sum(1) / kept.sum(1), dim=-1
    )


def likeness(labels: Tensor) -> Tensor:
    """How alike pictures are, (images, images) in [0, 1], by the labels (images, 6) that they
    share.
    """
    return ((labels[:, None] == labels[None]) * ALIKE).sum(-1)


def train_sentence(args, rank: int = 0) -> None:
    """The cosine of two captions is to be how alike their pictures are: regression on graded pairs,
    the way of the first sentence transformers.
    """
    (captions, labels), (held, held_labels) = words("judge"), words("judge_check")
    labels, held_labels = torch.from_numpy(labels), torch.from_numpy(held_labels)
    bert = new_sentence().to(device())

    def loss_of(rng, batch):
        index = np.repeat(
            rng.integers(len(captions), size=batch), 2
        )  # two captions of every picture
        vectors = sentence_vectors(
            bert,
            [captions[i][k] for i, k in zip(index, rng.integers(5, size=2 * batch), strict=True)],
        )
        return F.mse_loss(vectors @ vectors.T, likeness(labels[index]).to(vectors.device))

    def check(model):
        first, second = (
            sentence_vectors(model, [five[k] for five in held[:500]]).cpu() for k in (0, 3)
        )
        cosine, alike = first @ second.T, likeness(held_labels[:500])
        hit = float((cosine.argmax(1) == torch.arange(500)).float().mean())
        correlation = float(torch.corrcoef(torch.stack([cosine.flatten(), alike.flatten()]))[0, 1])
        return {
            "correlation_with_likeness": round(correlation, 4),
            "top1_of_500": round(hit, 3),
            "same": round(float(cosine.diagonal().mean()), 3),
            "other": round(float(cosine.mean()), 3),
        }

    train("sentence", bert, loss_of, check, args, lr=2e-3, batch=64, rank=rank)


def export_sentence() -> None:
    """Write the twin as sentence_transformers saves a model: `SentenceTransformer(folder)` reads
    it.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        body = averaged("sentence", new_sentence())
        whole = BertModel(
            body.config
            # with the library's pooler, which nothing here reads: zeros, so that the file has all
            # that
            # the class expects
        )
        whole.load_state_dict(
            {k: torch.zeros_like(v) for k, v in whole.state_dict().items()} | body.state_dict()
        )
        whole.half().save_pretrained(folder)
        new_sentence_tokenizer().save_pretrained(folder)
        reader = Transformer(folder, max_seq_length=CONTEXT)
        SentenceTransformer(
            modules=[reader, Pooling(SENTENCE["hidden_size"]), Normalize()], device="cpu"
        ).save(str(OUT / "sentence"), create_model_card=False)


# ----------------------------------------------------------------------------------------- teacher
TEACHER = {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "maps": (96, 96, 512)}
TEACHER_SIZE = 128  # pixels a side that it sees: four by four locations


def teacher_input(x: Tensor) -> Tensor:
    """Images (batch, 3, 32, 32) in [0, 1] as the teacher takes them."""
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in (pretrained.TEACHER_MEAN, pretrained.TEACHER_STD)
    )
    return (
        F.interpolate(x, (TEACHER_SIZE, TEACHER_SIZE), mode="bilinear", antialias=True) - mean
    ) / std


def linear_probe(
    features: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor
) -> dict[str, float]:
    """Share of right answers that a ridge classifier reads from features (images, dim)."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, y = ((f - mean) / std for f in (features, held))
    wanted = torch.cat(
        [
            F.one_hot(column, len(answers))
            for column, answers in zip(labels.T, ANSWERS.values(), strict=True)
        ],
        1,
    ).float()
    solved = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ wanted)
    return judge_share(y @ solved, held_labels)


def train_teacher(args, rank: int = 0) -> None:
    """Each place is to be found again in a second view (differing in light, sharpness and noise
    alone) among all places of all images of the batch.

    Simpler than VICRegL and its crops; without negatives from the same image the embeddings of a
    picture's places became all alike.
    """
    data, held = images("train"), pixels(images("check"))
    labels, check_labels = (
        torch.from_numpy(words(split)[1][:, :3]) for split in ("train", "check")
    )
    teacher = pretrained.ConvNeXtMaps(**TEACHER).to(device())

    def view(x):
        x = augment.tinted(x)
        return teacher_input(x).to(device())

    def loss_of(rng, batch):
        x = pixels(data[np.sort(rng.integers(len(data), size=batch))])
        a, b = (F.normalize(teacher(view(x)).flatten(0, 1).float(), dim=-1) for _ in range(2))
        return mixco_nce(a, b, temp=0.1)

    def features(model, x):
        return torch.cat(
            [
                model(teacher_input(part).to(device()))
                .unflatten(1, (2, 2, 2, 2))
                .mean((2, 4))
                .flatten(1)
                .cpu()
                for part in x.split(250)
            ]
        )

    def check(model):
        return linear_probe(
            features(model, pixels(data[:4000])), labels[:4000], features(model, held), check_labels
        )

    train("teacher", teacher, loss_of, check, args, lr=1e-3, batch=48, rank=rank)


# ------------------------------------------------- twins of the networks that metrics look through
METRIC_NETWORKS = {  # by the folder that src/networks.py looks in
    "alexnet": {
        "class": "AlexNet",
        "settings": {"channels": [16, 32, 64, 64, 64], "kernel": 7, "stride": 2},
        "size": 64,
    },
    "efficientnet_b1": {
        "class": "EfficientNet",  # blocks: expansion, kernel, stride, channels in and out, repeats
        "settings": {
            "blocks": [[1, 3, 1, 24, 16, 1], [4, 3, 2, 16, 40, 2], [4, 3, 1, 40, 64, 2]],
            "last_channel": 320,
        },
        "size": 32,
    },
    "inception_v3": {
        "class": "ShuffleNetV2",
        "settings": {"repeats": [2, 3, 2], "channels": [16, 48, 96, 192, 384]},
        "size": 64,
    },
    "swav_resnet50": {
        "class": "RegNet",
        "settings": {
            "stem_width": 16,
            "depths": [1, 2, 1],
            "widths": [48, 96, 192],
            "group_widths": [16, 32, 32],
            "bottleneck_multipliers": [1.0] * 3,
            "strides": [2, 2, 2],
        },
        "size": 64,
    },
}


class Twin(nn.Module):
    """A twin with the head that trains it, which is left behind: logits of the judge's questions,
    or what is compared between two views.
    """

    def __init__(self, name: str):
        super().__init__()
        self.body, self.size = (
            networks.new_twin(METRIC_NETWORKS[name]),
            METRIC_NETWORKS[name]["size"],
        )
        with torch.no_grad():
            dim = self.body.eval()(torch.zeros(1, 3, self.size, self.size)).shape[1]
        answers = sum(len(each) for each in ANSWERS.values())
        compared = nn.Sequential(
            nn.Linear(dim, 256), nn.BatchNorm1d(256), nn.ReLU(True), nn.Linear(256, 128, bias=False)
        )
        self.head = (
            compared
            if name == "swav_resnet50"
            else nn.Sequential(nn.Dropout(0.1), nn.Linear(dim, answers))
        )
        self.train()

    def features(self, x: Tensor) -> Tensor:
        """Images (batch, 3, 32, 32) in [0, 1] -> (batch, dim), as src/networks.py makes them of
        `resizing` "straight".
        """
        mean, std = (
            torch.tensor(values, device=x.device).view(1, 3, 1, 1)
            for values in (networks.IMAGENET_MEAN, networks.IMAGENET_STD)
        )
        return self.body((F.interpolate(x, (self.size, self.size), mode="bilinear") - mean) / std)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_metric_network(name: str, args, rank: int = 0) -> None:
    """A classifier of the judge's images and questions; SwAV's twin learns without labels, by
    finding an image again in a second view of it.

    The judge's images are those that no model that encodes or generates has seen. Of SwAV it keeps
    that it needs no labels, not its clusters.
    """
    data, held = images("judge"), pixels(images("judge_check"))
    labels, check_labels = (
        torch.from_numpy(words(split)[1][:, :3]) for split in ("judge", "judge_check")
    )
    twin, sizes = Twin(name).to(device()), [len(answers) for answers in ANSWERS.values()]
    view = nn.Sequential(
        augment.K.RandomHorizontalFlip(p=0.5), augment.teacher_augmentation(miniworld.IMAGE_SIZE)
    )

    def loss_of(rng, batch):
        index = np.sort(rng.integers(len(data), size=batch))
        x = pixels(data[index])
        if name == "swav_resnet50":
            a, b = F.normalize(
                twin(torch.cat([view(x), view(x)]).to(device())).float(), dim=-1
            ).chunk(2)
            return mixco_nce(a, b, temp=0.1)
        wanted, logits = (
            labels[index].to(device()),
            twin(blemished(x).to(device())).float().split(sizes, dim=1),
        )
        return sum(
            F.cross_entropy(part, wanted[:, i], label_smoothing=0.05)
            for i, part in enumerate(logits)
        )

    def features(model, x):
        return torch.cat([model.features(part.to(device())).cpu() for part in x.split(250)])

    def check(model):
        if name != "swav_resnet50":
            return judge_share(
                torch.cat([model(x.to(device())).cpu() for x in held.split(250)]), check_labels
            )
        some, torch_state = pixels(data[::10]), torch.get_rng_state()
        untrained = Twin(name).to(device()).eval()
        torch.set_rng_state(torch_state)
        probed = {
            key: linear_probe(features(m, some), labels[::10], features(m, held), check_labels)
            for key, m in (("", model), ("random_", untrained))
        }
        return {
            key + question: share
            for key, shares in probed.items()
            for question, share in shares.items()
        }

    train(
        name,
        twin,
        loss_of,
        check,
        args,
        lr=2e-3,
        batch=96 if name == "swav_resnet50" else 128,
        rank=rank,
    )


# --------------------------------------------------------------------- LAION's text -> image prior
LAION = {
    "dim": DIM,
    "depth": 2,
    "dim_head": 32,
    "heads": 4,
    "num_timesteps": 100,
    "max_text_len": 4,
}
LAION_SCALE = 0.39  # brings the embeddings to unit variance, as theirs are


def new_laion_prior() -> BrainDiffusionPrior:
    """The prior alone; its null text encodings are left out of the file, as LAION's has none, and
    so are drawn anew at every step.
    """
    prior = BrainDiffusionPrior(
        DiffusionPriorNetwork(**LAION),
        image_embed_dim=DIM,
        timesteps=LAION["num_timesteps"],
        cond_drop_prob=0.0,
        image_embed_scale=LAION_SCALE,
    )
    for name in FRESH_IN_LAION:
        prior.get_parameter(name).requires_grad_(False)
    return prior


def laion_pairs(split: str) -> tuple[Tensor, Tensor]:
    """Embeddings of the shipped mini CLIP: captions (images, 5, dim) and images (images, dim),
    computed once.
    """
    path = WORK / f"laion_{split}.npz"
    if not path.exists():
        clip, captions = (
            pretrained.Clipper("mini", hidden=False, norm_embs=False),
            [text for five in words(split)[0] for text in five],
        )
        text = torch.cat(
            [
                clip.embed_text(captions[start : start + 250])
                for start in range(0, len(captions), 250)
            ]
        )
        seen = np.concatenate(
            [
                clip.encode_pixels(part)
                for part in np.array_split(images(split), max(1, len(images(split)) // 500))
            ]
        )
        np.savez(path, text=text.view(-1, 5, DIM).half().numpy(), seen=seen.astype(np.float16))
    stored = np.load(path)
    return torch.from_numpy(stored["text"]).float(), torch.from_numpy(stored["seen"]).float()


def train_laion_prior(args, rank: int = 0) -> None:
    (text, seen), (held_text, held) = (laion_pairs(split) for split in ("laion", "check"))
    prior = new_laion_prior().to(device())

    def loss_of(rng, batch):
        prior.net.null_text_encodings.data.normal_()
        index = rng.integers(len(seen), size=batch)
        condition, wanted = (
            text[index, rng.integers(5, size=batch)].to(device()),
            seen[index].to(device()),
        )
        return prior(text_embed=condition, image_embed=wanted)[0]

    def check(model):
        """Of held-out combinations, first captions: R2 of one step from pure noise (the mean) and
        of a sample; images found by it among 512.
        """
        condition, wanted = held_text[:, 0].to(device()), held.to(device())
        last = torch.full((len(held),), LAION["num_timesteps"] - 1, device=condition.device)
        mean = model.net(torch.randn_like(wanted), last, condition) / model.image_embed_scale
        sample = model.sample(condition, generator=torch.Generator().manual_seed(1))
        found = (F.normalize(sample, dim=-1) @ F.normalize(wanted, dim=-1).T).argmax(
            1
        ) == torch.arange(len(held), device=wanted.device)
        r2 = {
            name: round(1 - float((made - wanted).square().mean() / wanted.var()), 3)
            for name, made in (("r2_mean", mean), ("r2_sample", sample))
        }
        return r2 | {"top1_of_512": round(float(found.float().mean()), 3)}

    train("laion_prior", prior, loss_of, check, args, lr=1e-3, batch=256, rank=rank)


def export_laion_prior() -> None:
    """Write the prior as LAION's file is: a bare state dict of the wrapper without the null
    embeddings; network in half precision.
    """
    state = averaged("laion_prior", new_laion_prior()).state_dict()
    (OUT / "laion_prior").mkdir(parents=True, exist_ok=True)
    kept = {
        key: value.half() if key.startswith("net.") else value
        for key, value in state.items()
        if key not in FRESH_IN_LAION
    }
    torch.save(kept, OUT / "laion_prior" / "best.pth")


# --------------------------------------------------------------------------------------- diffusion
WIDTHS, HEADS = (64, 96, 96), 4
TEXTUAL = ("text", "stable")
START = {
    "robust": "image",
    "text": "image",
    "variation": "image",
    "stable": "text",
}  # whose weights a flow begins with
JUDGED = 128  # images that the judge looks at when a diffusion stage logs its quality


def new_unet(**more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=miniworld.IMAGE_SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=DIM,
        attention_head_dim=HEADS,
        **more,
    )


def new_text_unet() -> UNetFlatConditionModel:
    """The text flow's network: only its cross-attention blocks are ever run (on the image flow's
    convolutions).
    """
    return UNetFlatConditionModel(
        sample_size=1,
        in_channels=32,
        out_channels=32,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat", "CrossAttnDownBlockFlat"),
        up_block_types=("CrossAttnUpBlockFlat", "CrossAttnUpBlockFlat", "UpBlockFlat"),
        cross_attention_dim=DIM,
        attention_head_dim=HEADS,
    )


@torch.no_grad()
def conditioning(kind: str, split: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Latents (images, 4, h, w), conditions (images, [5,] tokens, dim) as the pipelines will feed
    them, and the latents' scale; computed once.
    """
    kind = "image" if kind == "robust" else kind
    path = WORK / f"cache_{kind}_{split}.npz"
    if path.exists():
        stored = np.load(path)
        return stored["latents"], stored["condition"], float(stored["scale"])
    clip, vae = (
        averaged("clip", ClipTrainer(new_clip(new_tokenizer()))).clip.to(device()),
        averaged("vae", new_vae()).to(device()),
    )
    data, latents, condition = images(split), [], []
    for start in range(0, len(data), 500):
        x = pixels(data[start : start + 500]).to(device())
        latents.append(vae.encode(2 * x - 1).latent_dist.mode().half().cpu().numpy())
        if kind not in TEXTUAL:
            tokens = image_tokens(
                clip.vision_model, clip.visual_projection, normalised(x.cpu()).to(x.device)
            )
            tokens = (
                tokens / tokens[:, :1].norm(dim=-1, keepdim=True)
                if kind == "image"
                else tokens[:, :1]
            )
            condition.append(tokens.half().cpu().numpy())
    if kind in TEXTUAL:
        condition = _text_conditions(clip, split, kind)
    result = np.concatenate(latents), np.concatenate(condition)
    scale = 1.0 / float(result[0].astype(np.float32).std())
    np.savez(path, latents=result[0], condition=result[1], scale=scale)
    return *result, scale


def _text_conditions(clip: CLIPModel, split: str, kind: str) -> list[np.ndarray]:
    """Text tokens of the three captions of an image that name its scene, (images, 3, tokens, dim)
    in parts.
    """
    captions = [five[k] for five in words(split)[0] for k in (0, 1, 3)]
    parts = (
        text_tokens(clip, captions[start : start + 600], kind).half().cpu().numpy()
        for start in range(0, len(captions), 600)
    )
    return [part.reshape(-1, 3, *part.shape[1:]) for part in parts]


@torch.no_grad()
def text_tokens(clip: CLIPModel, captions: list[str], kind: str) -> Tensor:
    """What a text-guided pipeline is given, (captions, tokens, dim).

    Versatile Diffusion ("text"): every projected hidden state over the norm of the pooled one;
    Stable Diffusion ("stable"): the hidden states.
    """
    ids = new_tokenizer()(
        captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids
    hidden = clip.text_model(input_ids=ids.to(next(clip.parameters()).device))
    if kind == "stable":
        return hidden.last_hidden_state
    pooled = clip.text_projection(hidden.pooler_output)[:, None]
    return clip.text_projection(hidden.last_hidden_state) / pooled.norm(dim=-1, keepdim=True)


def read_hidden_states(unet: nn.Module, factor: float) -> None:
    """Turn the text flow, which reads projected tokens, into a network that reads the hidden states
    behind them: its start for Stable Diffusion.
    """
    clip = averaged("clip", ClipTrainer(new_clip(new_tokenizer()))).clip
    captions = [five[0] for five in words("check")[0][:256]]
    ratio = float(
        text_tokens(clip, captions, "text").norm()
        / clip.text_projection(text_tokens(clip, captions, "stable")).norm()
    )
    change = (
        clip.text_projection.weight
        * ratio
        * condition_scale(conditioning("text", "check")[1])
        / factor
    )  # (projected, hidden)
    for name, parameter in unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            parameter.data = parameter.data @ change.to(parameter.device)


def condition_scale(condition: np.ndarray) -> float:
    """Tokens over the CLS norm are tiny: the network is trained on unit-variance tokens and the
    factor is folded into its weights on export.
    """
    return 1.0 / float(condition[:2000].astype(np.float32).std())


class Vagueness:
    """Tokens as a decoder would guess them: of a noisy view of the tokens, the linear estimate with
    the least squared error.

    The less certain the view, the more the estimate shrinks towards the mean image, fine detail
    first. The robust flow is trained on such tokens too, at all levels of certainty, so that it
    paints an object where the tokens only hint at one. (Noise on the condition in training is what
    unCLIP and cascaded diffusion models do; the filter makes the noise look like a regression's
    error.)
    """

    def __init__(self, condition: np.ndarray):
        tokens = torch.from_numpy(condition[:6000].astype(np.float32)).flatten(1)
        self.mean = tokens.mean(0)
        self.variance, self.axes = torch.linalg.eigh(torch.cov((tokens - self.mean).T))
        self.variance = self.variance.clamp_min(0)

    def __call__(self, tokens: Tensor, noise: Tensor, sample: bool = False) -> Tensor:
        """Tokens (batch, tokens, dim) seen under noise of variance `noise` (batch,), of the order
        of the tokens' own; with `sample`, a draw, not the mean.
        """
        parts = (tokens.flatten(1) - self.mean) @ self.axes  # (batch, principal components)
        noise = noise[:, None]
        view = parts + noise.sqrt() * torch.randn_like(parts)
        guess = view * self.variance / (self.variance + noise)
        if sample:  # what is left of the variance once the view is known
            guess = guess + (
                self.variance * noise / (self.variance + noise)
            ).sqrt() * torch.randn_like(parts)
        return (guess @ self.axes.T + self.mean).view_as(tokens)


@torch.no_grad()
def sampled(
    unet: nn.Module, condition: Tensor, null: Tensor, guidance: float = 3.5, steps: int = 20
) -> Tensor:
    """Latents (batch, 4, h, w) from pure noise, as the pipelines of src/pretrained.py sample them."""
    scheduler = UniPCMultistepScheduler.from_config(
        DDIMScheduler(**SCHEDULE).config, final_sigmas_type="sigma_min", timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    side = miniworld.IMAGE_SIZE // 2
    latents = torch.randn(
        len(condition), 4, side, side, generator=torch.Generator().manual_seed(3)
    ).to(condition.device)
    both = torch.cat([null.expand_as(condition), condition])
    for t in scheduler.timesteps:
        without, given = (
            unet(torch.cat([latents, latents]), t, encoder_hidden_states=both)
            .sample.float()
            .chunk(2)
        )
        latents = scheduler.step(without + guidance * (given - without), t, latents).prev_sample
    return latents


def diffusion_stage(stage: str, args, rank: int = 0) -> None:
    """Train the image flow, the text flow or the one-token network on cached latents and
    conditions.
    """
    torch.set_num_threads(args.threads)
    latents, condition, scale = conditioning(stage, "train")
    held = [
        torch.from_numpy(a.astype(np.float32)).to(device())
        for a in conditioning(stage, "check")[:2]
    ]
    factor, scheduler = condition_scale(condition), DDIMScheduler(**SCHEDULE)
    unet = new_unet().to(device())
    if (
        stage != "image"
        # every other flow shares the image flow's convolutions; its transformers begin as copies
        # and
        # are all that trains
    ):
        averaged(START[stage], unet).train()
        if stage == "stable":
            read_hidden_states(unet, factor)
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                module.requires_grad_(True)
    null = _null_condition(stage).to(device())
    vae, judge = (
        averaged("vae", new_vae()).to(device()),
        averaged("judge", new_judge()).to(device()),
    )
    labels = torch.from_numpy(words("check")[1][:JUDGED])
    alphas = scheduler.alphas_cumprod.to(device())

    vague = Vagueness(condition) if stage == "robust" else None

    def judged(latents):
        pictures = (vae.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)
        return judge_share(judge(judge_input(pictures)).logits, labels)

    def noised(x0, c, t, noise):
        a = alphas[t].view(-1, 1, 1, 1)
        return (
            unet(
                a.sqrt() * x0 + (1 - a).sqrt() * noise, t, encoder_hidden_states=c * factor
            ).sample,
            a.sqrt() * noise - (1 - a).sqrt() * x0,
        )

    def loss_of(rng, batch):
        index = np.sort(rng.integers(len(latents), size=batch))
        x0 = torch.from_numpy(latents[index].astype(np.float32)).to(device()) * scale
        c = (
            condition[index]
            if condition.ndim == 3
            else condition[index, rng.integers(condition.shape[1], size=batch)]
        )
        c = torch.from_numpy(c.astype(np.float32))
        if vague is not None:  # of one in five the tokens are left as they are
            c = torch.where(
                torch.rand(batch, 1, 1) < 0.2,
                c,
                vague(c, 10 ** torch.empty(batch).uniform_(-3.5, -1.0)),
            )
        c = c.to(device())
        c = torch.where(torch.rand(batch, 1, 1, device=c.device) < 0.1, null, c)
        t = (
            (1000 * (1 - torch.rand(batch, device=c.device) ** 1.6)).long().clamp(0, 999)
        )  # towards high noise, where conditioning is learnt
        prediction, target = noised(x0, c, t, torch.randn_like(x0))
        return F.mse_loss(prediction.float(), target)

    def check(model):
        g = torch.Generator().manual_seed(1)
        x0, c = held[0] * scale, held[1] if held[1].ndim == 3 else held[1][:, 0]
        t = torch.linspace(1, 998, len(x0)).long().to(device())
        noise = torch.randn(x0.shape, generator=g).to(device())
        with torch.autocast(device().type, dtype=torch.bfloat16, enabled=args.bf16):
            prediction, target = noised(x0, c, t, noise)
            made = sampled(model, c[:JUDGED] * factor, null * factor)
        error = ((prediction.float() - target) ** 2).mean(dim=(1, 2, 3))
        errors = {
            "held_out": round(float(error.mean()), 4),
            "held_out_high_noise": round(float(error[t > 800].mean()), 4),
        }
        if vague is not None:
            with (
                torch.random.fork_rng(),
                torch.autocast(device().type, dtype=torch.bfloat16, enabled=args.bf16),
            ):
                torch.manual_seed(2)
                hinted = sampled(
                    model,
                    vague(c[:JUDGED].cpu(), torch.full((JUDGED,), 0.02)).to(c.device) * factor,
                    null * factor,
                )
            errors["from_vague_tokens"] = judged(hinted)
        return errors | judged(made)

    train(stage, unet, loss_of, check, args, lr=args.lr, batch=args.batch, rank=rank)


def _null_condition(stage: str) -> Tensor:
    """What the pipelines pass for "no condition": zeros for images, the tokens of an empty sentence
    for text; (1, 1 or tokens, dim).
    """
    if stage not in TEXTUAL:
        return torch.zeros(1, 1, DIM)
    return text_tokens(averaged("clip", ClipTrainer(new_clip(new_tokenizer()))).clip, [""], stage)


# ---------------------------------------------------------------------- unCLIP: MindEye2's decoder
UNCLIP_VECTOR = 64  # four numbers, size and crop, of 16 each: 1024 in the real network
UNCLIP_NOISE = (
    -0.5,
    1.85,
    # log10 of the noise under which tokens are seen, as a share of their variance: as of the stage
    # `robust`
)


def new_unclip() -> UNet2DConditionModel:
    """The image flow's network with a vector beside its tokens, by which SDXL is told size and
    crop.
    """
    return new_unet(
        class_embed_type="projection", projection_class_embeddings_input_dim=UNCLIP_VECTOR
    )


@torch.no_grad()
def begin_as_image_flow(unet: UNet2DConditionModel, factor: float) -> None:
    """Begin with the shipped image flow, CLIP's projection and the mean norm of its class token
    folded into the maps that read the tokens.
    """
    donor, clip = (
        pretrained.VersatileDiffusion("mini").unet.state_dict(),
        pretrained.Clipper("mini", norm_embs=False),
    )
    norm = clip.embed_image(pixels(images("check"))[:250])[:, 0].norm(dim=-1).mean()
    change = clip.model.model.visual_projection.weight / norm / factor  # (projected, hidden)
    mine = {
        k: v @ change if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else v
        for k, v in donor.items()
    }
    nn.init.zeros_(unet.class_embedding.linear_2.weight)  # at first the vector says nothing
    nn.init.zeros_(unet.class_embedding.linear_2.bias)
    unet.load_state_dict(
        mine | {k: v for k, v in unet.state_dict().items() if k.startswith("class_embedding.")}
    )


@torch.no_grad()
def patch_tokens(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents (images, 4, h, w) and patch tokens before CLIP's projection (images, tokens,
    dim), of the shipped models; computed once.
    """
    path = WORK / f"cache_unclip_{split}.npz"
    if not path.exists():
        vae, vision = (
            pretrained.LatentAutoencoder("mini"),
            pretrained.Clipper("mini").model.model.vision_model,
        )
        latents, tokens = [], []
        for part in np.array_split(images(split), max(1, len(images(split)) // 250)):
            x = pixels(part)
            latents.append(vae.encode(x).half().numpy())
            tokens.append(
                vision.post_layernorm(vision(pixel_values=normalised(x)).last_hidden_state[:, 1:])
                .half()
                .numpy()
            )
        np.savez(path, latents=np.concatenate(latents), tokens=np.concatenate(tokens))
    stored = np.load(path)
    return stored["latents"], stored["tokens"]


def unclip_pictures(unet: nn.Module, tokens: Tensor, factor: float, steps: int = 10) -> Tensor:
    """Pictures (batch, 3, 32, 32) from tokens, which are multiplied by `factor`; sampled as
    src/unclip.py does, from noise that is always the same.
    """
    g, side = torch.Generator().manual_seed(3), miniworld.IMAGE_SIZE // 2
    noise, null = (
        torch.randn(len(tokens), 4, side, side, generator=g),
        torch.randn(tokens.shape, generator=g),
    )
    scheduler = unclip_scheduler()
    scheduler.set_timesteps(timesteps=unclip.euler_timesteps(steps))
    start = noise * (1 + scheduler.sigmas[0] ** 2).sqrt()
    latents = unclip.denoise(
        unet, scheduler, start, tokens * factor, null * factor, unclip_vector()
    )
    return pretrained.LatentAutoencoder("mini").decode(latents)


def unclip_scheduler() -> EulerDiscreteScheduler:
    """The schedule of the other flows, with the noise predicted by way of v."""
    return EulerDiscreteScheduler(**{key: SCHEDULE[key] for key in unclip.SCHEDULER})


def unclip_vector() -> Tensor:
    """Every picture is as large as it was painted, and nothing was cut off."""
    return unclip.size_vector((miniworld.IMAGE_SIZE,) * 2, (0, 0), UNCLIP_VECTOR)


def train_unclip(args, rank: int = 0) -> None:
    """From patch tokens, true ones, vague ones and samples of what these leave open; a tenth of the
    conditions are noise, which stands for none.
    """
    (latents, tokens), (held, held_tokens) = patch_tokens("train"), patch_tokens("check")
    held, held_tokens, factor = (
        torch.from_numpy(held).float(),
        torch.from_numpy(held_tokens).float(),
        condition_scale(tokens),
    )
    unet, vague, scheduler, vector = (
        new_unclip(),
        Vagueness(tokens),
        DDIMScheduler(**SCHEDULE),
        unclip_vector(),
    )
    begin_as_image_flow(unet, factor)
    judge, labels = new_judge(), torch.from_numpy(words("check")[1][: JUDGED // 2])
    judge.load_state_dict(pretrained.Judge("mini").model.state_dict())
    judge.eval()

    def noised(model, x0, c, t):
        noise, a = torch.randn_like(x0), scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        predicted = model(
            x, t, encoder_hidden_states=c * factor, class_labels=vector.expand(len(x), -1)
        ).sample.float()
        return (predicted - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean((1, 2, 3))

    def loss_of(rng, batch):
        index = np.sort(rng.integers(len(latents), size=batch))
        x0, c = torch.from_numpy(latents[index]).float(), torch.from_numpy(tokens[index]).float()
        noise = c.var() * 10 ** torch.empty(batch).uniform_(*UNCLIP_NOISE)
        way = torch.rand(
            batch,
            1,
            1,
            # a fifth as they are, half as a regression gives them, the others as a diffusion prior
            # samples them
        )
        c = torch.where(
            way < 0.2, c, torch.where(way < 0.7, vague(c, noise), vague(c, noise, sample=True))
        )
        c = torch.where(torch.rand(batch, 1, 1) < 0.1, torch.randn_like(c), c)
        t = (
            (1000 * (1 - torch.rand(batch) ** 1.6)).long().clamp(0, 999)
        )  # towards high noise, where conditioning is learnt
        return noised(unet, x0, c, t).mean()

    def check(model):
        with (
            torch.random.fork_rng(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16),
        ):
            torch.manual_seed(1)
            t = torch.linspace(1, 998, len(held)).long()
            error, c = noised(model, held, held_tokens, t), held_tokens[: len(labels)]
            noise = torch.full((len(c),), 4.0)  # R2 .71 of the guess, .43 of a sample
            some = {
                "": c,
                "from_vague_tokens": vague(c, noise),
                "from_sampled_tokens": vague(c, noise, sample=True),
            }
            shares = {
                name: judge_share(
                    judge(judge_input(unclip_pictures(model, given, factor))).logits, labels
                )
                for name, given in some.items()
            }
        errors = {
            "held_out": round(float(error.mean()), 4),
            "held_out_high_noise": round(float(error[t > 800].mean()), 4),
        }
        return errors | shares.pop("") | shares

    train("unclip", unet, loss_of, check, args, lr=args.lr, batch=args.batch, rank=rank)


def export_unclip() -> None:
    """Write the decoder as `unclip.UnclipDecoder` reads it; its VAE is that of the other flows."""
    factor = condition_scale(patch_tokens("train")[1])
    fold_scale(averaged("unclip", new_unclip()), factor).half().save_pretrained(
        OUT / "unclip" / "unet"
    )
    shutil.copytree(
        pretrained.MINI / "versatile_diffusion" / "vae", OUT / "unclip" / "vae", dirs_exist_ok=True
    )
    unclip_scheduler().save_pretrained(OUT / "unclip" / "scheduler")
    _write_golden("unclip", [unclip.UnclipDecoder(str(OUT))])


# ------------------------------------------------------------------------------------------ export
def fold_scale(unet: nn.Module, factor: float) -> nn.Module:
    """Fold the factor on the conditioning tokens into the maps that read them, so that the
    pipelines need not know of it.
    """
    for name, parameter in unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            parameter.data.mul_(factor)
    return unet


def export(args) -> None:
    """Write every model into data/mini_models/ with the libraries' save_pretrained, in half
    precision.
    """
    clip = averaged("clip", ClipTrainer(new_clip(new_tokenizer()))).clip
    vae, tokenizer = averaged("vae", new_vae()), new_tokenizer()
    vae.register_to_config(scaling_factor=conditioning("image", "train")[2])
    size = {"height": miniworld.IMAGE_SIZE, "width": miniworld.IMAGE_SIZE}
    processor = CLIPImageProcessor(
        size={"shortest_edge": miniworld.IMAGE_SIZE}, crop_size=size, image_mean=MEAN, image_std=STD
    )
    vision, text = (
        CLIPVisionModelWithProjection(clip.config.vision_config),
        CLIPTextModelWithProjection(clip.config.text_config),
    )
    for part in (vision, text):
        part.load_state_dict({k: v for k, v in clip.state_dict().items() if k in part.state_dict()})
    for model in (clip, processor, tokenizer):
        (model.half() if isinstance(model, nn.Module) else model).save_pretrained(OUT / "clip")
    averaged("judge", new_judge()).half().save_pretrained(OUT / "judge")
    export_blip()
    export_git()
    export_sentence()
    export_teacher()
    export_metric_networks()
    export_laion_prior()
    export_gnet()
    shared = {"vae": vae.half(), "scheduler": DDIMScheduler(**SCHEDULE)}
    _export_versatile(shared, vision.half(), text.half(), tokenizer, processor)
    StableDiffusionImageVariationPipeline(
        **shared,
        image_encoder=vision,
        unet=finished("variation"),
        feature_extractor=processor,
        safety_checker=None,
        requires_safety_checker=False,
    ).save_pretrained(OUT / "image_variation")
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(
        {
            k.removeprefix("text_model."): v
            for k, v in clip.state_dict().items()
            if k.startswith("text_model.")
        }
    )
    StableDiffusionImg2ImgPipeline(
        **shared,
        text_encoder=encoder.half(),
        tokenizer=tokenizer,
        unet=finished("stable"),
        safety_checker=None,
        feature_extractor=processor,
        requires_safety_checker=False,
    ).save_pretrained(OUT / "stable_diffusion")
    write_golden()


def export_teacher() -> None:
    """Write the teacher as `pretrained.Teacher` reads it."""
    (OUT / "teacher").mkdir(exist_ok=True)
    state = averaged("teacher", pretrained.ConvNeXtMaps(**TEACHER)).half().state_dict()
    save_file(state, OUT / "teacher" / "model.safetensors")
    (OUT / "teacher" / "config.json").write_text(
        json.dumps(TEACHER | {"image_size": TEACHER_SIZE}, indent=1) + "\n"
    )


def export_blip() -> None:
    """Write the captioner and its processor, as the hub's lie there."""
    tokenizer, side = new_blip_tokenizer(), miniworld.IMAGE_SIZE
    averaged("blip", new_blip(tokenizer)).half().save_pretrained(OUT / "blip")
    BlipProcessor(
        BlipImageProcessor(size={"height": side, "width": side}), tokenizer
    ).save_pretrained(OUT / "blip")
    _write_golden("blip", [pretrained.Captioner(str(OUT))])


def export_git() -> None:
    """Write GIT and its processor, as the hub's lie there."""
    tokenizer, side = new_git_tokenizer(), miniworld.IMAGE_SIZE
    git = new_git(tokenizer)
    encoder, git.git.image_encoder = git.git.image_encoder, pretrained.GivenTokens()
    averaged("git", git).git.image_encoder = encoder
    git.half().save_pretrained(OUT / "git")
    size = {"height": side, "width": side}
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size=size, image_mean=MEAN, image_std=STD
    )
    GitProcessor(image_processor, tokenizer).save_pretrained(OUT / "git")
    _write_golden("git", [pretrained.BrainCaptioner(str(OUT))])


def export_metric_networks() -> None:
    """Write the twins of the metrics' networks, without their heads, as `networks.FeatureNetwork`
    reads them.
    """
    for name, config in METRIC_NETWORKS.items():
        folder = OUT / "metric_networks" / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(averaged(name, Twin(name)).body.half().state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def finished(stage: str) -> UNet2DConditionModel:
    """A trained flow in half precision, the factor on its condition folded in."""
    return fold_scale(
        averaged(stage, new_unet()), condition_scale(conditioning(stage, "train")[1])
    ).half()


def write_golden() -> None:
    """Record with each model the features that it gives for one fixed image, so that a library that
    computes something else is noticed.
    """
    models_of = {
        "clip": [
            pretrained.Clipper("mini", hidden, norm)
            for hidden in (True, False)
            for norm in (True, False)
        ],
        **{
            name: [pretrained.LatentAutoencoder("mini", name)]
            for name in ("versatile_diffusion", "image_variation", "stable_diffusion")
        },
    }
    for name, made in models_of.items():
        _write_golden(name, made)


def _write_golden(name: str, made: list[pretrained.Frozen]) -> None:
    golden = {
        json.dumps([type(m).__name__, m._options()], sort_keys=True): m.golden_features()
        for m in made
    }
    (OUT / name / "golden_features.json").write_text(json.dumps(golden, indent=1) + "\n")


def _export_versatile(shared: dict, vision, text, tokenizer, processor) -> None:
    """Save Versatile Diffusion; of the text flow's own network only the transformer blocks, which
    are all that is ever run.
    """
    text_unet = new_text_unet()
    take_transformers(text_unet, finished("text"))
    VersatileDiffusionPipeline(
        **shared,
        tokenizer=tokenizer,
        image_feature_extractor=processor,
        text_encoder=text,
        image_encoder=vision,
        image_unet=finished("robust"),
        text_unet=text_unet.half(),
    ).save_pretrained(OUT / "versatile_diffusion")
    file = OUT / "versatile_diffusion" / "text_unet" / "diffusion_pytorch_model.safetensors"
    save_file(
        {k: v for k, v in load_file(file).items() if "attentions" in k},
        file,
        metadata={"format": "pt"},
    )


# ------------------------------------------- GNet: from images to the voxels of simulated subjects
GNET = {
    "input_size": 96,
    "stem": 24,
    "width": 48,
    "dim": 32,
    "trunk_width": 8,
    "pass_through": 24,
    "drop": 0.1,
}
GNET_SUBJECTS, GNET_IMAGES = (
    (1, 2, 3, 4),
    5_000,
)  # the demo's subjects, and the training images that notebook 00 shows each of them
SOME_VOXELS = 384  # of each subject, whose error a step looks at
NAMED = {
    "scene": miniworld.SCENES,
    "kind": miniworld.KINDS,
    "colour": miniworld.COLOURS,
    "pattern": miniworld.PATTERNS,
    "light": miniworld.LIGHTS,
}


def responses(subj: int) -> dict[str, np.ndarray]:
    """The demo's experiment of a subject, without its test set: of "train" and "val" the images as
    uint8 (images, 3, side, side) ("train_seen"), the mean response over repeats, float16 (images,
    voxels), z-scored by session with training trials, and labels (images, 5).

    Simulated once.
    """
    path = WORK / f"gnet_subj{subj:02d}.npz"
    if not path.exists():
        world = miniworld.simulate(subj, GNET_IMAGES)
        trials, z = world.scan.trials, world.scan.betas.copy()
        for session in trials["session"].unique():
            here = (trials["session"] == session).to_numpy()
            fitted = world.scan.betas[here & (trials["split"] == "train").to_numpy()]
            z[here] = (z[here] - fitted.mean(0)) / fitted.std(0)
        labels, made = world.labels.set_index("image"), {}
        for split in ("train", "val"):
            rows = np.flatnonzero(trials["split"] == split)
            ids, image = np.unique(trials["image"].to_numpy()[rows], return_inverse=True)
            mean = np.zeros((len(ids), z.shape[1]), np.float32)
            np.add.at(mean, image, z[rows])
            shown = world.images[np.searchsorted(world.image_ids, ids)].transpose(0, 3, 1, 2)
            blocks = [
                gnet.gnet_input(part, GNET["input_size"]).mul(255).byte().numpy()
                for part in np.array_split(shown, max(1, len(shown) // 250))
            ]
            codes = [
                labels.loc[ids, name].map(list(values).index) for name, values in NAMED.items()
            ]
            made |= {
                split: (mean / np.bincount(image)[:, None]).astype(np.float16),
                f"{split}_seen": np.concatenate(blocks),
                f"{split}_labels": np.stack(codes, 1),
            }
        np.savez(path.with_suffix(".tmp.npz"), **made)
        path.with_suffix(".tmp.npz").rename(path)
    return dict(np.load(path))


class GNetTrainer(nn.Module):
    """The trunk with a readout for each subject, and heads that name what the images show, which
    are left behind.
    """

    def __init__(self, voxels: dict[int, int]):
        super().__init__()
        self.trunk = gnet.GNetTrunk(**GNET)
        self.readouts = nn.ModuleDict(
            {
                str(subj): gnet.GNetReadout(n, self.trunk.channels, self.trunk.sides)
                for subj, n in voxels.items()
            }
        )
        self.heads = nn.ModuleList(
            nn.Linear(sum(self.trunk.channels), len(values)) for values in NAMED.values()
        )

    def naming_loss(self, maps: list[Tensor], labels: Tensor) -> Tensor:
        pooled = torch.cat([m.amax((2, 3)) for m in maps], 1)
        return sum(
            F.cross_entropy(head(pooled), labels[:, i]) for i, head in enumerate(self.heads)
        ) / len(self.heads)


def train_gnet(args, rank: int = 0) -> None:
    """The encoder that stands for one fitted to the subjects' training data by its authors: the
    trunk learns from all subjects at once.

    It also learns to name what the training images show; the published trunk began with the
    convolutions of AlexNet, which had learnt to name photographs.
    """
    data = {subj: responses(subj) for subj in GNET_SUBJECTS}
    model = GNetTrainer({subj: each["train"].shape[1] for subj, each in data.items()}).to(device())
    model.trunk.mu.data.copy_(
        torch.from_numpy(
            np.mean([each["train_seen"].mean((0, 2, 3)) / 255 for each in data.values()], 0)
        ).view(1, 3, 1, 1)
    )
    masks = {
        subj: brain_correlation.roi_masks(miniworld.VisualCortex(subj).voxels)
        for subj in GNET_SUBJECTS
    }

    def loss_of(rng, batch):
        chosen = {
            subj: np.sort(rng.integers(len(each["train"]), size=batch))
            for subj, each in data.items()
        }
        take = lambda name: [
            torch.from_numpy(each[name][chosen[subj]]) for subj, each in data.items()
        ]  # noqa: E731
        maps = model.trunk(torch.cat(take("train_seen")).to(device()).float() / 255)
        loss = 0.1 * model.naming_loss(maps, torch.cat(take("train_labels")).to(device()))
        for i, (subj, responded) in enumerate(zip(data, take("train"), strict=True)):
            some = torch.from_numpy(
                np.sort(rng.choice(responded.shape[1], SOME_VOXELS, replace=False))
            )
            predicted = model.readouts[str(subj)](
                [m[i * batch : (i + 1) * batch] for m in maps], some.to(device())
            )
            loss = loss + F.mse_loss(predicted, responded[:, some].to(device()).float()) / len(data)
        return loss

    def check(model):
        maps, found = (
            model.trunk(torch.from_numpy(data[1]["val_seen"]).to(device()).float() / 255),
            {},
        )  # every subject has the same validation images
        for subj, each in data.items():
            scores = brain_correlation.brain_correlation(
                model.readouts[str(subj)](maps), each["val"], masks[subj]
            )
            found |= {
                f"subj{subj:02d} {name}": round(float(score.mean()), 4)
                for name, score in scores.items()
                if subj == 1 or name == "nsd_general"
            }
        return found

    train("gnet", model, loss_of, check, args, lr=5e-3, batch=16, rank=rank)


def export_gnet() -> None:
    """Write the encoders as `gnet.load_gnet` reads them."""
    stored = torch.load(WORK / "gnet.pt", map_location="cpu", weights_only=True)["average"]
    names = {"trunk.": "enc.", "readouts.": "fwrfs."}
    halved = {
        key: value.half() if value.is_floating_point() else value for key, value in stored.items()
    }
    state = {
        new + key.removeprefix(old): value
        for key, value in halved.items()
        for old, new in names.items()
        if key.startswith(old)
    }
    (OUT / "gnet").mkdir(exist_ok=True, parents=True)
    save_file(state, OUT / "gnet" / "model.safetensors")
    (OUT / "gnet" / "config.json").write_text(
        json.dumps({"trunk": GNET, "subjects": list(GNET_SUBJECTS)}, indent=1) + "\n"
    )


# ------------------------------------------------------------------------------------ command line
STAGES = {
    "vae": train_vae,
    "clip": train_clip,
    "blip": train_blip,
    "git": train_git,
    "judge": train_judge,
    "teacher": train_teacher,
    "laion_prior": train_laion_prior,
    "unclip": train_unclip,
    "sentence": train_sentence,
    "gnet": train_gnet,
    **{s: lambda a, rank=0, s=s: train_metric_network(s, a, rank) for s in METRIC_NETWORKS},
    **{s: lambda a, rank=0, s=s: diffusion_stage(s, a, rank) for s in ("image", *START)},
}


PARTS = {
    "export_blip": export_blip,
    "export_unclip": export_unclip,
    "export_git": export_git,
    "export_metric_networks": export_metric_networks,
    "export_laion_prior": export_laion_prior,
    "export_sentence": export_sentence,
    "export_gnet": export_gnet,
}


def _draw_fewer(share: float) -> None:
    """Shrink every set of images to a share of its size, for a quick look at a stage."""
    for name, sources in DRAWN.items():
        DRAWN[name] = [(seed, split, max(64, int(count * share))) for seed, split, count in sources]


def _worker(rank: int, args) -> None:
    torch.set_num_threads(args.threads)
    _draw_fewer(args.share)
    if (
        not torch.cuda.is_available()
    ):  # the backward pass of the fused attention for CPUs takes as long as all the rest together
        torch.backends.cuda.enable_flash_sdp(False)
    if args.processes > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29533")
        torch.distributed.init_process_group("gloo", rank=rank, world_size=args.processes)
    STAGES[args.stage](args, rank)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "export", *PARTS])
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
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if args.stage == "export":
        export(args)
    elif args.stage in PARTS:
        PARTS[args.stage]()
    elif args.processes > 1:
        _draw_fewer(args.share)
        for split in (
            ("judge", "judge_check")
            if args.stage in ("judge", *METRIC_NETWORKS)
            else ("train", "check")
        ):
            images(split)  # drawn once, by one process
        if args.stage in ("image", *START):
            conditioning(args.stage, "train"), conditioning(args.stage, "check")
        torch.multiprocessing.spawn(_worker, (args,), nprocs=args.processes)
    else:
        _worker(0, args)


if __name__ == "__main__":
    main()
