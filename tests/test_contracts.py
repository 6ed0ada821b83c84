"""Every head there is, found by its name, held to what a head promises, with its defaults and with other settings."""

import functools
import importlib
import inspect
from dataclasses import dataclass, field, replace
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
from coldframe.train_heads.specs import Episodes, HeadContext, HeadOutput, HeadSpec

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


@dataclass(frozen=True)
class Case:
    """A head with some settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return ",".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def head(self) -> HeadSpec:
        return heads.find(self.name)

    @property
    def config(self) -> Any:
        return self.head.config(**self.settings)


OTHERS = (
    Case("attentive_pool", {"feature": "cls.2"}),
    Case("clip_fsar", {"metric": "bi_mhm", "shots": "dist_mean", "score": "ensemble"}),
    Case("clip_fsar", {"metric": "trx", "score": "text"}),
    Case("continuous_prompts", {"form": "table", "positions": "published", "prefix": 3, "postfix": 2}),
    Case("continuous_prompts", {"layers": 0, "prefix": 2, "postfix": 0, "checkpoint": True}),
    Case("evl_decoder", {"n_layers": 2, "cross_frame": False, "temporal_conv": False, "qkv_dim": 16}),
    Case("evl_decoder", {"n_layers": 1, "temporal_position": False, "query": "intended"}),
    Case("ez_clip", {"reach": -2}),
    Case("ez_clip", {"reach": -2, "compact": True}),
    Case("ez_clip", {"reach": 2, "prompts": False, "temporal_adapters": True, "checkpoint": True}),
    Case("ez_clip", {"deep": False, "temporal_embedding": True, "template": "actionclip"}),
    Case("ez_clip", {"reach": -1}),
    Case("linear_probe", {"feature": "embedding", "standardise": False}),
    Case("m2_clip", {"reach": -1}),
    Case("m2_clip", {"reach": -2, "places": "both", "scores": "mean", "checkpoint": True}),
    Case("m2_clip", {"reach": 2, "scores": "classifier", "masked_share": 0.0, "double_softmax": True}),
    Case("m2_clip", {"reach": -1, "text_init": "original", "masked_contrastive": True, "text_layers": 2}),
    Case("ma_clip", {"reach": -2, "metric": "bi_mhm", "shots": "dist_mean"}),
    Case("ma_clip", {"reach": -1, "alpha": 0.2}),
    Case("ma_clip", {"reach": 1, "names": False, "checkpoint": True}),
    Case("mean_pool", {"normalise_frames": False}),
    Case("prototypes", {"metric": "bi_mhm", "shots": "proto_mean", "feature": "cls.-1", "normalise": False}),
    Case("temporal_transformer", {"classifier": "text", "positions": "published", "layers": 2}),
    Case("trx", {"cardinalities": (1,), "positions": "published"}),
)
ALL = [Case(name) for name in heads.names()] + list(OTHERS)
CLASSIFIERS = [case for case in ALL if "classify" in case.head.tasks]
EPISODIC = [case for case in ALL if "episodes" in case.head.tasks]


def build(case, n_frames=8) -> Any:
    """A head, every trained tensor away from the zeros and ones it may start at."""
    torch.manual_seed(0)
    module = case.head.build(case.config, context(n_frames)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def batch_for(case, n_videos=3, n_frames=8):
    generator = torch.Generator().manual_seed(1)
    features = {}
    for feature in canonical_features(case.head.features(case.config), SHAPE.layers):
        size = (n_videos, n_frames, *feature_shape(feature, SHAPE, SIZE_PX))
        if feature == "pixels":
            features[feature] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        else:
            features[feature] = torch.randn(size, generator=generator)
    mask = torch.ones(n_videos, n_frames, dtype=torch.bool)
    return FeatureBatch(features, mask, torch.arange(n_videos), tuple(map(str, range(n_videos))))


def text_for(case):
    embedding = nn.functional.normalize(
        torch.randn(5, SHAPE.embed_dim, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    return TextFeatures(CLASSES, ("{}",), embedding, 10.0, "sha") if case.head.needs_text(case.config) else None


def scores(case, module, batch):
    """Logits of a classifier; for an episodic head the first video against the others, each a class of one shot."""
    if case in CLASSIFIERS:
        return module(batch, text_for(case)).logits
    rows, text = torch.arange(len(batch)), text_for(case)
    names = None if text is None else text.embedding[batch.labels][None]
    return module.episode_logits(batch, rows[None, :, None], rows[None], names)[0]


def outputs_of_training(case, module, batch):
    """Everything a training step looks at: a classifier's scores and losses, or those of an episode."""
    if case in CLASSIFIERS:
        return module(batch, text_for(case))
    rows = torch.arange(len(batch))
    episodes = Episodes(batch, rows[None, :, None], rows[None], batch.labels[None], rows[None])
    return module(episodes, text_for(case))


