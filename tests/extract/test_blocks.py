"""Opened blocks: without inserts they are CLIP's, and every insertion point is where it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.blocks import Block, Insert
from coldframe.extract.towers import Tower, load_tower


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower("coldframe-tiny", "random", device="cpu", seed=3)


@pytest.fixture(scope="module")
def pixels(tower: Tower) -> Tensor:
    """Two videos of three frames, [B, T, 3, S, S]."""
    side = tower.spec.transform.size_px
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def tokens(tower: Tower, pixels: Tensor) -> Tensor:
    """tokens.2 of the two videos, [B, T, 1+N, D]."""
    return tower.resume(tower.start(pixels), 0, to_layer=2)


class Scaled(Insert):
    """Something of its own at every point, with one parameter each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.full((width,), 0.1 * (i + 1)) for i in range(5))

    def before_attention(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor:
        return x + self.parts[0]

    def extra_tokens(self, x: Tensor, block: Block, mask: Tensor | None) -> Tensor | None:
        return (x.mean(dim=-2, keepdim=True) + self.parts[1]).repeat(1, 1, 2, 1)

    def after_attention(self, attended: Tensor) -> Tensor:
        return attended * self.parts[2]

    def before_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.parts[3]

    def after_mlp(self, added: Tensor, normed: Tensor) -> Tensor:
        return added + self.parts[4] * normed


def test_the_whole_pass_is_what_extraction_computes(tower: Tower, pixels: Tensor) -> None:
    wanted = tower.encode_frames(pixels.flatten(0, 1), ["tokens.0", "tokens.2", "tokens.4", "embedding"])
    start = tower.start(pixels)
    assert torch.equal(start.flatten(0, 1), wanted["tokens.0"])
    for name, value in (("tokens.2", tower.resume(start, 0, to_layer=2)), ("tokens.4", tower.resume(start, 0))):
        torch.testing.assert_close(value.flatten(0, 1), wanted[name], atol=1e-5, rtol=1e-5)
    embedding = tower.project(tower.resume(start, 0, inserts=[Insert()] * 4))
    torch.testing.assert_close(embedding.flatten(0, 1), wanted["embedding"], atol=1e-5, rtol=1e-5)


def test_frames_may_be_shifted_before_the_first_norm(tower: Tower, pixels: Tensor) -> None:
    start = tower.start(pixels)
    offset = torch.zeros(3, tower.shape.width, requires_grad=True)
    torch.testing.assert_close(tower.start(pixels, offset), start, atol=1e-6, rtol=1e-6)
    shift = torch.linspace(-1, 1, tower.shape.width)
    moved = tower.start(pixels, offset + torch.stack([0 * shift, shift, 0 * shift]))
    assert torch.allclose(moved[:, 0], start[:, 0], atol=1e-6)
    assert (moved[:, 1] - start[:, 1]).abs().mean() > 0.1
    moved[:, 1].square().sum().backward()
    assert offset.grad is not None
    assert offset.grad[1].any()
    assert not offset.grad[2].any()
    with pytest.raises(ValueError, match="6 frames for videos of 3"):  # which two such videos could be cut into
        tower.start(pixels, torch.zeros(6, tower.shape.width))


def test_the_class_token_alone_is_the_same_class_token(tower: Tower, tokens: Tensor) -> None:
    inserts = [Scaled(tower.shape.width) for _ in range(2)]
    whole = tower.resume(tokens, 2, inserts=inserts)
    alone = tower.resume(tokens, 2, inserts=inserts, class_token_only=True)
    assert alone.shape == (2, 3, 1, tower.shape.width)
    torch.testing.assert_close(alone, whole[..., :1, :], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower.project(alone), tower.project(whole), atol=1e-5, rtol=1e-5)


def test_every_point_is_where_it_says(tower: Tower, tokens: Tensor) -> None:
    """Against a block written out with torch's own attention."""
    insert, module = Scaled(tower.shape.width), tower.block(3).module
    p = list(insert.parts)
    x = tokens.flatten(0, 1) + p[0]
    extra = (x.mean(dim=1, keepdim=True) + p[1]).repeat(1, 2, 1)
    normed = module.ln_1(torch.cat([x, extra], dim=1))
    attended, _ = module.attn(normed, normed, normed, need_weights=False)
    x = x + attended[:, : x.shape[1]] * p[2] + p[3]
    normed = module.ln_2(x)
    wanted = x + module.mlp(normed) + p[4] * normed
    found = tower.resume(tokens, 2, to_layer=3, inserts=[insert])
    torch.testing.assert_close(found.flatten(0, 1), wanted, atol=1e-5, rtol=1e-5)


def test_inserts_belong_to_the_last_blocks(tower: Tower, pixels: Tensor, tokens: Tensor) -> None:
    """From tokens.2 and from pixels it is the same, where the inserts stand above block 2 alone."""
    inserts = nn.ModuleList(Scaled(tower.shape.width) for _ in range(2))
    from_pixels = tower.resume(tower.start(pixels), 0, inserts=inserts)
    torch.testing.assert_close(tower.resume(tokens, 2, inserts=inserts), from_pixels, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_reach_the_inserts_and_nothing_frozen(tower: Tower, tokens: Tensor, checkpoint: bool) -> None:
    inserts = nn.ModuleList(Scaled(tower.shape.width) for _ in range(2))
    tower.project(tower.resume(tokens, 2, inserts=inserts, checkpoint=checkpoint)).square().sum().backward()
    for name, parameter in inserts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(p.grad is None and not p.requires_grad for p in tower.model.parameters())
    assert tokens.grad is None


def test_checkpointing_changes_no_number_and_keeps_less(tower: Tower, tokens: Tensor) -> None:
    def run(checkpoint: bool) -> tuple[Tensor, list[Tensor], int]:
        inserts = nn.ModuleList(Scaled(tower.shape.width) for _ in range(2))
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = tower.project(tower.resume(tokens, 2, inserts=inserts, checkpoint=checkpoint))
        return out, list(torch.autograd.grad(out.sum(), list(inserts.parameters()))), kept

    (plain, plain_grads, much), (sparing, sparing_grads, little) = run(False), run(True)
    assert torch.equal(plain, sparing)
    for one, other in zip(plain_grads, sparing_grads, strict=True):
        torch.testing.assert_close(one, other)
    assert little < much / 4


def test_autocast_around_a_step_leaves_trainables_in_float32(tower: Tower, tokens: Tensor) -> None:
    insert = Scaled(tower.shape.width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tower.project(tower.resume(tokens, 3, inserts=[insert]))
    assert low.dtype == torch.float32
    low.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in insert.parameters())


def test_attention_may_be_told_what_not_to_read(tower: Tower, tokens: Tensor) -> None:
    block, mask = tower.block(1), torch.ones(2, 3, tokens.shape[-2], dtype=torch.bool)
    mask[0, :, 2:] = False
    found = block.attend(tokens, mask=mask)
    torch.testing.assert_close(found[0], block.attend(tokens[0], tokens[0][:, :2]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], block.attend(tokens[1]), atol=1e-5, rtol=1e-5)
    mask[1] = False
    assert block.attend(tokens, mask=mask).isfinite().all()


def test_the_text_tower_goes_step_by_step(tower: Tower) -> None:
    texts = ["a circle moves left", "a kite"]
    ids = tower.tokenize(texts)
    ends = ids.argmax(dim=-1)
    middle = tower.text.resume(tower.text.embed(ids), to_layer=1)
    found = tower.text.project(tower.text.resume(middle, 1), ends)
    torch.testing.assert_close(found, tower.encode_text(texts), atol=1e-5, rtol=1e-5)
    insert = Adds(tower.shape.text_width)
    changed = tower.text.project(tower.text.resume(middle, 1, inserts=[insert]), ends)
    assert (changed - found).abs().max() > 1e-4
    changed.square().sum().backward()
    assert insert.shift.grad is not None
    assert insert.shift.grad.any()


class Adds(Insert):
    """A shift before the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, width))

    def before_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.shift


def test_what_cannot_be_is_refused(tower: Tower, tokens: Tensor) -> None:
    with pytest.raises(UnknownName, match="no block"):
        tower.block(0)
    with pytest.raises(UnknownName, match="no layer"):
        tower.resume(tokens, 2, to_layer=5)
    with pytest.raises(ConfigError, match="upwards"):
        tower.resume(tokens, 3, to_layer=2)
    with pytest.raises(ValueError, match="3 inserts for 2 blocks"):
        tower.resume(tokens, 2, inserts=[None] * 3)
    with pytest.raises(UnknownName, match="no block"):
        tower.text.block(99)
