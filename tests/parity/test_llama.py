"""LlamaDecoder against transformers' LLaMA and Qwen2: random weights, saved by it and opened by ``vargpt.load``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vargpt
from tests.models import close, seeds, splits
from vargpt import generate
from vargpt.llm import LlamaDecoder
from vargpt.model import VARGPT

transformers = pytest.importorskip("transformers")

VOCABULARY, POSITIONS = 23, 16
# Saving and loading takes time, and shrinking would repeat it hundreds of times.
quick = settings(max_examples=10, phases=[Phase.explicit, Phase.generate])


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "llama3"]))
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0]))}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([1.0, 2.0, 4.0]))
    if kind == "llama3":
        rope |= {
            "original_max_position_embeddings": draw(st.sampled_from([4, 8])),
            "low_freq_factor": draw(st.sampled_from([0.5, 1.0])),
            "high_freq_factor": draw(st.sampled_from([2.0, 4.0])),
        }
    return rope


@st.composite
def llamas(draw: st.DrawFn) -> dict[str, Any]:
    groups, share = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    return {
        "model_type": "llama",
        "hidden_size": groups * share * draw(st.sampled_from([1, 2, 4])),  # it insists on a multiple
        "num_attention_heads": groups * share,
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([4, 6, 8])),
        "intermediate_size": draw(st.integers(3, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": draw(ropes()),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }


@st.composite
def qwens(draw: st.DrawFn) -> dict[str, Any]:
    sizes = draw(llamas()) | {"model_type": "qwen2"}
    del sizes["attention_bias"], sizes["mlp_bias"], sizes["head_dim"]
    return sizes | {"hidden_size": sizes["num_attention_heads"] * draw(st.sampled_from([4, 6]))}


def random(sizes: dict[str, Any], seed: int = 0) -> Any:
    """Their model, with weights of a size at which every path matters."""
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "attn_implementation": "eager"}
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config, model = kinds[sizes["model_type"]]
    fields = {name: value for name, value in sizes.items() if name != "model_type"}
    torch.manual_seed(seed)
    theirs: nn.Module = model(config(**common, **fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else noise / parameter.shape[1] ** 0.5)
    return theirs


class Opened:
    """The same weights, theirs and ours."""

    def __init__(self, sizes: dict[str, Any], seed: int, directory: Path, **saving: Any) -> None:
        self.theirs = random(sizes, seed)
        self.theirs.save_pretrained(directory, **saving)
        self.model: VARGPT = vargpt.load(directory)
        shutil.rmtree(directory)
        assert isinstance(self.model.llm, LlamaDecoder)
        self.llm = self.model.llm

    @torch.no_grad()
    def expected(self, ids: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Their final hidden states and logits, computed afresh: dynamic scaling remembers longer rows."""
        rotary = self.theirs.model.rotary_emb
        rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq.clone(), rotary.original_max_seq_len
        out = self.theirs(ids, output_hidden_states=True, use_cache=False, **inputs)
        return out.hidden_states[-1], out.logits

    def longest(self) -> int:
        """Tokens that both take: past the trained ones where scaling allows it."""
        rope = self.theirs.config.rope_parameters
        stretch = min(rope["factor"], 2.0) if rope["rope_type"] in ("linear", "dynamic") else 1.0
        return int(POSITIONS * stretch)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "theirs"


anything = st.one_of(llamas(), qwens())


@quick
@given(sizes=anything, seed=seeds, data=st.data())
@torch.no_grad()
def test_hidden_states_and_logits(sizes: dict[str, Any], seed: int, data: st.DataObject, tmp_path_factory: Any) -> None:
    both = Opened(sizes, seed, tmp_path_factory.mktemp("theirs"))
    length = data.draw(st.integers(1, both.longest()), label="length")
    x = ids(2, length, seed=seed)
    hidden, logits = both.expected(x)
    ours = both.llm(both.llm.embed(x))
    close(ours, hidden)
    close(both.llm.logits(ours), logits)


@quick
@given(sizes=anything, seed=seeds, data=st.data())
@torch.no_grad()
def test_padding(sizes: dict[str, Any], seed: int, data: st.DataObject, tmp_path_factory: Any) -> None:
    both = Opened(sizes, seed, tmp_path_factory.mktemp("theirs"))
    length = data.draw(st.integers(2, both.longest()), label="length")
    pads = data.draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=3), label="padding")
    left = data.draw(st.booleans(), label="left")
    x = ids(len(pads), length, seed=seed)
    real = torch.stack([torch.arange(length) >= n if left else torch.arange(length) < length - n for n in pads])
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    hidden, logits = both.expected(x, attention_mask=real.long(), position_ids=positions)
    ours = both.llm(both.llm.embed(x), attention_mask=real)
    close(ours[real], hidden[real])
    close(both.llm.logits(ours)[real], logits[real])


