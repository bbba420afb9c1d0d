"""The Q-Former against those of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megavlm.config.connectors import Connector, Ends, connector_sizes
from megavlm.config.qformer import QFormer, QFormerSizes
from megavlm.config.schema import Config
from megavlm.convert.weights import qformer as weights
from megavlm.model.connector.qformer import QFormerConnector
from megavlm.model.connector.qformer_mask import Mode, TextRows, seen_by
from megavlm.model.kernels import local_kernels
from tests.ranks.runs import TINY, config_for

VISION = 28
SETTINGS = QFormer(
    queries=5,
    num_layers=3,
    hidden_size=42,
    ffn_hidden_size=70,
    num_attention_heads=6,
    text=True,
    vocab_size=53,
    max_position_embeddings=19,
)
TILES = 3
LENGTHS = (7, 2, 4)


def run_of(settings: QFormer) -> Config:
    vision = dataclasses.replace(TINY.vision, hidden_size=VISION, num_attention_heads=4)
    connector = Connector(kind="qformer", qformer=settings)
    architecture = dataclasses.replace(TINY, vision=vision, connector=connector)
    return dataclasses.replace(config_for(Path("packs")), architecture=architecture)


def _hub_settings(settings: QFormer) -> dict:
    return dict(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.ffn_hidden_size,
        max_position_embeddings=settings.max_position_embeddings,
        cross_attention_frequency=settings.cross_attention_frequency,
        encoder_hidden_size=VISION,
    )


class Theirs(nn.Module):
    """What stands around the Q-Former of BLIP-2 in the classes of transformers."""

    def __init__(self, settings: QFormer):
        from transformers import Blip2QFormerConfig, Blip2QFormerModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        super().__init__()
        config = Blip2QFormerConfig(**_hub_settings(settings), use_qformer_text_input=True)
        config._attn_implementation = "eager"
        self.qformer = Blip2QFormerModel(config)
        self.embeddings = Blip2TextEmbeddings(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, settings.queries, settings.hidden_size))
        self.vision_model = nn.ModuleDict({"post_layernorm": nn.LayerNorm(VISION, eps=1e-6)})
        self.language_projection = nn.Linear(settings.hidden_size, 48)


class TheirsInstruct(Theirs):
    """The same of InstructBLIP."""

    def __init__(self, settings: QFormer):
        from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

        super().__init__(settings)
        del self.embeddings
        config = InstructBlipQFormerConfig(**_hub_settings(settings))
        config._attn_implementation = "eager"
        self.qformer = InstructBlipQFormerModel(config)


def pair(
    kind: type[Theirs], names: weights.Names, settings: QFormer = SETTINGS
) -> tuple[QFormerConnector, Theirs]:
    """Return our module and theirs, with the same random weights."""
    torch.manual_seed(4)
    theirs = kind(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    config = run_of(settings)
    ours = QFormerConnector(config, local_kernels(), None)
    state = theirs.state_dict()
    rows = weights.rows(config.architecture, names)
    given = {row.key: row.join([state.pop(name) for name in row.names]) for row in rows}
    assert not state
    assert {row.key: row.shape for row in rows} == {
        key: tuple(value.shape) for key, value in ours.state_dict().items()
    }
    ours.load_state_dict(given, strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def both() -> tuple[QFormerConnector, Theirs]:
    return pair(Theirs, weights.BLIP2)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def texts() -> tuple[Tensor, Tensor]:
    """Return token ids [I, L], and which of them are real."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SETTINGS.vocab_size, (TILES, max(LENGTHS)), generator=generator)
    return ids, torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]


def hidden_states() -> Tensor:
    return torch.randn(17, TILES, VISION, generator=torch.Generator().manual_seed(2))


