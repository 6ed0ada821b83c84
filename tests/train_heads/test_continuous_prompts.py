"""Continuous prompts against the recorded original, against numbers worked by hand, and at work on a small real CLIP."""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from coldframe.data_manifests.errors import ConfigError
from coldframe.extract.batches import FeatureBatch
from coldframe.extract.specs import SpecMismatch, TowerShape
from coldframe.extract.tiny.facts import WORDS, draw_facts, draw_pictures
from coldframe.extract.towers import Tower, load_tower
from coldframe.train_heads import TrainSpec, load_checkpoint, train
from coldframe.train_heads.heads.continuous_prompts import HEAD, Config, ContinuousPrompts, Prompts
from coldframe.train_heads.layers import FrameTransformer
from coldframe.train_heads.specs import HeadContext

CLASSES = ("run", "long jump", "swim in the sea", "wave", "sit")
OFFICIAL: Any = HEAD.official


@functools.cache
def tower() -> Tower:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=8, patch_size=4, image_size=12)
    return Tower(CLIP(16, vision, CLIPTextCfg(width=16, heads=2, layers=2), quick_gelu=True), device="cpu")


def context(class_names: tuple[str, ...] = CLASSES, n_frames: int = 4) -> HeadContext:
    return HeadContext(tower().shape, n_frames, class_names, tower)


def build(class_names: tuple[str, ...] = CLASSES, **settings: Any) -> Any:
    """A head whose prompts are far from zero, so that they matter."""
    torch.manual_seed(0)
    head: Any = HEAD.build(Config(**{"prefix": 2, "postfix": 3} | settings), context(class_names))
    with torch.no_grad():
        head.prompts.vectors.normal_(std=0.5)
    return head.eval()


def batch_of(n_videos: int = 3, n_frames: int = 4, width: int = 16, labels: Tensor | None = None) -> FeatureBatch:
    frames = torch.randn(n_videos, n_frames, width, generator=torch.Generator().manual_seed(1))
    everything = torch.ones(n_videos, n_frames, dtype=torch.bool)
    labels = torch.arange(n_videos) if labels is None else labels
    return FeatureBatch({"embedding": frames}, everything, labels, tuple(map(str, range(n_videos))))


# ---- the original


def head_of_recording(file: Any, frozen: Tower, n_frames: int) -> tuple[Config, Any]:
    given = Config(
        prefix=file.sizes["prefix"], postfix=file.sizes["postfix"], heads=file.sizes["temporal_heads"], layers=0
    )
    wanted = HeadContext(frozen.shape, n_frames, ("any",), lambda: frozen)
    config, state = OFFICIAL.read(file.named("head."), wanted, given)
    shape = frozen.shape
    prompts = Prompts(config.prefix, config.postfix, shape.context_length, shape.text_width, is_table=True)
    frames = FrameTransformer(
        n_frames, shape.embed_dim, layers=config.layers, heads=config.heads, positions="published"
    )
    head = ContinuousPrompts(prompts, frames, frozen, file["token_ids"], config)
    head.load_state_dict(state)
    return config, head.eval()


def test_recorded_outputs_of_the_original(recorded: Callable[[str], list[Any]]) -> None:
    for file in recorded("Efficient-Prompt"):
        config, head = head_of_recording(file, file.tower, file.sizes["T"])
        assert (config.form, config.layers) == ("table", file.sizes["temporal_layers"])
        batch = replace(batch_of(len(file["frame_embeddings"])), features={"embedding": file["frame_embeddings"]})
        batch = replace(batch, mask=torch.ones(file["frame_embeddings"].shape[:2], dtype=torch.bool))
        output = head(batch)
        torch.testing.assert_close(output.embedding, file["video_embedding"], atol=1e-4, rtol=0)
        torch.testing.assert_close(head.class_texts(), file["text_embedding"], atol=1e-4, rtol=0)
        torch.testing.assert_close(output.logits, file["logits_normalised_0.07"], atol=1e-4, rtol=0)


