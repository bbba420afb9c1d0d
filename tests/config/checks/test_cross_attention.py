"""What a model that reads images by cross-attention cannot be is told, with the flag to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.architecture import Contrastive
from megavlm.config.checks.rules import problems
from megavlm.config.connectors import LLAVA, Connector
from megavlm.config.cross_attention import CrossAttention
from megavlm.config.loss import Loss
from megavlm.config.qformer import QFormer
from megavlm.config.resampler import Resampler
from megavlm.config.schema import Config
from tests.convert.idefics_models import FLAMINGO
from tests.ranks.runs import config_for

TIED = dataclasses.replace(FLAMINGO.language, tied_head=True)


def found(tmp_path: Path, changes: dict[str, Any], **sections: Any) -> str:
    """Return the problems of a run of a changed model."""
    architecture = dataclasses.replace(FLAMINGO, **changes)
    config: Config = dataclasses.replace(config_for(tmp_path), architecture=architecture)
    sections = {"checkpoint": dict(save_interval=0)} | sections
    sections = {
        name: dataclasses.replace(vars(config)[name], **values) for name, values in sections.items()
    }
    return "\n".join(problems(dataclasses.replace(config, **sections), 1))


def test_nothing_is_wrong_with_the_model_of_the_tests(tmp_path: Path) -> None:
    assert found(tmp_path, {}) == ""
    assert found(tmp_path, {}, data=dict(next_image=0.5)) == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(cross_attention=CrossAttention(every=-1)), "cross_attention.every -1: must be 0"),
        (dict(cross_attention=CrossAttention(every=5)), "num_layers is 4; use at most that"),
        (dict(connector=LLAVA), "use resampler"),
        (
            dict(connector=Connector(kind="resampler", resampler=Resampler(latents=0))),
            "resampler.latents 0: must be 1 or more",
        ),
        (
            dict(connector=Connector(kind="resampler", bias=False)),
            "connector.bias false has no effect: --architecture.connector.kind is resampler",
        ),
        (dict(added_tokens=-1), "--architecture.added_tokens -1: must be 0 or more"),
        (dict(added_tokens=643), "less than --architecture.language.vocab_size 643"),
        (dict(language=TIED), "--architecture.language.tied_head false"),
        (
            dict(objective="contrastive", connector=Connector(kind="mean"), added_tokens=0),
            "has no tokens that read images",
        ),
        (
            dict(cross_attention=CrossAttention(qk_norm=False), added_tokens=0),
            "--architecture.cross_attention.qk_norm false has no effect:"
            " --architecture.cross_attention.every is 0; leave it out, or use true",
        ),
        (
            dict(
                connector=dataclasses.replace(LLAVA, resampler=Resampler(latents=8)),
                cross_attention=CrossAttention(),
            ),
            "--architecture.connector.resampler.latents 8 has no effect:"
            " --architecture.connector.kind is mlp; leave it out, or use 64",
        ),
        (
            dict(connector=Connector(kind="resampler", qformer=QFormer(queries=8))),
            "--architecture.connector.qformer.queries 8 has no effect:"
            " --architecture.connector.kind is resampler; leave it out, or use 32",
        ),
        (
            dict(contrastive=Contrastive(loss="sigmoid")),
            "--architecture.contrastive.loss sigmoid has no effect: --architecture.objective is"
            " next_token; leave it out, or use softmax",
        ),
    ],
)
def test_models_that_cannot_be(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    assert told in found(tmp_path, changes)


def test_settings_that_do_not_go_with_the_model(tmp_path: Path) -> None:
    assert "--data.next_image 2: must be from 0 to 1" in found(
        tmp_path, {}, data=dict(next_image=2)
    )
    plain = dict(cross_attention=CrossAttention(), added_tokens=0)
    told = found(tmp_path, plain, data=dict(next_image=0.5))
    assert "--data.next_image 0.5 has no effect" in told
    assert Loss(z_loss=0.1).is_by_block
    assert "--loss.z_loss: computes the head by block" in found(tmp_path, {}, loss=dict(z_loss=0.1))