def asked_of(theirs: Theirs, hidden: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
    """Run the Q-Former of BLIP-2 on its queries and, if there is one, on a text."""
    memory = theirs.vision_model["post_layernorm"](hidden.transpose(0, 1))
    queries = theirs.query_tokens.expand(TILES, -1, -1)
    rows = theirs.embeddings(text, query_embeds=queries)
    return theirs.qformer(
        query_embeds=rows,
        query_length=SETTINGS.queries,
        attention_mask=mask,
        encoder_hidden_states=memory,
    ).last_hidden_state


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def real_rows(rows: Tensor, real: Tensor) -> Tensor:
    """Leave out the rows of padding."""
    queries = real.new_ones(TILES, rows.shape[1] - real.shape[1])
    return rows[torch.cat([queries, real], dim=1)]


def test_features_are_those_of_transformers(both: tuple[QFormerConnector, Theirs]) -> None:
    ours, theirs = both
    expected = theirs.language_projection(asked_of(theirs, hidden_states(), None, None))
    close(ours(hidden_states()), expected.flatten(0, 1)[:, None])


def test_a_text_alone_is_that_of_transformers(both: tuple[QFormerConnector, Theirs]) -> None:
    ours, theirs = both
    ids, real = texts()
    found = ours.read(None, ids, seen_by(0, [TextRows(mode="separate", real=real)]))
    expected = theirs.qformer(
        query_embeds=theirs.embeddings(ids), query_length=0, attention_mask=real.long()
    ).last_hidden_state
    close(real_rows(found, real), real_rows(expected, real))


def test_queries_and_a_text_are_those_of_transformers(
    both: tuple[QFormerConnector, Theirs],
) -> None:
    ours, theirs = both
    ids, real = texts()
    memory = ours.memory(hidden_states())
    seen = seen_by(SETTINGS.queries, [TextRows(mode="bidirectional", real=real)])
    mask = torch.cat([torch.ones(TILES, SETTINGS.queries), real], dim=1).long()
    expected = asked_of(theirs, hidden_states(), ids, mask)
    close(real_rows(ours.read(memory, ids, seen), real), real_rows(expected, real))


def test_a_text_that_is_generated_sees_queries_and_what_comes_before(
    both: tuple[QFormerConnector, Theirs],
) -> None:
    ours, theirs = both
    ids, real = texts()
    memory = ours.memory(hidden_states())
    found = ours.read(memory, ids, seen_by(SETTINGS.queries, [TextRows(mode="causal", real=real)]))
    queries = SETTINGS.queries
    rows = queries + ids.shape[1]
    allowed = torch.ones(rows, rows).tril().bool()
    allowed[:queries, :queries] = True
    hidden = torch.zeros(TILES, 1, rows, rows).masked_fill(~allowed, torch.finfo().min)
    close(real_rows(found, real), real_rows(asked_of(theirs, hidden_states(), ids, hidden), real))


def test_one_pass_over_two_texts_is_three_passes(both: tuple[QFormerConnector, Theirs]) -> None:
    ours, _ = both
    ids, real = texts()
    other = ids.flip(1)
    memory = ours.memory(hidden_states())
    modes: tuple[Mode, ...] = ("separate", "causal")
    streams = [TextRows(mode=mode, real=real) for mode in modes]
    places = torch.arange(ids.shape[1]).repeat(2)
    seen = seen_by(SETTINGS.queries, streams)
    joint = ours.read(memory, torch.cat([ids, other], dim=1), seen, places)
    queries, contrasted, generated = joint.split([SETTINGS.queries, 7, 7], dim=1)
    close(queries, ours.read(memory))
    alone = ours.read(None, ids, seen_by(0, streams[:1]))
    close(contrasted[real], alone[real])
    behind = ours.read(memory, other, seen_by(SETTINGS.queries, streams[1:]))
    close(generated[real], behind[:, SETTINGS.queries :][real])
    assert joint.isfinite().all()


def test_the_text_changes_the_features_only_if_they_see_it(
    both: tuple[QFormerConnector, Theirs],
) -> None:
    ours, _ = both
    ids, real = texts()
    memory = ours.memory(hidden_states())
    alone = ours.read(memory)
    for mode, same in (("bidirectional", False), ("causal", True), ("separate", True)):
        seen = seen_by(SETTINGS.queries, [TextRows(mode=mode, real=real)])
        found = ours.read(memory, ids, seen)[:, : SETTINGS.queries]
        assert torch.allclose(found, alone, atol=1e-5) is same, mode


def test_instructions_are_read_as_in_instruct_blip() -> None:
    ours, theirs = pair(TheirsInstruct, weights.INSTRUCT_BLIP)
    ids, real = texts()
    hidden = hidden_states()
    seen = seen_by(SETTINGS.queries, [TextRows(mode="bidirectional", real=real)])
    expected = theirs.qformer(
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(TILES, SETTINGS.queries), real], dim=1).long(),
        query_embeds=theirs.query_tokens.expand(TILES, -1, -1),
        encoder_hidden_states=theirs.vision_model["post_layernorm"](hidden.transpose(0, 1)),
    ).last_hidden_state
    found = ours.read(ours.memory(hidden), ids, seen)
    close(real_rows(found, real), real_rows(expected, real))


