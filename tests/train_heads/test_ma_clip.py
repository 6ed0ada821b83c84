"""MA-CLIP: the paper's counts, its blocks as they are drawn, its two roles, losses and scores; and what may not matter."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from einops import repeat
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, gelu, linear, normalize, rms_norm

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import SpecMismatch
from coldframe.extract.text import TextFeatures
from coldframe.extract.towers import Tower
from coldframe.train_heads.alignment import otam
from coldframe.train_heads.clips import Clips
from coldframe.train_heads.heads.ma_clip import HEAD, Config, PrototypeLayer
from coldframe.train_heads.pipeline import train
from coldframe.train_heads.specs import Episodes, EpisodeTraining, HeadContext, TrainSpec

N_FRAMES, N_VIDEOS, N_CLASSES, NAMES = 4, 12, 4, ("run", "jump", "swim", "wave")
REACHES = (0, -2, -1)


@cache
def tower() -> Tower:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=4, image_size=8)
    return Tower(CLIP(16, vision, CLIPTextCfg(width=16, heads=2, layers=1), quick_gelu=True), device="cpu")


def build(seed=0, shaken=True, **settings) -> Any:
    """A head with every trained tensor away from the zeros it starts at, unless it is not to be shaken."""
    torch.manual_seed(seed)
    context = HeadContext(tower().shape, N_FRAMES, NAMES, tower)
    module: Any = HEAD.build(replace(Config(hidden=24), **settings), context)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * shaken * torch.randn_like(parameter))
    return module.eval()


@cache
def pixels() -> torch.Tensor:
    size = (N_VIDEOS, N_FRAMES, 3, 8, 8)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def bank_of(reach, mask=None, fill=None) -> FeatureBatch:
    """Video v is of class v % 4; the same pixels as every reach wants them."""
    frames = pixels().flatten(0, 1)
    feature = {0: "pixels", -2: "tokens.2", -1: "embedding"}[reach]
    found = tower().encode_frames(frames, [feature])[feature].unflatten(0, (N_VIDEOS, N_FRAMES))
    mask = torch.ones(N_VIDEOS, N_FRAMES, dtype=torch.bool) if mask is None else mask
    if fill is not None:
        found = found.masked_fill(~mask.view(*mask.shape, *[1] * (found.ndim - 2)), fill)
    labels = torch.arange(N_VIDEOS) % N_CLASSES
    return FeatureBatch({feature: found}, mask, labels, tuple(map(str, range(N_VIDEOS))))


def texts() -> TextFeatures:
    embedding = normalize(torch.randn(N_CLASSES, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    return TextFeatures(NAMES, ("{}",), embedding, 100.0, "sha")


def episodes(bank, n=3, ways=3, shots=2, seed=0) -> Episodes:
    """Drawn as in use: the K videos of a way are of one class, and one query of each."""
    generator = torch.Generator().manual_seed(seed)
    class_ids = torch.rand(n, N_CLASSES, generator=generator).argsort(dim=1)[:, :ways]
    picked = torch.rand(n, ways, N_VIDEOS // N_CLASSES, generator=generator).argsort(dim=-1)[..., : shots + 1]
    rows = picked * N_CLASSES + class_ids[..., None]
    return Episodes(bank, rows[..., :shots], rows[..., shots], class_ids, torch.arange(ways).expand(n, -1))


def scores(head, e: Episodes):
    return head.episode_logits(e.bank, e.support, e.query, texts().embedding[e.class_ids])


def total(output) -> torch.Tensor:
    return torch.stack(list(output.losses.values())).sum()


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("grid", [(7, 7), (14, 14)])
def test_has_the_parameters_of_the_paper(grid):
    """Table 4: 18.54 million, of a ViT-B of either patch size; 3.15 million where the encoder is frozen."""
    sizes = {"layers": 12, "width": 768, "heads": 12, "embed_dim": 512, "grid": grid}
    context = HeadContext(replace(tower().shape, **sizes), 8, NAMES, tower)
    with torch.device("meta"):
        assert n_parameters(HEAD.build(Config(), context)) == 18_535_680
        assert n_parameters(HEAD.build(Config(reach=-1), context)) == 3_150_336
        one_block = 3 * 295_872 + 393_984
        assert n_parameters(HEAD.build(Config(reach=-2), context)) == 3_150_336 + 8 * 768 + one_block


# ---- the blocks


def as_drawn(head, tokens, text, layers):
    """The block of figure 3, all tokens of one video [T, 1+N, D] through everything, and the first 1+N kept."""

    def adapter(module, x):
        return linear(gelu(linear(x, module.down.weight, module.down.bias)), module.up.weight, module.up.bias)

    z, n_tokens = tokens, tokens.shape[1]
    for layer, adapters in zip(layers, head.tower.blocks, strict=True):
        block = tower().visual.transformer.resblocks[layer - 1]

        def attention(x, block=block):
            y = block.ln_1(x)
            return block.attn(y, y, y, need_weights=False)[0]

        c = z[:, 0][None]  # [1, T, D]
        tokens_read = [z, (c + adapter(adapters.temporal, attention(c)))[0][:, None]]
        if text is not None:
            tokens_read.append(adapters.text(text).expand(len(z), 1, -1))
        x = torch.cat(tokens_read, dim=1)  # [T, N+2 or N+3, D]
        attended = attention(x)
        y = (x + attended + adapter(adapters.spatial, attended))[:, :n_tokens]
        z = y + block.mlp(block.ln_2(y)) + head.config.joint_scale * adapter(adapters.joint, block.ln_2(y))
    return tower().project(z)


@pytest.mark.parametrize(("reach", "layers"), [(0, (1, 2, 3)), (-2, (3,))])
@pytest.mark.parametrize("is_support", [True, False])
def test_blocks_are_as_drawn(reach, layers, is_support):
    head, bank = build(reach=reach), bank_of(reach)
    text = rms_norm(texts().embedding[bank.labels], (16,)) if is_support else None
    found = head.tower(bank, text)
    position = head.tower.position
    tokens = tower().start(bank["pixels"], position[:, 0]) if reach == 0 else bank["tokens.2"] + position
    for video in range(3):
        wanted = as_drawn(head, tokens[video], None if text is None else text[video], layers)
        torch.testing.assert_close(found[video], wanted, atol=1e-5, rtol=1e-4)


def test_a_new_head_is_near_the_frozen_tower_and_not_it():
    """Adapters add nothing yet, but the class token is there twice and a support's name is read: as drawn."""
    head, bank = build(shaken=False), bank_of(0)
    frozen = bank_of(-1)["embedding"]
    names = rms_norm(texts().embedding[bank.labels], (16,))
    for text in (None, names):
        found = head.tower(bank, text)
        assert (found - frozen).abs().amax() > 1e-3
        assert cosine_similarity(found, frozen, dim=-1).min() > 0.5
    deepest = build(shaken=False, reach=3)  # as many frozen blocks as there are: nothing but the projection is left
    batch = FeatureBatch({"tokens.3": _tokens(3)}, bank.mask, bank.labels, bank.video_ids)
    torch.testing.assert_close(deepest.tower(batch, None), frozen, atol=1e-5, rtol=1e-5)


