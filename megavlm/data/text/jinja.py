"""A conversation template as Hugging Face's apply_chat_template reads it, in Jinja."""

from __future__ import annotations

from collections.abc import Mapping


def jinja_template(
    rows: Mapping[str, str],
    *,
    beginning: str,
    opening: str,
    last_end: str,
    image: str,
    video: str | None,
    strip: bool,
    questions: bool,
    bos: bool,
) -> str:
    """Return a template in Jinja. ``{}`` stands for the text of a message.

    Args:
        rows: what a message becomes, by its role.
        beginning: what a conversation without a system turn begins with.
        opening: what stands before an answer that is asked for.
        last_end: what stands behind the text of the answer that a finished conversation ends with;
            empty: the same as behind others.
        image: what an image becomes.
        video: what a video becomes; empty: the tokenizer has no token for it; none: a user has to
            pass its frames as images.
        strip: whether white space around texts is taken off.
        questions: whether texts of other roles than the assistant's are shown.
        bos: whether a text begins with the tokenizer's ``bos_token``.
    """
    around = ", ".join(
        f"'{role}': [{', '.join(map(_quoted, text.partition('{}')[::2]))}]"
        for role, text in rows.items()
    )
    trim = " | trim" if strip else ""
    clip = f"{{{{ {_quoted(video or '')} }}}}"
    if not video:
        told = "pass the frames of a video as images"
        if video is not None:
            told = "the tokenizer has no token for videos"
        clip = f"{{{{ raise_exception('{told}') }}}}"
    shown = "true" if questions else "message['role'] == 'assistant'"
    default = f"{{{{ {_quoted(beginning)} }}}}" if beginning else ""
    end = "{{ around[message['role']][1] }}"
    if last_end:
        end = (
            "{%- if loop.last and message['role'] == 'assistant' and not add_generation_prompt %}{{"
            f" {_quoted(last_end)} }}}}{{% else %}}{end}{{% endif %}}"
        )
    return (
        f"{{%- set around = {{{around}}} %}}{'{{ bos_token }}' if bos else ''}{{%- if"
        f" messages[0]['role'] != 'system' %}}{default}{{% endif %}}{{%- for message in"
        " messages %}{{ around[message['role']][0] }}{%- if message['content'] is string"
        f" %}}{{% if {shown} %}}{{{{ message['content']{trim} }}}}{{% endif %}}{{% else %}}{{%-"
        " for part in message['content'] %}{%- if part['type'] == 'image' %}{{"
        f" {_quoted(image)} }}}}{{% elif part['type'] == 'text' and {shown} %}}{{{{"
        f" part['text']{trim} }}}}"
        f"{{% elif part['type'] == 'video' %}}{clip}"
        f"{{% endif %}}{{%- endfor %}}{{% endif %}}{end}"
        "{% endfor %}{%- if add_generation_prompt %}{{"
        f" {_quoted(opening)} }}}}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    """Quote a text for Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
