"""Who judges a run's rows: what it says is in the rows and on screen, and it can end the run, again after a resume."""

from pathlib import Path
from typing import Any

import pytest
from trainee import Watched, loader, rows, trainer, weights

from pascaline.errors import BadInput
from pascaline.post.alarms import Alarms
from pascaline.tables import Alarms as Table
from pascaline.tables import Rl


def telling(facts: list[dict[str, Any]]) -> Watched:
    """A source that tells these of its steps."""
    source = loader()
    return Watched(lambda step, batches: source.facts.update(facts[step]) or batches, source)


def series(steps: int = 12) -> list[dict[str, Any]]:
    return [{"reward": 0.0, "unjudged": 0.5 if step >= 6 else 0.0} for step in range(steps)]


def watched(folder: Path, **alarms: Any) -> Any:
    one = trainer(folder, save_every=4)
    one.watch = Alarms("toy", Rl(alarms=Table(window=2, **alarms)))
    return one


def test_a_warning_is_in_the_rows_and_changes_no_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path / "plain", save_every=4).run(telling(series()), 12, quiet=True)
    watched(tmp_path / "warned").run(telling(series()), 12)
    assert capsys.readouterr().err.count("could not be judged") == 1
    found = rows(tmp_path / "warned")
    assert [row["step"] for row in found if row.get("alarms") == ["unjudged"]] == list(range(6, 12))
    assert [{k: v for k, v in row.items() if k != "alarms"} for row in found] == rows(tmp_path / "plain")
    assert weights(tmp_path / "warned") == weights(tmp_path / "plain")


def test_stop_ends_the_stage_a_resume_says_it_again_and_without_stop_it_goes_on(tmp_path: Path) -> None:
    folder, said = tmp_path / "run", []
    for _ in range(2):
        with pytest.raises(BadInput, match=r"^toy step 6: 25\.0% of the answers could not be judged") as error:
            watched(folder, stop=True).run(telling(series()), 12, quiet=True)
        said.append(str(error.value))
        assert [row["step"] for row in rows(folder)] == list(range(7)) and rows(folder)[-1]["alarms"] == ["unjudged"]
    assert said[0] == said[1]
    watched(folder, stop=False).run(telling(series()), 12, quiet=True)
    watched(tmp_path / "straight").run(telling(series()), 12, quiet=True)
    assert rows(folder) == rows(tmp_path / "straight") and weights(folder) == weights(tmp_path / "straight")


def test_what_was_told_before_a_crash_is_not_told_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Crash(Exception):
        pass

    source = telling(series())
    act = source.act
    source.act = lambda step, batches: act(step, batches) if step < 9 else (_ for _ in ()).throw(Crash)
    with pytest.raises(Crash):
        watched(tmp_path).run(source, 12)
    watched(tmp_path).run(telling(series()), 12)  # from step 8
    assert capsys.readouterr().err.count("could not be judged") == 1
    assert [row["step"] for row in rows(tmp_path) if "alarms" in row] == list(range(6, 12))
