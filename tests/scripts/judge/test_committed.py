"""The committed verdicts and their page follow from the packed runs next to them, byte for byte."""

import json
import pathlib
import shutil

from steppe.scripts import cli

STUDY = pathlib.Path(__file__).parents[3] / "configs" / "studies" / "judged"


def test_the_committed_verdicts_and_their_page_follow_from_the_runs(tmp_path):
    place = tmp_path / STUDY.name
    shutil.copytree(STUDY, place, ignore=shutil.ignore_patterns("*.html", "*.png", "*.md"))
    for path in place.glob("verdicts/*.json"):  # what is made again is not what stands there
        path.write_text(json.dumps(json.loads(path.read_text()) | {"comparisons": {}, "nats_a_byte": 0.0}))
    assert cli.main(["judge", f"--out={place}", "--again"]) == 0
    assert not (place / "runs").exists()
    verdicts = sorted(path.relative_to(STUDY) for path in STUDY.glob("verdicts/*.json"))
    assert verdicts
    for path in (pathlib.Path("index.html"), *verdicts):
        assert (place / path).read_bytes() == (STUDY / path).read_bytes(), path
