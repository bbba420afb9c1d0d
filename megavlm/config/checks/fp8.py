"""Cross checks of FP8: the layers, widths and training that each recipe needs."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.checks.limits import at_least
from megavlm.config.fp8 import fp8_multiple
from megavlm.config.padding import padded_heads
from megavlm.config.schema import Config, Fp8


def fp8_problems(fp8: Fp8, config: Config) -> Iterator[str]:
    """Yield everything about FP8 that cannot run, or would have no effect."""
    first = fp8.first_bf16_layers
    last = fp8.last_bf16_layers
    arch = config.architecture
    spared = f"--fp8.first_bf16_layers {first} and --fp8.last_bf16_layers {last}"
    yield from at_least(0, "fp8", fp8, "first_bf16_layers", "last_bf16_layers")
    if not fp8.recipes and first + last > 0:
        yield f"{spared}: have no effect without --fp8.vision or --fp8.language"
    yield from _foreign_layers(fp8, config)
    for part, recipe in fp8.recipes.items():
        if recipe == "delayed" and arch.needs.spans_step:
            yield (
                f"--fp8.{part} delayed: --architecture.objective {arch.objective} runs microbatches"
                " twice, and its scales would change in between; use another recipe"
            )
        if config.training.precision == "float32":
            yield f"--fp8.{part} {recipe} needs --training.precision bfloat16"
        if recipe == "delayed" and first + last > 0:
            yield f"--fp8.{part} delayed does not support {spared}; use another recipe, or 0"
        sizes = vars(arch)[part]
        share = sizes.num_layers // max(config.parallel.pipeline_model_parallel_size, 1)
        if max(first, last) > share:
            yield f"{spared}: at most {share}, the {part} layers of one pipeline stage"
        parallel = config.parallel
        tensor = max(
            (
                parallel.vision_tensor_size
                if part == "vision"
                else parallel.tensor_model_parallel_size
            ),
            1,
        )
        multiple = fp8_multiple(recipe, config.parallel.sequence_parallel and part == "language")
        heads = padded_heads(sizes.num_attention_heads, tensor) // tensor
        widths = {"hidden_size": sizes.hidden_size, "num_attention_heads": heads * sizes.head_size}
        if part == "language" and arch.language.num_experts:
            shares = max(config.parallel.expert_tensor_parallel_size, 1)
            widths["expert_ffn_hidden_size"] = arch.language.expert_ffn_hidden_size // shares
            shared = arch.language.shared_expert_ffn_hidden_size
            widths["shared_expert_ffn_hidden_size"] = shared // tensor
        else:
            widths["ffn_hidden_size"] = sizes.ffn_hidden_size // tensor
        for name, width in widths.items():
            if width % multiple:
                yield (
                    f"--fp8.{part} {recipe}: --architecture.{part}.{name} makes matrices {width}"
                    f" wide, not a multiple of {multiple}"
                )


def _foreign_layers(fp8: Fp8, config: Config) -> Iterator[str]:
    """Yield why layers that FP8 is asked for would not be Transformer Engine's."""
    arch = config.architecture
    if fp8.recipes and config.training.kernels == "local":
        yield (
            "--training.kernels local: FP8 needs Transformer Engine's layers; use auto, or no"
            " recipe for --fp8.vision and --fp8.language"
        )
    if fp8.recipes and arch.lora.nf4:
        yield (
            f"--architecture.lora.nf4 {','.join(arch.lora.nf4)}: linear layers whose weights are in"
            " 4 bits are not Transformer Engine's, which FP8 needs; use no recipe for --fp8.vision"
            " and --fp8.language, or no 4 bits"
        )
