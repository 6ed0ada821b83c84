"""Splits that are drawn: seeded, stratified by class, whole groups at a time.

What is drawn depends on the seed, the ids, the labels and the groups; not on the order of the records, the machine or
the version of any library. Videos that cannot be told apart (segments of one file, members of one group) move together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace

from .errors import ConfigError
from .records import Manifest, ManifestError, VideoRecord


def carve_validation(manifest: Manifest, fraction: float, seed: int = 0) -> Manifest:
    """Move a share of each class's training videos to the split `val`.

    A class gives `fraction` of its videos, at least one, and always keeps at least one. A class that is one video or
    one group stays in training.

    Raises:
        ManifestError: there is a validation split already, or no class can spare a video.
        ConfigError: a fraction outside 0 to 1.
    """
    if not 0 < fraction < 1:
        raise ConfigError("the share of validation videos is out of range", seen=fraction, wanted="between 0 and 1")
    if any(r.split == "val" for r in manifest.records):
        raise ManifestError("the manifest has a validation split already", fix="Use it, or clear it first.")
    carved = _carve(manifest, "val", fraction, seed)
    if carved.records == manifest.records:
        n_train = sum(r.split == "train" for r in manifest.records)
        raise ManifestError(
            "no validation split can be carved: no class can spare a training video",
            seen=f"{n_train:,} training videos",
            wanted="a class with two labelled training videos of different groups",
            fix="Add videos, or mark a validation split in the manifest.",
        )
    return carved


def captions_as_classes(
    manifest: Manifest, splits: Collection[str], val_fraction: float = 0, seed: int = 0
) -> Manifest:
    """The captioned videos of some splits, every caption a class; see `Manifest.by_caption`.

    Args:
        splits: whose captions are classes; those of the others are not among them.
        val_fraction: share of the training videos to move to `val` where there is none; 0 moves none.

    Raises:
        ManifestError: no video of these splits has a caption, or none can be spared for validation.
    """
    found = replace(manifest, records=tuple(r for r in manifest.records if r.split in splits)).by_caption()
    if not val_fraction or any(r.split == "val" for r in found.records):
        return found
    # As one class: captions of one video lie in one file, so they move together.
    alike = replace(found, class_names=("",), records=tuple(replace(r, label=0) for r in found.records))
    carved = carve_validation(alike, val_fraction, seed).records
    records = tuple(replace(r, split=c.split) for r, c in zip(found.records, carved, strict=True))
    return replace(found, records=records)


def draw_splits(manifest: Manifest, test_fraction: float, val_fraction: float, seed: int = 0) -> Manifest:
    """Deal every labelled video to `train`, `val` or `test`; videos without a label are in no split.

    A class gives each fraction of its videos, at least one while it can keep one for training: of two videos one is for
    testing, of three one is for validation too. A fraction of 0 draws no such split.

    Raises:
        ConfigError: fractions that leave nothing to train on.
    """
    if min(test_fraction, val_fraction) < 0 or not test_fraction + val_fraction < 1:
        raise ConfigError(
            "the shares of test and validation videos are out of range",
            seen=f"test_fraction={test_fraction}, val_fraction={val_fraction}",
            wanted="0 or more each, less than 1 together",
        )
    records = (replace(r, split="" if r.label is None else "train") for r in manifest.records)
    manifest = replace(manifest, records=tuple(records))
    if test_fraction:
        manifest = _carve(manifest, "test", test_fraction, seed)
    if val_fraction:
        manifest = _carve(manifest, "val", val_fraction / (1 - test_fraction), seed)
    return manifest


def _carve(manifest: Manifest, split: str, fraction: float, seed: int) -> Manifest:
    """Move about `fraction` of each class from `train` to `split`."""
    pool = [r for r in manifest.records if r.split == "train" and r.label is not None]
    moved = _choose(pool, split, fraction, seed)
    return replace(
        manifest, records=tuple(replace(r, split=split) if r.video_id in moved else r for r in manifest.records)
    )


def _choose(pool: list[VideoRecord], split: str, fraction: float, seed: int) -> set[str]:
    """Ids to move: units in a drawn order, each one that brings its classes nearer to their shares.

    A group can span classes (one person who does everything), so classes cannot be dealt one after the other.
    """
    units: dict[tuple[str, str], list[VideoRecord]] = {}
    for record in pool:
        units.setdefault(("group", record.group) if record.group else ("file", record.path), []).append(record)
    drawn = sorted(units.values(), key=lambda unit: _drawn(seed, split, unit))

    have = Counter(r.label for r in pool)
    want = Counter({label: min(n - 1, max(1, int(n * fraction + 0.5))) for label, n in have.items()})
    taken: Counter[int | None] = Counter()
    moved: set[str] = set()

    def take(unit: Iterable[VideoRecord], sizes: Counter[int | None]) -> None:
        taken.update(sizes)
        moved.update(r.video_id for r in unit)

    for unit in drawn:
        sizes = Counter(r.label for r in unit)
        off_now = sum(abs(taken[c] - want[c]) for c in sizes)
        off_then = sum(abs(taken[c] + n - want[c]) for c, n in sizes.items())
        if off_then < off_now and all(taken[c] + n < have[c] for c, n in sizes.items()):
            take(unit, sizes)
    # A class made of large groups may have got nothing; its smallest group is then better than none.
    for unit in sorted(drawn, key=len):  # stable: still in the drawn order among equals
        sizes = Counter(r.label for r in unit)
        if any(want[c] and not taken[c] for c in sizes) and all(taken[c] + n < have[c] for c, n in sizes.items()):
            take(unit, sizes)
    return moved


def _drawn(seed: int, split: str, unit: list[VideoRecord]) -> bytes:
    """A unit's place in the drawn order, from its name alone: no other video's presence changes it."""
    name = unit[0].group or min(r.video_id for r in unit)
    return hashlib.sha256(f"{seed}\n{split}\n{name}".encode()).digest()
