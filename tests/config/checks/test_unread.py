"""No option is accepted and not read: it is refused, or warned of where a file of settings may be
for several stages or machines.
"""

from __future__ import annotations

import pytest

from megavlm import job_checks
from megavlm.config.checks import unread
from megavlm.config.checks.rules import problems
from megavlm.config.cli import parse
from megavlm.config.options import options
from megavlm.config.schema import Config

TINY = ("--stage", "2", "--model", "tiny", "--checkpoint.save_interval", "0")
BLIP2 = ("--recipe", "blip2", "--checkpoint.save_interval", "0", "--stage")
LLAVA = ("--recipe", "llava", "--stage", "2", "--checkpoint.save_interval", "0")
CONTRAST_OFF = ("--architecture.image_text.contrast", "0")
SIGLIP = ("--recipe", "siglip", "--stage", "1", "--checkpoint.save_interval", "0")
CLIP = ("--recipe", "clip", "--stage", "1", "--checkpoint.save_interval", "0")


def read(*arguments: str, train: str = "packs") -> Config:
    return parse([*arguments, "--data.train", train])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*TINY, "--training.eval_packs", "8"), "without --data.valid"),
        ((*TINY, "--eval.max_new_tokens", "8"), "without --eval.tasks"),
        ((*TINY, "--eval.cache_gib", "8.0"), "without --eval.tasks"),
        ((*CLIP, "--eval.tasks", __file__, "--eval.max_new_tokens", "8"), "of pairs answers none"),
        ((*TINY, "--fp8.format", "e4m3"), "without --fp8.vision"),
        ((*LLAVA, "--training.drop_path_schedule", "linear"), "without --training.drop_path"),
        ((*LLAVA, "--optimizer.weight_decay_schedule", "cosine"), "weight_decay 0"),
        ((*TINY, "--optimizer.warmup_ratio", "0", "--optimizer.counted_from", "start"), "warm-up"),
        ((*LLAVA, "--architecture.vision.layer_scale", "0.5"), "no layer scales"),
        ((*BLIP2, "2", "--architecture.language.rotary_base", "1.5"), "learned positions"),
        ((*BLIP2, "2", "--architecture.language.zero_centered_norm", "true"), "LayerNorm"),
        ((*TINY, "--architecture.language.norm_topk_prob", "false"), "language.num_experts"),
        ((*BLIP2, "2", "--architecture.connector.pixel_shuffle", "4"), "kind is qformer"),
        ((*BLIP2, "2", "--architecture.connector.norm", "false"), "kind is qformer"),
        ((*CLIP, "--training.head_tokens", "all"), "no head over the vocabulary"),
        (
            (*BLIP2, "1", *CONTRAST_OFF, "--architecture.image_text.gradient", "local"),
            "image_text.contrast 0",
        ),
        ((*TINY, "--profile.step_count", "9"), "without --profile.folder"),
        ((*TINY, "--bad_steps.window", "8"), "without --bad_steps.spike_factor"),
        ((*TINY, "--bad_steps.spike_action", "skip"), "without --bad_steps.spike_factor"),
        ((*TINY, "--bad_steps.spike_factor", "2", "--bad_steps.most", "9"), "--bad_steps.skip"),
        ((*TINY, "--training.end_drop_path", "0.3"), "drop_path_schedule constant"),
        ((*TINY, "--ema.warmup", "true"), "without --ema.decay"),
        (
            (*TINY, "--parallel.overlap_grad_reduce", "false", "--parallel.bucket_size", "9"),
            "--parallel.overlap_grad_reduce false",
        ),
    ],
)
def test_an_option_that_nothing_reads_is_refused(arguments: tuple[str, ...], told: str) -> None:
    [found] = [problem for problem in problems(read(*arguments), 1) if "has no effect" in problem]
    assert found.startswith(" ".join(arguments[-2:])) and told in found


