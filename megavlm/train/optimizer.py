"""Gradient reduction and AdamW, both of megatron-core, with the optimizer's state shared out over the data-parallel ranks."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megavlm.config.schema import Config
from megavlm.model.precision import precision
from megavlm.model.vlm import VisionLanguageModel
from megavlm.train.schedule import learning_rate


def wrap(model: VisionLanguageModel) -> DistributedDataParallel:
    """Sum gradients over the copies of the model, in float32. The freeze mask must be set before."""
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(model.config, settings, model)


def _is_vector(parameter: Tensor) -> bool:
    return parameter.squeeze().ndim < 2


def build(config: Config, wrapped: DistributedDataParallel) -> MegatronOptimizer:
    """Create AdamW over what is trained. Collective: every rank calls it, with nothing to train too."""
    optimizer, number = config.optimizer, precision(config)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=number.is_half,
        params_dtype=number.dtype,
        use_distributed_optimizer=True,
    )
    spared = {ParamKey(predicate=ParamPredicate(name="vector", fn=_is_vector)): ParamGroupOverride(wd_mult=0.0)}
    overrides = spared if optimizer.decay == "matrices" else {}
    return get_megatron_optimizer(settings, [wrapped], config_overrides=overrides)


def set_rates(optimizer: MegatronOptimizer, config: Config, step: int) -> float:
    """Set learning rate and weight decay of every parameter group for update ``step``; the learning rate is returned."""
    rate = learning_rate(step, config.optimizer, config.training.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    return rate
