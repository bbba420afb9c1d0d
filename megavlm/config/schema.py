"""The configuration of a training run, as a tree of frozen dataclasses.

It is built once, by ``config/cli``, from the tables (``config/models``, ``config/stages``), YAML
files and the command line, and is saved as one resolved YAML beside every checkpoint. A fact is
stated once; what follows from it is a property.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megavlm.config.architecture import Architecture as Architecture
from megavlm.config.architecture import Language as Language
from megavlm.config.architecture import Vision as Vision
from megavlm.config.connectors import Connector as Connector
from megavlm.config.parts import Init as Init

# What ``--data.augment`` knows.
AUGMENTATIONS = ("jpeg", "crop", "flip", "colour")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Packed datasets, made by ``tools/pack_dataset.py``.

    Args:
        train: folder of the packed training set, or its URL in object storage, such as
            ``s3://bucket/packs``; or several with commas between them.
        weights: shares of the packs that are taken from each folder of ``train``; empty: each as
            often as it has packs.
        batch_shares: every global batch has the same number of packs from each folder of ``train``,
            its share rounded to whole packs; otherwise any 64 packs in a row have their shares, to
            within one or two.
        curriculum: in the first epoch, take packs by their level of difficulty, the easiest first,
            shuffled inside a level; later epochs mix all levels. The packs must have been made with
            ``tools/pack_dataset.py --difficulty``.
        valid: folder of the packed held-out set; empty: no evaluation.
        shuffle: visit the packs in an order drawn from the seed, a new one each epoch; otherwise as
            stored.
        group: packs of like cost that are taken together, so that no rank of a step waits long; 0:
            the global batch size. 1: any packs.
        loss_reduction: weight of a supervised token: 1 (token), 1/n (sample) or 1/sqrt(n) (square),
            n the sample's supervised tokens.
        augment: random changes of images of sources that were packed with data_augment: jpeg
            (quality 75 to 100, InternVL's), crop, flip, colour. Crop and flip move what boxes and
            words such as "left" are about.
        workers: loader processes of each rank; 0 decodes in the training process.
        prefetch: packs that each loader process keeps ready.
        timeout: seconds after which a loader process that gives no pack ends the run; 0: it is
            waited for.
    """

    train: str = ""
    weights: tuple[float, ...] = ()
    batch_shares: bool = False
    curriculum: bool = False
    valid: str = ""
    shuffle: bool = True
    group: int = 0
    loss_reduction: Literal["token", "sample", "square"] = "square"
    augment: tuple[str, ...] = ()
    workers: int = 4
    prefetch: int = 4
    timeout: int = 600

    @property
    def train_folders(self) -> tuple[str, ...]:
        """The folders of ``train``."""
        return tuple(folder.strip() for folder in self.train.split(",") if folder.strip())


