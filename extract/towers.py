"""Frozen CLIP towers, image and text: every layer in one pass.

Precision is the arithmetic of the image blocks. Weights stay float32 and autocast rounds the factors of each product,
while the residual stream, the patch embedding and the projection stay float32: on a random ViT-B/16 that leaves the
embedding of a bf16 tower 0.4 % off, where bf16 weights with a bf16 stream leave it 0.9 % off. Texts, which are few, are
always encoded in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data_manifests.errors import ConfigError, UnknownName
from .blocks import Block, Inserts, QueryKey, expect_layers, open_block, run_blocks
from .pretrained import is_class_token_vit, load_model, tokenizer_of, transform_of, uses_quick_gelu
from .specs import PRECISIONS, TowerShape, TowerSpec, canonical_features
from .summary import pack, summarise
from .text_tower import TextTower
from .weights import TowerError, weights_sha256

__all__ = ["Tower", "TowerError", "load_tower"]

TEXTS_AT_ONCE = 256
SHOWN = 60  # characters of a text in a message


def load_tower(
    model: str, pretrained: str | None = None, precision: str = "fp32", device: str = "auto", seed: int = 0
) -> Tower:
    """Load a frozen CLIP.

    Args:
        model: a name of open_clip, such as `ViT-B-16-quickgelu`; `coldframe-tiny`; or the path of an architecture in
            open_clip's JSON format.
        pretrained: a tag of that model, a file of weights (safetensors, a state dict, a training checkpoint, OpenAI's
            TorchScript archive), or `random`. None is for `coldframe-tiny`, whose weights ship with the package.
        precision: fp32, bf16 or fp16; see the top of this file.
        device: a torch device, or auto: the GPU if there is one.
        seed: draws `random` weights. The global generator is left as it was.

    Raises:
        UnknownName: no such model or precision.
        ConfigError: no weights were named.
        TowerError: the weights cannot be had, do not fit, or were trained with the other GELU; or no such device.
    """
    module, name, weights = load_model(model, pretrained, seed)
    return Tower(module, name, weights, precision, device)


class Tower:
    """A frozen CLIP: images and texts into one space, and every layer on the way.

    Attributes:
        model: open_clip's module, in evaluation mode, its parameters without gradient.
        visual: its image tower.
        has_tokens: whether that is a ViT with a class token, so that tokens.<k> and cls.<k> exist.
        spec: identity.
        shape: sizes; 0 for what the tower does not have.
        logit_scale: CLIP's, exponentiated.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "custom",
        pretrained: str = "custom",
        precision: str = "fp32",
        device: str | torch.device = "auto",
    ) -> None:
        """Take an open_clip model over: it is frozen and moved. `name` finds its tokenizer.

        Raises:
            UnknownName: no such precision.
            TowerError: no such device, or the tower's crops are not square.
        """
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        self.device = _device(device)
        self.model: Any = model.eval().requires_grad_(False).float().to(self.device)
        self.visual = self.model.visual
        if self.device.type == "cuda":  # convolutions there read channels last
            self.visual.to(memory_format=torch.channels_last)
        self.has_tokens = is_class_token_vit(self.visual)
        self.logit_scale = float(self.model.logit_scale.exp())
        self.spec = TowerSpec(
            model=name,
            pretrained=pretrained,
            weights_sha256=weights_sha256(self.model.state_dict()),
            quick_gelu=uses_quick_gelu(self.model),
            precision=precision,
            transform=transform_of(self.model),
        )
        self._mean = torch.tensor(self.spec.transform.mean, device=self.device).view(-1, 1, 1)
        self._std = torch.tensor(self.spec.transform.std, device=self.device).view(-1, 1, 1)
        self.shape = self._measure()

    def encode_frames(self, pixels: Tensor | NDArray[np.uint8], features: Sequence[str]) -> dict[str, Tensor]:
        """Compute features of frames in one pass that stops at the last block needed. The caller chunks.

        Args:
            pixels: uint8 [F, 3, S, S], crops as open_clip's transform makes them before it scales them.
            features: `embedding`, `cls.<k>`, `summary.<k>`, `tokens.<k>`, `pixels`; k may be counted from the end.

        Returns:
            Canonical name → embedding [F, E] un-normalised, cls [F, D], tokens [F, 1+N, D] (the raw residual stream,
            class token first), summary as summary.py packs it, float32 on the tower's device; pixels as they came.

        Raises:
            UnknownName: not a feature, or a layer that the tower lacks.
            TowerError: pixels of another size or dtype, or tokens of a tower without a class token.
        """
        computed = [name for name in features if name != "pixels"]
        found = self.encode_images(self.normalise(pixels), computed)
        return found | {"pixels": _tensor(pixels)} if "pixels" in features else found

    def normalise(self, pixels: Tensor | NDArray[np.uint8]) -> Tensor:
        """Scale uint8 crops [F, 3, S, S] as torchvision does, operation by operation, so that results are bit-equal."""
        side = self.spec.transform.size_px
        if tuple(pixels.shape[1:]) != (3, side, side) or pixels.dtype not in (torch.uint8, np.uint8):
            raise TowerError(
                f"the frames do not fit {self.spec.model}",
                seen=f"{pixels.dtype} {list(pixels.shape)}",
                wanted=f"uint8 [F, 3, {side}, {side}]",
            )
        scaled = _tensor(pixels).to(self.device, non_blocking=True).float().div_(255)
        return scaled.sub_(self._mean).div_(self._std)

    @torch.no_grad()  # not inference_mode, whose results could not enter a head that is being trained
    def encode_images(self, images: Tensor, features: Sequence[str]) -> dict[str, Tensor]:
        """`encode_frames` of normalised images, float [F, 3, S, S]; there are no pixels to give back."""
        if not features:
            return {}
        if not self.has_tokens:
            return self._encode_whole(images, features)
        wanted = canonical_features(features, self.shape.layers)
        if "pixels" in wanted:
            raise UnknownName("feature of normalised images", "pixels", ("embedding", "cls.-1", "tokens.-1"))
        last = max(self.shape.layers if name == "embedding" else int(name.partition(".")[2]) for name in wanted)
        found: dict[str, Tensor] = {}
        for k, x in self._blocks(self._embed(images), 0, last):
            if f"tokens.{k}" in wanted:
                found[f"tokens.{k}"] = x
            if f"cls.{k}" in wanted:
                found[f"cls.{k}"] = x[:, 0].clone()  # a view would keep every patch token alive
            if f"summary.{k}" in wanted:
                found[f"summary.{k}"] = pack(summarise(x, self.block(k + 1)))
            if k == self.shape.layers and "embedding" in wanted:
                found["embedding"] = self._project(x)
        return found

    @property
    def usual_batch(self) -> int:
        """Frames to one pass: a processor's caches hold few (a ViT-B/16 was a quarter slower at 64 than at 8)."""
        return 8 if self.device.type == "cpu" else 64

    def compile(self) -> None:
        """Let torch compile the image blocks; the first pass of each size then takes minutes on a GPU."""
        for block in self.visual.transformer.resblocks if self.has_tokens else [self.visual]:
            block.compile()

    def start(self, pixels: Tensor, offset: Tensor | None = None) -> Tensor:
        """Patch embedding to ln_pre: uint8 pixels [..., T, 3, S, S] → tokens.0 [..., T, 1+N, D].

        Args:
            offset: [T, D], added to all tokens of a frame before ln_pre, and trained where it has a gradient.

        Raises:
            TowerError: the tower has no tokens, or the pixels are not of its size.
            ValueError: an offset of another number of frames.
        """
        self._need_tokens("tokens.0")
        if offset is not None and len(offset) != pixels.shape[-4]:
            raise ValueError(f"an offset of {len(offset)} frames for videos of {pixels.shape[-4]}")
        tokens = self._embed(self.normalise(pixels.flatten(0, -4)), offset)
        return tokens.unflatten(0, pixels.shape[:-3])

    def resume(
        self,
        tokens: Tensor,
        from_layer: int,
        *,
        to_layer: int | None = None,
        inserts: Inserts = (),
        mask: Tensor | None = None,
        class_token_only: bool = False,
        checkpoint: bool = False,
    ) -> Tensor:
        """Go on from the middle of a pass, differentiable in the tokens and in what a method inserts.

        Autocast around the call holds for the blocks; without it they run in the precision of the tower.

        Args:
            tokens: tokens.<from_layer> [..., 1+N, D]; with inserts [B, T, 1+N, D].
            to_layer: the last block to run; None is the tower's last.
            inserts: of the last blocks of the pass, one a block; those below run as they are.
            mask: [B, T] bool, for the inserts; True at real frames, None where all are.
            class_token_only: give back [..., 1, D]; the last block then computes no other token.
            checkpoint: keep no activations of a block, and compute them again in the backward pass.

        Returns:
            tokens.<to_layer>, which `project` makes an embedding of.

        Raises:
            UnknownName: the tower has no such layers.
            TowerError: it has no tokens, or its blocks cannot be opened.
        """
        self._need_tokens("a pass from the middle")
        to_layer = self.shape.layers if to_layer is None else to_layer
        expect_layers(from_layer, to_layer, self.shape.layers)
        blocks = [self.block(k) for k in range(from_layer + 1, to_layer + 1)]
        with self.working_precision():
            x = run_blocks(tokens.float(), blocks, inserts, mask, class_token_only, checkpoint)
        return x[..., :1, :] if class_token_only else x

    def project(self, tokens: Tensor) -> Tensor:
        """ln_post and joint projection of the class tokens of tokens.<L> [..., 1+N, D] → embedding [..., E]."""
        self._need_tokens("a joint embedding of tokens")
        flat = tokens.float().flatten(0, -3)
        return self._project(flat).unflatten(0, tokens.shape[:-2])

    def block(self, layer: int) -> Block:
        """Block `layer` of the image tower, counted from 1, opened.

        Raises:
            UnknownName: the tower has no such block.
            TowerError: its attention is not CLIP's.
        """
        self._need_tokens("a block")
        return open_block(self.visual.transformer.resblocks, layer, self.spec.model)

    @cached_property
    def text(self) -> TextTower:
        """The text tower, opened.

        Raises:
            TowerError: it is not CLIP's.
        """
        return TextTower(_text_tower(self.model), self.spec.model)

    def query_key(self, layer: int) -> QueryKey:
        """Queries and keys of block `layer` (counted from 1) as a map of tokens.<layer-1>.

        Raises:
            UnknownName: the tower has no such block.
            TowerError: its attention is not CLIP's.
        """
        return self.block(layer).query_key()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 [C, context length].

        Raises:
            ConfigError: a text is longer than the tower's context; none is ever cut.
            TowerError: the tower's vocabulary is not its tokenizer's.
        """
        length = self.shape.context_length
        ids = self._tokenizer(list(texts), context_length=length)  # [C, length]
        roomy = self._tokenizer(list(texts), context_length=2 * length)  # begins otherwise where `ids` had to be cut
        too_long = [text for text, fits in zip(texts, (roomy[:, :length] == ids).all(dim=1), strict=True) if not fits]
        if too_long:
            raise ConfigError(
                f"{len(too_long)} text(s) exceed the {length} tokens that {self.spec.model} reads",
                seen="; ".join(repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…") for text in too_long[:3]),
                fix="Shorten the class names, their descriptions or the templates.",
            )
        n_known = getattr(_text_tower(self.model), "vocab_size", None)
        if n_known is not None and ids.numel() and int(ids.max()) >= n_known:
            raise TowerError(
                f"CLIP's tokenizer does not fit the vocabulary of {self.spec.model}", seen=f"{n_known} ids"
            )
        return ids

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [C, E], un-normalised, float32; raises as `tokenize` does."""
        chunks = self.tokenize(texts).split(TEXTS_AT_ONCE)
        with self._autocast(False):
            return torch.cat([self.model.encode_text(ids.to(self.device), normalize=False) for ids in chunks])

    def _embed(self, images: Tensor, offset: Tensor | None = None) -> Tensor:
        """Patch embedding, class token, positions and ln_pre: images [F, 3, S, S] → tokens.0 [F, 1+N, D]."""
        visual = self.visual
        with self._autocast(False):
            if offset is None:
                return visual._embeds(images)
            with torch.no_grad():
                patches = rearrange(visual.conv1(images), "f d h w -> f (h w) d")
                tokens = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], dim=1)
                tokens = tokens + visual.positional_embedding
            shifted = rearrange(tokens, "(b t) s d -> b t s d", t=len(offset)) + rearrange(offset, "t d -> t 1 d")
            return visual.ln_pre(shifted.flatten(0, 1))

    def _blocks(self, x: Tensor, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, tokens.<k>) for k = start … stop, given tokens.<start>."""
        yield start, x
        for k in range(start + 1, stop + 1):
            with self._autocast(self.spec.precision != "fp32"):
                x = self.visual.transformer.resblocks[k - 1](x)
            yield k, x

    def _project(self, x: Tensor) -> Tensor:
        """ln_post, class token and joint projection: tokens.<L> [F, 1+N, D] → embedding [F, E]."""
        with self._autocast(False):
            return self.visual._pool(x)[0] @ self.visual.proj

    def _encode_whole(self, images: Tensor, features: Sequence[str]) -> dict[str, Tensor]:
        """The embedding [F, E] of a tower that is not read block by block."""
        for name in features:
            if name != "embedding":
                self._need_tokens(name)
        with self._autocast(self.spec.precision != "fp32"):
            return {"embedding": self.model.encode_image(images, normalize=False).float()}

    def working_precision(self) -> torch.autocast:
        """Of blocks in a training step: the autocast around it, else the tower's own."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, dtype=torch.get_autocast_dtype(self.device.type))
        return self._autocast(self.spec.precision != "fp32")

    def _autocast(self, enabled: bool) -> torch.autocast:
        # Where it is off it is switched off: the tower's arithmetic is its own, also inside a training step.
        dtype = torch.float16 if self.spec.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self.spec.model)

    def _measure(self) -> TowerShape:
        text: Any = _text_tower(self.model)
        blocks = self.visual.transformer.resblocks if self.has_tokens else []
        text_blocks = getattr(getattr(text, "transformer", None), "resblocks", [])
        embed_dim = getattr(self.visual, "output_dim", None)
        if embed_dim is None:  # timm's towers do not say
            side = self.spec.transform.size_px
            embed_dim = self.encode_images(torch.zeros(1, 3, side, side).to(self.device), ["embedding"])[
                "embedding"
            ].shape[1]
        return TowerShape(
            layers=len(blocks),
            width=self.visual.conv1.out_channels if blocks else 0,
            heads=blocks[0].attn.num_heads if blocks else 0,
            embed_dim=embed_dim,
            grid=self.visual.grid_size if blocks else (0, 0),
            text_width=text.ln_final.weight.shape[0] if text_blocks else 0,
            text_layers=len(text_blocks),
            text_heads=text_blocks[0].attn.num_heads if text_blocks else 0,
            context_length=getattr(text, "context_length", 77),
        )

    def _need_tokens(self, what: str) -> None:
        if not self.has_tokens:
            raise TowerError(
                f"{self.spec.model} has no class and patch tokens, so it cannot give {what}",
                fix="Ask it for `embedding`, or use a ViT of open_clip with a class token, such as ViT-B-16-quickgelu.",
            )


def _tensor(pixels: Tensor | NDArray[np.uint8]) -> Tensor:
    if isinstance(pixels, Tensor):
        return pixels
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())  # torch warns of read-only memory


def _text_tower(model: nn.Module) -> nn.Module:
    return getattr(model, "text", model)  # the original CLIP class is its own text tower


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise TowerError(f"torch knows no device {device!r}", wanted="auto, cpu, cuda or cuda:1") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise TowerError("torch finds no such CUDA device here", seen=device, fix="Use the device auto or cpu.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise TowerError("torch finds no Apple GPU here", fix="Use the device auto or cpu.")
    if found.type not in ("cpu", "cuda", "mps"):
        raise TowerError("towers do not run on this device", seen=device, wanted="auto, cpu, cuda, cuda:1 or mps")
    return found
