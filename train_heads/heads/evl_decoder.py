"""One query for the whole video reads the tokens of the last M blocks, enriched by their neighbours in time.

Source: EVL, Lin et al. 2022, arXiv:2208.03550, §3.2 and §3.3. Sizes and initialisation are those of the official code,
    OpenGVLab/efficient-video-recognition b282e8b, which states no licence: none of it is used here.
Differs: the same function, computed otherwise. The query goes into token space, so that no token is ever projected; the
    cross-frame term bins attention by displacement, so that no [N, N, D] table exists; queries and keys of the frozen
    blocks are recomputed from the tokens below them. Temporal positions are drawn at N(0, 1), about the scale of CLIP's
    residual stream: from zero, as published, the order of distant frames is learnt slowly (`positions = "published"`).
    The query starts at zero, as in the published runs, whose code holds an N(0, 0.02) that it never calls (`query =
    "intended"`). Padded frames take no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from ...data_manifests.errors import ConfigError
from ...extract.batches import FeatureBatch
from ...extract.blocks import QueryKey
from ...extract.specs import canonical_feature
from ...extract.text import TextFeatures
from ..layers import QuickGELU, of_frames
from ..layouts import back_to_theirs, renamed, stretched
from ..limits import require_at_least, require_choice, require_rate
from ..specs import HeadContext, HeadOutput, HeadSpec, Official
from ..token_functions import add_displacement, add_neighbours, bin_by_displacement, mix_normalised

POSITION_STD = {"matched": 1.0, "published": 0.0}
QUERY_STD = {"published": 0.0, "intended": 0.02}


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of `evl_decoder`."""

    n_layers: int = 4  # M: decoder layer i reads tower block L - M + i
    mlp_ratio: int = 4
    dropout: float = 0.5  # in each MLP, and before the classifier
    qkv_dim: int | None = None  # width of the decoder's attention; None: the tower's
    temporal_conv: bool = True
    temporal_position: bool = True
    cross_frame: bool = True  # where each patch of a frame looks in the neighbouring frames
    positions: str = "matched"  # matched: N(0, 1), the scale of the tokens | published: zero
    query: str = "published"  # published: zero | intended: N(0, 0.02)

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        require_at_least(1, self, "n_layers", "mlp_ratio", "qkv_dim")
        require_rate(self, "dropout")
        require_choice(self, "positions", POSITION_STD)
        require_choice(self, "query", QUERY_STD)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Features read, lowest block first; the one below the last M only for its queries and keys."""
        n_read = self.n_layers + self.cross_frame
        return tuple(f"tokens.{k}" for k in range(-n_read, 0))


class EVLDecoder(nn.Module):
    """M layers that refine one query token, then a linear classifier."""

    def __init__(self, config: Config, context: HeadContext) -> None:
        super().__init__()
        shape = context.shape
        if config.n_layers > shape.layers:
            raise ConfigError(
                "evl_decoder reads one tower block a layer",
                seen=f"n_layers={config.n_layers}",
                wanted=f"at most {shape.layers}",
            )
        self.features = tuple(canonical_feature(name, shape.layers) for name in config.tokens)
        self.query = nn.Parameter(torch.randn(shape.width) * QUERY_STD[config.query])
        first = shape.layers - config.n_layers + 1
        self.layers = nn.ModuleList(DecoderLayer(config, context, block) for block in range(first, shape.layers + 1))
        self.classifier = nn.Sequential(
            nn.LayerNorm(shape.width), nn.Dropout(config.dropout), nn.Linear(shape.width, len(context.class_names))
        )

    def forward(self, batch: FeatureBatch, text: TextFeatures | None = None) -> HeadOutput:
        """Classify: tokens [B, T, 1+N, D] of the last blocks -> logits [B, C]."""
        query, _ = self.decode(batch)
        return HeadOutput(logits=self.classifier(query))

    def attention_maps(self, batch: FeatureBatch) -> Tensor:
        """Where each layer and head looks, [B, M, heads, T, 1+N]; over T and 1+N they sum to one."""
        return torch.stack(self.decode(batch)[1], dim=1)

    def decode(self, batch: FeatureBatch) -> tuple[Tensor, list[Tensor]]:
        """The refined query [B, D], and each layer's attention [B, heads, T, 1+N]."""
        stream = [batch[name].to(self.query.dtype) for name in self.features]  # each [B, T, 1+N, D]
        if batch.real is not None:  # the convolution reads the padding as the zeros after a video
            stream = [tokens.masked_fill(~rearrange(batch.mask, "b t -> b t 1 1"), 0) for tokens in stream]
        above = stream[-len(self.layers) :]
        below = stream[: len(self.layers)]  # read by the cross-frame term alone, which asked for one block more
        query = repeat(self.query, "d -> b d", b=len(batch))
        maps = []
        for layer, tokens, tokens_below in zip(self.layers, above, below, strict=True):
            query, attention = layer(query, tokens, tokens_below, batch.mask)
            maps.append(attention)
        return query, maps


