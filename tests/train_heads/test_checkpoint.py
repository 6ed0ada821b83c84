"""Checkpoints: what is written is read again, and what is no checkpoint is said to be none."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from coldframe.data_manifests.errors import ColdframeError
from coldframe.extract.batches import FeatureDataset
from coldframe.extract.specs import FeatureSpec, FrameSpec, SpecMismatch
from coldframe.train_heads.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, trained_tensors
from coldframe.train_heads.pipeline import train
from coldframe.train_heads.specs import TrainSpec


@pytest.fixture(scope="module")
def saved(store, manifest, tmp_path_factory):
    """A folder with a trained linear probe."""
    folder = tmp_path_factory.mktemp("runs") / "probe"
    spec = TrainSpec(epochs=2, batch_size=16, seed=3)
    train(store, manifest, "linear_probe", spec=spec, out=folder, device="cpu")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """The same folder, free to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit(folder, **changes):
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_comes_back_as_it_was(saved, tmp_path):
    checkpoint = load_checkpoint(saved)
    (tmp_path / "again").mkdir()
    again = save_checkpoint(tmp_path / "again", checkpoint)
    assert (tmp_path / "again" / "head.safetensors").read_bytes() == (saved / "head.safetensors").read_bytes()
    assert again.fingerprint == checkpoint.fingerprint
    assert load_checkpoint(tmp_path / "again").train == checkpoint.train == TrainSpec(epochs=2, batch_size=16, seed=3)
    assert checkpoint.versions["torch"] == torch.__version__.partition("+")[0]
    described = json.loads((saved / "checkpoint.json").read_text())
    assert described["feature_fingerprint"] == checkpoint.features.fingerprint
    assert described["needs"] == list(checkpoint.needs)
    assert described == json.loads(json.dumps(checkpoint.to_json()))
    assert f"linear_probe, 3 classes, {checkpoint.n_train} training videos, 1 missing" in checkpoint.describe()
    assert not list(saved.glob("*.part"))


def test_the_predictor_says_where_it_comes_from(saved, store, manifest):
    checkpoint = load_checkpoint(saved)
    predictor = checkpoint.predictor(store, device="cpu")
    assert predictor.head == "linear_probe"
    assert predictor.tasks == {"classify"}
    assert predictor.needs == checkpoint.needs == (f"cls.{store.shape.layers}",)
    assert predictor.class_names == predictor.seen_classes == manifest.class_names
    assert predictor.checkpoint == checkpoint.fingerprint
    assert predictor.manifest_fingerprint == manifest.fingerprint
    assert (predictor.selection, predictor.seed) == ("val", 3)
    assert (predictor.config, predictor.templates) == (asdict(checkpoint.config), ())
    assert not predictor.uses_class_names
    assert not predictor.is_transductive
    batch = FeatureDataset(store, store.ids[:4], [-1] * 4, predictor.needs).all()
    logits = predictor.logits(batch)
    assert logits.shape == (4, 3)
    assert logits.dtype == np.float32


def test_another_store_is_refused_by_the_field_that_differs(saved, store):
    checkpoint = load_checkpoint(saved)
    other = FeatureSpec(FrameSpec(n_frames=8), store.spec.tower, dtype="float32")
    with pytest.raises(SpecMismatch, match=r"frames\.n_frames; found 4; expected 8"):
        replace(checkpoint, features=other).predictor(store, device="cpu")


def test_a_head_that_reads_no_names_keeps_its_classes(saved, store, manifest):
    predictor = load_checkpoint(saved).predictor(store, class_names=("dive", "ride"), device="cpu")
    assert predictor.class_names == manifest.class_names


def test_what_is_no_checkpoint_is_said_to_be_none(saved, store, tmp_path):
    (tmp_path / "file").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "state.pt").write_bytes(b"")
    for path, what in (
        (tmp_path / "absent", "nothing there"),
        (tmp_path / "file", "a file"),
        (saved / "head.safetensors", "a file"),
        (tmp_path / "empty", "another folder"),
        (store.path, "a feature store"),
        (tmp_path / "unfinished", "a run that has not ended"),
    ):
        with pytest.raises(CheckpointError, match=f"is not a checkpoint; found {what}"):
            load_checkpoint(path)
    assert issubclass(CheckpointError, ColdframeError)
    assert issubclass(CheckpointError, ValueError)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "{}", '{"format_version": 1}', "\xff\xfe", '{"store": "fingerprint"}']
)
def test_a_description_that_describes_nothing(copy, text):
    (copy / "checkpoint.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="does not describe a checkpoint"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"head": "no_such_head"}, "no head is named 'no_such_head'"),
        ({"head": 7}, "does not describe"),
        ({"config": {"feature": "cls.-1", "depth": 2}}, "depth"),
        ({"config": {"feature": 3}}, "wrong type"),
        ({"config": None}, "does not describe"),
        ({"train": {"lr": "fast"}}, "wrong type"),
        ({"features": {}}, "does not describe"),
        ({"epochs_of_the_universe": 1}, "epochs_of_the_universe"),
        ({"format_version": 2}, "found version 2; expected version 1"),
    ],
)
def test_a_description_that_this_release_cannot_read(copy, changes, match):
    edit(copy, **changes)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(copy)


def test_weights_that_are_missing_cut_or_changed(copy):
    path = copy / "head.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-10], data[:5], b"", data[:-1] + bytes([data[-1] ^ 1]), b"\x00" * len(data)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(copy)


def test_weights_of_another_head_do_not_fit(saved, store):
    checkpoint = load_checkpoint(saved)
    for weights in (
        {name: tensor for name, tensor in checkpoint.weights.items() if name != "classifier.bias"},
        {**checkpoint.weights, "classifier.bias": torch.zeros(4)},
        {**checkpoint.weights, "extra": torch.zeros(1)},
    ):
        with pytest.raises(
            CheckpointError, match=r"do not fit linear_probe: 1 tensors differ, first (classifier\.bias|extra)"
        ):
            replace(checkpoint, weights=weights).predictor(store, device="cpu")


def test_frozen_parts_are_not_saved():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    assert set(trained_tensors(module)) == {
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
