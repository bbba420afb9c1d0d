"""Trains a vision-language model; start it with torchrun. `python pretrain_vlm.py --help` tells how."""

from megavlm.config.cli import parse

if __name__ == "__main__":
    config = parse()
    from megavlm.train.launch import launch  # after parsing: --help and mistakes are answered without loading megatron-core

    launch(config)
