"""Trains a vision-language model; start it with torchrun. `python pretrain_vlm.py --help` tells
how.
"""

import gc
import os
import sys

from megavlm.config.stages import parse_stages
from megavlm.model_source import read_model
from megavlm.pack_first import pack_annotations, problems
from megavlm.parallel.environment import set_environment
from megavlm.start_check import check_start
from megavlm.train.stop_signal import ignore_save_signal

if __name__ == "__main__":
    ignore_save_signal()
    stages = parse_stages(sys.argv[1:], read_model, problems, check_start)
    runs = [pack_annotations(run, stages[0]) for run in stages]
    # Only now, since it takes seconds: help and mistakes in the configuration should not wait for
    # torch and megatron-core. What is imported stays, so nobody has to look for garbage in it, then
    # or in training.
    gc.disable()
    # Before anybody asks the driver for GPUs.
    set_environment(runs[0].training.deterministic)
    import torch

    if not torch.cuda.is_available():
        # Nothing is compiled for a CPU, but megatron-core's decorators would load torch's compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from megavlm.train.stages import launch_all

    gc.freeze()
    gc.enable()
    launch_all(runs)
