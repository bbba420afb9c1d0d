"""The configuration of a training run, as a tree of frozen dataclasses.

It is built once, by ``config/cli``, from the tables (``config/models``, ``config/recipes``), YAML
files and the command line, and is saved as one resolved YAML beside every checkpoint. A fact is
stated once; what follows from it is a property.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megavlm.config.architecture import NO_LANGUAGE as NO_LANGUAGE
from megavlm.config.architecture import NO_VISION as NO_VISION
from megavlm.config.architecture import PATCH_SETTINGS as PATCH_SETTINGS
from megavlm.config.architecture import Architecture as Architecture
from megavlm.config.architecture import Contrastive as Contrastive
from megavlm.config.architecture import Language as Language
from megavlm.config.architecture import Vision as Vision
from megavlm.config.averages import Ema as Ema
from megavlm.config.connectors import Connector as Connector
from megavlm.config.data import ANY as ANY
from megavlm.config.data import AUGMENTATIONS as AUGMENTATIONS
from megavlm.config.data import STRATA as STRATA
from megavlm.config.data import Data as Data
from megavlm.config.evaluation import Eval as Eval
from megavlm.config.experts import Experts as Experts
from megavlm.config.fp8 import Fp8 as Fp8
from megavlm.config.image_text import ImageText as ImageText
from megavlm.config.logging import Logging as Logging
from megavlm.config.long_runs import BadSteps as BadSteps
from megavlm.config.long_runs import Profile as Profile
from megavlm.config.loss import Loss as Loss
from megavlm.config.optimizer import Optimizer as Optimizer
from megavlm.config.parts import Init as Init

REFERENCE_FOLDER = "reference"
"""Where the probabilities of a reference model lie in a save folder."""
LAYER_PARTS = ("vision", "language")
"""The parts of the model that have layers."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is split over the ranks; the rest of the world size is data parallelism.

    Args:
        tensor_model_parallel_size: tensor-parallel ranks, which split each layer.
        pipeline_model_parallel_size: pipeline-parallel ranks, each with one or more model chunks
            (consecutive layers).
        virtual_pipeline_model_parallel_size: model chunks per pipeline rank (interleaved 1F1B): a
            smaller bubble for more communication. The microbatches per data-parallel rank must be a
            multiple of ``pipeline_model_parallel_size``.
        context_parallel_size: context-parallel ranks, which split the tokens of each sample and the
            tiles of each pack. Samples must be packed with an alignment of twice this number
            (``tools/pack_dataset.py --alignment``).
        expert_model_parallel_size: expert-parallel ranks, which split the experts of each layer
            and send each other tokens. They are not further ranks, but data-parallel,
            context-parallel and tensor-parallel ones.
        expert_tensor_parallel_size: ranks that share each expert, as tensor-parallel ranks share a
            layer, and get the same tokens for it; these are such ranks too. 1: each expert is whole
            on its rank.
        sequence_parallel: split the language model's activations between layers over the
            tensor-parallel ranks (less activation memory).
        layout: layers of each model chunk. auto: stage boundaries that minimise the cost of the
            slowest chunk for this model, freeze mask and data; even: equal numbers of layers; or a
            text such as ``v*24,c,t*4|t*9|t*9|t*6,h``: v is a layer of the vision encoder, t of the
            language model, c the connector and token embedding (with the first t), h the head (with
            the last t).
        vision: how tensor-parallel ranks split the vision encoder and the connector: by layer, as
            the language model (tensor), or by tile, with whole layers on every rank (data), which
            avoids two all-reduces per layer.
        recompute: activations to recompute in the backward pass instead of storing them: none, the
            MLP of each layer (selective; saves more than half of the memory for a fifth more time),
            or whole layers (full).
        recompute_parts: parts whose layers are recomputed: vision, language, or both.
        overlap_grad_reduce: reduce gradients over the data-parallel replicas during the backward
            pass instead of after it.
        overlap_param_gather: gather updated parameters from the data-parallel replicas during the
            forward pass instead of before it.
        bucket_size: gradient elements per reduction; 0: megatron-core's default, the larger of 40
            million and one million per data-parallel rank.
        timeout_minutes: abort the run if a collective takes longer than this.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    layout: str = "auto"
    vision: Literal["tensor", "data"] = "tensor"
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_parts: tuple[str, ...] = LAYER_PARTS
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    bucket_size: int = 0
    timeout_minutes: int = 30

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one data-parallel replica of the model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def chunks(self) -> int:
        """Model chunks of the whole pipeline. Pipeline rank ``c % pipeline_model_parallel_size``
        holds chunk ``c``.
        """
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    def recompute_of(self, part: str) -> str:
        """Return the recomputation that the layers of ``part`` (``vision`` or ``language``) use."""
        return self.recompute if part in self.recompute_parts else "none"

    @property
    def vision_tensor_size(self) -> int:
        """Tensor-parallel ranks that split each layer of the vision encoder and the connector."""
        return 1 if self.vision == "data" else self.tensor_model_parallel_size

    @property
    def tile_ranks(self) -> int:
        """Ranks that split the tiles of each pack."""
        return (
            self.context_parallel_size * self.tensor_model_parallel_size // self.vision_tensor_size
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Length, batch size, precision and freeze mask of the run.

    Args:
        steps: optimizer steps.
        global_batch_size: packs per optimizer step, over all data-parallel ranks and microbatches
            (a pack is one microbatch).
        seed: seed of initial weights, the order of the packs, augmentation and drop path.
        precision: dtype of weights and activations; master weights and gradients are float32 either
            way.
        trainable: parameters to train: vision, connector, language, layers such as
            ``vision.layers.-4:`` (the last 4), or patterns of parameter names such as
            ``language.output_layer``.
        frozen_until: of ``trainable``, what stays frozen for the first steps of the run, such as
            ``vision=1000,language.layers.-4:=2000``; its moments are fresh when it is unfrozen.
        drop_path: drop path rate of the vision encoder's last layer, growing linearly from 0 over
            the depth; off if vision is frozen.
        drop_path_schedule: how the rate goes from ``drop_path`` to ``end_drop_path`` over the
            training steps.
        end_drop_path: drop path rate at the last step, unless it is constant.
        eval_interval: steps between evaluations on ``data.valid``; 0: at the start and the end.
        eval_packs: packs per evaluation; 0: all.
        kernels: layer implementation: Transformer Engine, megatron-core's own (local), or auto:
            Transformer Engine if it is available and the dtype has 16 bits.
        head_tokens: tokens to compute output logits and loss for: only supervised ones, or all,
            which gives the same loss but takes more time and memory.
        max_hours: end the run after this many hours of training, with a checkpoint, as a stop
            signal does; the same command resumes it. 0: no limit.
        deterministic: use only bitwise reproducible kernels; slower on a GPU, always the case on a
            CPU.
    """

    steps: int = 1000
    global_batch_size: int = 512
    seed: int = 42
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    trainable: tuple[str, ...] = ("connector",)
    frozen_until: tuple[str, ...] = ()
    drop_path: float = 0.0
    drop_path_schedule: Literal["constant", "linear", "cosine"] = "constant"
    end_drop_path: float = 0.0
    eval_interval: int = 0
    eval_packs: int = 0
    kernels: Literal["auto", "local", "transformer_engine"] = "auto"
    head_tokens: Literal["supervised", "all"] = "supervised"
    max_hours: float = 0.0
    deterministic: bool = False

    @property
    def highest_drop_path(self) -> float:
        """The highest drop path rate of any step."""
        return max(self.drop_path, self.end_drop_path)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where checkpoints go and come from.

    Args:
        save: folder for checkpoints, one sub-folder each; a run that finds its own checkpoints
            there resumes from the newest.
        load: checkpoint folder (one step, or a run's ``save`` folder) or Hugging Face folder to
            start from. The same stage resumes exactly; another stage takes the weights only.
        save_interval: steps between checkpoints; 0: only at the end and on a signal.
        save_epochs: also save whenever this many epochs are over (an epoch is as many packs as
            ``data.train`` has); 0: never.
        asynchronous: write checkpoints in the background; training waits only for the copy from
            device to host.
        keep: number of newest checkpoints to keep; 0: all.
        keep_best: number of the best checkpoints to keep besides the newest.
        best_by: what they are best by: the lowest valid_loss, or the highest figure of a task, such
            as exam/accuracy.
        weights_only: take only the weights from ``load``, even if it is of the same stage: steps,
            data and moments start anew. A run that finds its own checkpoints in ``save`` still
            resumes from them.
        moments: those of the optimizer when a stage starts from another's checkpoint: fresh, or
            kept for parameters that both stages train.
        trained_only: leave frozen parameters, such as what adapters adapt, out of all checkpoints
            but the last. Resuming reads them from what the run began with, which is known by its
            content and may have moved.
        verify: what to verify before loading a checkpoint: the checksums of all files (content),
            or, if reading every byte takes too long, only the sizes of the files (size).
        export_hf: folder for the trained model in Hugging Face format, written at the end of the
            run.
    """

    save: str = ""
    load: str = ""
    save_interval: int = 100
    save_epochs: int = 0
    asynchronous: bool = False
    keep: int = 3
    keep_best: int = 0
    best_by: str = "valid_loss"
    weights_only: bool = False
    moments: Literal["fresh", "keep"] = "fresh"
    trained_only: bool = False
    verify: Literal["content", "size"] = "content"
    export_hf: str = ""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Health checks. They only warn; the run ends only if a rank or a machine is lost.

    Args:
        speed_check: at the start, measure for a few seconds how fast every rank computes and every
            process group communicates.
        slow_factor: report a rank or process group that is this many times slower than the median
            of its kind.
        least_gb_per_s: report a process group of GPUs that moves less than this many GB (1e9 bytes)
            a second, even if all are equally slow (usually the wrong network interface); 0: never.
        hang_factor: report what every rank is doing if one makes no progress for this many times
            its longest recent wait; 0: never.
        hang_seconds: shortest time without progress to report; the first step may take
            ``hang_factor`` times as long. Also how long ranks go on when the process of another one
            has ended.
        lost_machine_seconds: end a training on several machines if nothing was heard of one for so
            long, it takes no connection, and the training makes no progress; longer than a machine
            or its network may stand still; 0: wait until a collective times out.
    """

    speed_check: bool = True
    slow_factor: float = 3.0
    least_gb_per_s: float = 2.0
    hang_factor: float = 10.0
    hang_seconds: int = 60
    lost_machine_seconds: int = 180


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training run.

    Args:
        recipe: how models of a kind are trained; gives the stages.
        stage: training stage, a preset of the recipe's settings; empty only in a checkpoint made by
            conversion.
        model: model preset, or a Hugging Face folder whose config.json fills ``architecture``; not
            needed if ``init`` names both parts.
        architecture: sizes and variants of the model's parts.
        init: parts to start from.
        data: the packed datasets.
        parallel: split of the model over ranks.
        optimizer: what updates the parameters, and its learning rate.
        training: length, batch size, precision and freeze mask.
        ema: moving average of the trained parameters.
        fp8: FP8 matrix products.
        loss: loss over the vocabulary.
        experts: balance of experts, and how tokens get to them.
        bad_steps: steps whose gradient or loss goes wrong.
        checkpoint: saving and loading.
        logging: console, files and trackers.
        health: health checks.
        profile: a profile of some steps.
        eval: what the model is asked during training.
    """

    recipe: str = "internvl"
    stage: str
    model: str
    architecture: Architecture = field(default_factory=Architecture)
    init: Init = field(default_factory=Init)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    ema: Ema = field(default_factory=Ema)
    fp8: Fp8 = field(default_factory=Fp8)
    loss: Loss = field(default_factory=Loss)
    experts: Experts = field(default_factory=Experts)
    bad_steps: BadSteps = field(default_factory=BadSteps)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    health: Health = field(default_factory=Health)
    profile: Profile = field(default_factory=Profile)
    eval: Eval = field(default_factory=Eval)

    @property
    def reference(self) -> str:
        """Folder of the probabilities that a reference model gives answers; empty if the objective
        compares none.
        """
        if not self.architecture.needs.is_of_preferences:
            return ""
        save = self.checkpoint.save
        return self.data.reference or (f"{save}/{REFERENCE_FOLDER}" if save else "")

    @property
    def group(self) -> int:
        """Size of a bucket of similar-cost packs that are drawn together."""
        return self.data.group or max(self.training.global_batch_size // self.strata, 1)

    @property
    def strata(self) -> int:
        """Equal parts of the packs, by cost, that buckets which follow each other come from."""
        by_default = 1 if self.data.group == 1 else min(STRATA, self.training.global_batch_size)
        return self.data.strata or max(by_default, 1)
