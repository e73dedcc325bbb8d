"""Which option a reply chose."""

import pytest

from finetune.metrics import choice_letter, multiple_choice_accuracy, read_choice

OPTIONS = ["A dog", "cat", "the owl", "B"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" b\n", "B"),
        ("(C)", "C"),
        ("B. cat", "B"),
        ("B) cat", "B"),
        ("**B**: cat", "B"),
        ("C: because", "C"),
        ("The answer is C.", "C"),
        ("Answer: (D)", "D"),
        ("the correct option is B, cat", "B"),
        ("B\ncat", "B"),
        ("A dog", None),  # an article
        ("Dogs", None),
        ("E", None),  # no such option
        ("I think so", None),
        ("the answer is a dog", None),
        ("the answer is b.", "B"),
        ("ANSWER: B the cat", "B"),
        ("the answer isn't known", None),
        ("", None),
        ("?", None),
    ],
)
def test_the_letter_of_a_reply(reply, letter):
    assert choice_letter(reply, 4) == letter


@pytest.mark.parametrize(
    ("reply", "gold", "score"),
    [
        ("A", "A", 1.0),
        ("a dog.", "A", 1.0),  # by its text
        ("A dog", "B", 0.0),
        ("The Owl", "C", 1.0),
        ("B. cat", "B", 1.0),
        ("B", "D", 1.0),  # which is the text of the last option
        ("B", "B", 0.0),
        ("none of them", "A", 0.0),
    ],
)
def test_the_right_option_by_letter_or_text(reply, gold, score):
    assert multiple_choice_accuracy(reply, gold, OPTIONS) == score


def test_the_gold_letter_must_be_an_option():
    with pytest.raises(ValueError, match="gold must be one of ABCD, not 'E'"):
        multiple_choice_accuracy("A", "E", OPTIONS)
    with pytest.raises(ValueError, match="gold must be one of ABCD, not ''"):
        multiple_choice_accuracy("A", "", OPTIONS)


NAMES_B = {
    "Chinese": [
        *(
            "Ｂ",
            "（Ｂ）",
            "Ｂ．",
            "B、",
            "B、猫",
            "B。",
            "B，因为它是猫",
            "答案是B",
            "答案是：Ｂ",
            "答案：B",
            "答案为B",
        ),
        *(
            "正确答案是B",
            "正确答案：（B）",
            "选B",
            "故选B。",
            "应选B",
            "我选择B",
            "B项正确",
            "B是正确的",
            "选项B",
            "答案选B",
        ),
        *("答案应该是 B", "【答案】B", "答案是「B」", "答案是B，因为A是错的", "B）猫"),
    ],
    "English": [
        *("The correct answer is (B).", "The answer is: **B**", "Answer B", "I think (B) is right", '"B"'),
        *("B is the correct answer", "The answer is B, not A.", "Option A is wrong, so option B", "B, because it is"),
        *("The answer is B because option A is a dog.", "The answer to this question is B", "The right choice is B"),
    ],
    "Japanese": ["正解はBです", "答えはB", "答え：B", "選択肢B", "Bです", "回答：B"],
    "Korean": ["정답은 B입니다", "정답: B", "답은 B", "B입니다", "B번"],
    "German": ["Die Antwort ist B", "Antwort: B", "Die richtige Antwort lautet B.", "Die richtige Antwort ist B)"],
    "French": ["La réponse est B", "Réponse : B", "la bonne réponse est la B", "Le choix B"],
    "Spanish": ["La respuesta correcta es la B", "Respuesta: B", "Opción B"],
    "Portuguese": ["A resposta é B", "A resposta correta é a B", "Alternativa B"],
    "others": [
        *("La risposta corretta è la B", "Правильный ответ — B", "Ответ: B", "Đáp án là B", "Jawaban: B", "Cevap: B"),
        *("Jawabannya adalah B", "الإجابة هي B", "คำตอบคือ B"),
    ],
}
TEXTS = ["a dog", "a cat", "the owl", "fish"]


@pytest.mark.parametrize("language", NAMES_B)
def test_choices_are_read_in_the_languages_of_the_model(language):
    assert [reply for reply in NAMES_B[language] if read_choice(reply, TEXTS) != "B"] == []


@pytest.mark.parametrize(
    "reply",
    [
        *("A or B", "A、B", "A和B", "A, B", "A/B", "(A) or (B)", "A) B)", "Both A and B", "答案是A和B", "答案是A或B"),
        *("The answer is A or B", "A. a dog\nB. a cat\nC. the owl", "AとB", "options A and B", "A, B, or C"),
        *(
            "不选A",
            "答案不是B",
            "The answer is not B",
            "Option A is wrong",
            "A选项错误",
            "정답은 없습니다",
            "Es ist ein Hund",
        ),
        *("C语言", "A型血", "B超检查", "AB", "Apple", "A resposta é a melhor", "une réponse", "答案是E", "Answer:"),
    ],
)
def test_a_reply_that_leaves_a_doubt_chooses_none(reply):
    assert read_choice(reply, TEXTS) is None
    assert multiple_choice_accuracy(reply, "A", TEXTS) == multiple_choice_accuracy(reply, "B", TEXTS) == 0.0


@pytest.mark.parametrize(
    "reply", ["A Cat.", "The answer is a cat.", "答案是a cat。", "**a cat**", "“a cat”", "ａ ｃａｔ", "Answer: A CAT"]
)
def test_an_options_text_is_the_choice(reply):
    assert read_choice(reply, TEXTS) == "B"


def test_options_are_compared_in_one_form_of_unicode():
    assert read_choice("cafe\u0301", ["thé", "caf\u00e9"]) == "B"
    assert read_choice("x2", ["x²", "x2"]) == "B"  # compatible forms count only where nothing is equal
    assert read_choice("STRASSE", ["Straße", "Weg"]) == "A"


def test_a_long_reply_is_read_in_bounded_time():
    for text in (
        "A" * 20_000,
        "(" * 20_000,
        "the answer " * 2000,
        "e" + "\u0301" * 50_000,
        "A or " * 5000,
        "\n" * 20_000,
    ):
        assert read_choice(text, TEXTS) is None