def _tokens(layer):
    name = f"tokens.{layer}"
    return tower().encode_frames(pixels().flatten(0, 1), [name])[name].unflatten(0, (N_VIDEOS, N_FRAMES))


def test_saving_memory_changes_nothing():
    bank, gradients = bank_of(0), []
    for checkpoint in (False, True):
        head = build(checkpoint=checkpoint)
        total(head(episodes(bank), texts())).backward()
        gradients.append({name: parameter.grad for name, parameter in head.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# ---- prototypes


@pytest.mark.parametrize("is_support", [True, False])
def test_prototypes_by_the_equation(is_support):
    """q = F + text, k = v = [text; F]; the residual is of the sum."""
    torch.manual_seed(0)
    layer, frames = PrototypeLayer(8, heads=2, hidden=12, dropout=0.2, mlp_dropout=0.05).eval(), torch.randn(3, 5, 8)
    text = torch.randn(3, 8)
    found = layer(Clips(frames), text if is_support else None).frames
    f = frames / frames.square().mean(-1, keepdim=True).sqrt()
    q = f + text[:, None] if is_support else f
    kv = torch.cat([text[:, None], f], dim=1) if is_support else f
    weights, biases = layer.attention.in_proj_weight.chunk(3), layer.attention.in_proj_bias.chunk(3)
    qkv = [
        linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
        for x, w, b in zip((q, kv, kv), weights, biases, strict=True)
    ]
    mixed = (qkv[0] @ qkv[1].mT / 4**0.5).softmax(-1) @ qkv[2]
    h = q + layer.attention.out_proj(mixed.transpose(1, 2).flatten(2))
    wanted = h + layer.mlp[3](gelu(layer.mlp[0](h)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# ---- episodes


@pytest.mark.parametrize("reach", REACHES)
def test_a_video_is_computed_once_in_each_role(reach, monkeypatch):
    """And each episode by itself, with the text of each support video put in by hand, says the same."""
    monkeypatch.setattr("coldframe.train_heads.heads.ma_clip.VIDEOS_AT_ONCE", 5)
    bank = bank_of(reach)
    head, e = build(reach=reach), episodes(bank, n=4)
    together = scores(head, e)
    names = rms_norm(texts().embedding, (16,))

    def frames(rows, text):
        return bank["embedding"][rows] if reach == -1 else head.tower(bank.select(rows), text)

    for n in range(4):
        prototypes, text = [], names[e.class_ids[n]]
        for w in range(3):
            shots = text[w].expand(2, -1)
            prototypes.append(head.prototypes(Clips(frames(e.support[n, w], shots)), shots).frames.mean(0))
        q = frames(e.query[n], None)
        by_video = otam(head.prototypes(Clips(q)).frames, torch.stack(prototypes), lam=0.5)
        by_name = 100 * cosine_similarity(q.mean(1)[:, None], text[None], dim=-1)
        p = 0.5 * by_name.softmax(-1) + 0.5 * by_video.softmax(-1)
        torch.testing.assert_close(together[n].exp(), p, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("metric", ["otam", "bi_mhm", "mean_cosine", "trx"])
@pytest.mark.parametrize("shots", ["proto_mean", "dist_mean"])
def test_any_metric_and_shots_are_a_set(metric, shots):
    head, e = build(reach=-2, metric=metric, shots=shots), episodes(bank_of(-2))
    logits = scores(head, e)
    close: Any = {"atol": 1e-4, "rtol": 1e-4}
    assert logits.shape == (3, 3, 3)
    torch.testing.assert_close(scores(head, replace(e, support=e.support.flip(-1))), logits, **close)
    one = scores(head, replace(e, support=e.support[..., :1]))
    copies = scores(head, replace(e, support=e.support[..., :1].expand(-1, -1, 4)))
    torch.testing.assert_close(copies, one, **close)


@pytest.mark.parametrize("reach", REACHES)
def test_padding_has_no_influence(reach):
    mask = torch.arange(N_FRAMES) < torch.tensor([4, 1, 3, 2] * 3)[:, None]
    head = build(reach=reach)
    clean, dirty = (scores(head, episodes(bank_of(reach, mask, fill))) for fill in (0, 200))
    torch.testing.assert_close(clean, dirty, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(clean, scores(head, episodes(bank_of(reach))))


def test_alpha_is_the_share_of_names():
    e = episodes(bank_of(-1))
    names, metric, half = (scores(build(reach=-1, alpha=alpha), e).exp() for alpha in (1.0, 0.0, 0.5))
    torch.testing.assert_close((names + metric) / 2, half)
    means = bank_of(-1)["embedding"].mean(1)[e.query]
    cosine = cosine_similarity(means[:, :, None], texts().embedding[e.class_ids][:, None], dim=-1)
    torch.testing.assert_close(names, (100 * cosine).softmax(-1))


# ---- training


@pytest.mark.parametrize("reach", REACHES)
def test_losses_and_what_they_reach(reach):
    """alpha · ½ (support to text + query to text) + (1 - alpha) · query to support."""
    bank = bank_of(reach)
    head, e = build(reach=reach, alpha=0.3), episodes(bank)
    output = head(e, texts())
    by_video, by_name = (scores(build(reach=reach, alpha=alpha), e).flatten(0, 1) for alpha in (0.0, 1.0))
    labels = e.labels.flatten()
    torch.testing.assert_close(output.losses["query_to_support"], 0.7 * cross_entropy(by_video, labels))
    torch.testing.assert_close(output.losses["query_to_text"], 0.15 * cross_entropy(by_name, labels))

    text = texts().embedding[e.class_ids]  # [n, W, E]
    own = rms_norm(repeat(text, "n w e -> (n w k) e", k=2), (16,))
    frames = (
        bank["embedding"][e.support.flatten()] if reach == -1 else head.tower(bank.select(e.support.flatten()), own)
    )
    cosine = cosine_similarity(frames.mean(1).view(3, 6, 1, 16), text[:, None], dim=-1)
    wanted = cross_entropy(100 * cosine.flatten(0, 1), torch.tensor([0, 0, 1, 1, 2, 2] * 3))
    torch.testing.assert_close(output.losses["support_to_text"], 0.15 * wanted, atol=1e-4, rtol=1e-4)

    in_training = head.train()(e, texts())
    assert in_training.logits is None
    total(in_training).backward()
    untouched = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched
    assert all(parameter.grad is None for parameter in tower().model.parameters())


def test_a_new_head_begins_to_learn_everywhere_but_below_zeros():
    head = build(shaken=False)
    total(head(episodes(bank_of(0)), texts())).backward()
    still = {name for name, p in head.named_parameters() if not p.grad.any()}
    assert all(".down." in name for name in still)


def test_names_can_be_left_out():
    config = Config(names=False, reach=-2)
    assert HEAD.needs(config) == ("tokens.-2",)
    assert HEAD.needs(Config(reach=-1)) == ("embedding", "text")
    assert HEAD.needs(Config()) == ("pixels", "text")
    head, e = build(reach=-2, names=False), episodes(bank_of(-2))
    assert not head.uses_class_names
    assert not any("text" in name for name, _ in head.named_parameters())
    logits = head.episode_logits(e.bank, e.support, e.query, None)
    output = head(e, None)
    assert list(output.losses) == ["query_to_support"]
    wanted = cross_entropy(logits.flatten(0, 1), e.labels.flatten())
    torch.testing.assert_close(output.losses["query_to_support"], wanted)


def test_trains_on_a_store(store, manifest, tmp_path):
    spec = EpisodeTraining(n_way=3, n_shot=1, n_query=1, episodes_per_epoch=8, n_val_episodes=8, per_step=4)
    checkpoint = train(
        store,
        manifest,
        "ma_clip",
        Config(reach=-1, hidden=32),
        TrainSpec(epochs=2, val_fraction=0.25),
        tmp_path / "run",
        episodes=spec,
        device="cpu",
        quiet=True,
    )
    assert checkpoint.scores["top_1"] > 0.6


@pytest.mark.parametrize("reach", [0, -2])
def test_refuses_videos_with_more_frames_than_it_has_places_for(reach):
    head, bank = build(reach=reach), bank_of(reach)
    head.tower.position = nn.Parameter(head.tower.position[:-1])
    with pytest.raises(SpecMismatch, match="more frames than the head"):
        scores(head, episodes(bank))


def test_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="impossible alpha"):
        Config(alpha=1.5)
    with pytest.raises(ConfigError, match="dist_mean or proto_mean"):
        Config(shots="merged")
    with pytest.raises(ConfigError, match="divides 16"):
        build(heads=5)
