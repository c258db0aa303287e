"""The command line: vargpt draw | ask | chat | convert | verify | info.

Commands import what they need when they run, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from vargpt.model import VARGPT
    from vargpt.next_scale import ScaleStep

MISTAKE = 2
"""Exit code of bad input and of interrupts; a failed comparison exits with 1."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer is not lost on a terminal that lacks a character
    try:
        options = _parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _note
            return options.run(options)
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-written was left behind")
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MISTAKE
    except OSError as error:
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}")


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return MISTAKE


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print("note:", message, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vargpt", description="One model that understands pictures and draws them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def model_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", default="tiny", metavar="M", help="embedded name, directory or hub id (tiny)")
        sub.add_argument("--revision", help="branch, tag or commit of a hub id")
        sub.add_argument("--device", default="cpu", help="cpu, cuda, mps (cpu)")
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        sub.add_argument("--choices", choices=("published", "fixed"), help="the published code's or corrected ones")
        sub.add_argument("--patch-nums", help="scales of a published checkpoint that does not tell: 1,2,3,4")
        sub.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same result (0)")

    def draw_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--cfg", type=float, default=1.5, help="guidance: how strongly to follow the prompt (1.5)")
        sub.add_argument("--null", choices=("noise", "class", "prompt"), help="unconditional branch (the model's own)")

    draw = command("draw", _draw, "Draw a picture.")
    draw.add_argument("prompt")
    draw.add_argument("-o", "--output", default="out.png", metavar="FILE", help="picture to write (out.png)")
    model_options(draw)
    draw.add_argument("--n", type=int, default=1, help="pictures; with more than one, FILE-1, FILE-2, ... (1)")
    draw_options(draw)
    draw.add_argument("--cfg-ramp", choices=("linear", "constant"), default="linear", help="guidance over the scales")
    draw.add_argument("--temperature", type=float, default=1.0, help="0 takes the best token (1)")
    draw.add_argument("--top-k", type=int, default=900, help="choose among the k best tokens; 0: all (900)")
    draw.add_argument("--top-p", type=float, default=0.96, help="of those, the best that add up to p (0.96)")
    draw.add_argument("--steps-dir", metavar="DIR", help="also write the picture so far after every scale")

    ask = command("ask", _ask, "Answer a question about a picture.")
    ask.add_argument("image")
    ask.add_argument("question")
    model_options(ask)
    ask.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (64)")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (0)")
    ask.add_argument("--top-k", type=int, default=0, help="choose among the k best tokens; 0: all (0)")
    ask.add_argument("--top-p", type=float, default=1.0, help="of those, the best that add up to p (1)")

    chat = command("chat", _chat, "Talk, with pictures both ways: /image FILE adds one, an empty line ends.")
    model_options(chat)
    draw_options(chat)
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest reply (256)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (0)")
    chat.add_argument("--output-dir", default=".", metavar="DIR", help="where drawn pictures go (.)")

    convert = command("convert", _convert, "Convert a published checkpoint to our layout, or back.")
    convert.add_argument("source", help="VARGPT, LLaVA-1.5, LLaMA, CLIP (directories as on the hub) or VAR (.pth pair)")
    convert.add_argument("destination")
    convert.add_argument("--patch-nums", help="scales, where the checkpoint does not tell: 1,2,3,4")

    verify = command("verify", _verify, "Compare a published checkpoint with a recording of the published code.")
    verify.add_argument("checkpoint")
    verify.add_argument("--golden", required=True, metavar="FILE", help="the recording, a safetensors file")
    verify.add_argument("--patch-nums", help="scales, where the checkpoint does not tell: 1,2,3,4")

    info = command("info", _info, "Show a model's parts, parameters and bytes.")
    info.add_argument("model", nargs="?", default="tiny", help="embedded name, directory, hub id or preset (tiny)")
    info.add_argument("--patch-nums", help="scales of a published checkpoint that does not tell: 1,2,3,4")
    return parser


def _scales(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(side) for side in text.split(","))
    except ValueError:
        raise ValueError(f"--patch-nums must be numbers with commas, such as 1,2,3,4, not {text!r}") from None


def _load(options: argparse.Namespace) -> VARGPT:
    import torch

    from vargpt.checkpoint import load
    from vargpt.inference import for_inference
    from vargpt.text import ByteTokenizer

    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    # an unknown name, a build without this backend, and a device that holds no values ("meta")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {options.device!r} cannot be used here ({str(error).splitlines()[0]})") from None
    model = load(
        options.model,
        device,
        getattr(torch, options.dtype),
        patch_nums=_scales(options.patch_nums),
        choices=options.choices,
        revision=options.revision,
    )
    if isinstance(model.tokenizer, ByteTokenizer):
        print("note: the model has no tokenizer.model, so text is read and written as bytes", file=sys.stderr)
    return for_inference(model)


