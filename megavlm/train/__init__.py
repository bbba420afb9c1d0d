"""The training job."""

import logging
import warnings

# megatron-core warns of packages that it could use and of its own deprecated names, torch of names
# that megatron-core uses, megatron-core's check of what ranks save in common of a rank that has
# nothing to train, and its newer line of ways to call it that its older one does not have: nothing
# that a user could act on.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.(distributed|jit)\.")
# It comes several times from each rank, and at each evaluation; ``summary`` tells of it once.
warnings.filterwarnings("ignore", message="This DataLoader will create", module=r"torch\.utils\.")
for _name in (
    "dist_checkpointing.strategies.common",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.validation",
    "distributed.distributed_data_parallel",
    "models.gpt.gpt_model",
    "transformer.transformer_layer",
):
    logging.getLogger(f"megatron.core.{_name}").setLevel(logging.ERROR)
