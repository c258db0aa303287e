"""Real vocabularies: agreement with sentencepiece, with `tokenizers`, and with ids that others have published.

sentencepiece itself is the oracle for ordinary text. For text around special tokens it is `tokenizers`, set up as in
LLaVA-1.5's tokenizer.json. `transformers` 5 agrees as long as no stretch of text starts with a space: there it leaves
out the space that sentencepiece puts in front (" a" becomes "▁a" instead of "▁", "▁a").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from tests import vocabularies
from vargpt.text import LLAVA, PUBLISHED_TRAINING, VICUNA, SentencePieceTokenizer, TextStream

ADDED = {"<image>": 32000, "<pad>": 32001, "<|image_gen_start|>": 32002, "<|image_gen_end|>": 32003}
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
WORDS = st.sampled_from(
    ["hello", " world", "  ", "\n", "\t", "e\u0301", "漢字", "🙂", "👩‍👩‍👧", "\0", "12.5", "====", "   x"]
)
MIXED = st.lists(WORDS | st.text(CHARACTERS, max_size=6), max_size=10).map("".join)
MARKS = ["<unk>", "<s>", "</s>", *ADDED]
PLAIN = MIXED.filter(lambda text: not any(mark in text for mark in MARKS))
MARKED = st.lists(MIXED | st.sampled_from(MARKS), max_size=6).map("".join)


def _fetched(vocabulary: Callable[[], Path]) -> Path:
    try:
        return vocabulary()
    except vocabularies.Unreachable as error:  # they come from a registry, which not every machine can reach
        pytest.skip(f"no vocabulary: {error}")


@pytest.fixture(scope="module")
def llama() -> Path:
    return _fetched(vocabularies.llama)


@pytest.fixture(scope="module")
def mistral() -> Path:
    return _fetched(vocabularies.mistral)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model, ADDED)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@given(text=PLAIN)
def test_plain_text_is_sentencepiece(tokenizer: SentencePieceTokenizer, reference: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.encode(text, bos=True) == [1, *ids]
    assert tokenizer.decode(ids) == reference.decode(ids) == text


@given(ids=st.lists(st.integers(259, 31999), max_size=12))
def test_any_pieces_decode_as_sentencepiece_does(
    tokenizer: SentencePieceTokenizer, reference: Any, ids: list[int]
) -> None:
    assert tokenizer.decode(ids) == reference.decode(ids)


@given(text=MARKED)
def test_marked_text_is_sentencepiece_between_the_marks(
    tokenizer: SentencePieceTokenizer, reference: Any, text: str
) -> None:
    expected: list[int] = []
    rest = text
    while rest:
        places = {rest.find(name): name for name in tokenizer.special_tokens if name in rest}
        start = min(places, default=len(rest))
        expected += reference.encode(rest[:start])
        name = places.get(start, "")
        expected += [tokenizer.special_tokens[name]] if name else []
        rest = rest[start + len(name) :]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected, skip_special=False) == text


@given(data=st.data(), text=MARKED)
def test_streams_of_real_vocabularies(tokenizer: SentencePieceTokenizer, data: st.DataObject, text: str) -> None:
    ids = tokenizer.encode(text)
    stop_id = data.draw(st.sampled_from([tokenizer.eos_id, ADDED["<image>"], *ids]))
    before = ids[: ids.index(stop_id)] if stop_id in ids else ids
    stop = data.draw(st.sampled_from([text[len(text) // 2 :][:4], "x", "</", "\n"]).filter(bool))
    decoded = tokenizer.decode(before)
    expected = decoded.split(stop)[0]
    stream = TextStream(tokenizer, {stop_id}, [stop])
    chunks = [stream.push(i) for i in ids]
    assert "".join(chunks) + stream.finish() == expected
    assert stream.stopped == (stop in decoded or stop_id in ids)
    # An id that stops may do so within a character; otherwise none is ever printed by halves.
    if "\N{REPLACEMENT CHARACTER}" not in decoded:
        assert not any("\N{REPLACEMENT CHARACTER}" in chunk for chunk in chunks)


# LLaMA's vocabulary, rebuilt from llama-tokenizer-js


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # llama-tokenizer-js's own tests
        ("grabbed", [2646, 1327, 287]),
        (" grabbed", [29871, 2646, 1327, 287]),
        ("           grabbed", [9651, 2646, 1327, 287]),
        ("\n", [29871, 13]),
        (" \n", [259, 13]),
        ("\ttabs\t\t\t\tout here", [29871, 12, 21175, 12, 12, 12, 12, 449, 1244]),
        ("ax\n####\nboo", [4853, 13, 4136, 13, 833, 29877]),
        ("镇", [29871, 30411]),
        ("🦙", [29871, 243, 162, 169, 156]),
        ("🦙Ꙋ", [29871, 243, 162, 169, 156, 237, 156, 141]),
    ],
)
def test_published_ids(llama: Path, text: str, ids: list[int]) -> None:
    tokenizer = SentencePieceTokenizer(llama)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_published_llava_prompts(llama: Path) -> None:
    """Ids in the tests of transformers' LlavaProcessor and in vLLM's documentation."""
    tokenizer = SentencePieceTokenizer(llama, ADDED)
    asked = [{"role": "user", "content": "<image>\nWhat is shown in this image?"}]
    start = [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618]
    end = [338, 4318, 297, 445, 1967, 29973, 319, 1799, 9047, 13566, 29901]
    assert LLAVA.encode(tokenizer, asked).ids == [*start, *end]
    text = "USER: <image>\nWhat's the content of the image?\nASSISTANT:"
    end = [29915, 29879, 278, 2793, 310, 278, 1967, 29973, 13, 22933, 9047, 13566, 29901]
    assert tokenizer.encode(text, bos=True) == [*start, *end]


def test_conversations_are_encoded_as_their_text(llama: Path) -> None:
    tokenizer = SentencePieceTokenizer(llama, ADDED)
    contents = ["<image>\nWhat's this?", "A llama, 2 m tall.", "Draw it, please: ¿sí? 🦙", "Here it is."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    for template in (VICUNA, PUBLISHED_TRAINING):
        whole = tokenizer.encode(template.render(messages), bos=template.bos)
        assert template.encode(tokenizer, messages).ids == whole


def _llava_fast_tokenizer(llama: Path, flags: dict[str, dict[str, bool]]) -> Any:
    """`tokenizers` with LLaMA's true merges, set up as LLaVA-1.5's tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(llama))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [(left, right) for left, right in json.loads(llama.with_name("merges.json").read_text(encoding="utf-8"))]
    bpe = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    fast = tokenizers.Tokenizer(bpe)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([tokenizers.AddedToken(mark, normalized=False, **flags.get(mark, {})) for mark in MARKS])
    return fast


