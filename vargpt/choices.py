"""Token numbers, and the choices on which the published code and a corrected one differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ABSENT = -1
"""Number of a special token that a model does not have."""

NullBranch = Literal["noise", "class", "prompt"]


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Special tokens of the language model's vocabulary. The defaults are the released model's."""

    bos: int = 1
    eos: int = 2
    image: int = 32000
    """Stands for one patch feature of a picture to understand."""
    pad: int = 32001
    gen_start: int = 32002
    gen_end: int = 32003
    gen_pad: int = 32004
    """Stands for one image token of a picture to draw."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Where the published code is odd, both ways. :data:`PUBLISHED` gives the released results exactly,
    :data:`FIXED` what the training meant; every field can also be set alone."""

    null: NullBranch
    """What the unconditional row of guidance reads. ``noise``: Gaussian noise in place of the language model's
    states, fresh at every scale. ``class``: the states of the same prompt, started from the "no condition" class.
    ``prompt``: the states of an empty prompt. The row's class is "no condition" in all three."""
    condition_class: Literal["image", "null"]
    """Class of the conditional row when drawing. Training uses "image"; the published sampler "no condition"."""
    projector_norm: bool
    """Whether the generation projectors apply their layer norm, which the published code holds but skips."""
    supervise_drawing_prompts: bool
    """Whether batches with drawings take the text loss on every token, prompts included, whatever the labels say."""
    scatter_in_mixed_batches: bool
    """Whether drawings are fed to the language model in batches that also hold pictures to understand; the
    published code leaves the placeholder's own embedding there."""
    training_template: str
    """Chat template of training (``vargpt.text.TEMPLATES``)."""
    inference_template: str
    """Chat template of inference; the published one adds the BOS token that training never showed."""
    plan: bool = False
    """Whether a request to draw is first answered in words (a plan, say), which the drawing then follows. Without, as
    in both presets, a drawing starts right after the request."""

    def __post_init__(self) -> None:
        if self.null not in ("noise", "class", "prompt"):
            raise ValueError(f"null must be 'noise', 'class' or 'prompt', not {self.null!r}")
        if self.condition_class not in ("image", "null"):
            raise ValueError(f"condition_class must be 'image' or 'null', not {self.condition_class!r}")


PUBLISHED = Choices(
    null="noise",
    condition_class="null",
    projector_norm=False,
    supervise_drawing_prompts=True,
    scatter_in_mixed_batches=False,
    training_template="published_training",
    inference_template="published_inference",
)
FIXED = Choices(
    null="prompt",
    condition_class="image",
    projector_norm=True,
    supervise_drawing_prompts=False,
    scatter_in_mixed_batches=True,
    training_template="vicuna",
    inference_template="vicuna",
)
CHOICES = {"published": PUBLISHED, "fixed": FIXED}
