"""Every head there is, found by its name, held to what a head promises."""

import functools
import importlib
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import canonical_features, feature_shape
from coldframe.extract.text import TextFeatures
from coldframe.extract.towers import Tower
from coldframe.train_heads import heads
from coldframe.train_heads.checkpoint import trained_tensors
from coldframe.train_heads.specs import Episodes, HeadContext, HeadOutput

SIZE_PX = 12
CLASSES = ("run", "jump", "swim", "wave", "sit")


@functools.cache
def tower() -> Tower:
    """A real CLIP with random weights, small."""
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers=4, width=32, head_width=8, patch_size=4, image_size=SIZE_PX)
    text = CLIPTextCfg(width=16, heads=2, layers=2)
    return Tower(CLIP(16, vision, text, quick_gelu=True), device="cpu")


SHAPE = tower().shape


def context(n_frames=8):
    return HeadContext(SHAPE, n_frames, CLASSES, tower)


def build(name, n_frames=8) -> Any:
    """A head from its defaults, every trained tensor away from the zeros and ones it may start at."""
    head = heads.find(name)
    torch.manual_seed(0)
    module = head.build(head.config(), context(n_frames)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def batch_for(name, n_videos=3, n_frames=8):
    head, generator = heads.find(name), torch.Generator().manual_seed(1)
    features = {}
    for feature in canonical_features(head.features(head.config()), SHAPE.layers):
        size = (n_videos, n_frames, *feature_shape(feature, SHAPE, SIZE_PX))
        if feature == "pixels":
            features[feature] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        else:
            features[feature] = torch.randn(size, generator=generator)
    mask = torch.ones(n_videos, n_frames, dtype=torch.bool)
    return FeatureBatch(features, mask, torch.arange(n_videos), tuple(map(str, range(n_videos))))


def text_for(name):
    head = heads.find(name)
    embedding = nn.functional.normalize(
        torch.randn(5, SHAPE.embed_dim, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    return TextFeatures(CLASSES, ("{}",), embedding, 10.0, "sha") if head.needs_text(head.config()) else None


ALL = heads.names()
CLASSIFIERS = [name for name in ALL if "classify" in heads.find(name).tasks]
EPISODIC = [name for name in ALL if "episodes" in heads.find(name).tasks]


def scores(name, module, batch):
    """Logits of a classifier; for an episodic head the first video against the others, each a class of one shot."""
    if name in CLASSIFIERS:
        return module(batch, text_for(name)).logits
    rows, text = torch.arange(len(batch)), text_for(name)
    names = None if text is None else text.embedding[batch.labels][None]
    return module.episode_logits(batch, rows[None, :, None], rows[None], names)[0]


def outputs_of_training(name, module, batch):
    """Everything a training step looks at: a classifier's scores and losses, or those of an episode."""
    if name in CLASSIFIERS:
        return module(batch, text_for(name))
    rows = torch.arange(len(batch))
    episodes = Episodes(batch, rows[None, :, None], rows[None], batch.labels[None], rows[None])
    return module(episodes, text_for(name))


def changed(batch, function):
    return replace(batch, features={name: function(feature) for name, feature in batch.features.items()})


@pytest.mark.parametrize("name", ALL)
def test_says_what_it_is(name):
    head = heads.find(name)
    module = importlib.import_module(f"coldframe.train_heads.heads.{name}")
    assert head is module.HEAD
    assert head.source
    assert head.tasks
    assert head.tasks <= {"classify", "episodes"}
    assert {"Source:", "Differs:"} <= set((module.__doc__ or "").split())
    assert "cuda" not in inspect.getsource(module).lower()
    canonical_features(head.features(head.config()), SHAPE.layers)  # raises for a feature that no tower has


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("n_videos", [1, 3])
@pytest.mark.parametrize("n_frames", [1, 8])
def test_classifiers_give_a_score_for_each_class(name, n_videos, n_frames):
    output = build(name, n_frames)(batch_for(name, n_videos, n_frames), text_for(name))
    assert isinstance(output, HeadOutput)
    assert output.logits is not None
    assert output.logits.shape == (n_videos, len(CLASSES))
    assert output.logits.isfinite().all()
    assert output.embedding is None or output.embedding.shape[0] == n_videos
    assert all(term.shape == () for term in output.losses.values())


@pytest.mark.parametrize("name", EPISODIC)
@pytest.mark.parametrize("n_frames", [1, 8])
def test_episodic_heads_give_a_score_for_each_way(name, n_frames):
    module, bank = build(name, n_frames), batch_for(name, 9, n_frames)
    assert isinstance(module.uses_class_names, bool)
    assert isinstance(module.is_transductive, bool)
    text = torch.randn(4, 3, SHAPE.embed_dim) if module.uses_class_names else None
    support, query = torch.randint(9, (4, 3, 2)), torch.randint(9, (4, 6))
    logits = module.episode_logits(bank, support, query, text)
    assert logits.shape == (4, 6, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_what_is_trained_can_be_trained(name):
    """A gradient reaches every trained parameter and no weight of the tower; a head that is not trained has none."""
    module, head = build(name), heads.find(name)
    trained = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert bool(trained) == head.is_trained
    if trained:
        output = outputs_of_training(name, module, batch_for(name))
        sum(output.losses.values(), output.logits.logsumexp(-1).square().sum()).backward()
        untouched = {key for key, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()}
        # The bias of attention keys adds the same to every score of a query and cancels in the softmax. A head may say
        # of others that, as published, they change nothing.
        assert not {key for key in untouched if not key.endswith("key.bias")} - set(getattr(module, "idle", ()))
    assert all(parameter.grad is None for parameter in tower().model.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("is_training", [False, True])
def test_inputs_are_left_as_they_were(name, is_training):
    module, batch = build(name).train(is_training), batch_for(name)
    before = {feature: tensor.clone() for feature, tensor in batch.features.items()}
    mask = batch.mask.clone()
    scores(name, module, batch)
    assert torch.equal(batch.mask, mask)
    for feature, tensor in batch.features.items():
        assert torch.equal(tensor, before[feature])


@pytest.mark.parametrize("name", ALL)
def test_order_of_videos_is_the_order_of_scores(name):
    module, batch, order = build(name), batch_for(name), torch.tensor([2, 0, 1])
    expected = scores(name, module, batch)[order]
    if name in EPISODIC:
        expected = expected[:, order]  # the ways are permuted as well
    torch.testing.assert_close(scores(name, module, batch.select(order)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_masked_frames_have_no_influence(name):
    module, batch = build(name), batch_for(name)
    batch.mask[0, 5:] = False
    batch.mask[1, 1:] = False
    padding = ~batch.mask

    def padded_with(value):
        def pad(feature):
            fill = min(value, 255) if feature.dtype == torch.uint8 else value
            return feature.masked_fill(padding.view(*padding.shape, *[1] * (feature.ndim - 2)), fill)

        return scores(name, module, changed(batch, pad))

    torch.testing.assert_close(padded_with(1e4), padded_with(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_trained_tensors_are_all_that_a_head_remembers(name):
    """Put into a head built anew, they make the same head."""
    module, head = build(name), heads.find(name)
    torch.manual_seed(9)
    again = head.build(head.config(), context()).eval()
    assert not again.load_state_dict(trained_tensors(module), strict=False).unexpected_keys
    batch = batch_for(name)
    assert torch.equal(scores(name, again, batch), scores(name, module, batch))
