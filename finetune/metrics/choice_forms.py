"""How replies name an option by its letter, in the languages that the model was trained on and some more.

Only forms that leave no doubt are here. Texts are in compatible form (`text_form.composed`), so full-width letters,
digits and marks are plain ones: `（Ｂ）` is `(B)`.
"""

import re

from finetune.metrics.text_form import composed

# ---- "the answer is B": the words before the letter

# Nouns for the answer, in the order of languages: English, Chinese, Japanese, Korean, German, French, Spanish and
# Portuguese, Italian, Dutch, Russian, Vietnamese, Indonesian, Turkish, Polish, Arabic, Hindi, Thai.
_ANSWERS = composed(
    r"""
    \banswer | \bsolution
    | 正确答案 | 正確答案 | 答案 | 正确选项 | 正確選項
    | 答え | 解答 | 回答 | 正解
    | 정답 | 해답 | 답변 | 답
    | \bantwort | \blösung
    | \bréponse | \bsolution
    | \brespuesta | \bsolución | \bresposta | \bsolução
    | \brisposta | \bsoluzione
    | \bantwoord
    | \bответ
    | \bđáp\ án | \bcâu\ trả\ lời
    | \bjawaban(?:nya)?
    | \bcevap | \byanıt
    | \bodpowiedź
    | الإجابة | الجواب
    | उत्तर
    | คำตอบ
""",
    "NFKC",
)
# Between noun and verb: "the answer to this question is", "la respuesta correcta es", "答案应该是".
_WHICH = r"""
    (?: \ (?:correcta?|exacte|juste|richtige|corretta|corret[ao]|esatta|giusta|yang\ benar|đúng|الصحيحة|الصحيح)
      | \ (?:to|for)\ (?:this|the)\ question
      | (?:应该|應該|应|應|选择|選擇|选|選)
    )?
"""
_VERBS = r"""
    (?: \ *[:=]
      | \ is(?:\ (?:the\ )?(?:option|choice|letter))? | \ should\ be | \ would\ be
      | 是 | 为 | 為 | は | 은 | 는 | 이
      | \ ist | \ lautet | \ wäre
      | \ est
      | \ es | \ é | \ è | \ sería | \ seria
      | \ is
      | \ — | \ - | \ –
      | \ là | \ adalah | \ to | \ jest | \ هي | \ هو | \ है | คือ
    )?
    \ *:?
"""
# The article of a letter: "es la B", "ist die B", "est la réponse B".
_ARTICLES = r"(?:\ *(?:the|la|le|el|die|der|das|het|l['’]|(?-i:[ao])(?=\ )))?"
_KINDS = r"""
    (?: \ *(?: option | choice | letter | 选项 | 選項 | 選択肢 | 번호
      | opción | opção | opzione | lettre | letra | lettera | buchstabe | вариант ))?
"""

# ---- "I choose B": verbs and nouns of choosing, right before the letter

_CHOSEN = composed(
    r"""
    (?<!不)(?<!别)(?<!別)(?<!不能)(?<!不应)(?<!不该)
    (?: 故选 | 故選 | 应选 | 應選 | 选择 | 選擇 | 选项 | 選項 | 选 | 選 | 選択肢 | 選択 | 선택지 | 선택 | 보기 )
    (?:是|为|為|は|은|는)?
    | \b (?:option|choice|choose|pick|select
        | auswahl | wähle
        | choix | choisis
        | opción | elijo | opção | alternativa | escolho
        | opzione | scelgo | optie
        | вариант | выбираю
        | phương\ án | chọn | pilihan | seçenek | opcja | opcję
        | الخيار | विकल्प | ข้อ
      )
      (?:\ (?:is|est|es|ist|è|é))?
""",
    "NFKC",
)

_QUOTES = r"[\s\"'“”‘’«»「」『』【】\[(*_:]{0,4}"
# A letter by itself: in capitals, and no letter of the same script or apostrophe after it; or small with nothing but a
# mark after it, since "the answer is a dog" has an article. Scripts without spaces may go on right after it.
_LETTER = r"(?: (?-i:[A-Z])(?![A-Za-z0-9'’À-ɏ]) | (?-i:[a-z])(?=[\s)\]*]*(?:[.,;:!。、)\]*]|$)) )"

