"""Penn Treebank tokens in lower case, which caption metrics compare.

The published evaluation runs Stanford's PTBTokenizer, a Java program, and drops punctuation. This module has its rules
for ordinary captions, but not those for URLs, emoticons and markup.
"""

import re

from finetune.metrics.text_form import composed

# Dropped as in the COCO caption evaluation, which keeps brackets by mistake: it looks for `-LRB-` among tokens that
# are already lower-case. Brackets are kept here too.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "\u00a0": " "})

_TOKEN = re.compile(
    r"""
      (?:[^\W\d_]\.){2,}                                   # acronyms with their periods: u.s., a.m.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|corp|ltd|prof|ave|blvd|ft)\.   # abbreviations with theirs
    | \d+(?:[.,:/]\d+)+                                    # 1,000  12.5  10:30  1/2
    | \.{2,} | -{2,}
    | [^\W_]+(?:[-/_&'][^\W_]+)*                           # words, their hyphens and apostrophes inside
    | '(?:s|m|d|ll|re|ve|em|n|til|tis|twas|\d\ds)\b         # 's, 'em, '90s where nothing is in front
    | \S                                                   # any other mark by itself
    """,
    re.VERBOSE,
)
# A word is split before n't and the other clitics.
_NEGATION = re.compile(r"(.+)(n't)")
_CLITIC = re.compile(r"(.+)('(?:s|m|d|ll|re|ve))")
_CUT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
    "'tis": "'t is",
    "'twas": "'t was",
}


def ptb_tokens(text: str) -> str:
    """Tokenize a caption: lower case, in Unicode's form C, without punctuation, separated by single spaces.

    >>> ptb_tokens('A man in a T-shirt isn\\'t riding the dog\\'s bike, "fast".')
    "a man in a t-shirt is n't riding the dog 's bike fast"
    """
    tokens = []
    for match in _TOKEN.finditer(composed(text).translate(_PLAIN).lower()):
        tokens += _split_clitics(match[0])
    return " ".join(_BRACKETS.get(token, token) for token in tokens if token not in _DROPPED and token != '"')


def _split_clitics(word: str) -> list[str]:
    """Split a word before its clitics: `could n't 've`."""
    if word in _CUT:
        return _CUT[word].split()
    for ending in (_CLITIC, _NEGATION):
        if match := ending.fullmatch(word):
            return [*_split_clitics(match[1]), match[2]]
    return ["..."] if set(word) == {"."} else ["--"] if set(word) == {"-"} and len(word) > 1 else [word]
