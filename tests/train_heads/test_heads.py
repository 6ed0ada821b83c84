"""What each head computes, against worked numbers and recorded outputs; test_contracts.py has what all share."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from coldframe.data_manifests.errors import ConfigError, UnknownName
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import TowerShape
from coldframe.extract.text import TextFeatures
from coldframe.train_heads.heads import find, names
from coldframe.train_heads.heads.attentive_pool import AttentivePool
from coldframe.train_heads.heads.linear_probe import Standardise
from coldframe.train_heads.heads.temporal_transformer import TemporalTransformer
from coldframe.train_heads.layers import QuickGELU, masked_mean
from coldframe.train_heads.specs import HeadContext


def batch_of(mask=None, **features) -> FeatureBatch:
    n_videos, n_frames = next(iter(features.values())).shape[:2]
    mask = torch.ones(n_videos, n_frames, dtype=torch.bool) if mask is None else mask
    named = {name.replace("_", "."): tensor for name, tensor in features.items()}
    return FeatureBatch(named, mask, torch.zeros(n_videos, dtype=torch.int64), tuple(map(str, range(n_videos))))


def texts(embedding, logit_scale=1.0) -> TextFeatures:
    return TextFeatures(tuple(map(str, range(len(embedding)))), ("{}",), embedding, logit_scale, "sha")


def context(**sizes) -> HeadContext:
    shape: dict[str, Any] = {"layers": 6, "width": 32, "heads": 4, "embed_dim": 16, "grid": (2, 2)} | sizes
    text: dict[str, Any] = {"text_width": 16, "text_layers": 1, "text_heads": 1, "context_length": 77}
    return HeadContext(TowerShape(**shape, **text), 8, ("a", "b", "c"), tower=lambda: pytest.fail("no tower is needed"))


def build(name, **settings) -> Any:
    head = find(name)
    torch.manual_seed(0)
    return head.build(head.config(**settings), context()).eval()


def test_find_lists_the_choices():
    assert {"mean_pool", "linear_probe", "attentive_pool", "temporal_transformer", "prototypes"} <= set(names())
    with pytest.raises(UnknownName, match="mean_pool"):
        find("mean_pol")


def test_find_takes_a_module_of_your_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "good.py").write_text("from coldframe.train_heads.heads.mean_pool import HEAD\n")
    (tmp_path / "mine" / "empty.py").write_text("")
    (tmp_path / "mine" / "broken.py").write_text("import no_such_library_at_all\n")
    assert find("mine.good") is find("mean_pool")
    for name in ("mine.absent", "no_such.thing", "mine.empty", ".mine", "mine..good", "mine.", "./mine.py"):
        with pytest.raises(UnknownName):
            find(name)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        find("mine.broken")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("linear_probe", {"feature": "tokens.-1"}),
        ("attentive_pool", {"feature": "pixels"}),
        ("temporal_transformer", {"positions": "sinusoidal"}),
        ("temporal_transformer", {"classifier": "cosine"}),
        ("temporal_transformer", {"layers": 0}),
        ("prototypes", {"metric": "dtw"}),
        ("prototypes", {"shots": "sum"}),
        ("prototypes", {"lam": 0.0}),
        ("prototypes", {"feature": "tokens.2"}),
        ("attentive_pool", {"heads": 0}),
        ("attentive_pool", {"dropout": 1.0}),
        ("temporal_transformer", {"heads": -1}),
        ("temporal_transformer", {"dropout": float("nan")}),
        ("evl_decoder", {"dropout": -0.1}),
        ("evl_decoder", {"mlp_ratio": 0}),
        ("evl_decoder", {"qkv_dim": 0}),
    ],
)
def test_impossible_settings_are_refused(name, settings):
    with pytest.raises(ConfigError):
        find(name).config(**settings)


@pytest.mark.parametrize("name", ["attentive_pool", "temporal_transformer"])
def test_a_width_that_does_not_divide_is_refused(name):
    with pytest.raises(ConfigError, match=r"share its width.*Set heads to a number that divides"):
        build(name, heads=5)


def test_quick_gelu_and_masked_mean():
    assert QuickGELU()(torch.tensor(2.0)).item() == pytest.approx(2 / (1 + 2.718281828459045**-3.404))
    frames = torch.tensor([[[1.0], [3.0], [torch.inf]], [[5.0], [7.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert masked_mean(frames, mask).tolist() == [[2.0], [7.0]]


def test_mean_pool_by_hand():
    frames = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    batch, text = batch_of(embedding=frames), texts(torch.tensor([[2.0, 0.0], [0.0, -1.0]]), logit_scale=10.0)
    half = 10 * 0.5**0.5
    torch.testing.assert_close(build("mean_pool")(batch, text).logits, torch.tensor([[half, -half]]))
    raw = build("mean_pool", normalise_frames=False)(batch, text)
    torch.testing.assert_close(raw.embedding, torch.tensor([[1.5, 0.5]]))
    torch.testing.assert_close(raw.logits, torch.tensor([[30, -10.0]]) / 10**0.5)


def test_standardise_gathers_the_moments_of_all_it_saw():
    data = 3 + 2 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    layer = Standardise(4)
    torch.testing.assert_close(layer.eval()(data), data, atol=1e-4, rtol=1e-4)  # has seen nothing: the identity
    layer.train()
    for part in data.split([7, 1, 30, 12]):
        layer(part)
    torch.testing.assert_close(layer.mean, data.mean(0))
    torch.testing.assert_close(layer.variance, data.var(0, correction=0))
    torch.testing.assert_close(layer.eval()(data).std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_attentive_pool_equals_the_textbook_form():
    """The same attention with keys and values of every token, as nn.MultiheadAttention computes it."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 3, 5, 32, generator=generator)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    head = AttentivePool("tokens.6", 32, 3, heads=4, dropout=0.0).eval()
    key = torch.randn(32, 32, generator=generator) / 32**0.5
    query = torch.randn(32, generator=generator)
    with torch.no_grad():  # each head's learned product is a query times its slice of the key projection
        head.query.copy_(torch.einsum("hv,hvd->hd", query.view(4, 8), key.view(4, 8, 32)) * (32 / 8) ** 0.5)

    textbook = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        textbook.in_proj_weight.copy_(torch.cat([torch.eye(32), key, head.value.weight]))
        textbook.in_proj_bias.copy_(torch.cat([torch.zeros(32), torch.ones(32), head.value.bias]))  # a key bias cancels
        textbook.out_proj.weight.copy_(torch.eye(32))
    flat = nn.functional.layer_norm(tokens, (32,)).flatten(1, 2)
    padding = ~mask.repeat_interleave(5, dim=1)
    expected, _ = textbook(query.expand(2, 1, 32), flat, flat, key_padding_mask=padding)
    pooled = head.pool(flat, ~padding)
    torch.testing.assert_close(pooled, expected[:, 0], atol=1e-5, rtol=1e-5)


