"""A block's class token without its patches: the same as from all tokens, and through a store of every dtype."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from coldframe.cli import main
from coldframe.data_manifests.drawn import plan_clips
from coldframe.data_manifests.errors import UnknownName
from coldframe.extract import FeatureStore
from coldframe.extract.blocks import Block
from coldframe.extract.frames import write_video
from coldframe.extract.summary import attend, pack, summarise, unpack
from coldframe.extract.towers import Tower, load_tower


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", device="cpu")


@pytest.fixture(scope="module")
def block(tower: Tower) -> Block:
    """The last one."""
    return tower.block(tower.shape.layers)


@pytest.fixture(scope="module")
def tokens(tower: Tower) -> Tensor:
    """tokens.<L-1> of two videos of three frames."""
    side = tower.spec.transform.size_px
    pixels = torch.randint(0, 256, (2, 3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return tower.resume(tower.start(pixels), 0, to_layer=tower.shape.layers - 1)


@pytest.mark.parametrize("n_extra", [0, 1, 3])
def test_attention_of_the_class_token_is_that_of_the_block(block, tokens, n_extra):
    extra = torch.randn(2, 3, n_extra, tokens.shape[-1]) if n_extra else None
    read = tokens if extra is None else torch.cat([tokens, extra], dim=-2)
    wanted = block.attend(tokens[..., :1, :], read)
    found = attend(summarise(tokens, block), extra, block)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    whole = block(tokens, class_token_only=True) if extra is None else None
    if whole is not None:
        torch.testing.assert_close(block.finish(tokens[..., :1, :], found), whole, atol=1e-5, rtol=1e-5)


def test_extra_tokens_are_felt_and_get_their_gradient(block, tokens):
    extra = torch.randn(2, 3, 1, tokens.shape[-1], requires_grad=True)
    found = attend(summarise(tokens, block), extra, block)
    direction = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * direction).sum(), extra)
    wanted = block.attend(tokens[..., :1, :], torch.cat([tokens, extra], dim=-2))
    (other,) = torch.autograd.grad((wanted * direction).sum(), extra)
    assert gradient.any()
    torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


def test_summaries_are_written_out(block, tokens):
    """Against queries, keys and values of torch's own."""
    module, heads, width = block.module, block.heads, tokens.shape[-1]
    summary = summarise(tokens, block)
    q, k, v = (module.ln_1(tokens) @ module.attn.in_proj_weight.T + module.attn.in_proj_bias).chunk(3, dim=-1)
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        scores = (q[..., :1, part] @ k[..., part].transpose(-1, -2))[..., 0, :] / (width / heads) ** 0.5
        torch.testing.assert_close(summary.lse[..., head], scores.exp().sum(dim=-1).log(), atol=1e-4, rtol=1e-5)
        wanted = (scores.softmax(dim=-1)[..., None] * v[..., part]).sum(dim=-2)
        torch.testing.assert_close(summary.read[..., part], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(summary.class_token, tokens[..., 0, :])
    torch.testing.assert_close(summary.mean, tokens.mean(dim=-2))


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-6), ("float16", 3e-5), ("bfloat16", 5e-4)])
def test_packing_keeps_the_divisor(block, tokens, dtype, off):
    summary = summarise(tokens, block)
    summary = summary._replace(lse=summary.lse + torch.linspace(-30, 30, block.heads))
    packed = pack(summary)
    assert packed.shape[-1] == 3 * tokens.shape[-1] + 2 * block.heads
    for part, kept in zip(unpack(packed, block.heads), summary, strict=True):
        torch.testing.assert_close(part, kept, atol=1e-6, rtol=0)
    stored = unpack(packed.to(getattr(torch, dtype)), block.heads)
    assert (stored.lse - summary.lse).abs().max() < off


def test_the_tower_gives_it_from_either_end(tower, block, tokens):
    pixels = torch.randint(0, 256, (2, 3, *[tower.spec.transform.size_px] * 2), dtype=torch.uint8)
    found = tower.encode_frames(pixels, ["summary.-2", "summary.0", "tokens.-2"])
    last = tower.shape.layers - 1
    assert list(found) == ["summary.0", f"tokens.{last}", f"summary.{last}"]
    assert torch.equal(found[f"summary.{last}"], pack(summarise(found[f"tokens.{last}"], block)))
    with pytest.raises(UnknownName):
        tower.encode_frames(pixels, ["summary.-1"])


# ---- the store


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, clip in enumerate(plan_clips(4)[:2]):
        write_video(folder / "train" / clip.motion / f"{number}.mp4", clip.draw(n_frames=8, size_px=64), fps=12)
    return folder


def call(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert not left.value.code, err
    return out


def extracted(capsys, videos: Path, store: Path, features: str, *options: str) -> FeatureStore:
    tiny = ("--model", "coldframe-tiny", "--frames", "3", "--quiet", "--workers", "1")
    call(capsys, "extract", videos, "--store", store, "--features", features, *tiny, *options)
    return FeatureStore.open(store)


@pytest.mark.parametrize("options", [(), ("--dtype", "int8"), ("--dtype", "float32"), ("--token-grid", "2")])
def test_from_videos_to_a_batch(capsys, tmp_path, videos, tower, options):
    store = extracted(capsys, videos, tmp_path / "s", "summary.-2,pixels", *options)
    assert store.features == ("pixels", "summary.3")
    features, mask = store.gather(store.ids, ["summary.-2", "pixels"])
    assert mask.all()
    assert features["summary.3"].dtype == (torch.float32 if "float32" in options else torch.float16)
    wanted = tower.encode_frames(features["pixels"].flatten(0, 1), ["summary.3"])["summary.3"].unflatten(0, (2, 3))
    size = wanted.abs().amax()
    assert (features["summary.3"] - wanted).abs().max() < (1e-5 if "float32" in options else 1e-3) * size
    found, exact = unpack(features["summary.3"], tower.shape.heads), unpack(wanted, tower.shape.heads)
    assert (found.lse - exact.lse).abs().max() < 3e-5
    assert "summary.3" in call(capsys, "inspect", store.path)
    call(capsys, "verify", store.path, "--deep")


def test_it_is_planned_added_and_carried_elsewhere(capsys, tmp_path, videos):
    plan = json.loads(call(capsys, "plan", videos, "--store", tmp_path / "s", "--features", "summary.-2", "--model",
                           "coldframe-tiny", "--frames", "3", "--workers", "1", "--json"))  # fmt: skip
    shape = load_tower("coldframe-tiny", device="cpu").shape
    assert plan["feature_bytes"] == {"summary.3": 2 * 3 * 2 * (3 * shape.width + 2 * shape.heads)}

    extracted(capsys, videos, tmp_path / "s", "embedding")
    store = extracted(capsys, videos, tmp_path / "s", "summary.3")  # added to what is there
    assert store.features == ("embedding", "summary.3")
    call(capsys, "export", tmp_path / "s", "--to", tmp_path / "s.h5")
    call(capsys, "import", tmp_path / "s.h5", "--store", tmp_path / "again")
    again = FeatureStore.open(tmp_path / "again")
    assert again.features == store.features
    for video_id in store.ids:
        assert np.array_equal(again.read("summary.3", video_id), store.read("summary.3", video_id))
