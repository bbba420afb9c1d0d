"""Sizes of connectors, and what older versions called their settings."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megavlm.config.checks import rules
from megavlm.config.cli import from_yaml, parse, to_yaml
from megavlm.config.connectors import LLAVA, Connector, Ends, connector_sizes
from megavlm.config.models import MODELS

ENDS = Ends(grid=8, input_size=32, output_size=48)
RUN = ["--stage", "1", "--model", "tiny"]


def test_a_quarter_of_the_patches_are_features_of_internvl_and_all_are_of_llava() -> None:
    ours = connector_sizes(Connector(), ENDS)
    llava = connector_sizes(LLAVA, ENDS)
    assert (ours.placeholders, ours.features, ours.feature_size) == (16, 16, 128)
    assert (llava.placeholders, llava.features, llava.feature_size) == (64, 64, 32)
    norms = [piece.key for piece in ours.pieces() if ".norm." in piece.key]
    assert norms == ["connector.norm.weight", "connector.norm.bias"]
    assert not any(".norm." in piece.key for piece in llava.pieces())


def test_rows_that_end_in_an_embedding_are_of_connectors_with_rows() -> None:
    for kind in ("mlp", "linear"):
        sizes = connector_sizes(dataclasses.replace(LLAVA, kind=kind, newline=True), ENDS)
        found = {piece.key: piece for piece in sizes.pieces()}["connector.newline"]
        assert (found.elements, found.forward, found.is_matrix) == (48, 0, False)
    options = ["--architecture.connector.kind", "qformer", "--architecture.connector.newline"]
    config = parse([*RUN, *options, "true", "--data.train", "packs"])
    told = [one for one in rules.problems(config, 1) if "connector.newline true" in one]
    assert len(told) == 1 and "kind qformer gives no rows" in told[0]


def test_an_unknown_connector_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="connector.kind glue: no such connector; known are mlp"):
        connector_sizes(Connector(kind="glue"), ENDS)


def test_options_of_older_versions_are_read() -> None:
    old = ["--architecture.pixel_shuffle", "4", "--architecture.projector_norm", "false"]
    config = parse([*RUN, *old, "--training.trainable", "projector,vision.encoder.layers.1"])
    assert config.architecture.connector == Connector(pixel_shuffle=4, norm=False)
    assert config.training.trainable == ("connector", "vision.encoder.layers.1")


def test_a_configuration_of_an_older_version_is_read() -> None:
    config = parse(RUN)
    tiny = MODELS["tiny"]
    text = to_yaml(config)
    section = r"  connector:\n    kind: mlp\n    pixel_shuffle: 2\n    norm: true\n(    .*\n)*"
    assert "- connector\n" in text
    old, count = re.subn(section, "  pixel_shuffle: 4\n  projector_norm: false\n", text)
    assert count == 1
    found = from_yaml(old.replace("- connector\n", "- projector\n"))
    expected = dataclasses.replace(tiny, connector=Connector(pixel_shuffle=4, norm=False))
    assert found == dataclasses.replace(config, architecture=expected)


def test_a_former_key_beside_todays_is_refused() -> None:
    text = "architecture: {pixel_shuffle: 4, connector: {pixel_shuffle: 2}}"
    with pytest.raises(ValueError, match="connector.pixel_shuffle is given 2 times"):
        from_yaml(text)
