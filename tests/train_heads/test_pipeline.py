"""Training as a whole: from a store to a checkpoint that predicts; and the settings that say how."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.data_manifests.records import ManifestError
from coldframe.extract.batches import FeatureDataset
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.store import StoreError
from coldframe.extract.text import TEMPLATES
from coldframe.train_heads.checkpoint import load_checkpoint
from coldframe.train_heads.heads.temporal_transformer import Config as TemporalConfig
from coldframe.train_heads.pipeline import train, untrained
from coldframe.train_heads.settings import Settings, settings
from coldframe.train_heads.specs import TrainSpec

SPEC = TrainSpec(epochs=6, batch_size=8, lr=1e-2, val_fraction=0.25)


def accuracy(predictor, store, manifest, split):
    part = manifest.split(split)
    data = FeatureDataset(store, part.ids, part.labels, predictor.needs)
    batch = data.all()
    return float((predictor.logits(batch).argmax(axis=1) == batch.labels.numpy()).mean())


@pytest.mark.parametrize("head", ["linear_probe", "attentive_pool", "temporal_transformer"])
def test_a_head_learns_and_is_found_again(store, manifest, tmp_path, head):
    checkpoint = train(store, manifest, head, spec=SPEC, out=tmp_path / "run", device="cpu")
    loaded = load_checkpoint(tmp_path / "run")
    assert accuracy(loaded.predictor(store, device="cpu"), store, manifest, "test") > 0.9
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.json",
        "head.safetensors",
        "history.jsonl",
        "settings.toml",
    ]
    assert loaded.fingerprint == checkpoint.fingerprint
    assert loaded.head == head
    assert loaded.class_names == loaded.seen_classes == manifest.class_names
    assert loaded.features == store.spec
    assert loaded.manifest_fingerprint == manifest.fingerprint
    assert (loaded.n_train, loaded.n_val, loaded.n_missing) == (27, 8, 1)
    assert loaded.selection == "val"
    assert loaded.scores["top_1"] == checkpoint.scores["top_1"]


def test_settings_are_written_before_the_first_step_and_start_the_run_again(store, manifest, tmp_path, monkeypatch):
    config = TemporalConfig(layers=1, dropout=0.0)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("coldframe.train_heads.pipeline.fit", stop)
    with pytest.raises(KeyboardInterrupt):
        train(store, manifest, "temporal_transformer", config, SPEC, tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "settings.toml"
    assert settings("temporal_transformer", path) == Settings(config, SPEC)
    assert tomllib.loads(path.read_text())["features"]["store"] == store.fingerprint


def test_interrupted_training_goes_on_and_finished_training_stays(store, manifest, tmp_path, monkeypatch):
    whole = train(store, manifest, "attentive_pool", spec=SPEC, out=tmp_path / "whole", device="cpu")
    batches, calls = FeatureDataset.batches, 0

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:  # training of the third epoch is the fifth, its validation the sixth
            raise KeyboardInterrupt
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(FeatureDataset, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(store, manifest, "attentive_pool", spec=SPEC, out=tmp_path / "cut", device="cpu")
    assert not (tmp_path / "cut" / "checkpoint.json").exists()
    monkeypatch.setattr(FeatureDataset, "batches", batches)
    resumed = train(store, manifest, "attentive_pool", spec=SPEC, out=tmp_path / "cut", device="cpu")
    assert resumed.fingerprint == whole.fingerprint
    assert (resumed.epoch, resumed.scores) == (whole.epoch, whole.scores)

    monkeypatch.setattr("coldframe.train_heads.pipeline.fit", lambda *args, **kwargs: pytest.fail("trained again"))
    again = train(store, manifest, "attentive_pool", spec=SPEC, out=tmp_path / "cut", device="cpu")
    assert again.fingerprint == whole.fingerprint


def test_a_folder_of_another_run_is_refused(store, manifest, tmp_path):
    train(store, manifest, "linear_probe", spec=SPEC, out=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match=r"another train\.lr; found 0\.01; expected 0\.02"):
        train(store, manifest, "linear_probe", spec=replace(SPEC, lr=0.02), out=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match=r"another head\.name"):
        train(store, manifest, "attentive_pool", spec=SPEC, out=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="no run"):
        train(store, manifest, "linear_probe", spec=SPEC, out=store.path, device="cpu")


def test_a_start_that_failed_does_not_refuse_the_corrected_one(store, manifest, tmp_path):
    run, once = tmp_path / "run", replace(SPEC, epochs=1)
    with pytest.raises(ConfigError, match="share its width"):
        train(store, manifest, "temporal_transformer", TemporalConfig(heads=7), once, run, device="cpu")
    assert not run.exists()
    train(store, manifest, "temporal_transformer", TemporalConfig(heads=2), once, run, device="cpu")
    assert load_checkpoint(run).config.heads == 2


@pytest.mark.parametrize("left", ["", "# made by", '[head]\nname = "line'])
def test_settings_that_were_cut_off_are_no_run(store, manifest, tmp_path, left):
    path = tmp_path / "settings.toml"
    path.write_text(left)
    path.with_name("settings.toml.part").write_text(left)
    train(store, manifest, "linear_probe", spec=replace(SPEC, epochs=1), out=tmp_path, device="cpu")
    assert tomllib.loads(path.read_text())["head"]["name"] == "linear_probe"
    path.write_text(left)
    with pytest.raises(ConfigError, match="no run"):  # beside a checkpoint, they may be of any run
        train(store, manifest, "linear_probe", spec=replace(SPEC, epochs=1), out=tmp_path, device="cpu")


def test_the_test_split_is_not_read(store, manifest, tmp_path, monkeypatch):
    seen = set()
    gather = type(store).gather

    def watched(self, ids, *args, **kwargs):
        seen.update(ids)
        return gather(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(store), "gather", watched)
    train(store, manifest, "linear_probe", spec=replace(SPEC, epochs=1), out=tmp_path / "run", device="cpu")
    assert seen == set(manifest.split("train").ids) - {"run/00.mp4"}


def test_a_validation_split_of_the_manifest_is_used(store, manifest, tmp_path):
    records = tuple(
        replace(r, split="val") if r.video_id.endswith(("03.mp4", "04.mp4")) else r for r in manifest.records
    )
    split = replace(manifest, records=records)
    checkpoint = train(store, split, "linear_probe", spec=SPEC, out=tmp_path / "run", device="cpu")
    assert (checkpoint.n_train, checkpoint.n_val) == (29, 6)


def test_only_classes_with_training_videos_are_seen(store, manifest, tmp_path):
    records = tuple(replace(r, split="test") if r.label == 1 else r for r in manifest.records)
    split = replace(manifest, records=records)
    checkpoint = train(store, split, "linear_probe", spec=SPEC, out=tmp_path / "run", device="cpu")
    assert checkpoint.seen_classes == ("run", "swim")


def test_what_cannot_be_trained_on_is_refused(store, manifest, tmp_path):
    def attempt(match, error, **changes):
        given = {"head": "linear_probe", "manifest": manifest} | changes
        with pytest.raises(error, match=match):
            train(store, given["manifest"], given["head"], given.get("config"), SPEC, tmp_path / "run", device="cpu")
        assert not (tmp_path / "run").exists()

    attempt("nothing to train.*eval zero_shot --store STORE --head mean_pool", ConfigError, head="mean_pool")
    attempt("nothing to train.*eval few_shot --store STORE --head prototypes", ConfigError, head="prototypes")
    attempt("linear_probe", UnknownName, head="linear_prob")
    attempt("extract", SpecMismatch, head="evl_decoder")
    unlabelled = tuple(replace(r, label=None) if r.video_id == "swim/05.mp4" else r for r in manifest.records)
    attempt("no label.*swim/05.mp4", ManifestError, manifest=replace(manifest, records=unlabelled))
    elsewhere = tuple(replace(r, video_id=f"other/{r.video_id}") for r in manifest.records)
    attempt("no video of split 'train'", StoreError, manifest=replace(manifest, records=elsewhere))


def test_a_text_classifier_scores_other_classes(store, manifest, tmp_path):
    config = TemporalConfig(layers=1, heads=2, classifier="text")
    checkpoint = train(
        store, manifest, "temporal_transformer", config, replace(SPEC, epochs=1), tmp_path / "run", device="cpu"
    )
    predictor = checkpoint.predictor(store, class_names=("dive", "ride"), device="cpu")
    assert predictor.uses_class_names
    assert predictor.class_names == ("dive", "ride")
    batch = FeatureDataset(store, store.ids[:3], [-1, -1, -1], predictor.needs).all()
    assert predictor.logits(batch).shape == (3, 2)
    assert predictor.logits(batch).dtype == np.float32


def test_mean_pool_works_untrained(store, manifest):
    predictor = untrained(store, manifest.class_names, "mean_pool", device="cpu")
    batch = FeatureDataset(store, store.ids[:5], [-1] * 5, predictor.needs).all()
    assert predictor.logits(batch).shape == (5, 3)
    assert (predictor.head, predictor.tasks, predictor.needs) == ("mean_pool", {"classify"}, ("embedding",))
    assert (predictor.checkpoint, predictor.selection, predictor.seed) == ("", "", None)
    assert predictor.config == {"normalise_frames": True}
    assert predictor.templates == TEMPLATES["video"]
    with pytest.raises(ConfigError, match=r"trained first.*train-head linear_probe --store STORE --out RUN"):
        untrained(store, manifest.class_names, "linear_probe", device="cpu")


def test_prototypes_work_untrained(store, manifest):
    predictor = untrained(store, manifest.class_names, "prototypes", device="cpu")
    test = manifest.split("test")
    bank = FeatureDataset(store, test.ids, test.labels, predictor.needs).all()
    support, query, class_ids = np.array([[[0], [4], [8]]]), np.array([[1, 5, 9]]), np.array([[0, 1, 2]])
    logits = predictor.episode_logits(bank, support, query, class_ids)
    assert logits.dtype == np.float32
    assert logits.argmax(-1).tolist() == [[0, 1, 2]]
    assert predictor.config["metric"] == "otam"
    assert predictor.templates == ()
    assert not predictor.uses_class_names
    assert not predictor.is_transductive


def test_no_such_device(store, manifest):
    with pytest.raises(ConfigError, match="no device"):
        untrained(store, manifest.class_names, "prototypes", device="gpu")


# ---- settings


def test_defaults_file_and_command_line_in_that_order(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[head]\nname = "temporal_transformer"\nlayers = 3\ndropout = 0\n'
        "[train]\nlr = 1e-4\nepochs = 7\n[protocol]\nx = 1\n"
    )
    given = settings(
        "temporal_transformer", path, ["head.layers=1", "lr=0.5", "train.decay_all=true", "positions=published"]
    )
    assert given.head == TemporalConfig(layers=1, dropout=0.0, positions="published")
    assert given.train == TrainSpec(lr=0.5, epochs=7, decay_all=True)
    assert given.episodes is None
    assert isinstance(given.head.dropout, float)
    assert settings("temporal_transformer") == Settings(TemporalConfig(), TrainSpec())


@pytest.mark.parametrize(
    ("sets", "error", "match"),
    [
        (["layer=2"], UnknownName, "Did you mean layers"),
        (["train.layers=2"], UnknownName, "train.layers"),
        (["model.layers=2"], UnknownName, "head.layers"),
        (["lr"], ConfigError, "key=value"),
        (["layers=two"], ConfigError, "wrong type; found 'two'; expected int"),
        (["epochs=1.5"], ConfigError, "epochs"),
        (["lr=nan"], ConfigError, "wrong type"),
        (["decay_all=1"], ConfigError, "true or false"),
        (["classifier=cosine"], ConfigError, "linear or text"),
        (["lr=-1"], ConfigError, "impossible lr"),
        ([f"seed={2**63}"], ConfigError, "impossible seed"),
    ],
)
def test_misspelt_and_impossible_settings_are_refused(sets, error, match):
    with pytest.raises(error, match=match):
        settings("temporal_transformer", None, sets)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("[trane]\nlr = 1", UnknownName, "Did you mean train"),
        ("lr = 1", UnknownName, "'lr'"),
        ("[train]\nlearning_rate = 1", UnknownName, "learning_rate"),
        ('[train]\nlr = "1"', ConfigError, "wrong type; found '1'; expected float"),
        ("[train]\nepochs = true", ConfigError, "wrong type"),
        ("[train]\nepochs = 2.0", ConfigError, "wrong type"),
        ('[head]\nname = "evl_decoder"', ConfigError, "another head"),
        ("[train", ConfigError, "not TOML"),
        ("\xff", ConfigError, "not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path, text, error, match):
    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(error, match=match):
        settings("temporal_transformer", path)
    with pytest.raises(ConfigError, match="no settings at"):
        settings("temporal_transformer", tmp_path / "absent.toml")
