"""Few-shot episodes as arrays: drawn from a seed, stored, hashed, the same everywhere.

An episode draws W classes without replacement, and of each class K + Q distinct videos: K support, Q query. It is the
protocol of TRX, OTAM, HyRSM and CLIP-FSAR, whose own lists depend on the number of loader processes and were never
published.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .records import ManifestError, listed

FORMAT_VERSION = 1
_ARRAYS = ("class_ids", "support", "query")


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """How episodes are drawn."""

    n_way: int = 5  # W
    n_shot: int = 1  # K
    n_query: int = 1  # of each class
    n_episodes: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that draw nothing."""
        for name, least in (("n_way", 2), ("n_shot", 1), ("n_query", 1), ("n_episodes", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ConfigError("episodes cannot be drawn so", seen=f"{name}={value}", wanted=f"{least} or more")


@dataclass(frozen=True, eq=False)
class EpisodeList:
    """n episodes over a bank of V videos. The right answer to a query is its way: row w of `query` belongs to way w."""

    spec: EpisodeSpec
    class_ids: NDArray[np.int64]  # labels of the ways [n, W]
    support: NDArray[np.int64]  # rows of the bank [n, W, K]
    query: NDArray[np.int64]  # rows of the bank [n, W, Q], Q of each class
    bank_ids: tuple[str, ...]  # ids of the videos [V], sorted

    def __post_init__(self) -> None:
        """Freeze the arrays: a list that has a fingerprint does not change."""
        for name in _ARRAYS:
            getattr(self, name).flags.writeable = False

    def __len__(self) -> int:
        return len(self.class_ids)

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of spec, bank and arrays."""
        digest = hashlib.sha256(json.dumps([dataclasses.astuple(self.spec), self.bank_ids]).encode())
        for name in _ARRAYS:
            digest.update(getattr(self, name).astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path | str) -> None:
        """Write a `.npz`: the three arrays, and a header in JSON; nothing is pickled."""
        header = {
            "format_version": FORMAT_VERSION,
            "spec": dataclasses.asdict(self.spec),
            "bank_ids": self.bank_ids,
            "fingerprint": self.fingerprint,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with Path(path).open("wb") as file:  # given a name, NumPy would add to it
            np.savez_compressed(file, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path | str) -> EpisodeList:
        """Read what `save` wrote.

        Raises:
            ManifestError: not an episode list, of another format version, or changed since it was written.
        """
        header, arrays = _read(Path(path))
        if (version := header.get("format_version")) != FORMAT_VERSION:
            fix = "Use the coldframe release that wrote it, or draw the episodes again."
            raise ManifestError(
                f"{path} is of another format", seen=f"version {version}", wanted=FORMAT_VERSION, fix=fix
            )
        episodes = cls(EpisodeSpec(**header["spec"]), **arrays, bank_ids=tuple(header["bank_ids"]))
        if episodes.fingerprint != header["fingerprint"]:
            raise ManifestError(
                f"{path} was changed since it was written",
                seen=f"fingerprint {episodes.fingerprint}",
                wanted=header["fingerprint"],
                fix="Draw the episodes again: the same spec and videos give the same list.",
            )
        return episodes


def draw_episodes(
    ids: Sequence[str], labels: Sequence[int] | NDArray[np.int64], spec: EpisodeSpec, class_names: Sequence[str] = ()
) -> EpisodeList:
    """Draw a list of episodes.

    The same ids (in any order), labels and spec give the same arrays on every machine and with every NumPy; a shorter
    list with the same seed is the beginning of a longer one.

    Args:
        ids: video ids [V].
        labels: their classes [V].
        spec: how many of what.
        class_names: for messages.

    Raises:
        ManifestError: an id twice, a video without a label, too few classes, or a class with too few videos.

    Source: the episodes of Vinyals et al. 2016, arXiv:1606.04080; for video, of CMN, Zhu & Yang, ECCV 2018.
    Differs: drawn once, from (seed, spec, ids), instead of by the loader's processes.
    """
    videos = sorted(zip(ids, map(int, labels), strict=True))
    bank = tuple(video_id for video_id, _ in videos)
    label_of_row = np.array([label for _, label in videos], dtype=np.int64)  # [V]
    _refuse_bad_bank(bank, label_of_row)
    classes, sizes = np.unique(label_of_row, return_counts=True)  # [C], [C]
    _refuse_small_classes(classes, sizes, spec, class_names)
    by_class = np.argsort(label_of_row, kind="stable")  # rows of the bank, class by class
    first = np.cumsum(sizes) - sizes  # [C], where each class begins there

    n, n_way, n_each = spec.n_episodes, spec.n_way, spec.n_shot + spec.n_query
    # The raw stream alone is promised to be the same in every NumPy; what Generator's methods make of it is not.
    bits = np.random.PCG64(spec.seed).random_raw(n * n_way * (1 + n_each)).reshape(n, n_way * (1 + n_each))
    chosen = _distinct(bits[:, :n_way], np.full(n, len(classes)))  # [n, W], positions in `classes`
    within = _distinct(bits[:, n_way:].reshape(n, n_way, n_each), sizes[chosen])  # [n, W, K + Q]
    rows = by_class[first[chosen][..., None] + within]
    return EpisodeList(spec, classes[chosen], rows[..., : spec.n_shot].copy(), rows[..., spec.n_shot :].copy(), bank)


def _distinct(bits: NDArray[np.uint64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw without replacement, uniformly and in random order: M of `size` things, [..., M] bits, [...] sizes.

    The j-th draw is a number below size − j; counting past those drawn before it, in ascending order, makes it the
    position among all. The remainder of 64 random bits favours small numbers by less than size / 2**64.
    """
    drawn = np.empty(bits.shape, dtype=np.int64)
    for j in range(bits.shape[-1]):
        pick = (bits[..., j] % (size - j).astype(np.uint64)).astype(np.int64)
        before = np.sort(drawn[..., :j], axis=-1)
        for i in range(j):
            pick += pick >= before[..., i]
        drawn[..., j] = pick
    return drawn


def _refuse_bad_bank(bank: Sequence[str], labels: NDArray[np.int64]) -> None:
    if twice := sorted({a for a, b in pairwise(bank) if a == b}):
        raise ManifestError(f"episodes need distinct videos, and these ids are there twice: {listed(twice)}")
    if unlabelled := [video_id for video_id, label in zip(bank, labels, strict=True) if label < 0]:
        raise ManifestError(f"episodes need labels, and these videos have none: {listed(unlabelled)}")


def _refuse_small_classes(
    classes: NDArray[np.int64], sizes: NDArray[np.int64], spec: EpisodeSpec, class_names: Sequence[str]
) -> None:
    if len(classes) < spec.n_way:
        raise ManifestError(
            "too few classes for the episodes",
            seen=f"{len(classes)} classes",
            wanted=f"{spec.n_way} (n_way)",
            fix="Ask for fewer ways (--way; in training --set n_way=…), or use a split with more classes.",
        )
    needed = spec.n_shot + spec.n_query
    small = [
        f"{class_names[label] if class_names else f'class {label}'} ({size})"
        for label, size in zip(classes.tolist(), sizes.tolist(), strict=True)
        if size < needed
    ]
    if small:
        raise ManifestError(
            f"classes with too few videos for the episodes: {listed(small)}",
            wanted=f"{needed} each (n_shot {spec.n_shot} + n_query {spec.n_query})",
            fix="Ask for fewer shots or queries, or leave these classes out.",
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    with path.open("rb") as file:
        try:
            found = np.load(file, allow_pickle=False)
            return json.loads(found["header"].tobytes()), {name: found[name] for name in _ARRAYS}
        except (ValueError, KeyError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ManifestError(f"{path} is not an episode list: {error}") from None
