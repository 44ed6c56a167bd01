"""The verifiers integer and expression: every way a number is written reads as itself, and nothing else does."""

from collections.abc import Callable
from fractions import Fraction
from time import process_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.post.verifiers import judge, numbers
from pascaline.post.verifiers.numbers import expression, integer, integer_reading, reading


def score(verifier: Callable[..., Any], completion: str, gold: Any) -> float | None:
    found: list[float | None] = verifier([""], [completion], [[1]], answer=[gold])
    return found[0]


GOLDS = [  # texts of our own in GSM8K's manner, and their answers
    ("She had 16 - 3 = <<16-3=13>>13 left.\nThey cost 13 * 2 = $<<13*2=26>>26.\n#### 26", "26"),
    ("He paid 80,000+50,000=$<<80000+50000=130000>>130,000\n#### 130,000", "130000"),
    ("Together 2,520,000.\n#### 2,520,000", "2520000"),
    ("It fell to 5-12=<<5-12=-7>>-7 degrees\n#### -7", "-7"),
    ("Nothing was left: 3-3=<<3-3=0>>0\n#### 0", "0"),
    ("#### $18", "18"),
    ("#### 15%", "15"),
    ("2.00", "2"),
    ("5 apples", "5"),
    ("-3", "-3"),
    (42, "42"),
    (-1200, "-1200"),
    (42.0, "42"),
    ("The answer is $1,200.", "1200"),
]


@pytest.mark.parametrize(("gold", "value"), GOLDS)
def test_gold_answers_are_read_as_they_are_written(gold: Any, value: str) -> None:
    for verifier in (integer, expression):
        assert score(verifier, value, gold) == score(verifier, f"<think>1 or 2</think>#### {value}", gold) == 1.0
        assert score(verifier, str(int(value) + 1), gold) == score(verifier, "", gold) == 0.0
        assert score(verifier, f"<think>{value}", gold) == 0.0  # the thought never ended


@pytest.mark.parametrize(
    "text",
    [
        *("42", " 42\n", "42.", "42.0", "42.00", "042", "+42", "$42", "42 $", "€42", "42%", "42 %", "42 apples", "42km", "a 42-day trip"),
        *("(42)", "**42**", "*42.*", '"42"', "42!", "42, then", "x=42", "x = 42", "42 m²", "42 m^2", "so -> 42", "答案是42", "42个"),
        *("#### 42", "####42", "#### $42.00", "#### **42**", "40+2=42\n#### 42", "#### Step 1\n40 and 2\n#### 42 apples", "#### 42\nYes!"),
        *(
            "\\boxed{42}",
            "$\\boxed{42}$",
            "So 40+2 is \\(\\boxed{42\\text{ km}}\\).",
            "\\boxed{\\$42}",
            "\\boxed{42\\%}",
            "\\boxed{x = 42}",
        ),
        *("\\boxed{42\\text{ cm}^2}", "\\boxed{42}, so \\boxed{42.0}", "#### 1. Add 40 and 2\n\\boxed{42}", "\\boxed{42^\\circ}"),
        *("The answer is 42.", "40 + 2 gives 42. The answer is 42.", "The answer is: 42", "Answer: 42", "**Answer:** 42", "answer = 42"),
        *("**Final Answer**: $42$", "Answer:\n\n**42**", "The answer is $42. I added 40 and 2.", "<answer>42</answer>", '{"answer": 42}'),
        *("<answer>\n42\n</answer>", "It makes 42 apples, so there are 42.", "There are 42.\n42", "It is – I think – 42"),
        *("GPT-4 says 42", "Of H2O, 42", "For x_1 it is 42"),
    ],
)
def test_ways_to_say_forty_two(text: str) -> None:
    assert integer_reading(text) == reading(text) == "42"


