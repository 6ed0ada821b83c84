"""CLIP-FSAR: recorded outputs of the published code, its losses, its three scores, and what may not matter."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import TowerShape
from coldframe.extract.text import TextFeatures
from coldframe.train_heads.alignment import otam
from coldframe.train_heads.clips import Clips
from coldframe.train_heads.heads.clip_fsar import HEAD, Config
from coldframe.train_heads.specs import Episodes, HeadContext

N_VIDEOS, N_FRAMES, WIDTH, N_CLASSES = 18, 6, 16, 6


def bank_of(frames, mask=None) -> FeatureBatch:
    """Video v is of class v % 6."""
    mask = torch.ones(frames.shape[:2], dtype=torch.bool) if mask is None else mask
    labels = torch.arange(len(frames)) % N_CLASSES
    return FeatureBatch({"embedding": frames}, mask, labels, tuple(map(str, range(len(frames)))))


def build(width=WIDTH, n_frames=N_FRAMES, **settings) -> Any:
    torch.manual_seed(0)
    shape = TowerShape(6, 32, 4, width, (2, 2), 16, 1, 1, 77)
    context = HeadContext(shape, n_frames, ("a", "b"), lambda: pytest.fail("no tower is needed"))
    return HEAD.build(replace(Config(hidden=24), **settings), context).eval()


def frames_of(n_videos=N_VIDEOS):
    return torch.randn(n_videos, N_FRAMES, WIDTH, generator=torch.Generator().manual_seed(1))


def texts() -> TextFeatures:
    embedding = normalize(torch.randn(N_CLASSES, WIDTH, generator=torch.Generator().manual_seed(2)), dim=-1)
    return TextFeatures(tuple("abcdef"), ("{}",), embedding, 100.0, "sha")


def episodes(bank, n=4, ways=3, shots=2, n_query=1, seed=0) -> Episodes:
    """Drawn as they are in use: the K videos of a way are of one class, queries are others of those classes."""
    generator = torch.Generator().manual_seed(seed)
    class_ids = torch.rand(n, N_CLASSES, generator=generator).argsort(dim=1)[:, :ways]
    each = len(bank) // N_CLASSES
    picked = torch.rand(n, ways, each, generator=generator).argsort(dim=-1)[..., : shots + n_query]
    rows = picked * N_CLASSES + class_ids[..., None]
    labels = torch.arange(ways).repeat_interleave(n_query).expand(n, -1)
    return Episodes(bank, rows[..., :shots], rows[..., shots:].flatten(1), class_ids, labels)


def scores(head, e: Episodes, text=None):
    text = texts() if text is None else text
    return head.episode_logits(e.bank, e.support, e.query, text.embedding[e.class_ids])


def test_published_code_agrees(recorded):
    for recording in recorded("few-shot metrics"):
        sizes, weights = recording.sizes, recording.named("clip_fsar.weights.layers.0.")
        hidden, width = weights["1.net.0.weight"].shape
        head = build(width, sizes["T"], heads=sizes.get("heads", 8), hidden=hidden, shots="proto_mean")
        names = {
            "0.norm": "norm",
            "0.fn.to_q": "query",
            "0.fn.to_k": "key",
            "0.fn.to_v": "value",
            "0.fn.to_out.0": "out.0",
            "1.net.0": "mlp.0",
            "1.net.3": "mlp.3",
        }
        head.context.load_state_dict(
            {
                f"{names[module]}.{kind}": tensor
                for name, tensor in weights.items()
                for module, _, kind in [name.rpartition(".")]
            }
        )
        query, support, text = recording["query"], recording["support"], recording["clip_fsar.class_text"]
        by_class = torch.argsort(recording["support_labels"], stable=True).unflatten(0, (sizes["way"], sizes["shot"]))
        close = {"atol": 1e-4, "rtol": 0}
        torch.testing.assert_close(head.context(query), recording["clip_fsar.query"], **close)
        shots = Clips(support[by_class].flatten(0, 1))
        alone = head.context.of_clips(shots, text.repeat_interleave(sizes["shot"], dim=0)).frames
        prototype = alone.unflatten(0, by_class.shape).mean(1)
        torch.testing.assert_close(prototype, recording["clip_fsar.prototype"], **close)
        bank = bank_of(torch.cat([support, query]))
        rows = torch.arange(len(query)) + len(support)
        logits = head.episode_logits(bank, by_class[None], rows[None], text[None])
        torch.testing.assert_close(logits[0], recording["clip_fsar.logits"], **close)


def test_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        head = build(512, 8, hidden=2048)
    assert sum(p.numel() for p in head.context.parameters()) == 3_149_824  # 3.15 million


@pytest.mark.parametrize("shots", ["merged", "proto_mean", "dist_mean"])
@pytest.mark.parametrize("metric", ["otam", "bi_mhm", "mean_cosine", "trx"])
def test_any_comparison_finds_the_same_one_episode_at_a_time(metric, shots):
    head, e = build(metric=metric, shots=shots), episodes(bank_of(frames_of()))
    together = scores(head, e)
    assert together.shape == (4, 3, 3)
    for i in range(4):
        one = Episodes(e.bank, *(part[i : i + 1] for part in (e.support, e.query, e.class_ids, e.labels)))
        torch.testing.assert_close(scores(head, one), together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_the_name_joins_the_support_and_not_the_query():
    head, e = build(), episodes(bank_of(frames_of()), shots=1)
    text, frames = texts(), frames_of()
    for n in range(4):
        for w in range(3):
            joined = torch.cat([frames[e.support[n, w, 0]], text.embedding[e.class_ids[n, w]][None]])
            prototype = head.context(joined[None])[:, :-1]
            wanted = otam(head.context(frames[e.query[n]]), prototype, lam=0.5, eps=0.01)
            torch.testing.assert_close(scores(head, e)[n, :, w], wanted[:, 0])


@pytest.mark.parametrize("shots", ["merged", "proto_mean", "dist_mean"])
def test_shots_are_a_set(shots):
    head, e = build(shots=shots), episodes(bank_of(frames_of()))
    flipped = Episodes(e.bank, e.support.flip(-1), e.query, e.class_ids, e.labels)
    torch.testing.assert_close(scores(head, flipped), scores(head, e))
    one, copies = (
        Episodes(e.bank, e.support[..., :1].expand(-1, -1, k), e.query, e.class_ids, e.labels) for k in (1, 5)
    )
    torch.testing.assert_close(scores(head, copies), scores(head, one))


@pytest.mark.parametrize("shots", ["merged", "proto_mean"])
@pytest.mark.parametrize("score", ["metric", "ensemble", "text"])
def test_padding_has_no_influence(shots, score):
    mask = torch.arange(N_FRAMES) < torch.tensor([6, 1, 3, 4, 2, 5] * 3)[:, None]
    head = build(shots=shots, score=score)
    clean, dirty = (
        scores(head, episodes(bank_of(frames_of().masked_fill(~mask[..., None], fill), mask))) for fill in (0, 1e4)
    )
    torch.testing.assert_close(clean, dirty)


def test_ensemble_and_names_alone():
    """p = p_text ** 0.9 · p_metric ** 0.1, the metric's at a temperature of T."""
    e = episodes(bank_of(frames_of()), shots=1)
    by_metric, by_name, together = (scores(build(score=score), e) for score in ("metric", "text", "ensemble"))
    means = frames_of().mean(1)[e.query]  # [n, Q, E]
    text = texts().embedding[e.class_ids]
    torch.testing.assert_close(by_name, cosine_similarity(means[:, :, None], text[:, None], dim=-1))
    p = by_name.softmax(-1) ** 0.9 * (by_metric / N_FRAMES).softmax(-1) ** 0.1
    torch.testing.assert_close(together.exp(), p)