def test_published_weights_go_through_unchanged(recorded: Callable[[str], list[Any]]) -> None:
    for file in recorded("Efficient-Prompt"):
        theirs = file.named("head.")
        config, head = head_of_recording(file, file.tower, file.sizes["T"])
        written = OFFICIAL.write(config, head.state_dict())
        assert written.keys() == theirs.keys()
        assert all(torch.equal(written[name], theirs[name]) for name in theirs)

        _, longer = head_of_recording(file, file.tower, 2 * file.sizes["T"])
        first, second = theirs["temporalEmbedding.weight"][:2]
        torch.testing.assert_close(longer.frames.position[1], 0.75 * first + 0.25 * second)


def test_a_checkpoint_of_prompts_alone() -> None:
    """The code makes a table of times even where no layer reads it."""
    table, times = torch.randn(77, 16), torch.randn(4, 16)
    config, state = OFFICIAL.read({"embedding.weight": table, "temporalEmbedding.weight": times}, context(), Config())
    assert (config.layers, config.form) == (0, "table")
    assert state.keys() == {"prompts.vectors"}
    assert torch.equal(OFFICIAL.write(config, state)["embedding.weight"], table)


def test_what_is_no_published_checkpoint_is_told() -> None:
    weights = {"embedding.weight": torch.zeros(77, 16), "temporalModelling.resblocks.0.ln_1.bias": torch.zeros(16)}
    with pytest.raises(SpecMismatch, match=r"missing temporalEmbedding\.weight, temporalModelling"):
        OFFICIAL.read(weights, context(), Config())
    with pytest.raises(SpecMismatch, match="unknown ctx"):
        OFFICIAL.read({"embedding.weight": torch.zeros(77, 16), "ctx": torch.zeros(1)}, context(), Config())
    for unlike in (Config(), Config(form="table")):
        with pytest.raises(ConfigError, match="form=table and positions=published"):
            OFFICIAL.write(unlike, {})


@pytest.mark.parametrize(("layers", "published"), [(0, 39_424), (1, 3_200_000), (2, 6_352_384), (4, 12_657_152)])
def test_parameter_counts_of_the_paper(layers: int, published: int) -> None:
    shape = TowerShape(12, 768, 12, 512, (14, 14), text_width=512, text_layers=12, text_heads=8, context_length=77)
    sized = HeadContext(shape, 16, CLASSES, tower)  # of the tower only the tokenizer is used
    with torch.device("meta"):
        parts = Config(form="table", layers=layers), Config(layers=layers)
        heads = []
        for config in parts:
            prompts = Prompts(16, 16, 77, 512, is_table=config.form == "table")
            frames = FrameTransformer(16, 512, layers=layers, heads=8) if layers else None
            heads.append(ContinuousPrompts(prompts, frames, tower(), torch.zeros(1, 77), config))
    table, free = (sum(p.numel() for p in head.parameters()) for head in heads)
    assert table == published
    assert free == published - (77 - 32) * 512
    if not layers:
        built: Any = HEAD.build(parts[0], sized)
        assert sum(p.numel() for p in built.parameters()) == published


# ---- where the vectors stand


def test_vectors_stand_around_the_words() -> None:
    """Ids 8 (start), 1 to 5 (words), 9 (end); the words are their ids, the vectors 100 and more, position p adds p / 100."""
    words = nn.Embedding.from_pretrained(torch.arange(10.0)[:, None])
    text: Any = SimpleNamespace(words=words, positions=torch.arange(10)[:, None] / 100)
    ids = torch.tensor([[8, 3, 9, 0, 0, 0, 0, 0, 0, 0], [8, 4, 5, 9, 0, 0, 0, 0, 0, 0]])
    free = Prompts(2, 1, 10, 1, is_table=False)
    table = Prompts(2, 1, 10, 1, is_table=True)
    with torch.no_grad():
        free.vectors.copy_(torch.tensor([[100.0], [101.0], [102.0]]))
        table.vectors.copy_(torch.arange(200.0, 210.0)[:, None])
    positions = torch.arange(7) / 100
    stream, ends = free(ids, text)
    assert ends.tolist() == [5, 6]
    torch.testing.assert_close(stream[0, :6, 0] - positions[:6], torch.tensor([8.0, 100, 101, 3, 102, 9]))
    torch.testing.assert_close(stream[1, :, 0] - positions, torch.tensor([8.0, 100, 101, 4, 5, 102, 9]))
    stream, ends = table(ids, text)
    assert ends.tolist() == [5, 6]
    torch.testing.assert_close(stream[0, :6, 0] - positions[:6], torch.tensor([8.0, 201, 202, 3, 204, 9]))
    torch.testing.assert_close(stream[1, :, 0] - positions, torch.tensor([8.0, 201, 202, 4, 5, 205, 9]))


