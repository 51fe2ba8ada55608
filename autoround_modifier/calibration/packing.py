"""Cuts documents into samples, and joins the short ones."""

from __future__ import annotations

from autoround_modifier.calibration.documents import Document
from autoround_modifier.calibration.tokens import Sample

__all__ = ["Packer"]

# A sample has at least so many tokens, or half of `max_seq_length` if that is less.
FEWEST_TOKENS = 16


class Packer:
    """
    Makes samples of documents, the same for the same documents.

    Each document is cut into pieces of ``length`` tokens. The first pieces of all documents come
    first, then the second pieces, and so on, so that few samples still come from many documents.
    With ``packing``, documents that are shorter are joined, with the tokenizer's EOS between them,
    until a sample is full; the rests of long documents are joined after all pieces. Without it,
    they are samples of their own, if they are long enough.

    :param length: tokens of a sample, special ones included
    :param num_samples: as many as can be used
    :param packing: join documents
    :ivar num_documents: that were added
    :ivar num_short: documents, or rests of them, that are too short for a sample of their own
    :ivar num_silent: samples left out because none of their tokens counts in the loss
    """

    def __init__(self, length: int, num_samples: int, packing: bool = True):
        self.length = length
        self.num_samples = num_samples
        self.packing = packing
        self.fewest_tokens = min(FEWEST_TOKENS, (length + 1) // 2)
        self.num_documents = 0
        self.num_short = 0
        self.num_silent = 0
        self._first: list[Sample] = []
        self._later: list[list[Sample]] = []  # second, third, ... pieces of each document
        self._rests: list[Document] = []
        self._joined = _Joined(length)

    @property
    def full(self) -> bool:
        """Whether no later document can contribute."""
        return len(self._first) >= self.num_samples

    def add(self, document: Document) -> None:
        """:param document: with at least one token"""
        self.num_documents += 1
        begin, size = document.first, self.length - len(document.first)
        cuts = list(range(0, len(document.ids) - size + 1, size))
        pieces = [
            Sample(begin + document.ids[start : start + size], _part(document, start, start + size))
            for start in cuts
        ]
        done = len(cuts) * size
        rest = Document(
            document.ids[done:],
            None if document.loss_mask is None else document.loss_mask[done:],
            begin,
            document.last,
            document.separator,
        )
        if not self.packing:
            if rest.ids:
                whole = Sample(begin + rest.ids + document.last, _part(rest, 0, None))
                whole = Sample(
                    whole.ids[: self.length],
                    None if whole.loss_mask is None else whole.loss_mask[: self.length],
                )
                if len(whole.ids) >= self.fewest_tokens:
                    pieces.append(whole)
                else:
                    self.num_short += 1
        elif not pieces:
            self._keep(self._first, self._joined.add(rest))
            return
        elif rest.ids:
            self._rests.append(rest)
        pieces = self._counting(pieces)
        self._first += pieces[:1]
        if len(pieces) > 1:
            self._later.append(pieces[1:])

    def samples(self) -> list[Sample]:
        """:return: at most ``num_samples``, the first pieces first"""
        samples = list(self._first)
        for index in range(max(map(len, self._later), default=0)):
            samples += [pieces[index] for pieces in self._later if index < len(pieces)]
        rests, self._rests = self._rests, []
        for rest in rests:
            if len(samples) >= self.num_samples:
                break
            self._keep(samples, self._joined.add(rest))
        if len(samples) < self.num_samples:
            last = self._joined.take()
            if len(last.ids) >= self.fewest_tokens:
                self._keep(samples, [last])
            elif last.ids:
                self.num_short += 1
        return samples[: self.num_samples]

    def _keep(self, samples: list[Sample], more: list[Sample]) -> None:
        samples += self._counting(more)

    def _counting(self, samples: list[Sample]) -> list[Sample]:
        """:return: the samples of which a token counts"""
        kept = [x for x in samples if x.loss_mask is None or any(x.loss_mask)]
        self.num_silent += len(samples) - len(kept)
        return kept


class _Joined:
    """
    Documents one after the other.

    :param length: tokens of a full sample
    """

    def __init__(self, length: int):
        self.length = length
        self._clear()

    def _clear(self) -> None:
        self._ids: list[int] = []
        self._mask: list[int] = []
        self._masked = False
        self._num_separators = 0  # at the end

    def add(self, document: Document) -> list[Sample]:
        """:return: the samples that are full now"""
        full = []
        body, first = document.ids, document.first
        masked = document.loss_mask is not None
        mask = document.loss_mask or [1] * len(body)
        first_mask = [int(not masked)] * len(first)
        self._masked |= masked
        self._append(first, first_mask)
        while len(self._ids) + len(body) > self.length:
            room = max(0, self.length - len(self._ids))
            self._append(body[:room], mask[:room])
            body, mask = body[room:], mask[room:]
            full.append(self._cut())
            self._masked = masked
            self._append(first, first_mask)
        self._append(body, mask)
        self._append(document.separator, [1] * len(document.separator))
        self._num_separators = 0 if document.last else len(document.separator)
        if len(self._ids) >= self.length:
            full.append(self._cut())
        return full

    def take(self) -> Sample:
        """:return: what is left, without a separator at its end"""
        end = len(self._ids) - self._num_separators
        self._ids, self._mask = self._ids[:end], self._mask[:end]
        return self._cut()

    def _append(self, ids: list[int], mask: list[int]) -> None:
        self._ids += ids
        self._mask += mask
        self._num_separators = 0

    def _cut(self) -> Sample:
        ids, mask = self._ids[: self.length], self._mask[: self.length]
        sample = Sample(ids, mask if self._masked else None)
        self._clear()
        return sample


def _part(document: Document, start: int, end: int | None) -> list[int] | None:
    """:return: loss mask of a piece, special tokens in front included"""
    if document.loss_mask is None:
        return None
    return [0] * len(document.first) + document.loss_mask[start:end]
