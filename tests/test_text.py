"""Tokenizers on the embedded vocabulary, chat templates, and streaming. Real vocabularies: parity/test_tokenizer.py."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import build_tokenizer
from experiments.data.shapes import NUMBERS
from vargpt.checkpoint import ASSETS
from vargpt.text import (
    LLAVA,
    PUBLISHED_INFERENCE,
    PUBLISHED_TRAINING,
    TEMPLATES,
    VICUNA,
    ByteTokenizer,
    ChatTemplate,
    SentencePieceTokenizer,
    TextStream,
    Tokenizer,
)

TINY = ASSETS / "tiny"
SPECIAL = json.loads((TINY / "added_tokens.json").read_text())
TOKENIZERS: dict[str, Tokenizer] = {
    "legacy": SentencePieceTokenizer.from_directory(TINY),
    "first": SentencePieceTokenizer(TINY / "tokenizer.model", SPECIAL, legacy=False),
    "bytes": ByteTokenizer({"<image>": 259, "<pad>": 260}),
}
# "▁" is how sentencepiece writes a space, so it does not survive; a lone surrogate has no UTF-8.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
PARTS = st.sampled_from(["<image>", "<pad>", "</s>", " ", "  ", "\n", "red circle", "é", "漢字", "🙂", "👩‍👩‍👧", "\0"])
TEXTS = st.lists(PARTS | st.text(CHARACTERS, max_size=5), max_size=8).map("".join)

every_tokenizer = pytest.mark.parametrize("tokenizer", list(TOKENIZERS.values()), ids=list(TOKENIZERS))


@every_tokenizer
@given(text=TEXTS, bos=st.booleans())
def test_what_is_encoded_decodes_to_itself(tokenizer: Tokenizer, text: str, bos: bool) -> None:
    ids = tokenizer.encode(text, bos=bos)
    assert tokenizer.decode(ids, skip_special=False).removeprefix("<s>" if bos else "") == text
    plain = text
    for name in ("<image>", "<pad>", "</s>"):
        plain = plain.replace(name, "")
    if "<" not in plain:  # else taking a token out may have made another
        assert tokenizer.decode(ids) == plain


@every_tokenizer
def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.special_tokens["<unk>"] == 0
    assert tokenizer.vocab_size == max(tokenizer.special_tokens.values()) + 1
    assert tokenizer.encode("", bos=True) == [1]
    assert tokenizer.encode("") == []
    with pytest.raises(ValueError, match=f"id {tokenizer.vocab_size} is outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="id -1 is outside"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match=r"utf-8|UTF-8"):
        tokenizer.encode("half a pair: \ud83d")
    again = pickle.loads(pickle.dumps(tokenizer))  # workers of a data loader get a copy
    assert again.encode("a red <image> circle") == tokenizer.encode("a red <image> circle")


def test_bytes_are_the_llama_byte_ids() -> None:
    tokenizer = ByteTokenizer({"<image>": 500})
    assert tokenizer.encode("aé<image>") == [3 + 0x61, 3 + 0xC3, 3 + 0xA9, 500]
    assert tokenizer.vocab_size == 501
    assert tokenizer.decode([3 + 0x61, 400]) == "a\N{REPLACEMENT CHARACTER}"  # an id that stands for nothing
    assert ByteTokenizer({"<image>": 500}, vocab_size=512).vocab_size == 512
    with pytest.raises(ValueError, match="id 500 does not fit in a vocabulary of 500"):
        ByteTokenizer({"<image>": 500}, vocab_size=500)


@every_tokenizer
@given(raw=st.binary(max_size=12))
def test_bytes_that_are_no_text(tokenizer: Tokenizer, raw: bytes) -> None:
    expected = raw.decode(errors="replace")
    if tokenizer.prefix != "none":
        expected = expected.removeprefix(" ")
    assert tokenizer.decode([3 + byte for byte in raw]) == expected


def test_longest_special_token_wins() -> None:
    names = {"<image>": 260, "<image>x": 261, "<im": 262}
    tokenizer = ByteTokenizer(names)
    assert tokenizer.encode("<image>x<image><im<image>") == [261, 260, 262, 260]


def test_space_around_special_tokens() -> None:
    model = TINY / "tokenizer.model"
    legacy = SentencePieceTokenizer(model, SPECIAL)
    first = SentencePieceTokenizer(model, SPECIAL, legacy=False)
    strips = SentencePieceTokenizer(model, SPECIAL, lstrip={"<image>"}, rstrip={"<image>"})
    image, a, circle = SPECIAL["<image>"], legacy.encode("a"), legacy.encode("circle")
    assert legacy.encode("a<image>circle") == [*a, image, *circle]
    assert first.encode("a<image> circle") == [*a, image, *circle]
    assert first.encode("a<image>circle") != [*a, image, *circle]
    assert strips.encode("a \n<image>  circle") == [*a, image, *circle]
    assert strips.encode("  <image>  <image> ") == [image, image]


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({"<image>": 300}, "special token '<image>' has id 300, which is "),
        ({"<image>": 2}, "special token '<image>' has id 2, which is '</s>'"),
        ({"<a>": 700, "<b>": 700}, "special token '<b>' has id 700, which is '<a>'"),
        ({"</s>": 700}, "special token '</s>' has id 700, but 2 in "),
        ({"▁circle": 700}, "special token '▁circle' has id 700, but "),
        ({"<image>": -1}, "needs a name and an id from 0 up, not '<image>': -1"),
        ({"": 700}, "needs a name and an id from 0 up, not ''"),
    ],
)
def test_special_tokens_that_collide(special: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer(TINY / "tokenizer.model", special)


def test_a_piece_may_be_listed_as_special() -> None:
    tokenizer = SentencePieceTokenizer(TINY / "tokenizer.model", {"<s>": 1, "<0x0A>": 13})
    assert tokenizer.encode("<0x0A>") == [13]
    assert tokenizer.decode([13]) == ""


def _directory(path: Path, **files: object) -> Path:
    shutil.copy(TINY / "tokenizer.model", path)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_directory_of_transformers(tmp_path: Path) -> None:
    config = {
        "legacy": False,
        "added_tokens_decoder": {
            "1": {"content": "<s>", "lstrip": False, "rstrip": False, "special": True},
            "640": {"content": "<image>", "lstrip": True, "rstrip": False, "special": True},
        },
    }
    path = _directory(tmp_path, added_tokens={"<image>": 640, "<pad>": 641}, tokenizer_config=config)
    tokenizer = SentencePieceTokenizer.from_directory(str(path))
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 640, "<pad>": 641}
    assert not tokenizer.legacy
    assert tokenizer.encode("  <image><pad>") == [640, 641]


def test_tokenizer_json_says_how_spaces_were_put_in(tmp_path: Path) -> None:
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    first = {"type": "Metaspace", "prepend_scheme": "first"}
    fast = {"normalizer": prepend, "pre_tokenizer": None, "added_tokens": [{"id": 640, "content": "<image>"}]}
    path = _directory(tmp_path, tokenizer_config={"legacy": False}, tokenizer=fast)
    assert SentencePieceTokenizer.from_directory(path).legacy
    assert SentencePieceTokenizer.from_directory(path).special_tokens["<image>"] == 640
    _directory(tmp_path, tokenizer_config={"legacy": True}, tokenizer={"normalizer": None, "pre_tokenizer": first})
    assert not SentencePieceTokenizer.from_directory(path).legacy


def test_directories_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sentencepiece model in .*: copy"):
        SentencePieceTokenizer.from_directory(tmp_path)
    path = _directory(tmp_path, added_tokens={"<image>": 640})
    (path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"641": {"content": "<image>"}}}')
    with pytest.raises(ValueError, match="'<image>' has two ids in the files of"):
        SentencePieceTokenizer.from_directory(path)
    (path / "tokenizer_config.json").write_text('{"legacy": tru')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        SentencePieceTokenizer.from_directory(path)
    (path / "tokenizer_config.json").unlink()
    half = (TINY / "tokenizer.model").read_bytes()[:5000]
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", half):
        (path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"no sentencepiece model in .*: copy"):
            SentencePieceTokenizer.from_directory(path)


def test_embedded_vocabulary_is_what_its_recipe_makes(tmp_path: Path) -> None:
    build_tokenizer.build(tmp_path)
    made, kept = SentencePieceTokenizer.from_directory(tmp_path), TOKENIZERS["legacy"]
    assert made.pieces == kept.pieces
    assert made.special_tokens == kept.special_tokens
    assert kept.vocab_size == 640
    words = build_tokenizer.SHAPES + build_tokenizer.COLOURS + build_tokenizer.SIZES + NUMBERS
    assert all(len(kept.encode(word)) == 1 for word in words)
    assert (TINY / "tokenizer.model").stat().st_size < 20_000


# Chat templates


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def test_vicuna_text() -> None:
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert VICUNA.render(say("Hi")) == f"{system} USER: Hi ASSISTANT:"
    assert VICUNA.render(say("Hi"), add_generation_prompt=False) == f"{system} USER: Hi"
    assert VICUNA.render(say("Hi", "Yes?")) == f"{system} USER: Hi ASSISTANT: Yes?</s>"
    text = f"{system} USER: Hi ASSISTANT: Yes?</s>USER: Draw ASSISTANT:"
    assert VICUNA.render(say("Hi", "Yes?", "Draw"), add_generation_prompt=False) == text.removesuffix(" ASSISTANT:")
    assert VICUNA.render(say("Hi", "Yes?", "Draw")) == text
    assert PUBLISHED_TRAINING.render(say("Hi", "Yes?", "Draw")) == text
    assert VICUNA.render(say("Hi", system="Be brief.")) == "Be brief. USER: Hi ASSISTANT:"
    assert LLAVA.render(say("<image>\nHi", "Yes?", "Go")) == "USER: <image>\nHi ASSISTANT: Yes? USER: Go ASSISTANT:"
    assert TEMPLATES["published_inference"] is PUBLISHED_INFERENCE


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_ids_are_those_of_the_text(template: ChatTemplate) -> None:
    tokenizer = TOKENIZERS["legacy"]
    for messages in (say("Hi"), say("<image>\nHow many?", "Two."), say("Is it red?", "No.", "Draw it.", "Here it is.")):
        encoded = template.encode(tokenizer, messages)
        assert encoded.ids == tokenizer.encode(template.render(messages), bos=template.bos)
        assert len(encoded.supervised) == len(encoded.ids)


def test_only_published_inference_starts_with_bos() -> None:
    tokenizer = TOKENIZERS["legacy"]
    trained = PUBLISHED_TRAINING.encode(tokenizer, say("Hi", "Yes?"))
    asked = PUBLISHED_INFERENCE.encode(tokenizer, say("Hi", "Yes?"))
    assert asked.ids == [tokenizer.bos_id, *trained.ids]
    assert asked.supervised == [False, *trained.supervised]


@every_tokenizer
@given(contents=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=5))
def test_replies_are_supervised_and_prompts_are_prefixes(tokenizer: Tokenizer, contents: list[str]) -> None:
    whole = VICUNA.encode(tokenizer, say(*contents))
    replies = contents[1::2]
    supervised = [i for i, kept in zip(whole.ids, whole.supervised, strict=True) if kept]
    assert supervised == [i for reply in replies for i in [*tokenizer.encode(reply), tokenizer.eos_id]]
    for n in range(1, len(contents), 2):
        prompt = VICUNA.encode(tokenizer, say(*contents[:n]))
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.supervised[len(prompt.ids)]


def test_a_reply_that_is_a_picture_starts_with_it() -> None:
    tokenizer = TOKENIZERS["legacy"]
    drawn = PUBLISHED_TRAINING.encode(tokenizer, say("Draw.", "<image_gen_start><image_gen_pad><image_gen_end>"))
    prompt = PUBLISHED_TRAINING.encode(tokenizer, say("Draw."))
    gen = [SPECIAL["<image_gen_start>"], SPECIAL["<image_gen_pad>"], SPECIAL["<image_gen_end>"], tokenizer.eos_id]
    assert drawn.ids == prompt.ids + gen


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message of the user"),
        (say(system="Be brief."), "at least one message of the user"),
        ([{"role": "assistant", "content": "Hi"}], "message 0 has role 'assistant' where system or user must come"),
        ([*say("Hi"), *say("Hi")], "message 1 has role 'user' where assistant must come"),
        ([*say("Hi"), *say("Hi", system="Late.")], "message 1 has role 'system' where assistant must come"),
        ([*say("Hi"), {"role": "system", "content": "Late."}], "message 1 has role 'system' where assistant must come"),
        ([*say("Hi", "Yes?"), {"role": "tool", "content": "3"}], "message 2 has role 'tool'"),
        ([{"content": "Hi"}], "message 0 has role None"),
        ([{"role": "user"}], r"message 0 \(user\) must have a non-empty text, not None"),
        (say("Hi", " \n"), r"message 1 \(assistant\) must have a non-empty text, not ' \\n'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"message 0 \(user\) must have a non-empty text, not \["),
    ],
)
def test_conversations_that_make_no_sense(messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VICUNA.render(messages)
    with pytest.raises(ValueError, match=message):
        VICUNA.encode(TOKENIZERS["bytes"], messages)


# Streaming


def cut(text: str, stops: list[str]) -> str:
    """``text`` up to the stop text that is complete first; the longest where two end together."""
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@every_tokenizer
@given(data=st.data(), text=TEXTS)
def test_stream_is_the_text_up_to_the_stop(tokenizer: Tokenizer, data: st.DataObject, text: str) -> None:
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    ends = st.integers(0, len(decoded))
    substring = st.tuples(ends, ends).map(lambda span: decoded[min(span) : max(span)])
    stops = data.draw(st.lists((substring | st.sampled_from([" ", "USER:", "ab"])).filter(bool), max_size=3))
    expected = cut(decoded, stops)
    stream, printed = TextStream(tokenizer, {9999}, stops), ""
    for i in ids:
        chunk = stream.push(i)
        assert "\N{REPLACEMENT CHARACTER}" not in chunk or "\N{REPLACEMENT CHARACTER}" in text
        printed += chunk
        assert expected.startswith(printed)
    assert stream.stopped == (expected != decoded)
    assert printed + stream.finish() == expected


@every_tokenizer
@given(text=TEXTS)
def test_without_stop_texts_only_half_characters_wait(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream, printed = TextStream(tokenizer), ""
    for n, i in enumerate(ids, 1):
        printed += stream.push(i)
        half = tokenizer.decode(ids[:n]).removeprefix(printed)
        assert half in ("", "\N{REPLACEMENT CHARACTER}")


def test_stop_id_ends_the_stream() -> None:
    tokenizer = TOKENIZERS["legacy"]
    stream = TextStream(tokenizer, {tokenizer.eos_id}, ["circle."])
    chunks = [stream.push(i) for i in [*tokenizer.encode("a red circle"), tokenizer.eos_id]]
    assert "".join(chunks) == "a red circle"
    assert stream.stopped
    assert "".join(stream.push(i) for i in tokenizer.encode("more")) == ""
    assert stream.finish() == ""


def test_a_stop_text_is_held_back_until_it_is_not_one() -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, (), ["USER:"])
    assert [stream.push(i) for i in tokenizer.encode("UUSE USER")] == ["", "U", "", "", "USE ", "", "", "", ""]
    assert stream.finish() == "USER"
    stream = TextStream(tokenizer, (), ["USER:"])
    assert "".join(stream.push(i) for i in tokenizer.encode("a USER: b")) == "a "
    assert stream.stopped


@pytest.mark.parametrize(("stops", "printed"), [(["abcd", "c"], "ab"), (["bc", "abc"], ""), (["cd", "bcde"], "ab")])
def test_the_stop_text_that_is_complete_first_counts(stops: list[str], printed: str) -> None:
    one_by_one, at_once = ByteTokenizer(), ByteTokenizer()
    at_once.pieces[3 + 0x61] = b"abcde"
    for tokenizer, text in ((one_by_one, "abcde"), (at_once, "a")):
        stream = TextStream(tokenizer, (), stops)
        assert "".join(stream.push(i) for i in tokenizer.encode(text)) == printed
        assert stream.stopped


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, {2})
    assert [stream.push(i) for i in [*tokenizer.encode("é")[:1], 2]] == ["", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("stops", ["USER:", ["USER:", ""]])
def test_stop_texts_that_make_no_sense(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="stop_texts must be a list of non-empty strings"):
        TextStream(TOKENIZERS["bytes"], (), stops)
