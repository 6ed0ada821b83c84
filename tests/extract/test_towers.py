"""A tower's features are open_clip's own, every layer from one pass, at any precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.specs import TowerShape
from coldframe.extract.towers import Tower, TowerError, load_tower


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", "random", device="cpu", seed=3)


@pytest.fixture(scope="module")
def vit_b_32() -> Tower:
    return load_tower("ViT-B-32-quickgelu", "random", device="cpu")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def drawn_images() -> list[Image.Image]:
    """Smooth colours with noise, wide and tall, larger and smaller than the crop."""
    rng = np.random.default_rng(0)
    images = []
    for height, width in ((90, 120), (300, 201), (48, 40), (64, 64)):
        ramp = np.linspace(0, 200, height)[:, None, None] + np.linspace(0, 40, width)[None, :, None]
        images.append(Image.fromarray((ramp + rng.uniform(0, 15, (height, width, 3))).astype(np.uint8)))
    return images


def transform_of(tower: Tower) -> Callable[[Image.Image], Tensor]:
    return open_clip.image_transform(tower.spec.transform.size_px, is_train=False)


def crop(transform: Callable[[Image.Image], Tensor], image: Image.Image) -> np.ndarray:
    """open_clip's transform up to the uint8 crop: all but scaling to floats and normalising."""
    for step in transform.transforms[:-2]:
        image = step(image)
    return rearrange(np.asarray(image), "h w c -> c h w")


# ---- equality with open_clip


@pytest.mark.parametrize("name", ["tower", "vit_b_32"])
def test_frames_go_the_same_way_as_open_clips_own_images(name: str, request: pytest.FixtureRequest) -> None:
    tower: Tower = request.getfixturevalue(name)
    transform = transform_of(tower)
    images = drawn_images()
    crops = np.stack([crop(transform, image) for image in images])
    theirs = torch.stack([transform(image) for image in images])
    assert torch.equal(tower.normalise(crops), theirs)
    with torch.no_grad():
        wanted = tower.model.encode_image(theirs)
    found = tower.encode_frames(crops, ["embedding"])["embedding"]
    assert F.cosine_similarity(found, wanted).min() > 0.999999
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_clips_recorded_preprocessing_is_reproduced_exactly(shared: Path, vit_b_32: Tower) -> None:
    folder = shared / "data" / "clip_golden"
    if not folder.is_dir():
        pytest.skip(f"no recorded CLIP tensors at {folder}")
    transform = transform_of(vit_b_32)
    with np.load(folder / "clip_golden.npz", allow_pickle=False) as recorded:
        for name, wanted in zip(recorded["name"], recorded["pixel_values"], strict=True):
            image = Image.open(folder / "images" / f"{name}.jpg").convert("RGB")
            np.testing.assert_array_equal(transform(image), wanted)
            np.testing.assert_array_equal(vit_b_32.normalise(crop(transform, image)[None])[0], wanted)


@pytest.mark.parametrize("name", ["tower", "vit_b_32"])
def test_every_layer_comes_raw_from_one_pass(name: str, request: pytest.FixtureRequest) -> None:
    tower: Tower = request.getfixturevalue(name)
    layers, side = tower.shape.layers, tower.spec.transform.size_px
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    names = ["embedding", *(f"tokens.{k}" for k in range(layers + 1)), *(f"cls.{k}" for k in range(layers + 1))]
    found = tower.encode_images(images, names)
    with torch.no_grad():
        wanted = tower.visual.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
        start = tower.visual._embeds(images)
    torch.testing.assert_close(found["embedding"], wanted["image_features"])
    torch.testing.assert_close(found["tokens.0"], start)
    for k in range(1, layers + 1):
        prefix, patches = wanted["image_intermediates_prefix"][k - 1], wanted["image_intermediates"][k - 1]
        torch.testing.assert_close(found[f"tokens.{k}"], torch.cat([prefix, patches], dim=1))
        assert torch.equal(found[f"cls.{k}"], found[f"tokens.{k}"][:, 0])
    assert found.keys() == set(names)


