"""What a row of the table of conversation templates says; ``templates`` has the rows."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.data.text.jinja import jinja_template
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, ImageTokens


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A row of the table. ``{}`` stands for a turn's text.

    Args:
        name: as ``--template`` takes it.
        system_message: what a conversation without a system turn begins with.
        system: a system turn.
        human: a human turn.
        opening: what stands before an answer, and is not learned.
        answer: an answer with its end, learned.
        last_end: what ends the answer that a conversation ends with, learned, in the place of what
            ends an answer; empty: that.
        closing: what stands behind an answer, and is not learned.
        markers: special tokens that the tokenizer must have.
        joint: whether a conversation becomes tokens as one text; otherwise each turn does by
            itself.
        strip: whether white space around the turns' texts is taken off.
        questions: whether the texts of system and human turns are shown; otherwise only their
            images are.
        image_tokens: special tokens of images, a row of ``IMAGE_TOKEN_SETS``.
        pair_length: for pairs of an image and its text, which becomes tokens alone: most tokens of
            the text, with those that the tokenizer adds; 0: conversations.
        fills_pair: whether a shorter text is filled up to that length.
        pair_prompt: what stands in front of the text of a pair.
        ends_pair: whether the text of a pair ends with the tokenizer's ``eos_token`` even if the
            tokenizer does not put it there.
        image_first: whether the one image of a human turn goes to its front, on a line of its own,
            wherever its placeholder stands.
        images_before_text: whether the images that a conversation begins with stand before the
            tokens that the tokenizer puts in front of a text.
        gathers_images: whether all images of a turn stand in front of its text, wherever their
            placeholders are; the tokenizer must have a token that begins a text.
        first_token: token that begins a text, whatever the tokenizer puts there; empty: that.
        is_single: whether a sample has one question and one answer, and no system turn.
        text_end: what ends a ``pretrain`` text, learned.
        chunk_end: token behind each image's text in a ``pretrain`` text, learned; empty: none.
        learns_behind_images: whether of a ``pretrain`` text with images only what stands behind the
            first one is learned.
        split_at_images: whether the texts before, between and after images become tokens each by
            itself; a sentencepiece tokenizer begins each with a space.
        times_frames: whether the frames of a video stand in the text pair by pair, each behind its
            time, if they are read in pairs; otherwise a video is one image there.
        instruction_length: most tokens of a question, which a Q-Former reads too, in tokens of its
            own: the beginning of a longer one is cut off; 0: no Q-Former reads it.
    """

    name: str
    system_message: str
    system: str
    human: str
    opening: str
    answer: str
    last_end: str = ""
    closing: str = ""
    markers: tuple[str, ...]
    joint: bool = True
    strip: bool = False
    questions: bool = True
    image_tokens: str = "internvl"
    pair_length: int = 0
    fills_pair: bool = False
    pair_prompt: str = ""
    ends_pair: bool = False
    image_first: bool = False
    gathers_images: bool = False
    first_token: str = ""
    is_single: bool = False
    text_end: str = ""
    chunk_end: str = ""
    learns_behind_images: bool = False
    split_at_images: bool = False
    images_before_text: bool = False
    times_frames: bool = False
    instruction_length: int = 0

    @property
    def images(self) -> ImageTokens:
        """The tokens that an image becomes."""
        return IMAGE_TOKEN_SETS[self.image_tokens]

    @property
    def is_of_pairs(self) -> bool:
        """Whether a sample is one image and its text."""
        return self.pair_length > 0

    @property
    def end(self) -> str:
        """What ends an answer behind which a conversation goes on."""
        return self.answer.partition("{}")[2]

    @property
    def final_end(self) -> str:
        """What ends the answer that a conversation ends with, and a model's own."""
        return self.last_end or self.end

    @property
    def start(self) -> str:
        """What an answer begins with in front of its text; learned."""
        return self.answer.partition("{}")[0]

    def hf_template(
        self, *, system_message: str | None = None, bos: bool = False, video: str | None = None
    ) -> str:
        """Return the template with which Hugging Face's apply_chat_template gives the same text.

        An image becomes one context token, which the processor expands: on a line of its own unless
        the template shows no questions, or in the line of its text with the tokens around it, see
        ``ImageTokens.is_inline``.

        Args:
            system_message: replaces the format's own; empty: a conversation without a system turn
                begins without one.
            bos: whether a text begins with the tokenizer's ``bos_token``.
            video: token of a video, which stands as an image does, or alone if the processor puts
                times and tokens around each pair of frames; empty or none as in
                ``jinja_template``.
        """
        images = self.images
        line_end = "\n" if self.questions else ""
        before = images.start if images.is_inline else ""
        after = images.end if images.is_inline else line_end
        message = self.system_message if system_message is None else system_message
        return jinja_template(
            {
                "system": self.system,
                "user": self.human,
                "assistant": self.opening + self.answer + self.closing,
            },
            beginning=self.system.replace("{}", message) if message else "",
            opening=self.opening,
            last_end=self.last_end and self.last_end + self.closing,
            # A template without questions shows images alone, one behind the other.
            image=before + images.context + after,
            video=video if self.times_frames else video and before + video + after,
            strip=self.strip,
            questions=self.questions,
            bos=bos,
        )
