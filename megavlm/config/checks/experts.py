"""Cross checks of experts: what their sizes and layouts have to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megavlm.config.checks.limits import at_least
from megavlm.config.differences import changed
from megavlm.config.freeze_mask import matches, matches_any
from megavlm.config.lora import linear_names
from megavlm.config.schema import Architecture, Config, Language, Parallel

_FLAG = "--architecture.language"
_SIZES = ("experts_per_token", "expert_ffn_hidden_size")
# Fields of ``Experts`` that only trained routers read.
_OF_ROUTERS = ("balance_loss", "balance_over", "bias_update_rate", "router_z_loss")
_VARIANTS = ("router_scores", "router_bias", "routed_scaling")
_SHARED = ("shared_expert_ffn_hidden_size", "shared_expert_gate")


def expert_size_problems(language: Language) -> Iterator[str]:
    """Yield what cannot be of a language model's experts."""
    if language.num_experts < 0:
        yield f"{_FLAG}.num_experts {language.num_experts}: must be 0 or more"
        return
    if not language.num_experts:
        for name, value in changed(language, *_SIZES, *_VARIANTS, *_SHARED).items():
            yield f"{_FLAG}.{name} {value} has no effect without {_FLAG}.num_experts, such as 128"
        return
    yield from at_least(1, "architecture.language", language, *_SIZES)
    yield from at_least(0, "architecture.language", language, "shared_expert_ffn_hidden_size")
    if language.routed_scaling <= 0:
        yield (
            f"{_FLAG}.routed_scaling {language.routed_scaling}: must be more than 0, since it"
            " multiplies the experts' outputs"
        )
    if language.shared_expert_gate and not language.shared_expert_ffn_hidden_size:
        yield (
            f"{_FLAG}.shared_expert_gate true has no effect without"
            f" {_FLAG}.shared_expert_ffn_hidden_size, such as {language.expert_ffn_hidden_size}"
        )
    if language.shared_expert_ffn_hidden_size and language.linear_bias:
        yield (
            f"{_FLAG}.linear_bias true: megatron-core's shared expert"
            f" ({_FLAG}.shared_expert_ffn_hidden_size {language.shared_expert_ffn_hidden_size}) has"
            " no biases; use false, or 0 for the shared expert"
        )
    chosen = language.experts_per_token
    if chosen > language.num_experts:
        yield (
            f"{_FLAG}.experts_per_token {chosen}: there are only {_FLAG}.num_experts"
            f" {language.num_experts}"
        )
    if chosen == 1 and language.norm_topk_prob:
        yield (
            f"{_FLAG}.norm_topk_prob true: with {_FLAG}.experts_per_token 1 every weight is 1, and"
            " the router would learn nothing; use false"
        )
    if not language.is_gated or language.has_layer_norm:
        yield (
            f"{_FLAG}.num_experts {language.num_experts}: experts are gated MLPs behind RMSNorm,"
            f" and {_FLAG}.family {language.family} with {_FLAG}.activation {language.activation}"
            " has none; use 0"
        )


