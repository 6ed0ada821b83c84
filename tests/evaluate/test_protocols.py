from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coldframe.data_manifests.episodes import EpisodeList, EpisodeSpec, draw_episodes
from coldframe.data_manifests.errors import ColdframeError, ConfigError, UnknownName
from coldframe.data_manifests.records import Manifest, VideoRecord
from coldframe.evaluate.protocols import Outcome, Videos, closed_set, few_shot, find, names, zero_shot
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.store import StoreError

CLASSES = ("wave", "jump", "run", "high_five", "sit", "stand", "clap")


class Dataset:
    """A FeatureDataset in memory; `embedding` [V, E] holds what the fake heads give as scores, or compare.

    A view multiplies it by its number in `of_views`.
    """

    def __init__(
        self, ids: Sequence[str], labels: np.ndarray, embedding: np.ndarray, of_views: Sequence[float] = (1.0,)
    ) -> None:
        self.ids, self.of_views, self.n_views = tuple(ids), of_views, len(of_views)
        frames = torch.from_numpy(np.repeat(embedding[:, None], 2, axis=1))  # [V, 2, E]
        mask = torch.ones(len(self.ids), 2, dtype=torch.bool)
        self._bank = FeatureBatch({"embedding": frames}, mask, torch.from_numpy(labels), self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def all(self) -> FeatureBatch:
        return self._bank

    def batches(self, batch_size: int, shuffle_seed: int | None, view: int = 0) -> Iterator[FeatureBatch]:
        assert shuffle_seed is None
        for start in range(0, len(self), batch_size):
            batch = self._bank.select(torch.arange(start, min(start + batch_size, len(self))))
            yield dataclasses.replace(batch, features={"embedding": batch["embedding"] * self.of_views[view]})


@dataclasses.dataclass
class Head:
    """Both kinds of predictor: gives the embedding as scores, and compares frame means in episodes."""

    head: str = "fake"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: frozenset[str] = frozenset({"classify", "episodes"})
    needs: tuple[str, ...] = ("embedding",)
    class_names: tuple[str, ...] = CLASSES
    uses_class_names: bool = True
    templates: tuple[str, ...] = ()
    is_transductive: bool = False
    checkpoint: str = ""
    manifest_fingerprint: str = ""
    seen_classes: tuple[str, ...] = ()
    selection: str = ""
    seed: int | None = None

    def logits(self, batch: FeatureBatch) -> np.ndarray:
        return batch["embedding"].mean(dim=1).numpy()

    def episode_logits(
        self, bank: FeatureBatch, support: np.ndarray, query: np.ndarray, class_ids: np.ndarray
    ) -> np.ndarray:
        means = bank["embedding"].mean(dim=1).numpy()  # [V, E]
        prototypes = means[support].mean(axis=2)  # [n, W, E]
        return -np.square(means[query][:, :, None] - prototypes[:, None]).sum(axis=-1)  # [n, Q, W]


def toy_videos(
    n_each: int | Sequence[int] = 4,
    *,
    classes: tuple[str, ...] = CLASSES,
    signal: float = 100.0,
    groups: Sequence[str] | None = None,
    n_missing: int = 0,
    seed: int = 0,
) -> Videos:
    """Videos whose embedding is one-hot in their class times `signal`, plus noise; the last ones are missing."""
    counts = [n_each] * len(classes) if isinstance(n_each, int) else n_each
    labels = np.repeat(np.arange(len(classes)), counts)
    ids = [f"{classes[label]}/{number:03}.mp4" for number, label in enumerate(labels)]
    records = tuple(
        VideoRecord(video_id, video_id, int(label), "test", groups[number] if groups else "")
        for number, (video_id, label) in enumerate(zip(ids, labels, strict=True))
    )
    noise = np.random.default_rng(seed).normal(size=(len(ids), len(classes)))
    embedding = (signal * np.eye(len(classes))[labels] + noise).astype(np.float32)
    n = len(ids) - n_missing
    dataset: Any = Dataset(ids[:n], labels[:n], embedding[:n])
    return Videos(dataset, Manifest("toy", "/", classes, records), tuple(ids[n:]))


def scored(scores: Sequence[Sequence[float]], labels: list[int], **settings: Any) -> Outcome:
    """Closed set over given scores."""
    videos = toy_videos([labels.count(c) for c in range(3)], classes=CLASSES[:3], **settings)
    order = np.argsort(labels, kind="stable")[: len(videos.dataset)]
    dataset: Any = Dataset(videos.dataset.ids, np.array(labels)[order], np.array(scores, dtype=np.float32)[order])
    return closed_set.run(
        Head(class_names=CLASSES[:3]), dataclasses.replace(videos, dataset=dataset), closed_set.Config()
    )


# Every protocol, found by its file.


def test_the_files_are_the_registry() -> None:
    assert names() == ["closed_set", "few_shot", "zero_shot"]
    assert find("few-shot") is find("few_shot") is few_shot.PROTOCOL
    with pytest.raises(UnknownName, match="few_shot"):
        find("few_shots")


@pytest.mark.parametrize("name", names())
def test_a_protocol_says_where_it_comes_from_and_how_it_differs(name: str) -> None:
    module = importlib.import_module(f"coldframe.evaluate.protocols.{name}")
    assert "Source:" in (module.__doc__ or "")
    assert "Differs:" in (module.__doc__ or "")
    assert find(name).source


@pytest.mark.parametrize("name", names())
def test_a_protocol_runs_from_its_defaults_and_bounds_every_number(name: str) -> None:
    protocol = find(name)
    videos = toy_videos(signal=1.0)
    before = videos.dataset.all()["embedding"].clone()
    outcome = protocol.run(Head(), videos, protocol.config())
    assert protocol.headline in outcome.estimates
    assert outcome.n > 0
    for estimate in (*outcome.estimates.values(), *outcome.over_classes.values()):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert outcome.over_classes.keys() <= outcome.estimates.keys()
    assert torch.equal(videos.dataset.all()["embedding"], before)


@pytest.mark.parametrize("name", names())
def test_a_head_that_is_always_right_scores_everything(name: str) -> None:
    protocol = find(name)
    assert protocol.run(Head(), toy_videos(), protocol.config()).estimates[protocol.headline].value == 1


@pytest.mark.parametrize("name", names())
def test_scores_of_another_shape_are_refused(name: str) -> None:
    class Wide(Head):
        def logits(self, batch: FeatureBatch) -> np.ndarray:
            return np.zeros((len(batch), len(CLASSES) + 1))

        def episode_logits(
            self, bank: FeatureBatch, support: np.ndarray, query: np.ndarray, class_ids: np.ndarray
        ) -> np.ndarray:
            return np.zeros((len(support), 5, 6))

    with pytest.raises(SpecMismatch, match="another shape"):
        find(name).run(Wide(), toy_videos(), find(name).config())


@pytest.mark.parametrize("name", names())
def test_a_manifest_with_classes_the_head_does_not_know_is_refused_by_name(name: str) -> None:
    videos = toy_videos(classes=(*CLASSES[:6], "juggle"))
    with pytest.raises(SpecMismatch, match="juggle"):
        find(name).run(Head(), videos, find(name).config())


def test_views_are_averaged_as_probabilities() -> None:
    scores, labels = [[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.1, 0.0]], [0, 0, 1]
    videos = toy_videos([2, 1, 0], classes=CLASSES[:3], n_missing=0)
    ids = ("a", "b", "c")
    records = tuple(VideoRecord(i, i, label, "test") for i, label in zip(ids, labels, strict=True))
    manifest = Manifest("toy", "/", CLASSES[:3], records)
    dataset: Any = Dataset(ids, np.array(labels), np.array(scores, dtype=np.float32), of_views=(1.0, -0.9, -2.0))
    videos = dataclasses.replace(videos, dataset=dataset, manifest=manifest)
    outcome = closed_set.run(Head(class_names=CLASSES[:3]), videos, closed_set.Config())
    views = [torch.tensor(scores).mul(factor).softmax(dim=1).numpy() for factor in (1.0, -0.9, -2.0)]
    assert outcome.details["predicted"].tolist() == np.mean(views, axis=0).argmax(axis=1).tolist() != [0, 1, 1]
    assert any("averaged over 3 views" in note for note in outcome.notes)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError):
        closed_set.Config(batch_size=0)


