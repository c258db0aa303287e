"""Counted work, and the floor under its time.

Only work that the result needs is counted: products of visible pairs of a query and a key, logits of tokens that are
chosen or learned, no unconditional row where there is no guidance. Counted are the floating-point operations of matrix
products and convolutions (as direct ones: where an algorithm needs fewer, it may come below its floor) and the bytes
that no implementation can keep out of memory: every weight once a pass, cached keys and values once a pass. All else
(norms, activation functions, sampling, tensors between layers) might be done meanwhile in the processor's own caches.

An operation waits for its products or for its bytes, whichever takes longer, and the next one needs its result: the
floor is the sum over operations of the larger of the two. One row of tokens is limited by bytes, hundreds by products.
Small models lie in the processor's caches, where reading is faster than memory: their floors mean little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from experiments.benchmark.machine import Machine
from vargpt.config import ImportedConfig, ProjectorConfig, VargptConfig
from vargpt.llm import LlamaConfig
from vargpt.model import require
from vargpt.sampling import Guidance
from vargpt.scales import ScaleSchedule
from vargpt.var import VarConfig
from vargpt.vqvae import MultiScaleVQVAE, VqvaeConfig


@dataclass(frozen=True)
class Work:
    """One operation: its products, and what it must read and write of memory."""

    flops: float = 0
    bytes: float = 0

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.rate, self.bytes / machine.bandwidth)


def floor(works: Iterable[Work], machine: Machine) -> float:
    """Seconds that operations one after the other take at least."""
    return sum(work.seconds(machine) for work in works)


def linear(rows: int, inner: int, outer: int, size: int) -> Work:
    """``rows`` rows through a matrix whose numbers take ``size`` bytes each; nothing at all where there are none."""
    return Work(2 * rows * inner * outer, size * inner * outer) if rows else Work()


def attention(heads: int, key_heads: int, width: int, *, pairs: int, keys: int, size: int) -> Work:
    """Two products for every visible pair of a query and a key, and every key and value; ``width`` is of a head."""
    return Work(4 * heads * width * pairs, 2 * size * key_heads * width * keys)


# ---- Language model ----


def llm_pass(c: LlamaConfig, *, pasts: Sequence[int], new: int, size: int) -> list[Work]:
    """``new`` tokens of every row through all layers, each after the tokens that its cache holds (``pasts``); a token
    sees those before it and itself."""
    tokens, q, kv = len(pasts) * new, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = [(c.width, q), (c.width, kv), (c.width, kv), (q, c.width)]
    matrices += [(c.width, c.mlp_width), (c.width, c.mlp_width), (c.mlp_width, c.width)]
    pairs, keys = sum(new * past + new * (new + 1) // 2 for past in pasts), sum(past + new for past in pasts)
    seen = attention(c.num_heads, c.num_kv_heads, c.head_dim, pairs=pairs, keys=keys, size=size)
    return c.depth * [*(linear(tokens, a, b, size) for a, b in matrices), seen]


def llm_logits(c: LlamaConfig, tokens: int, size: int) -> Work:
    return linear(tokens, c.width, c.vocab_size, size)


def generation(c: LlamaConfig, *, rows: int, prompt: int, tokens: int, size: int) -> list[Work]:
    """Greedy text: the prompt, then token by token. Nothing needs the states of the last one."""
    works = [*llm_pass(c, pasts=[0] * rows, new=prompt, size=size), llm_logits(c, rows, size)]
    for past in range(prompt, prompt + tokens - 1):
        works += [*llm_pass(c, pasts=[past] * rows, new=1, size=size), llm_logits(c, rows, size)]
    return works


# ---- Visual decoder and projectors ----


def var_blocks(c: VarConfig, *, rows: int, new: int, pairs: int, keys: int, size: int) -> list[Work]:
    """``new`` image tokens a row through all blocks; ``pairs`` and ``keys`` are a row's. Adaptive norms are left out:
    see :func:`var_modulation`."""
    hidden, head = round(c.width * c.mlp_ratio), c.width // c.num_heads
    matrices = [(c.width, 3 * c.width), (c.width, c.width), (c.width, hidden), (hidden, c.width)]
    seen = attention(c.num_heads, c.num_heads, head, pairs=rows * pairs, keys=rows * keys, size=size)
    return c.depth * [*(linear(rows * new, a, b, size) for a, b in matrices), seen]


def var_head(c: VarConfig, tokens: int, size: int) -> Work:
    return linear(tokens, c.width, c.vocab_size, size)


def var_modulation(c: VarConfig, rows: int, size: int) -> list[Work]:
    """Scales, shifts and gates of all blocks and of the head, from ``rows`` conditions. Training learns them; to draw,
    they are constants of the weights."""
    blocks = 1 if c.shared_adaln else c.depth
    return [*(blocks * [linear(rows, c.width, 6 * c.width, size)]), linear(rows, c.width, 2 * c.width, size)]


def projection(c: ProjectorConfig, inner: int, outer: int, tokens: int, size: int) -> list[Work]:
    widths = [inner] + [c.hidden] * (c.depth - 1) + [outer]
    return [linear(tokens, a, b, size) for a, b in pairwise(widths)]


# ---- Image tokenizer ----


def tokenizer_work(c: VqvaeConfig, part: str, batch: int, size: int) -> list[Work]:
    """``part`` is ``encode`` (pictures to index maps) or ``decode`` (a latent to pictures).

    torch counts the operations, on a copy that has shapes only: on a CPU it would not count fused attention, which the
    meta device computes as two products. Every position of the tokenizer's attention sees all, so these are exact.
    """
    from torch.utils.flop_counter import FlopCounterMode  # 80 MB, which processes that are measured do without

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        vqvae = MultiScaleVQVAE(c)
        if part == "encode":
            vqvae.encode(torch.empty(batch, 3, c.image_size, c.image_size))
            used = (vqvae.encoder, vqvae.quant_conv, vqvae.quantizer)
        else:
            side = vqvae.schedule.latent_side
            vqvae.decode_latent(torch.empty(batch, c.latent_channels, side, side))
            used = (vqvae.post_quant_conv, vqvae.decoder)
    weights = sum(p.numel() for module in used for p in module.parameters())
    return [Work(counter.get_total_flops(), size * weights)]


def smoothing(c: VqvaeConfig, batch: int, size: int) -> list[Work]:
    """What the convolutions phi do while the latents of a drawing are summed up: one of them a scale."""
    if c.num_phi == 0:
        return []
    weights = 9 * c.latent_channels**2
    positions = batch * c.patch_nums[-1] ** 2
    return len(c.patch_nums) * [Work(2 * positions * weights, size * weights)]


# ---- A drawing, and a training step on one ----


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Configurations of the parts that draw, all there."""

    llm: LlamaConfig
    var: VarConfig
    vqvae: VqvaeConfig
    gen_in: ProjectorConfig
    gen_out: ProjectorConfig

    @classmethod
    def of(cls, config: VargptConfig) -> Sizes:
        return cls(
            llm=require(config.llm, "language model"),
            var=require(config.var, "visual decoder"),
            vqvae=require(config.vqvae, "image tokenizer"),
            gen_in=_countable(require(config.gen_in, "generation projector")),
            gen_out=_countable(require(config.gen_out, "generation projector")),
        )

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.var.patch_nums)


