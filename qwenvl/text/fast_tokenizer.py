"""`qwen.tiktoken` as a tokenizer of the library `tokenizers`, which other programs read: the same ids for a text.

tiktoken merges the two neighbours whose union has the lowest rank, the leftmost first. `tokenizers` merges by a list
of pairs, which the file does not have. It follows from the ranks: each token has exactly one pair, the two pieces that
remain of its bytes when only lower ranks merge. Two neighbours that form a token have merged only within that token,
in the same order, so they are that pair in every context.

Two things differ. A control token spelled in a text becomes that token, as with every `tokenizer.json`, where `qwenvl`
reads it as text. And a few combining marks that are new since Unicode 14 are ordered differently: the tables of
`tokenizers` do not have them yet.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from qwenvl.errors import InputError
from qwenvl.text.vocabulary import GROUNDING_TOKENS, SPLIT_PATTERN, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@lru_cache(maxsize=2)
def shared_fast_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """`fast_tokenizer` for the text of replies, in which boxes are text; built once in a process for each vocabulary.

    It is shared: use it, and change nothing in it.

    Raises:
        InputError: see `fast_tokenizer`.
    """
    return fast_tokenizer(vocabulary, not_special=GROUNDING_TOKENS)


def fast_tokenizer(vocabulary: Vocabulary, *, not_special: Collection[str] = ()) -> Tokenizer:
    """The tokenizer that gives the ids of `vocabulary`, and recognises control tokens in the text.

    Args:
        not_special: control tokens that stay where special tokens are left out.

    Raises:
        InputError: an ordinary token is spelled like a control token; `tokenizers` cannot distinguish them.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    strings = vocabulary.token_strings[: vocabulary.ordinary_size]
    for token, string in zip(vocabulary.token_bytes, strings, strict=False):
        if token.decode("latin-1") in vocabulary.control_tokens:
            raise InputError(f"the vocabulary has an ordinary token {token!r} ({string}) beside the control token")
    merges = [(strings[left], strings[right]) for left, right in merged_pairs(vocabulary)]
    # As in tiktoken, a word that is a token is that token, whatever merging its bytes would give.
    model = models.BPE(vocab={string: rank for rank, string in enumerate(strings)}, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # In the order of their ids, which follow the last rank.
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=token not in not_special) for token in vocabulary.control_tokens]
    )
    return tokenizer


def merged_pairs(vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """The ranks of the two tokens that each longer token is merged from, in the order of the tokens' ranks.

    A token that merging never reaches has no pair; as a whole word it is found all the same.
    """
    ranks = {token: rank for rank, token in enumerate(vocabulary.token_bytes[: vocabulary.ordinary_size])}
    pairs = []
    for token, rank in ranks.items():
        parts = _merge_below(token, rank, ranks)
        if len(parts) == 2 and all(part in ranks for part in parts):
            pairs.append((ranks[parts[0]], ranks[parts[1]]))
    return pairs


def _merge_below(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The pieces that remain of a token's bytes when only tokens of ranks below `limit` are merged."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 1:
        unions = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(unions)
        if lowest >= limit:
            break
        place = unions.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