@quick
@given(sizes=anything, seed=seeds, data=st.data())
@torch.no_grad()
def test_incremental_decoding(sizes: dict[str, Any], seed: int, data: st.DataObject, tmp_path_factory: Any) -> None:
    both = Opened(sizes, seed, tmp_path_factory.mktemp("theirs"))
    dynamic = sizes["rope_parameters"]["rope_type"] == "dynamic"  # whose base would grow from step to step
    length = data.draw(st.integers(1, POSITIONS if dynamic else both.longest()), label="length")
    x = ids(2, length, seed=seed)
    hidden, _ = both.expected(x)
    cache = both.llm.new_cache(2, length)
    pieces = x.split(data.draw(splits(length), label="pieces"), dim=1)
    close(torch.cat([both.llm(both.llm.embed(piece), cache=cache) for piece in pieces], dim=1), hidden)


@settings(quick, max_examples=6)
@given(sizes=anything, seed=seeds)
@torch.no_grad()
def test_greedy_generation(sizes: dict[str, Any], seed: int, tmp_path_factory: Any) -> None:
    """Past the trained length too: with dynamic scaling, keys keep the base of the step that made them."""
    both = Opened(sizes, seed, tmp_path_factory.mktemp("theirs"))
    new = both.longest() - 7
    x = ids(1, 5, seed=seed)
    greedy = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    both.theirs.generation_config.eos_token_id = None
    expected = both.theirs.generate(x, generation_config=greedy, attention_mask=torch.ones_like(x))[0, 5:]
    context = generate.Context(both.llm, 1, 5 + new, torch.device("cpu"))
    hidden = context.extend_tokens(x)
    (row,) = generate.generate_text(both.model, context, hidden, max_new_tokens=new, stop=())
    assert row.ids == expected.tolist()


PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
}


@pytest.mark.parametrize("length", [3, POSITIONS, POSITIONS + 1, 2 * POSITIONS])
@torch.no_grad()
def test_dynamic_scaling_below_and_beyond_the_trained_length(length: int, directory: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    both = Opened(PLAIN | {"rope_parameters": rope}, 0, directory)
    x = ids(1, length)
    close(both.llm(both.llm.embed(x)), both.expected(x)[0])


def test_dynamic_scaling_counts_real_tokens(directory: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    both = Opened(PLAIN | {"rope_parameters": rope}, 0, directory)
    x, pad = ids(1, POSITIONS), torch.zeros(1, 8, dtype=torch.long)
    mask = torch.arange(POSITIONS + 8)[None] >= 8
    with torch.no_grad():
        padded = both.llm(both.llm.embed(torch.cat((pad, x), dim=1)), attention_mask=mask)[:, 8:]
    close(padded, both.expected(x)[0])


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_a_scaled_context_is_as_long_as_the_scaling_makes_it(kind: str, directory: Path) -> None:
    both = Opened(PLAIN | {"rope_parameters": {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}}, 0, directory)
    assert both.llm.context_length == 4 * POSITIONS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_are_computed_with_in_float32(dtype: torch.dtype, directory: Path) -> None:
    random(PLAIN).to(dtype).save_pretrained(directory)
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert str(dtype).endswith(json.loads((directory / "config.json").read_text())["dtype"])
    llm = vargpt.load(directory).llm
    assert llm is not None
    x = ids(2, 9)
    ours = llm.logits(llm(llm.embed(x)))
    assert ours.dtype == torch.float32
    close(ours, theirs(x).logits)


def test_shards(tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    random(PLAIN).save_pretrained(directory, max_shard_size="5KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    theirs, ours = random(PLAIN).state_dict(), vargpt.load(directory).state_dict()
    assert torch.equal(ours["llm.blocks.1.mlp.down.weight"], theirs["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize("rope", [{"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 3}, None])
@torch.no_grad()
def test_a_config_of_an_older_release(rope: dict[str, Any] | None, directory: Path) -> None:
    """Vicuna's and LLaVA's: ``rope_scaling`` with ``type``, ``rope_theta`` outside, ``torch_dtype``."""
    new = None if rope is None else {"rope_type": rope["type"], "factor": rope["factor"]}
    theirs = random(PLAIN | {"rope_parameters": (new or {"rope_type": "default"}) | {"rope_theta": 1000.0}})
    theirs.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_scaling": rope, "rope_theta": 1000.0, "torch_dtype": "float16", "transformers_version": "4.31.0"}
    (directory / "config.json").write_text(json.dumps(config))
    llm = vargpt.load(directory).llm
    assert llm is not None
    x = ids(1, POSITIONS + 2 if rope else POSITIONS)
    close(llm(llm.embed(x)), theirs(x, output_hidden_states=True).hidden_states[-1])