def test_attentive_pool_starts_as_the_mean_and_is_blind_to_order():
    tokens = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(2))
    head = build("attentive_pool")
    flat = nn.functional.layer_norm(tokens, (32,)).flatten(1, 2)
    torch.testing.assert_close(head.pool(flat, torch.ones(2, 15, dtype=torch.bool)), head.value(flat.mean(1)))
    nn.init.normal_(head.query)
    torch.testing.assert_close(head(batch_of(tokens_6=tokens)).logits, head(batch_of(tokens_6=tokens.flip(1))).logits)


@pytest.mark.parametrize(
    ("name", "feature"), [("attentive_pool", "cls.-1"), ("attentive_pool", "embedding"), ("linear_probe", "embedding")]
)
def test_features_of_one_vector_a_frame(name, feature):
    head = build(name, feature=feature)
    width = 32 if feature == "cls.-1" else 16
    stored = feature.replace("-1", "6").replace(".", "_")
    assert head(batch_of(**{stored: torch.randn(2, 4, width)})).logits.shape == (2, 3)


def test_temporal_transformer_feels_position_from_the_start():
    frames = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(3)) * 9
    moves = {}
    for positions in ("matched", "published"):
        head = build("temporal_transformer", positions=positions)
        forward, backward = (head.embed(f, torch.ones(4, 8, dtype=torch.bool)) for f in (frames, frames.flip(1)))
        moves[positions] = ((forward - backward).norm() / forward.norm()).item()
    assert moves["matched"] > 0.1
    assert moves["published"] < 0.01
    matched = build("temporal_transformer")
    assert matched.frames.position.std().item() == pytest.approx(1, abs=0.1)
    mask = torch.ones(4, 8, dtype=torch.bool)
    torch.testing.assert_close(matched.embed(frames, mask), matched.embed(frames * 100, mask))  # inputs at unit RMS


