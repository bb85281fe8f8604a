"""The book: its builder, the check of rendered pages, and the pages themselves."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `book` is part of the repository and not of the installed package
    sys.path.insert(0, str(ROOT))

from book import build as builder  # noqa: E402
from book import draw_method  # noqa: E402
from book.check import problems_of_page, problems_of_site  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))
PAGES = [*NOTEBOOKS, *sorted((ROOT / "book").glob("*.md"))]
WORKS = """import os, sys
from myst_nb import glue
product = seed * epochs
glue("product", product, display=False)
print("kernel", sys.executable, "offline", os.environ.get("HF_HUB_OFFLINE"), "threads", os.environ.get("OMP_NUM_THREADS"))"""
PARAMETERS = 'profile = "none"\nseed = 1\nepochs: int = 2'


def write_notebook(path: Path, code: str, prose: str = "Nothing to say.", parameters: str = PARAMETERS) -> None:
    cells = [
        new_markdown_cell(f"# {path.stem}"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(code),
        new_markdown_cell(prose),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), path)


def write_toc(root: Path, *chapters: str) -> None:
    content = {"format": "jb-book", "root": "book/intro", "chapters": [{"file": c} for c in chapters]}
    (root / "book" / "_toc.yml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A repository with one notebook, and this one's configuration and static files."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    shutil.copy(ROOT / "_config.yml", root)
    for name in ("references.bib", "status.md"):
        shutil.copy(ROOT / "book" / name, root / "book")
    (root / "book" / "intro.md").write_text("# Tiny\n\nFormula $a^2$ and [a chapter](../notebooks/01-tiny.ipynb).\n", encoding="utf-8")
    write_toc(root, "notebooks/01-tiny", "book/status")
    write_notebook(root / "notebooks" / "01-tiny.ipynb", WORKS, "The product is {glue:text}`product:d`.")
    profile = {"environment": {"HF_HUB_OFFLINE": "1"}, "common": {"profile": "quick", "seed": 7, "unheard_of": 0}, "01-tiny": {"epochs": 6}}
    (root / "notebooks" / "profiles").mkdir()
    (root / "notebooks" / "profiles" / "quick.yml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    return root


# Executing and rendering


def test_a_book_is_executed_staged_and_rendered(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    before = dict(os.environ)
    assert builder.build(tiny, "quick") == 0
    assert dict(os.environ) == before  # what the kernels get is theirs alone

    html = tiny / "_build" / "html"
    assert 'url=book/intro.html"' in (html / "index.html").read_text(encoding="utf-8")
    page = (html / "notebooks" / "01-tiny.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "The product is 42." in text  # seed from the common section, epochs from the notebook's own
    assert f"kernel {sys.executable} offline 1" in text
    assert "injected" not in text and "epochs = 6" not in text
    assert "mathjax/tex-chtml-full.js" in (html / "book" / "intro.html").read_text(encoding="utf-8")
    assert (html / "_static" / "mathjax" / "tex-chtml-full.js").is_file()
    status = (html / "book" / "status.html").read_text(encoding="utf-8")
    assert "01-tiny.ipynb" in status and "quick" in status

    staged = (tiny / "_build" / "stage" / "notebooks" / "01-tiny.ipynb").read_text(encoding="utf-8")
    assert "papermill" not in json.loads(staged)["metadata"] and '"input_path"' not in staged
    run = json.loads((tiny / "_build" / "run.json").read_text(encoding="utf-8"))
    assert run["profile"] == "quick" and run["versions"]["papermill"] == importlib.metadata.version("papermill")
    assert run["notebooks"]["01-tiny.ipynb"]["seconds"] > 0 and not run["notebooks"]["01-tiny.ipynb"]["error"]
    assert "commit" in run
    assert problems_of_site(html) == []


def test_a_failing_notebook_fails_the_build_and_is_named(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_notebook(tiny / "notebooks" / "02-broken.ipynb", 'raise ValueError("the well is dry")')
    write_toc(tiny, "notebooks/01-tiny", "notebooks/02-broken", "book/status")
    assert builder.build(tiny, "quick", jobs=2) == 1
    printed = capfd.readouterr()
    assert "notebooks/02-broken.ipynb failed: ValueError: the well is dry" in printed.err
    assert "01-tiny.ipynb: executed in" in printed.out  # the others still ran
    assert not (tiny / "_build" / "html").exists()
    run = json.loads((tiny / "_build" / "run.json").read_text(encoding="utf-8"))
    assert "the well is dry" in run["notebooks"]["02-broken.ipynb"]["error"]

    # Repaired, and executed alone: the other keeps what it got.
    write_notebook(tiny / "notebooks" / "02-broken.ipynb", WORKS, "It is {glue:text}`product:d`.")
    assert builder.build(tiny, "quick", wanted="2") == 0
    run = json.loads((tiny / "_build" / "run.json").read_text(encoding="utf-8"))
    assert [r["kept"] for r in run["notebooks"].values()] == [True, False]
    assert "The product is" in (tiny / "_build" / "html" / "notebooks" / "01-tiny.html").read_text(encoding="utf-8")


def test_unresolved_references_fail_the_build(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prose = "{term}`phlogiston`, {cite}`nobody1900`, {glue:text}`nothing`, {numref}`fig-none`, [gone](../book/gone.md)"
    write_notebook(tiny / "notebooks" / "01-tiny.ipynb", "pass", prose)
    assert builder.build(tiny, "quick") == 1
    printed = capfd.readouterr().err
    assert all(name in printed for name in ("phlogiston", "nobody1900", "'nothing'", "fig-none", "gone.md"))


def test_a_cell_that_takes_too_long_fails(tiny: Path) -> None:
    write_notebook(tiny / "notebooks" / "01-tiny.ipynb", "import time; time.sleep(60)")
    profile = tiny / "notebooks" / "profiles" / "quick.yml"
    profile.write_text("cell_timeout: 2\n", encoding="utf-8")
    runs = builder.execute_all(tiny, [tiny / "notebooks" / "01-tiny.ipynb"], builder.Profile.read(profile), 1)
    assert "timed out" in runs["01-tiny.ipynb"].error.lower()


# Profiles, the table of contents, the command line


def test_parameters_are_passed_only_where_declared(tiny: Path) -> None:
    profile = builder.Profile.read(tiny / "notebooks" / "profiles" / "quick.yml")
    notebook = tiny / "notebooks" / "01-tiny.ipynb"
    assert builder.declared_parameters(notebook) == {"profile", "seed", "epochs"}
    assert profile.parameters(notebook) == {"profile": "quick", "seed": 7, "epochs": 6}
    write_notebook(notebook, "pass", parameters="seed = 1")
    with pytest.raises(builder.BookError, match=r"'quick' sets epochs for 01-tiny.ipynb, whose parameters cell declares seed"):
        profile.parameters(notebook)


def test_a_section_for_a_notebook_that_does_not_exist_is_an_error(tiny: Path) -> None:
    with (tiny / "notebooks" / "profiles" / "quick.yml").open("a", encoding="utf-8") as f:
        f.write("09-gone: {epochs: 1}\n")
    with pytest.raises(builder.BookError, match="09-gone"):
        builder.build(tiny, "quick")


def test_the_table_of_contents_has_to_fit(tiny: Path) -> None:
    notebooks = [tiny / "notebooks" / "01-tiny.ipynb"]
    assert builder.check_toc(tiny, notebooks) == ["book/intro", "notebooks/01-tiny", "book/status"]
    write_toc(tiny, "notebooks/01-tiny", "book/nowhere")
    with pytest.raises(builder.BookError, match="book/nowhere"):
        builder.check_toc(tiny, notebooks)
    write_toc(tiny, "book/status")
    with pytest.raises(builder.BookError, match=r"does not name .*01-tiny"):
        builder.check_toc(tiny, notebooks)


def test_select_takes_numbers_and_names() -> None:
    notebooks = [Path("01-a.ipynb"), Path("02-b.ipynb"), Path("12-c.ipynb")]
    assert builder.select(notebooks, "") == notebooks
    for wanted in ("2", "02", "02-b", "notebooks/02-b.ipynb"):
        assert builder.select(notebooks, wanted) == [notebooks[1]]
    with pytest.raises(builder.BookError, match="no notebook '3'"):
        builder.select(notebooks, "3")


def test_bad_usage_is_exit_code_2(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(builder, "ROOT", tiny)
    assert builder.main(["--profile", "full"]) == 2
    assert "there is no profile 'full'" in capsys.readouterr().err
    assert builder.main(["--profile", "quick", "--notebook", "77"]) == 2
    with pytest.raises(SystemExit, match="2"):
        builder.main(["--profile", "grand"])


def test_version_2_of_jupyter_book_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.1")
    with pytest.raises(builder.BookError, match=r"jupyter-book 2\.0\.1"):
        builder.render(tiny, strict=True)


# The check of rendered pages

GOOD = """<!DOCTYPE html><html lang="en"><head><link rel="stylesheet" href="a.css"><script src="a.js"></script></head>
<body><h1 id="top">Top</h1><a href="#top">up</a><a href="https://example.org/paper">a paper</a><img src="a.png" alt="A rising curve."></body></html>"""


def page(folder: Path, html: str) -> Path:
    for name in ("a.css", "a.js", "a.png"):
        (folder / name).write_bytes(b"")
    path = folder / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


def test_a_good_page_has_no_problems(tmp_path: Path) -> None:
    assert problems_of_page(page(tmp_path, GOOD), tmp_path) == []
    assert problems_of_site(tmp_path) == []


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ('src="a.js"', 'src="https://cdn.example.org/a.js"', "another host"),
        ('src="a.js"', 'src="//cdn.example.org/a.js"', "another host"),
        ('href="a.css"', 'href="https://fonts.example.org/a.css"', "another host"),
        ('src="a.png"', 'src="http://example.org/a.png"', "another host"),
        ("</head>", "<style>@import url('https://example.org/a.css')</style></head>", "another host"),
        ("</head>", '<script>load("https://example.org/lib/index.js")</script></head>', "another host"),
        ("</body>", '<div style="background: url(https://example.org/a.png)"></div></body>', "another host"),
        (' alt="A rising curve."', "", "text that says"),
        ("A rising curve.", "  ", "text that says"),
        ("A rising curve.", "_images/a.png", "text that says"),
        ("A rising curve.", "figure-1.svg", "text that says"),
        ('href="#top"', 'href="#bottom"', "broken link #bottom"),
        ('href="#top"', 'href="other.html"', "broken link other.html"),
        ('href="#top"', 'href="../outside.html"', "broken link ../outside.html"),
        ("</head>", '<meta http-equiv="Refresh" content="0; url=gone.html"></head>', "broken link gone.html"),
        (' lang="en"', "", "language"),
    ],
)
def test_each_fault_of_a_page_is_found(tmp_path: Path, good: str, bad: str, problem: str) -> None:
    assert good in GOOD
    found = problems_of_page(page(tmp_path, GOOD.replace(good, bad)), tmp_path)
    assert len(found) == 1 and problem in found[0]


def test_fonts_of_another_host_in_a_style_sheet_are_found(tmp_path: Path) -> None:
    page(tmp_path, GOOD)
    (tmp_path / "a.css").write_text("@font-face { src: url('https://example.org/f.woff2') }", encoding="utf-8")
    assert problems_of_site(tmp_path) == ["a.css: loads https://example.org/f.woff2 from another host"]


# This book


@pytest.mark.slow
def test_the_pages_of_this_book_are_sound_without_any_output(tmp_path: Path) -> None:
    """Links, anchors, images and hosts of the real pages; figures and numbers are the matter of `make book`."""
    shutil.copy(ROOT / "_config.yml", tmp_path)
    for name in ("book", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    assert builder.build(tmp_path, "quick", run_notebooks=False) == 0
    assert 'alt="Flow chart' in (tmp_path / "_build" / "html" / "book" / "intro.html").read_text(encoding="utf-8")


def test_the_book_that_was_built_is_sound() -> None:
    html = ROOT / "_build" / "html"
    if not (html / "index.html").is_file():
        pytest.skip("`make book` has not been run here; it makes this check itself")
    assert problems_of_site(html) == []


@pytest.mark.parametrize("name", builder.PROFILES)
def test_profiles_fit_the_notebooks(name: str) -> None:
    profile = builder.Profile.read(ROOT / "notebooks" / "profiles" / f"{name}.yml")
    assert set(profile.notebooks) <= {n.stem for n in NOTEBOOKS}
    assert (profile.environment["HF_HUB_OFFLINE"] == "1") == (name != "full")
    for notebook in NOTEBOOKS:
        assert profile.parameters(notebook)["profile"] == name
    builder.check_toc(ROOT, NOTEBOOKS)


def source_of(path: Path) -> str:
    """The prose of a page, captions in the metadata included."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join([c.source for c in cells if c.cell_type == "markdown"] + [json.dumps(c.metadata, ensure_ascii=False) for c in cells])


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_terms_and_papers_exist(path: Path) -> None:
    """The same as the strict build says, in no time."""
    prose = re.sub(r"``.*?``", "", source_of(path))
    keys = set(re.findall(r"@\w+\{([\w-]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8")))
    cited = {key.strip() for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose) for key in group.split(",")}
    assert cited <= keys
    terms = {t.lower() for t in glossary()}
    used = {re.sub(r"^.*<(.+)>$", r"\1", t, flags=re.DOTALL).lower() for t in re.findall(r"\{term\}`([^`]+)`", prose)}
    assert used <= terms