def changed(batch, function):
    return replace(batch, features={name: function(feature) for name, feature in batch.features.items()})


@pytest.mark.parametrize("name", heads.names())
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


@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
@pytest.mark.parametrize("n_videos", [1, 3])
@pytest.mark.parametrize("n_frames", [1, 8])
def test_classifiers_give_a_score_for_each_class(case, n_videos, n_frames):
    output = build(case, n_frames)(batch_for(case, n_videos, n_frames), text_for(case))
    assert isinstance(output, HeadOutput)
    assert output.logits is not None
    assert output.logits.shape == (n_videos, len(CLASSES))
    assert output.logits.isfinite().all()
    assert output.embedding is None or output.embedding.shape[0] == n_videos
    assert all(term.shape == () for term in output.losses.values())


@pytest.mark.parametrize("case", EPISODIC, ids=str)
@pytest.mark.parametrize("n_frames", [1, 8])
def test_episodic_heads_give_a_score_for_each_way(case, n_frames):
    module, bank = build(case, n_frames), batch_for(case, 9, n_frames)
    assert isinstance(module.uses_class_names, bool)
    assert isinstance(module.is_transductive, bool)
    text = torch.randn(4, 3, SHAPE.embed_dim) if module.uses_class_names else None
    support, query = torch.randint(9, (4, 3, 2)), torch.randint(9, (4, 6))
    logits = module.episode_logits(bank, support, query, text)
    assert logits.shape == (4, 6, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_what_is_trained_can_be_trained(case):
    """A gradient reaches every trained parameter and no weight of the tower; a head that is not trained has none."""
    module = build(case)
    trained = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert bool(trained) == case.head.is_trained
    if trained:
        output = outputs_of_training(case, module, batch_for(case))
        sum(output.losses.values(), output.logits.square().sum()).backward()
        untouched = {key for key, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()}
        # The bias of attention keys adds the same to every score of a query and cancels in the softmax. A head may say
        # of others that, as published, they change nothing.
        assert not {key for key in untouched if not key.endswith("key.bias")} - set(getattr(module, "idle", ()))
    assert all(parameter.grad is None for parameter in tower().model.parameters())


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("is_training", [False, True])
def test_inputs_are_left_as_they_were(case, is_training):
    module, batch = build(case).train(is_training), batch_for(case)
    before = {feature: tensor.clone() for feature, tensor in batch.features.items()}
    mask = batch.mask.clone()
    scores(case, module, batch)
    assert torch.equal(batch.mask, mask)
    for feature, tensor in batch.features.items():
        assert torch.equal(tensor, before[feature])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_order_of_videos_is_the_order_of_scores(case):
    module, batch, order = build(case), batch_for(case), torch.tensor([2, 0, 1])
    expected = scores(case, module, batch)[order]
    if case in EPISODIC:
        expected = expected[:, order]  # the ways are permuted as well
    torch.testing.assert_close(scores(case, module, batch.select(order)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_masked_frames_have_no_influence(case):
    module, batch = build(case), batch_for(case)
    batch.mask[0, 5:] = False
    batch.mask[1, 1:] = False
    padding = ~batch.mask

    def padded_with(value):
        def pad(feature):
            fill = min(value, 255) if feature.dtype == torch.uint8 else value
            return feature.masked_fill(padding.view(*padding.shape, *[1] * (feature.ndim - 2)), fill)

        return scores(case, module, changed(batch, pad))

    torch.testing.assert_close(padded_with(1e4), padded_with(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_trained_tensors_are_all_that_a_head_remembers(case):
    """Put into a head built anew, they make the same head."""
    module = build(case)
    torch.manual_seed(9)
    again = case.head.build(case.config, context()).eval()
    assert not again.load_state_dict(trained_tensors(module), strict=False).unexpected_keys
    batch = batch_for(case)
    assert torch.equal(scores(case, again, batch), scores(case, module, batch))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_step_of_less_precision_is_near_one_of_float32(case):
    """Scores, losses and gradients; class texts that are kept are not kept in less."""
    module, batch = build(case), batch_for(case)
    wanted = scores(case, module, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(case, module, batch).float()
        with torch.no_grad():
            scores(case, module, batch)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max().clamp_min(1)
    with torch.no_grad():
        torch.testing.assert_close(scores(case, module, batch), wanted, atol=1e-5, rtol=1e-5)
    if case.head.is_trained:
        with torch.autocast("cpu", torch.bfloat16):
            output = outputs_of_training(case, module.train(), batch)
        logits = () if output.logits is None else (output.logits.float().square().sum(),)
        assert all(term.dtype == torch.float32 for term in output.losses.values())
        sum((*output.losses.values(), *logits), torch.zeros(())).backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
