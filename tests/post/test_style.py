"""The verifiers format and language."""

from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascaline.data import quality
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.post.verifiers import get, judge, style


def scored(name: str, completion: str, **columns: Any) -> float | None:
    return get(name)([""], [completion], [[1]], **{key: [value] for key, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>2+2</think>4", 1.0),
        ("<think>\n2+2\n</think>\n\n4\n", 1.0),
        ("<think></think>4", 0.0),
        ("<think> \n</think>4", 0.0),
        ("<think>2+2</think>", 0.0),
        ("<think>2+2</think> \n", 0.0),
        ("<think>2+2", 0.0),
        ("2+2</think>4", 0.0),
        ("4", 0.0),
        ("", 0.0),
        ("So: <think>2+2</think>4", 0.0),
        ("<think><think>2+2</think>4", 0.0),
        ("<think>2+2</think>4</think>", 0.0),
        ("<think>2+2</think>4<think>5", 0.0),
        ("<think>2</think><think>2</think>4", 0.0),
        ("<THINK>2+2</THINK>4", 0.0),
    ],
)
def test_format_is_one_thought_and_an_answer(completion: str, score: float) -> None:
    assert scored("format", completion) == score


@pytest.mark.parametrize(
    ("thought", "language", "share"),
    [
        ("So we add two and three.", "en", 1.0),
        ("So we add two и три.", "en", 4 / 6),
        ("I see a два", "en", 3 / 4),
        ("Сложим два и три.", "ru", 1.0),
        ("Сложим два and three.", "ru", 2 / 4),
        ("Сложим два и три.", "en", 0.0),
        ("Wir zählen, dann c'est ça: über-groß!", "de", 1.0),  # French too is Latin
        ("我们先加 two 再减", "zh", 6 / 7),
        ("So 我们 add", "en", 2 / 4),
        ("we算then", "en", 2 / 3),
        ("設 x = 5,則 f(x) = 3x + y", "zh", 1.0),
        ("設 `print(the_sum)` 則", "zh", 1.0),
        ("設\n```\nfor number in numbers:\n  print number\n```\n則", "zh", 1.0),
        ("まず カードを 数える", "ja", 1.0),
        ("먼저 둘을 더한다", "ko", 1.0),
        ("먼저 둘을 加 한다", "ko", 3 / 4),
        ("पहले दो और तीन जोड़ें", "hi", 1.0),
        ("पहले दो और तीन add", "hi", 4 / 5),
        ("أولا نجمع اثنين", "ar", 1.0),
        ("קודם נחבר two", "he", 2 / 3),
        ("Η απάντηση είναι π", "el", 1.0),
        ("Let α be the angle, then 2π is 𝐱 in ℝ", "en", 1.0),
        ("Let λόγος be it", "en", 3 / 4),
        ("3+4=7, 7*2=14", "en", 1.0),
        ("3+4=7, 7*2=14", "zh", 1.0),
        ("", "en", 1.0),
        ("\\frac{1}{2} x^2 = \\text{sum}", "ru", 1.0),
        ("`привет` `мир` hello", "en", 1 / 3),  # no hiding in code
        ("x=привет hello", "en", 1 / 2),
        ("résumé naïve Việt", "en", 1.0),
        ("re\u0301sume\u0301", "fr", 1.0),
        ("ｆｕｌｌ ｗｉｄｔｈ", "en", 1.0),
    ],
)
def test_language_is_the_share_of_words_in_its_script(thought: str, language: str, share: float) -> None:
    assert scored("language", f"<think>{thought}</think>мир", language=language) == pytest.approx(share)


def test_the_language_is_english_if_none_is_named_and_regions_are_no_matter() -> None:
    assert scored("language", "<think>two три</think>5") == 0.5
    for tag in ("zh-CN", "zh_Hant", "ZH"):
        assert scored("language", "<think>我们 now</think>5", language=tag) == pytest.approx(2 / 3)
    assert scored("language", "no thought", language="ru") == scored("language", "<think>", language="ru") == 1.0
    assert scored("language", "<think>cut off in", language="ru") == 0.0
    assert get("language")(["", ""], ["<think>two</think>", "<think>два</think>"], [[], []], language=["en", "en"]) == [1.0, 0.0]


@pytest.mark.parametrize("language", ["xx", "english", "", None, 5])
def test_an_unknown_language_is_refused(language: Any) -> None:
    with pytest.raises(BadInput, match="verifier 'language': no language"):
        scored("language", "<think>a</think>b", language=language)


def test_every_language_has_scripts_that_exist() -> None:
    quality.script("", scripts=tuple(frozenset().union(*style.LANGUAGES.values())))  # refuses a name that no letter has


def test_a_share_below_the_mark_is_not_right() -> None:
    problems = [Problem("file", "?", "?", {"language": "en"}, name) for name in ("language", "format")]
    said = [[Output([1], [0.0], "stop", "4", "two и три"), Output([1], [0.0], "stop", "4", "two and two")]] * 2
    assert judge(problems, said).verdicts == [[Verdict.WRONG, Verdict.RIGHT], [Verdict.RIGHT, Verdict.RIGHT]]


@given(st.text(max_size=80), st.sampled_from(sorted(style.LANGUAGES)))
def test_any_thought_has_a_share(text: str, language: str) -> None:
    assert 0.0 <= style.share(text, language) <= 1.0
    assert scored("format", text) in (0.0, 1.0)


@pytest.mark.parametrize(
    "piece", ["a", "a-", "a ", "`", "``` ", "`a\n", "字", "字 ", "я", "я a ", "\u0301", "'", "-", "—", "ﷺ", " ", "<think>"], ids=ascii
)
def test_time_is_linear_whatever_the_thought(piece: str) -> None:
    def spent(times: int) -> float:
        best = float("inf")
        for _ in range(3):
            start = process_time()
            style.share(piece * times, "en")
            scored("format", "<think>" + piece * times + "</think>")
            best = min(best, process_time() - start)
        return best

    assert spent(20_000) < 40 * spent(2_000) + 0.02  # 10 if linear, 100 if quadratic
