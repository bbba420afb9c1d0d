"""Both sides must match, tensor by tensor, and what does not is named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megavlm.config.schema import Architecture
from megavlm.convert.weights.tables import rows
from megavlm.convert.weights.views import Header, HuggingFaceView, MegatronView
from tests.convert.models import NATIVE_KINDS, SMALL

NORM = "language_model.model.norm.weight"
KEY = "language.decoder.final_layernorm.weight"
HEAD = "language.output_layer.weight"


@dataclass
class InMemory:
    """Tensors that count how often they are read."""

    tensors: dict[str, Tensor]
    reads: int = 0

    @property
    def headers(self) -> dict[str, Header]:
        return {
            name: Header(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return self.tensors[name]

    def ranges(self, name: str, rows: range) -> None:
        return None

    def __str__(self) -> str:
        return "here"


def random_hf(architecture: Architecture) -> InMemory:
    return InMemory(
        {
            name: torch.randn(shape)
            for row in rows(architecture)
            for name, shape in zip(row.names, row.part_shapes, strict=True)
        }
    )


@pytest.mark.parametrize("architecture", NATIVE_KINDS.values(), ids=NATIVE_KINDS)
def test_there_and_back_is_the_same(architecture: Architecture) -> None:
    source = random_hf(architecture)
    back = HuggingFaceView(MegatronView(source, architecture), architecture)
    assert set(back) == set(source.tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in source.tensors.items())


def test_nothing_is_read_before_it_is_asked_for_and_then_once() -> None:
    source = random_hf(SMALL)
    ours = MegatronView(source, SMALL)
    back = HuggingFaceView(ours, SMALL)
    assert source.reads == 0
    for name in back:
        assert back[name].shape == back.headers[name].shape
    assert source.reads == len(source.tensors)


def test_type_can_be_changed() -> None:
    back = HuggingFaceView(MegatronView(random_hf(SMALL), SMALL), SMALL, torch.bfloat16)
    assert (
        {header.dtype for header in back.headers.values()}
        == {torch.bfloat16}
        == {back[name].dtype for name in back}
    )


@pytest.mark.parametrize("place", [(slice(0, 112),), (slice(50, 70), slice(3, 9))])
@pytest.mark.parametrize("other", [torch.float16, torch.float32])
def test_parts_of_several_dtypes_keep_their_values(other: torch.dtype, place: tuple) -> None:
    source = random_hf(SMALL)
    gate = "language_model.model.layers.0.mlp.gate_proj.weight"
    up = "language_model.model.layers.0.mlp.up_proj.weight"
    source.tensors[gate] = source.tensors[gate].bfloat16()
    source.tensors[up] = torch.full((56, 48), 0.29).to(other)
    ours = MegatronView(source, SMALL)
    key = "language.decoder.layers.0.mlp.linear_fc1.weight"
    assert ours.headers[key].dtype == ours[key].dtype == torch.float32
    whole = torch.cat([source.tensors[gate].float(), source.tensors[up].float()])
    assert torch.equal(ours[key], whole)
    assert torch.equal(ours.part(key, place), whole[place])
    assert ours.ranges(key, range(112)) is None
    assert ours.widened == ({gate, up} if other == torch.float16 else {gate})


def test_quantised_tensors_are_refused_by_name() -> None:
    source = random_hf(SMALL)
    source.tensors[NORM] = torch.ones(48, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{NORM}: has dtype uint8; quantised"):
        MegatronView(source, SMALL)


def test_every_tensor_of_hugging_face_that_does_not_fit_is_named() -> None:
    source = random_hf(SMALL)
    del source.tensors["vision_tower.embeddings.cls_token"]
    source.tensors["vision_tower.encoder.layer.0.attention.q_norm.weight"] = torch.ones(24)
    source.tensors[NORM] = torch.ones(47)
    with pytest.raises(ValueError, match="here: 3 tensors do not fit the model") as error:
        MegatronView(source, SMALL)
    text = str(error.value)
    assert "vision_tower.embeddings.cls_token: missing" in text
    assert (
        "vision_tower.encoder.layer.0.attention.q_norm.weight: not a weight of this model" in text
    )
    assert f"{NORM}: has shape [47], must be [48]" in text


def test_every_tensor_of_megatron_that_does_not_fit_is_named() -> None:
    ours = InMemory(dict(MegatronView(random_hf(SMALL), SMALL)))
    del ours.tensors[KEY]
    ours.tensors["language.decoder.layers.3.mlp.linear_fc2.weight"] = torch.ones(48, 56)
    ours.tensors[HEAD] = torch.ones(460, 48)
    with pytest.raises(ValueError, match="3 tensors") as error:
        HuggingFaceView(ours, SMALL)
    text = str(error.value)
    assert f"{KEY}: missing" in text and f"{HEAD}: has shape [460, 48], must be [461, 48]" in text
    assert "layers.3.mlp.linear_fc2.weight: not a weight of this model" in text


def test_rows_that_pad_the_vocabulary_are_dropped() -> None:
    source = random_hf(SMALL)
    ours = InMemory(dict(MegatronView(source, SMALL)))
    ours.tensors[HEAD] = torch.cat([ours.tensors[HEAD], torch.zeros(51, 48)])
    assert torch.equal(
        HuggingFaceView(ours, SMALL)["language_model.lm_head.weight"],
        source.tensors["language_model.lm_head.weight"],
    )


def test_a_long_list_is_cut() -> None:
    with pytest.raises(ValueError, match=r"and \d+ more"):
        MegatronView(InMemory({}), SMALL)
