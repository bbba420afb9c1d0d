# syntax=docker/dockerfile:1
# megavlm on NVIDIA's PyTorch image, which brings Python 3.12, CUDA, PyTorch, Transformer Engine and Apex built for each other.
#
#   docker build -t megavlm .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 -it -v /data:/data megavlm bash
FROM nvcr.io/nvidia/pytorch:25.09-py3

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    TOKENIZERS_PARALLELISM=false \
    CUDA_DEVICE_MAX_CONNECTIONS=1

WORKDIR /opt/megavlm
COPY setup.py pyproject.toml README.md LICENSE pretrain_vlm.py ./
COPY megavlm megavlm
COPY tools tools
COPY examples examples

# The image's own builds of torch, Transformer Engine and their companions must stay: no other build fits its CUDA. Its list of pinned
# packages (PIP_CONSTRAINT) is replaced by one of just those, since it also pins what megavlm needs newer.
RUN python -m pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|pytorch-triton|transformer[-_]engine|apex|flash[-_]attn|nvidia-[a-z0-9-]+|numpy)==' \
        > /opt/megavlm/image-constraints.txt \
    && before="$(python -c 'import torch; print(torch.__version__)')" \
    && PIP_CONSTRAINT=/opt/megavlm/image-constraints.txt python -m pip install '.[fast,tensorboard,wandb,quickstart]' \
    && test "$before" = "$(python -c 'import torch; print(torch.__version__)')"

# A build that ends here has parts that import together; its log says which versions they are.
RUN python - <<'PYTHON'
import importlib.metadata as metadata
import sys

import megatron.core
import torch

import megavlm.config.cli

print("python", sys.version.split()[0])
print("torch", torch.__version__, "cuda", torch.version.cuda)
for name in ("megavlm", "megatron-core", "transformer-engine", "apex", "transformers", "numpy"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "not installed")
PYTHON

# Ubuntu's images come with a user of number 1000 already.
RUN if ! getent passwd 1000 >/dev/null; then useradd --uid 1000 --create-home --shell /bin/bash trainer; fi \
    && mkdir -p /workspace && chown 1000 /workspace
USER 1000
WORKDIR /workspace
