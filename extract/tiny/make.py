"""Make coldframe-tiny: `python -m coldframe.extract.tiny.make` trains a CLIP on pictures and captions it draws itself.

Nothing is downloaded, and nothing is read but the model's configuration. A quarter of an hour on two cores is little for
a transformer that starts from nothing, so three helpers stand by while it learns, and leave no trace in the weights:
linear probes that name each fact from an embedding; the same probes on the patches that lie on the shape; and, for
most of the time, a view of only the patches near the shape, at less than half the cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from einops import einsum
from open_clip.pos_embed import get_2d_sincos_pos_embed
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import CONFIG, WEIGHTS
from .facts import (
    COLOUR,
    LONGEST_CAPTION,
    PLACE,
    SHAPE,
    SIZE,
    WORDS,
    Facts,
    caption,
    draw_facts,
    draw_pictures,
    is_true,
    tell,
)

Transform = Callable[[Image.Image], Any]
CLIP = Any  # open_clip's own class; a type checker cannot see what its modules hold

# A batch is captioned twice: with all facts, and with some, here with their probabilities. All short captions of a
# batch tell the same kinds, so that any two contradict each other or say the same.
SHORT_CAPTIONS = {
    (SHAPE,): 0.4,
    (COLOUR,): 0.15,
    (PLACE,): 0.15,
    (SIZE,): 0.05,
    (COLOUR, SHAPE): 0.1,
    (SHAPE, PLACE): 0.1,
    (COLOUR, PLACE): 0.05,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the shipped weights were trained."""

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 200
    near_patches: int = 28
    near_share: float = 0.85  # of the steps; then whole pictures
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lesson:
    """A batch of pictures, and two captions of each."""

    pixels: Tensor  # [B, 3, S, S]
    facts: Facts  # [B, 4]
    told: tuple[Facts, Facts]  # by the full captions, by the short ones
    tokens: Tensor  # [2B, LONGEST_CAPTION]
    seen: Tensor  # [B, n], the patches that are looked at
    distance: Tensor  # [B, n], of those from the middle of the shape, in its radii


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save half-precision weights, score what was saved, and write the record beside it."""
    parser = argparse.ArgumentParser(
        prog="python -m coldframe.extract.tiny.make", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the weights file; RECORD.md is written beside it")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    for field in dataclasses.fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, metavar=str(field.default))
    asked = vars(parser.parse_args(arguments))
    out, threads, recipe = asked.pop("out"), asked.pop("threads"), Recipe(**asked)
    torch.set_num_threads(threads)
    started = time.process_time()
    with torch.random.fork_rng():  # open_clip draws first weights from torch's global generator
        torch.manual_seed(recipe.seed)
        save_file(train(recipe), out)
    minutes = (time.process_time() - started) / 60
    scores = zero_shot(*load(out), n_pictures=1000, rng=np.random.default_rng([recipe.seed, 1]))
    text = record(out, recipe, minutes, scores)
    out.with_name("RECORD.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def load(weights: Path | None, context_length: int | None = None) -> tuple[CLIP, Transform]:
    """The model, random where there are no weights, with open_clip's own evaluation transform."""
    open_clip.add_model_config(CONFIG)
    made: Any = open_clip.create_model_and_transforms(
        CONFIG.stem, pretrained=weights and str(weights), force_context_length=context_length
    )
    model, _for_training, transform = made
    return model, transform


def train(recipe: Recipe) -> dict[str, Tensor]:
    """Fit image and text tower to each other from random weights; the state dict in half precision."""
    rng = np.random.default_rng([recipe.seed, 0])
    model, transform = load(None, LONGEST_CAPTION)
    place_patches(model.visual)
    model.visual.output_tokens = True
    model.visual.patch_dropout = ChosenPatches()
    probes = nn.ModuleList(nn.Linear(model.visual.output_dim, len(words)) for words in WORDS)
    optimizer = torch.optim.AdamW(parameter_groups(model, probes, recipe.weight_decay), betas=(0.9, 0.98), fused=True)
    started = time.monotonic()
    for step in range(recipe.steps):
        n_seen = recipe.near_patches if step < recipe.steps * recipe.near_share else math.prod(model.visual.grid_size)
        losses = study(model, probes, draw_lesson(recipe.batch_size, n_seen, model.visual.grid_size, transform, rng))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 100 == 99:
            shown = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            pace = (time.monotonic() - started) / (step + 1)
            sys.stderr.write(f"step {step + 1}/{recipe.steps}  {pace:.3f} s  {shown}\n")
    return {name: value.half() for name, value in full_context(model.state_dict()).items()}


