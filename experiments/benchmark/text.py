"""Greedy text, and the same from the transformers library, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from experiments.benchmark.cases import WHOLE, Clock, Options, Spent, Table, stored
from experiments.benchmark.counting import Work, generation
from experiments.benchmark.memory import text_memory
from vargpt.api import read_rows
from vargpt.checkpoint import load
from vargpt.generate import generate_text
from vargpt.llm import LlamaConfig
from vargpt.model import require

BATCHES = (1, 8)
PROMPT, TOKENS = 32, 64
"""Tokens read, and tokens written."""
PEER = "transformers"


def benchmark_text(options: Options) -> Table:
    """64 tokens after a prompt of 32, for one row and for eight; and by the peer, with a model of the same shape."""
    table, config = Table("text", options), options.config("llm")
    llm, o = require(config.llm, "language model"), options
    peer = find_spec(PEER) is not None
    with stored(options, config) as folder:
        for rows in BATCHES:
            needed = text_memory(config, rows=rows, tokens=PROMPT + TOKENS, size=o.size)
            works = generation(llm, rows=rows, prompt=PROMPT, tokens=TOKENS, size=o.size)
            case, other = f"batch {rows}", f"batch {rows}, {PEER}"
            theirs = table.run(other, needed, measure_peer, llm, o.dtype, rows, o.repeats) if peer else None
            if (ours := table.run(case, needed, measure, folder, o.dtype, rows, o.repeats)) is not None:
                faster = {} if theirs is None else {f"times {PEER}": theirs[0].seconds[WHOLE] / ours[0].seconds[WHOLE]}
                _add(table, case, ours, works, rows, **faster)
            if theirs is not None:
                _add(table, other, theirs, works, rows)
            if not peer:
                table.missing[other] = f"{PEER} is not installed: pip install -e '.[parity]'"
    return table


def _add(table: Table, case: str, found: tuple[Any, Any], works: list[Work], rows: int, **more: float) -> None:
    spent, machine = found
    seconds = spent.seconds[WHOLE]
    reading = sum(work.bytes for work in works) / machine.bandwidth
    table.add(
        case,
        spent,
        machine,
        {WHOLE: works},
        **{"tokens/s": rows * TOKENS / seconds, "of bandwidth": reading / seconds},
        **more,
    )


def prompts(vocab_size: int, rows: int) -> torch.Tensor:
    """Rows of any tokens: what they say does not matter."""
    return torch.randint(3, vocab_size // 2, (rows, PROMPT), generator=torch.Generator().manual_seed(0))


def measure(folder: Path, dtype: torch.dtype, rows: int, repeats: int) -> Spent:
    """In a process of its own: this project's reading and writing, with nothing that ends a row early."""
    model, clock = load(folder, dtype=dtype), Clock()
    assert model.config is not None
    ids = prompts(model.config.llm.vocab_size, rows).tolist()

    def generate() -> None:
        with torch.no_grad():
            context, hidden = read_rows(model, ids, room=TOKENS)
            written = generate_text(model, context, hidden, max_new_tokens=TOKENS, stop=())
        assert all(len(row.ids) == TOKENS for row in written)

    clock.run(generate, repeats)
    return clock.spent()


def measure_peer(c: LlamaConfig, dtype: torch.dtype, rows: int, repeats: int) -> Spent:
    """In a process of its own: transformers' greedy ``generate``, random weights of the same shape."""
    import transformers  # of the extra "parity": the peer that is measured, in its own process, and nothing else

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(dtype).eval()
    clock, ids = Clock(), prompts(c.vocab_size, rows)

    def generate() -> None:
        with torch.no_grad():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
        assert written.shape == (rows, PROMPT + TOKENS)

    clock.run(generate, repeats)
    return clock.spent()