@pytest.mark.parametrize(
    "text",
    [
        *("1 2 3 4 42", "42 43", "42, 41", "40 42", "1\n2\n42", " ".join(map(str, range(43))), "42 or 43", "between 41 and 42"),
        *("The answer is 42 or 43.", "Answer: 41\nAnswer: 42", "#### 41\n#### 42", "\\boxed{41} \\boxed{42}", "\\boxed{41, 42}"),
        *("#### 1 2 42", "<answer>41</answer><answer>42</answer>", "40+2=42", "42=42"),
        *(
            "42-42",
            "3-42",
            "41–42",
            "42–42",
            "42:42",
            "42/42",
            "42/1",
            "84/2",
            "40+2",
            "6*7",
            "6×7",
            "42 x 42",
            "\\frac{84}{2}",
            "6\\times7",
        ),
        *("4,2", "42,0", "0,042", "4 2", "42.1", "42.0.0", "42..0", "1.42", "..42", "42,00", "1,42", "4\u00a02"),
        *("-42", "−42", "$-42", "-$42", "- 42", "–42", "--42", "-(42)", "-$(42)", "42e0", "42e1", "42E+2", "42^1", "42^{2}", "42²", "42½"),
        *(
            "42+",
            "42k",
            "42M",
            "42 million",
            "42 Thousand",
            "42-hundred",
            "42 dozen",
            "$42bn",
            "42万",
            "42x",
            "> 42",
            "<42",
            "≈42",
            "~ 42",
            "√42",
        ),
        *("４２", "٤٢", "४२", "④②", "four2", "forty-two", "0x2a", "x42", "", " ", "none", "\\boxed{}", "\\boxed{42", "\\boxed{none} 42"),
        *("\\boxed{\\sqrt{42}}", "\\boxed{\\pi 42}", "1\\frac{42}{42}", "(" * 20 + "42", "-" + "(" * 16 + "42", "10^{42}"),
    ],
)
def test_what_is_not_forty_two(text: str) -> None:
    assert integer_reading(text) != "42"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("3/4", "3/4"), ("6/8", "3/4"), ("0.75", "3/4"), (".75", "3/4"), ("1/2+1/4", "3/4"), ("75/100", "3/4"), ("3/4 cups", "3/4")),
        *(("It is 3/4 of it.", "3/4"), ("The answer is $\\frac{3}{4}$.", "3/4"), ("\\boxed{\\dfrac34}", "3/4"), ("x = 3/4", "3/4")),
        *(("-3/4", "-3/4"), ("-\\frac{3}{4}", "-3/4"), ("-(3/4)", "-3/4"), ("3/-4", "-3/4"), ("−0.75", "-3/4"), ("-0.75", "-3/4")),
        *(("0.1+0.2", "3/10"), ("1/3+1/6", "1/2"), ("2*-3", "-6"), ("2--3", "5"), ("-(-5)", "5"), ("-2*3", "-6"), ("-2-3", "-5")),
        *(("1,200/2", "600"), ("2/\\frac{1}{2}", "4"), ("6×7", "42"), ("84÷2", "42"), ("3-5", "-2"), ("(1+2)*3", "9"), ("+5", "5")),
        *(("15%", "15"), ("1.50", "3/2"), ("-0", "0"), ("0.0", "0"), ("007", "7"), ("9876543210/2", "4938271605")),
        *(("1 1/2", None), ("1/0", None), ("1/2/3 cups", None), ("1.2.3", None), ("1,20+1", None), ("01+1", None), ("2**3", None)),
        *(
            ("1 + 2 = 3", None),
            ("5 3", None),
            ("3/4 or 0.5", None),
            ("1/2 and 2/4", "1/2"),
            ("2(3)", None),
            ("1/(1-1)", None),
            ("1+(2", None),
            ("x2-42", None),
            ("(y)-42", None),
        ),
    ],
)
def test_expressions_have_one_exact_value(text: str, value: str | None) -> None:
    assert reading(text) == value


def test_huge_numbers_are_exact_and_longer_ones_are_no_numbers() -> None:
    huge = "9" * numbers.MAX_DIGITS
    assert integer_reading(huge) == huge and integer_reading(f"-{huge}") == f"-{huge}"
    assert score(integer, huge[:-1] + "8", huge) == 0.0
    assert integer_reading(huge + "9") is None and reading("1/" + huge) is None
    assert score(integer, str(2**53), str(2**53 + 1)) == 0.0  # equal as floats
    assert score(expression, "0.1000000000000000000000000001", "0.1") == 0.0


UNITS = ["", " apples", " km", "%", " m²", " dollars.", " years old", "!"]
MARKS = [
    "{}",
    "#### {}",
    "Work: 1+1=2\n#### {}",
    "\\boxed{{{}}}",
    "1 and 2 make it: the answer is {}",
    "**Answer:** {}",
    "<answer>{}</answer>",
]


@given(
    st.integers(-(10**40), 10**40),
    st.booleans(),
    st.sampled_from(["", "$", "€", "£"]),
    st.sampled_from(["", ".0", ".00"]),
    st.sampled_from(UNITS),
    st.sampled_from("-−"),
    st.sampled_from(MARKS),
)
def test_any_whole_number_reads_back_as_it_was_written(
    n: int, commas: bool, currency: str, decimals: str, unit: str, minus: str, mark: str
) -> None:
    written = f"{minus if n < 0 else ''}{currency}{f'{abs(n):,}' if commas else abs(n)}{decimals}{unit}"
    assert integer_reading(mark.format(written)) == reading(mark.format(written)) == str(n)