def evl_recordings(golden: Path) -> list[tuple[dict[str, int], dict[str, Tensor]]]:
    found = []
    for path in sorted(golden.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if file.metadata()["what"] == "EVL":
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                found.append((json.loads(file.metadata()["config"]), tensors))
    return found


def recorded_tower(sizes: dict[str, int], weights: dict[str, Tensor]) -> Tower:
    text_width, vocabulary = weights["ln_final.weight"].shape[0], weights["token_embedding.weight"].shape[0]
    text_layers = len({name.split(".")[2] for name in weights if name.startswith("transformer.resblocks.")})
    model = open_clip.CLIP(
        weights["text_projection"].shape[1],
        open_clip.CLIPVisionCfg(
            layers=sizes["vision_layers"],
            width=sizes["vision_width"],
            head_width=64,
            patch_size=sizes["patch"],
            image_size=sizes["res"],
        ),
        open_clip.CLIPTextCfg(width=text_width, heads=text_width // 64, layers=text_layers, vocab_size=vocabulary),
        quick_gelu=True,
    )
    model.load_state_dict(weights)
    return Tower(model, device="cpu")


def test_blocks_queries_and_keys_are_what_evl_recorded(golden: Path) -> None:
    recordings = evl_recordings(golden)
    assert recordings, f"no recording of EVL in {golden}"
    for sizes, tensors in recordings:
        weights = {name.removeprefix("clip."): value for name, value in tensors.items() if name.startswith("clip.")}
        tower = recorded_tower(sizes, weights)
        blocks = sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".out"))
        images = rearrange(tensors["frames"], "b c t h w -> (b t) c h w")
        flat = tower.encode_images(images, [f"tokens.{k}" for i in blocks for k in (i, i + 1)])
        found = {name: rearrange(x, "(b t) n d -> b t n d", b=sizes["B"]) for name, x in flat.items()}
        for i in blocks:  # the recording counts from 0: its block i turns tokens.<i> into tokens.<i+1>
            q, k = tower.query_key(i + 1)(found[f"tokens.{i}"])
            torch.testing.assert_close(found[f"tokens.{i + 1}"], tensors[f"backbone.{i}.out"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(q, tensors[f"backbone.{i}.q"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(k, tensors[f"backbone.{i}.k"], rtol=1e-4, atol=1e-4)


# ---- the pass


def test_features_are_named_canonically_and_pixels_come_back(tower: Tower, pixels: Tensor) -> None:
    found = tower.encode_frames(pixels, ["tokens.-1", "cls.-5", "pixels", "embedding", "tokens.4"])
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "tokens.4": (5, 65, 128),
        "cls.0": (5, 128),
        "pixels": (5, 3, 64, 64),
        "embedding": (5, 64),
    }
    assert torch.equal(found.pop("pixels"), pixels)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    assert tower.encode_frames(pixels, ["pixels"]).keys() == {"pixels"}


def test_read_only_arrays_are_read_without_a_warning(tower: Tower, pixels: Tensor) -> None:
    array = pixels.numpy().copy()
    array.flags.writeable = False
    wanted = tower.encode_frames(pixels, ["embedding"])["embedding"]
    found = tower.encode_frames(array, ["embedding", "pixels"])
    assert torch.equal(found["embedding"], wanted)
    np.testing.assert_array_equal(found["pixels"], array)


def test_the_pass_stops_at_the_last_block_needed(tower: Tower, pixels: Tensor) -> None:
    ran: list[int] = []
    blocks = tower.visual.transformer.resblocks
    hooks = [block.register_forward_hook(lambda *_, k=k: ran.append(k)) for k, block in enumerate(blocks, start=1)]
    for features, last in ((["tokens.0"], 0), (["cls.2", "tokens.1"], 2), (["tokens.1", "embedding"], 4)):
        ran.clear()
        tower.encode_frames(pixels, features)
        assert ran == list(range(1, last + 1))
    for hook in hooks:
        hook.remove()


def test_frames_do_not_see_each_other(tower: Tower, pixels: Tensor) -> None:
    whole = tower.encode_frames(pixels, ["embedding", "tokens.2"])
    for i in range(len(pixels)):
        alone = tower.encode_frames(pixels[i : i + 1], ["embedding", "tokens.2"])
        for name, value in alone.items():
            torch.testing.assert_close(value[0], whole[name][i], rtol=1e-4, atol=1e-5)


def test_a_pass_can_be_resumed_at_every_layer(tower: Tower, pixels: Tensor) -> None:
    layers = range(tower.shape.layers + 1)
    found = tower.encode_frames(pixels, ["embedding", *(f"tokens.{k}" for k in layers)])
    for k in layers:
        torch.testing.assert_close(tower.project(tower.resume(found[f"tokens.{k}"], k)), found["embedding"])
    with pytest.raises(UnknownName, match="no layer"):
        tower.resume(found["tokens.4"], 5)


def test_resuming_is_differentiable_in_the_tokens_and_frozen_in_the_weights(tower: Tower, pixels: Tensor) -> None:
    tokens = tower.encode_frames(pixels, ["tokens.2"])["tokens.2"].requires_grad_()
    tower.project(tower.resume(tokens, 2)).square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in tower.model.parameters())


def test_features_may_enter_a_head_that_is_trained(tower: Tower, pixels: Tensor) -> None:
    weight = torch.zeros(64, 3, requires_grad=True)
    frames = tower.encode_frames(pixels, ["embedding"])["embedding"]
    texts = tower.encode_text(["a", "b", "c"])
    ((frames @ weight) + frames @ texts.T).square().sum().backward()
    assert weight.grad is not None


# ---- precision


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.01), ("fp16", 0.002)])
def test_lower_precision_is_of_the_blocks_alone(tower: Tower, pixels: Tensor, precision: str, tolerance: float) -> None:
    low = load_tower("coldframe-tiny", "random", precision=precision, device="cpu", seed=3)
    assert low.spec.weights_sha256 == tower.spec.weights_sha256
    assert low.spec.precision == precision
    names = ["tokens.0", "tokens.4", "embedding"]
    found, wanted = low.encode_frames(pixels, names), tower.encode_frames(pixels, names)
    assert torch.equal(found["tokens.0"], wanted["tokens.0"])
    for name in ("tokens.4", "embedding"):
        error = ((found[name] - wanted[name]).norm() / wanted[name].norm()).item()
        assert found[name].dtype == torch.float32
        assert 0 < error < tolerance
    assert torch.equal(low.encode_text(["a circle"]), tower.encode_text(["a circle"]))


