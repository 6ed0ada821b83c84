"""Pieces that several heads share."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, gelu, linear

from coldframe.extract.specs import SpecMismatch
from coldframe.train_heads.layers import Adapter, DropPath, cosines, of_frames


def test_an_adapter_adds_nothing_at_first_and_learns_from_its_zeros():
    torch.manual_seed(0)
    adapter, x = Adapter(8, 2), torch.randn(3, 5, 8)
    assert torch.equal(adapter(x), torch.zeros_like(x))
    adapter(x).sum().backward()
    assert adapter.up.weight.grad is not None and adapter.up.weight.grad.abs().max() > 0


def test_an_adapter_is_down_gelu_up():
    torch.manual_seed(0)
    adapter, x = Adapter(8, 2), torch.randn(3, 8)
    with torch.no_grad():
        adapter.up.weight.normal_()
    wanted = linear(gelu(linear(x, adapter.down.weight, adapter.down.bias)), adapter.up.weight)
    torch.testing.assert_close(adapter(x), wanted)
    assert sum(p.numel() for p in Adapter(768, 192).parameters()) == 295_872  # as counted from the paper's table


def test_paths_are_dropped_for_whole_samples_and_keep_their_mean():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    found = drop(x)
    assert ((found == found[:, :1, :1]).all(dim=-1).all(dim=-1)).all()
    assert set(found[:, 0, 0].unique().tolist()) == {0.0, float(torch.tensor(1) / 0.75)}
    assert 0.22 < (found[:, 0, 0] == 0).float().mean() < 0.28
    assert DropPath(0.0)(x) is x
    assert drop.eval()(x) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cosines_are_as_exact_in_a_step_of_less_precision(dtype):
    torch.manual_seed(0)
    videos, texts = torch.randn(2, 1, 4, 32), torch.randn(3, 5, 32)
    with torch.autocast("cpu", dtype):
        found = cosines(videos, texts)
    wanted = cosine_similarity(videos[..., None, :].double(), texts[:, None].double(), dim=-1)
    assert found.shape == (2, 3, 4, 5)
    torch.testing.assert_close(found, wanted.float(), atol=1e-6, rtol=0)


def test_a_table_has_a_row_for_each_frame_or_is_refused():
    table = torch.randn(4, 3)
    assert torch.equal(of_frames(table, 3), table[:3])
    with pytest.raises(SpecMismatch, match="more frames than the head; found 5; expected 4"):
        of_frames(table, 5)
