"""Features that somebody else cached: what their arrays hold is found by looking at names, shapes and types.

    clip, class/clip          an array a video, [T, D] or [D]
    clip/features             a group a video (or an .npz each), with arrays in it; `dataset` chooses one
    x beside name             all videos in one array, [V, T, D] or [V, D], and their ids in another

Tokens have [1+N, D] where others have [D]. Labels, class names and groups may lie in arrays of their own.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data_manifests.errors import ConfigError, UnknownName
from ...data_manifests.records import Manifest, listed
from ..catalogue import TIMES
from ..shards import VideoRow
from ..specs import (
    IMPORTED,
    FeatureSpec,
    FrameSpec,
    TowerShape,
    TowerSpec,
    TransformSpec,
    canonical_feature,
    feature_shape,
)
from .foreign_labels import Reading, Videos, last, manifest_of, matched, named_leaf, parent, texts
from .parcels import Leaf, Parcel

_IDS = ("video_ids", "video_id", "ids", "id", "video_names", "names", "name", "filenames", "paths", "path", "keys")
_DTYPES = ("float16", "bfloat16", "float32")
_FEATURES = {"features", "feature", "feats", "feat", "embeddings", "embedding", "clip", "data"}


def understand(
    leaves: Mapping[str, Leaf], reading: Reading, source: Path, given: Manifest | None
) -> tuple[Parcel, tuple[str, ...]]:
    """Features of anybody's file as a parcel, and notes on how it was read.

    Args:
        leaves: the file's arrays.
        given: the labels and splits; its ids are those of the file, or their paths or names of files.

    Raises:
        ConfigError: arrays of which it cannot be said what they hold, or that do not fit each other or the tower.
        UnknownName: no such array, feature or dtype.
        ManifestError: ids or labels that cannot be right.
    """
    _refuse_idle_options(reading, given)
    kind = (reading.feature or "embedding").partition(".")[0]
    if kind not in ("embedding", "cls", "tokens"):
        raise UnknownName("feature to import", reading.feature or "", ("embedding", "cls.<k>", "tokens.<k>"))
    frame_ndim = 2 if kind == "tokens" else 1
    videos = _in_one_array(leaves, reading, frame_ndim) or _one_by_one(leaves, reading, frame_ndim, given)
    frame = _frame_shape(videos.clips, frame_ndim)
    if given is None:
        manifest, notes = manifest_of(leaves, videos, reading, source)
        named = {video_id: video_id for video_id in videos.clips}
    else:
        manifest, (named, notes) = given, matched(given, videos.clips)
    lengths = {own: _length(videos.clips[theirs], frame_ndim) for own, theirs in named.items()}
    name, tower, shape = _tower(reading, source, frame)
    dtype = reading.dtype or _dtype(videos.clips.values())
    if dtype not in _DTYPES:
        raise UnknownName("dtype", dtype, _DTYPES)
    spec = FeatureSpec(FrameSpec(None, IMPORTED, IMPORTED), tower, dtype)

    def read(video_id: str, view: int) -> dict[str, NDArray]:
        frames = _numbers(videos.clips[named[video_id]], video_id, dtype).reshape(-1, *frame)
        return {name: frames, TIMES: np.full(len(frames), np.nan)}  # nobody said when the frames were

    rows = {i: [VideoRow(i, "ok", n_frames=n, decoder=IMPORTED)] for i, n in lengths.items()}
    return Parcel(spec, shape, (name,), manifest, rows, read), (*videos.notes, *notes)


def _refuse_idle_options(reading: Reading, given: Manifest | None) -> None:
    """Refuse options that would say nothing beside others."""
    if given is not None and (reading.labels or reading.classes or reading.group or reading.test_fraction is not None):
        raise ConfigError(
            "the manifest says labels, classes, groups and splits",
            fix="Leave out --labels, --classes, --group and --test-fraction.",
        )
    if reading.pretrained and not reading.model:
        raise ConfigError("weights of no model", seen=f"--pretrained {reading.pretrained}", fix="Add --model NAME.")


# Which arrays are the videos


def _in_one_array(leaves: Mapping[str, Leaf], reading: Reading, frame_ndim: int) -> Videos | None:
    """All videos in one array beside their ids."""
    floats = {name: leaf for name, leaf in leaves.items() if leaf.dtype.kind == "f" and reading.dataset in (None, name)}
    many = {name: leaf for name, leaf in floats.items() if len(leaf.shape) == frame_ndim + 2}
    if not many and (len(floats) == 1 or reading.ids):  # a frame a video
        many = {name: leaf for name, leaf in floats.items() if len(leaf.shape) == frame_ndim + 1}
    found = {name: ids for name, leaf in many.items() if (ids := _ids(leaves, name, leaf, reading)) is not None}
    if len(found) > 1:
        raise ConfigError(
            "several arrays could be the features", seen=listed(sorted(found)), fix="Choose: --dataset NAME."
        )
    if not found:
        if reading.ids:
            raise ConfigError(f"no array of features goes with the ids in {reading.ids}", seen=_shapes(leaves))
        if any(len(leaf.shape) == frame_ndim + 2 for leaf in floats.values()):
            raise ConfigError(
                "an array of many videos, and nothing says which they are",
                seen=_shapes(leaves),
                fix="Add an array of their ids and name it: --ids KEY. For tokens of single videos: --as tokens.K.",
            )
        return None
    ((name, (key, ids)),) = found.items()
    bank = leaves[name]
    clips = {
        video_id: Leaf(bank.shape[1:], bank.dtype, functools.partial(_row, bank, i)) for i, video_id in enumerate(ids)
    }
    folder = parent(name)
    return Videos(
        clips, {video_id: (folder, i) for i, video_id in enumerate(ids)}, (f"features from {name}, ids from {key}",)
    )


def _ids(leaves: Mapping[str, Leaf], name: str, bank: Leaf, reading: Reading) -> tuple[str, list[str]] | None:
    """The array that names the videos of another, and the names; None where there is none."""
    n_videos = bank.shape[0]
    if reading.ids is not None:
        key, leaf = named_leaf(leaves, reading.ids, parent(name), "array of ids")
        ids = texts(leaf)
        if leaf.shape != (n_videos,) or len({*ids}) < n_videos:
            raise ConfigError(
                f"{key} does not name the videos of {name}",
                seen=f"{len({*ids})} different values in {list(leaf.shape)}",
                wanted=f"{n_videos} different ones",
            )
        return key, ids
    beside = {last(key): key for key in leaves if parent(key) == parent(name)}
    named = {key: texts(leaves[key]) for key in beside.values() if _is_text(leaves[key], n_videos)}
    unique = {key: ids for key, ids in named.items() if len({*ids}) == n_videos}
    known = [beside[usual] for usual in _IDS if beside.get(usual) in unique]
    if not known and len(unique) > 1:
        raise ConfigError("several arrays could be the ids", seen=listed(sorted(unique)), fix="Choose: --ids KEY.")
    key = next(iter(known or unique), None)
    return None if key is None else (key, unique[key])


def _one_by_one(leaves: Mapping[str, Leaf], reading: Reading, frame_ndim: int, given: Manifest | None) -> Videos:
    """An array a video, or a group a video with arrays in it."""
    floats = {name: leaf for name, leaf in leaves.items() if leaf.dtype.kind == "f"}
    if reading.dataset not in (None, "."):
        floats = {
            name: leaf for name, leaf in floats.items() if name == reading.dataset or last(name) == reading.dataset
        }
        if not floats:
            raise UnknownName("array of floats", str(reading.dataset), {last(name) for name in leaves})
    depths = (frame_ndim + 1, frame_ndim)  # one frame may come without its T
    fitting: dict[str, Leaf] = next(
        (some for n in depths if (some := {k: v for k, v in floats.items() if len(v.shape) == n})), {}
    )
    if not fitting:
        frame = "1+N, D" if frame_ndim == 2 else "D"
        pickled = [name for name, leaf in leaves.items() if leaf.dtype.kind == "O"]
        raise ConfigError(
            f"no array holds {reading.feature or 'embedding'} features",
            seen=_shapes(leaves) + (f"; {listed(pickled)} pickled, which is never loaded" if pickled else ""),
            wanted=f"float arrays [T, {frame}] of single videos, or [V, T, {frame}] beside an array of ids",
            fix="Say what the numbers are: --as embedding, cls.K or tokens.K.",
        )
    has_groups = reading.dataset != "." and (reading.dataset is not None or _are_groups(fitting, given))
    kinds = sorted({last(name) for name in fitting})
    if has_groups and len(kinds) > 1:
        raise ConfigError(
            "every video has several arrays", seen=listed(kinds), fix="Choose: --dataset NAME; or . if each is a video."
        )
    clips = {(parent(name) or name) if has_groups else name: leaf for name, leaf in fitting.items()}
    if len(clips) < len(fitting):
        raise ConfigError("two arrays would be one video", seen=listed(sorted(fitting)), fix="Choose: --dataset NAME.")
    notes = [f"{kinds[0]} of each group" if has_groups else "every array is a video"]
    if others := sorted(floats.keys() - fitting.keys()):
        notes.append(f"{len(others):,} arrays of another shape left out: {listed(others)}")
    return Videos(clips, {video_id: (video_id if has_groups else "", None) for video_id in clips}, tuple(notes))


def _are_groups(fitting: Mapping[str, Leaf], given: Manifest | None) -> bool:
    """Whether names are those of arrays within a video, rather than those of videos."""
    if given is not None and not given.by_id.keys().isdisjoint(fitting):
        return False
    inside: dict[str, set[str]] = {}
    for name in fitting:
        inside.setdefault(parent(name), set()).add(last(name))
    if "" in inside:
        return False
    alike = len(inside) > 1 and all(names == next(iter(inside.values())) for names in inside.values())
    return alike or any(name.casefold() in _FEATURES for names in inside.values() for name in names)


# What the numbers are


def _frame_shape(clips: Mapping[str, Leaf], frame_ndim: int) -> tuple[int, ...]:
    """The shape of a frame, which all videos share; refuses empty ones."""
    if not clips:
        raise ConfigError("there is no video in it")
    first = next(iter(clips))
    wanted = clips[first].shape[-frame_ndim:]
    for video_id, leaf in clips.items():
        if leaf.shape[-frame_ndim:] != wanted:
            raise ConfigError(
                "videos of different sizes",
                seen=f"{list(leaf.shape)} of {video_id}",
                wanted=f"{list(wanted)} a frame, as {first}",
            )
        if not math.prod(leaf.shape):
            raise ConfigError(f"video {video_id!r} is empty", seen=list(leaf.shape))
    return wanted


def _length(leaf: Leaf, frame_ndim: int) -> int:
    return leaf.shape[0] if len(leaf.shape) > frame_ndim else 1


def _tower(reading: Reading, source: Path, frame: tuple[int, ...]) -> tuple[str, TowerSpec, TowerShape]:
    """The feature's canonical name, and the tower that made it: the one that is named, or one known by this file alone."""
    asked = reading.feature or "embedding"
    if reading.model is not None:
        from ..towers import load_tower

        tower = load_tower(reading.model, reading.pretrained, device="cpu")
        name = canonical_feature(asked, tower.shape.layers)
        if (wanted := feature_shape(name, tower.shape, tower.spec.transform.size_px)) != frame:
            raise ConfigError(f"the features are not {name} of {reading.model}", seen=list(frame), wanted=list(wanted))
        return name, tower.spec, tower.shape
    layer = asked.partition(".")[2]
    if layer.startswith("-"):
        raise ConfigError(
            f"{asked} counts from the last block of a tower that is not known", fix="Count from 1, or give --model."
        )
    layers = int(layer) if layer.isdecimal() and len(layer) < 10 else 0
    name = canonical_feature(asked, layers)
    width = 0 if name == "embedding" else frame[-1]
    shape = TowerShape(
        layers=layers,
        width=width,
        heads=max(width // 64, 1),  # as CLIP divides it
        embed_dim=frame[-1] if name == "embedding" else 0,
        grid=_grid(frame[0]) if len(frame) == 2 else (0, 0),
        text_width=0,
        text_layers=0,
        text_heads=0,
        context_length=0,
    )
    unknown = TransformSpec(size_px=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return name, TowerSpec(IMPORTED, source.name, _digest(source), False, "fp32", unknown), shape


def _grid(n_tokens: int) -> tuple[int, int]:
    """Patches down and across, of tokens of which the first is the class token."""
    if n_tokens > 1 and math.isqrt(n_tokens) ** 2 == n_tokens:
        raise ConfigError(
            "the tokens seem to be patches without a class token", seen=f"{n_tokens} of them", wanted=f"{n_tokens + 1}",
            fix="Put the class token first; or give --model, if this tower's tokens are so many.",
        )  # fmt: skip
    side = math.isqrt(n_tokens - 1)
    return (side, side) if side * side == n_tokens - 1 else (1, n_tokens - 1)


def _digest(source: Path) -> str:
    """SHA-256 of a file, or of the arrays in a folder with their names."""

    def of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if source.is_file():
        return of(source)
    whole = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*.np[yz]") if path.is_file()):
        whole.update(f"{path.relative_to(source).as_posix()}\0{of(path)}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def _dtype(clips: Iterable[Leaf]) -> str:
    """What holds the numbers of every video; float64 is rounded to float32."""
    return "float32" if any(leaf.dtype.itemsize > 2 for leaf in clips) else "float16"


def _numbers(leaf: Leaf, video_id: str, dtype: str) -> NDArray:
    """All of a video as the store's dtype (float32 for bfloat16); refuses what is not finite."""
    array = np.asarray(leaf.read(()))
    if not np.isfinite(array).all():
        raise ConfigError(f"video {video_id!r} has numbers that are not finite", fix="Mend or remove it.")
    with np.errstate(over="ignore"):
        array = array.astype("float32" if dtype == "bfloat16" else dtype)
    if not np.isfinite(array).all():
        raise ConfigError(f"video {video_id!r} has numbers that {dtype} cannot hold", fix="Give --dtype float32.")
    return array


def _shapes(leaves: Mapping[str, Leaf]) -> str:
    return listed([f"{name} {leaf.dtype.name} {list(leaf.shape)}" for name, leaf in leaves.items()]) or "no array"


def _is_text(leaf: Leaf, length: int) -> bool:
    return leaf.dtype.kind in "US" and leaf.shape == (length,)


def _row(bank: Leaf, number: int, index: Any) -> NDArray:
    return bank.read(number)[index]
