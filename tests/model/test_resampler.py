"""The Perceiver resampler against that of IDEFICS in transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megavlm.config.checks.architecture import architecture_problems
from megavlm.config.connectors import Connector, Ends, connector_sizes
from megavlm.config.cross_attention import CrossAttention
from megavlm.config.resampler import Resampler
from megavlm.config.schema import Config
from megavlm.convert.weights import resampler as weights
from megavlm.model.connector.linear import LinearConnector
from megavlm.model.connector.resampler import ResamplerConnector
from megavlm.model.kernels import local_kernels
from tests.ranks.runs import TINY, config_for

VISION = 28
TILES = 3


def run_of(settings: Resampler, every: int = 1) -> Config:
    vision = dataclasses.replace(TINY.vision, family="clip", hidden_size=VISION)
    connector = Connector(kind="resampler", resampler=settings)
    architecture = dataclasses.replace(
        TINY, vision=vision, connector=connector, cross_attention=CrossAttention(every=every)
    )
    return dataclasses.replace(config_for(Path("packs")), architecture=architecture)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_it_equals_that_of_transformers(qk_norm: bool) -> None:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    settings = Resampler(
        latents=5, num_layers=3, num_attention_heads=3, head_size=10, qk_norm=qk_norm
    )
    config = run_of(settings)
    torch.manual_seed(0)
    theirs = IdeficsPerceiverResampler(
        IdeficsConfig(
            vision_config={"embed_dim": VISION},
            perceiver_config={"qk_layer_norms_perceiver": qk_norm},
        ),
        VISION,
        settings.num_layers,
        settings.num_attention_heads,
        settings.head_size,
        settings.latents,
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = ResamplerConnector(config, local_kernels(), None)
    parameters = dict(ours.named_parameters())
    files = theirs.state_dict()
    table = weights.rows(config.architecture)
    assert {row.key for row in table} == parameters.keys()
    assert {name for row in table for name in row.names} == files.keys()
    with torch.no_grad():
        for row in table:
            parameters[row.key].copy_(row.join([files[name] for name in row.names]))
    hidden = torch.randn(config.architecture.vision.tokens, TILES, VISION, requires_grad=True)
    found = ours(hidden)
    expected = theirs(hidden.transpose(0, 1))
    torch.testing.assert_close(found[:, 0], expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    draw = torch.randn_like(found)
    [mine] = torch.autograd.grad((found * draw).sum(), hidden)
    [wanted] = torch.autograd.grad((expected.flatten(0, 1) * draw[:, 0]).sum(), hidden)
    torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


def test_its_sizes_are_those_of_the_module() -> None:
    for every, placeholders in ((1, 1), (0, 5)):
        config = run_of(Resampler(latents=5, num_layers=2), every)
        sizes = config.architecture.connector_sizes
        assert (sizes.placeholders, sizes.features) == (placeholders, 5)
        held = {
            f"connector.{name}": parameter.numel()
            for name, parameter in ResamplerConnector(
                config, local_kernels(), None
            ).named_parameters()
        }
        assert {piece.key: piece.elements for piece in sizes.pieces() if piece.key} == held
        assert sizes.kept(1) > 0


def test_features_of_a_linear_connector_are_as_wide_as_what_cross_attention_reads() -> None:
    config = run_of(Resampler())
    vision = dataclasses.replace(config.architecture.vision, image_size=4, patch_size=4)
    linear = dict(vision=vision, connector=Connector(kind="linear"))
    architecture = dataclasses.replace(config.architecture, **linear)
    assert not architecture_problems(architecture)
    module = LinearConnector(
        dataclasses.replace(config, architecture=architecture), local_kernels(), None
    )
    features = module(torch.randn(vision.tokens, TILES, VISION))
    assert features.shape == (TILES, 1, architecture.memory_size)
    [weight, _] = architecture.connector_sizes.pieces()
    assert weight.elements == module.linear.weight.numel()


def test_sizes_that_cannot_be_are_named() -> None:
    ends = Ends(grid=4, input_size=VISION, output_size=48, tokens=17, is_memory=True)
    settings = Connector(kind="resampler", resampler=Resampler(latents=0, head_size=-1))
    found = list(connector_sizes(settings, ends).problems())
    assert [problem.split(":")[0].rpartition(".")[2] for problem in found] == [
        "latents 0",
        "head_size -1",
    ]


def test_the_published_one_has_as_many_weights_as_that_of_idefics_9b() -> None:
    ends = Ends(grid=16, input_size=1280, output_size=1280, tokens=257, is_memory=True)
    pieces = list(connector_sizes(Connector(kind="resampler"), ends).pieces())
    assert round(sum(piece.elements for piece in pieces) / 1e6, 1) == 126.0
    assert sum(piece.forward for piece in pieces) == pytest.approx(29e9, rel=0.01)
