"""Packaging of megavlm: ``pip install -c constraints.txt -e .[dev,quickstart]``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

setup(
    name="megavlm",
    version=re.search(
        r'__version__ = "(.+)"', (ROOT / "megavlm" / "__init__.py").read_text()
    ).group(1),
    description="Trains vision-language models, at scale, on megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megavlm", "megavlm.*"]),
    install_requires=[
        "torch>=2.6",
        # The last release for Python 3.11, and the one that is tested on newer ones.
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        "docstring-parser>=0.16",
        "huggingface_hub>=1.0",
        "jsonargparse>=4.50",
        "numpy>=1.26",
        "pillow>=10.0",
        "psutil>=5.9",  # megatron-core's distributed checkpoints import it without asking for it
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "protobuf>=4.25",  # sentencepiece's description of a model
        "sentencepiece>=0.2",  # tokenizers that come as tokenizer.model
        "tokenizers>=0.21",
        "tqdm>=4.66",
        # Older ones leave out the soft cap of a PaliGemma 2's logits (5.22), or have other names
        # for Fuyu's patches, experts and image processors (5.0 to 5.20).
        "transformers>=5.23",
    ],
    extras_require={
        # A CUDA toolkit must be there to build it; without it training runs on a CPU. megatron-core
        # also uses Apex where it is installed (from source, https://github.com/NVIDIA/apex);
        # nothing here needs it.
        "gpu": ["transformer-engine[pytorch]>=2.10"],
        # Packs millions of samples a second instead of tens of thousands, and makes tiles several
        # times as fast; the results are the same.
        "fast": ["numba>=0.61", "simplejpeg>=1.8"],
        # Packing over several machines.
        "ray": ["ray>=2.40"],
        # Annotations, images and packs in object storage or on the web; adlfs and such go with it.
        "remote": ["aiohttp>=3.9", "fsspec>=2024.6", "s3fs>=2024.6"],
        # Those of Google's storage.
        "gcs": ["aiohttp>=3.9", "fsspec>=2024.6", "gcsfs>=2024.6"],
        # Reads annotations, and images in them, from parquet files.
        "parquet": ["pyarrow>=17"],
        # Decodes videos; animated GIFs and folders of frames need nothing.
        "video": ["av>=13"],
        # AutoProcessor of native exports needs it, for videos alone. Each release
        # fits one release of torch, and pip finds it.
        "processor": ["torchvision>=0.21"],
        "tensorboard": ["tensorboard>=2.17"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.16"],
        # Colours, a bar and units on the console.
        "console": ["rich>=13"],
        "quickstart": ["matplotlib>=3.9", "scikit-learn>=1.5"],
        "dev": [
            "aiohttp>=3.9",
            "av>=13",
            # Its Muon is what ours is compared with.
            "emerging-optimizers>=0.3; python_version >= '3.12'",
            "flask>=3.0",  # of the local S3 server
            "flask-cors>=5.0",
            "fsspec>=2024.6",
            "hypothesis>=6.100",
            "moto[s3]>=5.1",
            "numba>=0.61",
            "peft>=0.17",
            "pyarrow>=17",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ray>=2.40",
            "ruff==0.17.5",
            "s3fs>=2024.6",
            "simplejpeg>=1.8",
            "tensorboard>=2.17",
            "wandb>=0.19",
        ],
    },
)
