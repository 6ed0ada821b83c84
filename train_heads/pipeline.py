"""Stage 2, top-down: store → training and validation videos → heads → fit → checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data_manifests.errors import ConfigError
from ..data_manifests.records import Manifest
from ..extract.store import FeatureStore
from ..extract.text import TextFeatures
from ..extract.towers import Tower
from .build import build_head, find_device, frozen_tower, needed_features
from .checkpoint import Checkpoint, Predictor, load_checkpoint, remove_state, save_checkpoint, trained_tensors
from .heads import find
from .loop import Data, fit
from .run import DivergedError, Run
from .run_folder import begin, describe_run, has_ended
from .settings import Settings, complete
from .specs import EpisodeTraining, TrainSpec
from .training_data import Videos, find_videos


@dataclass(frozen=True, slots=True)
class Job:
    """One head to train."""

    head: str
    asked: Settings
    out: Path  # folder of the run


def train(
    store: FeatureStore,
    manifest: Manifest,
    head: str,
    config: Any = None,
    spec: TrainSpec | None = None,
    out: Path | str = "run",
    *,
    episodes: EpisodeTraining | None = None,
    templates: Sequence[str] | str = "video",
    device: str = "auto",
    quiet: bool = False,
) -> Checkpoint:
    """Train a head on the features of a manifest's training videos and write the run to a folder.

    The best epoch is chosen on the split `val`, or on videos carved from `train` where there is none, never on `test`.
    The same call after an interruption goes on where it stopped; after the end it returns the checkpoint.

    Args:
        config: the head's own; None takes its defaults.
        out: folder of the run: settings, history, and in the end the checkpoint.
        episodes: of a head that learns from them; None takes the defaults.
        templates: sentences around class names, one of them, or the name of a set of them; for heads that read text.
        device: a torch device, or auto.
        quiet: show no progress.

    Raises:
        UnknownName, ConfigError: no such head, nothing to train in it, or a config that does not suit the tower.
        SpecMismatch: the store lacks a feature; the message is the command that adds it.
        ManifestError, StoreError: no training videos, unlabelled ones, too few for the episodes, or none of them in the
            store.
        DivergedError: the loss is not finite any more.
    """
    if find(head).learns_from_episodes:
        episodes = episodes or EpisodeTraining()
    elif episodes is not None:
        raise ConfigError(f"{head} does not learn from episodes", seen=episodes)
    asked = complete(Settings(find(head).config() if config is None else config, spec or TrainSpec(), episodes))
    job = Job(head, asked, Path(out))
    (ended,) = train_together(store, manifest, [job], templates=templates, device=device, quiet=quiet)
    if isinstance(ended, DivergedError):
        raise ended
    return ended


def train_together(
    store: FeatureStore,
    manifest: Manifest,
    jobs: Sequence[Job],
    *,
    templates: Sequence[str] | str = "video",
    device: str = "auto",
    quiet: bool = False,
) -> list[Checkpoint | DivergedError]:
    """Train heads side by side: those that see the same batches share one pass over the cache.

    Every run ends with the same bits as if `train` had made it alone. All heads are built before the first step, so
    that what is wrong with one is known at once, and their weights live in memory together.

    Returns:
        The checkpoint of each job, or why it has none.

    Raises:
        As `train` does, but for DivergedError.
    """
    plans = [_plan(store, manifest, job, templates) for job in jobs]
    waiting = [plan for plan in plans if not has_ended(plan.job.out, plan.described)]
    found = find_device(device)
    tower = frozen_tower(store.spec.tower, found)
    passes = _passes(store, manifest, waiting)
    built = {plan: _build(plan, part.videos, store, templates, found, tower) for part in passes for plan in part.plans}
    for plan in waiting:  # only now: a head that cannot be built leaves no folder that refuses the corrected one
        begin(plan.job.out, plan.described)

    ended: dict[_Plan, Checkpoint | DivergedError] = {}
    for part in passes:
        ended |= _go_over(part, [_run(plan, *built.pop(plan), part, found) for plan in part.plans], store, quiet)
    return [ended[plan] if plan in ended else load_checkpoint(plan.job.out) for plan in plans]


def untrained(
    store: FeatureStore,
    class_names: Sequence[str],
    head: str,
    config: Any = None,
    *,
    templates: Sequence[str] | str = "video",
    device: str = "auto",
) -> Predictor:
    """Put a head that has nothing to train to work on a store.

    Raises:
        UnknownName, ConfigError: no such head, or one that must be trained first.
        SpecMismatch: the store lacks a feature; the message is the command that adds it.
    """
    if find(head).is_trained:
        raise ConfigError(
            f"{head} must be trained first",
            fix=f"`coldframe train-head {head} --store STORE --out RUN`, then name the run.",
        )
    config = find(head).config() if config is None else config
    found = find_device(device)
    module, text = build_head(head, config, store, class_names, templates, found)
    needs = needed_features(head, config, store)
    return Predictor(head, dataclasses.asdict(config), module, needs, tuple(class_names), text, found)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """A job that this store can do."""

    job: Job
    needs: tuple[str, ...]
    described: str  # as the run's settings.toml will say it


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """Jobs that see the same batches."""

    plans: list[_Plan]
    videos: Videos
    data: Data


def _plan(store: FeatureStore, manifest: Manifest, job: Job, templates: Sequence[str] | str) -> _Plan:
    """Refuse what cannot be trained, or not from this store."""
    head = find(job.head)
    if not head.is_trained:
        protocol = "few_shot" if "episodes" in head.tasks else "zero_shot"
        raise ConfigError(
            f"{job.head} has nothing to train",
            fix=f"Evaluate it as it is: `coldframe eval {protocol} --store STORE --head {job.head}`.",
        )
    needs = needed_features(job.head, job.asked.head, store)
    store.require(needs, wanted_by=job.head)
    return _Plan(job, needs, describe_run(store, manifest, job.head, job.asked, templates))


def _passes(store: FeatureStore, manifest: Manifest, plans: Sequence[_Plan]) -> list[_Pass]:
    """Group jobs by all that decides which videos are in a batch; a pass reads what any of them needs."""
    groups: dict[object, list[_Plan]] = {}
    for plan in plans:
        train, episodes = plan.job.asked.train, plan.job.asked.episodes
        groups.setdefault((train.seed, train.batch_size, train.val_fraction, episodes), []).append(plan)
    passes = []
    for group in groups.values():
        asked = group[0].job.asked
        needs = dict.fromkeys(feature for plan in group for feature in plan.needs)
        videos = find_videos(store, manifest, tuple(needs), asked.train)
        passes.append(_Pass(group, videos, videos.data(asked)))
    return passes


def _build(
    plan: _Plan,
    videos: Videos,
    store: FeatureStore,
    templates: Sequence[str] | str,
    device: torch.device,
    tower: Callable[[], Tower],
) -> tuple[nn.Module, TextFeatures | None]:
    """The head, and the texts of all classes of the manifest."""
    asked, class_names = plan.job.asked, videos.manifest.class_names
    trained_names = () if asked.episodes is None else videos.seen_classes
    return build_head(
        plan.job.head, asked.head, store, class_names, templates, device, asked.train.seed, trained_names, tower
    )


def _run(plan: _Plan, head: nn.Module, text: TextFeatures | None, part: _Pass, device: torch.device) -> Run:
    """A run; one that learns from episodes is told the names of training classes alone."""
    asked = plan.job.asked
    return Run(
        head,
        asked.train,
        plan.job.out,
        part.data.n_batches,
        text=text if text is None or asked.episodes is None else text.select(part.videos.seen),
        text_of_validation=text,
        features=plan.needs,
        device=device,
    )


def _go_over(
    part: _Pass, runs: Sequence[Run], store: FeatureStore, quiet: bool
) -> dict[_Plan, Checkpoint | DivergedError]:
    """Train the runs of a pass; each has its checkpoint as soon as it has ended."""
    plan_of = dict(zip(runs, part.plans, strict=True))
    ended: dict[_Plan, Checkpoint | DivergedError] = {}

    def end(run: Run) -> None:
        plan = plan_of[run]
        ended[plan] = run.error or _save(plan, run, part.videos, store)

    fit(runs, part.data, ended=end, quiet=quiet)
    return ended


def _save(plan: _Plan, run: Run, videos: Videos, store: FeatureStore) -> Checkpoint:
    """The checkpoint of a run that has ended; its state is not needed any more."""
    best, text, asked = run.finish(), run.text, plan.job.asked
    checkpoint = Checkpoint(
        head=plan.job.head,
        config=asked.head,
        train=asked.train,
        class_names=videos.manifest.class_names,
        seen_classes=videos.seen_classes,
        templates=() if text is None else text.templates,
        features=store.spec,
        needs=plan.needs,
        manifest_fingerprint=videos.manifest.fingerprint,
        selection="val",
        n_train=len(videos.train),
        n_val=len(videos.val),
        n_missing=videos.n_missing,
        epoch=best.epoch,
        step=best.step,
        scores=best.scores,
        episodes=asked.episodes,
        weights=trained_tensors(run.head),
    )
    saved = save_checkpoint(plan.job.out, checkpoint)
    remove_state(plan.job.out)
    return saved
