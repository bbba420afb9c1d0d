r"""Ask OpenGVLab's own InternVLChatModel, and write what it answers: tests/golden/internvl_model.

Run by hand, with a clone of OpenGVLab/InternVL and the releases that it asks for in front:

    python -m tests.convert.ask_original write FOLDER
    PYTHONPATH=transformers-4.37.2:InternVL/internvl_chat \
        python tests/convert/ask_original.py ask FOLDER
    python -m tests.convert.ask_original keep FOLDER
"""

import gzip
import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "internvl_model.json.gz"
POSITIONS = 6  # of the last logits that are kept


def write(folder):
    """Write chat exports and what to ask of them."""
    from tests.convert import golden_models as golden

    for kind in golden.KINDS_OF_ORIGINAL:
        out = golden.export_golden(folder / kind, kind)
        asked = {
            "weights": golden.digest(out),
            "text": golden.TEXT,
            "questions": golden.QUESTIONS,
            "new_tokens": golden.NEW_TOKENS,
            "tiles": [golden.pixels(image).tolist() for image in golden.images()],
        }
        (folder / kind / "asked.json").write_text(json.dumps(asked))


def ask(folder):
    """Answer with the original class."""
    import torch
    import transformers
    from internvl.model.internvl_chat import InternVLChatModel
    from transformers import AutoTokenizer

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for path in sorted(folder.glob("*/asked.json")):
        asked = json.loads(path.read_text())
        tokenizer = AutoTokenizer.from_pretrained(path.parent / "chat", use_fast=True)
        model = InternVLChatModel.from_pretrained(path.parent / "chat").float().eval()
        tiles = (torch.tensor(asked["tiles"]) / 255 - mean) / std
        model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        ids = tokenizer(asked["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(tiles, ids, image_flags=torch.ones(2, 1, dtype=torch.long)).logits[0]
        settings = {"max_new_tokens": asked["new_tokens"], "do_sample": False}
        answers = [
            model.chat(
                tokenizer,
                tiles[:count] if count else None,
                question,
                dict(settings),
                num_patches_list=[1] * count,
            )
            for question, count in asked["questions"]
        ]
        found = {
            "transformers": transformers.__version__,
            "weights": asked["weights"],
            "ids": ids[0].tolist(),
            "logits": logits[-POSITIONS:].tolist(),
            "answers": answers,
        }
        path.with_name("answered.json").write_text(json.dumps(found))
        print(path.parent.name, answers)


def keep(folder):
    """Keep the answers as golden data, logits with six digits."""
    found = {}
    for path in sorted(folder.glob("*/answered.json")):
        answers = json.loads(path.read_text())
        answers["logits"] = [[float(f"{x:.6g}") for x in row] for row in answers["logits"]]
        found[path.parent.name] = answers
    GOLDEN.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


if __name__ == "__main__":
    {"write": write, "ask": ask, "keep": keep}[sys.argv[1]](Path(sys.argv[2]))