class DecoderLayer(nn.Module):
    """query + attention(LN query, LN enriched tokens), then + MLP(LN query)."""

    def __init__(self, config: Config, context: HeadContext, block: int) -> None:
        super().__init__()
        width = context.shape.width
        self.local = LocalTemporal(config, context, block)
        self.norm_query = nn.LayerNorm(width)
        self.attention = OneQueryAttention(width, config.qkv_dim or width, context.shape.heads)
        self.norm_mlp = nn.LayerNorm(width)
        wider, back = nn.Linear(width, config.mlp_ratio * width), nn.Linear(config.mlp_ratio * width, width)
        for linear in (wider, back):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        self.mlp = nn.Sequential(wider, QuickGELU(), nn.Dropout(config.dropout), back)

    def forward(self, query: Tensor, tokens: Tensor, below: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Refine the query [B, D] with tokens, and those below their block, [B, T, 1+N, D].

        Returns:
            query [B, D], attention [B, heads, T, 1+N].
        """
        tokens = self.local(tokens, below, mask)
        attended, attention = self.attention(self.norm_query(query), tokens, mask)
        query = query + attended
        return query + self.mlp(self.norm_mlp(query)), attention


class LocalTemporal(nn.Module):
    """Three terms that tell a token of its frame's place in time: convolution, position, cross-frame attention."""

    def __init__(self, config: Config, context: HeadContext, block: int) -> None:
        super().__init__()
        width = context.shape.width
        self.conv = self.position = self.cross_frame = None
        if config.temporal_conv:  # holds the parameters and their initialisation; add_neighbours is the arithmetic
            self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1, groups=width)
        if config.temporal_position:
            self.position = nn.Parameter(torch.randn(context.n_frames, width) * POSITION_STD[config.positions])
        if config.cross_frame:
            self.cross_frame = CrossFrame(width, context.shape.grid, context.tower().query_key(block))

    def forward(self, tokens: Tensor, below: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B, T, 1+N, D] plus the three terms, as a new tensor; raises as `of_frames` does."""
        n_frames = tokens.shape[1]
        offset = tokens.new_zeros(n_frames, tokens.shape[-1])
        if self.position is not None:
            offset = offset + of_frames(self.position, n_frames)
        kernel = None
        if self.conv is not None:
            assert self.conv.bias is not None
            kernel, offset = self.conv.weight, offset + self.conv.bias
        enriched = add_neighbours(tokens, kernel, offset)
        return enriched if self.cross_frame is None else self.cross_frame(enriched, below, mask)


class CrossFrame(nn.Module):
    """Adds to each patch an embedding of where it looks in the frame before and in the frame after.

    A patch at (i, j) that gives attention a to the patch at (k, l) of a neighbouring frame receives a times the row for
    (i - k, j - l) of that neighbour's table. Attention comes from the frozen tower, averaged over heads: only the tables
    learn.
    """

    weight: Tensor
    bias: Tensor
    ln_weight: Tensor
    ln_bias: Tensor

    def __init__(self, width: int, grid: tuple[int, int], frozen: QueryKey) -> None:
        super().__init__()
        n_displacements = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.grid, self.heads, self.eps = grid, frozen.heads, frozen.eps
        self.previous = nn.Parameter(torch.zeros(n_displacements, width))
        self.next = nn.Parameter(torch.zeros(n_displacements, width))
        for name in ("ln_weight", "ln_bias", "weight", "bias"):
            self.register_buffer(name, getattr(frozen, name).to(self.previous), persistent=False)

    def forward(self, tokens: Tensor, below: Tensor, mask: Tensor) -> Tensor:
        """Change tokens [B, T, 1+N, D] in place; class tokens receive nothing."""
        bins = bin_by_displacement(self.queries_and_keys, below, mask, self.grid)
        return add_displacement(tokens, bins, self.previous, self.next, self.grid)

    def queries_and_keys(self, below: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen block's own, [..., heads, d] of the tokens [..., D] below it."""
        return QueryKey(self.ln_weight, self.ln_bias, self.weight, self.bias, self.heads, self.eps)(below)


