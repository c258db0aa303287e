"""Text: tokenizers, chat templates, and replies that are printed while they are being written.

A tokenizer is a table from ids to UTF-8 bytes, special tokens that are cut out of a text before anything else, and
one method that turns ordinary text into ids. Decoding is a ``TextStream`` that never stops, so a reply that is
streamed and one that is decoded afterwards cannot differ.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import sentencepiece

IMAGE, IMAGE_GEN = "<image>", "<image_gen>"  # where a message shows a picture, and where one is to be drawn
BYTES = range(3, 259)  # the LLaMA layout: <unk>, <s>, </s>, the 256 bytes, then everything else


class Tokenizer(ABC):
    """Text to ids and back. A subclass cuts ordinary text into ids (``_encode_text``).

    ``special_tokens`` are looked for first, the longest where several fit. One in ``lstrip`` (``rstrip``) swallows
    the whitespace before (after) it. ``prefix`` says which stretches of text between special tokens get a space of
    the tokenizer's own in front; decoding takes it away again.
    """

    def __init__(
        self,
        pieces: Mapping[int, bytes],
        special_tokens: Mapping[str, int],
        *,
        prefix: Literal["none", "first", "every"],
        vocab_size: int | None = None,
        lstrip: Collection[str] = (),
        rstrip: Collection[str] = (),
    ) -> None:
        self.special_tokens = {"<unk>": 0, "<s>": 1, "</s>": 2} | dict(special_tokens)
        self.bos_id, self.eos_id, self.prefix = self.special_tokens["<s>"], self.special_tokens["</s>"], prefix
        self.names: dict[int, str] = {}  # of the special tokens
        for name, token_id in self.special_tokens.items():
            if not name or not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"a special token needs a name and an id from 0 up, not {name!r}: {token_id}")
            if token_id in pieces or token_id in self.names:
                taken = self.names.get(token_id) or pieces[token_id].decode(errors="replace")
                raise ValueError(f"special token {name!r} has id {token_id}, which is {taken!r}: give it a free id")
            self.names[token_id] = name
        last = max(*pieces, *self.names)
        self.vocab_size = last + 1 if vocab_size is None else vocab_size
        if last >= self.vocab_size:
            raise ValueError(f"id {last} does not fit in a vocabulary of {vocab_size}: raise vocab_size")
        self.pieces = [pieces.get(i, "\N{REPLACEMENT CHARACTER}".encode()) for i in range(self.vocab_size)]
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._lstrip, self._rstrip = lstrip, rstrip

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of ``text``, after ``bos_id`` if asked for. An end token comes only where the text names it."""
        ids = [self.bos_id] if bos else []
        parts = self._special.split(text)  # text and special token in turn, text (perhaps empty) at both ends
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special_tokens[part])
                continue
            if i > 0 and parts[i - 1] in self._rstrip:
                part = part.lstrip()
            if i + 1 < len(parts) and parts[i + 1] in self._lstrip:
                part = part.rstrip()
            if part:
                ids += self._encode_text(part, first=i == 0)
        return ids

    @abstractmethod
    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        """Ids of text without special tokens; ``first``: no special token comes before it."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``. Bytes that are not UTF-8 become U+FFFD; special tokens are dropped, or named."""
        stream = TextStream(self, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``tokenizer.model`` (LLaMA, Vicuna, Mistral v1) with special tokens added to it.

    sentencepiece puts a space in front of a text. With ``legacy`` it does so for every stretch between special
    tokens, as LLaVA and VARGPT were trained ("<image>", newline is ``<image> ▁ <0x0A>``); without, only where no
    special token comes before. The model's own ``<s>``, ``</s>`` and ``<unk>`` are special tokens too, so ``</s>`` in
    a text is the end token, as in ``transformers``.
    """

    def __init__(
        self,
        model: str | Path,
        special_tokens: Mapping[str, int] | None = None,
        *,
        legacy: bool = True,
        vocab_size: int | None = None,
        lstrip: Collection[str] = (),
        rstrip: Collection[str] = (),
    ) -> None:
        try:
            proto = Path(model).read_bytes()
            sp = self._first = _processor(proto)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"no sentencepiece model in {model}: copy the original tokenizer.model there") from error
        # Protobuf merges a field that comes again into the first: normalizer_spec (3) { add_dummy_prefix (3): false }.
        self._later = sp if legacy else _processor(proto + b"\x1a\x02\x18\x00")
        self.legacy, self.directory = legacy, Path(model).parent

        ids = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
        special = {name: i for name, i in ids.items() if sp.is_control(i) or sp.is_unknown(i)}
        special |= special_tokens or {}
        for name, i in special.items():
            if ids.get(name, i) != i:
                raise ValueError(f"special token {name!r} has id {i}, but {ids[name]} in {model}: use that")
        pieces = {
            i: bytes.fromhex(name[3:5]) if sp.is_byte(i) else name.replace("▁", " ").encode()  # <0x0A>; ▁word
            for name, i in ids.items()
            if name not in special
        }
        prefixed = sp.encode("a", out_type=str)[0].startswith("▁")
        prefix = "none" if not prefixed else "every" if legacy else "first"
        super().__init__(pieces, special, prefix=prefix, vocab_size=vocab_size, lstrip=lstrip, rstrip=rstrip)

    @classmethod
    def from_directory(
        cls,
        directory: str | Path,
        special_tokens: Mapping[str, int] | None = None,
        *,
        vocab_size: int | None = None,
    ) -> SentencePieceTokenizer:
        """Reads ``tokenizer.model`` and, where they exist, the files ``transformers`` keeps beside it.

        Special tokens come from ``added_tokens.json``, ``tokenizer_config.json`` and ``tokenizer.json``. The last also
        says how spaces were put in when the model was trained, and wins over ``legacy`` of ``tokenizer_config.json``
        (true where missing): LLaVA-1.5 carries ``"legacy": false`` and was trained with the legacy ids all the same.
        ``special_tokens`` are names for ids that the files do not name; ``vocab_size`` is as for ``ByteTokenizer``.
        """
        directory = Path(directory)
        special: dict[str, int] = _read_json(directory / "added_tokens.json")
        config, fast = (_read_json(directory / name) for name in ("tokenizer_config.json", "tokenizer.json"))
        decoder = config.get("added_tokens_decoder", {})
        tokens = [{**token, "id": int(i)} for i, token in decoder.items()] + fast.get("added_tokens", [])
        for token in tokens:
            if special.setdefault(token["content"], token["id"]) != token["id"]:
                raise ValueError(f"{token['content']!r} has two ids in the files of {directory}: delete the wrong one")
        named = set(special.values())
        special |= {name: i for name, i in (special_tokens or {}).items() if i not in named}
        spaces = json.dumps([fast.get("normalizer"), fast.get("pre_tokenizer")])
        return cls(
            directory / "tokenizer.model",
            special,
            legacy='"Prepend"' in spaces or '"always"' in spaces if fast else config.get("legacy") is not False,
            vocab_size=vocab_size,
            lstrip={token["content"] for token in tokens if token.get("lstrip")},
            rstrip={token["content"] for token in tokens if token.get("rstrip")},
        )

    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        try:
            return (self._first if first else self._later).encode(text)
        except RuntimeError as error:  # half a surrogate pair
            raise ValueError(f"text cannot be written as UTF-8: {text[:80]!r}") from error


class ByteTokenizer(Tokenizer):
    """An id per UTF-8 byte, where LLaMA vocabularies keep theirs. For checkpoints that carry no ``tokenizer.model``.

    ``vocab_size``: rows of the model's embedding; where unset, the vocabulary ends with the last special token.
    """

    def __init__(self, special_tokens: Mapping[str, int] | None = None, *, vocab_size: int | None = None) -> None:
        pieces = {token_id: bytes([byte]) for byte, token_id in enumerate(BYTES)}
        super().__init__(pieces, special_tokens or {}, prefix="none", vocab_size=vocab_size)

    def _encode_text(self, text: str, *, first: bool) -> list[int]:
        return [BYTES[byte] for byte in text.encode()]


def _processor(proto: bytes) -> Any:
    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)  # the constructor takes an empty file for no file
    return processor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again or delete it") from error


class TextStream:
    """The text of a reply, id by id, up to a stop id or a stop text, neither of which is ever printed.

    What is printed adds up to ``decode`` of the ids before the stop. A character is held back until its bytes are
    complete, and the beginning of a stop text until it turns out not to be one. Of several stop texts the one that is
    complete first counts, so that the result does not depend on how the text was cut into ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Collection[int] = (),
        stop_texts: Collection[str] = (),
        *,
        skip_special: bool = True,
    ) -> None:
        if isinstance(stop_texts, str) or "" in stop_texts:
            raise ValueError(f"stop_texts must be a list of non-empty strings, not {stop_texts!r}")
        self.stopped = False
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._stop_ids, self._stop_texts = frozenset(stop_ids), tuple(stop_texts)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_prefix = tokenizer.prefix != "none"  # whether a space that comes now is the tokenizer's own
        self._held = ""  # shorter than the longest stop text

    def push(self, token_id: int) -> str:
        """What can be printed now that ``token_id`` has come; after the stop, nothing."""
        if self.stopped:
            return ""
        if token_id in self._stop_ids:
            text = self.finish()
            self.stopped = True
            return text
        return self._print(self._utf8.decode(self._bytes(token_id)), final=False)

    def finish(self) -> str:
        """What is still held back, when no more ids come."""
        return "" if self.stopped else self._print(self._utf8.decode(b"", True), final=True)

    def _bytes(self, token_id: int) -> bytes:
        tokenizer, at_prefix = self._tokenizer, self._at_prefix
        if not 0 <= token_id < tokenizer.vocab_size:
            raise ValueError(f"id {token_id} is outside the vocabulary of {tokenizer.vocab_size} tokens")
        if name := tokenizer.names.get(token_id):
            self._at_prefix = tokenizer.prefix == "every" or (at_prefix and token_id == tokenizer.bos_id)
            return b"" if self._skip_special else name.encode()
        self._at_prefix = False
        piece = tokenizer.pieces[token_id]
        return piece.removeprefix(b" ") if at_prefix else piece

    def _print(self, new: str, *, final: bool) -> str:
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop_texts if (start := text.find(stop)) >= 0]
        self.stopped = bool(found)
        begun = [n for stop in self._stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n])]
        held = 0 if final else max(begun, default=0)
        printed = min(found)[1] if found else len(text) - held
        self._held = text[printed:]
        return text[:printed]


Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A conversation as ids. ``supervised[i]``: the assistant writes id i, its end token included."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a conversation is written down: ``SYSTEM USER: question ASSISTANT: answer</s>USER: ...`` (Vicuna 1.1)."""

    system: str = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    user: str = "USER: "
    assistant: str = " ASSISTANT:"
    eos: bool = True  # whether a reply ends in </s>
    bos: bool = True  # whether a conversation starts with <s>, which is among the ids but never in the text

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as one text; after a last question, ``add_generation_prompt`` asks for the reply."""
        segments = self._segments(messages, add_generation_prompt)
        return "".join(text + ("</s>" if reply and self.eos else " ") for text, reply in segments).removesuffix(" ")

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> Encoded:
        """The conversation as ids. System, question and reply are encoded one by one, as the published training did:
        a reply that starts with a picture has no space before it, and a prompt is always a prefix of what follows."""
        ids = [tokenizer.bos_id] if self.bos else []
        supervised = [False] * len(ids)
        for text, reply in self._segments(messages, add_generation_prompt):
            new = tokenizer.encode(text) + ([tokenizer.eos_id] if reply and self.eos else [])
            ids += new
            supervised += [reply] * len(new)
        return Encoded(ids=ids, supervised=supervised)

    def _segments(self, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[tuple[str, bool]]:
        """The stretches of text that are encoded on their own, and whether each is a reply."""
        roles = [message.get("role") for message in messages]
        if not roles or roles == ["system"]:
            raise ValueError("a conversation needs at least one message of the user")
        if self.system and roles[0] != "system":
            yield self.system, False
        expected = ("system", "user")
        for i, (role, message) in enumerate(zip(roles, messages, strict=True)):
            content = message.get("content")
            if role not in expected:
                raise ValueError(f"message {i} has role {role!r} where {' or '.join(expected)} must come")
            # A user may say nothing at all: that is the empty prompt of classifier-free guidance.
            if not isinstance(content, str) or not (content.strip() or (role == "user" and not content)):
                raise ValueError(f"message {i} ({role}) must have a non-empty text, not {content!r}")
            if role == "user":
                asked = add_generation_prompt or i + 1 < len(roles)
                content = self.user + content + (self.assistant if asked else "")
            yield content, role == "assistant"
            expected = ("assistant",) if role == "user" else ("user",)


VICUNA = ChatTemplate()
PUBLISHED_TRAINING = replace(VICUNA, bos=False)
PUBLISHED_INFERENCE = VICUNA
LLAVA = replace(VICUNA, system="", eos=False)  # of the LLaVA-1.5 checkpoints converted for transformers
PLAIN = replace(VICUNA, system="")  # of the small models trained here, whose context is dear
TEMPLATES = {
    "vicuna": VICUNA,
    "plain": PLAIN,
    "published_training": PUBLISHED_TRAINING,
    "published_inference": PUBLISHED_INFERENCE,
    "llava": LLAVA,
}
