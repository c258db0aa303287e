"""Draw, ask and chat: text and PIL pictures in, text and PIL pictures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor

from vargpt.choices import NullBranch
from vargpt.generate import Context, generate_text, pad_left, read_token
from vargpt.generate import draw as draw_rows
from vargpt.images import for_drawing, to_pil, to_tensor
from vargpt.interfaces import LanguageModel, TokenMaps
from vargpt.model import VARGPT, require
from vargpt.next_scale import ScaleStep
from vargpt.sampling import Guidance, Sampling, generators
from vargpt.text import TEMPLATES, Message, TextStream, Tokenizer

Part = str | Image
Content = str | Sequence[Part]


class ChatMessage(TypedDict):
    """One message: text, or text and pictures in the order they are read."""

    role: Literal["system", "user", "assistant"]
    content: Content


@dataclass(frozen=True, kw_only=True)
class DrawOutput:
    """Drawn pictures, n of the first prompt, then n of the second, ..."""

    images: list[Image]
    indices: tuple[Int[Tensor, "B _"], ...]
    """One index map per scale, for all pictures."""
    seed: int | Sequence[int]
    """Picture i of a prompt was drawn with seed + i, or with the prompt's own seed + i."""
    plans: list[str]
    """What the model wrote before each picture; empty texts where it draws at once."""


PLAN_LENGTH = 96
"""Most tokens of text before a picture."""


@dataclass(frozen=True)
class _Drawing:
    """How pictures are drawn."""

    null: NullBranch | None
    guidance: Guidance
    sampling: Sampling


@torch.no_grad()
def draw(
    model: VARGPT,
    prompts: Sequence[str],
    *,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    cfg: float = 1.5,
    cfg_ramp: Literal["linear", "constant"] = "linear",
    temperature: float = 1.0,
    top_k: int = 900,
    top_p: float = 0.96,
    null: NullBranch | None = None,
    on_scale: Callable[[ScaleStep], None] | None = None,
) -> DrawOutput:
    """Draw ``n`` pictures for each prompt.

    The same arguments give the same pictures, and, up to rounding, a picture does not depend on what is
    drawn beside it.

    Args:
        prompts: what to say to the model, as a user would.
        seed: of the first picture of each prompt, the next has one more, ...; or a seed for every prompt.
        cfg, cfg_ramp: strength of guidance towards the prompt, and how it grows over the scales.
        temperature, top_k, top_p: how tokens are drawn; temperature 0 takes the best.
        null: the unconditional branch; by default the model's own choice.
        on_scale: called after every scale; ``step.images()`` decodes the pictures so far.

    Raises:
        ValueError: no prompt or an empty one, one too long for the model, or a setting out of range.
    """
    drawing = _Drawing(
        null, Guidance(scale=cfg, ramp=cfg_ramp), Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    )
    if isinstance(prompts, str):
        raise ValueError("prompts is a list: give [prompt] for a single one")
    if not prompts or n < 1:
        raise ValueError(f"there is nothing to draw: {len(prompts)} prompts, {n} pictures each")
    firsts = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(firsts) != len(prompts):
        raise ValueError(f"{len(firsts)} seeds do not match {len(prompts)} prompts: give one for each, or one for all")
    planned, start = model.choices.plan, model.tokens.gen_start
    begin = [] if planned else [start]
    rows = [encode_messages(model, [ChatMessage(role="user", content=prompt)])[0] + begin for prompt in prompts]
    tokens = require(model.var, "visual decoder").schedule.total
    context, hidden = read_rows(model, rows, room=tokens + (PLAN_LENGTH + 1 if planned else 0))
    if n > 1:
        copies = torch.arange(len(prompts), device=model.device).repeat_interleave(n)
        context, hidden = context.select(copies), hidden[copies]
    random = generators([first + i for first in firsts for i in range(n)], model.device)
    plans = [""] * len(random)
    if planned:
        # Numbers of its own for each row's plan: how many are used up depends on the longest plan of the batch.
        own = [int(torch.randint(2**62, (), generator=g, device=model.device)) for g in random]
        written = generate_text(
            model,
            context,
            hidden,
            max_new_tokens=PLAN_LENGTH,
            stop=(start, model.tokens.eos),
            forbid=_no_text(model, but=start),
            sampling=drawing.sampling,
            generators=generators(own, model.device),
        )
        plans = [_tokenizer(model).decode(row.ids).strip() for row in written]
        read_token(context, start)
    maps = _draw(model, context, drawing, random, on_scale)
    images = to_pil(require(model.vqvae, "image tokenizer").decode_latent(maps.f_hat))
    return DrawOutput(images=images, indices=maps.indices, seed=seed, plans=plans)


