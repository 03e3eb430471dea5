"""What the boards said, read strictly and summed up plainly."""

import runpy
from pathlib import Path

import pandas as pd
import pytest

from conftest import REPOSITORY
from octofold.blend import ledger
from octofold.commands import Score
from octofold.config import load
from octofold.errors import UserError
from octofold.reports import boards, picks, scores
from octofold.track import tracking
from world import make_world

HEAD = "date,submission_file,public_score,private_score,category,notes\n"
ORIGINAL_000 = [
    (0.97154, 0.95200), (0.95882, 0.94231), (0.96904, 0.94745), (0.96972, 0.94878), (0.97338, 0.94675),
    (0.97338, 0.94675), (0.97338, 0.94803), (0.97338, 0.94892), (0.96798, 0.95515),
]  # fmt: skip


def history(folder: Path, text: str) -> Path:
    (folder / "past.csv").write_text(text, encoding="utf-8")
    return folder / "past.csv"


def test_original_000s_boards_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    rows = "".join(f"2026-02-0{n},s{n}.csv,{a},{b},blend,\n" for n, (a, b) in enumerate(ORIGINAL_000, start=1))
    found = scores.read_history(history(tmp_path, HEAD + rows))
    assert len(found) == 9
    assert scores.summary(found)["public_private_correlation"] == pytest.approx(-0.04, abs=0.01)
    assert any("number 7 of 9" in line or "number 8 of 9" in line for line in scores.told(found))


def test_where_lower_is_better_the_lowest_is_the_best(tmp_path: Path) -> None:
    losses = [scores.Score(name, public, private) for name, public, private in
              (("a", 0.5, 0.2), ("b", 0.1, 0.9), ("c", 0.3, 0.4))]  # fmt: skip
    lines = scores.told(losses, -1.0)
    assert [line[0] for line in lines[1:4]] == ["a", "c", "b"]
    assert "The best public score (0.10000, b) is number 3 of 3" in lines[-1]


def test_empty_scores_are_unknown_and_extra_columns_may_be_missing(tmp_path: Path) -> None:
    found = scores.read_history(history(tmp_path, "submission_file,public_score,private_score\na.csv,0.9,\n"))
    assert found[0].public == 0.9
    assert found[0].private != found[0].private
    assert scores.summary(found) == {"submissions": 1.0}


def test_intervals_are_held_to_account() -> None:
    said = [scores.Score("a", 0.9, 0.85, 0.86, 0.8, 0.9), scores.Score("b", 0.9, 0.7, 0.86, 0.8, 0.9)]
    found = scores.summary(said)
    assert found["inside_interval"] == 0.5
    assert found["estimate_error"] == pytest.approx(0.085)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("submission_file,public_score\n", "private_score"),
        (HEAD + ",a.csv,high,0.9,,\n", "line 2"),
        (HEAD + ",,0.9,0.9,,\n", "submission_file in every row"),
        (HEAD + ",a.csv,0.9,0.9,,\n,a.csv,0.8,0.9,,\n", "two for a.csv"),
        (HEAD + ",a.csv,nan,0.9,,\n", "line 2"),
        (HEAD + ",a.csv,0.9,0.9,,\n,b.csv,0,87,0,86,,\n", "more in line 3"),
    ],
)
def test_bad_histories_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scores.read_history(history(tmp_path, text))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes((HEAD + ",a.csv,0.9,0.9,caf\xe9,\n").encode("latin-1"))
    for odd in (tmp_path / "latin.csv", tmp_path):
        with pytest.raises(UserError, match="a CSV of past submissions, in UTF-8"):
            scores.read_history(odd)


def test_nothing_is_called_the_best_where_nobody_knows_the_direction(
    tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "ROOT", tmp_path)
    make_world(tmp_path / "data" / "points", 9, task="keypoints")
    make_world(tmp_path / "data" / "photos", 9)
    assert boards.direction("points") == -1
    assert boards.direction("photos") == 0
    assert boards.direction("photos", "log_loss") == -1
    assert boards.direction("nowhere", "mse") == -1
    with pytest.raises(UserError, match="metric 'mse'"):
        boards.direction("photos", "mse")
    losses = [scores.Score(name, public, private) for name, public, private in
              (("a", 0.5, 0.2), ("b", 0.1, 0.9), ("c", 0.3, 0.4))]  # fmt: skip
    assert not any("best public score" in line for line in scores.told(losses, 0.0))
    with tracking.run("blend", None, "photos", tags={"metric": "brier"}):
        pass
    assert boards.direction("photos") == -1


