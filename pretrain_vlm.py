"""Trains a vision-language model; start it with torchrun. `python pretrain_vlm.py --help` tells
how.
"""

from megavlm.config.cli import parse
from megavlm.model_source import read_model
from megavlm.pack_first import pack_annotations, problems

if __name__ == "__main__":
    config = pack_annotations(parse(read_model=read_model, find_problems=problems))
    # Only now, since it takes seconds: help and mistakes in the configuration should not wait for
    # torch and megatron-core.
    from megavlm.train.launch import launch

    launch(config)