@torch.no_grad()
def ask(
    model: VARGPT,
    image: Image | None,
    question: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Answer a question about a picture (or, with ``image=None``, about none).

    Args:
        on_text: called with every new piece of the answer.

    Raises:
        ValueError: an empty question, one too long for the model, or a setting out of range.
    """
    if image is not None and not isinstance(image, Image):
        raise ValueError(f"image must be a PIL picture (see vargpt.images.load_image), not {image!r}")
    if not question.strip():
        raise ValueError("the question is empty: ask something")
    _check_length(max_new_tokens)
    content: list[Part] = [question] if image is None else [image, question]
    ids, pictures, _ = encode_messages(model, [ChatMessage(role="user", content=content)])
    context, hidden = read_rows(model, [ids], room=max_new_tokens, pictures=pictures)
    stream = _Stream(model, on_text)
    generate_text(
        model,
        context,
        hidden,
        max_new_tokens=max_new_tokens,
        stop=(model.tokens.eos,),
        forbid=_no_text(model),
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        generators=generators([seed], model.device),
        on_token=stream.push,
    )
    return stream.finish()


@torch.no_grad()
def chat(
    model: VARGPT,
    messages: Sequence[ChatMessage | Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    max_pictures: int = 4,
    cfg: float = 1.5,
    null: NullBranch | None = None,
    on_text: Callable[[str], None] | None = None,
    on_scale: Callable[[ScaleStep], None] | None = None,
) -> list[ChatMessage | Mapping[str, Any]]:
    """Continue a conversation: the messages, and the model's reply after them.

    A message's content is a text, or a list of texts and PIL pictures in the order they are read. Pictures of the
    user are understood; those of the assistant were drawn. The reply's content is such a list: the model writes, and
    draws wherever it writes ``image_gen_start``.

    Args:
        max_new_tokens: tokens of text to write at most; max_pictures: pictures to draw at most.
        cfg, null: as in :func:`draw`, whose other settings keep their defaults.

    Raises:
        ValueError: roles that do not alternate, an empty message, or a conversation too long for the model.
    """
    _check_length(max_new_tokens)
    if max_pictures < 0:
        raise ValueError(f"max_pictures must be 0 or more, not {max_pictures}")
    ids, pictures, drawn = encode_messages(model, messages)
    t, drawing = model.tokens, _Drawing(null, Guidance(scale=cfg), Sampling(top_k=900, top_p=0.96))
    # A drawing takes its image tokens and the start and end tokens. None of them may overflow the context.
    per_drawing = model.var.schedule.total + 2 if model.var is not None and t.gen_start >= 0 else 0
    context, hidden = read_rows(
        model,
        [ids],
        room=max_new_tokens + max_pictures * per_drawing,
        pictures=pictures,
        drawn=drawn,
        strict=False,
    )
    left = require(model.llm, "language model").context_length - len(ids)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    random = generators([seed], model.device)
    reply: list[Part] = []
    images = 0
    while (length := min(max_new_tokens, left)) > 0:
        may_draw = per_drawing > 0 and images < max_pictures and left > per_drawing
        length = min(length, left - per_drawing) if may_draw else length
        stream = _Stream(model, on_text)
        row = generate_text(
            model,
            context,
            hidden,
            max_new_tokens=length,
            stop=(t.eos, t.gen_start) if may_draw else (t.eos,),
            forbid=_no_text(model, but=t.gen_start if may_draw else None),
            sampling=sampling,
            generators=random,
            on_token=stream.push,
        )[0]
        if text := stream.finish():
            reply.append(text)
        max_new_tokens -= len(row.ids) + 1
        left -= len(row.ids)
        if row.stop is None or row.stop != t.gen_start:
            break
        read_token(context, t.gen_start)
        maps = _draw(model, context, drawing, generators([seed + images], model.device), on_scale)
        reply += to_pil(require(model.vqvae, "image tokenizer").decode_latent(maps.f_hat))
        images += 1
        left -= per_drawing
        hidden = read_token(context, t.gen_end)
    return [*messages, ChatMessage(role="assistant", content=reply)]


class _Stream:
    """Collects a reply's text, and passes it on as it comes."""

    def __init__(self, model: VARGPT, on_text: Callable[[str], None] | None) -> None:
        self._stream = TextStream(_tokenizer(model))
        self._on_text, self._text = on_text, ""

    def push(self, row: int, token: int) -> bool:
        self._add(self._stream.push(token))
        return self._stream.stopped

    def finish(self) -> str:
        self._add(self._stream.finish())
        return self._text.strip()

    def _add(self, text: str) -> None:
        self._text += text
        if text and self._on_text is not None:
            self._on_text(text)


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


def _placeholders(model: VARGPT) -> list[int]:
    t = model.tokens
    return [i for i in (t.image, t.gen_start, t.gen_end, t.gen_pad) if i >= 0]


def _no_text(model: VARGPT, but: int | None = None) -> list[int]:
    """Special tokens that no reply is made of."""
    t = model.tokens
    return [i for i in (t.image, t.pad, t.gen_start, t.gen_end, t.gen_pad) if i >= 0 and i not in (but, t.eos)]


def _tokenizer(model: VARGPT) -> Tokenizer:
    return require(model.tokenizer, "tokenizer")


def encode_messages(
    model: VARGPT, messages: Sequence[ChatMessage | Mapping[str, Any]], *, may_be_empty: bool = False
) -> tuple[list[int], list[Image], list[Image]]:
    """A conversation as token numbers with all placeholders, its pictures to understand, and those it drew."""
    tokenizer, t = _tokenizer(model), model.tokens
    texts: list[Message] = []
    understood: list[Image] = []
    drawn: list[Image] = []
    for message in messages:
        content, role = message.get("content", ""), message.get("role")
        parts = [content] if isinstance(content, str | Image) else list(content)
        text = ""
        for part in parts:
            if isinstance(part, str):
                if named := [tokenizer.names[i] for i in _placeholders(model) if tokenizer.names.get(i, " ") in part]:
                    raise ValueError(f"a text must not contain {named[0]}: give pictures as pictures")
                text += part
            elif isinstance(part, Image):
                (drawn if role == "assistant" else understood).append(part)
                text += (
                    _drawn_text(model, tokenizer) if role == "assistant" else _name(tokenizer, t.image, "image") + "\n"
                )
            else:
                raise ValueError(f"a message holds texts and PIL pictures, not {type(part).__name__}")
        if not text.strip() and not may_be_empty:
            raise ValueError(f"a message of the {role} is empty: give it a text or a picture")
        texts.append({"role": role, "content": text})
    ids = TEMPLATES[model.choices.inference_template].encode(tokenizer, texts).ids
    patches = 1 if model.vision is None else model.vision.num_tokens
    image_tokens = 1 if model.var is None else model.var.schedule.total
    counts = {t.image: patches, t.gen_pad: image_tokens}
    return [i for i in ids for _ in range(counts.get(i, 1))], understood, drawn


def _drawn_text(model: VARGPT, tokenizer: Tokenizer) -> str:
    t = model.tokens
    return "".join(_name(tokenizer, i, "drawing") for i in (t.gen_start, t.gen_pad, t.gen_end))


def _name(tokenizer: Tokenizer, number: int, what: str) -> str:
    """The text of a special token."""
    if number not in tokenizer.names:
        raise ValueError(f"this model's tokenizer has no {what} token, which the request needs")
    return tokenizer.names[number]


def read_rows(
    model: VARGPT,
    rows: Sequence[Sequence[int]],
    *,
    room: int,
    pictures: Sequence[Image] = (),
    drawn: Sequence[Image] = (),
    strict: bool = True,
) -> tuple[Context, Tensor]:
    """Let the language model read token rows, with their pictures; returns the context and the hidden states.

    Args:
        room: tokens that are to follow. If ``strict`` they must fit; otherwise as many as fit will do.
    """
    llm: LanguageModel = require(model.llm, "language model")
    longest = max(map(len, rows))
    if longest + (room if strict else 1) > llm.context_length:
        raise ValueError(
            f"the prompt is too long: its {longest} tokens and {room} to follow "
            f"exceed the model's context of {llm.context_length}"
        )
    ids, mask = pad_left(rows, max(model.tokens.pad, 0), model.device)
    pixels = drawings = None
    if pictures:
        vision = require(model.vision, "vision encoder")
        pixels = torch.stack([vision.preprocess(picture) for picture in pictures]).to(model.device)
    if drawn:
        vqvae, var = require(model.vqvae, "image tokenizer"), require(model.var, "visual decoder")
        size = (vqvae.image_size, vqvae.image_size)
        tensors = [to_tensor(p) if p.size == size else for_drawing(p, vqvae.image_size) for p in drawn]
        images = torch.stack(tensors).to(model.device)
        condition = var.condition(torch.full((len(drawn),), var.image_class, device=model.device))
        drawings = model.drawing_inputs(vqvae.encode(images).indices, condition)
    context = Context(llm, len(rows), min(longest + room, llm.context_length), model.device)
    return context, context.extend(model.prompt_embeddings(ids, pixels, drawings), mask)


def _draw(
    model: VARGPT,
    context: Context,
    drawing: _Drawing,
    random: Sequence[torch.Generator],
    on_scale: Callable[[ScaleStep], None] | None,
) -> TokenMaps:
    null = drawing.null or model.choices.null
    empty = None
    if null == "prompt" and drawing.guidance.scale > 0:
        ids, _, _ = encode_messages(model, [ChatMessage(role="user", content="")], may_be_empty=True)
        room = require(model.var, "visual decoder").schedule.total
        empty, _ = read_rows(model, [[*ids, model.tokens.gen_start]], room=room)
        empty = empty.select(torch.zeros(len(random), dtype=torch.long, device=model.device))
    return draw_rows(
        model,
        context,
        null=null,
        empty=empty,
        generators=random,
        guidance=drawing.guidance,
        sampling=drawing.sampling,
        on_scale=on_scale,
    )
