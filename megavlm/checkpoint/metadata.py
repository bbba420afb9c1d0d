"""The description of a distributed checkpoint (``.metadata``), a pickle, read without running
anything that it names.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

# What torch's description of a distributed checkpoint is made of, beside dtypes; nothing
# else is unpickled.
_KNOWN = {
    "collections": {"OrderedDict"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}


class _Guarded(pickle.Unpickler):
    """Builds nothing but what a description of tensors is made of."""

    def find_class(self, module: str, name: str) -> object:
        is_number_format = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if name not in _KNOWN.get(module, ()) and not is_number_format:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_description(path: Path) -> Metadata:
    """Read what the shards of a checkpoint hold, and where.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, names what no description needs, or is something else.
    """
    with path.open("rb") as file:
        try:
            found = _Guarded(file).load()
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(
                f"{path}: not a description of tensors, or damaged ({error})"
            ) from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path}: not a description of tensors but {type(found).__name__}")
    return found
