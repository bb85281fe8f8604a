"""Fixtures for the whole suite: real models, each made once; no network but loopback; types and array shapes of `lance` checked as it runs."""

# The environment and the import hook come before the imports that they are for.
# ruff: noqa: E402

import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if WORKER:  # the workers share the cores; the variable reaches the processes that tests start, too
    os.environ["OMP_NUM_THREADS"] = "1"

import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before the first import of `lance`: every annotated function and dataclass in it is checked by beartype from here on.
install_import_hook("lance", "beartype.beartype")

from lance.corpus import Prompt, load_corpus
from lance.encoder import PromptEncoder
from lance.fitting import EnhancerConfig
from lance.pipeline import Lance
from lance.taxonomy import Taxonomy
from lance.training import TrainingSet, augmented, train

if WORKER:
    torch.set_num_threads(1)

settings.register_profile("lance", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lance")


def is_loopback(host: Any) -> bool:
    """Whether an address given to the socket module stays on this machine."""
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Fail a test that connects, sends or resolves beyond loopback. `pytest.fail` raises a BaseException, which no `except Exception` can hide."""

    def refuse(host: Any) -> None:
        if not is_loopback(host):
            pytest.fail(f"a test tried to reach {host!r}; only loopback is allowed")

    def guarded(name: str) -> Callable[..., Any]:
        original = getattr(socket.socket, name)

        def call(self: socket.socket, *args: Any) -> Any:
            address = args[-1] if name == "sendto" else args[0]
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address[0])
            return original(self, *args)

        return call

    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(name))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A file or folder that one worker makes and all workers read."""
    root = factory.getbasetemp()
    root = root.parent if WORKER else root
    target = root / name
    with FileLock(f"{target}.lock"):
        if not target.exists():
            unfinished = root / f"unfinished-{name}"
            make(unfinished)
            unfinished.rename(target)
    return target


@pytest.fixture(scope="session")
def taxonomy() -> Taxonomy:
    """The built-in taxonomy of noncompliance."""
    return Taxonomy.builtin()


@pytest.fixture(scope="session")
def encoder() -> PromptEncoder:
    """The packaged encoder, frozen; do not add an adapter to it."""
    return PromptEncoder.from_pretrained()


@pytest.fixture(scope="session")
def lance_default() -> Lance:
    """The shipped pipeline. No test may depend on its exact figures."""
    return Lance.from_pretrained()


@pytest.fixture(scope="session")
def corpus() -> list[Prompt]:
    """The embedded corpus."""
    return load_corpus()


@pytest.fixture(scope="session")
def corpus_vectors(corpus: list[Prompt], encoder: PromptEncoder, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Embeddings of the embedded corpus, (n, D), of length 1."""

    def make(path: Path) -> None:
        with path.open("wb") as f:
            np.save(f, encoder.encode([p.text for p in corpus]).numpy())

    return np.load(made_once(tmp_path_factory, "corpus-vectors.npy", make))


@pytest.fixture(scope="session")
def small_corpus(taxonomy: Taxonomy) -> list[Prompt]:
    """Short rows of the embedded corpus: four for training and one for validation per leaf, and benign ones to match, their splits as they are."""
    rows = [p for p in load_corpus() if len(p.text) < 200]
    chosen: list[Prompt] = []
    for split, per_leaf, benign in (("train", 4, 80), ("validation", 1, 30)):
        here = [p for p in rows if p.split == split]
        for leaf in taxonomy.keys[1:]:
            chosen += [p for p in here if p.labels == (leaf,)][:per_leaf]
        plain = [p for p in here if p.benign]
        chosen += plain[:: max(1, len(plain) // benign)][:benign]  # spread over the file, which is sorted by leaf
    return chosen


@pytest.fixture(scope="session")
def tiny_folder(small_corpus: list[Prompt], taxonomy: Taxonomy, encoder: PromptEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, trained in seconds on `small_corpus` with a frozen encoder. Copy it before changing anything in it.

    A model this weak would let nearly everything pass if 98 % of the benign prompts had to.
    """

    def make(folder: Path) -> None:
        train_rows = [p for p in small_corpus if p.split == "train"]
        validation = [p for p in small_corpus if p.split == "validation"]
        data = TrainingSet(augmented(train_rows, taxonomy), augmented(validation, taxonomy), {"small corpus": len(train_rows)})
        config = EnhancerConfig(epochs=40, batch_size=32, layers=2, hidden=48, latent_dim=4, dropout=0.1)
        train(data, taxonomy=taxonomy, encoder=encoder, config=config, exemplars=train_rows, pass_rate=0.8, contrast_pass_rate=0.8).save_pretrained(folder)

    return made_once(tmp_path_factory, "tiny-model", make)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder: Path) -> Lance:
    """The pipeline of `tiny_folder`: weak, but real and complete."""
    return Lance.from_pretrained(tiny_folder)
