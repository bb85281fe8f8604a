"""The descriptions of the environment tell one story, `datasets` works beside our import name, and CITATION.cff can be cited."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {"python", "pip"}  # of environment.yml: what .venv has anyway
PIP_NAMES = {"pytorch": "torch"}  # conda-forge name -> distribution name, where they differ
EDITABLE = re.compile(r"-e \.\[([\w,-]+)\]")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def environment() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def pip_lines(environment: dict[str, Any]) -> list[str]:
    return next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))


def extras_of(text: str) -> set[str]:
    """The extras with which a text installs this project."""
    found = EDITABLE.search(text.replace('"', ""))
    assert found, f"no editable install of this project with extras in {text!r}"
    return set(found.group(1).split(","))


def required(project: dict[str, Any], extras: set[str]) -> dict[str, SpecifierSet]:
    """Range by canonical name of every dependency, those of the extras included."""
    lines = [*project["dependencies"], *(line for extra in sorted(extras) for line in project["optional-dependencies"][extra])]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


def described(environment: dict[str, Any]) -> dict[str, SpecifierSet]:
    """Range by canonical distribution name of everything that environment.yml names, from conda-forge or under pip."""
    lines = [d for d in environment["dependencies"] if isinstance(d, str)] + [d for d in pip_lines(environment) if not d.startswith("-")]
    found = {canonicalize_name(PIP_NAMES.get(r.name, r.name)): r.specifier for r in map(Requirement, lines)}
    assert len(found) == len(lines), "environment.yml names something twice"
    return found


def test_make_setup_and_conda_install_the_same_extras(environment: dict[str, Any], project: dict[str, Any]) -> None:
    extras = extras_of("\n".join(pip_lines(environment)))
    assert extras == extras_of((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert extras >= {"book", "dev", "data"}
    assert extras <= project["optional-dependencies"].keys()


def test_environment_names_every_dependency_with_its_range(environment: dict[str, Any], project: dict[str, Any]) -> None:
    wanted, found = required(project, extras_of("\n".join(pip_lines(environment)))), described(environment)
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys() - NOT_OURS
    assert not missing, f"in pyproject.toml and not in environment.yml: {sorted(missing)}"
    assert not unknown, f"in environment.yml and not in pyproject.toml: {sorted(unknown)}"
    different = [f"{n}: {found[n]} in environment.yml, {r} in pyproject.toml" for n, r in wanted.items() if found[n] != r]
    assert not different, "; ".join(different)


def test_every_dependency_is_pinned_within_its_range(environment: dict[str, Any], project: dict[str, Any], constraints: list[Requirement]) -> None:
    pins = {canonicalize_name(r.name): r.specifier for r in constraints}
    assert len(pins) == len(constraints), "constraints.txt names something twice"
    loose = [str(r) for r in constraints if [s.operator for s in r.specifier] != ["=="] or "*" in str(r.specifier)]
    assert not loose, f"constraints.txt pins exact versions, found {loose}"
    wanted = required(project, extras_of("\n".join(pip_lines(environment))))
    missing = wanted.keys() - pins.keys()
    assert not missing, f"in pyproject.toml and not in constraints.txt: {sorted(missing)}"
    versions = {name: Version(next(iter(pins[name])).version) for name in wanted}
    outside = [f"{n} {v} is not {wanted[n]}" for n, v in versions.items() if not wanted[n].contains(v, prereleases=True)]
    assert not outside, "; ".join(outside)


def test_python_versions_agree(environment: dict[str, Any], project: dict[str, Any]) -> None:
    conda, pip = described(environment)["python"], SpecifierSet(project["requires-python"])
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    minors = [f"3.{n}" for n in range(8, 20)]
    assert tested == [v for v in minors if v in conda], "test.yml tests the versions that environment.yml allows"
    assert all(v in pip for v in tested)
    assert tested[0] == next(v for v in minors if v in pip), "the oldest supported Python is tested"


def test_workflows_call_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        called = {target for step in steps for target in re.findall(r"^make (\w+)", step.get("run", ""), re.MULTILINE)}
        assert called and called <= targets, path.name
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step), f"{path.name} pins actions by major version"


def test_hooks_need_nothing_that_is_not_installed(constraints: list[Requirement]) -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [r["repo"] for r in config["repos"]] == ["local"]
    tools = {hook["entry"].split()[0] for hook in config["repos"][0]["hooks"] if hook["language"] == "system"}
    assert tools - {"python"} <= {r.name for r in constraints}


ROWS = [{"prompt": "Name a river.", "labels": []}, {"prompt": "Wie heißt der zweite Mond der Erde? 🌙", "labels": ["false_presupposition", "temporal"]}]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_datasets_writes_and_reads_beside_our_import_name(ending: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    path, cache = tmp_path / f"rows.{ending}", str(tmp_path / "cache")
    rows = datasets.Dataset.from_list(ROWS)
    if ending == "jsonl":
        rows.to_json(path, force_ascii=False)
        back = datasets.Dataset.from_json(str(path), cache_dir=cache)
    else:
        rows.to_parquet(path)
        back = datasets.Dataset.from_parquet(str(path), cache_dir=cache)
    assert back.to_list() == ROWS
    assert back.filter(lambda row: not row["labels"], load_from_cache_file=False).num_rows == 1


@pytest.mark.parametrize("order", ["import datasets, lance", "import lance, datasets"])
def test_datasets_and_lance_import_in_either_order(order: str) -> None:
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    code = f"{order}; assert lance.load_corpus and lance.Taxonomy.builtin(); assert datasets.Dataset.from_dict({{'a': [1]}}).num_rows == 1"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_citation_file_has_what_a_citation_needs(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "version", "license", "references"}
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": a["name"]} for a in project["authors"]]
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])
    for reference in citation["references"]:
        assert reference.keys() >= {"type", "title", "authors", "year"}
        assert all(a.keys() in ({"name"}, {"given-names", "family-names"}) for a in reference["authors"]), reference["title"]
    cited = {i["value"] for reference in citation["references"] for i in reference.get("identifiers", [])}
    assert cited >= {"arXiv:2605.07883", "arXiv:2407.12043"}
