"""Few-shot: N-way K-shot episodes, drawn once, stored, and the same everywhere.

Source: the episodes of CMN, Zhu & Yang 2018, ECCV, and OTAM, Cao et al. 2020, arXiv:1906.11415: 5 ways, 1 or 5 shots,
one query a class, 10,000 episodes of the test split.
Differs: the originals draw episodes from a stream that depends on their number of workers; here they are arrays of a
seed, stored beside the results. A second interval tells how far other classes would move the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from torch import from_numpy

from ...data_manifests.episodes import EpisodeList, EpisodeSpec, draw_episodes
from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.specs import SpecMismatch
from ..intervals import over_classes, over_episodes
from ..metrics import best_class
from ..predictors import EpisodeScorer
from . import Outcome, ProtocolSpec, Videos, class_columns, n_seen, require_finite


@dataclass(frozen=True, slots=True)
class Config:
    """Which episodes."""

    n_way: int = 5
    n_shot: int = 1
    n_query: int = 1  # of a class
    n_episodes: int = 10_000
    seed: int = 0
    episodes: str = ""  # file of a stored list, which replaces everything above


def run(predictor: EpisodeScorer, videos: Videos, config: Config) -> Outcome:
    """Answer the queries of every episode; of equally close classes the first of the episode is the answer.

    Raises:
        ConfigError: such episodes cannot be, or there is no such stored list.
        ManifestError: the split has too few classes or videos for them, or the stored list is damaged.
        SpecMismatch: the stored list is of other videos or labels, or the head does not know a class by name.
        StoreError: scores are not finite numbers.
    """
    class_names = videos.manifest.class_names
    columns = np.arange(len(class_names))
    if predictor.uses_class_names:
        columns = class_columns(predictor.class_names, class_names, predictor.head)
    episodes = _episodes(videos, config)
    accuracy = _accuracy(predictor, _bank(videos, episodes), episodes, columns)  # [E]

    elsewhere = over_classes(accuracy, episodes.class_ids)
    return Outcome(
        estimates={"accuracy": over_episodes(accuracy)},
        over_classes={} if elsewhere is None else {"accuracy": elsewhere},
        n=len(accuracy),
        unit="episodes",
        setting=_setting(episodes.spec),
        seed=episodes.spec.seed,
        episodes=episodes,
        notes=tuple(_notes(predictor, videos, episodes)),
        details={"accuracy": accuracy},
    )


def _episodes(videos: Videos, config: Config) -> EpisodeList:
    """Draw the episodes, or read the list that was asked for."""
    if not config.episodes:
        spec = EpisodeSpec(config.n_way, config.n_shot, config.n_query, config.n_episodes, config.seed)
        ids = videos.dataset.ids
        return draw_episodes(ids, videos.labels_of(ids), spec, videos.manifest.class_names)
    path = Path(config.episodes)
    if not path.is_file():
        raise ConfigError("no episode list is there", seen=str(path), wanted="an .npz that an earlier run stored")
    episodes = EpisodeList.load(path)
    absent = set(episodes.bank_ids) - set(videos.dataset.ids)
    if absent:
        raise SpecMismatch(
            f"{len(absent)} of the {len(episodes.bank_ids)} videos of {config.episodes} are not among those to score",
            seen=f"for example {min(absent)}",
            fix="Use the split it was drawn from, and extract what is missing.",
        )
    labels = videos.labels_of(episodes.bank_ids)
    if (labels[episodes.support] != episodes.class_ids[..., None]).any():
        raise SpecMismatch(f"{config.episodes} was drawn from other labels", fix="Use the manifest it was drawn from.")
    return episodes


def _bank(videos: Videos, episodes: EpisodeList) -> FeatureBatch:
    """All videos that the episodes draw from, in the order of their rows."""
    bank = videos.dataset.all()
    row = {video_id: number for number, video_id in enumerate(bank.video_ids)}
    return bank.select(from_numpy(np.array([row[video_id] for video_id in episodes.bank_ids], dtype=np.int64)))


def _accuracy(
    predictor: EpisodeScorer, bank: FeatureBatch, episodes: EpisodeList, columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Share of right answers in each episode, [E]."""
    query = rearrange(episodes.query, "e w q -> e (w q)")
    scores = predictor.episode_logits(bank, episodes.support, query, columns[episodes.class_ids])  # [E, Q, W]
    spec = episodes.spec
    wanted = (*query.shape, spec.n_way)
    if scores.shape != wanted:
        raise SpecMismatch(f"{predictor.head} gave scores of another shape", seen=scores.shape, wanted=wanted)
    require_finite(scores, np.array(episodes.bank_ids)[query], predictor.head)
    right = np.repeat(np.arange(spec.n_way), spec.n_query)  # [Q]
    return (best_class(scores) == right).mean(axis=1)


def _setting(spec: EpisodeSpec) -> str:
    queries = "" if spec.n_query == 1 else f", {spec.n_query} queries a class"
    return f"{spec.n_way}-way {spec.n_shot}-shot{queries}"


def _notes(predictor: EpisodeScorer, videos: Videos, episodes: EpisodeList) -> list[str]:
    drawn = np.unique(episodes.class_ids)
    seen = n_seen(predictor.seen_classes, [videos.manifest.class_names[number] for number in drawn])
    notes = []
    if (n_views := videos.dataset.n_views) > 1:
        notes.append(f"the first of {n_views} views of each video")
    if seen:
        notes.append(f"not few-shot of new classes: videos of {seen} of the {len(drawn)} classes were trained on")
    if len(drawn) == episodes.spec.n_way:
        notes.append("as many classes as ways: how far other classes would move the number is not known")
    n_shared = _n_sharing_groups(videos.groups_of(episodes.bank_ids), episodes)
    if n_shared:
        notes.append(
            f"in {n_shared:,} of {len(episodes):,} episodes a query shares a group with the support of its class: "
            "too good to be true"
        )
    return notes


def _n_sharing_groups(groups: NDArray[np.str_] | None, episodes: EpisodeList) -> int:
    """Episodes in which a query is of the same group as a support video of its own class; groups [V] of the bank."""
    if groups is None:
        return 0
    group = np.unique(groups, return_inverse=True)[1]  # [V]
    query = rearrange(group[episodes.query], "e w q -> e w q 1")
    support = rearrange(group[episodes.support], "e w k -> e w 1 k")
    return int((query == support).any(axis=(1, 2, 3)).sum())


PROTOCOL = ProtocolSpec(
    config=Config,
    run=run,
    task="episodes",
    headline="accuracy",
    source="Zhu & Yang 2018, ECCV (CMN); Cao et al. 2020, arXiv:1906.11415 (OTAM)",
)