def test_free_vectors_are_a_table_for_names_of_one_length() -> None:
    names = ("run", "jump", "swim")
    free, table = build(names), build(names, form="table")
    n_words = 1
    with torch.no_grad():
        table.prompts.vectors[1:3] = free.prompts.vectors[:2]
        table.prompts.vectors[3 + n_words : 6 + n_words] = free.prompts.vectors[2:]
    torch.testing.assert_close(table.class_texts(), free.class_texts())
    longer = ["swim in the sea"]
    assert not torch.allclose(table.embed_sentences(longer), free.embed_sentences(longer), atol=1e-3)


@pytest.mark.parametrize("form", ["free", "table"])
def test_a_text_does_not_depend_on_the_others(form: str) -> None:
    head = build(form=form)
    together = head.embed_sentences(CLASSES)
    alone = torch.cat([head.embed_sentences([name]) for name in CLASSES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, head.class_texts())


def test_names_are_made_readable() -> None:
    head = build(("LongJump", "long_jump", "long jump"))
    first, second, third = head.class_texts()
    torch.testing.assert_close(first, third, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, third, atol=1e-5, rtol=1e-5)


def test_texts_that_are_too_long_are_named() -> None:
    tokens = 77 - 2 - 32
    HEAD.build(Config(), context(("run", "run " * tokens)))
    with pytest.raises(ConfigError, match=r"16 \+ 16 .*78 tokens: 'run run .*expected at most 77"):
        HEAD.build(Config(), context(("swim", "run " * (tokens + 1))))
    with pytest.raises(ConfigError, match="needs words"):
        build().embed_sentences(["a dog", " "])


# ---- scores


def test_scores_are_the_cosine_over_a_fixed_temperature() -> None:
    head, batch = build(layers=0), batch_of()
    output = head(batch)
    torch.testing.assert_close(output.embedding, batch["embedding"].mean(1))
    wanted = normalize(output.embedding, dim=-1) @ normalize(head.class_texts(), dim=-1).T / 0.07
    torch.testing.assert_close(output.logits, wanted)


def test_classes_that_were_never_trained_are_scored_by_their_names() -> None:
    seen = build()
    unseen: Any = HEAD.build(Config(prefix=2, postfix=3), context(("dig", "long jump")))
    unseen.load_state_dict(seen.state_dict())
    logits = unseen.eval()(batch_of()).logits
    assert logits.shape == (3, 2)
    torch.testing.assert_close(logits[:, 1], seen(batch_of()).logits[:, 1], atol=1e-5, rtol=1e-5)


def test_kept_texts_are_what_would_be_computed() -> None:
    head, batch = build(), batch_of()

    def check() -> Tensor:
        with torch.no_grad():
            kept, again = head.class_texts(), head.class_texts()
            assert kept is again  # it is kept at all
            torch.testing.assert_close(kept, head.embed_tokens(head.class_ids))
        return kept

    first = check()
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    cross_entropy(head(batch).logits, batch.labels).backward()
    optimiser.step()
    stepped = check()
    other = {name: 2 * tensor for name, tensor in head.state_dict().items()}
    head.load_state_dict(other)
    loaded = check()
    head.prompts.vectors.data.mul_(-1)  # not even autograd knows
    for one, two in ((first, stepped), (stepped, loaded), (loaded, check())):
        assert not torch.allclose(one, two, atol=1e-4)
    with torch.inference_mode():
        head(batch)
    cross_entropy(head(batch).logits, batch.labels).backward()  # what inference kept is not in the way of training


def test_a_checkpointed_step_is_the_same_step() -> None:
    gradients = []
    for checkpoint in (False, True):
        head, batch = build(checkpoint=checkpoint).train(), batch_of()
        cross_entropy(head(batch).logits, batch.labels).backward()
        gradients.append(head.prompts.vectors.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().min() > 0


# ---- contrast with some of the classes


@pytest.mark.parametrize(("n_contrast", "n_seen"), [(0, 2), (3, 3), (1, 2)])
def test_a_training_step_sees_the_classes_of_its_batch_and_some_others(n_contrast: int, n_seen: int) -> None:
    head = build(n_contrast=n_contrast, layers=0).train()
    batch = batch_of(labels=torch.tensor([4, 1, 4]))
    seen = []
    compute = head.embed_tokens
    head.embed_tokens = lambda ids: seen.append(ids) or compute(ids)
    torch.manual_seed(5)
    output = head(batch)
    assert output.logits is None
    chosen = [int((head.class_ids == row).all(dim=1).nonzero()) for row in seen[0]]
    assert len(set(chosen)) == n_seen
    assert {1, 4} <= set(chosen)
    scores = head.similarity(output.embedding, head.class_texts())[:, chosen]
    wanted = cross_entropy(scores, torch.tensor([chosen.index(label) for label in (4, 1, 4)]))
    torch.testing.assert_close(output.losses["contrast"], wanted)
    torch.manual_seed(5)
    assert torch.equal(head(batch).losses["contrast"], output.losses["contrast"])
    assert head.eval()(batch).logits.shape == (3, 5)


def test_every_other_class_is_drawn_at_times() -> None:
    head = build(n_contrast=3).train()
    torch.manual_seed(0)
    drawn = [set(head._drawn_classes(torch.tensor([2, 2])).tolist()) for _ in range(40)]
    assert all(len(classes) == 3 for classes in drawn)
    assert set.union(*drawn) == set(range(5))


# ---- proposals


def test_proposals_by_hand() -> None:
    """Five frames at 0 … 4 s; class texts that are two axes."""
    head = build(("a", "b"), layers=0, logit_scale=1.0)
    texts = torch.eye(16)[:2]
    head.class_texts = lambda: texts
    frames = torch.zeros(5, 16)
    frames[:, :2] = torch.tensor([[1.0, 0], [0, 1], [0, 3], [4, 0], [0, -1]])
    proposals = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.5, 3.5], [2.0, 9.0], [2.6, 2.8], [7.0, 8.0]])
    wanted = torch.tensor([[1, 0], [0.5**0.5, 0.5**0.5], [0.5**0.5, 0.5**0.5], [4, 2], [1, 0], [0, -1]])
    wanted[3] /= 20**0.5  # (0, 3) + (4, 0) + (0, -1)
    torch.testing.assert_close(head.proposal_logits(frames, torch.arange(5.0), proposals), wanted)
    assert head.proposal_logits(frames, torch.arange(5.0), proposals[:0]).shape == (0, 2)


