"""Tip-Adapter by its equation, and its trained form from the first training video to the last."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch, FeatureDataset
from coldframe.extract.specs import TowerShape
from coldframe.extract.text import TextFeatures
from coldframe.train_heads.heads import find
from coldframe.train_heads.pipeline import train, untrained
from coldframe.train_heads.specs import HeadContext, TrainSpec

SHAPE = TowerShape(6, 32, 4, 16, (2, 2), 16, 1, 1, 77)
NAMES = ("a", "b", "c")


def build(name, names=NAMES, trained=(), **settings) -> Any:
    head = find(name)
    context = HeadContext(SHAPE, 4, names, lambda: pytest.fail("no tower is needed"), trained)
    return head.build(head.config(**settings), context).eval()


def videos(n=9, seed=0, first=0) -> FeatureBatch:
    frames = 3 * torch.randn(n, 4, 16, generator=torch.Generator().manual_seed(seed))
    ids = tuple(f"{number}.mp4" for number in range(first, first + n))
    return FeatureBatch({"embedding": frames}, torch.ones(n, 4, dtype=torch.bool), torch.arange(n) % 3, ids)


def texts(names=NAMES) -> TextFeatures:
    embedding = normalize(torch.randn(len(names), 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    return TextFeatures(names, ("{}",), embedding, 100.0, "sha")


def unit_mean(batch):
    return normalize(normalize(batch["embedding"], dim=-1).mean(1), dim=-1)


@pytest.mark.parametrize("n", [2, 60])
def test_episodes_by_the_equation(n):
    """By gathering, and for many episodes by looking up all pairs."""
    bank, head = videos(), build("tip_adapter", alpha=2.0, beta=3.0)
    rows = torch.rand(n, 9, generator=torch.Generator().manual_seed(1)).argsort(1)
    support, query = rows[:, :6].unflatten(1, (3, 2)), rows[:, 6:8]
    text = torch.randn(n, 3, 16, generator=torch.Generator().manual_seed(2))
    logits = head.episode_logits(bank, support, query, text)
    x = unit_mean(bank)
    for i in range(n):
        keys = x[support[i].flatten()]  # [W·K, E]
        values = torch.eye(3).repeat_interleave(2, dim=0)  # one-hot, [W·K, W]
        wanted = 100 * x[query[i]] @ normalize(text[i], dim=-1).T
        wanted = wanted + 2 * torch.exp(-3 * (1 - x[query[i]] @ keys.T)) @ values
        torch.testing.assert_close(logits[i], wanted)


def test_shots_are_a_set_and_add_up():
    bank, head = videos(), build("tip_adapter", logit_scale=0.0)
    support, query, text = torch.tensor([[[0, 3], [1, 4]]]), torch.tensor([[2, 8]]), torch.randn(1, 2, 16)
    logits = head.episode_logits(bank, support, query, text)
    torch.testing.assert_close(head.episode_logits(bank, support.flip(-1), query, text), logits)
    each = [head.episode_logits(bank, support[..., k : k + 1], query, text) for k in range(2)]
    torch.testing.assert_close(logits, sum(each))


def test_works_untrained_on_a_store(store, manifest):
    predictor = untrained(store, manifest.class_names, "tip_adapter", device="cpu")
    part = manifest.split("test")
    bank = FeatureDataset(store, part.ids, part.labels, predictor.needs).all()
    support, query, classes = torch.tensor([[[0], [4], [8]]]), torch.tensor([[1, 5, 9]]), torch.tensor([[0, 1, 2]])
    logits = predictor.episode_logits(bank, support.numpy(), query.numpy(), classes.numpy())
    assert logits.shape == (1, 3, 3)
    assert predictor.uses_class_names


def test_keys_are_the_first_training_videos_of_each_class():
    head, batch = build("tip_adapter_f", keys=2).train(), videos(9)
    x = unit_mean(batch)
    head(batch.select(torch.tensor([0, 3, 6, 1])), texts())  # three of class a, one of class b
    torch.testing.assert_close(head.keys[0], x[[0, 3]])
    torch.testing.assert_close(head.keys[1], torch.stack([x[1], torch.zeros(16)]))
    head(batch.select(torch.tensor([1, 2, 4])), texts())  # a key again, and another
    torch.testing.assert_close(head.keys[1], x[[1, 4]])
    torch.testing.assert_close(head.keys[2], torch.stack([x[2], torch.zeros(16)]))
    before = head.keys.clone()
    head.eval()(videos(9, first=9), texts())
    assert torch.equal(head.keys, before)


def test_scores_by_the_equation():
    head, batch = build("tip_adapter_f", keys=3, alpha=2.0, beta=3.0), videos()
    head.train()(batch, texts())
    other = videos(5, seed=1)
    x = unit_mean(other)
    wanted = 100 * x @ texts().embedding.T
    wanted = wanted + 2 * torch.exp(-3 * (1 - torch.einsum("be,cme->bcm", x, head.keys))).sum(-1)
    torch.testing.assert_close(head.eval()(other, texts()).logits, wanted)


def test_classes_without_keys_are_scored_by_name():
    head, names = build("tip_adapter_f", ("c", "new"), trained=NAMES), ("c", "new")
    known = build("tip_adapter_f")
    known.train()(videos(), texts())
    head.load_state_dict(known.state_dict())
    other, text = videos(5, seed=1), texts(names)
    by_name = 100 * unit_mean(other) @ text.embedding.T
    from_keys = head(other, text).logits - by_name
    all_keys = known.eval()(other, texts()).logits - 100 * unit_mean(other) @ texts().embedding.T
    torch.testing.assert_close(from_keys, torch.stack([all_keys[:, 2], torch.zeros(5)], dim=1), atol=1e-5, rtol=1e-5)


def test_keys_learn():
    head, batch = build("tip_adapter_f", keys=2, logit_scale=0.0).train(), videos()
    cross_entropy(head(batch, texts()).logits, batch.labels).backward()
    assert (head.keys.grad.abs().amax(-1) > 0).all()


def test_trains_to_a_checkpoint_and_keys_are_a_function_of_the_seed(store, manifest, tmp_path):
    spec = TrainSpec(epochs=3, batch_size=8, lr=1e-2, val_fraction=0.25)
    whole = train(store, manifest, "tip_adapter_f", spec=spec, out=tmp_path / "whole", device="cpu", quiet=True)
    assert whole.scores["top_1"] > 0.9
    assert (whole.weights["key_videos"] != 0).sum() == whole.n_train
    again = train(store, manifest, "tip_adapter_f", spec=spec, out=tmp_path / "again", device="cpu", quiet=True)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())
    other = replace(spec, seed=1)
    drawn = train(store, manifest, "tip_adapter_f", spec=other, out=tmp_path / "other", device="cpu", quiet=True)
    assert not torch.equal(drawn.weights["key_videos"], whole.weights["key_videos"])


@pytest.mark.parametrize("name", ["tip_adapter", "tip_adapter_f"])
def test_refuses_what_cannot_be(name):
    with pytest.raises(ConfigError, match="impossible beta"):
        find(name).config(beta=-1.0)
