"""Captions as the tokens that caption metrics compare: those of the Penn Treebank, in lower case.

The published evaluation runs Stanford's PTBTokenizer, a Java program, and drops punctuation. This follows its rules
for what captions are made of; it does not follow it into URLs, emoticons or markup.
"""

import re

# Left out of the output, as the COCO caption evaluation does. It leaves brackets in by mistake: it looks for `-LRB-`
# among tokens that are lower case by then. So does this.
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
# In front of n't and the other clitics a word is cut.
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
    """The tokens of a caption in lower case, without punctuation, one space between them.

    >>> ptb_tokens('A man in a T-shirt isn\\'t riding the dog\\'s bike, "fast".')
    "a man in a t-shirt is n't riding the dog 's bike fast"
    """
    tokens = []
    for match in _TOKEN.finditer(text.translate(_PLAIN).lower()):
        tokens += _without_clitics(match[0])
    return " ".join(_BRACKETS.get(token, token) for token in tokens if token not in _DROPPED and token != '"')


def _without_clitics(word: str) -> list[str]:
    """The word cut in front of its clitics: `could n't 've`."""
    if word in _CUT:
        return _CUT[word].split()
    for ending in (_CLITIC, _NEGATION):
        if match := ending.fullmatch(word):
            return [*_without_clitics(match[1]), match[2]]
    return ["..."] if set(word) == {"."} else ["--"] if set(word) == {"-"} and len(word) > 1 else [word]
