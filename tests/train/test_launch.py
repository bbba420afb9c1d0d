"""What a job refuses before anything is built, and in which words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest

from megavlm.config.checks.rules import ConfigError
from megavlm.config.cli import to_yaml
from megavlm.config.schema import Checkpoint, Config, Logging
from megavlm.train.inspection import inspect
from megavlm.train.resume import history, resumes
from tests.data.samples import make_dataset
from tests.ranks.runs import TINY, config_for, make_packs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_dataset(
        folder,
        packs=4,
        vocab_size=199,
        context_token_id=7,
        tile_size=16,
        features_per_tile=4,
        capacity=128,
    )
    return folder


def _config(dataset: Path, **checkpoint) -> Config:
    checkpoint = {"save_interval": 0} | checkpoint
    return dataclasses.replace(
        config_for(dataset), checkpoint=Checkpoint(**checkpoint), logging=Logging(interval=1)
    )


def _fake_checkpoint(folder: Path, config: Config, **state) -> Path:
    """Write the small files of a checkpoint; no test here reads its weights."""
    step = folder / "step_00000001"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(to_yaml(config))
    (step / "state.json").write_text(
        json.dumps({"step": 1, "consumed": 4, "stage": "2", "tokenizer": None, "format": 1} | state)
    )
    (folder / "latest").write_text("step_00000001\n")
    return folder


def test_a_sound_job_starts_from_nothing(dataset: Path, tmp_path: Path) -> None:
    assert inspect(_config(dataset, save=str(tmp_path / "new")), 1) is None


def test_all_problems_are_told_at_once(dataset: Path) -> None:
    parallel = dataclasses.replace(_config(dataset).parallel, tensor_model_parallel_size=3)
    config = dataclasses.replace(_config(dataset), parallel=parallel)
    with pytest.raises(ConfigError) as error:
        inspect(config, 4)
    assert "--parallel.tensor_model_parallel_size 3" in str(error.value)
    assert "does not divide the number of ranks, 4" in str(error.value)


def test_a_model_that_contradicts_its_family_is_refused_before_it_is_trained(dataset: Path) -> None:
    config = _config(dataset)
    language = dataclasses.replace(config.architecture.language, family="llama")
    config = dataclasses.replace(
        config, architecture=dataclasses.replace(config.architecture, language=language)
    )
    with pytest.raises(
        ValueError, match="family llama: --architecture.language.qkv_bias is true, must be false"
    ):
        inspect(config, 1)


def test_the_same_weights_under_another_familys_names_are_no_difference(
    dataset: Path, tmp_path: Path
) -> None:
    config = _config(dataset)
    llama, internlm = (
        dataclasses.replace(
            config.architecture,
            language=dataclasses.replace(TINY.language, family=name, qkv_bias=False),
        )
        for name in ("llama", "internlm2")
    )
    source = _fake_checkpoint(
        tmp_path / "run", dataclasses.replace(config, architecture=llama), stage=None
    )
    config = dataclasses.replace(
        config,
        architecture=internlm,
        checkpoint=dataclasses.replace(config.checkpoint, load=str(source)),
    )
    assert inspect(config, 1).folder == source / "step_00000001"


def test_packs_of_another_tile_size_are_refused(tmp_path: Path) -> None:
    make_dataset(
        tmp_path / "other",
        packs=2,
        vocab_size=199,
        context_token_id=7,
        tile_size=32,
        features_per_tile=16,
    )
    with pytest.raises(ConfigError, match=r"--data.train.*(?s:.*)32.*16"):
        inspect(_config(tmp_path / "other"), 1)


def test_packs_of_a_larger_vocabulary_are_refused(tmp_path: Path) -> None:
    make_dataset(
        tmp_path / "other",
        packs=2,
        vocab_size=900,
        context_token_id=7,
        tile_size=16,
        features_per_tile=4,
    )
    with pytest.raises(ConfigError, match="900.*199|199.*900"):
        inspect(_config(tmp_path / "other"), 1)


def test_missing_packs_are_named(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"--data.train.*{tmp_path / 'none'}"):
        inspect(_config(tmp_path / "none"), 1)


@pytest.mark.parametrize("name", ["train", "valid"])
def test_packs_without_their_index_are_named_before_anything_is_built(
    dataset: Path, tmp_path: Path, name: str
) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(dataset, packs)
    (packs / "packs.idx").unlink()
    data = dataclasses.replace(_config(dataset).data, **{name: str(packs)})
    with pytest.raises(FileNotFoundError, match=f"{packs}/packs.idx: missing"):
        inspect(dataclasses.replace(_config(dataset), data=data), 1)


def test_an_export_is_refused_before_training_if_the_packs_have_no_tokenizer(
    dataset: Path, tmp_path: Path
) -> None:
    files = dict(save=str(tmp_path / "run"), export_hf=str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=r"--checkpoint.export_hf .*/train has no folder token"):
        inspect(_config(dataset, **files), 1)


def test_the_tokenizer_of_an_export_is_that_of_the_first_packs_with_images(
    dataset: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    make_packs(texts, packs=2, image_share=0.0)
    (texts / "tokenizer").mkdir()
    config = _config(dataset, save=str(tmp_path / "run"), export_hf=str(tmp_path / "hf"))
    data = dataclasses.replace(config.data, train=f"{texts},{dataset}")
    with pytest.raises(ValueError, match=f"--data.train {dataset} has no folder tokenizer"):
        inspect(dataclasses.replace(config, data=data), 1)


def test_a_save_folder_with_something_else_is_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match=r"--checkpoint.save.*thesis.tex"):
        inspect(_config(dataset, save=str(tmp_path)), 1)


def test_a_save_folder_of_another_stage_is_refused(dataset: Path, tmp_path: Path) -> None:
    save = _fake_checkpoint(tmp_path / "run", _config(dataset), stage="1")
    with pytest.raises(ValueError, match=r"--checkpoint.save.*stage 1.*this is stage 2"):
        inspect(_config(dataset, save=str(save)), 1)


def test_a_checkpoint_of_another_recipe_gives_its_weights_only(
    dataset: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(_config(dataset), recipe="other")
    folder = _fake_checkpoint(tmp_path / "run", other)
    with pytest.raises(ValueError, match=r"--checkpoint.save.*recipe other.*recipe internvl"):
        inspect(_config(dataset, save=str(folder)), 1)
    config = _config(dataset, load=str(folder))
    assert not resumes(config, inspect(config, 1))
    assert resumes(dataclasses.replace(config, recipe="other"), inspect(config, 1))


def test_a_run_keeps_the_moments_of_earlier_stages_as_it_asks(
    dataset: Path, tmp_path: Path
) -> None:
    earlier = [[7, ["language"]]]
    before = {"stage": "1", "step": 5, "skipped": 2, "history": earlier}
    folder = _fake_checkpoint(tmp_path / "run", _config(dataset), **before)
    kept = ((7, ("language",)),)
    config = _config(dataset, load=str(folder), moments="keep")
    last = (3, config.training.trainable)
    assert history(config, inspect(config, 1)) == (*kept, last)
    fresh = _config(dataset, load=str(folder))
    assert history(fresh, inspect(fresh, 1)) == ()
    of_stage_1 = dataclasses.replace(config, stage="1")
    assert history(of_stage_1, inspect(of_stage_1, 1)) == kept
    assert history(config, tmp_path) == ()


def test_a_run_resumes_its_own_checkpoint_even_if_others_give_weights_only(
    dataset: Path, tmp_path: Path
) -> None:
    folder = _fake_checkpoint(tmp_path / "run", _config(dataset))
    other = _config(dataset, load=str(folder), weights_only=True)
    assert not resumes(other, inspect(other, 1))
    own = dataclasses.replace(other.checkpoint, save=str(folder))
    own = dataclasses.replace(other, checkpoint=own)
    assert resumes(own, inspect(other, 1))


@pytest.mark.parametrize(
    ("before", "state", "told"),
    [
        ({}, {"stage": None}, "was made by conversion and has no moments; use fresh"),
        ({"frozen_until": ("vision=2",)}, {}, "stage 1 unfroze parameters on its way"),
        ({"kind": "muon"}, {}, "--optimizer.kind muon, and the run has adam"),
    ],
)
def test_moments_that_cannot_be_kept_are_refused(
    dataset: Path, tmp_path: Path, before: dict, state: dict, told: str
) -> None:
    written = config_for(dataset, **before)
    folder = _fake_checkpoint(tmp_path / "run", written, **{"stage": "1"} | state)
    with pytest.raises(ConfigError, match=f"--checkpoint.moments keep: .*{told}"):
        inspect(_config(dataset, load=str(folder), moments="keep"), 1)
    inspect(_config(dataset, load=str(folder)), 1)


def test_a_model_of_hugging_face_has_no_moments_to_keep(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (
        mock.patch("megavlm.convert.hf.convert.refuse_other") as refuse_other,
        pytest.raises(ValueError, match="is of Hugging Face and has none; use fresh"),
    ):
        inspect(_config(dataset, load=str(tmp_path), moments="keep"), 1)
    refuse_other.assert_called_once()


def test_a_checkpoint_of_another_architecture_is_refused_with_every_difference(
    dataset: Path, tmp_path: Path
) -> None:
    language = dataclasses.replace(TINY.language, num_layers=5, hidden_size=96)
    other = dataclasses.replace(
        _config(dataset), architecture=dataclasses.replace(TINY, language=language)
    )
    load = _fake_checkpoint(tmp_path / "run", other)
    with pytest.raises(ConfigError) as error:
        inspect(_config(dataset, load=str(load)), 1)
    assert "--architecture.language.num_layers: 5 in the checkpoint, 3 asked for" in str(
        error.value
    )
    assert "--architecture.language.hidden_size: 96 in the checkpoint, 48 asked for" in str(
        error.value
    )


def test_a_checkpoint_of_another_tokenizer_is_refused(dataset: Path, tmp_path: Path) -> None:
    load = _fake_checkpoint(
        tmp_path / "run", _config(dataset), stage="1", tokenizer="somebody else's"
    )
    with pytest.raises(ConfigError, match=r"--data.train.*another tokenizer"):
        inspect(_config(dataset, load=str(load)), 1)


def test_going_on_with_another_freeze_mask_or_seed_is_refused(
    dataset: Path, tmp_path: Path
) -> None:
    training = dataclasses.replace(_config(dataset).training, trainable=("connector",), seed=9)
    load = _fake_checkpoint(
        tmp_path / "run", dataclasses.replace(_config(dataset), training=training)
    )
    with pytest.raises(ConfigError) as error:
        inspect(_config(dataset, load=str(load)), 1)
    assert "--training.trainable" in str(
        error.value
    ) and "--training.seed: 9 in the checkpoint, 3 asked for" in str(error.value)


def test_an_incomplete_checkpoint_is_refused(dataset: Path, tmp_path: Path) -> None:
    load = _fake_checkpoint(tmp_path / "run", _config(dataset))
    (load / "step_00000001" / "state.json").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        inspect(_config(dataset, load=str(load)), 1)


def test_nothing_to_load_is_named(dataset: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("empty").mkdir()
    with pytest.raises(ValueError, match=f"--checkpoint.load {tmp_path / 'empty'}"):
        inspect(_config(dataset, load=str(tmp_path / "empty")), 1)
