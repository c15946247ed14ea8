"""The documentation as a site: every link of every page leads somewhere."""

import re
from pathlib import Path

from steppe.scripts import docs

ROOT = Path(docs.__file__).parents[1]


def test_every_link_of_the_site_leads_to_a_file_and_a_heading(tmp_path, capsys):
    site = tmp_path / "site"
    assert docs.main([f"--site={site}"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    readmes = [path for room in ("", *docs.ROOMS) for path in (ROOT / room).glob(docs.README)]
    assert {site / path.relative_to(ROOT).parent / docs.INDEX for path in readmes} <= set(pages)
    assert all(site / page.replace(".ipynb", ".html").replace(".md", ".html") in pages for page in docs.MORE)
    notebook = pages[site / "optim" / "first_steps.html"]
    assert "data:image/png;base64," in notebook
    assert "all checks hold" in notebook
    assert "bits a byte" in pages[site / "lm" / "hub" / "CARD.html"]
    assert "def method" in pages[site / docs.API] or "base_optimizer" in pages[site / docs.API]
    followed = 0
    for path, text in pages.items():
        if "api" in path.relative_to(site).parts[:1]:
            continue
        for link in re.findall(r'(?:href|src)="(.*?)"', text):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, heading = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            assert there.is_file(), f"{path.relative_to(site)}: {link}"
            assert not heading or f'id="{heading}"' in pages[there], f"{path.relative_to(site)}: {link}"
            followed += 1
    assert followed > 100


def test_a_site_needs_a_new_directory_and_a_clone(tmp_path, capsys):
    (tmp_path / "site").mkdir()
    assert docs.main([f"--site={tmp_path / 'site'}"]) == 2
    assert "exists; choose a new directory" in capsys.readouterr().err
    assert docs.build(tmp_path, tmp_path / "other") == 2
    assert "needs a clone" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