def test_flags_that_nothing_would_heed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "submission.csv").write_text("image,label\n")
    about = {"run_id": "r", "competition": "photos"}
    ledger.Ledger(pd.DataFrame({"sample_id": ["s"], "names": ['["s"]']}), about).save(tmp_path)
    assert boards.asked_for(Score(submission=tmp_path / "submission.csv", public=0.5)) == "photos"
    for words, config in {
        "--public, --notes": Score(competition="photos", public=0.9, notes="x"),
        "'photos', as the ledger": Score(competition="other", submission=tmp_path / "submission.csv"),
        "--submission, or --competition": Score(),
    }.items():
        with pytest.raises(UserError, match=words):
            boards.asked_for(config)
    with pytest.raises(UserError, match="competition"):
        load(Score, ["--competition", "it's"])


def test_a_mistyped_competition_is_refused_and_a_history_may_be_the_first_of_one(
    tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for room in (boards, picks):
        monkeypatch.setattr(room, "ROOT", tmp_path)
    make_world(tmp_path / "data" / "photos", 9)
    score = runpy.run_path(str(REPOSITORY / "entrypoints" / "score.py"))["run"]
    with tracking.run("score", None, "fotos"):  # left by an earlier slip
        pass
    with pytest.raises(UserError, match=r"prepared here \(photos\)"):
        score(Score(competition="fotos"))
    assert len(tracking.find_runs("fotos")) == 1
    assert score(Score(competition="photos"))["submissions"] == 0
    past = history(tmp_path, HEAD + "2026-01-02,a.csv,0.9,0.8,blend,\n")
    for asked in (Score(competition="elsewhere", history=past), Score(competition="elsewhere")):
        assert score(asked)["submissions"] == 1
    assert caplog.text.count("elsewhere is a new competition here") == 1


def test_a_history_read_again_is_brought_up_to_date(tmp_path: Path, mlruns: Path) -> None:
    with tracking.run("score", None, "photos") as run:
        for row in ("0.9,0.8,blend,first", "0.9,,stack,second"):
            boards.import_history(history(tmp_path, HEAD + "2026-01-02,a.csv," + row + "\n"), "photos", run)
        found = boards.recorded("photos")
        assert [(one.public, one.category, one.notes) for one in found] == [(0.9, "stack", "second")]
        assert found[0].private != found[0].private, "the score that the file no longer has"
        boards.import_history(history(tmp_path, HEAD + "2026-01-02,a.csv,,,stack,\n"), "photos", run)
        assert boards.recorded("photos") == []


def test_an_estimate_is_held_only_against_a_board_of_its_own_metric(mlruns: Path) -> None:
    numbers = {"score/public": 0.4, "estimate/low": 0.8, "estimate/high": 0.9, "estimate/accuracy": 0.85}
    for metric, own in {"accuracy": {}, "log_loss": {"estimate/log_loss": 0.5}, "mine": {"estimate/mine": 0.1}}.items():
        with tracking.run("blend", None, "photos", tags={"metric": metric}) as run:
            run.log_metrics(numbers | own)
    for asked, expected in {"log_loss": [0.5], "accuracy": [0.85], "own/file.py:mine": [0.1], "brier": []}.items():
        found = boards.recorded("photos", asked)
        assert [score.estimate for score in found if score.estimate == score.estimate] == expected
        assert sum(score.low == score.low for score in found) == len(expected)
    assert "estimate_error" not in scores.summary(boards.recorded("photos", "brier"))
    assert [score.estimate for score in boards.recorded("photos")] == [0.85, 0.5, 0.1]


def test_blends_are_told_apart(mlruns: Path) -> None:
    for _ in range(2):
        with tracking.run("blend", None, "photos", tags={"submission_file": "submission.csv"}) as run:
            run.log_metrics({"score/public": 0.9})
    one, other = boards.recorded("photos")
    assert one.submission != other.submission == f"submission.csv of {run.id[:8]}"
    assert len(other.date) == len("2026-01-01")
