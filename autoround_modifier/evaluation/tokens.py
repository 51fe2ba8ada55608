"""The divergence at each token of a text, with the token as a reader sees it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from autoround_modifier.evaluation.divergence import TokenStatistics
from autoround_modifier.report.schema import TokenDivergence

__all__ = ["token_divergences", "token_texts"]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    :param ids: of a text
    :return: what each token adds to the text; together, the decoded text. A character that several
        tokens make belongs to the last of them
    """
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        decoded = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if end < len(ids):
            decoded = decoded.rstrip("\N{REPLACEMENT CHARACTER}")  # an unfinished character
        texts.append(decoded[len(shown) :])
        shown = decoded if len(decoded) > len(shown) else shown
    return texts


def token_divergences(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    statistics: TokenStatistics,
    limit: int = 256,
) -> list[TokenDivergence]:
    """
    :param ids: of one sample
    :param statistics: of that sample
    :param limit: largest number of tokens
    :return: of each token but the first, which nothing predicts
    """
    texts = token_texts(tokenizer, ids[: limit + 1])[1:]
    rows = zip(texts, statistics.kl.tolist(), statistics.same_top1.tolist(), strict=False)
    return [TokenDivergence(text=text, kl=kl, same_top1=bool(same)) for text, kl, same in rows]
