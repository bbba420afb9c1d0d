"""Flags of Megatron-LM that do not exist here, and what to do instead; and what is called here by
another name than in other trainers.
"""

from __future__ import annotations

from collections.abc import Iterable

from megavlm.config.options import nearest

_OPTIMIZER_OFFLOAD = (
    "the optimizer is not offloaded to the CPU, since such a run could not be resumed at another"
    " layout; use more data-parallel ranks, --optimizer.moments bfloat16, or LoRA"
    " (docs/optimisation.md)"
)
_ACTIVATION_OFFLOAD = (
    "activations are not offloaded to the CPU, which excludes pipelines; use --parallel.recompute"
    " (docs/optimisation.md)"
)
NOT_OFFERED = {
    "--micro-batch-size": "a microbatch is one pack, and --training.global_batch_size counts packs;"
    " leave it out",
    "--seq-length": "samples are packed to one length before training, which"
    " tools/pack_dataset.py --capacity sets; leave it out",
    "--use-distributed-optimizer": "the optimizer is always distributed; leave it out",
    "--bf16": "it is the default; leave it out, or say --training.precision bfloat16",
    "--fp16": "float16 is not offered, since its range needs loss scales; leave it out, which is"
    " --training.precision bfloat16",
    "--optimizer-cpu-offload": _OPTIMIZER_OFFLOAD,
    "--optimizer-offload-fraction": _OPTIMIZER_OFFLOAD,
    "--cpu-offloading-num-layers": _ACTIVATION_OFFLOAD,
    "--fine-grained-activation-offloading": _ACTIVATION_OFFLOAD,
}
_EPOCHS = "--training.steps, optimizer steps of --training.global_batch_size packs each"
_BATCH = "--training.global_batch_size, packs of a step over all ranks"
OF_OTHER_TRAINERS = {
    "learning_rate": "--optimizer.lr",
    "lr_scheduler_type": "--optimizer.schedule",
    "max_grad_norm": "--optimizer.clip_grad",
    "num_train_epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "epochs": _EPOCHS,
    "max_steps": "--training.steps",
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "batch_size": _BATCH,
    "eval_steps": "--training.eval_interval",
    "gradient_checkpointing": "--parallel.recompute",
    "model_name_or_path": "--model, with --checkpoint.load for the weights",
    "output_dir": "--checkpoint.save",
    "save_steps": "--checkpoint.save_interval",
    "save_total_limit": "--checkpoint.keep",
    "logging_steps": "--logging.interval",
    "lora_rank": "--architecture.lora.rank",
    "lora_r": "--architecture.lora.rank",
    "lora_alpha": "--architecture.lora.alpha",
    "lora_dropout": "--architecture.lora.dropout",
}


def meant(flag: str, known: Iterable[str]) -> str:
    """Return, for a message, what an unknown option is called here, or may have been meant to be;
    empty if nothing is like it.
    """
    word = flag.lstrip("-").rpartition(".")[2].replace("-", "_")
    if word in OF_OTHER_TRAINERS:
        return f"; here it is {OF_OTHER_TRAINERS[word]}"
    return nearest(flag, known)