def _countable(projector: ProjectorConfig | ImportedConfig) -> ProjectorConfig:
    if isinstance(projector, ImportedConfig):
        raise ValueError(
            f"the work of {projector.kind} cannot be counted from its configuration: benchmark another one"
        )
    return projector


LLM, VAR, DECODING, REST = "language model", "visual decoder", "tokenizer decoding", "rest"
"""Parts of a drawing. The rest is projectors, sums of latents, sampling, and text and pictures of the outside world."""


def drawing(
    config: VargptConfig, *, batch: int, prompt: int, empty: int, guidance: Guidance, size: int
) -> dict[str, list[Work]]:
    """``batch`` pictures of one prompt of ``prompt`` tokens, read once, by part.

    Guidance doubles the visual decoder's rows, and the language model's too unless noise takes the place of what it
    would say (``choices.null``); an unconditional row is logits only where it has a weight.

    Args:
        empty: tokens of the empty prompt, which ``null="prompt"`` reads.
    """
    s, schedule, null = Sizes.of(config), Sizes.of(config).schedule, config.choices.null
    guided = guidance.scale > 0
    prompts, rows = [prompt] * batch, 2 * batch if guided else batch
    llm = llm_pass(s.llm, pasts=[0], new=prompt, size=size)
    if guided and null == "prompt":
        llm += llm_pass(s.llm, pasts=[0], new=empty, size=size)
        prompts += [empty] * batch
    elif guided and null == "class":
        prompts += [prompt] * batch
    var: list[Work] = []
    rest: list[Work] = smoothing(s.vqvae, batch, size)
    for scale, new in enumerate(schedule.lengths):
        past, end = schedule.offsets[scale], schedule.offsets[scale + 1]
        llm += llm_pass(s.llm, pasts=[length + past for length in prompts], new=new, size=size)
        var += var_blocks(s.var, rows=rows, new=new, pairs=new * end, keys=end, size=size)
        chosen = rows if guidance.weight(schedule, scale) > 0 else batch
        var.append(var_head(s.var, chosen * new, size))
        if scale > 0:
            rest.append(linear(batch * new, s.var.latent_channels, s.var.width, size))
        rest += projection(s.gen_in, s.var.width, s.llm.width, batch * new, size)
        rest += projection(s.gen_out, s.llm.width, s.var.width, rows * new, size)
    return {LLM: llm, VAR: var, DECODING: tokenizer_work(s.vqvae, "decode", batch, size), REST: rest}


FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
"""Parts of a training step."""
ADAMW_TRAFFIC = 8
"""Numbers that AdamW moves for each weight: gradient, weight and two moments read, weight and moments written; and the
gradient once before, for its norm, by which all are clipped."""


def training_step(
    config: VargptConfig, *, tokens: int, supervised: int, trained: int, size: int
) -> dict[str, list[Work]]:
    """One drawing whose index maps are known, in ``tokens`` tokens, ``supervised`` of them text to learn, by part.

    The backward pass has two products for each of the forward pass, reads the weights again and writes gradients.

    Args:
        trained: numbers that are trained and have a part in a drawing.
    """
    s, schedule = Sizes.of(config), Sizes.of(config).schedule
    total = schedule.total
    pairs = sum(queries * keys for queries, keys in schedule.visible_limits().runs)
    forward = [
        linear(total - schedule.lengths[0], s.var.latent_channels, s.var.width, size),
        *projection(s.gen_in, s.var.width, s.llm.width, total, size),
        *llm_pass(s.llm, pasts=[0], new=tokens, size=size),
        llm_logits(s.llm, supervised, size),
        *projection(s.gen_out, s.llm.width, s.var.width, total, size),
        *var_modulation(s.var, 1, size),
        *var_blocks(s.var, rows=1, new=total, pairs=pairs, keys=total, size=size),
        var_head(s.var, total, size),
    ]
    backward = [Work(2 * work.flops, 2 * work.bytes) for work in forward]
    return {FORWARD: forward, BACKWARD: backward, OPTIMIZER: [Work(0, ADAMW_TRAFFIC * size * trained)]}
