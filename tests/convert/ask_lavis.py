r"""Ask LAVIS's own first stage of BLIP-2, and write what it answers: tests/golden/lavis_stage1.

Run by hand, with a clone of salesforce/LAVIS and a release of transformers that it loads under:

    python -m tests.convert.ask_lavis write FOLDER
    PYTHONPATH=transformers-4.37.2:LAVIS python tests/convert/ask_lavis.py ask FOLDER
    python -m tests.convert.ask_lavis keep FOLDER
"""

import gzip
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

GOLDEN = Path(__file__).parents[1] / "golden" / "lavis_stage1.json.gz"
# Parts of transformers' names, and of LAVIS's for the same weight.
NAMES = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
    (r"\.self_attn\.qkv", ".attn.qkv"),
    (r"\.self_attn\.projection", ".attn.proj"),
    (r"\.layer_norm", ".norm"),
    (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"^qformer\.", "Qformer.bert."),
    (r"attention\.attention", "attention.self"),
    (r"^vision_projection", "vision_proj"),
    (r"^text_projection", "text_proj"),
    (r"^objective\.temperature$", "temp"),
    (r"^objective\.transform_norm", "Qformer.cls.predictions.transform.LayerNorm"),
    (r"^objective\.transform\.", "Qformer.cls.predictions.transform.dense."),
    (r"^objective\.vocabulary_bias", "Qformer.cls.predictions.bias"),
)


def write(folder):
    """Write the weights, and what to ask of them."""
    from tests.convert import golden_models as golden

    asked = {"weights": golden.digest(golden.make_stage1(folder)), **golden.stage1_questions()}
    (folder / "asked.json").write_text(json.dumps(asked))


def ask(folder):
    """Answer with the original class."""
    import torch
    import transformers

    asked = json.loads((folder / "asked.json").read_text())
    model = _original(folder, asked)
    vision = asked["vision"]
    mean, std = (torch.tensor(vision[name])[:, None, None] for name in ("pixel_mean", "pixel_std"))
    scores = []
    model.itm_head.register_forward_hook(lambda *call: scores.append(call[2].mean(dim=1)))
    draws = iter([draw for kind in asked["draws"] for draw in kind])
    negatives = []

    def drawn(weights, count):
        sums = weights.double().cumsum(0)
        found = torch.searchsorted(sums, next(draws) * sums[-1:], right=True)
        negatives.append(int(found))
        return found

    torch.multinomial = drawn  # in the place of a random state
    tiles = (torch.tensor(asked["tiles"]) / 255 - mean) / std
    losses = model({"image": tiles, "text_input": asked["texts"]})
    losses.loss.backward()
    found = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "weights": asked["weights"],
        "losses": {
            "itc": float(losses.loss_itc),
            "itm": float(losses.loss_itm),
            "itg": float(losses.loss_lm),
        },
        "matching": scores[0].tolist(),
        "negatives": negatives,
        "gradients": _gradients(model, folder),
    }
    (folder / "answered.json").write_text(json.dumps(found))
    print(found["losses"], negatives)


def _small_class(asked):
    """Return LAVIS's class, with parts of other sizes."""
    import torch

    _stand_in()
    from functools import partial

    from lavis.models.blip2_models.blip2 import LayerNorm
    from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
    from lavis.models.eva_vit import VisionTransformer

    vision = asked["vision"]
    sizes = asked["qformer"]

    class Small(Blip2Qformer):
        @classmethod
        def init_tokenizer(cls, truncation_side="right"):
            return Words(asked)

        def init_vision_encoder(self, *given):
            encoder = VisionTransformer(
                img_size=vision["image_size"],
                patch_size=vision["patch_size"],
                use_mean_pooling=False,
                embed_dim=vision["hidden_size"],
                depth=vision["num_layers"],
                num_heads=vision["num_attention_heads"],
                mlp_ratio=vision["ffn_hidden_size"] / vision["hidden_size"],
                qkv_bias=True,
                norm_layer=partial(torch.nn.LayerNorm, eps=vision["layernorm_epsilon"]),
            )
            # LAVIS adds 1e-5 here; transformers, and we, the encoder's epsilon.
            return encoder, LayerNorm(vision["hidden_size"], eps=vision["layernorm_epsilon"])

        @classmethod
        def init_Qformer(cls, queries, vision_width, cross_attention_freq=2):
            config = BertConfig(
                vocab_size=sizes["vocab_size"],
                hidden_size=sizes["hidden_size"],
                num_hidden_layers=sizes["num_layers"],
                num_attention_heads=sizes["num_attention_heads"],
                intermediate_size=sizes["ffn_hidden_size"],
                max_position_embeddings=sizes["max_position_embeddings"],
            )
            config.encoder_width = vision_width
            config.add_cross_attention = True
            config.cross_attention_freq = cross_attention_freq
            config.query_length = queries
            tokens = torch.nn.Parameter(torch.zeros(1, queries, config.hidden_size))
            return BertLMHeadModel(config), tokens

    return Small