def expert_layout_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yield what keeps experts from being laid out over ``world_size`` ranks."""
    parallel = config.parallel
    language = config.architecture.language
    sizes = {
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }
    flags = {name: f"--parallel.{name} {size}" for name, size in sizes.items()}
    if min(sizes.values()) < 1:
        yield from at_least(1, "parallel", parallel, *sizes)
        return
    if language.num_experts < 1:
        for name in (name for name, size in sizes.items() if size > 1):
            yield f"{flags[name]}: the model has no experts ({_FLAG}.num_experts 0); use 1"
        return
    shared = {
        "num_experts": (flags["expert_model_parallel_size"], "the experts of a layer"),
        "expert_ffn_hidden_size": (flags["expert_tensor_parallel_size"], "the width of an expert"),
    }
    for (name, (flag, what)), size in zip(shared.items(), sizes.values(), strict=True):
        number = vars(language)[name]
        if number % size:
            yield f"{flag} does not divide {what}, {_FLAG}.{name} {number}"
    pipeline = max(parallel.pipeline_model_parallel_size, 1)
    together = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    if world_size % pipeline == 0 and world_size // pipeline % together:
        asked = [flags[name] for name, size in sizes.items() if size > 1]
        divides = (
            "does not divide" if len(asked) == 1 else f"make {together}, which does not divide"
        )
        yield (
            f"{' and '.join(asked)} {divides} the {world_size // pipeline} ranks of a pipeline"
            " stage, which are tensor-parallel, context-parallel and data-parallel ones; use a"
            " divisor"
        )
    if parallel.expert_tensor_parallel_size > 1:
        yield from _shared_expert_problems(config, flags["expert_tensor_parallel_size"])
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            "--parallel.sequence_parallel false: tensor-parallel ranks would each send all tokens"
            f" to the experts ({_FLAG}.num_experts {language.num_experts}), and every gradient"
            " would count as often; use true"
        )


def _shared_expert_problems(config: Config, flag: str) -> Iterator[str]:
    """Yield what experts that several ranks share exclude.

    Args:
        config: the run.
        flag: the option that shares them, with its value.
    """
    arch = config.architecture
    if arch.lora.rank and any(arch.lora.adapts(key) for key in _expert_keys(arch)):
        yield (
            f"{flag}: --architecture.lora.targets {','.join(arch.lora.targets)} adapts experts,"
            " whose tokens would get the whole gradient of their adapters from each rank; use 1"
        )
    trainable = config.training.trainable
    if config.optimizer.kind == "muon" and any(
        matches(key, pattern) for key in _expert_keys(arch) for pattern in trainable
    ):
        yield (
            f"{flag}: --optimizer.kind muon needs the whole gradient of an expert on its rank; use"
            " 1, or another optimizer"
        )


def expert_problems(config: Config) -> Iterator[str]:
    """Yield what of a run's settings does not go with experts."""
    experts = config.experts
    language = config.architecture.language
    yield from at_least(0, "experts", experts, "balance_loss", "bias_update_rate", "router_z_loss")
    if not language.num_experts:
        for name, value in changed(experts).items():
            yield (
                f"--experts.{name} {value} has no effect: the model has no experts"
                f" ({_FLAG}.num_experts 0); leave it out"
            )
        return
    if config.fp8.language == "delayed":
        yield (
            "--fp8.language delayed: the largest values that an expert has seen are in no"
            " checkpoint, and one that gets no token has none; use tensorwise or blockwise"
        )
    arch = config.architecture
    if arch.needs.spans_step:
        yield (
            f"{_FLAG}.num_experts {language.num_experts}: --architecture.objective"
            f" {arch.objective} runs microbatches twice, and the routers' losses would count twice;"
            " use 0"
        )
    if arch.cross_attention.every:
        yield (
            f"{_FLAG}.num_experts {language.num_experts}: layers with gated cross-attention"
            f" (--architecture.cross_attention.every {arch.cross_attention.every}) have not been"
            " tried with experts; use 0"
        )
    expert_tensor = config.parallel.expert_tensor_parallel_size
    if language.linear_bias and expert_tensor > 1:
        yield (
            f"--parallel.expert_tensor_parallel_size {expert_tensor}: each rank would add the bias"
            f" of an expert's second layer ({_FLAG}.linear_bias true); use 1"
        )
    yield from _ignored_settings(config)
    yield from _adapter_problems(arch)


def _expert_keys(arch: Architecture) -> list[str]:
    """Return the checkpoint keys of the experts' matrices."""
    return [
        f"language.decoder.layers.{layer}.{name}.weight"
        for layer in range(arch.language.num_layers)
        for name in linear_names(arch.language.num_experts)
        if ".experts." in name
    ]


