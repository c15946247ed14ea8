"""The page of the studies says what the committed runs say."""

import pathlib
import runpy

STUDIES = pathlib.Path(__file__).parents[2] / "configs" / "studies"


def test_every_number_of_the_page_is_computed_again_by_other_code():
    assert runpy.run_path(str(STUDIES / "recompute.py"))["main"]() == 0


def test_the_claims_on_the_page_follow_from_the_committed_runs():
    page = runpy.run_path(str(STUDIES / "page.py"))
    made = page["table"](page["read"]())
    assert all(verdict in made for verdict in ("**holds**", "**fails**", "cannot be told"))
    text = (STUDIES / "README.md").read_text(encoding="utf-8")
    assert made == text.split("<!-- claims -->\n")[1].split("<!-- end of claims -->")[0]


def test_the_numbers_of_the_predictions_are_on_the_ladders_page(capsys):
    assert runpy.run_path(str(STUDIES / "ladder" / "predictions.py"))["main"]() == 0
    assert capsys.readouterr().out in (STUDIES / "ladder" / "README.md").read_text(encoding="utf-8")