def test_temporal_transformer_scores_new_classes_by_their_names():
    head = build("temporal_transformer", classifier="text")
    batch = batch_of(embedding=torch.randn(2, 8, 16))
    new = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    output = head(batch, texts(new))
    assert output.logits.shape == (2, 5)
    torch.testing.assert_close(output.logits, nn.functional.normalize(output.embedding, dim=-1) @ new.T / 0.07)


def test_temporal_transformer_has_the_published_size():
    def count(layers):
        head = TemporalTransformer(
            16, 512, None, layers=layers, heads=8, dropout=0.0, positions="published", logit_scale=1 / 0.07
        )
        return sum(p.numel() for p in head.parameters())

    assert count(1) == 16 * 512 + 3_152_384
    assert count(2) - count(1) == 3_152_384


def test_temporal_transformer_agrees_with_published_code(golden):
    n_checked = 0
    for path in sorted(golden.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if file.metadata()["what"] == "Efficient-Prompt":
                recorded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                check_recorded(recorded, json.loads(file.metadata()["config"]))
                n_checked += 1
    if not n_checked:
        pytest.skip(f"no recorded Efficient-Prompt in {golden}")


def check_recorded(recorded, config):
    head = TemporalTransformer(
        config["T"],
        config["embed"],
        None,
        layers=config["temporal_layers"],
        heads=config["temporal_heads"],
        dropout=0.0,
        positions="published",
        logit_scale=1 / 0.07,
    ).eval()
    weights = {
        key.replace("head.temporalEmbedding.weight", "frames.position").replace(
            "head.temporalModelling.resblocks", "frames.blocks"
        ): v
        for key, v in recorded.items()
        if key.startswith("head.temporal")
    }
    head.load_state_dict(weights)
    output = head(batch_of(embedding=recorded["frame_embeddings"]), texts(recorded["text_embedding"]))
    torch.testing.assert_close(output.embedding, recorded["video_embedding"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits, recorded["logits_normalised_0.07"], atol=1e-4, rtol=1e-4)


def bank_of(frames, mask=None) -> FeatureBatch:
    return batch_of(mask, embedding=frames)


def episodes(n, ways, shots, queries, n_videos, seed=0):
    """Rows of a bank, support [n, W, K] and query [n, Q], distinct in an episode."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(n, n_videos, generator=generator).argsort(dim=1)[:, : ways * shots + queries]
    return rows[:, : ways * shots].unflatten(1, (ways, shots)), rows[:, ways * shots :]


@pytest.mark.parametrize("metric", ["mean_cosine", "otam", "bi_mhm"])
def test_prototypes_find_the_same_however_the_work_is_cut(metric, monkeypatch):
    """A look-up in the matrix of all pairs, chunks of episodes, and one episode at a time."""
    frames = torch.randn(20, 4, 16, generator=torch.Generator().manual_seed(1))
    support, query = episodes(40, 3, 2, 6, n_videos=20)
    head = build("prototypes", metric=metric)
    looked_up = head.episode_logits(bank_of(frames), support, query)  # 20² pairs are fewer than 40 · 36
    alone = [head.episode_logits(bank_of(frames), support[i : i + 1], query[i : i + 1]) for i in range(40)]
    assert looked_up.shape == (40, 6, 3)
    torch.testing.assert_close(looked_up, torch.cat(alone))
    monkeypatch.setattr("coldframe.train_heads.comparisons.PAIRS_AT_ONCE", 100)
    torch.testing.assert_close(head.episode_logits(bank_of(frames), support[:7], query[:7]), looked_up[:7])


@pytest.mark.parametrize("metric", ["mean_cosine", "otam", "bi_mhm"])
@pytest.mark.parametrize("shots", ["dist_mean", "proto_mean"])
def test_copies_of_one_shot_change_nothing(metric, shots):
    frames = torch.randn(20, 8, 16, generator=torch.Generator().manual_seed(2))
    support, query = episodes(10, 5, 1, 5, n_videos=20)
    head = build("prototypes", metric=metric, shots=shots)
    one = head.episode_logits(bank_of(frames), support, query)
    torch.testing.assert_close(head.episode_logits(bank_of(frames), support.expand(10, 5, 5), query), one)


@pytest.mark.parametrize("metric", ["mean_cosine", "otam", "bi_mhm"])
@pytest.mark.parametrize("shots", ["dist_mean", "proto_mean"])
def test_prototypes_of_ragged_videos_ignore_padding(metric, shots):
    frames = torch.randn(12, 6, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 4, 2, 5] * 2)[:, None]
    support, query = episodes(5, 3, 2, 3, n_videos=12)
    head = build("prototypes", metric=metric, shots=shots)
    clean = head.episode_logits(bank_of(frames.masked_fill(~mask[..., None], 0), mask), support, query)
    dirty = head.episode_logits(bank_of(frames.masked_fill(~mask[..., None], 1e4), mask), support, query)
    torch.testing.assert_close(clean, dirty)
    longer = torch.cat([frames, torch.zeros(12, 2, 16)], dim=1), nn.functional.pad(mask, (0, 2))
    torch.testing.assert_close(head.episode_logits(bank_of(*longer), support, query), clean)


def test_prototypes_of_a_mean_shot_by_hand():
    """Shots [1, 0] and [0, 1]: their mean is at 45°, so a query at 45° has cosine 1 with it and 0.71 with each."""
    half = 0.5**0.5
    frames = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[half, half]]])
    support, query = torch.tensor([[[0, 1]]]), torch.tensor([[2]])
    for shots, expected in (("dist_mean", half), ("proto_mean", 1.0)):
        head = build("prototypes", metric="mean_cosine", shots=shots)
        assert head.episode_logits(bank_of(frames), support, query).item() == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["mean_cosine", "otam", "bi_mhm"])
def test_random_features_are_right_by_chance(metric):
    frames = torch.randn(400, 8, 8, generator=torch.Generator().manual_seed(4))
    support, query = episodes(10_000, 5, 1, 5, n_videos=400)
    right = build("prototypes", metric=metric).episode_logits(bank_of(frames), support, query).argmax(
        -1
    ) == torch.arange(5)
    assert 100 * right.float().mean().item() == pytest.approx(20, abs=0.4)


def test_prototypes_agree_with_published_code(golden):
    n_checked = 0
    for path in sorted(golden.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if file.metadata()["what"] != "few-shot metrics":
                continue
            recorded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            config = json.loads(file.metadata()["config"])
        bank = bank_of(torch.cat([recorded["support"], recorded["query"]]))
        by_class = torch.argsort(recorded["support_labels"], stable=True).unflatten(0, (config["way"], config["shot"]))
        query = torch.arange(len(recorded["query"])) + len(recorded["support"])
        for settings, name in (
            ({"metric": "otam", "lam": 0.1, "eps": 0.01}, "otam_lambda0.1.logits"),
            ({"metric": "otam", "lam": 0.5, "eps": 0.01}, "otam_lambda0.5.logits"),
            ({"metric": "bi_mhm"}, "bi_mhm.logits"),
        ):
            logits = build("prototypes", normalise=False, **settings).episode_logits(bank, by_class[None], query[None])
            torch.testing.assert_close(logits[0], recorded[name], atol=1e-4, rtol=0)
        n_checked += 1
    if not n_checked:
        pytest.skip(f"no recorded few-shot metrics in {golden}")
