"""Training on few-shot episodes: what a step is made of, what is learned, and from which classes."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch

from coldframe.data_manifests.episodes import EpisodeSpec
from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.data_manifests.records import Manifest, ManifestError, VideoRecord
from coldframe.extract.batches import FeatureDataset
from coldframe.extract.frames import DecodedVideo
from coldframe.extract.specs import FeatureSpec, FrameSpec
from coldframe.extract.store import FeatureStore, FeatureWriter
from coldframe.extract.towers import load_tower
from coldframe.train_heads import loop, pipeline
from coldframe.train_heads.checkpoint import load_checkpoint
from coldframe.train_heads.episodic import EpisodeDataset
from coldframe.train_heads.pipeline import train
from coldframe.train_heads.settings import settings
from coldframe.train_heads.specs import EpisodeTraining, TrainSpec

HEAD = "coldframe_test_heads.linear_prototypes"
CLASSES = ("walk", "sit", "run", "eat", "wave", "jump", "fall", "clap", "swim", "kick")
SPEC = TrainSpec(epochs=3, lr=3e-3)
EPISODES = EpisodeTraining(n_way=3, n_shot=2, n_query=2, episodes_per_epoch=20, n_val_episodes=30, per_step=8)
SPLIT_OF = ("train", "val", "train", "val", "train", "test", "train", "val", "train", "test")  # of the classes


@pytest.fixture(autouse=True)
def heads_of_tests(tmp_path_factory, monkeypatch, request):
    """The head of the file beside this one, under a name of the user's."""
    package = tmp_path_factory.mktemp("heads") / "coldframe_test_heads"
    package.mkdir()
    (package / "linear_prototypes.py").symlink_to(request.path.with_name("linear_prototypes.py"))
    monkeypatch.syspath_prepend(package.parent)


@pytest.fixture(scope="module")
def few_shot(tmp_path_factory) -> tuple[FeatureStore, Manifest]:
    """Ten classes of eight videos, whole classes to a split; ids are not in the order of classes.

    The classes differ in eight directions, and noise is loud in eight others: what to look at can be learned on some
    classes and helps on others.
    """
    records = [
        VideoRecord(f"{number * 37 % 80:02}.mp4", f"{number}.mp4", number % 10, SPLIT_OF[number % 10])
        for number in range(80)
    ]
    manifest = Manifest("actions", "/nowhere", CLASSES, tuple(records))
    tower = load_tower("coldframe-tiny", "random", device="cpu")
    rng, width = np.random.default_rng(0), tower.shape.embed_dim
    direction = np.arange(width) // 8
    centres = np.where(direction == 0, rng.normal(size=(10, width)), 0)
    loud = np.select([direction == 0, direction == 1], [0.3, 3.0], 0.1)
    path = tmp_path_factory.mktemp("few_shot") / "store"
    spec = FeatureSpec(FrameSpec(n_frames=2), tower.spec, dtype="float32")
    with FeatureWriter.open(path, spec, tower.shape, ("embedding",), manifest) as writer:
        builder = writer.begin_shard(ids := list(writer.remaining()))
        for video_id in ids:
            frames = centres[manifest.by_id[video_id].label] + loud * rng.normal(size=width)
            features = np.stack([frames, frames]).astype(np.float32)
            builder.add(video_id, {"embedding": features}, DecodedVideo.of_one_view(np.arange(2.0), "none"))
        builder.commit()
    return FeatureStore.open(path), manifest


def episodes_of(few_shot, split="train", **changes) -> EpisodeDataset:
    store, manifest = few_shot
    part = manifest.split(split)
    spec = EpisodeSpec(**{"n_way": 3, "n_shot": 2, "n_query": 3, "n_episodes": 10} | changes)
    return EpisodeDataset(FeatureDataset(store, part.ids, part.labels, ["embedding"]), spec, CLASSES, f"{split} videos")


def run(few_shot, folder, spec=SPEC, episodes=EPISODES, config=None, manifest=None):
    store = few_shot[0]
    given = manifest or few_shot[1]
    return train(store, given, HEAD, config, spec, folder, episodes=episodes, device="cpu", quiet=True)


