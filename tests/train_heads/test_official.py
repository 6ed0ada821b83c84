"""Checkpoints of the authors' code: there and back for every head that has them, and nothing unsafe or foreign gets in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureDataset
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.store import FeatureStore
from coldframe.extract.weights import TowerError
from coldframe.train_heads.build import build_head, needed_features
from coldframe.train_heads.checkpoint import Checkpoint, load_checkpoint, trained_tensors
from coldframe.train_heads.heads import find, names
from coldframe.train_heads.official import export_checkpoint, import_checkpoint
from coldframe.train_heads.specs import TrainSpec

SYSTEMS = [name for name in names() if find(name).official is not None]


def small(system: str) -> Any:
    """A config that fits a tower of four blocks and that the published code knows."""
    sizes = {"n_layers": 2, "width": 16, "positions": "published", "form": "table"}
    config = find(system).config()
    return replace(config, **{key: value for key, value in sizes.items() if hasattr(config, key)})


@pytest.fixture(params=SYSTEMS)
def run(request: pytest.FixtureRequest, full_store: FeatureStore) -> Checkpoint:
    """A head of the system with weights at work everywhere, as a run would leave it."""
    system, class_names = request.param, full_store.manifest.class_names
    config = small(system)
    module, _ = build_head(system, config, full_store, class_names, "video", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in trained_tensors(module).items()
    }
    return Checkpoint(
        head=system,
        config=config,
        train=TrainSpec(),
        class_names=class_names,
        seen_classes=class_names,
        templates=(),
        features=full_store.spec,
        needs=needed_features(system, config, full_store),
        manifest_fingerprint=full_store.manifest.fingerprint,
        selection="val",
        n_train=1,
        n_val=1,
        n_missing=0,
        epoch=1,
        step=1,
        scores={"top_1": 1.0},
        weights={name: value.detach() for name, value in weights.items()},
    )


def scores(run: Checkpoint, store: FeatureStore) -> np.ndarray:
    predictor = run.predictor(store, device="cpu")
    batch = FeatureDataset(store, store.manifest.ids, store.manifest.labels, predictor.needs).all()
    return predictor.logits(batch)


def test_there_are_published_systems() -> None:
    assert {"continuous_prompts", "evl_decoder", "ez_clip", "m2_clip"} <= set(SYSTEMS)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back(run: Checkpoint, full_store: FeatureStore, tmp_path: Path, suffix: str) -> None:
    """A run, written as the authors' code writes it and read again, gives the same scores."""
    file, out = tmp_path / f"theirs{suffix}", tmp_path / "run"
    written = export_checkpoint(run, file)
    assert written
    import_checkpoint(run.head, file, full_store, run.class_names, run.config, out)
    np.testing.assert_allclose(scores(load_checkpoint(out), full_store), scores(run, full_store), atol=1e-5, rtol=1e-5)
    assert "weights as published" in load_checkpoint(out).describe()


def test_the_optimiser_beside_the_weights_is_left_alone(
    run: Checkpoint, full_store: FeatureStore, tmp_path: Path
) -> None:
    official: Any = find(run.head).official
    weights = {f"module.{name}": value for name, value in official.write(run.config, run.weights).items()}
    torch.save({official.container: weights, "optimizer": {"state": {}}, "next_step": 7}, tmp_path / "theirs.pth")
    import_checkpoint(run.head, tmp_path / "theirs.pth", full_store, run.class_names, run.config, tmp_path / "run")


def test_a_tensor_too_many_or_too_few_is_named(run: Checkpoint, full_store: FeatureStore, tmp_path: Path) -> None:
    official: Any = find(run.head).official
    weights = {name: value.contiguous().clone() for name, value in official.write(run.config, run.weights).items()}

    def refused(tensors: dict[str, Tensor]) -> pytest.ExceptionInfo[BaseException]:
        save_file(tensors, tmp_path / "wrong.safetensors")
        with pytest.raises((SpecMismatch, TowerError)) as caught:
            import_checkpoint(
                run.head, tmp_path / "wrong.safetensors", full_store, run.class_names, run.config, tmp_path / "run"
            )
        assert not (tmp_path / "run").exists()
        return caught

    assert "something.new" in str(refused(weights | {"something.new": torch.zeros(2)}).value)
    lost = next(name for name in weights if name.endswith("weight"))
    assert lost in str(refused({name: value for name, value in weights.items() if name != lost}).value)


def test_another_clip_in_the_file_is_refused(run: Checkpoint, full_store: FeatureStore, tmp_path: Path) -> None:
    official: Any = find(run.head).official
    weights = official.write(run.config, run.weights)
    foreign = {f"{official.clip or ''}visual.ln_post.weight": torch.full((64,), 3.0)}
    torch.save({official.container: weights | foreign}, tmp_path / "theirs.pth")
    with pytest.raises(SpecMismatch, match=r"another CLIP than .*small.json: .*ln_post"):
        import_checkpoint(run.head, tmp_path / "theirs.pth", full_store, run.class_names, run.config, tmp_path / "run")


class Surprise:
    """What a pickle may do when it is opened: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(full_store: FeatureStore, tmp_path: Path) -> None:
    torch.save({"model": {"a": Surprise(tmp_path / "opened")}}, tmp_path / "evil.pth")
    with pytest.raises(TowerError, match="could run code"):
        import_checkpoint(
            "evl_decoder", tmp_path / "evil.pth", full_store, ("a",), small("evl_decoder"), tmp_path / "r"
        )
    assert not (tmp_path / "opened").exists()


def test_a_folder_in_use_and_a_head_without_publication(full_store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="in use"):
        import_checkpoint("evl_decoder", tmp_path / "x", full_store, ("a",), small("evl_decoder"), tmp_path / "used")
    with pytest.raises(ConfigError, match="no published checkpoints"):
        import_checkpoint("linear_probe", tmp_path / "x", full_store, ("a",), find("linear_probe").config(), tmp_path)
