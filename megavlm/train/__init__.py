"""The training job."""

import logging
import warnings

# megatron-core warns of packages that it could use and of its own deprecated names, torch of names that megatron-core uses, and
# megatron-core's check of what ranks save in common of a rank that has nothing to train: nothing that a user could act on.
warnings.filterwarnings("ignore", module=r"megatron\.|torch\.(distributed|jit)\.")
logging.getLogger("megatron.core.dist_checkpointing.validation").setLevel(logging.ERROR)
