"""Loading and saving models."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from vargpt.build import build, preset
from vargpt.choices import CHOICES, Choices
from vargpt.config import PRESETS, VargptConfig
from vargpt.config_json import describe, to_json
from vargpt.convert import open_published, published_layout
from vargpt.convert.check import check_tensors, expected_tensors, naming
from vargpt.convert.published import copy_tokenizer
from vargpt.files import write_json
from vargpt.model import VARGPT
from vargpt.tensorfiles import MemorySource, TensorSource, TensorSpec, write_safetensors
from vargpt.text import BYTES, ByteTokenizer, SentencePieceTokenizer, Tokenizer

ASSETS = Path(__file__).parent / "assets"


def embedded_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def load(
    source: str | Path = "tiny",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    patch_nums: tuple[int, ...] | None = None,
    choices: Choices | str | None = None,
    revision: str | None = None,
) -> VARGPT:
    """Load a model, ready for inference.

    Args:
        source: the name of an embedded model; a directory, ours or a published one, which is converted on the fly;
            or a hub id such as ``VARGPT-family/VARGPT_LLaVA-v1``, the only case that reads the network.
        patch_nums: the scales, only where a published checkpoint's tensors do not tell.
        choices: ``"published"``, ``"fixed"`` or single ones; by default what the checkpoint says.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: no such model, or a checkpoint that is incomplete, damaged or contradicts its configuration.
    """
    directory = find(source, revision)
    config, tensors = read(directory, patch_nums)
    if choices is not None:
        config = dataclasses.replace(config, choices=choices_named(choices))
        with naming(directory):
            check_tensors(config, tensors)
    tokenizer = read_tokenizer(directory, config)
    with torch.device("meta"):
        model = build(config, tokenizer=tokenizer)
    state = {name: tensors.read(name).to(device, dtype) for name in model.state_dict()}
    if any(name not in state for name, _ in model.named_buffers()):
        model = build(config, tokenizer=tokenizer)  # some networks of timm keep buffers that no checkpoint holds
    model.load_state_dict(state, assign=True)
    return model.to(device, dtype).eval()


def read(directory: Path, patch_nums: tuple[int, ...] | None = None) -> tuple[VargptConfig, TensorSource]:
    """Configuration and tensors of a directory, checked against each other."""
    layout = published_layout(directory)
    if layout == "var":
        raise ValueError(f"{directory} offers pickled weights: run `vargpt convert {directory} DST` and load DST")
    if layout == "ours" and patch_nums is not None:
        raise ValueError(f"{directory} is in our layout, whose config.json tells the scales: leave patch_nums out")
    published = open_published(directory, patch_nums)
    return published.config, published.source


def find(source: str | Path, revision: str | None = None) -> Path:
    """The directory of a model's files.

    Raises:
        ValueError: no such model.
    """
    if str(source) in embedded_models():
        return ASSETS / str(source)
    if not str(source):
        raise ValueError("the model's name is empty: give one, a directory or a hub id")
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not Path(source).exists():
        return _fetch(source, revision)
    names = embedded_models()
    near = difflib.get_close_matches(str(source), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown model {str(source)!r}: {hint}give {' or '.join(map(repr, names))}, a checkpoint's directory, "
        "or a hub id (owner/name)"
    )


def _fetch(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub  # slow to import, and only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=["*.safetensors", "*.json", "tokenizer.model"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{hub_id!r} is neither a directory here nor to be had from the hub ({reason})") from None
    return Path(folder)


def choices_named(choices: Choices | str) -> Choices:
    """A set of choices, by name or as it is."""
    if isinstance(choices, Choices):
        return choices
    if choices not in CHOICES:
        raise ValueError(f"unknown choices {choices!r}: give {' or '.join(map(repr, CHOICES))}, or a Choices")
    return CHOICES[choices]


def read_tokenizer(directory: Path, config: VargptConfig) -> Tokenizer | None:
    """The text tokenizer beside the weights; bytes where there is none; None where neither will do."""
    if config.llm is None:
        return None
    t, vocab_size = config.tokens, config.llm.vocab_size
    special = {
        "<image>": t.image,
        "<pad>": t.pad,
        "<image_gen_start>": t.gen_start,
        "<image_gen_end>": t.gen_end,
        "<image_gen_pad>": t.gen_pad,
    }
    # Absent ones are negative; a padding token may be one of the vocabulary's first, such as </s>.
    special = {name: number for name, number in special.items() if number not in range(-1, BYTES.stop)}
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer.from_directory(directory, special, vocab_size=vocab_size)
    if (directory / "tokenizer.json").is_file() or vocab_size < BYTES.stop:
        return None  # a vocabulary of a kind that is not read here, or one without room for bytes
    return ByteTokenizer(special, vocab_size=vocab_size)


def save(model: VARGPT, directory: str | Path, *, tokenizer_from: str | Path | None = None) -> None:
    """Write a model in our layout.

    Args:
        tokenizer_from: a directory whose tokenizer files go with it; by default that of the model's own tokenizer.

    Raises:
        ValueError: a model whose parts no configuration describes, or a directory that cannot be written.
    """
    directory = Path(directory)
    state = model.state_dict()
    if model.config is None or expected_tensors(model.config).keys() != state.keys():
        raise ValueError("only a model whose config describes all its parts can be saved")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {directory} ({error.strerror})") from None
    write_safetensors(directory, MemorySource(state))
    if tokenizer_from is None and isinstance(model.tokenizer, SentencePieceTokenizer):
        tokenizer_from = model.tokenizer.directory
    if tokenizer_from is not None and Path(tokenizer_from).resolve() != directory.resolve():
        copy_tokenizer(Path(tokenizer_from), directory)
    write_json(directory / "config.json", describe(model.config))


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """One part of a model, for people to read."""

    name: str
    parameters: int
    bytes: int
    """On disk; for a preset, in float32."""
    what: str


def inventory(source: str | Path, patch_nums: tuple[int, ...] | None = None) -> list[PartSize]:
    """The parts of a model and their sizes, from names and shapes alone: nothing is read but headers.

    Args:
        source: as in :func:`load`, or the name of a preset.
    """
    if source in PRESETS and source not in embedded_models():
        config, tensors = preset(str(source)), None
    else:
        config, tensors = read(find(source), patch_nums)
    with torch.device("meta"):
        parameters = dict(build(config).named_parameters())
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in parameters.items():
        spec = TensorSpec.of(parameter) if tensors is None else tensors.specs[name]
        count, size = parts.get(name.split(".")[0], (0, 0))
        parts[name.split(".")[0]] = (count + spec.numel, size + spec.bytes)
    return [
        PartSize(name=name, parameters=count, bytes=size, what=_what(getattr(config, name)))
        for name, (count, size) in parts.items()
    ]


def _what(part: object) -> str:
    shown = ("kind", "width", "depth", "num_heads", "hidden", "image_size", "vocab_size", "patch_nums", "channels")
    values = to_json(part)
    return ", ".join(f"{field} {values[field]}" for field in shown if field in values)
