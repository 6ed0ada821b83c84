from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldframe.data_manifests.episodes import EpisodeList
from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.data_manifests.records import Manifest, ManifestError, VideoRecord
from coldframe.evaluate import evaluate, read_results
from coldframe.evaluate.protocols import names
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.frames import DecodedVideo
from coldframe.extract.specs import FeatureSpec, FrameSpec, SpecMismatch, TowerShape, TowerSpec, TransformSpec
from coldframe.extract.store import FeatureStore, StoreError
from coldframe.extract.writer import FeatureWriter

CLASSES = ("wave", "jump", "run")
SHAPE = TowerShape(
    layers=2, width=6, heads=2, embed_dim=3, grid=(2, 2), text_width=4, text_layers=1, text_heads=1, context_length=8
)
TRANSFORM = TransformSpec(size_px=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
TOWER = TowerSpec("toy", "random", "ab" * 32, quick_gelu=False, precision="fp32", transform=TRANSFORM)
FAILED = ("test/jump/5.mp4", "test/run/5.mp4")
MANIFEST = Manifest(
    "toy",
    "/videos",
    CLASSES,
    tuple(
        VideoRecord(f"{split}/{name}/{number}.mp4", f"{split}/{name}/{number}.mp4", label, split)
        for split in ("test", "train")
        for label, name in enumerate(CLASSES)
        for number in range(6)
    ),
)


@dataclasses.dataclass
class Head:
    """Gives the mean frame as scores; `wrong` turns some videos' scores around."""

    head: str = "fake"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: frozenset[str] = frozenset({"classify", "episodes"})
    needs: tuple[str, ...] = ("embedding",)
    class_names: tuple[str, ...] = CLASSES
    uses_class_names: bool = True
    templates: tuple[str, ...] = ()
    is_transductive: bool = False
    checkpoint: str = "c" * 16
    manifest_fingerprint: str = MANIFEST.fingerprint
    seen_classes: tuple[str, ...] = ()
    selection: str = "val"
    seed: int | None = 7
    wrong: Sequence[str] = ()

    def logits(self, batch: FeatureBatch) -> np.ndarray:
        sign = np.array([-1 if video_id in self.wrong else 1 for video_id in batch.video_ids])
        return sign[:, None] * batch["embedding"].float().mean(dim=1).numpy()

    def episode_logits(
        self, bank: FeatureBatch, support: np.ndarray, query: np.ndarray, class_ids: np.ndarray
    ) -> np.ndarray:
        means = self.logits(bank)
        return np.einsum("nqe,nwke->nqw", means[query], means[support])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Every video of the manifest but two that failed; an embedding is one-hot in the class."""
    path = tmp_path_factory.mktemp("toy") / "store"
    with FeatureWriter.open(path, FeatureSpec(FrameSpec(2), TOWER), SHAPE, ["embedding"], MANIFEST) as writer:
        shard = writer.begin_shard(MANIFEST.ids)
        for record in MANIFEST.records:
            if record.video_id in FAILED:
                shard.fail(record.video_id, "corrupt: no frame could be read")
                continue
            embedding = np.tile(np.eye(3, dtype=np.float32)[record.label or 0], (2, 1))
            video = DecodedVideo.of_one_view(np.arange(2.0), "pyav")
            shard.add(record.video_id, {"embedding": embedding}, video)
        shard.commit()
    return FeatureStore.open(path)


def test_a_result_says_everything_that_made_it(store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    head = Head(wrong=["test/wave/0.mp4"], config={"layers": 2}, templates=("a video of {}.",))
    result = evaluate(store, MANIFEST, head, "closed-set", {"batch_size": 5}, path)
    assert read_results(path) == ([result], 0)
    assert (result.protocol, result.dataset, result.split, result.head) == ("closed_set", "toy", "test", "fake")
    assert (result.n, result.unit, result.n_missing) == (16, "videos", 2)
    assert result.metrics["top_1"] == pytest.approx(15 / 16)
    assert result.metrics["top_1_missing_wrong"] == pytest.approx(15 / 18)
    assert result.interval_95.keys() == result.metrics.keys()
    assert (result.seed, result.training_seed, result.selection) == (None, 7, "val")
    assert result.config == {"batch_size": 5}
    assert (result.head_config, result.templates) == ({"layers": 2}, ("a video of {}.",))
    assert result.frames == "2 uniform"
    assert result.fingerprints == {
        "store": store.fingerprint,
        "manifest": MANIFEST.fingerprint,
        "checkpoint": "c" * 16,
        "training_manifest": MANIFEST.fingerprint,
    }
    assert result.notes == (f"2 videos are missing, among them {', '.join(FAILED)}",)
    details = np.load(tmp_path / result.details)
    assert details["missing"].tolist() == list(FAILED)
    assert details["video_ids"].tolist() == sorted(set(MANIFEST.split("test").ids) - set(FAILED))
    assert details["confusion"].sum() == 16


def test_episodes_are_stored_and_the_same_again(store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    settings = {"n_way": 2, "n_episodes": 50, "seed": 3}
    first = evaluate(store, MANIFEST, Head(), "few_shot", settings, path)
    again = evaluate(store, MANIFEST, Head(), "few_shot", settings, path)
    assert first.metrics == again.metrics == {"accuracy": 1.0}
    assert first.fingerprints == again.fingerprints
    assert first.details == again.details
    assert (first.n, first.unit, first.seed, first.n_missing) == (50, "episodes", 3, 2)
    stored = tmp_path / "episodes" / f"{first.fingerprints['episodes']}.npz"
    assert [*stored.parent.iterdir()] == [stored]
    assert EpisodeList.load(stored).fingerprint == first.fingerprints["episodes"]
    given = evaluate(store, MANIFEST, Head(), "few_shot", {"episodes": str(stored)}, path)
    assert given.fingerprints == first.fingerprints
    assert len(read_results(path)[0]) == 3


@pytest.mark.parametrize("name", names())
def test_the_order_of_the_manifest_changes_nothing(name: str, store: FeatureStore) -> None:
    settings = {"n_way": 2, "n_episodes": 50} if name == "few_shot" else {}
    shuffled = dataclasses.replace(MANIFEST, records=MANIFEST.records[::-1])
    head = Head(wrong=["test/wave/0.mp4"])
    one, other = (evaluate(store, m, head, name, settings) for m in (MANIFEST, shuffled))
    assert one.metrics == other.metrics
    assert one.interval_95 == other.interval_95
    assert one.fingerprints == other.fingerprints
    assert one.details == ""  # nothing was asked to be written


def test_all_takes_every_labelled_video(store: FeatureStore) -> None:
    records = (*MANIFEST.records[:-1], dataclasses.replace(MANIFEST.records[-1], label=None))
    result = evaluate(store, dataclasses.replace(MANIFEST, records=records), Head(), "closed_set", split="all")
    assert result.n == 36 - 2 - 1
    assert any("1 videos have no label" in note for note in result.notes)
    assert any("trained on another manifest" in note for note in result.notes)


def test_a_split_that_chose_the_epoch_is_told(store: FeatureStore) -> None:
    result = evaluate(store, MANIFEST, Head(selection="test"), "closed_set")
    assert any("epoch was chosen on test" in note for note in result.notes)


def test_training_videos_that_are_scored_are_told(store: FeatureStore) -> None:
    notes = {split: evaluate(store, MANIFEST, Head(), "closed_set", split=split).notes for split in ("train", "all")}
    assert all("scored on videos it was trained on" in told for told in notes.values())
    elsewhere = Head(manifest_fingerprint="f" * 16)
    told = evaluate(store, MANIFEST, elsewhere, "closed_set", split="train").notes
    assert "scored on videos it was trained on" not in told


def test_an_untrained_head_has_nothing_to_tell(store: FeatureStore) -> None:
    head = Head(checkpoint="", manifest_fingerprint="", selection="", seed=None)
    result = evaluate(store, MANIFEST, head, "zero_shot", split="train")
    assert result.notes == ()
    assert result.fingerprints.keys() == {"store", "manifest"}
    assert result.setting == "no class seen in training"


@pytest.mark.parametrize(
    ("protocol", "settings", "words"),
    [
        ("few_shot", {"n_ways": 5}, "n_ways.*Did you mean n_way"),
        ("few_shot", {"colour": 5}, "colour.*There are: n_way"),
        ("few_shot", {"n_way": "5"}, "n_way.*'5'"),
        ("few_shot", {"n_way": True}, "n_way.*True"),
        ("few_shot", {"n_episodes": 0}, "n_episodes=0"),
        ("closed_set", {"seed": 1}, "closed_set has no setting 'seed'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    store: FeatureStore, protocol: str, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate(store, MANIFEST, Head(), protocol, settings)


def test_what_cannot_be_scored_is_refused_before_anything_is_written(store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    elsewhere = dataclasses.replace(
        MANIFEST, records=tuple(dataclasses.replace(r, video_id=f"x/{r.video_id}") for r in MANIFEST.records)
    )
    with pytest.raises(UnknownName, match="closed_set"):
        evaluate(store, MANIFEST, Head(), "close_set", results=path)
    with pytest.raises(UnknownName, match="test"):
        evaluate(store, MANIFEST, Head(), "closed_set", results=path, split="tests")
    with pytest.raises(ManifestError, match="split 'val' of toy has no labelled video"):
        evaluate(store, MANIFEST, Head(), "closed_set", results=path, split="val")
    with pytest.raises(StoreError, match=r"none of the 18.*'test/jump/0.mp4'.*'x/test/jump/0.mp4'"):
        evaluate(store, elsewhere, Head(), "closed_set", results=path)
    with pytest.raises(SpecMismatch, match=r"fake needs tokens\.2.*coldframe extract"):
        evaluate(store, MANIFEST, Head(needs=("tokens.2",)), "closed_set", results=path)
    with pytest.raises(ConfigError, match=r"few_shot needs a head with the task 'episodes'.*classify"):
        evaluate(store, MANIFEST, Head(tasks=frozenset({"classify"})), "few_shot", results=path)
    assert not any(tmp_path.iterdir())
