"""A model that came from Hugging Face is the same on every rank of a real layout, and goes back
bit-identical from there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megavlm.config.schema import Config, Parallel, Training
from tests.convert.models import SMALL, load_all, make_hf
from tests.ranks.pool import Pool

LAYOUTS = {"tp2": dict(tensor_model_parallel_size=2), "pp2": dict(pipeline_model_parallel_size=2)}
# Heads that divide over two ranks.
EVEN = replace(SMALL, vision=replace(SMALL.vision, num_attention_heads=4))


def load_then_save(folder: Path, imported: Path, config: Config) -> list[str]:
    """Load the checkpoint that conversion wrote, compare it with what the trainer takes from the
    folder itself, save it, and export it.
    """
    from megatron.core import dist_checkpointing

    from megavlm.checkpoint import step_folder
    from megavlm.config.cli import to_yaml
    from megavlm.convert.hf import convert
    from megavlm.model import weights
    from megavlm.model.vlm import VisionLanguageModel
    from megavlm.parallel import backend, process_groups
    from megavlm.planner.layout import make_layout
    from megavlm.train import checkpoint

    backend.start(config.parallel.timeout_minutes)
    groups = process_groups.create(
        config.parallel, config.training.seed, make_layout(config).embedding_chunk
    )
    models = [VisionLanguageModel(config, make_layout(config), groups) for _ in range(2)]
    weights.fill(models[:1], convert.full_tensors(folder, config.architecture))
    checkpoint.load_weights(step_folder.read(imported), models[1:])
    for one, other in zip(*(weights.named_weights(model).items() for model in models), strict=True):
        assert one[0] == other[0] and torch.equal(one[1].data, other[1].data), one[0]

    saved = imported.parent / "saved"
    if groups.rank == 0:
        (saved / "shards").mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(
        {"model": models[1].sharded_state_dict(prefix="model.")}, str(saved / "shards")
    )
    torch.distributed.barrier()
    if groups.rank == 0:
        (saved / "state.json").write_text((imported / "state.json").read_text())
        (saved / "config.yaml").write_text(to_yaml(config))
        convert.export(saved, imported.parent / "out", tokenizer=imported / "tokenizer")
    keys = list(weights.weight_sizes(models[0]))
    process_groups.destroy()
    return keys


@pytest.mark.parametrize("layout", LAYOUTS)
def test_import_and_export_through_ranks(ranks: Pool, tmp_path: Path, layout: str) -> None:
    from megavlm.convert.hf import convert
    from megavlm.convert.weights.tables import rows

    source = make_hf(tmp_path / "hf", EVEN)
    imported = convert.import_(source, tmp_path / "imported")
    config = Config(
        stage="2",
        model="custom",
        architecture=EVEN,
        parallel=Parallel(**LAYOUTS[layout]),
        training=Training(precision="bfloat16"),
    )
    filled = ranks.run(load_then_save, 2, source, imported, config)
    assert set().union(*filled) == {row.key for row in rows(EVEN)}
    before = load_all(source)
    after = load_all(tmp_path / "out")
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
