"""A calculator: exact whole numbers and fractions, read by the puzzles' own strict reader."""

from pascaline.data.puzzles.expression import MAX_DIGITS, MAX_LENGTH, evaluate
from pascaline.post.environments.base import Refused, Tool


class Calculator(Tool):
    hint = "Write <tool>12*7</tool> to have something calculated; <result>84</result> follows."

    def call(self, argument: str) -> str:
        """The value, "84" or in lowest terms "3/4"."""
        found = evaluate(argument.strip())
        if found is None:
            raise Refused(f"write whole numbers of at most {MAX_DIGITS} digits with + - * / and brackets, {MAX_LENGTH} characters at most; "
                          "nothing is divided by 0, and a number has no sign of its own")  # fmt: skip
        return str(found[0])
