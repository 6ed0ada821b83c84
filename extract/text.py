"""Class names × templates → text features, cached beside the store.

Source: prompt ensembling, Radford et al. 2021, arXiv:2103.00020, §3.1.4; open_clip's build_zero_shot_classifier.
Differs: nothing in the arithmetic; the templates are ours, and class names are made readable first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data_manifests.errors import ConfigError, UnknownName
from ..data_manifests.locations import fetched, is_local, location, scratch_folder, upload
from .towers import Tower
from .weights import weights_sha256

CACHE_VERSION = 1

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "image": (
        "a photo of a {}.",
        "a blurry photo of a {}.",
        "a photo of one {} from close by.",
        "a photo of a small {}.",
        "a photo of a large {}.",
        "a drawing of a {}.",
    ),
    "video": (
        "{}",
        "a video of {}.",
        "a video of a person {}.",
        "a video of people {}.",
        "a person is {}.",
        "a short clip that shows {}.",
        "an example of {}.",
        "a frame from a video of {}.",
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class TextFeatures:
    """What the text tower says of a list of classes."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    embedding: Tensor  # [C, E], L2-normalised
    logit_scale: float  # of the tower, exponentiated
    tower: str  # weights_sha256 of the tower

    def to(self, device: torch.device | str) -> TextFeatures:
        """The same on another device."""
        return replace(self, embedding=self.embedding.to(device))

    def select(self, class_ids: Sequence[int] | Tensor) -> TextFeatures:
        """Some of the classes, in the order given."""
        ids = [int(i) for i in class_ids]
        names = tuple(self.class_names[i] for i in ids)
        return replace(self, class_names=names, embedding=self.embedding[ids])


def encode_classes(
    tower: Tower,
    class_names: Sequence[str],
    templates: Sequence[str] | str = TEMPLATES["video"],
    cache_dir: Path | str | None = None,
) -> TextFeatures:
    """Embed every class: the normalised mean, over templates, of its normalised sentence embeddings.

    Args:
        tower: whose texts these are.
        class_names: as datasets spell them (`ApplyEyeMakeup`, `brush_hair`); see `readable`.
        templates: sentences with `{}` where the name goes, or the name of a set in TEMPLATES.
        cache_dir: where embeddings are kept between runs; a damaged file there is made anew,
            and where nothing can be written nothing is kept.

    Raises:
        UnknownName: no template set of that name.
        ConfigError: no class, an empty name, a template without `{}`, or a sentence longer than the tower reads.
    """
    chosen = _templates(templates)
    sentences = [[template.replace("{}", name) for template in chosen] for name in _readable_names(class_names)]
    embedding = _cached(tower, sentences, location(cache_dir).expanduser()) if cache_dir else _embed(tower, sentences)
    return TextFeatures(tuple(class_names), chosen, embedding, tower.logit_scale, tower.spec.weights_sha256)


def readable(class_name: str) -> str:
    """Words of a class name: `ApplyEyeMakeup` → apply eye makeup, `brush_hair` → brush hair.

    A name that has spaces is prose already and keeps its letters: `passing American football (in game)`.
    """
    words = class_name.replace("_", " ").split()
    if " " not in class_name.strip():
        words = [part for word in words for part in re.sub(_INNER_CAPITAL, " ", word).split()]
        words = [word if word.isupper() and len(word) > 1 else word.lower() for word in words]
    return " ".join(words)


# Between two words of CamelCase, acronyms whole: Watch|TV|Show.
_INNER_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def _templates(templates: Sequence[str] | str) -> tuple[str, ...]:
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise UnknownName("set of templates", templates, TEMPLATES)
        templates = TEMPLATES[templates]
    if not templates or not all("{}" in template for template in templates):
        raise ConfigError("a template is a sentence with {} where the class name goes", seen=list(templates))
    return tuple(templates)


def _readable_names(class_names: Sequence[str]) -> list[str]:
    names = [readable(name) for name in class_names]
    if not names or not all(names):
        raise ConfigError("every class needs a name", seen=list(class_names))
    return names


def _embed(tower: Tower, sentences: list[list[str]]) -> Tensor:
    each = F.normalize(tower.encode_text([text for row in sentences for text in row]), dim=-1)  # [C·P, E]
    return F.normalize(reduce(each, "(c p) e -> c e", "mean", c=len(sentences)), dim=-1)


def _cached(tower: Tower, sentences: list[list[str]], cache_dir: Path) -> Tensor:
    """`_embed`, kept in a file named by everything that can change it."""
    identity = json.dumps(
        {
            "version": CACHE_VERSION,
            "model": tower.spec.model,
            "weights_sha256": tower.spec.weights_sha256,
            "quick_gelu": tower.spec.quick_gelu,
            "sentences": sentences,
        },
        sort_keys=True,
    )
    path = cache_dir / f"text-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    embedding = _read(path, identity)
    if embedding is None:
        embedding = _embed(tower, sentences)
        _write(path, identity, embedding)
    return embedding.to(tower.device)


def _read(path: Path, identity: str) -> Tensor | None:
    """The embedding in a cache file, or None where it is absent, damaged or of something else."""
    try:
        with fetched(path) as local, safe_open(local, framework="pt") as file:
            metadata = file.metadata() or {}
            embedding = file.get_tensor("embedding")
    except (OSError, SafetensorError):
        return None
    is_whole = metadata.get("sha256") == weights_sha256({"embedding": embedding})
    return embedding if is_whole and metadata.get("identity") == identity else None


def _write(path: Path, identity: str, embedding: Tensor) -> None:
    """Keep an embedding where that is possible; a folder that is full or read-only costs time, not the run."""
    if not is_local(path):
        with suppress(OSError), scratch_folder() as here:
            _write(here / path.name, identity, embedding)
            upload(here / path.name, path)
        return
    kept = {"embedding": embedding.cpu().contiguous()}
    metadata = {"identity": identity, "sha256": weights_sha256(kept)}
    ours = path.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole, so that no reader meets half a file
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(kept, ours, metadata=metadata)
            ours.replace(path)
        finally:
            ours.unlink(missing_ok=True)
