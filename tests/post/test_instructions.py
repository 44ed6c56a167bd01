"""Instructions that an answer can be seen to follow or not: IFEval's, against its public checker where that runs."""

import sys
import time
import types
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.post.verifiers import get, judge, langid
from pascaline.post.verifiers.instructions import CHECKS, check, followed, sentences, share_followed

ENGLISH = "the river is wide and it was cold, so we went home to our house by the road that you see from here."
FRENCH = "Le vieux pont a été construit par les gens du village et il est encore utilisé aujourd'hui."

# id, arguments, an answer that follows, and answers that do not
CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("keywords:existence", {"keywords": ["apple", "Pear"]}, "An Apple and pears.", ["An apple.", "Pear"]),
    ("keywords:existence", {"keywords": ["c++"]}, "I like C++.", ["I like ccc."]),
    ("keywords:frequency", {"keyword": "day", "relation": "at least", "frequency": 2}, "Today is a day.", ["A day."]),
    ("keywords:frequency", {"keyword": "day", "relation": "less than", "frequency": 2}, "A day.", ["Today is a day."]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "dog"]}, "A catalogue.", ["The Cat.", "cat dog", "no dog"]),
    ("keywords:forbidden_words", {"forbidden_words": ["c++"]}, "c--", ["So c++, then."]),
    ("keywords:letter_frequency", {"letter": "E", "let_relation": "at least", "let_frequency": 3}, "Eleven", ["Seven"]),
    ("keywords:letter_frequency", {"letter": "!", "let_relation": "less than", "let_frequency": 2}, "Oh!", ["Oh!!"]),
    ("language:response_language", {"language": "fr"}, FRENCH, [ENGLISH, "你好，我是一个学生，很高兴认识你。", "12 + 3"]),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}, "I came. I saw!", ["Dr. J. Smith came at 3.30."]),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 2}, "One only", ["One. Two.", "Why? So"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", ["a", "a\n\nb", "a\n***\n\n***\nb", "a *** b *** c"]),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "well-made it", ["two, words"]),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, "two, words", ["well-made it"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Yes"}, "No.\n\n'Yes', so",
     ["No.\n\nYesterday", "yes\n\nno", "Yes", "a\n\nyes\n\nb", "a\nyes"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", ["[name]", "[a] [b", "[a\n] [b]", "[[a]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\np. s. more", ["Bye. PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye. P.P.S more", ["Bye. P.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "So:\n* a\n  - b", ["* a", "* a\n* b\n* c", "**a**\n* b"]),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", ["Maybe.", "my answer is no."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b c*", ["*a* and **", "*a\n* b", "*a*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\nx\nSection 2\ny",
     ["Section 1\nSection B", "section 1\nsection 2"]),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, null]}\n```', ["{'a': 1}", 'So: {"a": 1}', "```\n```", "[" * 100_000]),
    ("detectable_format:title", {}, "<<Of rain>>\nIt fell.", ["<Of rain>", "<<>>", "<<a\n>>", "<<  >>"]),
    ("combination:two_responses", {}, "One.\n******\nTwo.", ["One.", "One.******One.", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, "say hi. Hi!", ["Hi! Say hi."]),
    ("startend:end_checker", {"end_phrase": "That is all."}, '"So it is. that is all."', ["That is all. Bye."]),
    ("startend:quotation", {}, '"So it is."', ['"So" it is.', '"', "'So'"]),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}, "NASA and the U.S. Army", ["A Cat"]),
    ("change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 2}, "A Cat", ["READ-ME and NASA"]),
    ("change_case:english_capital", {}, ENGLISH.upper(), [ENGLISH, FRENCH.upper(), ENGLISH.upper() + "a"]),
    ("change_case:english_lowercase", {}, ENGLISH, [ENGLISH.capitalize(), FRENCH.lower()]),
    ("punctuation:no_comma", {}, "Plain; and short.", ["So, no."]),
    ("own:all_capital", {}, "PARIS.", ["Paris.", "12"]),
    ("own:all_lowercase", {}, "paris.", ["Paris.", "12"]),
    ("own:only_digits", {}, "0042", ["42.", "4 2", "-4", "٤٢"]),
    ("own:start", {"start_phrase": "Dear guest"}, "dear guest, yes.", ["Hello, dear guest."]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_each_instruction_is_followed_by_one_answer_and_not_by_others(
    name: str, arguments: dict[str, Any], good: str, bad: list[str]
) -> None:
    assert followed(good, [name], [arguments]) == [True]
    assert [followed(text, [name], [arguments]) for text in bad] == [[False]] * len(bad)
    assert followed("", [name], [arguments]) == followed(" \n", [name], [arguments]) == followed(None, [name], [arguments]) == [False]


def test_every_id_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)
    assert len([name for name in CHECKS if not name.startswith("own:")]) == 25


# The public checker: lm-eval's copy. Two packages it imports are no part of lm-eval's own requirements, and its sentence splitter downloads
# a model: they are stood in for, and what rests on them is not compared.


@pytest.fixture(scope="module")
def oracle() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        detect = types.ModuleType("langdetect")
        detect.LangDetectException, detect.detect = ValueError, lambda text: "en"  # type: ignore[attr-defined]
        frozen = types.ModuleType("immutabledict")
        frozen.immutabledict = dict  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "langdetect", detect)
        patch.setitem(sys.modules, "immutabledict", frozen)
        nltk = pytest.importorskip("nltk")
        patch.setattr(nltk.data, "find", lambda name: name)
        patch.setattr(nltk, "word_tokenize", partial(nltk.word_tokenize, preserve_line=True))
        from lm_eval.tasks.ifeval import utils

        yield utils


def strict(oracle: Any, name: str, arguments: dict[str, Any], text: str) -> bool:
    row = oracle.InputExample(key=0, instruction_id_list=[name], prompt="", kwargs=[arguments])
    return bool(oracle.test_instruction_following_strict(row, text).follow_all_instructions)


COMPARED = [
    (name, arguments)
    for name, arguments, *_ in CASES
    if name.partition(":")[0] not in ("own", "language")
    and name not in ("length_constraints:number_sentences", "change_case:english_capital", "change_case:english_lowercase")
    and "c++" not in str(arguments)
    and arguments.get("letter") != "!"
]
PIECES = [
    *("apple", "Pear", "day", "Today", "cat", "dogs", "E", "NASA", "READ-ME", "it's", "Yes", "no", "two", "1", "A", "éÉ"),
    *("My answer is no.", "Say hi.", "That is all.", "P.S.", "p. p. s", "Section 1", "Section", "Section 22"),
    *(" ", " ", " ", "\n", "\n\n", "\n\n\n", "\t", "***", "******", "*", "**", "* a", "\n- b", "\n* c"),
    *("[x]", "[", "]", "<<", ">>", "<<t>>", "<", ">", '"', "'", ",", ".", "?", "```", "```json", '{"a": 1}', "[1, 2]"),
]


def lone_star(text: str) -> bool:
    return any(line.strip() == "*" for line in text.split("\n"))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join))
@example("Say hi.\n\nYes")
@example("One.******Two.******")
def test_the_public_checker_gives_the_same_verdicts(oracle: Any, text: str) -> None:
    text = text.strip()  # as the verifier does first
    for name, arguments in COMPARED:
        if "bullet" in name and lone_star(text):
            continue
        ours = check(name, arguments)(text) if text else False
        assert ours == strict(oracle, name, arguments, text), (name, arguments)


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_the_public_checker_agrees_on_the_cases(oracle: Any, name: str, arguments: dict[str, Any], good: str, bad: list[str]) -> None:
    if (name, arguments) in COMPARED:
        assert strict(oracle, name, arguments, good)
        assert not any(strict(oracle, name, arguments, text) for text in bad if len(text) < 10_000)  # json.loads overflows its stack there


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two! Three? Four", 4),
        ('He said "Stop!" Then he left.', 2),
        ("Mr. and Mrs. J. Doe met Dr. Who at 3.30 p.m. on www.x.com.", 1),
        ("We left at 5 p.m. Then it rained.", 2),
        ("Well... maybe. Wait... What?!", 3),
        ("1. First.\n2. Second.", 2),
        ("It was 1999. Then 2000.", 2),
        ("Apples, e.g. Boskop, pears, etc. are fruit.", 1),
        ("一。二！三？", 3),
        ("यह एक है। वह दो है।", 2),
        ("So . it goes ! !", 2),
    ],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert sentences(text) == count


TEXTS = {
    "en": "The old bridge was built by the people of the village, and it is still used today.",
    "es": "El viejo puente fue construido por la gente del pueblo y todavía se usa hoy, pero no es muy seguro.",
    "pt": "A ponte velha foi construída pelos moradores da aldeia e ainda hoje é usada, mas não é muito segura.",
    "fr": FRENCH,
    "de": "Die alte Brücke wurde von den Leuten des Dorfes gebaut und ist noch heute in Gebrauch.",
    "it": "Il vecchio ponte è stato costruito dalla gente del villaggio ed è ancora usato oggi, ma non è molto sicuro.",
    "nl": "De oude brug is door de mensen van het dorp gebouwd en wordt nog steeds gebruikt.",
    "pl": "Stary most został zbudowany przez mieszkańców wioski i jest nadal używany, ale nie jest to bezpieczne.",
    "vi": "Cây cầu cũ được người dân trong làng xây dựng và vẫn còn được sử dụng cho đến ngày nay.",
    "sw": "Daraja la zamani lilijengwa na watu wa kijiji na bado linatumika leo, lakini si salama sana kwa watoto.",
    "fi": "Vanha silta on kylän asukkaiden rakentama, ja se on yhä käytössä, mutta se ei ole kovin turvallinen.",
    "ru": "Старый мост был построен жителями деревни, и он используется до сих пор, но это не очень безопасно.",
    "uk": "Старий міст був побудований мешканцями села, і він використовується досі, але це не дуже безпечно.",
    "bg": "Старият мост е построен от хората в селото и все още се използва, но не е много безопасен.",
    "ar": "الجسر القديم بناه أهل القرية وهو لا يزال مستخدما حتى اليوم على الرغم من أنه غير آمن.",
    "fa": "پل قدیمی را مردم روستا ساخته‌اند و هنوز هم از آن استفاده می شود، اما این پل برای کودکان امن نیست.",
    "ur": "پرانا پل گاؤں کے لوگوں نے بنایا تھا اور یہ آج بھی استعمال ہوتا ہے، لیکن یہ بہت محفوظ نہیں ہے۔",
    "hi": "पुराना पुल गाँव के लोगों ने बनाया था और यह आज भी इस्तेमाल होता है, लेकिन यह बहुत सुरक्षित नहीं है।",
    "mr": "जुना पूल गावातील लोकांनी बांधला आणि तो आजही वापरात आहे, पण तो खूप सुरक्षित नाही.",
    "ne": "पुरानो पुल गाउँका मानिसहरूले बनाएका थिए र यो आज पनि प्रयोग हुन्छ, तर यो धेरै सुरक्षित छैन।",
    "ja": "古い橋は村の人々によって建てられ、今でも使われています。",
    "zh": "这座古老的桥是由村里的人建造的，至今仍在使用。",
    "ko": "오래된 다리는 마을 사람들이 지었고 지금도 사용되고 있습니다.",
    "th": "สะพานเก่าสร้างโดยชาวบ้าน",
    "he": "הגשר הישן נבנה על ידי אנשי הכפר",
    "bn": "পুরানো সেতুটি গ্রামের লোকেরা তৈরি করেছিল",
    "ta": "பழைய பாலம் கிராம மக்களால் கட்டப்பட்டது",
    "te": "పాత వంతెనను గ్రామ ప్రజలు నిర్మించారు",
    "kn": "ಹಳೆಯ ಸೇತುವೆಯನ್ನು ಗ್ರಾಮದ ಜನರು ನಿರ್ಮಿಸಿದರು",
    "gu": "જૂનો પુલ ગામના લોકોએ બાંધ્યો હતો",
    "pa": "ਪੁਰਾਣਾ ਪੁਲ ਪਿੰਡ ਦੇ ਲੋਕਾਂ ਨੇ ਬਣਾਇਆ ਸੀ",
    "ml": "പഴയ പാലം ഗ്രാമവാസികൾ നിർമ്മിച്ചതാണ്",
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_languages_of_ifeval_are_told(language: str) -> None:
    """And of no other language is a text said to be."""
    assert langid.identify(TEXTS[language]) == language
    assert [other for other in TEXTS if langid.is_in(TEXTS[language], other) is not False] == [language]


@pytest.mark.parametrize(
    ("text", "language", "told"),
    [
        ("Hello there", "en", None),  # too few words
        ("Hello there", "ru", False),  # but of another script
        ("東京大学", "ja", None),  # may be Chinese
        (TEXTS["en"], "eo", None),  # a language without a list
        ("Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor", "es", None),
        ("3.14159", "en", False),  # in no language
    ],
)
def test_what_cannot_be_told_is_not_said(text: str, language: str, told: bool | None) -> None:
    assert langid.is_in(text, language) is told


def row(*pairs: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """As google/IFEval has them: every argument that any instruction knows, null where it is not for this one."""
    unused = dict.fromkeys(("num_words", "keywords", "relation", "end_phrase", "language", "capital_frequency"))
    return {"instruction_id_list": [name for name, _ in pairs], "kwargs": [{**unused, **arguments} for _, arguments in pairs]}


COMMA = ("punctuation:no_comma", dict[str, Any]())
LONG = ("length_constraints:number_words", {"num_words": 3.0, "relation": "at least"})  # as pandas reads it
ENGLISH_ONLY = ("language:response_language", {"language": "en"})


def test_all_instructions_must_be_followed() -> None:
    verifier = get("instructions")
    said = [
        "one two three",
        "one, two, three",
        "one",
        "<think>a, b</think>\n\none two three",
        "<think>one two three",
        "<think>x</think>",
        "",
    ]
    rows = [row(COMMA, LONG)] * len(said)
    columns = {key: [r[key] for r in rows] for key in rows[0]}
    found = verifier(prompts=[""] * len(said), completions=said, completion_ids=[[]] * len(said), **columns)
    assert found == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_an_undecided_instruction_leaves_the_answer_unjudged_unless_another_is_broken() -> None:
    problem = Problem("file", "Say hello.", "k", row(COMMA, ENGLISH_ONLY), "instructions")
    outputs = [Output([1], [0.0], "stop", text) for text in ("Hello there", "Hello, there", TEXTS["en"].replace(",", ""), TEXTS["fr"])]
    assert judge([problem], [outputs]).verdicts == [[Verdict.UNJUDGED, Verdict.WRONG, Verdict.RIGHT, Verdict.WRONG]]


def test_the_share_that_is_followed() -> None:
    def share(text: str) -> float | None:
        told = row(COMMA, LONG, ENGLISH_ONLY)
        return share_followed(text, told["instruction_id_list"], told["kwargs"])

    assert share(TEXTS["en"]) == pytest.approx(2 / 3) and share("Hello") == 0.5 and share("") == 0.0
    assert share_followed("Hello", ["language:response_language"], [{"language": "en"}]) is None


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("keyword:existence", {}, "no instruction 'keyword:existence'; did you mean 'keywords:existence'"),
        ("punctuation:no_comas", {}, "did you mean 'punctuation:no_comma'"),
        ("length_constraints:number_words", {"num_words": None, "relation": "at least"}, "needs num_words, a whole number; it is missing"),
        ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "it is True"),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}, r"it is 2\.5"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "needs relation, 'less than' or 'at least'"),
        ("keywords:existence", {"keywords": "apple"}, "a list of words"),
        ("keywords:letter_frequency", {"letter": "ab", "let_relation": "at least", "let_frequency": 1}, "one character"),
        ("startend:end_checker", {"end_phrase": " "}, "needs end_phrase, a text"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"},
            "from 1 to num_paragraphs",
        ),
    ],
)
def test_wrong_data_is_refused_in_one_sentence(name: str, arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        followed("An answer.", [name], [arguments])


def test_a_problem_without_instructions_is_refused() -> None:
    for ids, tables in ([], []), (["punctuation:no_comma"], []):
        with pytest.raises(BadInput, match="one id or more"):
            followed("An answer.", ids, tables)


@pytest.mark.parametrize(
    "piece", ["[", "<<", "\n", " ", "*", "* ", "<", ">>", "a", ". ", "p.", "Section ", "1", '"', "***", "``", "。", '{"a":']
)
def test_the_time_of_every_check_grows_with_the_length_of_a_hostile_answer_only(piece: str) -> None:
    """What is quadratic takes 400 times as long for 20 times the length."""

    def seconds(length: int) -> float:
        text = "x" + piece * (length // len(piece)) + "y"
        start = time.perf_counter()
        for name, arguments, *_ in CASES:
            check(name, arguments)(text)
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(200_000) < 100 * max(seconds(10_000), 1e-3)
