"""Each hand-written function against the library layers it stands for, and its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import conv1d, layer_norm

from coldframe.train_heads.token_functions import add_displacement, add_neighbours, bin_by_displacement, mix_normalised

GRIDS = [(3, 4), (2, 6), (3, 3), (1, 2), (1, 1)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("n_frames", [1, 2, 5])
def test_neighbours_are_a_depthwise_convolution_and_an_offset(n_frames: int) -> None:
    tokens, kernel, offset = randn(2, n_frames, 3, 4), randn(4, 1, 3, seed=1), randn(n_frames, 4, seed=2)
    rows = rearrange(tokens, "b t s d -> (b s) d t")
    convolved = rearrange(conv1d(rows, kernel, padding=1, groups=4), "(b s) d t -> b t s d", b=2)
    wanted = tokens + convolved + offset[:, None]
    torch.testing.assert_close(add_neighbours(tokens, kernel, offset), wanted)
    torch.testing.assert_close(add_neighbours(tokens, None, offset), tokens + offset[:, None])


def test_gradients_of_neighbours() -> None:
    tokens = randn(2, 4, 3, 2)
    kernel, offset = randn(2, 1, 3, seed=1).requires_grad_(), randn(4, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda k, o: add_neighbours(tokens, k, o), (kernel, offset))
    assert torch.autograd.gradcheck(lambda o: add_neighbours(tokens, None, o), (offset,))


def frozen(width: int, heads: int):
    """A frozen map to queries and keys, with attention sharp enough for displacements to differ."""
    weight = randn(2 * width, width, seed=7, dtype=torch.float32)

    def queries_and_keys(tokens: Tensor) -> tuple[Tensor, Tensor]:
        q, k = rearrange(tokens @ weight.T, "... (two h d) -> two ... h d", two=2, h=heads)
        return q, k

    return queries_and_keys


def gathered(queries_and_keys, below: Tensor, mask: Tensor, tables: tuple[Tensor, Tensor], grid: tuple[int, int]):
    """The cross-frame term word for word: a table row for every pair of patches, [N, N, D]."""
    gh, gw = grid
    n_frames = below.shape[1]
    rows, columns = torch.arange(gh * gw) // gw, torch.arange(gh * gw) % gw
    index = (rows[:, None] - rows + gh - 1) * (2 * gw - 1) + columns[:, None] - columns + gw - 1  # [N, N], query by key
    q, k = queries_and_keys(below)
    total = torch.zeros(*below.shape[:3], tables[0].shape[-1], dtype=tables[0].dtype)
    for table, step in zip(tables, (-1, 1), strict=True):
        for t in range(n_frames):
            if not 0 <= t + step < n_frames:
                continue
            scores = torch.einsum("bqhd,bkhd->bhqk", q[:, t, 1:], k[:, t + step, 1:]) / q.shape[-1] ** 0.5
            attention = scores.softmax(dim=-1).mean(dim=1) * (mask[:, t] & mask[:, t + step])[:, None, None]
            total[:, t, 1:] += torch.einsum("bqk,qkd->bqd", attention.to(table.dtype), table[index])
    return total


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n_frames", [1, 4])
def test_displacement_bins_equal_the_gathered_table(grid: tuple[int, int], n_frames: int) -> None:
    n_tokens, n_rows = 1 + grid[0] * grid[1], (2 * grid[0] - 1) * (2 * grid[1] - 1)
    below = randn(3, n_frames, n_tokens, 8, dtype=torch.float32)
    mask = torch.ones(3, n_frames, dtype=torch.bool)
    mask[2, n_frames // 2 :] = n_frames == 1  # the last video is half padding
    tables = randn(n_rows, 5, seed=1), randn(n_rows, 5, seed=2)
    x = randn(3, n_frames, n_tokens, 5, seed=3)
    bins = bin_by_displacement(frozen(8, 2), below, mask, grid)
    found = add_displacement(x.clone(), bins.double(), *tables, grid)
    torch.testing.assert_close(found, x + gathered(frozen(8, 2), below, mask, tables, grid), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(3, 4), (3, 3)])
def test_gradients_of_displacement(grid: tuple[int, int]) -> None:
    n_tokens, n_rows = 1 + grid[0] * grid[1], (2 * grid[0] - 1) * (2 * grid[1] - 1)
    below, mask = randn(2, 3, n_tokens, 4, dtype=torch.float32), torch.ones(2, 3, dtype=torch.bool)
    bins = bin_by_displacement(frozen(4, 2), below, mask, grid).double()
    x, previous, following = randn(2, 3, n_tokens, 2), randn(n_rows, 2, seed=1), randn(n_rows, 2, seed=2)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, previous, following))
    assert torch.autograd.gradcheck(lambda x, p, f: add_displacement(x.clone(), bins, p, f, grid), inputs)


def composed(x: Tensor, query: Tensor, shift: Tensor, padding: Tensor, eps: float) -> Tensor:
    """mix_normalised from library layers."""
    normed = layer_norm(x, x.shape[-1:], eps=eps)
    logits = (query @ normed.mT + shift[..., None]).masked_fill(padding, float("-inf"))
    return logits.softmax(dim=-1) @ normed


def attention_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    padding = repeat(torch.arange(7) >= 5, "s -> b 1 s", b=2).clone()
    padding[0] = False
    return 3 * randn(2, 7, 6) + 0.5, randn(2, 3, 6, seed=1), randn(2, 3, seed=2), padding


def test_mixture_is_attention_to_normalised_tokens() -> None:
    x, query, shift, padding = attention_inputs()
    mixture, attention = mix_normalised(x, query, shift, padding, 1e-5)
    torch.testing.assert_close(mixture, composed(x, query, shift, padding, 1e-5))
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    assert not attention[1, :, 5:].any()


def test_gradients_of_the_mixture() -> None:
    x, query, shift, padding = attention_inputs()
    inputs = tuple(tensor.requires_grad_() for tensor in (x, query, shift))
    assert torch.autograd.gradcheck(lambda x, q, s: mix_normalised(x, q, s, padding, 1e-5)[0], inputs)
    frozen_tokens = x.detach()
    assert torch.autograd.gradcheck(lambda q: mix_normalised(frozen_tokens, q, shift, padding, 1e-5)[0], (query,))


def test_tokens_without_variance_stay_finite() -> None:
    """The variance is a difference of squares: where it is zero it may come out below."""
    x = torch.full((1, 4, 8), 123.456)
    x[0, 0, 0] += 1
    padding = torch.zeros(1, 1, 4, dtype=torch.bool)
    mixture, _ = mix_normalised(x, torch.ones(1, 2, 8), torch.zeros(1, 2), padding, 1e-5)
    assert mixture.isfinite().all()
