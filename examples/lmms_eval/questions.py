"""Questions of a task file as lmms-eval asks them, see exam.yaml; their images lie beside the
file, in whose folder lmms-eval runs.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

_IMAGE = "<image>"

Doc = dict[str, Any]


def images(doc: Doc) -> list[Image.Image]:
    """Return the images of a question, in the order of their placeholders."""
    paths = [doc["image"]] if isinstance(doc["image"], str) else doc["image"] or []
    return [Image.open(path).convert("RGB") for path in paths]


def text(doc: Doc, **_: Any) -> str:
    """Return the question without placeholders, for models that take no messages."""
    return doc["question"].replace(f"{_IMAGE}\n", "").replace(_IMAGE, "")


def messages(doc: Doc, **_: Any) -> list[Doc]:
    """Return the conversation up to the answer: system message, then images and text in order."""
    pictures = images(doc)
    asked = doc["question"]
    if len(pictures) == 1 and _IMAGE not in asked:
        asked = f"{_IMAGE}\n{asked}"
    first, *others = asked.split(_IMAGE)
    parts = [{"type": "text", "text": first}] if first else []
    for picture, words in zip(pictures, others, strict=True):
        parts.append({"type": "image", "url": picture})
        # The chat template of the export writes the line break behind an image.
        if words := words.removeprefix("\n"):
            parts.append({"type": "text", "text": words})
    system = {"role": "system", "content": [{"type": "text", "text": doc.get("system") or ""}]}
    return [*([system] if doc.get("system") else []), {"role": "user", "content": parts}]


def results(doc: Doc, answers: list[str]) -> dict[str, float]:
    """Return whether the answer is the right one, as the metric exact_match does."""
    return {"exact_match": float(answers[0].strip().lower() == doc["answer"].strip().lower())}
