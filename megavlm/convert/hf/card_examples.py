"""What a model card says of the use of a folder, for each format."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.convert.weights.tables import Dialect


@dataclass(frozen=True, kw_only=True)
class Example:
    """How a folder is used.

    Args:
        text: in Markdown, with ``ANSWER_END`` for what ends an answer in its template.
        task: what the hub files it under; empty: nothing.
    """

    text: str
    task: str = "image-text-to-text"


ANSWER_END = "ANSWER_END"
_CHATTING = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or the repository's name
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
content = [{"type": "image", "url": "picture.jpg"}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""
_OF_VIDEOS = """

`AutoProcessor` needs torchvision, which it has for videos."""
# A list of images works without a program that decodes videos.
_WATCHING = """

A video stands in the place of the image as `{"type": "video", "video": frames}`, with its chosen
frames as a list of images. The tokenizer must have a token for videos: `video_token_index` in
config.json is not -1."""
_WATCHING_FILES = """

A video stands in the place of the image as `{"type": "video", "path": "clip.mp4"}`, of which
PyAV or torchcodec decodes two frames a second. Chosen frames stand there as a list of images,
`{"type": "video", "video": frames}`, with `processor_kwargs={"do_sample_frames": False}` beside
`tokenize`."""
_ORIGINAL = """The folder is in the format of OpenGVLab's `InternVLChatModel`. `auto_map` in
config.json names the repository with its Python files; `transformers` fetches them if it is told to
trust remote code."""
_ASKING = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or the repository's name
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
image = Image.open("picture.jpg").convert("RGB")
inputs = processor(images=image, text="{prompt}", return_tensors="pt").to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""
_READING = """```python
from PIL import Image
from transformers import AutoProcessor, IdeficsForVisionText2Text

folder = "."  # this folder, or the repository's name
processor = AutoProcessor.from_pretrained(folder)
model = IdeficsForVisionText2Text.from_pretrained(folder, dtype="auto")
image = Image.open("picture.jpg").convert("RGB")
shot = [image, "What is it? Answer: a catANSWER_END"]  # an example: none, or several
prompt = [*shot, image, "What is it? Answer:"]  # images and texts in turn
inputs = processor(text=[prompt], return_tensors="pt").to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""
_READING_PATCHES = """```python
from PIL import Image
from transformers import AutoProcessor, FuyuForCausalLM

folder = "."  # this folder, or the repository's name
processor = AutoProcessor.from_pretrained(folder)  # needs torchvision (transformers 5.23)
model = FuyuForCausalLM.from_pretrained(folder, dtype="auto")
image = Image.open("picture.jpg").convert("RGB")
made = {"return_tensors": "pt", "return_legacy_image_output": False}
inputs = processor(images=image, text="What is it?\\n", **made).to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer).partition("|ENDOFTEXT|")[0])
```"""
_COMPARING = """```python
from PIL import Image
from transformers import {kind}, AutoProcessor

folder = "."  # this folder, or the repository's name
processor = AutoProcessor.from_pretrained(folder)
model = {kind}.from_pretrained(folder, dtype="auto")
image = Image.open("picture.jpg").convert("RGB")
texts = ["a picture of a cat", "a picture of a dog"]
inputs = processor(images={image}, text=texts, padding={padding}, return_tensors="pt")
inputs = inputs.to(model.dtype)
print(model(**inputs{answer})
```"""


_IN_PARTS = """The model is in parts. `vision/` is the InternViT, with OpenGVLab's names, and
`language/` the language model without its head. `model.safetensors` has the rest, with the names of
OpenGVLab's `InternVL_C`: the attention pool `clip_projector`, `text_projection` and `logit_scale`.
No class of `transformers` holds the whole. A text is embedded so:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/language")
model = AutoModel.from_pretrained(f"{folder}/language", dtype="auto")
ids = tokenizer("summarize:a picture of a cat")["input_ids"]
if ids[-1] != tokenizer.eos_token_id:
    ids.append(tokenizer.eos_token_id)
last = model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
embedding = last @ load_file(f"{folder}/model.safetensors")["text_projection"]
print(torch.nn.functional.normalize(embedding.float(), dim=-1))
```"""


def _comparing(
    kind: str, padding: str, answer: str, *, image: str = "image", task: str = ""
) -> Example:
    text = _COMPARING.format(kind=kind, padding=padding, answer=answer, image=image)
    return Example(text=text, task=task)


EXAMPLES: dict[Dialect, Example] = {
    "native": Example(text=_CHATTING + _OF_VIDEOS),
    "chat": Example(text=_ORIGINAL),
    "llava": Example(text=_CHATTING),
    "llava_next": Example(text=_CHATTING),
    "llava_onevision": Example(text=_CHATTING + _OF_VIDEOS + _WATCHING),
    "paligemma": Example(text=_ASKING.format(prompt="<image>What is it?")),
    "fuyu": Example(text=_READING_PATCHES),
    "qwen2_vl": Example(text=_CHATTING + _OF_VIDEOS + _WATCHING_FILES),
    "qwen2_5_vl": Example(text=_CHATTING + _OF_VIDEOS + _WATCHING_FILES),
    "qwen3_vl": Example(text=_CHATTING + _OF_VIDEOS + _WATCHING_FILES),
    "qwen3_vl_moe": Example(text=_CHATTING + _OF_VIDEOS + _WATCHING_FILES),
    "clip": _comparing(
        "CLIPModel",
        "True",
        ").logits_per_image.softmax(dim=1)",
        task="zero-shot-image-classification",
    ),
    "siglip": _comparing(
        "SiglipModel",
        '"max_length"',
        ").logits_per_image.sigmoid()",
        task="zero-shot-image-classification",
    ),
    "internvl_c": Example(text=_IN_PARTS, task="zero-shot-image-classification"),
    "blip2": Example(text=_ASKING.format(prompt="Question: What is it? Answer:")),
    # One image for each text; the second of two values is for a text that fits.
    "blip2_retrieval": _comparing(
        "Blip2ForImageTextRetrieval",
        "True",
        ", use_image_text_matching_head=True).logits_per_image.softmax(dim=1)[:, 1]",
        image="[image, image]",
    ),
    "instructblip": Example(text=_ASKING.format(prompt="What is it?")),
    "idefics": Example(text=_READING),
}