def _draw(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from vargpt.api import draw
    from vargpt.images import check_writable, save_image, to_pil
    from vargpt.sampling import Guidance, Sampling

    if not options.prompt.strip():
        raise ValueError("the prompt is empty: say what to draw")
    if options.n < 1:
        raise ValueError(f"--n must be at least 1, not {options.n}")
    # Settings are checked before a model is loaded, which may take minutes.
    Guidance(scale=options.cfg)
    Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    output = Path(options.output)
    names = [output] if options.n == 1 else [output.with_stem(f"{output.stem}-{i + 1}") for i in range(options.n)]
    for name in names:
        check_writable(name)
    steps = None if options.steps_dir is None else Path(options.steps_dir)
    if options.steps_dir == "":
        raise ValueError("--steps-dir is empty: name a directory")
    if steps is not None:
        try:
            steps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write into {steps} ({error.strerror})") from None
    model = _load(options)
    knows = model.config.knows
    if knows is not None and (unknown := knows.unknown(options.prompt)):
        print(f"note: the model has never read {', '.join(map(repr, unknown))}: {knows.summary}", file=sys.stderr)
    with tqdm(desc="drawing", unit="scale", leave=False, file=sys.stderr) as bar:

        def on_scale(step: ScaleStep) -> None:
            bar.total = step.schedule_length
            bar.update()
            if steps is not None:
                for name, image in zip(names, to_pil(step.images()), strict=True):
                    save_image(image, steps / f"{name.stem}-scale-{step.scale + 1:02d}.png")

        drawn = draw(
            model,
            [options.prompt],
            n=options.n,
            seed=options.seed,
            cfg=options.cfg,
            cfg_ramp=options.cfg_ramp,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            null=options.null,
            on_scale=on_scale,
        )
    for name, image in zip(names, drawn.images, strict=True):
        save_image(image, name)
        print(name)
    return 0


def _ask(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from vargpt.api import ask
    from vargpt.images import load_image
    from vargpt.sampling import Sampling

    image = load_image(options.image)
    if not options.question.strip():
        raise ValueError("the question is empty: ask something")
    Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    model = _load(options)
    with tqdm(desc="answering", unit="piece", leave=False, file=sys.stderr) as bar:

        def on_text(_: str) -> None:
            bar.update()

        answer = ask(
            model,
            image,
            options.question,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            on_text=on_text,
        )
    print(answer)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from vargpt.api import chat
    from vargpt.images import check_writable, load_image, save_image

    folder = Path(options.output_dir)
    check_writable(folder / "vargpt-1.png")
    model = _load(options)
    messages: list[Any] = []
    pictures: list[Any] = []
    drawn = 0
    print("Say something; /image FILE adds a picture; an empty line ends.", file=sys.stderr)
    while line := _input():
        if line.startswith("/image "):
            try:
                pictures.append(load_image(line.removeprefix("/image ").strip()))
            except ValueError as error:  # a conversation survives a mistyped name
                _fail(str(error))
            continue
        try:
            messages = chat(
                model,
                [*messages, {"role": "user", "content": [*pictures, line]}],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
                cfg=options.cfg,
                null=options.null,
                on_text=lambda text: print(text, end="", flush=True),
            )
        except ValueError as error:  # so does it survive what the model cannot read
            _fail(str(error))
            continue
        pictures = []
        print()
        for part in messages[-1]["content"]:
            if not isinstance(part, str):
                drawn += 1
                save_image(part, folder / f"vargpt-{drawn}.png")
                print(folder / f"vargpt-{drawn}.png")
    return 0


def _input() -> str:
    if sys.stdin is None or not sys.stdin.isatty():
        return "" if sys.stdin is None else sys.stdin.readline().strip()
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _convert(options: argparse.Namespace) -> int:
    from vargpt.checkpoint import find
    from vargpt.convert import convert

    convert(find(options.source), Path(options.destination), patch_nums=_scales(options.patch_nums))
    print(options.destination)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from vargpt.checkpoint import find
    from vargpt.verify import verify

    rows = verify(find(options.checkpoint), Path(options.golden), _scales(options.patch_nums))
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}}  {row.error:9.2e}  {row.tolerance:9.2e}  {'ok' if row.ok else 'FAILED'}")
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} within tolerance")
    return 1 if failed else 0


def _info(options: argparse.Namespace) -> int:
    from vargpt.checkpoint import inventory

    parts = inventory(options.model, _scales(options.patch_nums))
    print(f"{'part':<10} {'parameters':>15} {'bytes':>15}  what")
    for part in parts:
        print(f"{part.name:<10} {part.parameters:>15,} {part.bytes:>15,}  {part.what}")
    print(f"{'all':<10} {sum(p.parameters for p in parts):>15,} {sum(p.bytes for p in parts):>15,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
