"""Drawing at 256, 512 and 1024 px: time and memory of every part against the number of image tokens, L."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmark.attention import SCHEDULES
from experiments.benchmark.cases import DRAWING, WHOLE, Options, Table, stored
from experiments.benchmark.counting import DECODING, LLM, VAR, Sizes
from experiments.benchmark.draw import LONGEST, add_drawing
from vargpt.config import VargptConfig
from vargpt.images import check_writable


def benchmark_growth(options: Options, sides: Sequence[int], plot: Path) -> Table:
    """One drawing for every side of a picture, in a table and as a plot. The scales are changed, of a preset alone.

    Raises:
        ValueError: the plot cannot be written.
    """
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {plot} ({error.strerror})") from None
    check_writable(plot)
    table, tokens = Table("growth", options), {}
    for side in sides:
        config = resized(options.config(*DRAWING), SCHEDULES[side])
        sizes = Sizes.of(config)
        case = f"{sizes.vqvae.image_size} px, L = {sizes.schedule.total}"
        tokens[case] = sizes.schedule.total
        with stored(options, config) as folder:
            add_drawing(table, case, config, folder, 1)
    if table.rows:
        draw_plot(table, tokens, plot)
    return table


def resized(config: VargptConfig, patch_nums: tuple[int, ...]) -> VargptConfig:
    """The same model with other scales, and with positions enough for them."""
    s = Sizes.of(config)
    total = sum(side * side for side in patch_nums)
    return dataclasses.replace(
        config,
        llm=dataclasses.replace(s.llm, max_positions=max(s.llm.max_positions, total + LONGEST)),
        var=dataclasses.replace(s.var, patch_nums=patch_nums),
        vqvae=dataclasses.replace(s.vqvae, patch_nums=patch_nums),
    )


def draw_plot(table: Table, tokens: dict[str, int], file: Path) -> None:
    """Seconds (dashed: their floors) and peaks of memory against L, a line for every part."""
    import matplotlib  # of the extra "train", and slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(11, 4))
    for part in (LLM, VAR, DECODING, WHOLE):
        rows = [row for row in table.rows if row.part == part]
        lengths = [tokens[row.case] for row in rows]
        (line,) = times.plot(lengths, [row.seconds for row in rows], "o-", label=part)
        times.plot(lengths, [row.floor for row in rows], "--", color=line.get_color())
        memory.plot(lengths, [(row.peak or 0) / 1e9 for row in rows], "o-", label=part)
    times.set(title="time (dashed: floor)", xlabel="L", ylabel="seconds", xscale="log", yscale="log")
    memory.set(title="most memory held meanwhile", xlabel="L", ylabel="GB", xscale="log")
    times.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