STATED = re.compile(
    rf"(?:{_ANSWERS}){_WHICH}{_VERBS}{_ARTICLES}{_KINDS}(?P<before>{_QUOTES})(?P<letter>{_LETTER})",
    re.IGNORECASE | re.VERBOSE,
)
"""`The answer is B`, `答案是B`, `正解はB`, `정답은 B`, `La respuesta correcta es la B`."""

CHOSEN = re.compile(rf"(?:{_CHOSEN})(?P<before>{_QUOTES})(?P<letter>{_LETTER})", re.IGNORECASE | re.VERBOSE)
"""`Option B`, `选B`, `選択肢B`."""

LEAD_IN = re.compile(rf"^\W*(?:the\ |la\ |die\ )?(?:{_ANSWERS}){_WHICH}{_VERBS}", re.IGNORECASE | re.VERBOSE)
"""The words before an option's text: `The answer is`, `答案是`."""

# ---- a letter at the beginning

FIRST = re.compile(
    r"""
    \W*?(?P<open>[(\[【「『*_"']*)
    (?P<letter>[A-Za-z])
    (?: \s*(?:[.):\]*】」』"'_、。,;!]|\s-\s|$|\n)                       # "B.", "(B)", "B、", alone
      | \s*(?:项|項|选项|選項|是|为|為|正确|正確|对|對)                       # "B项", "B是"
      | \s*(?:番|です|だ|が|번|입니다|이다|가|이)                              # "Bです", "B입니다"
      | \ (?:is|ist|est|es|è|é)\ (?:the\ |die\ |la\ |le\ )?(?:correct|right|richtig|korrekt|juste|giust|corret|corrig)
    )
    """,
    re.VERBOSE,
)
"""`B`, `(B)`, `B. cat`, `B、猫`, `B项`, `B is correct`. The "A" of "A dog" is an article."""

MARKED = re.compile(r"(?<![A-Za-z0-9])[(\[【「]\s*([A-Z])\s*[)\]】」](?![A-Za-z0-9])")
"""`(B)` anywhere."""

ITEM = re.compile(r"(?:^|\n)\s*[(\[【*_]*([A-Z])\s*[.):\]】、]")
"""A letter with its mark at the beginning of a line."""

WRONG = re.compile(
    r"""
    [)\]】」*"'\s]*
    (?: (?:is|are|was)\ (?:not|wrong|incorrect|false|un)
      | isn['’]t
      | (?:ist|est|es|è|é|n['’]est|no\ es|non\ è)\ (?:nicht|falsch|pas|faux|fausse|incorrect|inexact|errad|sbagliat)
      | (?:选项|選項|项|項)?\s*(?:不|错|錯|有误)
      | (?:は|が)?(?:間違|誤|違|不正解)
      | (?:은|는|이|가)?\s*(?:틀|오답|아니)
      | (?:неверн|не\ )
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What may follow a letter that is not chosen: `Option A is wrong`."""

OR = re.compile(
    r"""
    [)\]】」*"'.\s]*
    (?: [,、/&+|]\s*(?:or|and)?
      | \b(?:or|and|and/or|oder|und|ou|et|o|u|y|e|of|en|или|и|hoặc|và|atau|dan|veya|ve|lub|albo|i)\b
      | 或者 | 或 | 和 | 与 | 與 | 及 | 跟 | 还是 | または | 又は | と | か | 또는 | 혹은 | 과 | 와 | 이나
    )
    [\s(\[【「*"']* (?:option|choice|选项|選項)?\s*
    (?P<joined>(?-i:[A-Z]))(?![A-Za-z0-9'’À-ɏ])
    | [)\]】]\s*[(\[【]?(?P<beside>(?-i:[A-Z]))[)\]】]
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""A second letter right after a first one: `A or B`, `A、B`, `A和B`, `(A) (B)`."""