class OneQueryAttention(nn.Module):
    """Multi-head attention of one query to normalised tokens, in token space.

    With one query a video, Wk goes to the query's side, q·(Wk x) = (Wkᵀ q)·x, and Wv behind the mean, Σ p (Wv x) =
    Wv Σ p x: two products of [heads, D] with the tokens of a video stand for two projections of all of them.
    """

    def __init__(self, width: int, qkv_dim: int, heads: int) -> None:
        super().__init__()
        if qkv_dim % heads:
            raise ConfigError("evl_decoder cannot share qkv_dim between its heads", seen=f"{qkv_dim} over {heads}")
        self.heads = heads
        self.norm_tokens = nn.LayerNorm(width)
        self.query = nn.Linear(width, qkv_dim)
        self.key = nn.Linear(width, qkv_dim)
        self.value = nn.Linear(width, qkv_dim)
        self.out = nn.Linear(qkv_dim, width)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Query [B, D], tokens [B, T, S, D], mask [B, T] -> attended [B, D], attention [B, heads, T, S]."""
        per_head = {"h": self.heads}
        q = rearrange(self.query(query), "b (h c) -> b h c", **per_head)
        q = q / q.shape[-1] ** 0.5
        key = rearrange(self.key.weight, "(h c) d -> h c d", **per_head)
        absorbed = einsum(q, key, "b h c, h c d -> b h d") * self.norm_tokens.weight
        shift = einsum(q, rearrange(self.key.bias, "(h c) -> h c", **per_head), "b h c, h c -> b h")
        padding = repeat(~mask, "b t -> b 1 (t s)", s=tokens.shape[2])
        flat = rearrange(tokens, "b t s d -> b (t s) d")
        mixed, attention = mix_normalised(flat, absorbed, shift, padding, self.norm_tokens.eps)
        mixed = mixed * self.norm_tokens.weight + self.norm_tokens.bias
        value = rearrange(self.value.weight, "(h c) d -> h c d", **per_head)
        values = rearrange(einsum(mixed, value, "b h d, h c d -> b h c"), "b h c -> b (h c)") + self.value.bias
        return self.out(values), rearrange(attention, "b h (t s) -> b h t s", s=tokens.shape[2])


def _read(weights: Mapping[str, Tensor], context: HeadContext, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """See Official; that there are as many heads as the tower's stands in no tensor."""
    layers = [name.split(".")[2] for name in weights if name.startswith("decoder.decoder_layers.")]
    config = replace(
        config,
        n_layers=1 + max((int(i) for i in layers if i.isdecimal()), default=0),
        temporal_conv=any(name.startswith("decoder.temporal_conv.") for name in weights),
        temporal_position=any(name.startswith("decoder.temporal_pos_embed.") for name in weights),
        cross_frame=any(name.startswith("decoder.cross_attention.") for name in weights),
        positions="published",
    )
    state = renamed(weights, _official_names(config), "EVL's decoder")
    qkv_dim, width = state["layers.0.attention.query.weight"].shape
    ratio = len(state["layers.0.mlp.0.weight"]) // width
    config = replace(config, mlp_ratio=ratio, qkv_dim=qkv_dim if qkv_dim != width else None)
    tables = [f"layers.{i}.local.position" for i in range(config.n_layers)] if config.temporal_position else []
    return config, state | {name: stretched(state[name], context.n_frames) for name in tables}


def _write(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return back_to_theirs(state, _official_names(config))


def _official_names(config: Config) -> dict[str, str]:
    """Their name of every tensor → ours."""
    bare = {"decoder.cls_token": "query"}
    modules = {"proj.0": "classifier.0", "proj.2": "classifier.2"}  # each with a weight and a bias
    for i in range(config.n_layers):
        theirs, ours = f"decoder.decoder_layers.{i}", f"layers.{i}"
        modules |= {
            f"{theirs}.norm1": f"{ours}.norm_query",
            f"{theirs}.norm2": f"{ours}.norm_mlp",
            f"{theirs}.norm3": f"{ours}.attention.norm_tokens",
            f"{theirs}.attn.q_proj": f"{ours}.attention.query",
            f"{theirs}.attn.k_proj": f"{ours}.attention.key",
            f"{theirs}.attn.v_proj": f"{ours}.attention.value",
            f"{theirs}.attn.out_proj": f"{ours}.attention.out",
            f"{theirs}.mlp.fc1": f"{ours}.mlp.0",
            f"{theirs}.mlp.fc2": f"{ours}.mlp.3",
        }
        if config.temporal_conv:
            modules[f"decoder.temporal_conv.{i}"] = f"{ours}.local.conv"
        if config.temporal_position:
            bare[f"decoder.temporal_pos_embed.{i}"] = f"{ours}.local.position"
        if config.cross_frame:
            bare[f"decoder.cross_attention.{i}.w1"] = f"{ours}.local.cross_frame.previous"
            bare[f"decoder.cross_attention.{i}.w2"] = f"{ours}.local.cross_frame.next"
    leaves = {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in modules.items() for leaf in ("weight", "bias")}
    return bare | leaves


HEAD = HeadSpec(
    config=Config,
    build=EVLDecoder,
    needs=lambda config: config.tokens,
    tasks=frozenset({"classify"}),
    source="EVL, Lin et al. 2022, arXiv:2208.03550, §3.2 and §3.3",
    official=Official(_read, _write, prefix="module."),
)