def _adapter_problems(arch: Architecture) -> Iterator[str]:
    """Yield what adapters beside experts, and their weights, cannot be."""
    lora = arch.lora
    keys = _expert_keys(arch)
    if any(lora.adapts(key) for key in keys):
        targets = f"--architecture.lora.targets {','.join(lora.targets)} adapts experts"
        if arch.language.linear_bias:
            yield (
                f"{targets}, which {_FLAG}.family {arch.language.family} holds together in one"
                " tensor: no file of adapters names one of them; name the attention alone, such as"
                " language.*.self_attention"
            )
        if lora.dropout:
            yield (
                f"--architecture.lora.dropout {lora.dropout}: {targets}, which do not know the"
                " positions of their tokens, and dropout draws by position; use 0, or name the"
                " attention alone, such as language.*.self_attention"
            )
        if lora.dora:
            yield (
                f"--architecture.lora.dora true: {targets}, and DoRA would read all of their"
                " weights in every layer for the norms of their rows, however few tokens they"
                " get; use false, or name the attention alone, such as language.*.self_attention"
            )
    if any(lora.quantises(key) for key in keys):
        yield (
            f"--architecture.lora.nf4 {','.join(lora.nf4)}: weights of experts cannot be in 4 bits;"
            " name the attention alone, such as language.*.self_attention"
        )


def _ignored_settings(config: Config) -> Iterator[str]:
    """Yield settings of experts that this run would not read."""
    experts = config.experts
    language = config.architecture.language
    names = ("weight", "bias") if language.linear_bias else ("weight",)
    routers = [
        f"language.decoder.layers.{layer}.mlp.router.{name}"
        for layer in range(language.num_layers)
        for name in names
    ]
    trainable = config.training.trainable
    if not any(matches(key, pattern) for key in routers for pattern in trainable):
        for name, value in changed(experts, *_OF_ROUTERS).items():
            yield (
                f"--experts.{name} {value} has no effect: --training.trainable"
                f" {','.join(trainable)} trains no router; leave it out, or add"
                " language.*.router"
            )
    elif changed(experts, "balance_over") and not experts.balance_loss:
        yield (
            f"--experts.balance_over {experts.balance_over} has no effect with"
            " --experts.balance_loss 0; leave it out, or use a weight such as 0.001"
        )
    if changed(experts, "bias_update_rate") and not language.router_bias:
        yield (
            f"--experts.bias_update_rate {experts.bias_update_rate} has no effect without"
            f" {_FLAG}.router_bias true; leave it out"
        )
    if changed(experts, "dispatcher") and not spans_data_ranks(config.parallel):
        yield (
            f"--experts.dispatcher {experts.dispatcher}: with"
            " --parallel.expert_model_parallel_size 1 and expert_tensor_parallel_size 1 no token"
            " leaves its rank; leave it out"
        )


def grouped_expert_problems(config: Config) -> Iterator[str]:
    """Yield what Transformer Engine's grouped kernel does not do: it asks the weight of the first
    expert of a layer whether it has a gradient, for the weights of all of them, and for the biases
    that the kernel adds, those of the first linear layers.
    """
    language = config.architecture.language
    trainable = config.training.trainable
    mask = f"--training.trainable {','.join(trainable)}"
    kernel = "Transformer Engine's grouped kernel"
    for layer in range(language.num_layers if language.num_experts else 0):
        for name in ("linear_fc1", "linear_fc2"):
            stem = f"language.decoder.layers.{layer}.mlp.experts"
            stems = [f"{stem}.{expert}.{name}" for expert in range(language.num_experts)]
            weights = _by_mask([f"{stem}.weight" for stem in stems], trainable)
            if len(weights) > 1:
                yield (
                    f"{mask}: trains {weights[True][0]} and not {weights[False][0]}; {kernel}"
                    " trains all experts of a layer or none, so name all, or use"
                    " --training.kernels local"
                )
                return
            if not language.linear_bias or name == "linear_fc2" or True in weights:
                continue
            biases = _by_mask([f"{stem}.bias" for stem in stems], trainable)
            if True in biases:
                yield (
                    f"{mask}: trains {biases[True][0]} and not {weights[False][0]}; {kernel} has"
                    " no gradients of biases without those of weights, so name both, or use"
                    " --training.kernels local"
                )
                return


def _by_mask(keys: Sequence[str], trainable: Sequence[str]) -> dict[bool, list[str]]:
    """Sort keys by whether a mask trains them; neither list is empty."""
    found: dict[bool, list[str]] = {}
    for key in keys:
        found.setdefault(matches_any(key, trainable), []).append(key)
    return found


def spans_data_ranks(parallel: Parallel) -> bool:
    """Return whether data-parallel ranks must run the same number of packs, also in evaluation:
    their layers wait for each other's tokens.
    """
    return parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size > 1
