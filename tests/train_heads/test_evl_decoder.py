"""EVL against recorded outputs of the original, against a textbook decoder, and against its own symmetries."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear, scaled_dot_product_attention

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.blocks import QueryKey
from coldframe.extract.specs import SpecMismatch, TowerShape
from coldframe.train_heads.heads.evl_decoder import HEAD, Config, OneQueryAttention
from coldframe.train_heads.specs import HeadContext

SHAPE = TowerShape(5, 32, 4, 16, (2, 4), text_width=16, text_layers=1, text_heads=1, context_length=77)
N_FRAMES = 6
OFFICIAL: Any = HEAD.official
NO_LOCAL: dict[str, Any] = {"temporal_conv": False, "temporal_position": False, "cross_frame": False}


def context(shape: TowerShape = SHAPE, n_frames: int = N_FRAMES, n_classes: int = 3) -> HeadContext:
    """A tower that offers nothing but seeded queries and keys."""

    def query_key(block: int) -> QueryKey:
        assert 1 <= block <= shape.layers
        generator = torch.Generator(device="cpu").manual_seed(block)
        weight = torch.randn(2 * shape.width, shape.width, generator=generator, device="cpu") / shape.width**0.5
        ones, zeros = torch.ones(shape.width), torch.zeros(shape.width)
        return QueryKey(ones, zeros, weight.to(ones), torch.zeros(2 * shape.width), shape.heads, 1e-5)

    tower: Any = SimpleNamespace(query_key=query_key)
    return HeadContext(shape, n_frames, tuple(map(str, range(n_classes))), lambda: tower)


def build(**settings: Any) -> Any:
    """A head in which every parameter is at work: those that start at zero are drawn."""
    torch.manual_seed(0)
    head: Any = HEAD.build(Config(n_layers=2, **settings), context())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return head.eval()


def batch_of(n_videos: int = 3, n_frames: int = N_FRAMES, seed: int = 1) -> FeatureBatch:
    generator = torch.Generator().manual_seed(seed)
    sizes = (n_videos, n_frames, 1 + SHAPE.n_patches, SHAPE.width)
    features = {f"tokens.{k}": torch.randn(sizes, generator=generator) for k in (3, 4, 5)}
    everything = torch.ones(n_videos, n_frames, dtype=torch.bool)
    return FeatureBatch(features, everything, torch.arange(n_videos) % 3, tuple(map(str, range(n_videos))))


def logits(head: nn.Module, batch: FeatureBatch) -> Tensor:
    found = head(batch).logits
    assert found is not None
    return found


# ---- the original


def test_recorded_outputs_of_the_original(recorded: Callable[[str], list[Any]]) -> None:
    for file in recorded("EVL"):
        sizes, tower = file.sizes, file.tower
        classes = tuple(map(str, range(sizes["classes"])))
        known = HeadContext(tower.shape, sizes["T"], classes, lambda tower=tower: tower)
        theirs = file.named("head.")
        config, state = OFFICIAL.read(theirs, known, Config())
        assert (config.n_layers, config.qkv_dim or tower.shape.width) == (sizes["decoder_layers"], sizes["qkv_dim"])
        head: Any = HEAD.build(config, known)
        head.load_state_dict(state)
        head.eval()
        written = OFFICIAL.write(config, head.state_dict())
        assert written.keys() == theirs.keys()
        assert all(torch.equal(written[name], theirs[name]) for name in theirs)

        frames = file["frames"]
        found = tower.encode_images(rearrange(frames, "b c t h w -> (b t) c h w"), HEAD.features(config))
        tokens = {name: rearrange(x, "(b t) n d -> b t n d", b=len(frames)) for name, x in found.items()}
        everything = torch.ones(len(frames), sizes["T"], dtype=torch.bool)
        batch = FeatureBatch(tokens, everything, torch.zeros(len(frames), dtype=torch.int64), ("",) * len(frames))
        torch.testing.assert_close(logits(head, batch), file["logits"], atol=1e-4, rtol=0)
        for layer, k in zip(head.layers, range(tower.shape.layers - config.n_layers, tower.shape.layers), strict=True):
            torch.testing.assert_close(tokens[f"tokens.{k + 1}"], file[f"backbone.{k}.out"], atol=1e-4, rtol=0)
            if config.cross_frame:
                query, key = layer.local.cross_frame.queries_and_keys(tokens[f"tokens.{k}"])
                torch.testing.assert_close(query, file[f"backbone.{k}.q"], atol=1e-4, rtol=0)
                torch.testing.assert_close(key, file[f"backbone.{k}.k"], atol=1e-4, rtol=0)


# ---- the decoder


def textbook(attention: OneQueryAttention, query: Tensor, tokens: Tensor) -> Tensor:
    """Project every token of [B, T, S, D] to a key and a value."""
    norm, heads = attention.norm_tokens, attention.heads
    memory = layer_norm(tokens.flatten(1, 2), norm.normalized_shape, norm.weight, norm.bias)
    q = rearrange(attention.query(query), "b (h c) -> b h 1 c", h=heads)
    k, v = (rearrange(project(memory), "b s (h c) -> b h s c", h=heads) for project in (attention.key, attention.value))
    return attention.out(rearrange(scaled_dot_product_attention(q, k, v), "b h 1 c -> b (h c)"))


@pytest.mark.parametrize("qkv_dim", [32, 24])
def test_attention_in_token_space_is_the_textbook_form(qkv_dim: int) -> None:
    torch.manual_seed(0)
    attention = OneQueryAttention(32, qkv_dim, heads=4)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    query, tokens = torch.randn(2, 32, requires_grad=True), (2 * torch.randn(2, 3, 5, 32)).requires_grad_()
    found, attended = attention(query, tokens, torch.ones(2, 3, dtype=torch.bool))
    wanted = textbook(attention, query, tokens)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert attended.shape == (2, 4, 3, 5)
    inputs = [query, tokens, *attention.parameters()]
    direction = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(wanted, inputs, direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_without_local_terms_it_is_cross_attention_pooling() -> None:
    """Switched off, or present and zero: M layers of the textbook decoder."""
    head, batch = build(**NO_LOCAL), batch_of()
    query = head.query.expand(3, -1)
    for layer, name in zip(head.layers, ("tokens.4", "tokens.5"), strict=True):
        query = query + textbook(layer.attention, layer.norm_query(query), batch[name])
        first, _, _, second = layer.mlp
        hidden = linear(layer.norm_mlp(query), first.weight, first.bias)
        query = query + linear(hidden * torch.sigmoid(1.702 * hidden), second.weight, second.bias)
    wanted = head.classifier(query)
    torch.testing.assert_close(logits(head, batch), wanted, atol=1e-5, rtol=0)

    full = build()
    for layer in full.layers:
        for parameter in layer.local.parameters():
            nn.init.zeros_(parameter)
    full.load_state_dict(head.state_dict(), strict=False)
    torch.testing.assert_close(logits(full, batch), wanted, atol=1e-5, rtol=0)


def test_one_frame_has_no_neighbours() -> None:
    head, batch = build(), batch_of(n_frames=1)
    alone = logits(head, batch)
    with torch.no_grad():
        for layer in head.layers:
            layer.local.conv.weight[:, :, [0, 2]] = 100.0
            nn.init.normal_(layer.local.cross_frame.previous)
            nn.init.normal_(layer.local.cross_frame.next)
    torch.testing.assert_close(logits(head, batch), alone)


def test_time_reversed_with_the_local_terms_is_the_same() -> None:
    head, batch = build(), batch_of()
    wanted = logits(head, batch)
    backwards = replace(batch, features={name: x.flip(1) for name, x in batch.features.items()})
    assert not torch.allclose(logits(head, backwards), wanted, atol=1e-3)
    with torch.no_grad():
        for layer in head.layers:
            local = layer.local
            local.conv.weight.copy_(local.conv.weight.flip(-1))
            local.position.copy_(local.position.flip(0))
            local.cross_frame.previous, local.cross_frame.next = local.cross_frame.next, local.cross_frame.previous
    torch.testing.assert_close(logits(head, backwards), wanted, atol=1e-5, rtol=0)


def test_order_of_distant_frames_is_learnt_in_a_short_training() -> None:
    """Two events at least three frames apart: which came first? Positions that start at zero still guess after 50 steps."""

    def videos(n: int, seed: int) -> tuple[FeatureBatch, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        events = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
        tokens = torch.randn(n, 1, 3, 16, generator=generator) + 0.5 * torch.randn(n, 8, 3, 16, generator=generator)
        label = torch.randint(2, (n,), generator=generator)
        first = torch.randint(4, (n,), generator=generator)
        second = first + 3 + torch.randint(2, (n,), generator=generator)
        for event, frame in enumerate((torch.where(label == 0, first, second), torch.where(label == 0, second, first))):
            tokens[torch.arange(n), frame] += events[event]
        return FeatureBatch({"tokens.2": tokens}, torch.ones(n, 8, dtype=torch.bool), label, ("",) * n), label

    torch.manual_seed(0)
    shape = replace(SHAPE, layers=2, width=16, grid=(1, 2))
    settings = Config(n_layers=1, dropout=0.0, temporal_conv=False, cross_frame=False)
    head = HEAD.build(settings, context(shape, 8, n_classes=2))
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    (seen, label), (unseen, wanted) = videos(512, seed=1), videos(256, seed=2)
    for _ in range(50):
        optimiser.zero_grad()
        cross_entropy(logits(head, seen), label).backward()
        optimiser.step()
    head.eval()
    backwards = replace(unseen, features={"tokens.2": unseen["tokens.2"].flip(1)})
    assert (logits(head, unseen).argmax(1) == wanted).float().mean() > 0.85
    assert (logits(head, backwards).argmax(1) == wanted).float().mean() < 0.2


# ---- what every head promises


def test_padded_frames_take_no_part() -> None:
    head, short = build(), batch_of(n_frames=4)
    noise = torch.full((3, 2, 1 + SHAPE.n_patches, SHAPE.width), float("nan"))
    padded = replace(
        short,
        features={name: torch.cat([x, noise], dim=1) for name, x in short.features.items()},
        mask=torch.arange(6).expand(3, 6) < 4,
    )
    torch.testing.assert_close(logits(head, padded), logits(head, short), atol=1e-5, rtol=0)
    assert not head.attention_maps(padded)[..., 4:, :].any()


def test_inputs_are_left_as_they_were() -> None:
    for settings in ({}, NO_LOCAL):
        batch = batch_of()
        before = {name: x.clone() for name, x in batch.features.items()}
        logits(build(**settings), batch).sum().backward()
        assert all(torch.equal(batch[name], x) for name, x in before.items())


def test_permuted_videos_give_permuted_logits() -> None:
    head, batch = build(), batch_of()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(logits(head, batch.select(order)), logits(head, batch)[order], atol=1e-5, rtol=0)


def test_gradient_reaches_every_parameter() -> None:
    head = build().train()
    cross_entropy(logits(head, batch_of()), torch.tensor([0, 1, 2])).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        # The key bias adds the same to every logit of a head.
        assert parameter.grad.any() != name.endswith("attention.key.bias"), name


def test_attention_maps_are_distributions_over_the_tokens_of_all_frames() -> None:
    maps = build().attention_maps(batch_of())
    assert maps.shape == (3, 2, 4, N_FRAMES, 9)
    torch.testing.assert_close(maps.sum(dim=(-1, -2)), torch.ones(3, 2, 4))


def test_autocast_and_half_precision_features() -> None:
    head, batch = build(), batch_of()
    exact = logits(head, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(head, batch.to("cpu", torch.float16))
        cross_entropy(rounded, batch.labels).backward()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(parameter.grad is not None for parameter in head.parameters())


# ---- sizes and settings


@pytest.mark.parametrize(
    ("width", "heads", "grid", "n_layers", "n_frames", "n_classes", "cross_frame", "published"),
    [
        (768, 12, 14, 4, 8, 400, True, "33.18"),
        (768, 12, 14, 4, 16, 400, True, "33.21"),
        (768, 12, 14, 4, 32, 400, True, "33.26"),
        (768, 12, 14, 4, 8, 400, False, "28.70"),
        (768, 12, 14, 4, 16, 400, False, "28.73"),
        (768, 12, 14, 4, 32, 400, False, "28.78"),
        (1024, 16, 16, 4, 8, 400, True, "58.73"),
        (1024, 16, 16, 4, 16, 400, True, "58.76"),
        (1024, 16, 16, 4, 32, 400, True, "58.83"),
        (1024, 16, 16, 4, 8, 400, False, "50.86"),
        (1024, 16, 16, 4, 16, 400, False, "50.89"),
        (1024, 16, 16, 4, 32, 400, False, "50.95"),
        (1024, 16, 24, 4, 32, 400, True, "69.05"),
        (1024, 16, 24, 4, 32, 400, False, "50.95"),
        (768, 12, 14, 12, 16, 174, True, "98.8"),
        (768, 12, 14, 12, 16, 174, False, "85.4"),
        (1024, 16, 16, 24, 32, 174, True, "350.7"),
        (1024, 16, 16, 24, 32, 174, False, "303.4"),
    ],
)
def test_parameter_counts_of_the_published_models(
    width: int, heads: int, grid: int, n_layers: int, n_frames: int, n_classes: int, cross_frame: bool, published: str
) -> None:
    shape = replace(SHAPE, layers=24, width=width, heads=heads, grid=(grid, grid))
    with torch.device("meta"):
        settings = Config(n_layers=n_layers, cross_frame=cross_frame)
        head = HEAD.build(settings, context(shape, n_frames, n_classes))
    layer = 4 * (width * width + width) + (8 * width * width + 5 * width) + 3 * 2 * width  # attention, MLP, norms
    layer += 4 * width + n_frames * width + cross_frame * 2 * (2 * grid - 1) ** 2 * width  # the local terms
    count = sum(prod(parameter.shape) for parameter in head.parameters() if parameter.requires_grad)
    assert count == n_layers * layer + width + 2 * width + (width + 1) * n_classes
    assert f"{count / 1e6:.{len(published.partition('.')[2])}f}" == published


@pytest.mark.parametrize("cross_frame", [True, False])
def test_every_block_of_the_tower_can_be_read(cross_frame: bool) -> None:
    """As for Something-Something; queries and keys of the first block come from what lies below it, tokens.0."""
    torch.manual_seed(0)
    head: Any = HEAD.build(Config(n_layers=5, cross_frame=cross_frame), context()).eval()
    assert head.features == tuple(f"tokens.{k}" for k in range(0 if cross_frame else 1, 6))
    batch = batch_of()
    more = {name: torch.randn_like(batch["tokens.3"]) for name in ("tokens.0", "tokens.1", "tokens.2")}
    batch = replace(batch, features={**batch.features, **more})
    assert head.attention_maps(batch).shape == (3, 5, 4, N_FRAMES, 9)
    if cross_frame:
        with torch.no_grad():
            head.layers[0].local.cross_frame.next.normal_()
        before = logits(head, batch)
        changed = replace(batch, features={**batch.features, "tokens.0": torch.randn_like(batch["tokens.3"])})
        assert not torch.allclose(logits(head, changed), before, atol=1e-4)


def test_needs_one_block_more_for_queries_and_keys() -> None:
    assert HEAD.needs(Config()) == ("tokens.-5", "tokens.-4", "tokens.-3", "tokens.-2", "tokens.-1")
    assert HEAD.needs(Config(n_layers=2, cross_frame=False)) == ("tokens.-2", "tokens.-1")


def test_published_and_intended_starts() -> None:
    published: Any = HEAD.build(Config(n_layers=2, positions="published"), context())
    assert not published.query.any()
    assert not any(layer.local.position.any() for layer in published.layers)
    default: Any = HEAD.build(Config(n_layers=2, query="intended"), context())
    assert 0.01 < default.query.std() < 0.03
    assert 0.8 < default.layers[0].local.position.std() < 1.2
    assert not default.layers[0].local.cross_frame.next.any()


def test_what_cannot_be_built_is_refused() -> None:
    refused: tuple[dict[str, Any], ...] = ({"n_layers": 0}, {"positions": "sine"}, {"query": "one"})
    for settings in refused:
        with pytest.raises(ConfigError):
            Config(**settings)
    with pytest.raises(ConfigError, match="at most 5"):
        HEAD.build(Config(n_layers=6), context())
    with pytest.raises(ConfigError, match="30 over 4"):
        HEAD.build(Config(qkv_dim=30), context())
    with pytest.raises(SpecMismatch, match="more frames"):
        build()(batch_of(n_frames=N_FRAMES + 1))


# ---- official checkpoints


def official(**settings: Any) -> dict[str, Tensor]:
    """A checkpoint as the original code writes it, key by key."""
    width, hidden, rows = 32, 128, 49
    found = {"decoder.cls_token": (width,), "proj.0.weight": (width,), "proj.0.bias": (width,)}
    found |= {"proj.2.weight": (3, width), "proj.2.bias": (3,)}
    for i in range(4):
        layer = f"decoder.decoder_layers.{i}"
        found |= {f"{layer}.norm{n}.{leaf}": (width,) for n in (1, 2, 3) for leaf in ("weight", "bias")}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{layer}.attn.{name}.weight": (width, width), f"{layer}.attn.{name}.bias": (width,)}
        found |= {f"{layer}.mlp.fc1.weight": (hidden, width), f"{layer}.mlp.fc1.bias": (hidden,)}
        found |= {f"{layer}.mlp.fc2.weight": (width, hidden), f"{layer}.mlp.fc2.bias": (width,)}
        found |= {f"decoder.temporal_conv.{i}.weight": (width, 1, 3), f"decoder.temporal_conv.{i}.bias": (width,)}
        found |= {f"decoder.temporal_pos_embed.{i}": (N_FRAMES, width)}
        found |= {f"decoder.cross_attention.{i}.w{n}": (rows, width) for n in (1, 2)}
    return {name: torch.randn(shape) for name, shape in found.items()}


SQUARE = replace(SHAPE, grid=(4, 4))


def test_a_published_checkpoint_goes_through_unchanged() -> None:
    weights = official()
    assert len(weights) == 97
    config, state = OFFICIAL.read(weights, context(SQUARE), Config(dropout=0.3))
    assert config == Config(n_layers=4, dropout=0.3, positions="published")
    head = HEAD.build(config, context(SQUARE))
    head.load_state_dict(state)
    assert torch.equal(state["layers.3.local.cross_frame.next"], weights["decoder.cross_attention.3.w2"])
    written = OFFICIAL.write(config, head.state_dict())
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_absent_local_terms_are_switched_off() -> None:
    local = ("temporal_conv", "temporal_pos_embed", "cross_attention")
    weights = {name: x for name, x in official().items() if not any(part in name for part in local)}
    config, state = OFFICIAL.read(weights, context(), Config())
    assert config == Config(positions="published", **NO_LOCAL)
    HEAD.build(config, context()).load_state_dict(state)
    assert OFFICIAL.write(config, state).keys() == weights.keys()


def test_positions_are_stretched_to_the_frames_of_the_store() -> None:
    weights = official()
    ramp = torch.arange(N_FRAMES).float()[:, None].expand(-1, 32)
    weights["decoder.temporal_pos_embed.0"] = ramp
    longer = context(SQUARE, n_frames=2 * N_FRAMES)
    config, state = OFFICIAL.read(weights, longer, Config())
    HEAD.build(config, longer).load_state_dict(state)
    wanted = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5])
    torch.testing.assert_close(state["layers.0.local.position"][:, 7], wanted)


def test_strange_and_missing_tensors_are_named() -> None:
    weights = official()
    weights["backbone.pos_embed"] = weights.pop("decoder.decoder_layers.2.attn.v_proj.bias")
    with pytest.raises(
        SpecMismatch, match=r"missing decoder\.decoder_layers\.2\.attn\.v_proj\.bias; unknown backbone\.pos"
    ):
        OFFICIAL.read(weights, context(), Config())
    with pytest.raises(SpecMismatch, match=r"missing decoder\.cls_token.* …; unknown a"):
        OFFICIAL.read({"a": torch.zeros(1)}, context(), Config())
