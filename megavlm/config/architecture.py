"""What a model is made of: the first section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megavlm.config.connectors import Connector, ConnectorSizes, Ends, connector_sizes
from megavlm.config.cross_attention import CrossAttention
from megavlm.config.image_text import ImageText
from megavlm.config.lora import Lora
from megavlm.config.objectives import ObjectiveNeeds, needs_of
from megavlm.config.preference import Preference
from megavlm.config.vision import Vision

# Families of text encoders.
TEXT_ENCODERS = ("clip_text", "siglip_text")
# Activations of an MLP whose first linear layer has a second half, which the activation of the
# first one multiplies.
GATED = ("swiglu", "geglu_tanh", "clamped_quick_geglu")
# Families with learned positions; all of them have what follows, too.
LEARNED_POSITIONS = (*TEXT_ENCODERS, "opt")
# Families with LayerNorm, biases everywhere, and an MLP without a gate.
LAYER_NORM_FAMILIES = (*LEARNED_POSITIONS, "persimmon")
# Families of which some layers have sliding windows.
WINDOWED_FAMILIES = ("gpt_oss", "gemma2")
# Rows of OPT's table of positions that stand before that of the first token.
_OPT_UNUSED_POSITIONS = 2


@dataclass(frozen=True, kw_only=True)
class Language:
    """The language model: RMSNorm, rotary positions, grouped-query attention, gated MLP; or the
    text encoder of a CLIP or SigLIP, or an OPT: LayerNorm, learned positions, biases, a plain MLP.
    The MLP may be a mixture of experts (Shazeer et al., arXiv 1701.06538), as in Qwen3-MoE.

    Args:
        family: weight naming of Hugging Face's files, such as qwen2, qwen3, internlm2, internlm3,
            llama, mistral, phi3, gemma, gemma2, persimmon or qwen3_moe; clip_text and siglip_text
            are text encoders, the latter without a causal mask.
        num_layers: transformer layers; 0: there is no language model, as some objectives ask.
        hidden_size: width of the model.
        ffn_hidden_size: width inside the gated MLP of a layer; with experts it has no effect, and
            is only written to exported checkpoints.
        num_attention_heads: query heads.
        num_query_groups: key and value heads (grouped-query attention).
        kv_channels: width of a head; 0: hidden_size / num_attention_heads.
        vocab_size: rows of the embedding, including special tokens, excluding tensor-parallel
            padding.
        rotary_base: base period of the rotary position embedding.
        rotary_percent: share of a head's width that is rotated, the front of it (Persimmon: 0.5).
        rotary_sections: of how many rotations of a head, the fast ones first, the position is that
            of the frame, of the row and of the column, as in Qwen2-VL (M-RoPE, arXiv 2409.12191);
            together half of a head's width. Empty: all rotate by the place in the text.
        rotary_interleaved: whether frames, rows and columns take turns among the rotations, as in
            Qwen3-VL, instead of having a section each.
        rotary_dynamic_factor: factor of dynamic NTK scaling for samples longer than
            max_position_embeddings (1: off). It leaves shorter samples unchanged and is written to
            exported checkpoints.
        rotary_yarn_factor: factor of YaRN (Peng et al., arXiv 2309.00071), by which slow rotations
            are slower, and with whose logarithm all products of queries and keys grow (1: off).
        rotary_yarn_positions: longest sample before YaRN; with rotary_yarn_factor.
        rotary_yarn_truncate: whether the range of YaRN's ramp begins and ends at whole numbers.
        layernorm_epsilon: added to the mean square inside the norms.
        max_position_embeddings: longest sample that the position embedding supports; written to
            exported checkpoints.
        qkv_bias: whether the query, key and value projections have a bias.
        qk_norm: whether the queries and keys of each head are normalised (Qwen3, Persimmon).
        linear_bias: whether the layer behind attention has a bias, and router and experts if there
            are any, beside RMSNorm (GPT-OSS); models with LayerNorm have biases everywhere.
        attention_sinks: whether the softmax of attention has a learned number of each head beside
            the keys (GPT-OSS).
        window_size: tokens that a token sees in layers with sliding windows, itself counted; 0: no
            layer has them.
        window_attn_skip_freq: every so many-th layer has no window: 2 is every second; 0: all
            layers have windows.
        attention_softcap: bound of the products of queries and keys, c, which become c tanh(x / c)
            (Gemma 2, arXiv 2408.00118); 0: none.
        final_softcap: the same of the logits over the vocabulary; 0: none.
        query_pre_attn_scalar: products of queries and keys are divided by its square root; 0: the
            width of a head.
        sandwich_norm: whether attention and MLP have a norm behind them, too, in front of the
            addition (Gemma 2).
        tied_head: whether the head shares the token embedding's tensor.
        activation: of the MLP: swiglu, with a gate, in most language models, and geglu_tanh, a gate
            with the approximation of GELU, in Gemma; in text encoders GELU, its approximation with
            tanh, or x * sigmoid(1.702 x); relu in OPT, and its square, relu2, in Persimmon;
            clamped_quick_geglu in GPT-OSS: a gate x * sigmoid(1.702 x) that is clamped at 7, and
            another half that is clamped at -7 and 7, plus 1.
        zero_centered_norm: whether a norm multiplies by 1 plus its weight (Gemma).
        scaled_embedding: whether token embeddings are multiplied by the square root of hidden_size,
            rounded to the model's dtype (Gemma).
        num_experts: gated MLPs (experts) in the place of the one MLP of each layer; 0: none.
        experts_per_token: experts that a router chooses for each token, those of the largest
            probabilities (top-k); none is dropped.
        expert_ffn_hidden_size: width inside an expert.
        norm_topk_prob: whether the chosen experts' outputs are weighed by their probabilities
            divided by the sum of these; else by the probabilities among all experts.
        router_scores: of an expert for a token: its share of the softmax, or the sigmoid of its
            logit (DeepSeek-V3, arXiv 2412.19437), which takes the place of the probability.
        router_bias: whether a bias is added to the scores for the choice of experts alone, which
            ``--experts.bias_update_rate`` moves (arXiv 2408.15664).
        routed_scaling: factor of the routed experts' outputs.
        shared_expert_ffn_hidden_size: width inside a gated MLP that every token takes beside its
            experts; 0: none. Several shared experts are one of their joint width.
        shared_expert_gate: whether the shared expert's output is multiplied by the sigmoid of a
            learned projection of the token (Qwen2-MoE).
    """

    family: str = "qwen2"
    num_layers: int = 24
    hidden_size: int = 896
    ffn_hidden_size: int = 4864
    num_attention_heads: int = 14
    num_query_groups: int = 2
    kv_channels: int = 0
    vocab_size: int = 151674
    rotary_base: float = 1e6
    rotary_percent: float = 1.0
    rotary_sections: tuple[int, ...] = ()
    rotary_interleaved: bool = False
    rotary_dynamic_factor: float = 1.0
    rotary_yarn_factor: float = 1.0
    rotary_yarn_positions: int = 4096
    rotary_yarn_truncate: bool = True
    layernorm_epsilon: float = 1e-6
    max_position_embeddings: int = 32768
    qkv_bias: bool = True
    qk_norm: bool = False
    linear_bias: bool = False
    attention_sinks: bool = False
    window_size: int = 0
    window_attn_skip_freq: int = 0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    query_pre_attn_scalar: int = 0
    sandwich_norm: bool = False
    tied_head: bool = False
    activation: Literal[
        "swiglu",
        "geglu_tanh",
        "clamped_quick_geglu",
        "gelu",
        "gelu_tanh",
        "quick_gelu",
        "relu",
        "relu2",
    ] = "swiglu"
    zero_centered_norm: bool = False
    scaled_embedding: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    routed_scaling: float = 1.0
    shared_expert_ffn_hidden_size: int = 0
    shared_expert_gate: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.activation in GATED

    @property
    def exists(self) -> bool:
        """Whether there is a language model."""
        return self.num_layers > 0

    @property
    def is_encoder(self) -> bool:
        """Whether it is a text encoder, which has no head over the vocabulary."""
        return self.family in TEXT_ENCODERS

    @property
    def has_layer_norm(self) -> bool:
        """Whether it has LayerNorm, and biases in all linear layers; else RMSNorm."""
        return self.family in LAYER_NORM_FAMILIES

    @property
    def has_bias(self) -> bool:
        """Whether linear layers other than those of queries, keys and values have a bias."""
        return self.has_layer_norm or self.linear_bias

    def window_of(self, layer: int) -> int:
        """Return how many tokens a token sees in a layer, counted from 0; 0: the whole sample."""
        every = self.window_attn_skip_freq
        return 0 if every and (layer + 1) % every == 0 else self.window_size

    @property
    def attends_in_blocks(self) -> bool:
        """Whether attention is our own, since no kernel for packed samples computes it."""
        has_cap = self.attention_softcap > 0
        return self.attention_sinks or has_cap or self.window_size > 0

    @property
    def has_learned_positions(self) -> bool:
        """Whether positions are a table that is added to the embeddings; else they are rotary."""
        return self.family in LEARNED_POSITIONS

    @property
    def unused_positions(self) -> int:
        """Rows of the table of positions before that of the first token."""
        return _OPT_UNUSED_POSITIONS if self.family == "opt" else 0

    @property
    def position_rows(self) -> int:
        """Rows of the table of positions."""
        return self.max_position_embeddings + self.unused_positions

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self.family != "siglip_text"

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.kv_channels or self.hidden_size // max(self.num_attention_heads, 1)


# What stands in the place of a part that a model does not have.
NO_LANGUAGE = Language(num_layers=0)
NO_VISION = Vision(num_layers=0)
# What a model without a vision encoder still has of it: how an image becomes patches.
PATCH_SETTINGS = ("image_size", "patch_size", "pixel_mean", "pixel_std")


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """The objective contrastive: what the model ends in, and its loss.

    Args:
        size: width of the embeddings of images and texts.
        loss: cross-entropy over all pairs of a step (softmax; InfoNCE of CLIP), or of each pair
            against each other one by itself (sigmoid; SigLIP).
        text_bias: whether the projection of the texts has a bias.
        max_scale: upper bound of the learned factor of similarities; 0: none.
        positives: which texts of a step belong to an image: its own; or those of all pairs with the
            same image (bytes of the file), the same text, or either. Cross-entropy gives each of
            them the same share of its target.
        exchange: how data-parallel ranks get each other's embeddings: gather, or for the sigmoid
            loss ring, in which texts go from rank to rank and no rank has the similarities of all.
    """

    size: int = 512
    loss: Literal["softmax", "sigmoid"] = "softmax"
    text_bias: bool = False
    max_scale: float = 100.0
    positives: Literal["own", "image", "text", "either"] = "own"
    exchange: Literal["gather", "ring"] = "gather"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and variants of the model's parts; ``--model`` fills them from its preset.

    Args:
        vision: the vision encoder.
        connector: maps vision features to embeddings of the language model.
        language: the language model.
        objective: what the model is trained to do, and so what it ends in: next_token, preference,
            contrastive, or qformer, which has no language model.
        preference: losses of that objective.
        contrastive: what a model of that objective ends in.
        image_text: what a model of the objective qformer ends in.
        image_tokens: special tokens that stand for images in texts: InternVL's nine, LLaVA's
            ``<image>``, PaliGemma's, which also has tokens of places and shapes, Fuyu's, with one
            that ends a row of patches, IDEFICS's, ``<image>`` between two
            ``<fake_token_around_image>``, openflamingo's: these and ``<|endofchunk|>``, or those
            of Qwen2-VL; none for pairs, whose texts have no image.
        prefix_lm: whether all tokens of a sample before its first supervised one see each other
            (prefix-LM; arXiv 1910.10683, section 3.2.1), as in PaliGemma; those from there on see
            what comes before them.
        cross_attention: layers through which the language model's tokens read images; an image
            then has one placeholder token.
        added_tokens: so many rows at the end of the vocabulary are parameters of their own, in the
            embedding and in the head, which are trained while the other rows are frozen: special
            tokens that the language model did not know.
        lora: adapters beside frozen linear layers.
    """

    objective: str = "next_token"
    vision: Vision = field(default_factory=Vision)
    connector: Connector = field(default_factory=Connector)
    language: Language = field(default_factory=Language)
    image_tokens: Literal[
        "internvl", "llava", "paligemma", "fuyu", "idefics", "openflamingo", "qwen2_vl", "none"
    ] = "internvl"
    prefix_lm: bool = False
    cross_attention: CrossAttention = field(default_factory=CrossAttention)
    added_tokens: int = 0
    lora: Lora = field(default_factory=Lora)
    preference: Preference = field(default_factory=Preference)
    contrastive: Contrastive = field(default_factory=Contrastive)
    image_text: ImageText = field(default_factory=ImageText)

    def __hash__(self) -> int:
        """Hash only what tells most models apart: the planner looks tables up by model, millions
        of times.
        """
        return hash((self.vision.hidden_size, self.language.hidden_size, self.language.num_layers))

    @property
    def needs(self) -> ObjectiveNeeds:
        """What the objective needs. Raises ValueError if there is no such objective."""
        return needs_of(self.objective)

    @property
    def needs_pair_ids(self) -> bool:
        """Whether the loss asks which pairs share an image or a text."""
        return self.objective == "contrastive" and self.contrastive.positives != "own"

    @property
    def connector_sizes(self) -> ConnectorSizes:
        """How large the connector is. Raises ValueError if there is no such kind or objective."""
        ends = Ends(
            grid=self.vision.grid,
            input_size=self.vision.output_size,
            output_size=self.needs.connector_output(self),
            inner_size=self.vision.ffn_hidden_size,
            tokens=self.vision.layer_tokens,
            has_layer_norm=self.vision.normalization == "LayerNorm",
            deep_levels=len(self.vision.deepstack_layers),
            is_memory=self.cross_attention.every > 0,
        )
        return connector_sizes(self.connector, ends)

    @property
    def memory_size(self) -> int:
        """Width of what cross-attention reads."""
        return self.vision.hidden_size

    @property
    def table_rows(self) -> int:
        """Rows of the token embedding and of the head, those of added tokens not counted."""
        return self.language.vocab_size - self.added_tokens

    @property
    def placeholders_per_tile(self) -> int:
        """Placeholder tokens, such as ``<IMG_CONTEXT>``, that one tile has in the text."""
        return self.connector_sizes.placeholders

    @property
    def features_per_tile(self) -> int:
        """Features that the connector gives for one tile."""
        return self.connector_sizes.features