@pytest.mark.parametrize(
    ("frequency", "layers", "crossed"), [(1, 3, [0, 1, 2]), (3, 5, [0, 3]), (2, 4, [0, 2])]
)
def test_some_layers_attend_to_the_tile(frequency: int, layers: int, crossed: list[int]) -> None:
    settings = dataclasses.replace(
        SETTINGS, cross_attention_frequency=frequency, num_layers=layers, text=False
    )
    connector = QFormerConnector(run_of(settings), local_kernels(), None)
    found = [n for n, layer in enumerate(connector.layers) if layer.has_cross_attention]
    assert found == crossed
    keys = connector.state_dict()
    assert {f"layers.{n}.cross_attention.key_value.weight" in keys for n in crossed} == {True}
    assert not any("text" in key or "embedding." in key for key in keys)


def test_the_planner_knows_every_weight() -> None:
    config = run_of(SETTINGS)
    connector = QFormerConnector(config, local_kernels(), None)
    sizes = {piece.key: piece for piece in config.architecture.connector_sizes.pieces()}
    sizes.pop("")
    held = {f"connector.{key}": value for key, value in connector.state_dict().items()}
    assert {key: piece.elements for key, piece in sizes.items()} == {
        key: value.numel() for key, value in held.items()
    }
    assert all(piece.is_matrix == (held[key].dim() == 2) for key, piece in sizes.items())


def test_the_planner_counts_the_products_of_blip2() -> None:
    """Compare with the sum by hand: 12 layers on 32 queries, 6 of them with 257 tokens of a
    tile.
    """
    sizes = connector_sizes(
        Connector(kind="qformer"), Ends(grid=16, input_size=1408, output_size=4096, tokens=257)
    )
    assert (
        sum(piece.elements for piece in sizes.pieces()) == 105_137_664 + 2816 + 32 * 768 + 3_149_824
    )
    own = 12 * (2 * 4 * 768**2 * 32 + 4 * 32 * 32 * 768 + 2 * 2 * 768 * 3072 * 32)
    crossed = 2 * 2 * 768**2 * 32 + 2 * 2 * 1408 * 768 * 257 + 4 * 32 * 257 * 768
    assert sum(piece.forward for piece in sizes.pieces()) == own + 6 * crossed + 2 * 32 * 768 * 4096


@pytest.mark.parametrize("queries", [5, 32])
def test_the_planner_estimates_what_is_kept_for_the_backward_pass(queries: int) -> None:
    config = run_of(dataclasses.replace(SETTINGS, text=False, queries=queries))
    connector = QFormerConnector(config, local_kernels(), None)
    own = {parameter.data_ptr() for parameter in connector.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        features = connector(hidden_states())
    assert features.requires_grad
    expected = config.architecture.connector_sizes.kept(1)
    assert sum(kept.values()) / TILES == pytest.approx(expected, rel=0.1)


def test_sizes_that_cannot_be_are_refused_with_their_flags() -> None:
    wrong = QFormer(queries=0, num_attention_heads=5)
    ends = Ends(grid=4, input_size=28, output_size=48, tokens=17)
    [few] = QFormerSizes(wrong, ends).problems()
    assert few == "--architecture.connector.qformer.queries 0: must be 1 or more"
    [heads] = QFormerSizes(QFormer(num_attention_heads=5), ends).problems()
    assert "num_attention_heads 5 does not divide" in heads and "hidden_size 768" in heads
