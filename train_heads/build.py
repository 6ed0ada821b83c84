"""From a store and a head's name to a head that can run on its features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..data_manifests.errors import ConfigError
from ..extract.specs import IMPORTED, SpecMismatch, TowerSpec, canonical_features
from ..extract.store import FeatureStore
from ..extract.text import TextFeatures, encode_classes
from ..extract.towers import Tower, load_tower
from .heads import find
from .randomness import own_randomness, reseed
from .specs import HeadContext


def build_head(
    name: str,
    config: Any,
    store: FeatureStore,
    class_names: Sequence[str],
    templates: Sequence[str] | str,
    device: torch.device,
    seed: int = 0,
    trained_names: Sequence[str] = (),
    tower: Callable[[], Tower] | None = None,
) -> tuple[nn.Module, TextFeatures | None]:
    """Build a head for the features of a store, freshly initialised from `seed`, and the class texts it reads.

    Args:
        class_names: to score.
        trained_names: classes that the head's trained parts are sized by; none named are `class_names`.
        tower: what `frozen_tower` gave, where several heads share it.

    Raises:
        UnknownName: no such head.
        SpecMismatch: the store lacks a feature; the message is the command that adds it.
        ConfigError: the config does not suit the tower.
        TowerError: the head needs the tower, and it cannot be loaded.
    """
    spec = find(name)
    store.require(needed_features(name, config, store), wanted_by=name)
    tower = tower or frozen_tower(store.spec.tower, device)
    context = head_context(store, class_names, tower, trained_names)
    with own_randomness(device):
        reseed(device, seed)
        head = spec.build(config, context)
    text = None
    if spec.needs_text(config):
        templates = (templates,) if isinstance(templates, str) and "{}" in templates else templates
        text = encode_classes(tower(), class_names, templates, cache_dir=store.path / "text").to(device)
    return head.to(device), text


def head_context(
    store: FeatureStore, class_names: Sequence[str], tower: Callable[[], Tower], trained_names: Sequence[str] = ()
) -> HeadContext:
    """What a head of this store's features may know when it is built."""
    n_frames = store.spec.frames.n_frames or store.longest
    return HeadContext(store.shape, n_frames, tuple(class_names), tower, tuple(trained_names))


def needed_features(name: str, config: Any, store: FeatureStore) -> tuple[str, ...]:
    """The stored features that a head reads, under their names in the store.

    Raises:
        UnknownName: no such head or feature.
        ConfigError: blocks counted from the last, of a tower that nobody knows, or more than the tower has.
    """
    wanted, layers = find(name).features(config), store.shape.layers
    if store.spec.tower.model == IMPORTED and not layers and any(".-" in feature for feature in wanted):
        raise _unknown_tower(f"{name} needs {', '.join(wanted)}", store.features)
    reach = getattr(config, "reach", 0)
    if layers and not -layers - 1 <= reach <= layers:
        last = f"0 … {layers}, or from the end -1 … {-layers - 1}"
        raise ConfigError(f"impossible reach into a tower of {layers} blocks", seen=reach, wanted=last)
    return canonical_features(wanted, layers)


def frozen_tower(spec: TowerSpec, device: torch.device) -> Callable[[], Tower]:
    """The tower that made a store, loaded at the first call.

    The call raises ConfigError if nobody knows it, TowerError if it cannot be loaded, and SpecMismatch if its weights are
    not those of the store.
    """

    @functools.cache
    def load() -> Tower:
        if spec.model == IMPORTED:
            raise _unknown_tower("the head needs the tower itself, or its texts")
        tower = load_tower(spec.model, spec.pretrained, spec.precision, str(device))
        if tower.spec.weights_sha256 != spec.weights_sha256:
            raise SpecMismatch(
                f"{spec.model} / {spec.pretrained} is not the tower that made the store",
                seen=f"weights {tower.spec.weights_sha256[:12]}",
                wanted=f"weights {spec.weights_sha256[:12]}",
                fix="Put the original weights back, or extract again.",
            )
        return tower

    return load


def _unknown_tower(need: str, seen: Sequence[str] = ()) -> ConfigError:
    return ConfigError(
        f"{need}, and nothing says which tower made these imported features",
        seen=", ".join(seen) or None,
        fix="Say so in a new store: coldframe import FILE --store STORE --model ViT-B-16 --pretrained openai",
    )


def find_device(name: str) -> torch.device:
    """A torch device; `auto` is the GPU if there is one.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ConfigError(f"no device {name!r}: {str(error).splitlines()[0]}", fix="Use auto or cpu.") from error
    return device
