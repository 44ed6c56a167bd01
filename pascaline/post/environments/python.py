"""Python in the sandbox of the verifier `code`: each call is a program of its own, and its result what it prints."""

from pascaline.post.environments.base import Refused, Tool
from pascaline.post.verifiers import sandbox
from pascaline.post.verifiers.code import program
from pascaline.post.verifiers.sandbox import Limits, Ran


class Python(Tool):
    """limits: of each program; more than it may print, and it is stopped."""

    hint = "Write <tool>print(12*7)</tool> to have a Python program run; what it prints follows, as <result>84</result>."

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits(output=1 << 16)

    def call(self, argument: str) -> str:
        """What the program printed, and behind it what went wrong; RuntimeError where the machine, not the program, is at fault."""
        ran = sandbox.run(program(argument), "", self.limits)
        if ran.ended in ("starved", "sandbox"):
            raise RuntimeError(f"the sandbox could not run a program: {ran.stderr.strip()[-200:] or ran.ended}")
        wrong = self._wrong(ran)
        printed = ran.stdout.strip("\n")
        if not printed:
            raise Refused(wrong or "nothing was printed")
        return f"{printed}\nerror: {wrong}" if wrong else printed

    def _wrong(self, ran: Ran) -> str:
        """Why it is no good end, "" if it is one."""
        limits = self.limits
        if ran.ended == "exit":
            told = ran.stderr.strip().rpartition("\n")[2]  # a traceback's last line
            return (told or f"the program ended with status {ran.status}") if ran.status else ""
        return {
            "cpu": f"stopped after {limits.cpu} seconds of computing",
            "wall": f"stopped after {limits.wall:g} seconds",
            "output": f"stopped: it wrote more than {limits.output} bytes",
        }.get(ran.ended, f"the program was killed by signal {-(ran.status or 0)}")
