"""Published data sets: one file each, from the official lists to a manifest. Nothing but text is read.

A new data set is a new file with one constant, `DATASET = DatasetSpec(...)`; the file's name is the data set's name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, UnknownName
from ..records import Manifest, ManifestError


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """What is known of a data set, and how its manifest is made."""

    build: Callable[..., Manifest]  # (root, lists, fold, *, strict=True)
    n_classes: int
    n_expected: Mapping[int, Mapping[str, int]]  # fold → split → published number of videos
    homepage: str
    licence: str
    citation: str


def names() -> list[str]:
    """Names of all data sets, sorted; none is imported."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(name: str) -> DatasetSpec:
    """Import one data set and return its DATASET constant; raise UnknownName with the choices."""
    if name not in names():
        raise UnknownName("data set", name, choices=names())
    dataset: DatasetSpec = importlib.import_module(f"{__name__}.{name}").DATASET
    return dataset


def read_list(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of an official list that are not blank, each with its place for messages.

    Raises:
        ManifestError: there is no such list, or it is not text.
    """
    if not path.is_file():
        there = (
            ", ".join(sorted(p.name for p in path.parent.glob("*"))[:5]) if path.parent.is_dir() else "no such folder"
        )
        raise ManifestError(f"no list {path.name} in {path.parent}", seen=there or "an empty folder")
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # names may hold what splitlines takes for a line's end
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    return ((f"{path.name} line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip())


def published_fold(n_expected: Mapping[int, Mapping[str, int]], fold: int) -> Mapping[str, int]:
    """The published counts of a fold; raises ConfigError for a fold that does not exist."""
    if fold not in n_expected:
        raise ConfigError("no such fold", seen=fold, wanted=" or ".join(map(str, n_expected)))
    return n_expected[fold]


def refuse_partial(manifest: Manifest, n_classes: int, n_expected: Mapping[str, int]) -> None:
    """Raise ManifestError unless the manifest has the published number of classes and of videos in each split."""
    found = Counter(r.split for r in manifest.records)
    if len(manifest.class_names) != n_classes or any(found[split] != n for split, n in n_expected.items()):
        raise ManifestError(
            f"the lists of {manifest.name} are not the complete published ones",
            seen=_counts(len(manifest.class_names), {split: found[split] for split in n_expected}),
            wanted=_counts(n_classes, n_expected),
            fix="Get the official lists, or accept these with --partial (strict=False).",
        )


def _counts(n_classes: int, n_videos: Mapping[str, int]) -> str:
    return ", ".join([f"{n_classes} classes", *(f"{n:,} {split}" for split, n in n_videos.items())])