def glossary() -> list[str]:
    body = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8").split(":::{glossary}")[1]
    return [line.strip() for line in body.splitlines() if line and not line.startswith((" ", ":"))]


def test_the_glossary_is_in_order() -> None:
    terms = glossary()
    assert len(terms) >= 25 and terms == sorted(terms, key=str.lower)


def test_every_paper_can_be_found() -> None:
    entries = (ROOT / "book" / "references.bib").read_text(encoding="utf-8").split("\n@")[1:]
    for entry in entries:
        assert re.search(r"eprint|booktitle|journal", entry), entry
        assert re.search(r"author\s*=", entry) and re.search(r"year\s*=", entry), entry


def test_mathjax_is_the_published_one() -> None:
    script = ROOT / "book" / "_static" / "mathjax" / "tex-chtml-full.js"
    assert hashlib.sha256(script.read_bytes()).hexdigest() == "91b005503c5d1f0958bf4d73ada1a3be33596b2c4ab5da22277f1b0d3149b5a4"
    assert len(list(script.parent.rglob("*.woff"))) == 23
    assert sum(f.stat().st_size for f in script.parent.rglob("*")) < 2_000_000


def test_the_picture_of_the_method_draws_every_station(tmp_path: Path) -> None:
    path = tmp_path / "method.svg"
    draw_method.draw(path)
    assert ET.parse(path).getroot().tag.endswith("svg")
    names = [box[0] for box in draw_method.BOXES]
    assert names == ["Prompt", "Enhancer", "Distribution", "Gradients", "Refiner", "Verifier", "Answer"]
    drawn, shipped = path.read_text(encoding="utf-8"), draw_method.TARGET.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in names for text in (drawn, shipped))