LAYER_PARTS = ("vision", "language")
"""The parts of the model that have layers."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is laid out over the ranks; what is left of the world is data parallel.

    Args:
        tensor_model_parallel_size: ranks that share each layer.
        pipeline_model_parallel_size: ranks that share out the layers, each a chunk of neighbouring
            ones, or several.
        virtual_pipeline_model_parallel_size: chunks on each rank of the pipeline. The ranks take
            their turns again and again along the layers, so that each waits a shorter time at the
            start and at the end of a step, and activations travel more often. Every data-parallel
            rank must have a multiple of ``pipeline_model_parallel_size`` packs in a step.
        context_parallel_size: ranks that share each pack's tokens, sample by sample, and its tiles.
            The packs' samples must be aligned to twice as many tokens (``tools/pack_dataset.py
            --alignment``).
        sequence_parallel: share the language model's activations between its layers over the
            tensor-parallel ranks too.
        layout: layers of each chunk of the pipeline. auto: the borders that make the slowest chunk
            fastest, for this model, freeze mask and data; even: equal numbers of layers; or a text
            such as ``v*24,c,t*4|t*9|t*9|t*6,h``: v is a layer of the vision encoder, t of the
            language model, c the connector and token embedding (with the first t), h the head (with
            the last t).
        vision: how the tensor-parallel ranks share the vision encoder and the connector: a part of
            each layer on every rank (tensor), or whole layers on every rank and a share of the
            tiles (data), which spares two sums over the ranks in every layer.
        recompute: what the backward pass computes again instead of keeping it: nothing (none), the
            MLP of each layer (selective; more than half of the memory for a fifth of the time), or
            whole layers (full).
        recompute_parts: whose layers that is done to: of the vision encoder (vision), of the
            language model (language), or of both.
        overlap_grad_reduce: sum gradients over the copies of the model while the backward pass goes
            on, instead of after it.
        overlap_param_gather: collect updated weights from the copies of the model while the forward
            pass goes on, instead of before it.
        bucket_size: numbers of gradients that are summed in one go; 0: megatron-core's choice, 40
            million or, if that is more, a million for each data-parallel rank.
        timeout_minutes: how long a collective may wait before the run is ended.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
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
        """Ranks that hold one copy of the model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def chunks(self) -> int:
        """Pieces that the layers are cut into. Chunk ``c`` stands on rank ``c %
        pipeline_model_parallel_size`` of the pipeline.
        """
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    def recompute_of(self, part: str) -> str:
        """Return the recomputation that the layers of ``part`` (``vision`` or ``language``) use."""
        return self.recompute if part in self.recompute_parts else "none"

    @property
    def vision_tensor_size(self) -> int:
        """Ranks that share each layer of the vision encoder and of the connector."""
        return 1 if self.vision == "data" else self.tensor_model_parallel_size

    @property
    def tile_ranks(self) -> int:
        """Ranks that share each pack's tiles."""
        return (
            self.context_parallel_size * self.tensor_model_parallel_size // self.vision_tensor_size
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with a learning rate that warms up linearly, then falls on a cosine.

    Args:
        lr: highest learning rate.
        min_lr: learning rate at the last step.
        warmup_steps: steps of linear warm-up from 0; it wins over ``warmup_ratio`` when above 0.
        warmup_ratio: warm-up as a share of the training steps.
        schedule: course of the learning rate after warm-up.
        weight_decay: decoupled weight decay.
        decay: which trained parameters decay: all, as InternVL's recipe does, or matrices only
            (neither norms, biases nor layer scales).
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        clip_grad: largest norm of the whole gradient; 0: no clipping.
        moments: dtype of both moments; bfloat16 saves four bytes a trainable parameter and needs
            Transformer Engine.
    """

    lr: float = 2e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.05
    decay: Literal["all", "matrices"] = "all"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Training:
    """The length and the randomness of the run.

    Args:
        steps: optimizer updates.
        global_batch_size: packs of one update, over all ranks and micro-steps.
        seed: fixes fresh weights, the order of the packs and drop path.
        precision: number format of weights and activations; float32 master weights and gradients
            are kept either way.
        trainable: what is trained: vision, connector, language, or patterns of parameter names such
            as ``vision.encoder.layers.2*``.
        drop_path: highest rate of drop path in the vision encoder, growing linearly over its depth;
            off where vision is frozen.
        eval_interval: steps between evaluations on ``data.valid``; 0: only at the start and at the
            end.
        eval_packs: packs of one evaluation; 0: all.
        kernels: layers of Transformer Engine, megatron-core's own (local), or the former wherever
            they run and numbers have 16 bits (auto).
        head_tokens: tokens that the head and the loss are computed of: those with a loss weight, or
            all, which gives the same loss in more time and memory.
        deterministic: use only kernels that give the same bits each time; slower on a GPU, and how
            a CPU always computes.
    """

    steps: int = 1000
    global_batch_size: int = 512
    seed: int = 42
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    trainable: tuple[str, ...] = ("connector",)
    drop_path: float = 0.0
    eval_interval: int = 0
    eval_packs: int = 0
    kernels: Literal["auto", "local", "transformer_engine"] = "auto"
    head_tokens: Literal["supervised", "all"] = "supervised"
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """Matrix products in 8 bits, by Transformer Engine; weights, gradients and everything else keep
    the formats they have without.

    A recipe says how numbers are scaled into 8 bits: by the largest value of earlier steps
    (delayed), of the tensor itself (tensorwise), of blocks of 128 x 128 weights and 1 x 128
    activations (blockwise), or of 32 numbers in hardware (mxfp8, from Blackwell on).

    Args:
        vision: recipe of the vision encoder's layers.
        language: recipe of the language model's layers; embedding and head stay in 16 bits, as does
            the connector.
        format: e4m3 everywhere, or e5m2 for gradients (hybrid).
        first_bf16_layers: layers at the start of each part that stay in 16 bits.
        last_bf16_layers: layers at the end of each part that stay in 16 bits.
    """

    vision: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    language: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    format: Literal["hybrid", "e4m3"] = "hybrid"
    first_bf16_layers: int = 0
    last_bf16_layers: int = 0

    @property
    def recipes(self) -> dict[str, str]:
        """The recipe of each part that has one."""
        return {
            part: recipe
            for part, recipe in (("vision", self.vision), ("language", self.language))
            if recipe != "none"
        }


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where checkpoints go and come from.

    Args:
        save: folder that gets a sub-folder for each checkpoint; a run that finds its own
            checkpoints there goes on from the newest.
        load: checkpoint folder (one step, or a run's ``save`` folder) or Hugging Face folder to
            start from. The same stage resumes exactly; another stage takes the weights only.
        save_interval: steps between checkpoints; 0: only at the end and when the run is asked to
            stop.
        asynchronous: write checkpoints beside training; only the copy from the device to the host
            holds it up.
        keep: newest checkpoints to keep; 0: all.
        keep_best: checkpoints with the lowest held-out loss to keep beside the newest.
        weights_only: take only the weights of the checkpoint in ``load``, also if it is of the same
            stage: steps, data and moments start anew. A run that finds checkpoints of its own in
            ``save`` resumes from them all the same.
        moments: AdamW's moments when a stage starts from the checkpoint of another: all fresh, or
            kept for weights that both stages train.
        verify: what is compared with the checksums before a checkpoint is loaded: every byte
            (content), or, where reading them takes too long, only the sizes of the files.
        export_hf: folder to write the trained model to, in Hugging Face format, at the end of the
            run.
    """

    save: str = ""
    load: str = ""
    save_interval: int = 100
    asynchronous: bool = False
    keep: int = 3
    keep_best: int = 0
    weights_only: bool = False
    moments: Literal["fresh", "keep"] = "fresh"
    verify: Literal["content", "size"] = "content"
    export_hf: str = ""


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What a run tells while it trains.

    Args:
        interval: steps between lines on the console, in ``metrics.jsonl`` and in the trackers.
        tensorboard: also write TensorBoard event files, to ``tensorboard/`` in the save folder.
        wandb_project: Weights & Biases project; empty: off.
        wandb_mode: whether Weights & Biases sends its records, or keeps them in the save folder.
        run_name: name of the run in the trackers.
    """

    interval: int = 10
    tensorboard: bool = False
    wandb_project: str = ""
    wandb_mode: Literal["online", "offline"] = "online"
    run_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Health:
    """How a run finds out that one of its machines is ill. It says so on the console; only a lost
    rank ends it.

    Args:
        speed_check: measure, for a few seconds at the start, how fast every rank computes and how
            fast every group of ranks exchanges data.
        slow_factor: name a rank or a group that is this many times slower than is usual among its
            like.
        least_gb_per_s: name a group of GPUs that moves less than this many GB (1e9 bytes) a second,
            even if all are alike: it talks through the wrong network card; 0: none is too slow.
        hang_factor: report what every rank does when one has made no progress for this many times
            the longest of its last waits; 0: never.
        hang_seconds: shortest time without progress that is reported; the very first step may take
            ``hang_factor`` times as long.
    """

    speed_check: bool = True
    slow_factor: float = 3.0
    least_gb_per_s: float = 2.0
    hang_factor: float = 10.0
    hang_seconds: int = 60


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training run.

    Args:
        stage: name of a row of the table of stages, which fills the recipe's settings; empty only
            in a checkpoint made by conversion.
        model: name of a row of the table of models, or a Hugging Face folder, whose config.json
            then fills ``architecture``; not needed where ``init`` names both parts.
        architecture: what the model is made of.
        init: parts to start from.
        data: the packed datasets.
        parallel: the layout over ranks.
        optimizer: AdamW and its learning rate.
        training: length, batch size, precision and freeze mask.
        fp8: matrix products in 8 bits.
        checkpoint: saving and loading.
        logging: console, files and trackers.
        health: checks of the machines.
    """

    stage: str
    model: str
    architecture: Architecture = field(default_factory=Architecture)
    init: Init = field(default_factory=Init)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    fp8: Fp8 = field(default_factory=Fp8)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    health: Health = field(default_factory=Health)

    @property
    def group(self) -> int:
        """Packs of like cost that are taken together."""
        return self.data.group or self.training.global_batch_size
