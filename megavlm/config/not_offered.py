"""Flags of Megatron-LM that do not exist here, and what to do instead."""

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