@pytest.mark.parametrize("given", ["prefix_lm true", "added_tokens 4"])
def test_a_model_without_a_vocabulary_has_no_answers_and_no_added_tokens(given: str) -> None:
    found = problems(read(*BLIP2, "1", *f"--architecture.{given}".split(" ")), 1)
    told = f"--architecture.{given}: --architecture.objective qformer has no"
    assert sum(problem.startswith(told) for problem in found) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*TINY, "--data.workers", "0", "--data.prefetch", "8"), "--data.workers 0"),
        ((*TINY, "--data.workers", "0", "--data.timeout", "60"), "--data.workers 0"),
        ((*TINY, "--data.weights", "2.0"), "names one folder"),
        ((*TINY, "--data.sampling", "sqrt"), "names one folder"),
        ((*TINY, "--parallel.vision", "data"), "tensor_model_parallel_size 1"),
        ((*TINY, "--parallel.layout", "even"), "pipeline_model_parallel_size 1"),
        (
            (*LLAVA, "--parallel.recompute_parts", "vision", "--parallel.recompute", "full"),
            "no part is there and trained",
        ),
        ((*TINY, "--checkpoint.keep", "9"), "without --checkpoint.save"),
        ((*TINY, "--checkpoint.asynchronous", "true"), "without --checkpoint.save"),
        ((*TINY, "--checkpoint.verify", "size"), "no checkpoint is loaded"),
        ((*TINY, "--logging.run_name", "a"), "without --logging.wandb_project"),
        ((*TINY, "--logging.wandb_mode", "offline"), "without --logging.wandb_project"),
        ((*TINY, "--health.speed_check", "false", "--health.slow_factor", "9.0"), "speed_check"),
        ((*TINY, "--health.hang_factor", "0", "--health.hang_seconds", "9"), "hang_factor 0"),
        ((*BLIP2, "2", "--architecture.image_text.size", "8"), "qformer reads it"),
        ((*SIGLIP, "--architecture.contrastive.exchange", "ring"), "one data-parallel replica"),
        ((*TINY, "--eval.only", "true", "--training.max_hours", "3.5"), "does not train"),
        ((*TINY, "--eval.only", "true", "--health.lost_machine_seconds", "9"), "does not train"),
        ((*TINY, "--eval.only", "true", "--bad_steps.skip", "true"), "does not train"),
        ((*TINY, "--eval.only", "true", "--data.max_unreadable_packs", "9"), "does not train"),
    ],
)
def test_what_a_shared_file_may_hold_is_warned_of(arguments: tuple[str, ...], told: str) -> None:
    config = read(*arguments)
    [warning] = job_checks.warnings(config, 1)
    assert warning.startswith(" ".join(arguments[-2:])) and told in warning
    assert not [problem for problem in problems(config, 1) if "has no effect" in problem]


@pytest.mark.parametrize("recipe", [TINY, (*BLIP2, "1"), (*BLIP2, "2"), LLAVA, CLIP])
def test_presets_are_not_complained_about(recipe: tuple[str, ...]) -> None:
    config = read(*recipe)
    assert not job_checks.warnings(config, 1)
    assert not [problem for problem in problems(config, 1) if "has no effect" in problem]


def test_what_several_replicas_read_is_no_warning_for_them() -> None:
    ring = read(*SIGLIP, "--architecture.contrastive.exchange", "ring")
    assert job_checks.warnings(ring, 1) and not job_checks.warnings(ring, 2)


def test_a_preset_of_the_stage_is_not_the_users() -> None:
    sqrt = read("--recipe", "instructblip", "--stage", "1")
    assert sqrt.data.sampling == "sqrt" and not job_checks.warnings(sqrt, 1)


def test_the_tables_name_options_that_exist() -> None:
    names = {
        name for row in (*unread.OF_MODEL, *unread.OF_RUN, *unread.TOLERATED) for name in row.keys
    }
    assert all(any(key == name or key.startswith(name) for key in options()) for name in names)
