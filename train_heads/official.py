"""Checkpoints of the published systems, both directions: their files ↔ our runs.

A published file may hold the optimiser's state, a prefix of data-parallel training and the whole frozen CLIP beside what
was trained. Of all that only the trained part is taken. A CLIP in the file is compared with the tower of the store: a head
on features of another tower would answer without a sign that it is wrong. Nothing in a file is ever run as code.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data_manifests.errors import ConfigError
from ..extract.specs import SpecMismatch
from ..extract.store import FeatureStore
from ..extract.towers import Tower
from ..extract.weights import TowerError, read_weights
from .build import find_device, frozen_tower, head_context, needed_features
from .checkpoint import Checkpoint, as_safetensors, save_checkpoint, write_whole
from .heads import find, names
from .specs import Official, TrainSpec

CLIP_TOLERANCE = 2e-3  # of the largest weight of a tensor: published files are often in half precision


def import_checkpoint(
    system: str,
    file: Path,
    store: FeatureStore,
    class_names: Sequence[str],
    config: Any,
    out: Path,
    manifest_fingerprint: str = "",
) -> Checkpoint:
    """Make a run of a published checkpoint, as if it had been trained here.

    Args:
        system: the head.
        file: as its authors' code saved it, or safetensors of the same tensors.
        store: of the features that it shall read; its tower must be the CLIP that it was trained on.
        class_names: in the order of the published labels, which no checkpoint tells.
        config: settings of the head that no tensor tells.
        out: a new folder.

    Raises:
        ConfigError: no published layout of such a head, the folder is in use, or a setting that the tensors contradict.
        TowerError: the file is damaged, holds weights that are not finite, or is a pickle of more than weights;
            nothing in it was run.
        SpecMismatch: tensors are missing, unknown or of another CLIP.
    """
    official = layout_of(system)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is in use", fix="Choose a folder that does not exist.")
    tower = frozen_tower(store.spec.tower, find_device("cpu"))
    weights = without_clip(read_weights(file).tensors, tower(), official.clip or "")
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise TowerError(
            f"{file} holds weights that are not finite numbers",
            seen=f"{len(broken)} such tensors, first {broken[0]}",
            fix="The training that wrote it diverged, or the file is damaged.",
        )
    context = head_context(store, class_names, tower)
    asked, default = asdict(config), asdict(find(system).config())
    config, state = official.read(weights, context, config)
    for name, value in asdict(config).items():
        if value != asked[name] != default[name]:
            raise ConfigError(
                f"the tensors tell {name}", seen=asked[name], wanted=value, fix=f"Leave --set {name} away."
            )
    checkpoint = Checkpoint(
        head=system,
        config=config,
        train=TrainSpec(),
        class_names=tuple(class_names),
        seen_classes=tuple(class_names),
        templates=(),
        features=store.spec,
        needs=needed_features(system, config, store),
        manifest_fingerprint=manifest_fingerprint,
        selection="unknown data",
        n_train=0,
        n_val=0,
        n_missing=0,
        epoch=0,
        step=0,
        scores={},
        weights=state,
    )
    checkpoint.predictor(store, device="cpu")  # raises where the weights do not fit, before anything is written
    out.mkdir(parents=True, exist_ok=True)
    return save_checkpoint(out, checkpoint)


def export_checkpoint(checkpoint: Checkpoint, file: Path) -> list[str]:
    """Write a run as its authors' code reads it: a `.safetensors` of the tensors, or else a file of `torch.save`.

    Returns:
        The names of the tensors written.

    Raises:
        ConfigError: no published layout of such a head.
        TowerError: the layout holds the CLIP too, and the tower cannot be loaded.
    """
    official = layout_of(checkpoint.head)
    weights = official.write(checkpoint.config, checkpoint.weights)
    if official.clip is not None:
        tower = frozen_tower(checkpoint.features.tower, find_device("cpu"))()
        weights |= {f"{official.clip}{name}": value for name, value in tower.model.state_dict().items()}
    weights = {f"{official.prefix}{name}": value.contiguous().clone() for name, value in weights.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        write_whole(file, as_safetensors(weights))
    else:
        buffer = io.BytesIO()
        torch.save({official.container: weights}, buffer)
        write_whole(file, buffer.getbuffer())
    return list(weights)


def layout_of(system: str) -> Official:
    """The published layout of a head.

    Raises:
        UnknownName: no such head.
        ConfigError: none was published.
    """
    official = find(system).official
    if official is None:
        known = [name for name in names() if find(name).official is not None]
        raise ConfigError(f"{system} has no published checkpoints", wanted=" or ".join(known))
    return official


def without_clip(weights: Mapping[str, Tensor], tower: Tower, prefix: str) -> dict[str, Tensor]:
    """Weights without the frozen CLIP among them, which stands under a prefix.

    Raises:
        SpecMismatch: it is another CLIP than the tower.
    """
    frozen = tower.model.state_dict()
    kept = {}
    for name, value in weights.items():
        ours = frozen.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if ours is None:
            kept[name] = value
        elif not _is_same(value, ours):
            raise SpecMismatch(
                f"the checkpoint was trained on another CLIP than {tower.spec.model}: {name} differs",
                seen=f"shape {tuple(value.shape)}" if value.shape != ours.shape else "other values",
                wanted=f"the weights of {tower.spec.pretrained}",
                fix="Extract with the CLIP that the checkpoint was trained on.",
            )
    return kept


def _is_same(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.shape != ours.shape:
        return False
    ours = ours.cpu().float()
    return bool((theirs.float() - ours).abs().max() <= CLIP_TOLERANCE * ours.abs().max()) if ours.numel() else True
