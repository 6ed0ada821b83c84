"""Stage 3, top-down: store and predictor → protocol → a number with its interval → one line in a results file."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..data_manifests.errors import ConfigError
from ..data_manifests.records import Manifest, ManifestError
from ..extract.batches import FeatureDataset, labelled
from ..extract.provenance import code_commit, code_versions
from ..extract.store import FeatureStore, StoreError
from .predictors import Predictor
from .protocols import Outcome, ProtocolSpec, Videos, find
from .results import Result, append_result


def evaluate(
    store: FeatureStore,
    manifest: Manifest,
    predictor: Predictor,
    protocol: str,
    settings: Mapping[str, Any] | None = None,
    results: Path | None = None,
    *,
    split: str = "test",
) -> Result:
    """Score a predictor on one split under a protocol, and append the result to a file.

    Videos that the store lacks are counted and listed, and none stands in for them: metrics are over the videos that
    are there, and `closed_set` and `zero_shot` also say what they would be if the missing ones were all wrong.

    Args:
        settings: of the protocol's config; what is not named keeps its default.
        results: JSON lines; None writes nothing. Episode lists and what every video scored go to folders beside it.
        split: of the manifest; `all` takes every labelled video.

    Raises:
        UnknownName: no such protocol or split.
        ConfigError: an unknown or impossible setting, or a head that cannot do what the protocol asks.
        SpecMismatch: the store lacks a feature, or the head does not know the manifest's classes.
        ManifestError: the split has no labelled video.
        StoreError: none of the split's videos is in the store, or scores are not finite numbers.
    """
    started = time.perf_counter()
    name = protocol.replace("-", "_")
    spec = find(name)
    config = _config(spec, name, settings or {})
    _check_task(spec, name, predictor)
    store.require(predictor.needs, wanted_by=predictor.head)
    videos = _videos(store, manifest, split, predictor.needs)
    outcome = spec.run(predictor, videos, config)
    result = Result(
        protocol=name,
        setting=outcome.setting,
        dataset=manifest.name,
        split=split,
        head=predictor.head,
        head_config=dict(predictor.config),
        headline=spec.headline,
        metrics={metric: e.value for metric, e in outcome.estimates.items()},
        interval_95={metric: (e.low, e.high) for metric, e in outcome.estimates.items()},
        interval_95_classes={metric: (e.low, e.high) for metric, e in outcome.over_classes.items()},
        n=outcome.n,
        unit=outcome.unit,
        n_missing=len(videos.missing),
        seed=outcome.seed,
        training_seed=predictor.seed,
        uses_class_names=predictor.uses_class_names,
        templates=predictor.templates,
        is_transductive=predictor.is_transductive,
        selection=predictor.selection,
        frames=store.spec.frames.describe(),
        config=dataclasses.asdict(config),
        fingerprints=_fingerprints(store, manifest, predictor, outcome),
        notes=(*_notes(predictor, manifest, split, videos), *outcome.notes),
        details=_keep(outcome, videos, results.parent) if results else "",
        seconds=round(time.perf_counter() - started, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=code_commit(),
        versions=code_versions(),
    )
    if results:
        append_result(results, result)
    return result


def _config(spec: ProtocolSpec, protocol: str, settings: Mapping[str, Any]) -> Any:
    """The protocol's config with some settings changed; no misspelt key takes the default."""
    defaults = {f.name: f.default for f in dataclasses.fields(spec.config)}
    for key, value in settings.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
            fix = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(defaults)}."
            raise ConfigError(f"{protocol} has no setting {key!r}", fix=fix)
        if type(value) is not type(defaults[key]):
            raise ConfigError(f"{key} of {protocol}", seen=repr(value), wanted=f"a value like {defaults[key]!r}")
    return spec.config(**settings)


def _check_task(spec: ProtocolSpec, protocol: str, predictor: Predictor) -> None:
    if spec.task not in predictor.tasks:
        raise ConfigError(
            f"{protocol} needs a head with the task {spec.task!r}",
            seen=f"{predictor.head}, which has {' and '.join(sorted(predictor.tasks)) or 'none'}",
        )


def _videos(store: FeatureStore, manifest: Manifest, split: str, features: Sequence[str]) -> Videos:
    """Join a split with the store: what can be scored, and what is missing."""
    chosen = manifest if split == "all" else manifest.split(split)
    # Sorted, as videos lie in the store; and the order of a manifest's rows then changes nothing.
    records = sorted((r for r in chosen.records if r.label is not None), key=lambda r: r.video_id)
    if not records:
        raise ManifestError(
            f"split {split!r} of {manifest.name} has no labelled video",
            seen=f"{len(chosen.records)} videos",
            fix="Choose another split, or give the manifest labels.",
        )
    scored = dataclasses.replace(chosen, records=tuple(records))
    ids, labels, missing = labelled(store, scored)
    if not ids:
        raise StoreError(
            f"none of the {len(records)} labelled videos of split {split!r} is in the store",
            seen=f"ids such as {store.ids[0]!r}" if store.ids else "an empty store",
            wanted=f"ids such as {records[0].video_id!r}",
            fix="Extract this manifest's videos first.",
        )
    return Videos(FeatureDataset(store, ids, labels, features), scored, missing)


def _notes(predictor: Predictor, manifest: Manifest, split: str, videos: Videos) -> Iterator[str]:
    n_unlabelled = sum(r.label is None and split in (r.split, "all") for r in manifest.records)
    if videos.missing:
        yield f"{len(videos.missing)} videos are missing, among them {', '.join(videos.missing[:3])}"
    if n_unlabelled:
        yield f"{n_unlabelled} videos have no label and are not counted"
    if predictor.selection and predictor.selection == split:
        yield f"the head's epoch was chosen on {split}, on which it is scored: too good by an unknown amount"
    if predictor.manifest_fingerprint == manifest.fingerprint and split in ("train", "all"):
        yield "scored on videos it was trained on"
    if predictor.manifest_fingerprint not in ("", manifest.fingerprint):
        yield "the head was trained on another manifest: that none of these videos was in it is not checked"


def _fingerprints(store: FeatureStore, manifest: Manifest, predictor: Predictor, outcome: Outcome) -> dict[str, str]:
    found = {
        "store": store.fingerprint,
        "manifest": manifest.fingerprint,
        "checkpoint": predictor.checkpoint,
        "training_manifest": predictor.manifest_fingerprint,
        "episodes": outcome.episodes.fingerprint if outcome.episodes else "",
    }
    return {what: fingerprint for what, fingerprint in found.items() if fingerprint}


def _keep(outcome: Outcome, videos: Videos, folder: Path) -> str:
    """Store the episode list and what every video or episode scored, each named by its contents; path of the latter."""
    if outcome.episodes:
        _write(folder / "episodes" / f"{outcome.episodes.fingerprint}.npz", outcome.episodes.save)
    arrays = {**outcome.details, "missing": np.array(videos.missing, dtype=np.str_)}
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    path = folder / "details" / f"{digest.hexdigest()[:16]}.npz"
    _write(path, lambda part: np.savez_compressed(part, **arrays))
    return path.relative_to(folder).as_posix()


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Save a file that is named by its contents, whole or not at all; one that is there is right."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
        save(part)
        part.replace(path)
