"""Load exported folders with the transformers that is on the path, and print what was read as JSON.

Run as a process of its own by ``test_loaders.py``, with an old transformers in front of the path.
Nothing of megavlm is imported. Input on stdin: ``{"folders": {name: path}, "texts": [...],
"tokens": [...]}``, or ``{"models": {name: path}}`` for folders whose classes transformers has, with
``"positions": {name: [...]}`` for transformers 5.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer


def tokenizer_of(folder, texts, use_fast):
    """Return the class and the ids of the texts, or the error."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=use_fast)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    inputs = sorted(tokenizer(texts[0]))
    return {"class": type(tokenizer).__name__, "ids": ids, "chat": chat, "inputs": inputs}


def language_of(folder, tokens):
    """Return logits of the language part, built from llm_config as InternVLChatModel does it, or
    the error; None if this transformers has no such class.
    """
    settings = json.loads((Path(folder) / "config.json").read_text())["llm_config"]
    name = settings["architectures"][0]
    if not hasattr(transformers, name):
        return None
    model_class = getattr(transformers, name)
    config = model_class.config_class(**settings)
    config.tie_word_embeddings = False  # as the class of InternVL 2 and 3 does
    model = model_class(config).float().eval()
    prefix = "language_model."
    weights = {
        key.removeprefix(prefix): tensor.float()
        for path in Path(folder).glob("*.safetensors")
        for key, tensor in load_file(path).items()
        if key.startswith(prefix)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        return {"error": str(error)}
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
        embedded = model.get_input_embeddings()(torch.tensor([tokens]))
        options = {"max_new_tokens": 2, "do_sample": False, "use_cache": False}
        model.generate(inputs_embeds=embedded, **options)
    return {"values": logits.tolist()}


def seeing(folder, positions):
    """Return logits of a Qwen2-VL or a successor for an image of 10 x 6 patches in a text, and a
    video of four pairs of frames of 4 x 2 patches, and where its tokens stand unless ``positions``
    says so.
    """
    settings = json.loads((Path(folder) / "config.json").read_text())
    form = getattr(transformers, settings["architectures"][0])
    options = {"torch_dtype": torch.float32, "output_loading_info": True}
    model, info = form.from_pretrained(folder, **options)
    vision = settings["vision_config"]
    size = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    generator = torch.Generator().manual_seed(1)
    start, image, video = (
        settings[f"{name}_token_id"] for name in ("vision_start", "image", "video")
    )
    # Pairs stand apart in the texts of a Qwen3-VL.
    pair = [start, *[video] * 2, 5, 6] if "qwen3" in settings["model_type"] else [video] * 2
    clip = pair * 4 if len(pair) > 2 else [start, *pair * 4]
    tokens = torch.tensor([[9, 8, 7, start, *[image] * 15, 11, 12, *clip, *range(20, 28)]])
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(60, size, generator=generator),
        "image_grid_thw": torch.tensor([[1, 10, 6]]),
        "pixel_values_videos": torch.randn(32, size, generator=generator),
        "video_grid_thw": torch.tensor([[4, 4, 2]]),
    }
    grids = {name: inputs[name] for name in ("input_ids", "image_grid_thw", "video_grid_thw")}
    if "tokens_per_second" in vision:  # a whole number, since transformers 4 rounds it down
        grids["second_per_grid_ts"] = inputs["second_per_grid_ts"] = torch.tensor([2.0])
    if positions is None:
        positions = model.model.get_rope_index(**grids)[0].tolist()
    else:
        inputs["position_ids"] = torch.tensor(positions)
        kinds = (tokens == image).int() + 2 * (tokens == video).int()
        inputs["mm_token_type_ids"] = kinds
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    others = {name: len(info[name]) for name in info}
    return {
        "values": logits.tolist(),
        "others": others,
        "tokens": tokens[0].tolist(),
        "positions": positions,
    }


def main():
    """Read what to load, and print what was read."""
    job = json.load(sys.stdin)
    if "models" in job:
        positions = job.get("positions", {})
        found = {
            name: seeing(folder, positions.get(name)) for name, folder in job["models"].items()
        }
        print(json.dumps({"version": transformers.__version__, "models": found}))
        return
    found = {}
    for name, folder in job["folders"].items():
        found[name] = {
            "fast": tokenizer_of(folder, job["texts"], True),
            "slow": tokenizer_of(folder, job["texts"], False),
            "logits": language_of(folder, job["tokens"]),
        }
    print(json.dumps({"version": transformers.__version__, "folders": found}))


if __name__ == "__main__":
    main()