def test_a_towers_arithmetic_is_its_own_inside_autocast(tower: Tower, pixels: Tensor) -> None:
    wanted = tower.encode_frames(pixels, ["embedding", "tokens.1"])
    text = tower.encode_text(["a circle"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tower.encode_frames(pixels, ["embedding", "tokens.1"])
        assert torch.equal(tower.encode_text(["a circle"]), text)
        low = tower.project(tower.resume(found["tokens.1"], 1))  # a step of training works in the precision around it
    assert 0 < float((low - wanted["embedding"]).norm() / wanted["embedding"].norm()) < 0.01
    for name, value in wanted.items():
        assert torch.equal(found[name], value)


# ---- text


def test_texts_are_encoded_as_open_clip_does(tower: Tower) -> None:
    texts = ["a circle moves left", "ein blauer Kreis", "", "a photo of a cat, a dog & a kite."]
    ids = tower.tokenize(texts)
    assert torch.equal(ids, open_clip.tokenize(texts))
    with torch.no_grad():
        wanted = tower.model.encode_text(ids)
    torch.testing.assert_close(tower.encode_text(texts), wanted)
    many = [f"number {i}" for i in range(300)]
    torch.testing.assert_close(tower.encode_text(many)[299:], tower.encode_text(many[299:]))


def test_a_text_is_never_cut(tower: Tower) -> None:
    fits = " ".join(["word"] * 75)  # with its start and end: 77 tokens
    assert tower.tokenize([fits]).shape == (1, 77)
    with pytest.raises(ConfigError, match=r"1 text\(s\) exceed the 77 tokens.*'word word"):
        tower.tokenize(["short", fits + " word"])
    with pytest.raises(ConfigError, match=r"found 'word[^']{56}…'; 'word") as caught:
        tower.tokenize(["word " * 500, "word " * 400])
    assert len(str(caught.value)) < 300


def test_a_vocabulary_of_its_own_is_refused(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 512}
    path = tmp_path / "test-vocabulary.json"
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    with pytest.raises(TowerError, match=r"does not fit the vocabulary of .*; found 512 ids"):
        load_tower(str(path), "random", device="cpu").tokenize(["a drawing"])


def test_logit_scale_is_exponentiated(tower: Tower) -> None:
    assert tower.logit_scale == pytest.approx(1 / 0.07)


# ---- shapes and refusals


def test_shapes_are_those_of_the_published_model(vit_b_32: Tower) -> None:
    assert vit_b_32.shape == TowerShape(
        layers=12,
        width=768,
        heads=12,
        embed_dim=512,
        grid=(7, 7),
        text_width=512,
        text_layers=12,
        text_heads=8,
        context_length=77,
    )
    assert vit_b_32.spec.quick_gelu
    assert vit_b_32.spec.transform.size_px == 224
    assert vit_b_32.spec.transform.mean == (0.48145466, 0.4578275, 0.40821073)


def test_frames_that_do_not_fit_are_refused(tower: Tower, pixels: Tensor) -> None:
    for wrong in (pixels.float(), pixels[:, :, :32], pixels[0], pixels.numpy().astype(np.float32)):
        with pytest.raises(TowerError, match=r"expected uint8 \[F, 3, 64, 64\]"):
            tower.encode_frames(wrong, ["embedding"])


@pytest.mark.parametrize("feature", ["tokens.5", "cls.-6", "patch.3", "embeddings"])
def test_features_that_do_not_exist_are_refused(tower: Tower, pixels: Tensor, feature: str) -> None:
    with pytest.raises(UnknownName, match="no feature"):
        tower.encode_frames(pixels, [feature])
    with pytest.raises(UnknownName, match="no feature"):
        tower.encode_images(torch.zeros(1, 3, 64, 64), ["pixels"])


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_blocks_are_counted_from_one(tower: Tower, layer: int) -> None:
    with pytest.raises(UnknownName, match="no block"):
        tower.query_key(layer)


WITHOUT_TOKENS = {
    "resnet": {"image_size": 32, "width": 16, "layers": [1, 1, 1, 1], "head_width": 64},
    "average-pool": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "pool_type": "avg"},
    "attention-pool": {
        "image_size": 32,
        "patch_size": 16,
        "width": 64,
        "layers": 2,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
    },
    "timm": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
}


@pytest.mark.parametrize("kind", WITHOUT_TOKENS)
def test_towers_without_a_class_token_give_embeddings_alone(tmp_path: Path, kind: str) -> None:
    text = {"width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": WITHOUT_TOKENS[kind], "text_cfg": text}
    path = tmp_path / f"test-{kind}.json"
    path.write_text(json.dumps(config))
    tower = load_tower(str(path), "random", device="cpu")
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert not tower.has_tokens
    assert (tower.shape.layers, tower.shape.embed_dim) == (0, 32)
    with torch.no_grad():
        wanted = tower.model.encode_image(tower.normalise(pixels))
    torch.testing.assert_close(tower.encode_frames(pixels, ["embedding", "pixels"])["embedding"], wanted)
    assert tower.encode_text(["a", "b"]).shape == (2, 32)
    for refused in (
        lambda: tower.encode_frames(pixels, ["embedding", "tokens.1"]),
        lambda: tower.encode_frames(pixels, ["cls.-1"]),
        lambda: tower.resume(torch.zeros(1, 5, 64), 1),
        lambda: tower.query_key(1),
    ):
        with pytest.raises(TowerError, match=f"{kind}.* has no class and patch tokens"):
            refused()


def test_blocks_with_another_attention_have_no_linear_queries(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "qk_norm": True}
    text = {"width": 64, "heads": 1, "layers": 1}
    path = tmp_path / "test-qk-norm.json"
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    tower = load_tower(str(path), "random", device="cpu")
    assert tower.encode_frames(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["tokens.2"])["tokens.2"].shape == (
        1,
        5,
        64,
    )
    with pytest.raises(TowerError, match="is not CLIP"):
        tower.query_key(1)


def test_a_missing_gpu_is_said_plainly() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TowerError, match="finds no such CUDA device"):
        load_tower("coldframe-tiny", "random", device="cuda")
