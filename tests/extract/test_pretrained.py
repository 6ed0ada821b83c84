"""Names, tags and files of open_clip: what loads is what was asked for, and what does not says why in one line."""

from __future__ import annotations

import hashlib
import json
import logging
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.pretrained import (
    are_weights_here,
    expect_transform,
    load_model,
    reference_transform,
    transform_of,
)
from coldframe.extract.specs import TransformSpec
from coldframe.extract.tiny import WEIGHTS
from coldframe.extract.towers import Tower, TowerError, load_tower

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
QUICK = SMALL | {"quick_gelu": True}


def write_architecture(folder: Path, name: str, config: dict[str, Any]) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_architecture(tmp_path_factory.mktemp("plain"), "test-pretrained", SMALL)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_architecture(tmp_path_factory.mktemp("quick"), "test-pretrained-quickgelu", QUICK)


@pytest.fixture(scope="module")
def made(quick: str) -> Tower:
    return load_tower(quick, "random", device="cpu", seed=7)


@pytest.fixture(scope="module")
def made_file(made: Tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "made.safetensors"
    save_file(made.model.state_dict(), path)
    return path


def refuse_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", fail)
    monkeypatch.setattr(urllib.request, "urlopen", fail)


# ---- random weights


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone(quick: str, made: Tower) -> None:
    before = torch.get_rng_state()
    again, other = load_tower(quick, "random", device="cpu", seed=7), load_tower(quick, "random", device="cpu", seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.spec == made.spec
    assert other.spec.weights_sha256 != made.spec.weights_sha256


def test_loading_neither_logs_nor_installs_handlers(quick: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[logging.LogRecord] = []
    collector = logging.Handler()
    monkeypatch.setattr(collector, "emit", records.append)
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.DEBUG)
    for handlers in ([], [collector]):
        monkeypatch.setattr(root, "handlers", list(handlers))
        load_tower(quick, "random", device="cpu").encode_text(["a drawing"])
        assert root.handlers == handlers
        assert root.filters == []
    assert [record.getMessage() for record in records if "open_clip" in record.pathname] == []


# ---- files


def test_coldframe_tiny_comes_with_its_weights() -> None:
    shipped = load_tower("coldframe-tiny", device="cpu")
    assert (shipped.spec.model, shipped.spec.pretrained) == ("coldframe-tiny", "shipped")
    assert load_tower("coldframe-tiny", "shipped", device="cpu").spec == shipped.spec
    assert load_tower("coldframe-tiny", str(WEIGHTS), device="cpu").spec.weights_sha256 == shipped.spec.weights_sha256


def test_a_file_gives_back_the_tower_that_wrote_it(quick: str, made: Tower, made_file: Path) -> None:
    loaded = load_tower(quick, str(made_file), device="cpu")
    assert loaded.spec.weights_sha256 == made.spec.weights_sha256
    assert loaded.spec.pretrained == str(made_file)
    assert loaded.spec.model == quick
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        loaded.encode_frames(pixels, ["embedding"]), made.encode_frames(pixels, ["embedding"]), rtol=0, atol=0
    )


def test_a_bare_file_is_taken_for_what_the_models_name_says(plain: str, made: Tower, made_file: Path) -> None:
    loaded = load_tower(plain, str(made_file), device="cpu")
    assert loaded.spec.weights_sha256 == made.spec.weights_sha256
    assert made.spec.quick_gelu
    assert not loaded.spec.quick_gelu


def test_files_of_training_and_of_half_precision_load_alike(tmp_path: Path, quick: str, made: Tower) -> None:
    state = made.model.state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch_1.pt")
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pt")
    torch.save({k: v.half().float() for k, v in state.items()}, tmp_path / "rounded.pt")
    torch.save(state | {"logit_scale": state["logit_scale"].reshape(1)}, tmp_path / "scale.pt")
    sha = {p.stem: load_tower(quick, str(p), device="cpu").spec.weights_sha256 for p in tmp_path.iterdir()}
    assert sha["epoch_1"] == sha["scale"] == made.spec.weights_sha256
    assert sha["half"] == sha["rounded"] != made.spec.weights_sha256


def test_an_openai_archive_loads_and_knows_its_gelu(tmp_path: Path, quick: str, plain: str, made: Tower) -> None:
    class Archive(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.visual, self.transformer = model.visual, model.transformer
            self.token_embedding, self.ln_final = model.token_embedding, model.ln_final
            self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection
            self.logit_scale = model.logit_scale
            self.register_buffer("input_resolution", torch.tensor(32))
            self.register_buffer("context_length", torch.tensor(77))
            self.register_buffer("vocab_size", torch.tensor(49408))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.visual(image)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(Archive(made.model), torch.zeros(1, 3, 32, 32)).save(tmp_path / "archive.pt")
    assert load_tower(quick, str(tmp_path / "archive.pt"), device="cpu").spec.weights_sha256 == made.spec.weights_sha256
    with pytest.raises(TowerError, match=r"trained with QuickGELU.*Use the model test-pretrained-quickgelu\."):
        load_tower(plain, str(tmp_path / "archive.pt"), device="cpu")


def test_weights_that_do_not_fit_name_the_first_key_that_differs(tmp_path: Path, quick: str, made: Tower) -> None:
    state = made.model.state_dict()
    cases = {
        "shape": state | {"visual.conv1.weight": torch.zeros(64, 3, 16, 16)},
        # open_clip alone would stretch these to the grid and the context of the model, unasked
        "grid": state | {"visual.positional_embedding": torch.zeros(50, 64)},
        "context": state | {"positional_embedding": torch.zeros(32, 32)},
        "missing": {k: v for k, v in state.items() if k != "text_projection"},
        "extra": state | {"head.weight": torch.zeros(3)},
    }
    wanted = {
        "shape": r"visual\.conv1\.weight has another shape; found \[64, 3, 16, 16\]; expected \[64, 3, 8, 8\]",
        "grid": r"visual\.positional_embedding has another shape; found \[50, 64\]; expected \[17, 64\]",
        "context": r"positional_embedding has another shape; found \[32, 32\]; expected \[77, 32\]",
        "missing": "text_projection is missing",
        "extra": r"head\.weight is no weight of this model",
    }
    for name, tensors in cases.items():
        torch.save(tensors, tmp_path / f"{name}.pt")
        with pytest.raises(TowerError, match=wanted[name]) as caught:
            load_tower(quick, str(tmp_path / f"{name}.pt"), device="cpu")
        assert len(str(caught.value)) < 400


# ---- names and tags


def test_unknown_models_name_their_neighbours() -> None:
    with pytest.raises(UnknownName, match="Did you mean") as caught:
        load_tower("ViT-B-16-quikgelu", "openai")
    assert "ViT-B-16-quickgelu" in str(caught.value)
    with pytest.raises(UnknownName, match="precision"):
        load_tower("coldframe-tiny", "random", precision="float32", device="cpu")
    with pytest.raises(TowerError, match="no device"):
        load_tower("coldframe-tiny", "random", device="gpu")


def test_openais_spelling_of_a_model_is_the_same_model(made: Tower) -> None:
    _, name, weights = load_model("test/pretrained-quickgelu", "random", seed=0)
    assert (name, weights) == ("test-pretrained-quickgelu", "random")


def test_weights_must_be_named_and_exist(quick: str) -> None:
    with pytest.raises(ConfigError, match=r"openai.*laion2b_s34b_b88k.*random, or a file"):
        load_tower("ViT-B-16")
    with pytest.raises(TowerError, match=r"no weights 'opnai'.*openai, laion400m_e31.*or a file"):
        load_tower("ViT-B-16", "opnai")
    with pytest.raises(TowerError, match="nor is there such a file"):
        load_tower(quick, "missing.safetensors")


@pytest.mark.parametrize("tag", ["openai", "laion2b_s34b_b88k"])
def test_a_tag_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    refuse_network(monkeypatch)
    model = "ViT-B-16-quickgelu" if tag == "openai" else "ViT-B-16"
    with pytest.raises(
        TowerError, match=r"could not be downloaded \(.*no route to host.*fetch them from http"
    ) as caught:
        load_tower(model, tag)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_whether_weights_are_here_is_known_without_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made_file: Path, file: str
) -> None:
    refuse_network(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, tag = "ViT-B-16-quickgelu", "openai"
    assert not are_weights_here(model, tag)
    repository = tmp_path / "models--timm--vit_base_patch16_clip_224.openai"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    (repository / "snapshots/c0ffee").mkdir(parents=True)
    (repository / "snapshots/c0ffee" / file).touch()
    assert are_weights_here(model, tag)
    for other in (None, "random", "nosuch", str(made_file)):  # none of them is downloaded
        assert are_weights_here(model, other)
    with pytest.raises(UnknownName):
        are_weights_here("no-such-model", None)
    with pytest.raises(TowerError, match="trained with QuickGELU"):
        are_weights_here("ViT-B-16", tag)


@pytest.mark.parametrize(
    ("model", "tag", "right"),
    [("ViT-B-16", "openai", "ViT-B-16-quickgelu"), ("ViT-L-14", "dfn2b", "ViT-L-14-quickgelu")],
)
def test_a_tag_of_the_other_gelu_is_refused_before_it_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, model: str, tag: str, right: str
) -> None:
    refuse_network(monkeypatch)
    with pytest.raises(TowerError, match=f"trained with QuickGELU, but {model} computes GELU. Use the model {right}"):
        load_tower(model, tag)


def test_a_tag_and_a_file_of_the_same_weights_are_the_same_tower(
    monkeypatch: pytest.MonkeyPatch, quick: str, made: Tower, made_file: Path
) -> None:
    half = (0.5, 0.5, 0.5)
    facts = {"file": str(made_file), "mean": half, "std": half, "resize_mode": "squash", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "test-pretrained-quickgelu", {"made": facts})
    by_tag, by_file = load_tower(quick, "made", device="cpu"), load_tower(quick, str(made_file), device="cpu")
    assert by_tag.spec.weights_sha256 == by_file.spec.weights_sha256 == made.spec.weights_sha256
    # All published weights of the model want this transform, so a bare file is taken to want it too.
    assert by_tag.spec.transform == by_file.spec.transform
    assert by_tag.spec.transform.mean == half
    assert by_tag.spec.transform.resize_mode == "squash"
    assert made.spec.transform.mean == open_clip.OPENAI_DATASET_MEAN


@pytest.mark.parametrize("digits", [64, 8])
def test_a_published_file_is_recognised_by_its_hash(
    monkeypatch: pytest.MonkeyPatch, plain: str, quick: str, made_file: Path, digits: int
) -> None:
    digest = hashlib.sha256(made_file.read_bytes()).hexdigest()[:digits]
    address = f"https://example.org/models/{digest}/V.pt" if digits == 64 else f"https://example.org/v-{digest}.pt"
    facts = {"url": address, "quick_gelu": True, "interpolation": "bilinear"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-B-16", {"published": facts})
    assert load_tower(quick, str(made_file), device="cpu").spec.transform.interpolation == "bilinear"
    with pytest.raises(TowerError, match="trained with QuickGELU, but test-pretrained computes GELU"):
        load_tower(plain, str(made_file), device="cpu")


# ---- architectures


def test_an_architecture_file_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(TowerError, match=r"absent\.json cannot be read"):
        load_tower(str(tmp_path / "absent.json"), "random")
    (tmp_path / "test-damaged.json").write_text('{"embed_dim": 16')
    with pytest.raises(TowerError, match=r"test-damaged\.json cannot be read"):
        load_tower(str(tmp_path / "test-damaged.json"), "random")
    with pytest.raises(TowerError, match="expected the keys embed_dim, vision_cfg and text_cfg"):
        load_tower(write_architecture(tmp_path, "test-half-a-model", {"embed_dim": 16}), "random")
    with pytest.raises(TowerError, match="already has another architecture named ViT-B-16"):
        load_tower(write_architecture(tmp_path, "ViT-B-16", SMALL), "random")
    wrong = SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"wdith": 3}}
    with pytest.raises(TowerError, match=r"cannot build test-misspelt: .*wdith"):
        load_tower(write_architecture(tmp_path, "test-misspelt", wrong), "random")