def test_a_proposal_is_a_video_of_its_own_to_the_temporal_module() -> None:
    head, frames = build(), batch_of(1, 10)["embedding"][0]
    proposals = torch.tensor([[2.0, 5.0], [0.0, 10.0], [1.0, 9.0]])
    found = head.proposal_logits(frames, torch.arange(10.0), proposals)
    parts = [frames[2:5], frames[[1, 3, 6, 8]], frames[[2, 4, 6, 8]]]  # centres of four equal segments
    for row, part in zip(found, parts, strict=True):
        alone = head(replace(batch_of(1, len(part)), features={"embedding": part[None]})).logits
        torch.testing.assert_close(row, alone[0], atol=1e-4, rtol=1e-5)
    assert head.proposal_logits(frames, torch.arange(10.0), proposals[:0]).shape == (0, 5)


# ---- retrieval


def recall_at_1(head: Any, batch: FeatureBatch, captions: list[str]) -> float:
    with torch.no_grad():
        scores = head.similarity(head.embed_videos(batch), head.embed_sentences(captions))
    return float((scores.argmax(dim=1) == torch.arange(len(captions))).float().mean())


@functools.cache
def drawn_videos() -> tuple[Tower, Tensor, list[str]]:
    """Two pictures a video of what a caption says, seen by a CLIP that knows of such, through a camera that shifts all."""
    frozen = load_tower("coldframe-tiny", device="cpu")
    facts = np.random.default_rng(1).permutation(np.unique(draw_facts(160, np.random.default_rng(0)), axis=0))
    pictures, _, _ = draw_pictures(np.repeat(facts, 2, axis=0), np.random.default_rng(2))
    side = frozen.spec.transform.size_px
    crops = np.stack([np.asarray(picture.resize((side, side))) for picture in pictures])
    embedding = frozen.encode_frames(rearrange(crops, "f h w c -> f c h w"), ["embedding"])["embedding"]
    shift = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(0))
    embedding = embedding + 4 * embedding.norm(dim=1).mean() * normalize(shift, dim=0)
    captions = [" ".join(WORDS[i][fact] for i, fact in enumerate(row)).strip() for row in facts]
    return frozen, rearrange(embedding, "(b t) e -> b t e", t=2), captions


