"""How a worked episode writes a call: plain text at the end of a turn, in the language of the environment that it is played in."""

from pascaline.errors import BadInput, nearest

OPEN, CLOSE = "<tool>", "</tool>"
LANGUAGES = {"calculator": "{}", "python": "print({})"}  # environment: how it is asked what an expression is


def call(environment: str, expression: str) -> str:
    """The words that have a whole-number expression calculated. BadInput for an environment that is not known to do so."""
    if environment not in LANGUAGES:
        raise BadInput(f"the puzzles have no worked calls for environment '{environment}'{nearest(environment, LANGUAGES)} (they have some "
                       f"for {', '.join(LANGUAGES)}); give the puzzle `turns` of its own, or name chats in sft.data.")  # fmt: skip
    return f"{OPEN}{LANGUAGES[environment].format(expression)}{CLOSE}"
