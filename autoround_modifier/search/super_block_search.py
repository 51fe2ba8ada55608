"""
Search of the scales and minima of K-quants, their own quantization included.

Three steps, each of which keeps what has the least error ``sum h * (w' - w)^2`` so far:

1. each sub-block alone, with a scale and a minimum that are any numbers: a coarse grid of ranges,
   then alternating least squares, as in `integer_search`;
2. ``d`` and ``dmin`` for each super-block: multiples of those that step 1 asks for, with the
   nearest integers ``sc`` and ``mn``;
3. in turns, the integers next to ``sc`` and ``mn``, and least squares for ``d`` and ``dmin``.

The sub-block with the largest scale of a super-block keeps the largest integer, and so does the one
with the largest minimum: then the ranges that are returned give exactly these scales and minima
(`SuperBlockGrid.sub_scales`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autoround_modifier.device import slice_elements
from autoround_modifier.formats.grouping import Grouping, observed_range
from autoround_modifier.formats.super_block import SubScales, SuperBlockGrid

__all__ = ["search_super_block_range"]

SHRINK = (1.0, 0.8, 0.6, 0.4)
SYMMETRIC_CANDIDATES = 12
LEAST_SQUARES_STEPS = 6
UNIT_FACTORS = (1.0, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
TURNS = 3
TINY = 1e-30


def search_super_block_range(
    weight: Tensor, grouping: Grouping, grid: SuperBlockGrid, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """
    :param weight: (out_features, in_features), full precision
    :param grouping: its sub-blocks
    :param grid: the values the weight can take
    :param importance: (in_features,), h > 0, float32
    :return: w_min and w_max, each (groups,), float32: the best range of each sub-block. ``w_max``
        may be negative where all weights of a sub-block are
    """
    groups = grouping.split(weight.detach())
    weights = grouping.split(importance.expand(weight.shape))
    super_block = grid.sub_blocks * grouping.group_size
    rows = grid.sub_blocks * max(1, slice_elements(weight.device) // super_block)
    found = [
        _Search(grid, part.float(), h).run()
        for part, h in zip(groups.split(rows), weights.split(rows), strict=True)
    ]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


@dataclass
class _Search:
    """
    :param grid: of the format
    :param weight: (sub-blocks, sub-block), float32, of whole super-blocks; so is ``importance``
    """

    grid: SuperBlockGrid
    weight: Tensor
    importance: Tensor

    def run(self) -> tuple[Tensor, Tensor]:
        """:return: w_min and w_max, (sub-blocks,)"""
        scale, low = self._each_alone()
        best = self._units(self._cut(scale), self._cut(low))
        for _ in range(TURNS):
            best = self._neighbours(best)
            best = self._refitted(best)
        return self._better(_ranges(self.grid, best), observed_range(self.weight))

    # ------------------------------------------------------------------ one sub-block alone

    def _each_alone(self) -> tuple[Tensor, Tensor]:
        """:return: scale and minimum below zero of each sub-block, (sub-blocks, 1)"""
        best = next(self._candidates())
        best_error = torch.full_like(best[0], torch.inf)
        for candidate in self._candidates():
            best, best_error = self._keep(best, best_error, candidate)
        for _ in range(LEAST_SQUARES_STEPS):
            best, best_error = self._keep(best, best_error, self._fitted(*best))
        return best

    def _keep(
        self, best: tuple[Tensor, Tensor], best_error: Tensor, found: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """:return: of each sub-block the better one, and its error"""
        error = self._errors(*found)
        better = error < best_error
        kept = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        return (kept[0], kept[1]), torch.where(better, error, best_error)

    def _candidates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the observed range first, then others."""
        w_min, w_max = (end.unsqueeze(-1) for end in observed_range(self.weight))
        floor = torch.finfo(torch.float32).tiny
        if not self.grid.symmetric:
            for left in SHRINK:
                for right in SHRINK:
                    low = -w_min * left
                    yield ((w_max * right + low) / self.grid.code_range[1]).clamp(min=floor), low
            return
        levels = -self.grid.code_range[0]
        positive = w_max > -w_min
        extreme = torch.where(positive, w_max, -w_min).clamp(min=floor)
        nothing = torch.zeros_like(extreme)
        yield torch.where(positive, -extreme, extreme) / levels, nothing
        spread = 0.75
        for d in torch.linspace(-spread, spread, SYMMETRIC_CANDIDATES).tolist():
            scale = extreme / (levels - d)
            yield scale, nothing
            yield -scale, nothing

    def _fitted(self, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """:return: scale and minimum that fit the codes of these best"""
        h, w = self.importance, self.weight
        q = self.grid.codes(w, scale, low)
        alone = _total(h * q * w) / _total(h * q * q).clamp(min=TINY)
        if self.grid.symmetric:
            return _nonzero(alone.float(), scale), low
        total = _total(h)
        mean_q, mean_w = _total(h * q) / total, _total(h * w) / total
        centred = q - mean_q.float()
        slope = _total(h * centred * w) / _total(h * centred * centred).clamp(min=TINY)
        fitted = slope * mean_q - mean_w  # w ~ slope * q - fitted
        above = fitted < 0  # a minimum above zero is not in the format
        slope = torch.where(above, alone, slope).float()
        return torch.where(slope > 0, slope, scale), fitted.clamp(min=0).float()

    # ------------------------------------------------------------------ super-blocks

    def _units(self, scale: Tensor, low: Tensor) -> SubScales:
        """
        :param scale: that each sub-block asks for, (super-blocks, sub-blocks); so is ``low``
        :return: the best of some multiples of the units
        """
        full, grid = self.grid.full_scale, self.grid
        largest = scale.abs().argmax(-1, keepdim=True)
        wanted_d = scale.gather(-1, largest) / full
        wanted_dmin = low.amax(-1, keepdim=True) / full

        def rounded(d_factor: float, dmin_factor: float) -> SubScales:
            d = grid.unit(wanted_d * d_factor)
            scales = _nonzero((scale / d).round().clamp(*grid.scale_range), scale / d)
            scales = scales.scatter(-1, largest, float(full))
            if grid.symmetric:
                return SubScales(d, scales, torch.zeros_like(d), torch.zeros_like(scales))
            dmin = grid.unit(wanted_dmin * dmin_factor)
            mins = (low / dmin).round().clamp(0, full)
            mins = mins.scatter(-1, low.argmax(-1, keepdim=True), float(full))
            return SubScales(d, scales, dmin, mins)

        pairs = [(factor, 1.0) for factor in UNIT_FACTORS]
        if not grid.symmetric:
            pairs += [(1.0, factor) for factor in UNIT_FACTORS[1:]]
            pairs += [(factor, factor) for factor in UNIT_FACTORS[1:]]
        best = rounded(1.0, 1.0)
        for factors in pairs[1:]:
            best = self._better_units(best, rounded(*factors))
        return best

    def _better_units(self, best: SubScales, found: SubScales) -> SubScales:
        """:return: of each super-block the better one"""
        errors = [self._cut(self._errors(x.scale(), x.low())).sum(-1, True) for x in (best, found)]
        better = errors[1] < errors[0]
        return SubScales(
            *(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        )

    def _neighbours(self, best: SubScales) -> SubScales:
        """:return: with the best of the integers next to ``sc`` and ``mn``, for each sub-block"""
        grid = self.grid
        # of equally large ones the first is what determines the unit
        is_largest = _first(best.scales == grid.full_scale)
        is_lowest = _first(best.mins == grid.full_scale)
        scales, mins = best.scales, best.mins
        error = self._cut(self._errors(best.scale(), best.low()))
        for up in (-1, 0, 1):
            for down in (0,) if grid.symmetric else (-1, 0, 1):
                if up == down == 0:
                    continue
                tried = (best.scales + up).clamp(*grid.scale_range)
                tried = torch.where(is_largest, best.scales, _nonzero(tried, best.scales))
                lower = best.mins
                if down:
                    lower = (lower + down).clamp(0, grid.full_scale)
                    lower = torch.where(is_lowest, best.mins, lower)
                found = SubScales(best.d, tried, best.dmin, lower)
                new = self._cut(self._errors(found.scale(), found.low()))
                better = new < error
                error = torch.where(better, new, error)
                scales = torch.where(better, tried, scales)
                mins = torch.where(better, lower, mins)
        return SubScales(best.d, scales, best.dmin, mins)

    def _refitted(self, best: SubScales) -> SubScales:
        """:return: with ``d`` and ``dmin`` that fit the integers best, where that is better"""
        h, w = self._super(self.importance), self._super(self.weight)
        q = self._super(self.grid.codes(self.weight, best.scale(), best.low()))
        a = (best.scales.unsqueeze(-1) * q).flatten(-2)
        h, w = h.flatten(-2), w.flatten(-2)
        aa, aw = _total(h * a * a), _total(h * a * w)
        alone = aw / aa.clamp(min=TINY)
        if self.grid.symmetric:
            d = self.grid.unit(torch.where(alone == 0, best.d.double(), alone).float())
            return self._better_units(best, best._replace(d=d))
        b = best.mins.unsqueeze(-1).expand_as(self._super(self.weight)).flatten(-2)
        bb, bw, ab = _total(h * b * b), _total(h * b * w), _total(h * a * b)
        # minimise sum h (d a - dmin b - w)^2
        det = aa * bb - ab * ab
        singular = det <= 1e-9 * aa * bb
        det = torch.where(singular, torch.ones_like(det), det)
        d = torch.where(singular, best.d.double(), (aw * bb - ab * bw) / det)
        dmin = torch.where(singular, best.dmin.double(), (aw * ab - aa * bw) / det)
        sound = (d > 0) & (dmin > 0)
        d = torch.where(sound, d, best.d.double()).float()
        dmin = torch.where(sound, dmin, best.dmin.double()).float()
        found = best._replace(d=self.grid.unit(d), dmin=self.grid.unit(dmin))
        return self._better_units(best, found)

    # ------------------------------------------------------------------ errors

    def _better(
        self, found: tuple[Tensor, Tensor], observed: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """:return: of each super-block the better ranges"""
        errors = []
        for ends in (observed, found):
            dequantized, _ = self.grid.fake_quantize(self.weight, *ends)
            error = _total(self.importance * (dequantized - self.weight).square())
            errors.append(self._cut(error).sum(-1, True))
        better = (errors[1] < errors[0]).expand(-1, self.grid.sub_blocks).flatten()
        low, high = (
            torch.where(better, new, old) for new, old in zip(found, observed, strict=True)
        )
        return low, high

    def _errors(self, scale: Tensor, low: Tensor) -> Tensor:
        """:return: sum of h * (w' - w)^2 of each sub-block, (sub-blocks, 1), float64"""
        dequantized = scale * self.grid.codes(self.weight, scale, low) - low
        return _total(self.importance * (dequantized - self.weight).square())

    def _cut(self, each: Tensor) -> Tensor:
        """(sub-blocks, 1) -> (super-blocks, sub-blocks)"""
        return each.view(-1, self.grid.sub_blocks)

    def _super(self, groups: Tensor) -> Tensor:
        """(sub-blocks, sub-block) -> (super-blocks, sub-blocks, sub-block)"""
        return groups.unflatten(0, (-1, self.grid.sub_blocks))


def _ranges(grid: SuperBlockGrid, found: SubScales) -> tuple[Tensor, Tensor]:
    """:return: w_min and w_max, (sub-blocks,), that give these scales and minima"""
    scale, low = found.scale().squeeze(-1), found.low().squeeze(-1)
    lowest, highest = grid.code_range
    if grid.symmetric:
        reach = scale * lowest
        return reach.clamp(max=0), reach.clamp(min=0)
    return -low, scale * highest - low


def _nonzero(integers: Tensor, like: Tensor) -> Tensor:
    """:return: 1 or -1, as ``like`` is, in place of zeros"""
    return torch.where(integers == 0, torch.where(like < 0, -1.0, 1.0), integers)


def _first(found: Tensor) -> Tensor:
    """:return: bool, whether this is the first of its row that is true"""
    return found & (found.cumsum(-1) == 1)


def _total(terms: Tensor) -> Tensor:
    """:return: sum of each row, (..., 1), float64, which hides the order of additions"""
    return terms.sum(-1, keepdim=True, dtype=torch.float64)