def _original(folder, asked):
    """Build LAVIS's class at a small size, with the weights of the folder."""
    import torch

    sizes = asked["qformer"]
    torch.distributed.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:29555", rank=0, world_size=1
    )
    model = _small_class(asked)(
        freeze_vit=False,
        num_query_token=sizes["queries"],
        cross_attention_freq=sizes["cross_attention_frequency"],
        embed_dim=asked["size"],
        max_txt_len=asked["text_tokens"],
    )
    missing, extra = model.load_state_dict(_renamed(folder), strict=False)
    tied = ("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    assert not extra and all(name.endswith(tied) for name in missing), (missing, extra)
    return model.eval()  # no dropout


def _renamed(folder):
    from safetensors.torch import load_file

    found = {}
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            name = renamed(name)
            if name.endswith(".attn.qkv.bias"):
                query, key, value = tensor.chunk(3)
                assert not key.any()
                found[name.replace("qkv.bias", "q_bias")] = query
                found[name.replace("qkv.bias", "v_bias")] = value
            else:
                found[name] = tensor.reshape(()) if name == "temp" else tensor
    return found


def renamed(name):
    """Return LAVIS's name of a weight that transformers, or our objective, names so."""
    for pattern, text in NAMES:
        name = re.sub(pattern, text, name)
    return name


def _gradients(model, folder):
    """Return the length of each weight's gradient, by the folder's names."""
    from safetensors.torch import load_file

    held = dict(model.named_parameters())
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name in load_file(path):
            there = renamed(name)
            theirs = [there]
            if there.endswith("qkv.bias"):
                theirs = [there.replace("qkv.bias", one) for one in ("q_bias", "v_bias")]
            found[name] = sum(float(held[one].grad.norm()) ** 2 for one in theirs) ** 0.5
    return found


class Words:
    """A tokenizer of texts that are lists of token ids already."""

    pad_token_id = 0

    def __init__(self, asked):
        self.size = asked["qformer"]["vocab_size"]
        self.bos_token_id = self.size - 1

    def __len__(self):
        return self.size

    def __call__(self, texts, max_length, **options):
        import torch
        from transformers import BatchEncoding

        assert max(map(len, texts)) <= max_length
        rows = [text + [0] * (max_length - len(text)) for text in texts]
        masks = [[int(place < len(text)) for place in range(max_length)] for text in texts]
        return BatchEncoding(
            {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
        )


def _stand_in():
    """Let LAVIS's files be imported without its packages' first files, which import all of it, and
    without packages that the first stage does not call.
    """
    root = next(Path(folder) / "lavis" for folder in sys.path if (Path(folder) / "lavis").is_dir())
    for name in (
        "lavis",
        "lavis.common",
        "lavis.models",
        "lavis.models.blip_models",
        "lavis.models.blip2_models",
    ):
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    wanted = {
        "omegaconf": ("OmegaConf",),
        "fairscale.nn.checkpoint.checkpoint_activations": ("checkpoint_wrapper",),
        "lavis.common.utils": ("get_abs_path", "is_url"),
    }
    for name, needed in wanted.items():
        sys.modules[name] = SimpleNamespace(**dict.fromkeys(needed))
    from lavis.models.base_model import BaseModel

    sys.modules["lavis.models"].BaseModel = BaseModel


def keep(folder):
    """Keep the answers as golden data, with seven digits."""
    answers = json.loads((folder / "answered.json").read_text())
    answers["matching"] = [[float(f"{x:.7g}") for x in row] for row in answers["matching"]]
    answers["gradients"] = {name: float(f"{x:.7g}") for name, x in answers["gradients"].items()}
    GOLDEN.write_bytes(gzip.compress(json.dumps(answers).encode(), mtime=0))


if __name__ == "__main__":
    {"write": write, "ask": ask, "keep": keep}[sys.argv[1]](Path(sys.argv[2]))