@pytest.mark.parametrize("layers", [0, 1])
def test_captions_are_retrieved_better_after_training(layers: int) -> None:
    """Every caption a class of its own, against those of its batch; the captions scored were not trained."""
    frozen, frames, captions = drawn_videos()

    def part(rows: slice) -> tuple[FeatureBatch, list[str]]:
        return replace(batch_of(len(captions[rows]), 2), features={"embedding": frames[rows]}), captions[rows]

    (batch, seen), (unseen_batch, unseen) = part(slice(0, 80)), part(slice(80, 120))
    torch.manual_seed(0)
    config = Config(prefix=4, postfix=4, layers=layers, n_contrast=0)
    head: Any = HEAD.build(config, HeadContext(frozen.shape, 2, tuple(seen), lambda: frozen))
    before = recall_at_1(head.eval(), unseen_batch, unseen)
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.01)
    head.train()
    for step in range(40):
        rows = torch.randperm(len(batch), generator=torch.Generator().manual_seed(step))[:32]
        optimiser.zero_grad()
        head(batch.select(rows)).losses["contrast"].backward()
        optimiser.step()
    assert before < 0.3
    assert recall_at_1(head.eval(), unseen_batch, unseen) > 0.5


# ---- in a run


def test_a_run_ends_in_a_checkpoint_that_scores_other_names(store: Any, manifest: Any, tmp_path: Any) -> None:
    spec = TrainSpec(epochs=3, batch_size=8, lr=0.01, val_fraction=0.25)
    config = Config(prefix=2, postfix=2, heads=4, n_contrast=2)
    trained = train(store, manifest, "continuous_prompts", config, spec, tmp_path / "run", device="cpu", quiet=True)
    assert trained.scores["top_1"] > 0.9
    predictor = load_checkpoint(tmp_path / "run").predictor(store, ("walk", "run", "sleep", "eat"), "cpu")
    assert predictor.uses_class_names
    assert predictor.class_names == ("walk", "run", "sleep", "eat")
    ids = store.ids[:3]
    features, mask = store.gather(ids, ("embedding",))
    assert predictor.logits(FeatureBatch(features, mask, torch.zeros(3, dtype=torch.int64), ids)).shape == (3, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"prefix": 0, "postfix": 0},
        {"prefix": -1},
        {"layers": -1},
        {"n_contrast": -1},
        {"form": "list"},
        {"positions": "sine"},
        {"heads": 0},
        {"dropout": 1.0},
        {"logit_scale": 0.0},
        {"logit_scale": float("nan")},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Config(**settings)