def test_losses_and_what_they_reach():
    head, e = build(class_loss=3.0), episodes(bank_of(frames_of()), n_query=1)
    output = head(e, texts())
    torch.testing.assert_close(output.logits, scores(head, e))
    rows = torch.cat([e.support.flatten(), e.query.flatten()])
    matched = cosine_similarity(frames_of().mean(1)[rows][:, None], texts().embedding[None], dim=-1)
    torch.testing.assert_close(output.losses["classes"], 3 * cross_entropy(matched, rows % N_CLASSES))
    (cross_entropy(output.logits.flatten(0, 1), e.labels.flatten()) + output.losses["classes"]).backward()
    untouched = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched


def test_training_reaches_the_right_answers():
    """Random videos, whose classes only their names tell apart: a layer that reads names fits them."""
    torch.manual_seed(0)
    head, e = build(dropout=0.0, mlp_dropout=0.0).train(), episodes(bank_of(frames_of()), n=2)
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        logits = head(e, texts()).logits
        losses.append(cross_entropy(logits.flatten(0, 1), e.labels.flatten()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[0] > 0.8 * math.log(3)
    assert losses[-1] < 0.3


def test_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="merged or dist_mean or proto_mean"):
        Config(shots="mean")
    with pytest.raises(ConfigError, match="otam or trx"):
        Config(metric="dtw")
    with pytest.raises(ConfigError, match="metric or ensemble or text"):
        Config(score="both")
    with pytest.raises(ConfigError, match="divides 16"):
        build(heads=3)
