"""Build the book: execute the notebooks with a profile, stage the pages, render them, and check what was rendered.

    python book/build.py --profile quick
    python -m book.build --profile book --notebook 03

Everything is written below `_build`: `stage` mirrors the repository with executed notebooks, `html` is the book, `run.json` says what ran and for how long.
"""

import argparse
import ast
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import get_kernel_dict
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python book/build.py` puts book/ there, not its parent
    sys.path.insert(0, str(ROOT))

from book.check import problems_of_site  # noqa: E402

PROFILES = ("quick", "book", "full")
KERNEL = "lance-book"
VERSIONS = ("lance-book", "torch", "transformers", "peft", "captum", "scikit-learn", "numpy", "matplotlib", "jupyter-book", "myst-nb", "papermill")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
OPENS_THE_BOOK = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><meta http-equiv="refresh" content="0; url={first}"></head>
<body><p><a href="{first}">{title}</a></p></body>
</html>
"""


class BookError(Exception):
    """The book cannot be built as asked; the message says what to change."""


@dataclass(frozen=True)
class Profile:
    """One file of `notebooks/profiles`: parameters by notebook, the kernels' environment, and how long a cell may take."""

    name: str
    common: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    cell_timeout: int = 600
    notebooks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Read a profile; keys other than the four known ones are names of notebooks without their ending."""
        if not path.is_file():
            raise BookError(f"there is no profile {path.stem!r}: {path} does not exist")
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        known = {key: content.pop(key) for key in ("common", "environment", "cell_timeout") if key in content}
        return cls(name=path.stem, notebooks=content, **known)

    def parameters(self, notebook: Path) -> dict[str, Any]:
        """The parameters for one notebook: common ones where it declares them, then its own, which it has to declare."""
        declared = declared_parameters(notebook)
        own = self.notebooks.get(notebook.stem) or {}
        if unknown := sorted(own.keys() - declared):
            names = ", ".join(sorted(declared)) or "nothing"
            raise BookError(f"profile {self.name!r} sets {', '.join(unknown)} for {notebook.name}, whose parameters cell declares {names}")
        return {key: value for key, value in self.common.items() if key in declared} | own


@dataclass(frozen=True)
class Run:
    """What became of one notebook. A kept one was executed by an earlier build with the same profile."""

    seconds: float
    error: str = ""
    kept: bool = False


def declared_parameters(notebook: Path) -> set[str]:
    """Names assigned in the cell tagged `parameters`; none if there is no such cell."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            names: set[str] = set()
            for node in ast.parse(cell.source).body:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            return names
    return set()


def write_kernel(folder: Path) -> None:
    """Write a kernel that runs this very interpreter. `python3` may be another one, when the user has registered it under that name."""
    spec = folder / "kernels" / KERNEL / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    content = get_kernel_dict(["--IPKernelApp.log_level=ERROR"])
    spec.write_text(json.dumps(content | {"display_name": KERNEL}), encoding="utf-8")


def kernel_environment(root: Path, kernels: Path, profile: Profile, jobs: int) -> dict[str, str]:
    """What the kernels get beside the caller's environment: the library of this repository, a share of the cores, and what the profile says."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    return {
        "JUPYTER_PATH": os.pathsep.join(filter(None, [str(kernels), os.environ.get("JUPYTER_PATH")])),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        **{key: str(value) for key, value in profile.environment.items()},
    }


def set_environment(environment: dict[str, str]) -> None:
    """Prepare a worker process; its kernels inherit what is set here."""
    os.environ.update(environment)


def execute(source: Path, target: Path, parameters: dict[str, Any], cell_timeout: int) -> Run:
    """Execute one notebook into `target`. An error is returned, not raised, so that the other notebooks run to their end."""
    started = time.perf_counter()
    error = ""
    try:
        papermill.execute_notebook(
            source, target, parameters, kernel_name=KERNEL, language="python", cwd=target.parent, progress_bar=False, execution_timeout=cell_timeout
        )
        tidy(target)
    except PapermillExecutionError as failure:
        traceback = ANSI.sub("", "\n".join(failure.traceback)).strip().splitlines()[-12:]
        error = f"{failure.ename}: {failure.evalue}\n" + "\n".join(f"    {line}" for line in traceback)
    except Exception as failure:  # a kernel that dies, a cell that takes too long, a broken file: whatever it is, the report has to name the notebook
        error = f"{type(failure).__name__}: {failure}"
    return Run(round(time.perf_counter() - started, 1), error)


def tidy(notebook: Path) -> None:
    """Hide the cell of injected parameters, and drop papermill's records: they hold paths of this machine, and the page's source is published."""
    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("papermill", None)
    for cell in content.cells:
        cell.metadata.pop("papermill", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
    nbformat.write(content, notebook)


def execute_all(root: Path, notebooks: list[Path], profile: Profile, jobs: int) -> dict[str, Run]:
    """Execute notebooks into the stage, `jobs` at a time, and say of each how it went."""
    stage, kernels = root / "_build" / "stage" / "notebooks", root / "_build" / "kernel"
    stage.mkdir(parents=True, exist_ok=True)
    write_kernel(kernels)
    parameters = {notebook: profile.parameters(notebook) for notebook in notebooks}  # all of them first: a wrong profile fails before hours of work
    environment = kernel_environment(root, kernels, profile, jobs)
    runs: dict[str, Run] = {}
    # Fresh processes, since the environment is the kernels' own and must not leak into the caller's.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), set_environment, (environment,)) as pool:
        futures = {pool.submit(execute, n, stage / n.name, parameters[n], profile.cell_timeout): n for n in notebooks}
        for done in as_completed(futures):
            name, run = futures[done].name, done.result()
            runs[name] = run
            print(f"{name}: {'failed after' if run.error else 'executed in'} {run.seconds:.1f} s", flush=True)
    return {n.name: runs[n.name] for n in notebooks}


def select(notebooks: list[Path], wanted: str) -> list[Path]:
    """The notebooks that `--notebook` means: all for an empty string, else the one with this number or name."""
    if not wanted:
        return notebooks
    chosen = [n for n in notebooks if n.stem == Path(wanted).stem or (wanted.isdigit() and n.name.startswith(f"{int(wanted):02d}-"))]
    if not chosen:
        raise BookError(f"no notebook {wanted!r}; there are {', '.join(n.name for n in notebooks) or 'none'}")
    return chosen


def pages_of(toc: Any) -> list[str]:
    """Every page that a table of contents names, without endings, in order."""
    if isinstance(toc, list):
        return [page for entry in toc for page in pages_of(entry)]
    if isinstance(toc, dict):
        own = [toc[key] for key in ("root", "file") if key in toc]
        return own + [page for key in ("parts", "chapters", "sections") for page in pages_of(toc.get(key))]
    return []


def check_toc(root: Path, notebooks: list[Path]) -> list[str]:
    """Raise if the table of contents names a page that does not exist, or leaves out a notebook; return the pages."""
    pages = pages_of(yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf-8")))
    missing = [page for page in pages if not any((root / f"{page}{ending}").is_file() for ending in (".md", ".ipynb"))]
    unlisted = [n.name for n in notebooks if f"notebooks/{n.stem}" not in pages]
    if missing or unlisted:
        raise BookError(f"book/_toc.yml names {missing} that do not exist" if missing else f"book/_toc.yml does not name {unlisted}")
    return pages


def stage_book(root: Path, report: str) -> None:
    """Copy the prose into the stage, with the report of this run in `book/status.md`."""
    stage = root / "_build" / "stage" / "book"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(root / "book", stage, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    status = stage / "status.md"
    if status.is_file():
        status.write_text(status.read_text(encoding="utf-8").replace("<!-- run -->", report), encoding="utf-8")


def commit_of(root: Path) -> str | None:
    """The commit, marked `+` when files differ from it; None outside a repository or without git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changed else commit


def record(root: Path, profile: Profile, runs: dict[str, Run], jobs: int) -> dict[str, Any]:
    """Write `_build/run.json` and return what it holds."""
    versions: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    content = {
        "profile": profile.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_of(root),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "jobs": jobs,
        "lance_data": bool(os.environ.get("LANCE_DATA")),
        "versions": versions,
        "notebooks": {name: asdict(run) for name, run in runs.items()},
    }
    (root / "_build" / "run.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def report_of(content: dict[str, Any]) -> str:
    """The record as the tables of `book/status.md`."""
    facts = {
        "Profile": content["profile"],
        "Executed": content["finished"],
        "Commit": content["commit"] or "not under version control",
        "Machine": content["machine"],
        "Notebooks at a time": content["jobs"],
        "Public data (`LANCE_DATA`)": "present" if content["lance_data"] else "absent",
        "Python": content["python"],
        **{name: version or "not installed" for name, version in content["versions"].items()},
    }
    lines = ["| Notebook | Seconds |", "|---|---:|"]
    lines += [f"| {name}{' (from an earlier build)' if run['kept'] else ''} | {run['seconds']:.1f} |" for name, run in content["notebooks"].items()]
    lines += ["", "| Of this build | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(lines)


def render(root: Path, strict: bool) -> bool:
    """Render the stage to `_build/html`; whether that went without a warning. Version 2 of jupyter-book is refused: it would rename `_config.yml`."""
    version = importlib.metadata.version("jupyter-book")
    if not version.startswith("1."):
        raise BookError(f"jupyter-book {version} is installed; this book is built with version 1 (see book/contributing.md)")
    build = root / "_build"
    for old in ("html", ".doctrees"):  # pages that are gone must not linger
        shutil.rmtree(build / old, ignore_errors=True)
    run_main = "from jupyter_book.cli.main import main; main()"
    strictness = ["-W", "-n", "--keep-going"] if strict else ["-n", "--keep-going"]
    where = ["--toc", str(build / "stage" / "book" / "_toc.yml"), "--config", str(root / "_config.yml"), "--path-output", str(root)]
    finished = subprocess.run([sys.executable, "-c", run_main, "build", "--quiet", *strictness, str(build / "stage"), *where], cwd=root, check=False)
    return finished.returncode == 0


def build(root: Path, profile_name: str, wanted: str = "", jobs: int = 1, run_notebooks: bool = True) -> int:
    """Build the book of a repository.

    Parameters
    ----------
    root
        The repository: `_config.yml`, `book/`, `notebooks/NN-name.ipynb`, `notebooks/profiles/`.
    profile_name
        A file of `notebooks/profiles`, without its ending.
    wanted
        Execute this notebook alone, by number or name. The others keep what an earlier build with the same profile gave them; where there is none they go
        unexecuted, and warnings do not count.
    jobs
        Notebooks executed at a time.
    run_notebooks
        False renders the pages with no notebook executed, for tests of the prose.

    Returns
    -------
    int
        0, or 1 when a notebook, the rendering or the check of the pages failed; all of them are reported.
    """
    build_folder = root / "_build"
    stage = build_folder / "stage" / "notebooks"
    profile = Profile.read(root / "notebooks" / "profiles" / f"{profile_name}.yml")
    notebooks = sorted((root / "notebooks").glob("[0-9][0-9]-*.ipynb"))
    pages = check_toc(root, notebooks)
    if stray := sorted(profile.notebooks.keys() - {n.stem for n in notebooks}):
        raise BookError(f"profile {profile.name!r} has a section for {', '.join(stray)}, and there is no such notebook")
    chosen = select(notebooks, wanted) if run_notebooks else []

    earlier = kept_runs(build_folder, profile) if wanted else {}
    if not wanted:
        shutil.rmtree(build_folder / "stage", ignore_errors=True)
    stage.mkdir(parents=True, exist_ok=True)
    runs = {n.name: earlier[n.name] for n in notebooks if n not in chosen and n.name in earlier}
    unexecuted = [n for n in notebooks if n not in chosen and n.name not in runs]
    for notebook in unexecuted:
        shutil.copy(notebook, stage)
    runs = dict(sorted((runs | execute_all(root, chosen, profile, jobs)).items()))
    content = record(root, profile, runs, jobs)
    if failed := {name: run.error for name, run in runs.items() if run.error}:
        for name, error in failed.items():
            print(f"\nnotebooks/{name} failed: {error}", file=sys.stderr)
        return 1

    stage_book(root, report_of(content))
    strict = not unexecuted
    clean = render(root, strict)
    html = build_folder / "html"
    if not html.is_dir():
        return 1
    title = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["title"]
    (html / "index.html").write_text(OPENS_THE_BOOK.format(title=title, first=f"{pages[0]}.html"), encoding="utf-8")
    found = problems_of_site(html)
    for problem in found:
        print(problem, file=sys.stderr)
    if unexecuted:
        print(f"not executed, and so without figures: {', '.join(n.name for n in unexecuted)}")
    good = clean and not found
    print(f"{'The book' if good else 'A book with the faults above'}: {html / 'index.html'}")
    return 0 if good else 1


def kept_runs(build_folder: Path, profile: Profile) -> dict[str, Run]:
    """Runs of an earlier build with the same profile whose notebooks still lie in the stage."""
    path = build_folder / "run.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["profile"] != profile.name:
        return {}
    runs = {name: Run(run["seconds"], run["error"], kept=True) for name, run in content["notebooks"].items()}
    return {name: run for name, run in runs.items() if not run.error and (build_folder / "stage" / "notebooks" / name).is_file()}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Execute the notebooks and render the book to _build/html/index.html.")
    parser.add_argument("--profile", choices=PROFILES, default="book", help="which parameters the notebooks get (default: book)")
    parser.add_argument("--notebook", default="", metavar="NN", help="execute this notebook only, and keep what an earlier build gave the others")
    default_jobs = min(2, os.cpu_count() or 1)
    parser.add_argument(
        "--jobs", type=int, default=default_jobs, help="notebooks executed at a time, each with its share of the cores (default here: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs has to be at least 1")
    try:
        return build(ROOT, options.profile, options.notebook, options.jobs)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