@pytest.fixture(scope="module")
def fast(llama: Path) -> Any:
    return _llava_fast_tokenizer(llama, {})


@given(text=MARKED)
def test_legacy_is_llava(llama_tokenizer: SentencePieceTokenizer, fast: Any, text: str) -> None:
    assert llama_tokenizer.encode(text) == fast.encode(text, add_special_tokens=False).ids


@given(text=PLAIN)
def test_plain_text_decodes_as_in_tokenizers(llama_tokenizer: SentencePieceTokenizer, fast: Any, text: str) -> None:
    ids = llama_tokenizer.encode(text)
    assert llama_tokenizer.decode(ids) == fast.decode(ids)


@pytest.fixture(scope="module")
def llama_tokenizer(llama: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(llama, ADDED)


def test_whitespace_around_special_tokens_is_swallowed_as_in_tokenizers(llama: Path) -> None:
    flags = {"<image>": {"lstrip": True}, "<pad>": {"rstrip": True}, "</s>": {"lstrip": True, "rstrip": True}}
    fast = _llava_fast_tokenizer(llama, flags)
    left, right = ({n for n, flag in flags.items() if side in flag} for side in ("lstrip", "rstrip"))
    tokenizer = SentencePieceTokenizer(llama, ADDED, lstrip=left, rstrip=right)
    for name in ("<image>", "<pad>", "</s>", "<|image_gen_start|>"):
        for text in (f"a {name} b", f"a  \n{name}\n  b", f" {name} ", f"a {name} {name} b", f"{name}<pad> <image>"):
            assert tokenizer.encode(text) == fast.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("legacy", [True, False])
def test_both_kinds_of_spaces_as_in_transformers(llama: Path, legacy: bool) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = _llava_fast_tokenizer(llama, {})
    state = json.loads(oracle.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    theirs = transformers.LlamaTokenizer(vocab=state["vocab"], merges=merges, legacy=legacy)
    theirs.add_special_tokens({"additional_special_tokens": list(ADDED)})
    ours = SentencePieceTokenizer(llama, ADDED, legacy=legacy)
    for text in (
        "USER: <image>\nWhat is this? ASSISTANT:",
        "<image>hi<pad>there",
        "<s>hello</s>USER: go",
        "one\n\ntwo  three <image>",
        "漢字<image>🦙é",
    ):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.encode(" hi") != theirs.encode(" hi", add_special_tokens=False)  # theirs loses a space


# The fetching itself


def test_only_an_unreachable_registry_is_an_excuse(tmp_path: Path) -> None:
    with pytest.raises(vocabularies.Unreachable, match="no-such-client"):
        vocabularies._fetch(["no-such-client"], tmp_path, "*.whl")
    with pytest.raises(vocabularies.Unreachable, match="no output"):
        vocabularies._fetch([sys.executable, "-c", "raise SystemExit(1)"], tmp_path, "*.whl")
    with pytest.raises(ValueError, match="holds another file than expected"):
        vocabularies._checked(b"", vocabularies.MISTRAL_SHA256, vocabularies.MISTRAL_WHEEL)