# ---- what a step is made of


def test_a_step_is_the_drawn_episodes_over_its_own_videos(few_shot):
    data = episodes_of(few_shot)
    drawn = data.draw(7)
    steps = list(data.batches(4, 7))
    assert [len(step) for step in steps] == [4, 4, 2]
    for step, begin in zip(steps, (0, 4, 8), strict=True):
        part = slice(begin, begin + 4)
        named = np.array(step.bank.video_ids)
        assert sorted(set(named)) == sorted(named)
        bank = np.array(drawn.bank_ids)
        assert (named[step.support] == bank[drawn.support[part]]).all()
        assert (named[step.query] == bank[drawn.query[part]].reshape(-1, 9)).all()
        assert (step.class_ids.numpy() == drawn.class_ids[part]).all()
        assert (step.labels == torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])).all()
        assert torch.equal(step.bank.labels[step.query], step.class_ids.gather(1, step.labels))
        for row, video_id in enumerate(step.bank.video_ids):
            expected = data.videos.store.read("embedding", video_id)
            assert np.array_equal(step.bank["embedding"][row].numpy(), expected)


def test_the_list_is_a_function_of_the_seed(few_shot):
    data = episodes_of(few_shot)
    one, same, other = (next(iter(data.batches(4, seed))) for seed in (1, 1, 2))
    assert one.bank.video_ids == same.bank.video_ids
    assert torch.equal(one.support, same.support)
    assert one.bank.video_ids != other.bank.video_ids
    fixed = [step.query for step in data.batches(5)]
    assert all(torch.equal(a, b) for a, b in zip(fixed, (s.query for s in data.batches(5)), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_way": 6}, r"^val videos: too few classes.*found 3 classes"),
        ({"n_shot": 6}, r"^val videos: .*too few videos.*sit \(8\).*expected 9 each"),
    ],
)
def test_episodes_that_cannot_be_drawn_are_refused(few_shot, changes, words):
    with pytest.raises(ManifestError, match=words) as refused:
        episodes_of(few_shot, "val", **changes)
    assert "\n" not in str(refused.value)


# ---- training


def test_it_learns_what_helps_on_other_classes(few_shot, tmp_path):
    checkpoint = run(few_shot, tmp_path / "run", replace(SPEC, epochs=6), replace(EPISODES, episodes_per_epoch=120))
    first = run(few_shot, tmp_path / "one", replace(SPEC, epochs=1, lr=0.0))
    assert checkpoint.scores["top_1"] > first.scores["top_1"] + 0.2
    assert checkpoint.seen_classes == tuple(
        name for name, split in zip(CLASSES, SPLIT_OF, strict=True) if split == "train"
    )
    assert (checkpoint.n_train, checkpoint.n_val, checkpoint.train.batch_size) == (40, 24, 8)
    assert checkpoint.step == checkpoint.epoch * 15
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded.episodes == checkpoint.episodes == replace(EPISODES, episodes_per_epoch=120)
    assert "5 classes, 40 training videos" in loaded.describe()
    assert "of 30 3-way 2-shot episodes of 24 val videos" in loaded.describe()
    predictor = loaded.predictor(few_shot[0], device="cpu")
    assert predictor.module.trained_names == loaded.seen_classes


@pytest.mark.parametrize("names", [False, True])
def test_only_training_classes_are_trained_on_and_only_val_is_validated_on(few_shot, tmp_path, monkeypatch, names):
    _, manifest = few_shot
    read: list[str] = []
    gather = FeatureStore.gather

    def watched(self, ids, *args, **kwargs):
        read.extend(ids)
        return gather(self, ids, *args, **kwargs)

    monkeypatch.setattr(FeatureStore, "gather", watched)
    runs, fit = [], loop.fit
    monkeypatch.setattr(pipeline, "fit", lambda made, *args, **kwargs: (runs.extend(made), fit(made, *args, **kwargs)))
    config = settings(HEAD, None, [f"names={str(names).lower()}"]).head
    run(few_shot, tmp_path / "run", replace(SPEC, epochs=2), config=config)
    assert set(read) == {*manifest.split("train").ids, *manifest.split("val").ids}
    head = runs[0].head
    assert head.seen_labels == {0, 1, 2, 3, 4}  # of the five training classes; the head itself checks their texts
    n_steps = len(head.asked) // 2
    assert head.asked[:n_steps] == head.asked[n_steps:]  # the same list after every epoch
    assert sum(map(len, head.asked[:n_steps])) == 30


