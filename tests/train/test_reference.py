"""How the weights are named that the probabilities of a reference model are of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.checkpoint.train_state import State
from megavlm.config.lora import Lora
from megavlm.config.schema import Config, Eval, Init, Training
from megavlm.data.store.reference import ReferenceFacts
from megavlm.train.reference import ReferenceError, find, of_another, weights_of
from tests.ranks.runs import TINY

CONFIG = Config(stage="mpo", model="tiny", architecture=TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "hf"


def test_a_folder_is_known_by_its_files_but_not_by_runs_in_it(folder: Path) -> None:
    before = weights_of(CONFIG, folder)
    assert before.startswith(f"{folder}, files ")
    (folder / "mpo" / "reference").mkdir(parents=True)
    (folder / "mpo" / "reference" / "logprobs.bin").write_bytes(b"1")
    assert weights_of(CONFIG, folder) == before
    (folder / "model.safetensors").write_bytes(b"others")
    assert weights_of(CONFIG, folder) != before


def test_weights_in_4_bits_are_others(folder: Path) -> None:
    lora = Lora(rank=2, nf4=("language",))
    rounded = dataclasses.replace(CONFIG, architecture=dataclasses.replace(TINY, lora=lora))
    assert weights_of(rounded, folder) == weights_of(CONFIG, folder) + ", in 4 bits: language"


def test_parts_that_are_not_given_follow_from_the_seed(folder: Path) -> None:
    other = dataclasses.replace(CONFIG, training=Training(seed=5))
    for start in (None, Init(vision=str(folder))):
        assert weights_of(CONFIG, start) != weights_of(other, start)


def test_a_checkpoint_may_lack_checksums(folder: Path) -> None:
    start = Checkpoint(folder=folder, config=CONFIG, state=State(step=3))
    assert weights_of(CONFIG, start) == weights_of(CONFIG, folder)
    (folder / "checksums.json").write_text("{}")
    assert weights_of(CONFIG, start).startswith("stage -, step 3, checksum ")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (CONFIG, "this run does not start from the reference's weights"),
        (dataclasses.replace(CONFIG, eval=Eval(only=True)), "an evaluation computes none"),
    ],
)
def test_who_cannot_compute_probabilities_says_why(folder: Path, config: Config, why: str) -> None:
    start = Checkpoint(folder=folder, config=CONFIG, state=State(stage="mpo", step=3))
    facts = ReferenceFacts(weights="", dataset="packs", idx_crc32=0, packs=1, pairs=1)
    with pytest.raises(ReferenceError, match=f"lacks the probabilities of packs .* and {why}"):
        find(config, start, folder / "packs-0", facts)


def test_a_run_that_resumes_is_warned_of_another_reference(folder: Path) -> None:
    state = State(stage="mpo", step=3, reference="stage 2, step 9")
    start = Checkpoint(folder=folder, config=CONFIG, state=state)
    facts = ReferenceFacts(weights="", dataset="packs", idx_crc32=0, packs=1, pairs=1)

    def warned(weights: str, start: Checkpoint = start, config: Config = CONFIG) -> str:
        return of_another(config, start, dataclasses.replace(facts, weights=weights))

    assert "began with another reference model (stage 2, step 9)" in warned("stage 2, step 8")
    assert not warned("stage 2, step 9")
    unknown = dataclasses.replace(start, state=State(stage="mpo"))  # of an earlier version
    assert not warned("stage 2, step 8", unknown)
    assert not warned("stage 2, step 8", config=dataclasses.replace(CONFIG, stage="after"))
