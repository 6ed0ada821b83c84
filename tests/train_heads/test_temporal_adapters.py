"""TED-adapters against their equations, written out."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import conv1d, conv2d

from coldframe.train_heads.temporal_adapters import LocalDifference, TEDAdapter, TEDInsert, TemporalEnhancement

GRID = (2, 3)
SIZES = (2, 5, 1 + GRID[0] * GRID[1], 8)  # B, T, 1+N, D


@pytest.fixture
def x():
    return torch.randn(SIZES, generator=torch.Generator().manual_seed(1))


def moved(module: nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def test_enhancement_convolves_each_place_over_time(x):
    part = moved(TemporalEnhancement(8, 4))
    for place in range(SIZES[2]):
        hidden = part.down(x[:, :, place]).transpose(1, 2)
        mixed = conv1d(hidden, part.conv.weight, part.conv.bias, padding=1, groups=4).transpose(1, 2)
        torch.testing.assert_close(part(x, None)[:, :, place], part.up(mixed), atol=1e-5, rtol=1e-5)


def test_difference_convolves_what_a_frame_changed(x):
    part, patches = moved(LocalDifference(8, 4, GRID)), x[:, :, 1:]
    for t in range(SIZES[1]):
        change = patches[:, t] - patches[:, max(t - 1, 0)]
        image = part.down(change).transpose(1, 2).unflatten(2, GRID)
        mixed = conv2d(image, part.conv.weight, part.conv.bias, padding=1, groups=4).flatten(2).transpose(1, 2)
        torch.testing.assert_close(part(patches, None)[:, t], part.up(mixed), atol=1e-5, rtol=1e-5)


def test_patches_receive_both_and_the_class_token_one(x):
    ted = moved(TEDAdapter(8, 4, GRID))
    enhanced = x + ted.temporal(x, None)
    torch.testing.assert_close(ted(x, None)[:, :, :1], enhanced[:, :, :1])
    torch.testing.assert_close(ted(x, None)[:, :, 1:], enhanced[:, :, 1:] + ted.local(x[:, :, 1:], None))
    torch.testing.assert_close(ted(x[:, :, :1], None), enhanced[:, :, :1], atol=1e-5, rtol=1e-5)


def test_nothing_is_added_at_first_and_convolutions_learn_first(x):
    ted = TEDAdapter(8, 4, GRID)
    assert torch.equal(ted(x, None), x)
    ted(x, None).square().sum().backward()
    taught = {name for name, p in ted.named_parameters() if p.grad is not None and p.grad.any()}
    convolutions = {f"{part}.conv.{leaf}" for part in ("temporal", "local") for leaf in ("weight", "bias")}
    assert taught == convolutions | {"temporal.up.bias", "local.up.bias"}


def test_the_input_stays_as_it_was(x):
    before = x.clone()
    moved(TEDAdapter(8, 4, GRID))(x, torch.ones(SIZES[:2], dtype=torch.bool))
    assert torch.equal(x, before)


@pytest.mark.parametrize("padding", [0.0, 1e4, float("inf")])
def test_padded_frames_are_as_if_they_were_not(x, padding):
    ted, mask = moved(TEDAdapter(8, 4, GRID)), torch.ones(SIZES[:2], dtype=torch.bool)
    mask[:, 3:] = False
    padded = x.masked_fill(~mask[:, :, None, None], padding)
    torch.testing.assert_close(ted(padded, mask)[:, :3], ted(x[:, :3], None), atol=1e-5, rtol=1e-5)


def test_a_frame_after_a_hole_has_not_changed(x):
    ted, mask = moved(TEDAdapter(8, 4, GRID)), torch.ones(SIZES[:2], dtype=torch.bool)
    mask[:, 1] = False
    torch.testing.assert_close(ted(x, mask)[:, 2:], ted(x[:, 2:], None), atol=1e-5, rtol=1e-5)


def test_the_order_of_frames_matters(x):
    ted = moved(TEDAdapter(8, 4, GRID))
    assert not torch.allclose(ted(x.flip(1), None).flip(1), ted(x, None), atol=1e-2)


@pytest.mark.parametrize("both", [False, True])
def test_places_of_a_block(x, both):
    insert = moved(TEDInsert(8, 4, GRID, both))
    assert torch.equal(insert.before_mlp(x, None), insert.pre_mlp(x, None))
    before = insert.before_attention(x, None, None)
    assert torch.equal(before, x) != both