def test_videos_are_carved_where_there_is_no_validation_split(few_shot, tmp_path):
    _, manifest = few_shot
    records = tuple(replace(r, split="train" if r.split == "val" else r.split) for r in manifest.records)
    spec = replace(SPEC, epochs=1, val_fraction=0.4)
    checkpoint = run(few_shot, tmp_path / "run", spec, manifest=replace(manifest, records=records))
    assert len(checkpoint.seen_classes) == 8
    assert (checkpoint.n_train, checkpoint.n_val) == (40, 24)
    with pytest.raises(
        ManifestError, match=r"validation videos of actions: .*expected 4 each \(n_shot 3 \+ n_query 1\)"
    ):
        run(
            few_shot,
            tmp_path / "no",
            spec,
            replace(EPISODES, n_shot=3, n_query=1),
            manifest=replace(manifest, records=records),
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("where", [1, 3, 4])  # training of the first epoch, of the second, validation of that
def test_an_interrupted_run_ends_with_the_same_bits(few_shot, tmp_path, monkeypatch, where):
    whole = run(few_shot, tmp_path / "whole")
    batches, calls = EpisodeDataset.batches, 0

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        for number, step in enumerate(batches(self, *args, **kwargs)):
            if calls == where and number == 1:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(EpisodeDataset, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(few_shot, tmp_path / "cut")
    monkeypatch.setattr(EpisodeDataset, "batches", batches)
    resumed = run(few_shot, tmp_path / "cut")
    assert resumed.fingerprint == whole.fingerprint
    assert (resumed.epoch, resumed.scores) == (whole.epoch, whole.scores)


# ---- settings


def test_settings_of_a_run_start_it_again(few_shot, tmp_path):
    run(few_shot, tmp_path / "run", replace(SPEC, epochs=1))
    path = tmp_path / "run" / "settings.toml"
    given = settings(HEAD, path)
    assert given.episodes == EPISODES
    assert given.train == replace(SPEC, epochs=1, batch_size=8)
    assert tomllib.loads(path.read_text())["episodes"]["n_shot"] == 2
    with pytest.raises(ConfigError, match=r"another episodes\.n_shot; found 2; expected 1"):
        run(few_shot, tmp_path / "run", replace(SPEC, epochs=1), replace(EPISODES, n_shot=1))


def test_episodes_are_a_table_of_settings(tmp_path):
    given = settings(HEAD, None, ["episodes.n_shot=5", "per_step=4"])
    assert given.episodes == EpisodeTraining(n_shot=5, per_step=4)
    assert given.train.batch_size == 4
    assert settings(HEAD).train.batch_size == settings(HEAD, None, ["batch_size=8"]).train.batch_size == 8
    with pytest.raises(ConfigError, match=r"per_step; found train.batch_size=64"):
        settings(HEAD, None, ["batch_size=64"])
    with pytest.raises(ConfigError, match="impossible n_way"):
        settings(HEAD, None, ["n_way=1"])
    with pytest.raises(UnknownName):
        settings("linear_probe", None, ["n_shot=5"])
    (tmp_path / "recipe.toml").write_text("[episodes]\nn_shot = 5\n")
    assert settings(HEAD, tmp_path / "recipe.toml").episodes == EpisodeTraining(n_shot=5)
    with pytest.raises(ConfigError, match="does not learn from episodes"):
        settings("linear_probe", tmp_path / "recipe.toml")