def draw_lesson(n: int, n_seen: int, grid: tuple[int, int], transform: Transform, rng: np.random.Generator) -> Lesson:
    """Draw n pictures, write their captions, and choose about the `n_seen` patches nearest to the shape."""
    facts = draw_facts(n, rng)
    pictures, centres, radii = draw_pictures(facts, rng)
    short = list(SHORT_CAPTIONS)[rng.choice(len(SHORT_CAPTIONS), p=list(SHORT_CAPTIONS.values()))]
    told = tell(facts, range(len(WORDS))), tell(facts, short)
    captions = [caption(row, rng) for rows in told for row in rows]
    down, across = np.indices(grid).reshape(2, -1)  # [N] each
    patches = np.stack([(across + 0.5) / grid[1], (down + 0.5) / grid[0]], axis=1)  # [N, 2]
    distance = np.linalg.norm(patches[None] - centres[:, None], axis=2) / radii[:, None]  # [B, N]
    seen = np.argsort(distance * rng.uniform(0.5, 1.5, size=distance.shape), axis=1)[:, :n_seen]
    return Lesson(
        pixels=torch.stack([transform(picture) for picture in pictures]),
        facts=facts,
        told=told,
        tokens=open_clip.get_tokenizer(CONFIG.stem)(captions, LONGEST_CAPTION),
        seen=torch.from_numpy(seen),
        distance=torch.from_numpy(np.take_along_axis(distance, seen, axis=1)).float(),
    )


def study(model: CLIP, probes: nn.ModuleList, lesson: Lesson) -> dict[str, Tensor]:
    """The losses of one lesson."""
    model.visual.patch_dropout.chosen = lesson.seen
    image, patches = model.visual(lesson.pixels)  # [B, E], [B, n, D]
    text = model.encode_text(lesson.tokens, normalize=True)  # [2B, E]
    full, short = (model.logit_scale.exp() * F.normalize(image, dim=1) @ text.T).chunk(2, dim=1)  # [B, B] each
    on_shape = torch.softmax(-lesson.distance.square() / (2 * 0.6**2), dim=1)  # [B, n]
    shape = einsum(on_shape, patches, "b n, b n d -> b d") @ model.visual.proj  # [B, E]
    return {
        "full captions": contrastive_loss(full, torch.from_numpy(is_true(lesson.facts, lesson.told[0])).float()),
        "short captions": contrastive_loss(short, torch.from_numpy(is_true(lesson.facts, lesson.told[1])).float()),
        "facts from CLS": naming_loss(probes, image, lesson.facts),
        "facts from patches": naming_loss(probes, shape, lesson.facts),
    }


def contrastive_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy from pictures to captions and back; all true pairs of a row share its target equally.

    Source: UniCL, Yang et al. 2022, arXiv:2204.03610, §3.2.
    Differs: a pair is positive where the caption is true of the picture, not where two labels are equal.
    """
    to_text = truth / truth.sum(dim=1, keepdim=True)
    to_image = truth.T / truth.T.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, to_text) + F.cross_entropy(logits.T, to_image)) / 2


def naming_loss(probes: nn.ModuleList, embedding: Tensor, facts: Facts) -> Tensor:
    """Cross entropy of naming size, colour, shape and place, each by its probe."""
    direction, target = 14 * F.normalize(embedding, dim=1), torch.from_numpy(facts)  # 14: CLIP's first logit scale
    return torch.stack([F.cross_entropy(probe(direction), target[:, i]) for i, probe in enumerate(probes)]).mean()


class ChosenPatches(nn.Module):
    """In the place of open_clip's patch dropout: the CLS token and the patches that were chosen go on."""

    chosen: Tensor  # [B, n]

    def forward(self, tokens: Tensor) -> Tensor:
        """Choose among tokens [B, 1 + N, D]."""
        rows = torch.arange(len(tokens))[:, None]
        return torch.cat([tokens[:, :1], tokens[rows, 1 + self.chosen]], dim=1)  # [B, 1 + n, D]