def test_a_tokenizer_that_cannot_be_had_is_an_error_of_the_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(open_clip.factory, "HFTokenizer", fail)
    foreign = SMALL | {"text_cfg": SMALL["text_cfg"] | {"hf_tokenizer_name": "somebody/tokenizer"}}
    tower = load_tower(write_architecture(tmp_path, "test-foreign-tokenizer", foreign), "random", device="cpu")
    with pytest.raises(TowerError, match=r"tokenizer of .* cannot be had: We couldn't connect"):
        tower.encode_text(["a drawing"])


def test_only_square_crops_are_supported(tmp_path: Path) -> None:
    wide = SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"image_size": [32, 64]}}
    with pytest.raises(TowerError, match="square crops are supported; found 32 x 64"):
        load_tower(write_architecture(tmp_path, "test-wide", wide), "random", device="cpu")


def test_a_model_expects_the_transform_it_is_given(quick: str) -> None:
    module, *_ = load_model(quick, "random", 0)
    other = TransformSpec(48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), "bilinear", "longest", fill_color=7)
    expect_transform(module, other)
    assert transform_of(module) == other
    seen = reference_transform(module)(Image.new("RGB", (96, 24)))  # black, on a ground of 7 above and below
    assert seen.shape == (3, 48, 48)
    torch.testing.assert_close(seen[:, 24, 24], -torch.tensor(other.mean) / torch.tensor(other.std))
    torch.testing.assert_close(seen[:, 0, 0], (7 / 255 - torch.tensor(other.mean)) / torch.tensor(other.std))
