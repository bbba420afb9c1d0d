# syntax=docker/dockerfile:1
# megavlm on NVIDIA's PyTorch image, which brings Python 3.12, CUDA, PyTorch, NCCL and Transformer Engine built for each other.
#
#   docker build -t megavlm .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 -it -v /data:/data megavlm bash
#   torchrun --nproc-per-node 8 /opt/megavlm/pretrain_vlm.py ...
#
# On several nodes add `--network host --device /dev/infiniband --cap-add IPC_LOCK`, so that NCCL reaches the network cards.
# A tag can be moved; to pin the very same bytes, give the digest that `docker pull` prints: --build-arg IMAGE=nvcr.io/nvidia/pytorch@sha256:...
ARG IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${IMAGE}

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    TOKENIZERS_PARALLELISM=false

WORKDIR /opt/megavlm
COPY setup.py pyproject.toml constraints.txt README.md LICENSE pretrain_vlm.py ./
COPY megavlm megavlm
COPY tools tools
COPY examples examples

# What the image has built for its CUDA must stay as it is: no other build fits. What it does not have comes in the versions of constraints.txt.
# Its own list (PIP_CONSTRAINT) is replaced by these two, since it also pins what megavlm needs newer, and what it has otherwise may be
# upgraded if megavlm asks for it.
RUN python - <<'PYTHON' && PIP_CONSTRAINT=/opt/megavlm/image-constraints.txt python -m pip install '.[fast,tensorboard,wandb,quickstart]'
import importlib.metadata as metadata
import re
from pathlib import Path

MUST_STAY = r"torch|torch-.*|torchvision|torchao|triton|pytorch-triton|transformer-engine.*|apex|flash-attn.*|nvidia-.*|numpy"


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


there = {plain(found.metadata["Name"]): found.version for found in metadata.distributions() if found.metadata["Name"]}
lines = [f"{name}=={version}" for name, version in sorted(there.items()) if re.fullmatch(MUST_STAY, name)]
for line in Path("constraints.txt").read_text().splitlines():
    name = re.match(r"[A-Za-z0-9_.-]+", line)
    if name and plain(name[0]) not in there:
        lines.append(line)
Path("image-constraints.txt").write_text("\n".join(lines) + "\n")
PYTHON

# A build that ends here has parts that import together, and the image's own torch; its log says which versions they are.
RUN python - <<'PYTHON'
import importlib.metadata as metadata
import sys
from pathlib import Path

import megatron.core
import torch

import megavlm.config.cli

pinned = dict(line.split("==", 1) for line in Path("image-constraints.txt").read_text().splitlines() if line.startswith("torch=="))
assert pinned["torch"] == metadata.version("torch"), f"torch was {pinned['torch']}, and is {metadata.version('torch')} now"
print("python", sys.version.split()[0])
print("torch", torch.__version__, "cuda", torch.version.cuda, "nccl", ".".join(map(str, torch.cuda.nccl.version())))
for name in ("megavlm", "megatron-core", "transformer-engine", "transformers", "numpy"):
    print(name, metadata.version(name))
PYTHON

# Not root: what a run writes belongs to a user. Ubuntu's images come with a user of number 1000 already.
RUN if ! getent passwd 1000 >/dev/null; then useradd --uid 1000 --create-home --shell /bin/bash trainer; fi \
    && mkdir -p /workspace && chown 1000 /workspace
USER 1000
WORKDIR /workspace
