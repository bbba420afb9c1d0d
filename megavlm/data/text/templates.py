"""The table of conversation templates: what stands around the turns of a conversation, and how
texts become tokens.

All but ``plain``, ``blip2``, ``blip2_pairs``, ``instructblip``, ``paligemma``, ``fuyu``,
``qwen2_vl``, ``qwen3_vl``, ``clip``, ``siglip`` and those that begin with ``llava`` or ``flamingo``
are InternVL's. Those of ``llava`` are LLaVA's (Liu et al., arXiv 2304.08485 and 2310.03744), with
its image tokens: ``llava_plain`` is what LLaVA pretrains its connector with (images and answers),
``llava_v1`` its conversations, ``llava_chatml`` the same for language models that end an answer
with ``<|im_end|>``, and ``llava_mistral`` LLaVA-NeXT's for Mistral's instructions. ``blip2`` is a
caption behind its image, as BLIP-2 (arXiv 2301.12597) reads it: the image stands before the token
that begins a text. ``instructblip`` is InstructBLIP's (arXiv 2305.06500): images, an instruction
and its answer, without roles; a Q-Former reads the instruction too. ``flamingo`` is an image, a
question and its answer, several in turn, and ``flamingo_plain`` an image and its text, with the
image tokens of IDEFICS (Flamingo, arXiv 2204.14198, and arXiv 2306.16527); ``flamingo_chunks`` and
``flamingo_chunks_plain`` are the same with OpenFlamingo's token behind each image's text (arXiv
2308.01390), and learn documents from their first image on. ``blip2_pairs``, ``clip``, ``siglip``
and ``internvl_c`` are pairs of an image and its text, as those models read texts to contrast them.
``paligemma`` is PaliGemma's (Beyer et al., arXiv 2407.07726): images, one question, a line break
and its answer, without roles. ``fuyu`` is Fuyu's: the same, with a token of its own before the
answer. ``qwen2_vl`` is that of Qwen2-VL and Qwen2.5-VL (arXiv 2409.12191 and 2502.13923), which is
Qwen2.5's, with images in the line of their text; ``qwen3_vl``, Qwen3-VL's (arXiv 2511.21631), is
the same without a system message, with the times of the frames of videos.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.data.text.chat_format import ChatFormat
from megavlm.data.text.tokenizer import CHUNK_END

_INTERNVL_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL,"
    " 是一个有用无害的人工智能助手。"
)
_INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
    "清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_INTERNVL_GPT_OSS = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
    "# Valid channels: final. Channel must be included for every message."
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_PAIR = {
    "system_message": "",
    "system": "",
    "human": "",
    "opening": "",
    "answer": "{}",
    "markers": (),
    "questions": False,
    "image_tokens": "none",
}
_LLAVA = {"image_tokens": "llava", "image_first": True, "split_at_images": True}

_VICUNA_ROW = ChatFormat(
    name="vicuna",
    system_message=_VICUNA,
    system="{} ",
    human="USER: {} ",
    opening="ASSISTANT:",
    answer=" {}</s>",  # the space is part of the answer's first token
    markers=("</s>",),
)
_PLAIN_ROW = ChatFormat(
    name="plain",
    system_message="",
    system="",
    human="{}",
    opening="",
    answer="{}\n",
    markers=(),
    questions=False,
)

_QWEN2_VL_ROW = ChatFormat(
    name="qwen2_vl",
    system_message="You are a helpful assistant.",
    system="<|im_start|>system\n{}<|im_end|>\n",
    human="<|im_start|>user\n{}<|im_end|>\n",
    opening="<|im_start|>assistant\n",
    answer="{}<|im_end|>",
    closing="\n",
    markers=("<|im_start|>", "<|im_end|>"),
    joint=False,
    image_tokens="qwen2_vl",
)

_FLAMINGO_ROW = ChatFormat(
    name="flamingo",
    system_message="",
    system="{}\n",
    human="{} ",
    opening="Answer:",
    answer=" {}</s>",
    text_end="</s>",
    markers=("</s>",),
    strip=True,
    image_tokens="idefics",
)

_FLAMINGO_CHUNKS_ROW = replace(
    _FLAMINGO_ROW,
    name="flamingo_chunks",
    answer=f" {{}}{CHUNK_END}",
    chunk_end=CHUNK_END,
    learns_behind_images=True,
    image_tokens="openflamingo",
)

FORMATS: dict[str, ChatFormat] = {
    row.name: row
    for row in (
        ChatFormat(
            name="internvl2_5",
            system_message=_INTERNVL_2_5,
            system="<|im_start|>system\n{}<|im_end|>\n",
            human="<|im_start|>user\n{}<|im_end|>\n",
            opening="<|im_start|>assistant\n",
            answer="{}<|im_end|>",
            closing="\n",
            markers=("<|im_start|>", "<|im_end|>"),
            joint=False,
        ),
        ChatFormat(
            name="Hermes-2",
            system_message=_INTERNVL_2,
            system="<|im_start|>system\n{}<|im_end|>",
            human="<|im_start|>user\n{}<|im_end|>",
            opening="<|im_start|>assistant\n",
            answer="{}<|im_end|>",
            markers=("<|im_start|>", "<|im_end|>"),
        ),
        ChatFormat(
            name="internlm2-chat",
            system_message=_INTERNVL_2,
            system="<|im_start|>system\n{}<|im_end|>",
            human="<|im_start|>user\n{}<|im_end|>",
            opening="<|im_start|>assistant\n",
            answer="{}<|im_end|>",
            markers=("<|im_start|>", "<|im_end|>"),
            strip=True,
        ),
        ChatFormat(
            name="phi3-chat",
            system_message=_INTERNVL_2,
            system="<|system|>\n{}<|end|>",
            human="<|user|>\n{}<|end|>",
            opening="<|assistant|>\n",
            answer="{}<|end|>",
            markers=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ),
        ChatFormat(
            name="internvl3_5_gpt_oss",
            system_message=_INTERNVL_GPT_OSS,
            system="<|start|>system<|message|>{}<|end|>",
            human="<|start|>user<|message|>{}<|end|>",
            opening="<|start|>assistant",
            answer="<|channel|>final<|message|>{}<|end|>",
            last_end="<|return|>",
            markers=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
            joint=False,
        ),
        _VICUNA_ROW,
        _PLAIN_ROW,
        replace(_PLAIN_ROW, name="llava_plain", **_LLAVA),
        replace(_VICUNA_ROW, name="llava_v1", **_LLAVA),
        ChatFormat(
            name="llava_mistral",
            system_message="",
            system="<<SYS>>\n{}\n<</SYS>>\n\n",
            human="[INST] {} [/INST]",
            opening="",
            answer=" {} </s>",  # the first space is part of the answer's first token
            markers=("</s>",),
            **_LLAVA,
        ),
        replace(
            _PLAIN_ROW,
            name="blip2",
            image_tokens="llava",
            split_at_images=True,
            images_before_text=True,
        ),
        ChatFormat(
            name="llava_chatml",
            system_message="You are a helpful assistant.",
            system="<|im_start|>system\n{}<|im_end|>\n",
            human="<|im_start|>user\n{}<|im_end|>\n",
            opening="<|im_start|>assistant\n",
            answer="{}<|im_end|>",
            closing="\n",
            markers=("<|im_start|>", "<|im_end|>"),
            **_LLAVA,
        ),
        ChatFormat(
            name="paligemma",
            system_message="",
            system="",
            human="{}\n",
            opening="",
            answer="{}<eos>",
            markers=("<eos>",),
            joint=False,
            strip=True,
            image_tokens="paligemma",
            images_before_text=True,
            gathers_images=True,
            is_single=True,
        ),
        ChatFormat(
            name="instructblip",
            system_message="",
            system="",
            human="{}",
            opening="",
            answer="{}</s>",
            markers=("</s>",),
            joint=False,
            strip=True,
            image_tokens="llava",
            split_at_images=True,
            images_before_text=True,
            gathers_images=True,
            is_single=True,
            instruction_length=128,
        ),
        _FLAMINGO_ROW,
        replace(_FLAMINGO_ROW, name="flamingo_plain", human="{}", opening="", questions=False),
        _FLAMINGO_CHUNKS_ROW,
        replace(
            _FLAMINGO_CHUNKS_ROW,
            name="flamingo_chunks_plain",
            human="{}",
            opening="",
            answer=f"{{}}{CHUNK_END}",
            questions=False,
        ),
        ChatFormat(
            name="fuyu",
            system_message="",
            system="",
            human="{}\n",
            opening="<0x04>",
            answer=" {}|ENDOFTEXT|",  # the space is part of the answer's first token
            markers=("<s>", "<0x04>", "|ENDOFTEXT|"),
            strip=True,
            image_tokens="fuyu",
            split_at_images=True,
            images_before_text=True,
            gathers_images=True,
            first_token="<s>",
            is_single=True,
        ),
        _QWEN2_VL_ROW,
        replace(_QWEN2_VL_ROW, name="qwen3_vl", system_message="", times_frames=True),
        ChatFormat(name="clip", pair_length=77, **_PAIR),
        ChatFormat(name="blip2_pairs", pair_length=32, **_PAIR),
        ChatFormat(name="siglip", pair_length=64, fills_pair=True, **_PAIR),
        ChatFormat(
            name="internvl_c", pair_length=80, pair_prompt="summarize:", ends_pair=True, **_PAIR
        ),
    )
}


def chat_format(name: str) -> ChatFormat:
    """Return the row ``name`` of the table.

    Raises:
        ValueError: there is no such row; the message lists the names.
    """
    if name not in FORMATS:
        raise ValueError(f"--template {name}: no such template; known are {', '.join(FORMATS)}")
    return FORMATS[name]