@given(st.fractions(max_denominator=10**6), st.integers(1, 50), st.sampled_from(MARKS))
def test_any_fraction_reads_back_however_it_is_extended(q: Fraction, by: int, mark: str) -> None:
    for over, under in ((q.numerator * by, q.denominator * by), (q.numerator, q.denominator)):
        assert reading(mark.format(f"{over}/{under}")) == reading(mark.format(f"\\frac{{{over}}}{{{under}}}")) == str(q)


PIECES = [
    *"0123456789+-*/=^()[]{}.,:;$%#_ \n\\<>&−–—×÷½²５x",
    "####",
    "\\boxed{",
    "\\frac{",
    "}{",
    "\\text{",
    "answer is ",
    "42",
    "million",
]


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
@settings(max_examples=500)
def test_any_text_has_a_reading_or_none_and_reads_back_as_itself(text: str) -> None:
    for read in (reading, integer_reading):
        value = read(text)
        if value is not None:
            assert reading(value) == value and str(Fraction(value)) == value
            assert read is reading or "/" in value or integer_reading(value) == value


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=40, unique=True), st.sampled_from([" ", ", ", "\n", " or ", " .. ", " and ", "; "])
)
def test_a_list_of_guesses_is_no_answer(guesses: list[int], comma: str) -> None:
    for mark in ("{}", "So {}", "\\boxed{{{}}}"):
        assert integer_reading(mark.format(comma.join(map(str, guesses)))) is None


HOSTILE = [
    *("9", "1 ", "5 apples ", "(", ")", "-", " ", "\n", ".", ",", "$", "1,234,", "1/", "1+", "#### ", "#### 5\n", "#### x ", "answer: "),
    *("answer is 5 ", "answer ", "the answer is 5.\n", "\\boxed{", "\\boxed{5}", "\\boxed{{", "}", "\\frac{", "\\frac{1}{2}", "\\text{a}"),
    *("\\text{", "\\,", "{,}", "\\", "^", "½", "５", "x = ", "*", "42 m² ", "\\circ ", " {", "\\left", "<answer>", "-(", "$-", "\u2212"),
]


@pytest.mark.parametrize("piece", HOSTILE, ids=ascii)
def test_time_is_linear_whatever_the_text(piece: str) -> None:
    def spent(times: int) -> float:
        text = piece * times + "x"
        best = float("inf")
        for _ in range(3):
            start = process_time()
            reading(text)
            integer_reading(text)
            best = min(best, process_time() - start)
        return best

    assert spent(10_000) < 40 * spent(1_000) + 0.02  # 10 if linear, 100 if quadratic


@pytest.mark.parametrize(
    "gold", ["", "none", "forty-two", "1 2", "#### 1 2", "5 million", "2.5", "3/4", "1,20", None, True, [42], {"a": 42}, 2.5, 1e30]
)
def test_a_gold_that_cannot_be_read_is_refused_by_name(gold: Any) -> None:
    with pytest.raises(BadInput, match=r"verifier 'integer': the gold answer .* must be one whole number"):
        score(integer, "42", gold)
    problem = Problem("file", "?", "?", {"answer": gold}, "integer")
    with pytest.raises(BadInput, match="the gold answer"):
        judge([problem], [[Output([1], [0.0], "stop", "42", "")]])


def test_the_gold_column_has_one_of_four_names_and_golds_go_with_their_answers() -> None:
    for name in ("answer", "solution", "ground_truth", "label"):
        assert integer(["", ""], ["1", "1"], [[], []], **{name: ["1", "2"], "question": ["", ""]}) == [1.0, 0.0]
    with pytest.raises(BadInput, match="needs a column answer or solution or ground_truth or label; the problems have gold"):
        integer([""], ["1"], [[]], gold=["1"])
    with pytest.raises(BadInput, match="'expression': the gold answer 'half' must be one number, fraction or sum"):
        score(expression, "1/2", "half")


@pytest.mark.parametrize(
    ("name", "said", "verdict"),
    [
        ("integer", "42", Verdict.RIGHT),
        ("integer", "I think 42", Verdict.RIGHT),
        ("integer", "84/2", Verdict.WRONG),
        ("expression", "84/2", Verdict.RIGHT),
        ("expression", "43", Verdict.WRONG),
    ],
)
def test_both_are_found_by_name(name: str, said: str, verdict: Verdict) -> None:
    problem = Problem("file", "?", "?", {"answer": "6*7=42\n#### 42"}, name)
    assert judge([problem], [[Output([1], [0.0], "stop", said, "not 41")]]).verdicts == [[verdict]]
