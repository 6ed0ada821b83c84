"""Protocols: procedures that turn a head's scores into numbers. One file is one, and the file's name is its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data_manifests.episodes import EpisodeList
from ...data_manifests.errors import UnknownName
from ...data_manifests.records import Manifest
from ...extract.batches import FeatureDataset
from ...extract.specs import SpecMismatch
from ...extract.store import StoreError
from ..intervals import Estimate


@dataclass(frozen=True, slots=True)
class Videos:
    """The labelled videos of a split: those that the store has, and those it lacks."""

    dataset: FeatureDataset
    manifest: Manifest  # of the split; holds the missing videos too
    missing: tuple[str, ...]

    def labels_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Classes of some videos, [n]."""
        return np.array([self.manifest.by_id[video_id].label for video_id in ids], dtype=np.int64)

    def groups_of(self, ids: Sequence[str]) -> NDArray[np.str_] | None:
        """Which of some videos belong together, [n]; None where the manifest does not say."""
        groups = [self.manifest.by_id[video_id].group for video_id in ids]
        return (
            np.array([group or video_id for group, video_id in zip(groups, ids, strict=True)]) if any(groups) else None
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a protocol found; the pipeline adds what made it."""

    estimates: Mapping[str, Estimate]  # metric → value and interval; shares from 0 to 1
    n: int
    unit: str  # what n counts: videos | episodes
    over_classes: Mapping[str, Estimate] = field(default_factory=dict)  # metric → interval for other classes
    setting: str = ""  # in words: "5-way 1-shot"
    seed: int | None = None  # of what was drawn
    episodes: EpisodeList | None = None
    notes: tuple[str, ...] = ()  # what a reader must know before comparing
    details: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # what every video or episode scored


@dataclass(frozen=True, slots=True)
class ProtocolSpec:
    """The constant `PROTOCOL` of every file in this folder."""

    config: type  # a frozen dataclass of plain settings, every one with a default
    run: Callable[[Any, Videos, Any], Outcome]  # of a predictor, the videos and a config
    task: str  # what it asks of a head: classify | episodes
    headline: str  # the metric to quote
    source: str  # where it comes from, as a citation


def names() -> list[str]:
    """Names of all protocols, sorted; none is imported."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(name: str) -> ProtocolSpec:
    """Import one protocol and return its PROTOCOL constant; `few-shot` is `few_shot`.

    Raises:
        UnknownName: there is no such protocol.
    """
    module = name.replace("-", "_")
    if module not in names():
        raise UnknownName("protocol", name, names())
    protocol: ProtocolSpec = importlib.import_module(f"{__name__}.{module}").PROTOCOL
    return protocol


def class_columns(scored: Sequence[str], wanted: Sequence[str], head: str) -> NDArray[np.int64]:
    """Find the manifest's classes among those that a head scores, by name; [C], columns of its scores.

    Raises:
        SpecMismatch: the head does not know one of them.
    """
    column = {name: number for number, name in enumerate(scored)}
    unknown = [name for name in wanted if name not in column]
    if unknown:
        raise SpecMismatch(
            f"{head} does not score {len(unknown)} of the manifest's {len(wanted)} classes ({_few(unknown)})",
            seen=f"{len(scored)} classes ({_few(scored)})",
            fix="Use the manifest it was trained on, or a head that reads class names.",
        )
    return np.array([column[name] for name in wanted], dtype=np.int64)


def require_finite(scores: NDArray[np.float32], ids: NDArray[np.str_], head: str) -> None:
    """Refuse scores [..., C] of videos [...] of which one is infinite or no number: no rank follows from them.

    Raises:
        StoreError: as damaged features are what they usually come from.
    """
    broken = np.unique(ids[~np.isfinite(scores).all(axis=-1)])
    if len(broken):
        raise StoreError(
            f"{head} gave scores that are not finite numbers to {len(broken)} videos",
            seen=f"for example {broken[0]}",
            fix="The store's bytes may be damaged (coldframe verify STORE), or the head's training went too far",
        )


def n_seen(seen: Sequence[str], wanted: Sequence[str]) -> int:
    """How many of the wanted classes a head was trained on; case, `_` and `-` make no other class."""
    known = {_plain(name) for name in seen}
    return sum(_plain(name) in known for name in wanted)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
