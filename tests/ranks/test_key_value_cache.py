"""Logits of answers that grow by one token a pass, from keys and values that layers keep, are those
of passes over whole packs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest

from megavlm.config.schema import Architecture, Config
from tests.convert.blip2_models import KINDS as BLIP2
from tests.data.native_packs import write_native
from tests.data.questions import random_questions
from tests.data.samples import make_dataset
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, config_for
from tests.ranks.test_flamingo import OPEN
from tests.ranks.test_gemma2 import MODEL as GEMMA2
from tests.ranks.test_gpt_oss import MODEL as GPT_OSS
from tests.ranks.test_qwen_vl import DEEP_EXPERTS
from tests.ranks.test_qwen_vl import MODEL as QWEN_VL
from tools.benchmark import answering

CONTEXT = 5
NEW_TOKENS = 5
TP2 = (2, dict(tensor_model_parallel_size=2))
TP2_SP = (2, dict(tensor_model_parallel_size=2, sequence_parallel=True))
PP2 = (2, dict(pipeline_model_parallel_size=2))
CP2 = (2, dict(context_parallel_size=2))
VIRTUAL = (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2))
TP2_CP2 = (4, dict(tensor_model_parallel_size=2, context_parallel_size=2))
EVERY = {
    "one": (1, {}),
    "TP2": TP2,
    "TP2 SP": TP2_SP,
    "PP2": PP2,
    "PP2 virtual 2": VIRTUAL,
    "CP2": CP2,
    "TP2 CP2": TP2_CP2,
}


def _sized(architecture: Architecture, **language) -> Architecture:
    found = dataclasses.replace(architecture.language, vocab_size=457, **language)
    return dataclasses.replace(architecture, language=found)


MODELS = {
    # Heads of InternVL2.5-1B.
    "real heads": _sized(
        TINY,
        num_layers=2,
        hidden_size=896,
        ffn_hidden_size=256,
        num_attention_heads=14,
        num_query_groups=2,
    ),
    "sinks, windows and experts": _sized(GPT_OSS),
    "soft caps, windows and norms behind branches": _sized(GEMMA2),
    "cross-attention": _sized(OPEN),
    "learned positions behind a Q-Former": _sized(BLIP2["opt"]),
    "frames, rows and columns": _sized(QWEN_VL),
    "features behind several layers, and experts": _sized(DEEP_EXPERTS),
}
EVERYDAY = {
    "real heads": ("one",),
    "sinks, windows and experts": ("TP2 CP2",),
    "soft caps, windows and norms behind branches": ("PP2",),
    "cross-attention": ("TP2 SP", "PP2"),
    "learned positions behind a Q-Former": ("CP2",),
    "frames, rows and columns": ("one", "TP2 SP", "CP2"),
    "features behind several layers, and experts": ("PP2",),
}
CASES = [
    (name, layout)
    for name in MODELS
    for layout in EVERY
    if asks_for_all() or layout in EVERYDAY[name]
]


def both_ways(config: Config) -> tuple[list[list[int]], list[list[int]], float]:
    """Answer with the cache, then by a prefill for each token, and return the answers of both, and
    how far their logits are from each other.
    """
    import torch

    from megavlm.train import generate
    from tests.ranks.runs import build

    job = build(config)
    for chunk in job.ddp_chunks:
        chunk.eval()
    packs = Path(config.data.train)
    task = random_questions(packs, packs.parent, config.architecture.language.vocab_size)
    assert len(task.order) > 1
    seen: list[dict[int, torch.Tensor]] = []

    keep = generate._keep

    def seeing(job, found):
        def of_pack(batch, logits):
            seen[-1] |= dict(zip(batch.cached.questions, logits.clone(), strict=False))
            return keep(job, found)(batch, logits)

        return of_pack

    def progress() -> None:
        seen.append({})

    with mock.patch.object(generate, "_keep", seeing):
        cached = generate.generate(job, task, NEW_TOKENS, progress)
        whole = answering.by_whole_packs(job, task, NEW_TOKENS, progress)
    differences = [
        float((logits - of_cache[question]).abs().max())
        for of_cache, of_packs in zip(seen[:NEW_TOKENS], seen[NEW_TOKENS:], strict=True)
        for question, logits in of_packs.items()
        if question in of_cache  # context-parallel ranks have their own tokens of a pack
    ]
    return cached, whole, max(differences, default=0.0)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_cached_logits_are_those_of_whole_packs(
    ranks: Pool, tmp_path: Path, name: str, layout: str
) -> None:
    architecture = MODELS[name]
    facts = dict(
        vocab_size=architecture.language.vocab_size,
        context_token_id=CONTEXT,
        tile_size=architecture.vision.image_size,
        capacity=128,
        alignment=4,
    )
    if architecture.vision.spans_tiles:
        write_native(tmp_path / "packs", [((48, 24), (8, 40)), ()], **facts)
    else:
        features = architecture.placeholders_per_tile
        make_dataset(tmp_path / "packs", packs=2, features_per_tile=features, **facts)
    count, settings = EVERY[layout]
    config = config_for(tmp_path / "packs", **settings)
    config = dataclasses.replace(config, architecture=architecture)
    found = ranks.run(both_ways, count, config)
    assert max(farthest for _, _, farthest in found) < 1e-5
    assert any(farthest for _, _, farthest in found), "nobody saw logits"
    for cached, whole, _ in found:
        assert cached == whole == found[0][0]
        assert len({tuple(answer) for answer in cached}) > 1