# Closed set.


def test_closed_set_of_hand_worked_scores() -> None:
    scores = [[9, 1, 0], [1, 9, 0], [9, 1, 0], [9, 0, 1], [1, 9, 0], [0, 1, 9]]
    outcome = scored(scores, [0, 0, 0, 0, 1, 2])
    assert outcome.n == 6
    assert outcome.unit == "videos"
    assert outcome.estimates["top_1"].value == pytest.approx(5 / 6)
    assert outcome.estimates["mean_class"].value == pytest.approx((3 / 4 + 1 + 1) / 3)
    assert outcome.estimates.keys() == {"top_1", "mean_class"}  # the best 5 of 3 are always right
    assert outcome.details["confusion"].tolist() == [[3, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert outcome.details["class_accuracy"].tolist() == [0.75, 1, 1]
    assert outcome.details["predicted"].tolist() == [0, 1, 0, 0, 1, 2]


def test_top_5_is_there_as_soon_as_it_can_fail() -> None:
    outcome = closed_set.run(Head(), toy_videos(signal=0.0, n_each=100), closed_set.Config())
    assert outcome.estimates["top_5"].value == pytest.approx(5 / 7, abs=0.05)
    assert outcome.estimates["top_1"].value == pytest.approx(1 / 7, abs=0.05)


def test_a_head_that_says_the_same_of_everything_scores_nothing() -> None:
    outcome = scored([[1, 1, 1]] * 3, [0, 1, 2])
    assert outcome.estimates["top_1"].value == 0


def test_the_batch_size_moves_nothing() -> None:
    runs = [closed_set.run(Head(), toy_videos(signal=1.0), closed_set.Config(size)) for size in (1, 5, 28, 1000)]
    assert all(run.estimates == runs[0].estimates for run in runs)
    assert all((run.details["predicted"] == runs[0].details["predicted"]).all() for run in runs)


def test_missing_videos_are_left_out_and_also_counted_wrong() -> None:
    videos = toy_videos([4, 4, 2], classes=CLASSES[:3], n_missing=2)  # the last class is missing altogether
    outcome = closed_set.run(Head(class_names=CLASSES[:3]), videos, closed_set.Config())
    found = {name: estimate.value for name, estimate in outcome.estimates.items()}
    assert found == pytest.approx(
        {"top_1": 1.0, "mean_class": 1.0, "top_1_missing_wrong": 0.8, "mean_class_missing_wrong": 2 / 3}
    )
    assert outcome.n == 8
    assert any("1 of 3 classes have no video here" in note for note in outcome.notes)


def test_a_head_with_more_classes_in_another_order_is_scored_among_all_of_them() -> None:
    class Wider(Head):
        def logits(self, batch: FeatureBatch) -> np.ndarray:
            right = super().logits(batch)
            return np.concatenate([np.full((len(batch), 1), 50.0), right[:, ::-1]], axis=1)

    head = Wider(class_names=("swim", *CLASSES[::-1]))
    outcome = closed_set.run(head, toy_videos(), closed_set.Config())
    assert outcome.estimates["top_1"].value == 1
    assert any("tells 8 classes apart, of which the manifest has 7" in note for note in outcome.notes)
    assert closed_set.run(head, toy_videos(signal=9.0), closed_set.Config()).estimates["top_1"].value == 0


def test_groups_of_the_manifest_widen_the_interval() -> None:
    alone = closed_set.run(Head(), toy_videos(8, signal=1.5), closed_set.Config())
    groups = [f"film {number // 8}" for number in range(56)]
    together = closed_set.run(Head(), toy_videos(8, signal=1.5, groups=groups), closed_set.Config())
    a, b = alone.estimates["top_1"], together.estimates["top_1"]
    assert a.value == b.value
    assert b.high - b.low > a.high - a.low
    assert any("the 7 groups of the manifest" in note for note in together.notes)


def test_one_group_of_all_videos_is_told_as_one() -> None:
    outcome = closed_set.run(Head(), toy_videos(8, signal=1.5, groups=["film"] * 56), closed_set.Config())
    assert outcome.notes == ("all videos are of one group: the interval is as wide as for one video",)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(StoreError, match=r"to 2 videos.*coldframe verify STORE"):
        scored([[broken, 0, 0], [0, 9, 0], [0, 0, broken]], [0, 1, 2])


# Zero-shot.


def test_zero_shot_needs_a_head_that_reads_names() -> None:
    with pytest.raises(ConfigError, match="fake does not read"):
        zero_shot.run(Head(uses_class_names=False), toy_videos(), closed_set.Config())


def test_zero_shot_says_how_many_classes_were_seen_in_training() -> None:
    clean = zero_shot.run(Head(seen_classes=("swim",)), toy_videos(), closed_set.Config())
    assert clean.setting == "no class seen in training"
    assert clean.notes == ()
    seen = zero_shot.run(Head(seen_classes=("High Five", "run", "swim")), toy_videos(), closed_set.Config())
    assert seen.setting == "2 of 7 classes seen in training"
    assert seen.notes == ("not zero-shot: videos of 2 of the 7 classes were trained on",)
    assert seen.estimates == clean.estimates


# Few-shot.

FEW = few_shot.Config(n_way=3, n_shot=2, n_query=2, n_episodes=200, seed=5)


def test_few_shot_agrees_with_one_episode_at_a_time() -> None:
    videos = toy_videos(8, signal=1.5)
    outcome = few_shot.run(Head(), videos, FEW)
    episodes = outcome.episodes
    assert episodes is not None
    rows = [videos.dataset.ids.index(video_id) for video_id in episodes.bank_ids]  # the bank has an order of its own
    means = videos.dataset.all()["embedding"].mean(dim=1).numpy()[rows]
    for e in range(200):
        right = 0
        for way in range(3):
            for row in episodes.query[e, way]:
                distances = [np.square(means[row] - means[episodes.support[e, w]].mean(axis=0)).sum() for w in range(3)]
                right += int(np.argmin(distances)) == way
        assert outcome.details["accuracy"][e] == pytest.approx(right / 6)
    accuracy = outcome.details["accuracy"]
    estimate = outcome.estimates["accuracy"]
    assert 0.4 < estimate.value < 0.95
    assert estimate.value == pytest.approx(accuracy.mean())
    assert estimate.high - estimate.value == pytest.approx(1.96 * accuracy.std() / np.sqrt(200), rel=1e-4)
    assert outcome.over_classes["accuracy"].high > estimate.high
    assert (outcome.n, outcome.unit, outcome.seed) == (200, "episodes", 5)
    assert outcome.setting == "3-way 2-shot, 2 queries a class"


def test_all_episodes_come_in_one_call() -> None:
    class Counting(Head):
        calls = 0

        def episode_logits(
            self, bank: FeatureBatch, support: np.ndarray, query: np.ndarray, class_ids: np.ndarray
        ) -> np.ndarray:
            Counting.calls += 1
            return super().episode_logits(bank, support, query, class_ids)

    assert few_shot.run(Counting(), toy_videos(8), FEW).n == 200
    assert Counting.calls == 1


def test_another_seed_draws_other_episodes() -> None:
    runs = [few_shot.run(Head(), toy_videos(8), dataclasses.replace(FEW, seed=seed)) for seed in (5, 5, 6)]
    fingerprints = [run.episodes.fingerprint for run in runs if run.episodes]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_equal_scores_go_to_the_first_way_and_are_chance() -> None:
    class Constant(Head):
        def episode_logits(
            self, bank: FeatureBatch, support: np.ndarray, query: np.ndarray, class_ids: np.ndarray
        ) -> np.ndarray:
            return np.zeros((len(support), 6, 3))

    outcome = few_shot.run(Constant(), toy_videos(8), FEW)
    assert outcome.details["accuracy"] == pytest.approx(np.full(200, 1 / 3))


def test_episode_scores_that_are_not_finite_are_refused() -> None:
    class Broken(Head):
        def episode_logits(
            self, bank: FeatureBatch, support: np.ndarray, query: np.ndarray, class_ids: np.ndarray
        ) -> np.ndarray:
            scores = np.zeros((len(support), 6, 3))
            scores[4, 2, 1] = np.nan
            return scores

    with pytest.raises(StoreError, match=r"to 1 videos.*coldframe verify STORE"):
        few_shot.run(Broken(), toy_videos(8), FEW)


def test_features_that_say_nothing_are_chance() -> None:
    outcome = few_shot.run(Head(), toy_videos(100, signal=0.0), few_shot.Config(n_episodes=4000))
    assert outcome.estimates["accuracy"].value == pytest.approx(0.2, abs=0.015)
    assert outcome.setting == "5-way 1-shot"


def test_a_stored_list_replaces_the_drawing(tmp_path: Path) -> None:
    drawn = few_shot.run(Head(), toy_videos(8, signal=1.0), FEW)
    assert drawn.episodes is not None
    drawn.episodes.save(tmp_path / "list.npz")
    stored = few_shot.run(Head(), toy_videos(8, signal=1.0), few_shot.Config(episodes=str(tmp_path / "list.npz")))
    assert (stored.details["accuracy"] == drawn.details["accuracy"]).all()
    assert (stored.n, stored.seed, stored.setting) == (drawn.n, drawn.seed, drawn.setting)
    assert stored.episodes is not None
    assert stored.episodes.fingerprint == drawn.episodes.fingerprint


def test_a_stored_list_may_be_of_some_of_the_videos(tmp_path: Path) -> None:
    few, many = toy_videos(8, signal=1.0, n_missing=4), toy_videos(8, signal=1.0)
    drawn = few_shot.run(Head(), few, FEW)
    assert drawn.episodes is not None
    drawn.episodes.save(tmp_path / "list.npz")
    stored = few_shot.run(Head(), many, few_shot.Config(episodes=str(tmp_path / "list.npz")))
    assert (stored.details["accuracy"] == drawn.details["accuracy"]).all()
    draw = few_shot.run(Head(), many, FEW)
    assert draw.episodes is not None
    draw.episodes.save(tmp_path / "wide.npz")
    with pytest.raises(SpecMismatch, match="4 of the 56 videos"):
        few_shot.run(Head(), few, few_shot.Config(episodes=str(tmp_path / "wide.npz")))


def test_a_stored_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no episode list"):
        few_shot.run(Head(), toy_videos(8), few_shot.Config(episodes=str(tmp_path / "list.npz")))


def test_a_stored_list_of_other_labels_is_refused(tmp_path: Path) -> None:
    videos = toy_videos(8)
    other = np.roll(videos.labels_of(videos.dataset.ids), 3)
    draw_episodes(videos.dataset.ids, other, EpisodeSpec(n_episodes=50)).save(tmp_path / "list.npz")
    assert isinstance(EpisodeList.load(tmp_path / "list.npz"), EpisodeList)
    with pytest.raises(SpecMismatch, match="other labels"):
        few_shot.run(Head(), videos, few_shot.Config(episodes=str(tmp_path / "list.npz")))


def test_class_ids_are_those_of_the_head_where_it_reads_names() -> None:
    class Reader(Head):
        def episode_logits(
            self, bank: FeatureBatch, support: np.ndarray, query: np.ndarray, class_ids: np.ndarray
        ) -> np.ndarray:
            ids = np.array(bank.video_ids)[support[:, :, 0]]
            named = np.array(self.class_names)[class_ids] if self.uses_class_names else np.array(CLASSES)[class_ids]
            assert all(video_id.startswith(f"{name}/") for video_id, name in zip(ids.flat, named.flat, strict=True))
            return super().episode_logits(bank, support, query, class_ids)

    few_shot.run(Reader(class_names=("swim", *CLASSES[::-1])), toy_videos(8), FEW)
    few_shot.run(Reader(class_names=("swim",), uses_class_names=False), toy_videos(8), FEW)


def test_classes_that_were_trained_on_are_told() -> None:
    outcome = few_shot.run(Head(seen_classes=CLASSES[:2]), toy_videos(8), FEW)
    assert outcome.notes == ("not few-shot of new classes: videos of 2 of the 7 classes were trained on",)


def test_queries_of_a_group_in_their_own_support_are_counted() -> None:
    groups = [f"film {number // 2 % 3}" if number < 24 else "" for number in range(56)]  # of the first three classes
    outcome = few_shot.run(Head(), toy_videos(8, groups=groups), FEW)
    episodes = outcome.episodes
    assert episodes is not None
    group_of = dict(zip(toy_videos(8).dataset.ids, groups, strict=True))
    group = [group_of[video_id] for video_id in episodes.bank_ids]
    n_shared = sum(
        any(
            group[q] and group[q] in {group[s] for s in episodes.support[e, way]}
            for way in range(3)
            for q in episodes.query[e, way]
        )
        for e in range(200)
    )
    assert 0 < n_shared < 200
    assert outcome.notes == (
        f"in {n_shared} of 200 episodes a query shares a group with the support of its class: too good to be true",
    )


def test_groups_that_no_class_repeats_are_not_told() -> None:
    groups = [f"film {number % 8}" for number in range(56)]  # every class has one video of every film
    assert few_shot.run(Head(), toy_videos(8, groups=groups), FEW).notes == ()


def test_as_many_classes_as_ways_leave_no_interval_over_classes() -> None:
    outcome = few_shot.run(Head(class_names=CLASSES[:3]), toy_videos(8, classes=CLASSES[:3]), FEW)
    assert outcome.over_classes == {}
    assert any("as many classes as ways" in note for note in outcome.notes)


@pytest.mark.parametrize("change", [{"n_way": 8}, {"n_shot": 7}, {"n_episodes": 0}])
def test_episodes_that_cannot_be_drawn_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ColdframeError):
        few_shot.run(Head(), toy_videos(8), dataclasses.replace(FEW, **change))
