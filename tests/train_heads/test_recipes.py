"""Every recipe is whole, fits its head, says where its figure comes from, and takes a step of training."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from coldframe.data_manifests.errors import UnknownName
from coldframe.extract.batches import FeatureDataset
from coldframe.extract.store import FeatureStore
from coldframe.train_heads import recipes
from coldframe.train_heads.build import build_head, needed_features
from coldframe.train_heads.heads import find as find_head
from coldframe.train_heads.pipeline import train
from coldframe.train_heads.recipes import FOLDER, find, names

PROTOCOLS = ("closed_set", "zero_shot", "few_shot")
SYSTEMS = ("evl_decoder", "continuous_prompts", "ez_clip", "m2_clip", "ma_clip")


def test_every_system_has_recipes_of_every_field() -> None:
    found = [find(name) for name in names()]
    assert {recipe.head for recipe in found} >= set(SYSTEMS)
    datasets = " ".join(recipe.dataset for recipe in found)
    assert all(name in datasets for name in ("kinetics400", "ssv2", "hmdb51", "ucf101", "fewshot"))


@pytest.mark.parametrize("name", names())
def test_a_recipe_says_what_was_published_where(name: str) -> None:
    recipe = find(name)
    assert recipe.protocol in PROTOCOLS
    assert 0 < recipe.published < 100
    assert f"{recipe.published} %" in recipe.title
    assert "arXiv:" in recipe.source
    assert recipe.hardware
    assert recipe.minutes >= 0
    assert recipe.extract["model"].endswith("quickgelu")
    tables = tomllib.loads(recipe.path.read_text())
    assert tables.keys() <= {"recipe", "extract", "head", "train", "episodes", "protocol", "short"}


@pytest.mark.parametrize("name", names())
def test_its_commands_are_commands(name: str) -> None:
    """As typed: every option is one that the program knows."""
    import shlex

    import typer.main

    from coldframe.cli import app

    group: Any = typer.main.get_command(app)
    for line in find(name).commands():
        program, command, *words = shlex.split(line)
        assert program == "coldframe"
        known = {option for parameter in group.commands[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("name", names())
def test_its_settings_are_the_heads(name: str) -> None:
    recipe = find(name)
    for is_short in (False, True):
        asked = recipe.settings(is_short)
        assert isinstance(asked.head, find_head(recipe.head).config)
    assert tomllib.loads(recipe.path.read_text())["head"]["name"] == recipe.head


@pytest.fixture(scope="module")
def shortened() -> list[str]:
    """One recipe of every distinct short form: more would run the same code again."""
    seen: dict[tuple[Any, ...], str] = {}
    for name in names():
        asked = find(name).settings(is_short=True)
        seen.setdefault((find(name).head, asked.head, asked.train, asked.episodes), name)
    return list(seen.values())


def test_the_short_form_of_each_trains(full_store: FeatureStore, shortened: list[str], tmp_path: Path) -> None:
    """A step from the store for heads that learn from labels; episodic ones need more videos than the store has."""
    manifest = full_store.manifest
    for name in shortened:
        recipe, asked = find(name), find(name).settings(is_short=True)
        if asked.episodes is not None or not find_head(recipe.head).is_trained:
            needs = needed_features(recipe.head, asked.head, full_store)
            module, text = build_head(
                recipe.head, asked.head, full_store, manifest.class_names, "video", torch.device("cpu")
            )
            bank: Any = FeatureDataset(full_store, manifest.ids, manifest.labels, needs).all()
            scorer: Any = module
            ways = torch.arange(3)
            texts = None if text is None else text.embedding[None]
            assert scorer.episode_logits(bank, ways[None, :, None], ways[None] + 3, texts).isfinite().all(), name
            continue
        train(full_store, manifest, recipe.head, asked.head, asked.train, tmp_path / name, device="cpu", quiet=True)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="evl_k400_b16_8f"):
        find("evl_k400_b16_8")
    assert Path(recipes.__file__).parent == FOLDER
