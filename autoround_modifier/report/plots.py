"""
The figures of the page, drawn by matplotlib: AutoScheme's plot needs it already, and its SVG needs
no script and prints well.

Each is drawn 390 pixels wide in 12-pixel text, so that text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from autoround_modifier.readable import bits_text, bytes_text, duration_text, figures_text
from autoround_modifier.report.layer_table import (
    ExpertTokens,
    Grid,
    scheme_grid,
    schemes_by_bits,
)
from autoround_modifier.report.schema import (
    AutoSchemeRecord,
    BlockRecord,
    LayerRecord,
    PhaseRecord,
    SizeRecord,
)
from autoround_modifier.report.svg import COLOURS, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Drawn", "Plots"]

WIDTH = 390
TEXT = 12
STEPS = 6

INK, MUTED, LINE, PAGE = (COLOURS[name] for name in ("ink", "muted", "line", "page"))
FIRST, SECOND = COLOURS["first"], COLOURS["second"]
SHADES = [COLOURS[f"step{i}"] for i in range(STEPS)]

STYLE: dict[Any, Any] = {
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Drawn:
    """
    :param svg: element, safe to put into a page
    """

    svg: str
    caption: str


class Plots:
    """Draws figures; each gets a name that no other figure of the page has."""

    def __init__(self) -> None:
        self.drawn: list[Drawn] = []

    def losses(self, blocks: Sequence[BlockRecord]) -> Drawn:
        """Loss of each block before and after tuning."""
        before = [math.nan if x.initial_loss is None else x.initial_loss for x in blocks]
        after = [math.nan if x.best_loss is None else x.best_loss for x in blocks]
        depth = list(range(len(blocks)))

        def draw(axes: Axes) -> None:
            axes.plot(depth, before, "s--", color=MUTED, label="before tuning")
            axes.plot(depth, after, "o-", color=FIRST, label="after tuning")
            _scale(axes, "y", [*before, *after])
            axes.grid(axis="y")
            _whole_numbers(axes)
            axes.set_xlabel("block")
            axes.set_ylabel("loss per token")

        lower = sum(b < a for a, b in zip(before, after, strict=True))
        title = f"Loss by block before and after tuning: lower after in {lower} of {len(blocks)}"
        return self._draw(draw, 250, title, legend=2)

    def size(self, size: SizeRecord, unquantized: float) -> Drawn:
        """Bytes of the original and of the checkpoint."""
        saved, original = size.saved_bytes, size.original_bytes
        quantized = saved - unquantized

        def draw(axes: Axes) -> None:
            axes.barh([1], [original], height=0.6, color=MUTED)
            axes.barh([0], [quantized], height=0.6, color=FIRST, label="quantized weights")
            axes.barh(
                [0], [unquantized], left=[quantized], height=0.6, color=SECOND, label="all else"
            )
            for row, value in ((1, original), (0, saved)):
                _beside(axes, value, row, bytes_text(value))
            axes.set_yticks([0, 1], ["saved", "original"])
            _bars_only(axes, max(original, saved) * 1.28)

        title = (
            f"Size: {bytes_text(original)} before, {bytes_text(saved)} after, of which "
            f"{bytes_text(quantized)} are quantized weights"
        )
        return self._draw(draw, 130, title, legend=2)

    def bits_by_kind(
        self, kinds: Mapping[str, tuple[float, float]], unquantized: float | None
    ) -> Drawn:
        """
        Bytes of each kind of layer, with bits per weight beside them.

        :param kinds: kind -> bytes, and bits for each weight
        :param unquantized: bytes of all else, or None
        """
        labels = list(kinds)
        values = [size for size, _ in kinds.values()]
        notes = [f"{bytes_text(size)}, {bits_text(bits)} bits" for size, bits in kinds.values()]
        colours = [FIRST] * len(kinds)
        if unquantized is not None:
            labels.append("not quantized")
            values.append(unquantized)
            notes.append(bytes_text(unquantized))
            colours.append(SECOND)
        described = [f"{label} {note}" for label, note in zip(labels, notes, strict=True)]
        title = f"Bytes by kind of layer: {'; '.join(described)}"
        return self._bars(labels, values, notes, colours, title, room=1.75)

    def bits_by_depth(self, blocks: Mapping[int, float]) -> Drawn:
        """:param blocks: block -> bits for each weight"""
        bits = list(blocks.values())

        def draw(axes: Axes) -> None:
            axes.bar(list(blocks), bits, width=0.8, color=FIRST)
            axes.grid(axis="y")
            _whole_numbers(axes)
            axes.set_xlabel("block")
            axes.set_ylabel("bits per weight")

        title = (
            f"Bits per weight by block: from {bits_text(min(bits))} to {bits_text(max(bits))} in "
            f"{len(bits)} blocks"
        )
        return self._draw(draw, 210, title)

    def heat_map(
        self, grid: Grid, what: str, written: Callable[[float], str] = figures_text
    ) -> Drawn:
        """A value by kind of layer and depth, in at most six shades."""
        edges = shade_edges(grid.present)

        def shade(value: float) -> int:
            return sum(value >= edge for edge in edges[1:-1])

        low, high = written(min(grid.present)), written(max(grid.present))
        title = f"{what} by kind of layer and block, from {low} to {high}"
        between = [f"{written(a)} to {written(b)}" for a, b in pairwise(edges)]
        return self._cells(grid, shade, _spread(len(between)), between, written, title)

    def schemes(self, layers: list[LayerRecord]) -> Drawn:
        """The scheme of each kind of layer in each block."""
        names = schemes_by_bits(layers)
        grid = scheme_grid(layers)
        title = f"Scheme by kind of layer and block: {', '.join(names)}"
        return self._cells(
            grid, int, _spread(len(names)), names, lambda value: names[int(value)], title
        )

    def frontier(self, record: AutoSchemeRecord) -> Drawn:
        """Expected loss over bits, with the choice and the budget."""
        bits, losses = zip(*(record.frontier or [record.chosen]), strict=True)

        def draw(axes: Axes) -> None:
            axes.plot(bits, losses, "-", color=FIRST, label="best choices")
            axes.axvline(record.budget, color=MUTED, linestyle=":", label="budget")
            axes.plot(*record.chosen, "D", color=SECOND, markersize=8, label="chosen")
            _scale(axes, "y", [*losses, record.chosen[1]])
            axes.grid(axis="y")
            axes.set_xlabel("bits per weight")
            axes.set_ylabel(f"expected loss ({record.score})")

        title = (
            f"Expected loss over bits per weight; chosen: {bits_text(record.chosen[0])} bits with "
            f"{figures_text(record.chosen[1])}"
        )
        return self._draw(draw, 270, title, legend=3)

    def expert_tokens(self, blocks: Sequence[ExpertTokens]) -> Drawn:
        """Fewest, median and most calibration tokens of an expert in each block."""
        depth = [block.block for block in blocks]

        def draw(axes: Axes) -> None:
            least, most = [x.least for x in blocks], [x.most for x in blocks]
            axes.vlines(depth, least, most, color=MUTED, linewidth=3, label="least to most")
            axes.plot(depth, [x.middle for x in blocks], "o", color=FIRST, label="median")
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(-0.3, max(most) * 2)
            _plain_ticks(axes.yaxis)
            axes.grid(axis="y")
            _whole_numbers(axes)
            axes.set_xlabel("block")
            axes.set_ylabel("tokens of an expert")

        fewest = min(block.least for block in blocks)
        title = f"Calibration tokens of experts by block; the fewest are {fewest}"
        return self._draw(draw, 250, title, legend=2)

    def seconds(self, phases: Sequence[PhaseRecord]) -> Drawn:
        """Time of each phase."""
        labels, values = [x.name for x in phases], [x.seconds for x in phases]
        notes = [duration_text(value) for value in values]
        title = f"Time by phase; the longest is {labels[values.index(max(values))]}"
        return self._bars(labels, values, notes, [FIRST] * len(values), title, room=1.35)

    def memory(self, phases: Sequence[PhaseRecord]) -> Drawn:
        """Peak memory of each phase, on the host and on the device."""
        host = [phase.peak_host_bytes for phase in phases]
        device = [phase.peak_device_bytes for phase in phases]
        rows = [float(len(phases) - number) for number in range(len(phases))]
        both = any(device)

        def draw(axes: Axes) -> None:
            height = 0.36 if both else 0.6
            shift = height / 2 if both else 0.0
            axes.barh([x + shift for x in rows], host, height=height, color=FIRST, label="host")
            for row, value in zip(rows, host, strict=True):
                _beside(axes, value, row + shift, bytes_text(value))
            if both:
                axes.barh(
                    [x - shift for x in rows], device, height=height, color=SECOND, label="device"
                )
                for row, value in zip(rows, device, strict=True):
                    if value:
                        _beside(axes, value, row - shift, bytes_text(value))
            axes.set_yticks(rows, [phase.name for phase in phases])
            _bars_only(axes, max(*host, *device, 1) * 1.35)

        title = f"Peak memory by phase; the largest on the host is {bytes_text(max(host))}"
        if both:
            title += f", on the device {bytes_text(max(device))}"
        height = (38 if both else 24) * len(phases) + (34 if both else 10)
        return self._draw(draw, height, title, legend=2 if both else 0)

    def _bars(
        self,
        labels: list[str],
        values: list[float],
        notes: list[str],
        colours: list[str],
        title: str,
        room: float,
    ) -> Drawn:
        """:param room: length of the axis, in lengths of the longest bar"""
        rows = list(range(len(labels)))[::-1]

        def draw(axes: Axes) -> None:
            axes.barh(rows, values, height=0.66, color=colours)
            for row, value, note in zip(rows, values, notes, strict=True):
                _beside(axes, value, row, note)
            axes.set_yticks(rows, labels)
            _bars_only(axes, max(*values, 1e-9) * room)

        return self._draw(draw, 24 * len(labels) + 10, title)

    def _cells(
        self,
        grid: Grid,
        shade: Callable[[float], int],
        shades: list[str],
        names: list[str],
        written: Callable[[float], str],
        title: str,
    ) -> Drawn:
        """A cell for each kind and block."""
        from matplotlib.patches import Patch, Rectangle

        labels: dict[str, str] = {}

        def draw(axes: Axes) -> None:
            for row, kind in enumerate(grid.kinds):
                for column, block in enumerate(grid.blocks):
                    value = grid.values[row][column]
                    if value is None:
                        continue
                    gid = f"cell-{row}-{column}"
                    labels[gid] = f"block {block}, {kind}: {written(value)}"
                    axes.add_artist(
                        Rectangle(
                            (column - 0.5, row - 0.5),
                            1,
                            1,
                            facecolor=shades[min(shade(value), len(shades) - 1)],
                            edgecolor=PAGE,
                            linewidth=0.8,
                            gid=gid,
                            in_layout=False,
                        )
                    )
            axes.set_xlim(-0.5, len(grid.blocks) - 0.5)
            axes.set_ylim(len(grid.kinds) - 0.5, -0.5)
            axes.set_yticks(range(len(grid.kinds)), grid.kinds)
            step = max(1, math.ceil(len(grid.blocks) / 8))
            ticks = range(0, len(grid.blocks), step)
            axes.set_xticks(ticks, [str(grid.blocks[tick]) for tick in ticks])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_xlabel("block")
            axes.legend(
                handles=[
                    Patch(facecolor=colour, edgecolor=LINE, label=name)
                    for colour, name in zip(shades, names, strict=False)
                ],
                loc="lower right",
                bbox_to_anchor=(1.02, 1.0),
                ncols=2,
                handlelength=1.2,
                columnspacing=1.2,
                borderaxespad=0.3,
            )

        legend_rows = math.ceil(len(names) / 2)
        height = 19 * len(grid.kinds) + 45 + 18 * legend_rows
        return self._draw(draw, height, title, labels=labels)

    def _draw(
        self,
        draw: Callable[[Axes], None],
        height: float,
        title: str,
        legend: int = 0,
        labels: dict[str, str] | None = None,
    ) -> Drawn:
        """
        :param height: in pixels
        :param legend: columns of a legend above the figure; 0 for none
        """
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
            axes = figure.subplots()
            draw(axes)
            if legend:
                axes.legend(
                    loc="lower left",
                    bbox_to_anchor=(-0.02, 1.0),
                    ncols=legend,
                    borderaxespad=0.2,
                    columnspacing=1.4,
                )
            svg = inline_svg(figure, f"figure{len(self.drawn) + 1}", title, labels or {})
        drawn = Drawn(svg, title)
        self.drawn.append(drawn)
        return drawn


def shade_edges(values: Sequence[float]) -> list[float]:
    """
    :param values: not empty
    :return: ascending limits of the shades, two or more: spaced evenly, or by equal factors where
        the values span more than a factor of ten
    """
    low, high = min(values), max(values)
    if low == high:
        return [low, high]
    if low > 0 and high / low > 10:
        edges = [low * (high / low) ** (step / STEPS) for step in range(STEPS + 1)]
    else:
        edges = [low + (high - low) * step / STEPS for step in range(STEPS + 1)]
    return [low, *edges[1:-1], high]


def _spread(count: int) -> list[str]:
    """:return: that many shades, as far apart as they can be; the last one again if too many"""
    if count == 1:
        return [SHADES[STEPS // 2]]
    shades = [SHADES[round(i * (STEPS - 1) / (min(count, STEPS) - 1))] for i in range(count)[:6]]
    return shades + [shades[-1]] * (count - len(shades))


def _scale(axes: Axes, axis: str, values: Sequence[float]) -> None:
    """Logarithmic where all values are positive and more than a factor of five apart."""
    from matplotlib.ticker import LogLocator

    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return
    if min(finite) > 0 and max(finite) / min(finite) > 5:
        axes.set(**{f"{axis}scale": "log"})
        ticks = getattr(axes, f"{axis}axis")
        if max(finite) / min(finite) < 1000:  # powers of ten alone would be too few
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        _plain_ticks(ticks)
    elif min(finite) >= 0:
        axes.set(**{f"{axis}lim": (0, None)})


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _beside(axes: Axes, value: float, row: float, text: str) -> None:
    """Text at the end of a bar."""
    axes.annotate(
        text, (value, row), xytext=(5, 0), textcoords="offset points", va="center", color=INK
    )


def _bars_only(axes: Axes, length: float) -> None:
    axes.set_xlim(0, length)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
