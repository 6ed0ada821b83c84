"""TRX's comparison and head, against recorded outputs of the published code and a form that joins frames and loops."""

from itertools import combinations
from typing import Any

import pytest
import torch

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import TowerShape
from coldframe.train_heads import relations
from coldframe.train_heads.clips import Clips
from coldframe.train_heads.heads.trx import HEAD, Config
from coldframe.train_heads.relations import TemporalRelations, sinusoids
from coldframe.train_heads.specs import Episodes, HeadContext

SHAPE = TowerShape(6, 32, 4, 16, (2, 2), 16, 1, 1, 77)


def bank_of(frames, mask=None) -> FeatureBatch:
    mask = torch.ones(frames.shape[:2], dtype=torch.bool) if mask is None else mask
    return FeatureBatch({"embedding": frames}, mask, torch.arange(len(frames)), tuple(map(str, range(len(frames)))))


def build(n_frames=6, **settings) -> Any:
    torch.manual_seed(0)
    return HEAD.build(Config(hidden=24, **settings), HeadContext(SHAPE, n_frames, ("a", "b"), lambda: pytest.fail()))


def episodes(n, ways, shots, queries, n_videos, seed=0):
    rows = torch.rand(n, n_videos, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return rows[:, : ways * shots].unflatten(1, (ways, shots)), rows[:, ways * shots : ways * shots + queries]


def frames_of(n_videos=12, n_frames=6, seed=1):
    return torch.randn(n_videos, n_frames, 16, generator=torch.Generator().manual_seed(seed))


def one_by_one(relation, query, shots):
    """The equations as they are written: videos [T, E], tuples joined, one query against one class."""

    def tuples(video):
        return torch.stack([torch.cat([video[t] for t in picked]) for picked in combinations(range(len(video)), n)])

    n = relation.length
    q, s = tuples(query), torch.cat([tuples(shot) for shot in shots])
    attention = (relation.key_norm(relation.key(q)) @ relation.key_norm(relation.key(s)).T / 24**0.5).softmax(-1)
    return -(relation.value(q) - attention @ relation.value(s)).square().sum(-1).mean()


@pytest.mark.parametrize("cardinalities", [(2,), (3,), (2, 3), (1, 4)])
def test_equals_the_equations(cardinalities):
    head, frames = build(cardinalities=cardinalities, positions="published").eval(), frames_of()
    support, query = episodes(3, 2, 2, 3, 12)
    logits = head.episode_logits(bank_of(frames), support, query)
    placed = frames + 0.1 * sinusoids(6, 16)
    for n, q, w in torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2)).tolist():
        each = [one_by_one(r, placed[query[n, q]], placed[support[n, w]]) for r in head.relations.relations]
        torch.testing.assert_close(logits[n, q, w], torch.stack(each).mean(), atol=1e-5, rtol=1e-5)


def test_published_code_agrees(recorded):
    for recording in recorded("few-shot metrics"):
        sizes = recording.sizes
        by_class = torch.argsort(recording["support_labels"], stable=True).unflatten(0, (sizes["way"], sizes["shot"]))
        clips = Clips(torch.cat([recording["support"], recording["query"]]))
        query = torch.arange(len(recording["query"])) + len(recording["support"])
        for length in (2, 3):
            weights = recording.named(f"trx{length}.weights.")
            torch.testing.assert_close(sinusoids(len(weights["pe.pe"][0]), sizes["D"]) * 0.1, weights["pe.pe"][0])
            ours = TemporalRelations(sizes["D"], sizes["T"], (length,), sizes["trx_out"], positions="published").eval()
            names = {"k_linear": "key", "v_linear": "value", "norm_k": "key_norm"}
            state = {
                f"relations.0.{names[module]}.{kind}": tensor
                for name, tensor in weights.items()
                for module, _, kind in [name.partition(".")]
                if module in names
            }
            ours.load_state_dict(state)
            logits = ours(clips, clips, query[None], by_class[None])
            torch.testing.assert_close(logits[0], recording[f"trx{length}.logits"], atol=1e-4, rtol=0)


def test_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        head = TemporalRelations(512, 8)
    assert sum(p.numel() for p in head.parameters()) == 2 * (5 * 512 + 2) * 1152 + 4 * 1152  # 5.9 million


def test_finds_the_same_however_the_work_is_cut(monkeypatch):
    head, bank = build().eval(), bank_of(frames_of(20))
    support, query = episodes(9, 3, 2, 4, 20)
    together = head.episode_logits(bank, support, query)
    monkeypatch.setattr(relations, "FLOATS_AT_ONCE", 1)
    torch.testing.assert_close(head.episode_logits(bank, support, query), together)


def test_shots_are_a_set():
    head, bank = build().eval(), bank_of(frames_of())
    support, query = episodes(5, 2, 3, 2, 12)
    logits = head.episode_logits(bank, support, query)
    torch.testing.assert_close(head.episode_logits(bank, support.flip(-1), query), logits)
    one = head.episode_logits(bank, support[..., :1], query)
    torch.testing.assert_close(head.episode_logits(bank, support[..., :1].expand(-1, -1, 4), query), one)


def test_feels_the_order_of_frames():
    head, frames = build().eval(), frames_of()
    support, query = episodes(3, 2, 1, 2, 12)
    reversed_ = head.episode_logits(bank_of(torch.cat([frames, frames.flip(1)])), support, query + 12)
    assert (reversed_ - head.episode_logits(bank_of(frames), support, query)).abs().min() > 1e-4


def test_padding_has_no_influence():
    """Videos of 1 to 6 frames; a video too short for a tuple is one tuple, its last frame repeated."""
    head, frames = build().eval(), frames_of()
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 4, 2, 5] * 2)[:, None]
    support, query = episodes(5, 3, 2, 3, 12)
    clean, dirty = (
        head.episode_logits(bank_of(frames.masked_fill(~mask[..., None], fill), mask), support, query)
        for fill in (0, 1e4)
    )
    torch.testing.assert_close(clean, dirty)
    longer = bank_of(torch.cat([frames, frames], dim=1), torch.nn.functional.pad(mask, (0, 6)))
    torch.testing.assert_close(head.episode_logits(longer, support, query), clean)
    three = torch.tensor([[[2]]]), torch.tensor([[8]])  # two videos of three frames
    alone = head.episode_logits(bank_of(frames[:, :3]), *three)
    torch.testing.assert_close(head.episode_logits(bank_of(frames, mask), *three), alone)


def test_an_episode_trains_it():
    head, bank = build().train(), bank_of(frames_of())
    support, query = episodes(2, 2, 2, 2, 12)
    given = Episodes(bank, support, query, torch.tensor([[0, 1]] * 2), torch.tensor([[0, 1]] * 2))
    output = head(given, None)
    assert output.logits.shape == (2, 2, 2)
    assert not output.losses
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), given.labels.flatten()).backward()
    untouched = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched


def test_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match=r"41,664 tuples of 3.*Use fewer frames"):
        build(n_frames=64)
    with pytest.raises(ConfigError, match="at least one frame"):
        Config(cardinalities=())
    with pytest.raises(ConfigError, match="matched or published"):
        Config(positions="learned")
