"""Cross checks of the layout and the settings, one wrong configuration each."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.checks.rules import check, facts_problems, problems
from megavlm.config.recipes.internvl import STAGES
from tests.config.checks.configs import facts, tiny


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("model", "layout", "world_size"),
    [
        ("tiny", [], 1),
        (
            "tiny",
            [
                "--tensor-model-parallel-size",
                "2",
                "--sequence-parallel",
                "--pipeline-model-parallel-size",
                "4",
            ],
            16,
        ),
        (
            "tiny",
            ["--pipeline-model-parallel-size", "2", "--parallel.layout", "v*2|v*2,c,t*4,h"],
            2,
        ),
        ("internvl2_5-8b", ["--tensor-model-parallel-size", "8"], 512),
    ],
)
def test_what_is_meant_to_run_has_no_problems(
    stage: str, model: str, layout: list[str], world_size: int, packs: Path
):
    config = tiny(packs, *layout, stage=stage, model=model)
    assert problems(config, world_size) == []
    pairs = dict(preferences=stage == "mpo")
    given = [facts(config, **pairs), facts(config, flag="--data.valid", num_packs=1, **pairs)]
    assert facts_problems(config, given, 1) == []
    check(config, world_size, given[:1])


# Options, ranks, and words that the one message must have.
WRONG = [
    ("--tensor-model-parallel-size 0", 1, ["tensor_model_parallel_size 0: must be 1 or more"]),
    ("--pipeline-model-parallel-size 0", 1, ["pipeline_model_parallel_size 0: must be 1 or more"]),
    ("--context-parallel-size 0", 1, ["context_parallel_size 0: must be 1 or more"]),
    (
        "--context-parallel-size 2",
        3,
        [
            (
                "--parallel.pipeline_model_parallel_size 1 x --parallel.context_parallel_size 2 = 2"
                " does not divide"
            ),
            "number of ranks, 3",
        ],
    ),
    (
        "--sequence-parallel",
        1,
        ["sequence_parallel true needs --parallel.tensor_model_parallel_size 2 or more"],
    ),
    (
        "--pipeline-model-parallel-size 9",
        9 * 128,
        ["size 9: more chunks than", "8 layers (4 of the vision encoder, 4 of"],
    ),
    (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 5",
        2,
        [
            (
                "pipeline_model_parallel_size 2 x --parallel.virtual_pipeline_model_parallel_size"
                " 5: more chunks than"
            ),
            "8 layers",
        ],
    ),
    (
        "--parallel.virtual_pipeline_model_parallel_size 2",
        1,
        [
            "--parallel.pipeline_model_parallel_size 1 x"
            " --parallel.virtual_pipeline_model_parallel_size 2: interleaved 1F1B needs at least 2"
        ],
    ),
    (
        "--parallel.virtual_pipeline_model_parallel_size 0",
        1,
        ["virtual_pipeline_model_parallel_size 0: must be 1 or more"],
    ),
    (
        (
            "--pipeline-model-parallel-size 2 --parallel.virtual_pipeline_model_parallel_size 2"
            " --global-batch-size 10"
        ),
        4,
        [
            "--training.global_batch_size 10 gives each of the 2 data-parallel ranks 5 packs",
            "_parallel_size 2; use 8 or 12",
        ],
    ),
    (
        (
            "--pipeline-model-parallel-size 2 --parallel.virtual_pipeline_model_parallel_size 2"
            " --parallel.layout v*2|v*2,t*4"
        ),
        2,
        [
            "2 chunks, but --parallel.pipeline_model_parallel_size 2 x"
            " --parallel.virtual_pipeline_model_parallel_size 2 is 4"
        ],
    ),
    (
        "--parallel.layout v*2|v*2,t*4",
        1,
        ["v*2|v*2,t*4: 2 chunks, but --parallel.pipeline_model_parallel_size is 1"],
    ),
    (
        "--pipeline-model-parallel-size 2 --parallel.layout evn",
        2,
        ["layout evn: 'evn' is none of v, c, t, h", "or use auto or even"],
    ),
    (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        6,
        ["2 x --parallel.pipeline", "= 4 does not divide the number of ranks", "6"],
    ),
    (
        "--global-batch-size 30",
        8,
        ["global_batch_size 30 is not a multiple of the 8 data-parallel ranks", "use 24 or 32"],
    ),
    ("--global-batch-size 3", 8, ["use 8"]),
    ("--global-batch-size 0", 1, ["global_batch_size 0: must be 1 or more"]),
    ("--parallel.timeout_minutes 0", 1, ["timeout_minutes 0: must be 1 or more"]),
    (
        "--architecture.vision.num_layers -1 --training.trainable language --training.drop_path 0",
        1,
        ["vision.num_layers -1: must be 0 or more"],
    ),
    (
        "--architecture.vision.patch_size 5",
        1,
        ["patch_size 5 does not divide --architecture.vision.image_size 32"],
    ),
    ("--architecture.pixel_shuffle 3", 1, ["pixel_shuffle 3 does not divide the 8 patches"]),
    (
        "--architecture.vision.num_attention_heads 3",
        1,
        ["num_attention_heads 3 does not divide --architecture.vision.hidden_size 64"],
    ),
    (
        "--parallel.recompute full --parallel.recompute_parts connector",
        1,
        ["connector: name one or both of vision, language"],
    ),
    (
        "--parallel.recompute_parts vision",
        1,
        ["recompute_parts vision has no effect with --parallel.recompute none"],
    ),
    ("--data.weights 1,2", 1, ["--data.weights: 2 weights for 1 folders of --data.train"]),
    ("--data.weights 0", 1, ["--data.weights 0.0: each must be above 0"]),
    (
        "--data.weights 1 --data.sampling sqrt",
        1,
        ["--data.sampling sqrt has no effect: --data.weights says", "--data.sampling packs"],
    ),
    (
        "--data.shuffle false --data.group 8",
        1,
        ["--data.group 8 has no effect: --data.shuffle false takes packs as they are stored"],
    ),
    ("--data.shuffle false --data.strata 4", 1, ["--data.strata 4 has no effect"]),
    ("--data.strata -1", 1, ["--data.strata -1"]),
    (
        "--data.batch_shares true",
        1,
        ["--data.batch_shares true has no effect: --data.train names one folder"],
    ),
    (
        "--data.augment jpeg,blur",
        1,
        ["--data.augment blur: no such change; known are jpeg, crop, half_crop, flip, colour"],
    ),
    ("--architecture.vision.pixel_std 1,0,1", 1, ["pixel_std 1.0,0.0,1.0: must be above 0"]),
    (
        "--architecture.language.hidden_size 130",
        1,
        ["num_attention_heads 4 does not divide --architecture.language.hidden_size 130"],
    ),
    (
        "--architecture.language.hidden_size 12",
        1,
        ["hidden_size 12: 3 a head, and rotary positions need an even number"],
    ),
    (
        "--architecture.language.kv_channels 33",
        1,
        ["kv_channels 33: 33 a head, and rotary positions need an even number"],
    ),
    (
        "--architecture.language.rotary_dynamic_factor 0.5",
        1,
        ["rotary_dynamic_factor 0.5: must be 1 or more"],
    ),
    (
        "--architecture.language.rotary_percent 0.4",
        1,
        ["rotary_percent 0.4: must be above 0 and at most 1, and give an even part of the 32"],
    ),
    (
        "--architecture.vision.final_norm true",
        1,
        ["final_norm true: a vision encoder of --architecture.vision.family internvit has no norm"],
    ),
    (
        "--architecture.vision.unused_head true",
        1,
        ["unused_head true: files of a vision encoder of --architecture.vision.family internvit"],
    ),
    (
        "--architecture.prefix_lm true --parallel.context_parallel_size 2",
        2,
        ["context_parallel_size 2: --architecture.prefix_lm true lets the tokens of a prefix see"],
    ),
    ("--architecture.language.num_query_groups 3", 1, ["num_query_groups 3 does not divide"]),
    ("--data.train=", 1, ["--data.train: name the folder"]),
    (
        "--data.train nowhere",
        1,
        ["--data.train nowhere: no such path; tools/pack_dataset.py --out nowhere makes packs"],
    ),
    ("--data.valid nowhere", 1, ["--data.valid nowhere: no such path"]),
    ("--data.workers -1", 1, ["data.workers -1: must be 0 or more"]),
    ("--data.prefetch 0", 1, ["data.prefetch 0: must be 1 or more"]),
    ("--training.steps 0", 1, ["training.steps 0: must be 1 or more"]),
    ("--training.trainable=", 1, ["--training.trainable: empty"]),
    (
        "--training.trainable vision,visoin.encoder",
        1,
        ["--training.trainable visoin.encoder: nothing is called so"],
    ),
    ("--training.drop_path 1", 1, ["drop_path 1.0: must be 0 or more, and less than 1"]),
    ("--eval-interval 10", 1, ["eval_interval 10 needs --data.valid"]),
    ("--lr 0", 1, ["optimizer.lr 0.0: must be above 0"]),
    ("--lr .nan", 1, ["optimizer.lr nan: must be a finite number"]),
    ("--lr 1e-5 --min-lr 2e-5", 1, ["min_lr 2e-05 is above --optimizer.lr 1e-05"]),
    ("--weight-decay -1", 1, ["weight_decay -1.0: must be 0 or more"]),
    (
        "--train-iters 10 --lr-warmup-iters 11",
        1,
        ["warmup_steps 11 is more than --training.steps 10"],
    ),
    ("--lr-warmup-fraction 2", 1, ["warmup_ratio 2.0: must be from 0 to 1"]),
    (
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 5",
        1,
        ["warmup_ratio 0.1 has no effect beside --optimizer.warmup_steps 5"],
    ),
    ("--adam-beta2 1", 1, ["adam_beta2 1.0: must be 0 or more, and less than 1"]),
    ("--adam-eps 0", 1, ["adam_eps 0.0: must be above 0"]),
    (
        "--checkpoint.save=",
        1,
        [
            "save_interval 100 needs --checkpoint.save",
            "save_interval 0 for a run that keeps nothing",
        ],
    ),
    ("--checkpoint.save FILE", 1, ["is a file"]),
    ("--checkpoint.keep -1", 1, ["checkpoint.keep -1: must be 0 or more"]),
    (
        "--checkpoint.keep_best 2",
        1,
        ["keep_best 2 needs an evaluation at each checkpoint", "save_interval 100; it is 0"],
    ),
    (
        "--checkpoint.keep_best 2 --checkpoint.keep 0",
        1,
        ["keep_best 2 has no effect with --checkpoint.keep 0, which keeps all"],
    ),
    ("--checkpoint.moments keep", 1, ["--checkpoint.moments keep needs --checkpoint.load"]),
    ("--checkpoint.load nowhere", 1, ["--checkpoint.load nowhere: no such folder"]),
    (
        "--checkpoint.save= --save-interval 0 --checkpoint.export_hf no-such-folder/hf",
        1,
        ["export_hf no-such-folder/hf needs --checkpoint.save"],
    ),
    ("--checkpoint.export_hf FULL", 1, ["exists already and is not an empty folder"]),
    (
        "--optimizer.moments bfloat16 --training.precision float32",
        1,
        ["moments bfloat16 needs --training.precision bfloat16"],
    ),
    (
        "--fp8.first_bf16_layers 1",
        1,
        ["first_bf16_layers 1", "have no effect without --fp8.vision or --fp8.language"],
    ),
    (
        "--fp8.language tensorwise --fp8.last_bf16_layers -1",
        1,
        ["last_bf16_layers -1: must be 0 or more"],
    ),
    (
        "--fp8.vision delayed --fp8.last_bf16_layers 1",
        1,
        ["--fp8.vision delayed", "does not support --fp8.first_bf16_layers"],
    ),
    (
        "--fp8.vision blockwise --fp8.first_bf16_layers 5",
        1,
        ["first_bf16_layers 5", "at most 4, the vision layers of one"],
    ),
    (
        "--pipeline-model-parallel-size 2 --fp8.language mxfp8 --fp8.last_bf16_layers 3",
        2,
        ["last_bf16_layers 3: at most 2, the language layers of one pipeline stage"],
    ),
    (
        "--fp8.language tensorwise --training.precision float32",
        1,
        ["--fp8.language tensorwise needs --training.precision bfloat16"],
    ),
    (
        "--training.kernels transformer_engine --training.precision float32",
        1,
        ["no fused kernel for --training.precision float32"],
    ),
    (
        "--fp8.language tensorwise --training.kernels local",
        1,
        ["--training.kernels local: FP8 needs Transformer Engine's layers"],
    ),
    (
        "--fp8.vision tensorwise --architecture.lora.rank 4 --architecture.lora.nf4 language"
        " --training.trainable connector --training.drop_path 0",
        1,
        ["--architecture.lora.nf4 language: linear layers whose weights are in 4 bits are not"],
    ),
    (
        "--fp8.language mxfp8 --architecture.language.ffn_hidden_size 432",
        1,
        [
            "--fp8.language mxfp8: --architecture.language.ffn_hidden_size makes matrices 432 wide,"
            " not a multiple of 32"
        ],
    ),
    (
        "--fp8.vision mxfp8 --architecture.vision.num_attention_heads 2"
        " --architecture.vision.hidden_size 160 --tensor-model-parallel-size 2",
        2,
        ["vision.num_attention_heads makes matrices 80 wide, not a multiple of 32"],
    ),
    ("--log-interval 0", 1, ["logging.interval 0: must be 1 or more"]),
    (
        "--checkpoint.save= --save-interval 0 --logging.tensorboard",
        1,
        ["tensorboard true needs --checkpoint.save"],
    ),
    (
        "--checkpoint.save= --save-interval 0 --wandb-project p --logging.wandb_mode offline",
        1,
        ["wandb_mode offline needs"],
    ),
    ("--health.slow_factor 1", 1, ["health.slow_factor 1.0: must be above 1"]),
    ("--health.least_gb_per_s -1", 1, ["health.least_gb_per_s -1.0: must be 0 or more"]),
    (
        "--health.hang_factor 0.5",
        1,
        ["health.hang_factor 0.5: must be 1 or more, or 0 to report nothing"],
    ),
    ("--health.hang_seconds 0", 1, ["health.hang_seconds 0: must be 1 or more"]),
]


@pytest.mark.parametrize(
    ("options", "world_size", "words"), WRONG, ids=[options for options, _, _ in WRONG]
)
def test_each_mistake_gets_one_message(
    options: str, world_size: int, words: list[str], packs: Path
):
    (packs.parent / "full").mkdir()
    (packs.parent / "full" / "file").touch()
    options = options.replace("FILE", str(packs.parent / "full" / "file")).replace(
        "FULL", str(packs.parent / "full")
    )
    found = problems(tiny(packs, *options.split()), world_size)
    assert len(found) == 1 and found[0].startswith("--"), found
    assert all(word in found[0] for word in words), found