def place_patches(visual: CLIP) -> None:
    """Start the table of positions as waves as strong as the patches themselves; it is trained like the rest.

    From open_clip's own start, 0.09 beside 0.5, the tower learns colours and for a long while neither place nor shape.
    """
    waves = get_2d_sincos_pos_embed(visual.positional_embedding.shape[1], visual.grid_size[0], cls_token=True)
    visual.positional_embedding.data.copy_(torch.from_numpy(waves))  # [1 + N, D]


def parameter_groups(model: CLIP, probes: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices; leave biases, norms, the temperature and all embedding tables alone.

    Token rows that no caption uses so keep their random first values exactly.
    """
    named = [*model.named_parameters(), *probes.named_parameters()]
    decayed = {name for name, p in named if p.ndim >= 2 and "embedding" not in name}
    return [
        {"params": [p for name, p in named if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * min((step + 1) / recipe.warmup_steps, (1 + math.cos(math.pi * max(0.0, done))) / 2)


def full_context(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the text positions that no caption reaches, with the random values that open_clip starts from."""
    trained = weights["positional_embedding"]
    n_positions = json.loads(CONFIG.read_text(encoding="utf-8"))["text_cfg"]["context_length"]
    unreached = 0.01 * torch.randn(n_positions - len(trained), trained.shape[1])
    return {**weights, "positional_embedding": torch.cat([trained, unreached])}


@torch.inference_mode()
def zero_shot(model: CLIP, transform: Transform, n_pictures: int, rng: np.random.Generator) -> dict[str, float]:
    """Top-1 accuracy on fresh pictures, classified by nothing but the class names in a plain template."""
    tokenize = open_clip.get_tokenizer(CONFIG.stem)
    facts = draw_facts(n_pictures, rng)
    pixels = torch.stack([transform(picture) for picture in draw_pictures(facts, rng)[0]])
    image = torch.cat([model.encode_image(part, normalize=True) for part in pixels.split(100)])  # [n, E]
    scores = {}
    for name, kind, thing in (
        ("colour", COLOUR, "{} shape"),
        ("shape", SHAPE, "{}"),
        ("place", PLACE, "shape at the {}"),
    ):
        for template in ("a photo of a {}.", "a video of a {}."):
            prompt = template.format(thing)
            text = model.encode_text(tokenize([prompt.format(word) for word in WORDS[kind]]), normalize=True)  # [C, E]
            named = (image @ text.T).argmax(dim=1).numpy()
            scores[f"{name} of {len(text)}, “{prompt}”"] = float((named == facts[:, kind]).mean())
    return scores


def record(weights: Path, recipe: Recipe, minutes: float, scores: dict[str, float]) -> str:
    """What was made, how, and how good it is, as Markdown."""
    settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in dataclasses.asdict(recipe).items())
    rows = "\n".join(f"| {what} | {score:.1%} |" for what, score in scores.items())
    return f"""# {weights.stem}

Written by `extract/tiny/make.py`; do not edit.

| | |
|---|---|
| made by | `python -m coldframe.extract.tiny.make {settings}` |
| pictures seen | {recipe.steps * recipe.batch_size:,}, each drawn once; two captions each |
| time | {minutes:.0f} minutes of a processor core |
| versions | torch {torch.__version__}, open_clip {open_clip.__version__}, numpy {np.__version__} |
| bytes | {weights.stat().st_size:,}, half precision |
| sha256 | {hashlib.sha256(weights.read_bytes()).hexdigest()} |

Zero-shot accuracy of the saved file on 1,000 freshly drawn pictures:

| classes, prompt | top-1 |
|---|---|
{rows}

Rows of the token table that no caption uses, and text positions that none reaches, keep their random first values. The
same command draws the same pictures and captions anywhere; another processor or version may round otherwise and give
other bytes.
"""


if __name__ == "__main__":
    main()
