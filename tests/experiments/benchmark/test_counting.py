"""Counted work is what a hand counts at small shapes, and what torch counts where nothing is hidden."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmark.counting import (
    ADAMW_TRAFFIC,
    BACKWARD,
    DECODING,
    FORWARD,
    LLM,
    OPTIMIZER,
    REST,
    VAR,
    Work,
    drawing,
    floor,
    generation,
    linear,
    llm_logits,
    llm_pass,
    smoothing,
    tokenizer_work,
    training_step,
    var_blocks,
    var_head,
    var_modulation,
)
from experiments.benchmark.machine import Machine
from tests.models import numbers, whole_config
from vargpt.choices import FIXED, NullBranch
from vargpt.config import VargptConfig
from vargpt.kernels import using
from vargpt.llm import LlamaConfig, LlamaDecoder
from vargpt.sampling import Guidance
from vargpt.var import NextScaleTransformer, VarConfig
from vargpt.vqvae import VqvaeConfig

SMALL_LLM = LlamaConfig(vocab_size=10, width=8, depth=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16)
SMALL_VAR = VarConfig(patch_nums=(1, 2), vocab_size=6, latent_channels=4, width=8, depth=3, num_heads=2)


def total(works: list[Work]) -> Work:
    return Work(sum(work.flops for work in works), sum(work.bytes for work in works))


def test_an_operation_waits_for_the_slower_of_its_two_limits() -> None:
    machine = Machine(rate=10, bandwidth=2)
    works = [Work(flops=20, bytes=2), Work(flops=20, bytes=10), Work()]
    assert [work.seconds(machine) for work in works] == [2, 5, 0]
    assert floor(works, machine) == 7


def test_a_matrix_is_read_once_and_not_at_all_for_no_rows() -> None:
    assert linear(3, 4, 5, 2) == Work(2 * 3 * 4 * 5, 2 * 4 * 5)
    assert linear(0, 4, 5, 2) == Work()


def test_the_language_model_by_hand() -> None:
    matrices = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k, v, out; gate, up, down
    pairs = (3 * 5 + 1 + 2 + 3) + (1 + 2 + 3)  # three new tokens after five, and after none
    counted = total(llm_pass(SMALL_LLM, pasts=[5, 0], new=3, size=4))
    assert counted.flops == 2 * (2 * 6 * matrices + 4 * 2 * 4 * pairs)
    assert counted.bytes == 2 * (4 * matrices + 2 * 4 * 4 * (8 + 3))  # weights; keys and values of one head
    assert llm_logits(SMALL_LLM, 3, 4) == Work(2 * 3 * 8 * 10, 4 * 8 * 10)


def test_text_reads_all_weights_for_every_token_but_the_last() -> None:
    counted = total(generation(SMALL_LLM, rows=2, prompt=5, tokens=3, size=2))
    prompt = total(llm_pass(SMALL_LLM, pasts=[0, 0], new=5, size=2))
    steps = [total(llm_pass(SMALL_LLM, pasts=[past] * 2, new=1, size=2)) for past in (5, 6)]
    logits = llm_logits(SMALL_LLM, 2, 2)
    assert counted == total([prompt, *steps, logits, logits, logits])


def test_the_visual_decoder_by_hand() -> None:
    matrices = 8 * 24 + 8 * 8 + 2 * 8 * 32  # qkv, proj; fc1, fc2
    counted = total(var_blocks(SMALL_VAR, rows=2, new=4, pairs=4 * 5, keys=5, size=4))
    assert counted.flops == 3 * (2 * 8 * matrices + 4 * 8 * 2 * 20)
    assert counted.bytes == 3 * (4 * matrices + 2 * 4 * 8 * 2 * 5)


@torch.no_grad()
def test_torch_counts_the_same_of_the_language_model_but_for_hidden_pairs() -> None:
    llm = LlamaDecoder(SMALL_LLM)
    with using("matmul"), FlopCounterMode(display=False) as counter:
        llm.logits(llm(numbers(2, 5, 8))[:, -1])
    hidden = 2 * 2 * (5 * 5 - 15)  # layers, rows
    counted = total([*llm_pass(SMALL_LLM, pasts=[0, 0], new=5, size=4), llm_logits(SMALL_LLM, 2, 4)])
    assert counter.get_total_flops() == counted.flops + 4 * 2 * 4 * hidden


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_torch_counts_the_same_of_the_visual_decoder_but_for_hidden_pairs(shared: bool) -> None:
    config = dataclasses.replace(SMALL_VAR, shared_adaln=shared)
    var = NextScaleTransformer(config).eval()
    with using("matmul"), FlopCounterMode(display=False) as counter:
        var(numbers(2, 5, 8), numbers(2, 8))
    seen = 1 + 4 * 5
    works = var_blocks(config, rows=2, new=5, pairs=seen, keys=5, size=4)
    counted = total([*works, var_head(config, 10, 4), *var_modulation(config, 2, 4)])
    assert counter.get_total_flops() == counted.flops + 3 * 4 * 8 * 2 * (25 - seen)


def test_the_image_tokenizer_by_hand() -> None:
    config = VqvaeConfig(
        patch_nums=(1, 2),
        vocab_size=7,
        latent_channels=2,
        channels=4,
        channel_multipliers=(1,),
        res_blocks=1,
        local=True,
        num_phi=1,
        quant_kernel=1,
    )
    decoder = 2 * 2 + 9 * 2 * 4 + 8 * 9 * 4 * 4 + 9 * 4 * 3  # post_quant_conv, conv_in, four residual blocks, conv_out
    (decode,) = tokenizer_work(config, "decode", 3, 4)
    assert decode.flops == 2 * 3 * 4 * decoder
    biases = 2 + 4 + 8 * 4 + 3
    norms = 9 * 2 * 4
    assert decode.bytes == 4 * (decoder + biases + norms)
    encoder = 3 * 4 + 6 * 4 * 4 + 4 * 2 + 2 * 2  # conv_in, three residual blocks, conv_out, quant_conv
    phi, nearest = 2 * 4 * 9 * 2 * 2, (1 + 4) * 7 * 2
    (encode,) = tokenizer_work(config, "encode", 1, 4)
    assert encode.flops == 2 * (4 * encoder + phi + nearest)
    assert total(smoothing(config, 1, 4)) == Work(2 * phi, 2 * 4 * 9 * 2 * 2)
    assert smoothing(dataclasses.replace(config, num_phi=0), 1, 4) == []


def works_of(config: VargptConfig, guidance: Guidance, batch: int = 1) -> dict[str, Work]:
    counted = drawing(config, batch=batch, prompt=7, empty=3, guidance=guidance, size=4)
    assert list(counted) == [LLM, VAR, DECODING, REST]
    return {part: total(works) for part, works in counted.items()}


def with_null(null: NullBranch) -> VargptConfig:
    return whole_config((1, 2), choices=dataclasses.replace(FIXED, null=null))


def test_guidance_doubles_the_visual_decoder_but_for_logits_without_a_weight() -> None:
    config = with_null("noise")
    assert config.var is not None
    off, ramp = works_of(config, Guidance(scale=0)), works_of(config, Guidance(scale=1.5))
    constant = works_of(config, Guidance(scale=1.5, ramp="constant"))
    first = var_head(config.var, 1, 4).flops
    assert ramp[VAR].flops == 2 * off[VAR].flops - first
    assert constant[VAR].flops == 2 * off[VAR].flops
    assert ramp[LLM] == off[LLM]  # noise is said by nobody
    assert ramp[DECODING] == off[DECODING]
    assert ramp[REST].flops > off[REST].flops


def test_what_the_language_model_reads_without_the_prompt_is_counted() -> None:
    llm = with_null("noise").llm
    assert llm is not None
    noise, same, empty = (works_of(with_null(null), Guidance())[LLM].flops for null in ("noise", "class", "prompt"))

    def images(past: int) -> float:
        first, second = (total(llm_pass(llm, pasts=[past + p], new=n, size=4)).flops for p, n in ((0, 1), (1, 4)))
        return first + second

    prompt = total(llm_pass(llm, pasts=[0], new=7, size=4)).flops
    assert noise == prompt + images(7)
    assert same == prompt + 2 * images(7)
    assert empty == prompt + total(llm_pass(llm, pasts=[0], new=3, size=4)).flops + images(7) + images(3)


def test_pictures_of_one_prompt_share_its_reading() -> None:
    one, four = (works_of(with_null("noise"), Guidance(), batch) for batch in (1, 4))
    llm = with_null("noise").llm
    assert llm is not None
    assert four[LLM].flops == 4 * one[LLM].flops - 3 * total(llm_pass(llm, pasts=[0], new=7, size=4)).flops
    for part in (VAR, DECODING, REST):
        assert four[part].flops == 4 * one[part].flops
        assert four[part].bytes < 4 * one[part].bytes


def test_a_training_step_goes_back_with_twice_the_products_and_learns_in_eight_numbers_a_weight() -> None:
    config = whole_config((1, 2))
    counted = training_step(config, tokens=9, supervised=4, trained=100, size=4)
    forward, backward = total(counted[FORWARD]), total(counted[BACKWARD])
    assert backward == Work(2 * forward.flops, 2 * forward.bytes)
    assert counted[OPTIMIZER] == [Work(0, 100 * 4 * ADAMW_TRAFFIC)]
    fewer = training_step(config, tokens=9, supervised=3, trained=100, size=4)
    assert config.llm is not None
    assert forward.flops - total(fewer[FORWARD]).flops == llm_logits(config.llm, 1, 4).flops
