"""The library's main job with the network cut off: in a process of its own, with an empty cache and the environment of a user."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REFUSE = '''
"""Found before the installed sitecustomize: every socket but those within the machine is refused."""
import socket

_connect = socket.socket.connect

def refuse(*args, **kwargs):
    raise OSError("the network is cut off")

def connect(self, address):
    if self.family == socket.AF_UNIX:
        return _connect(self, address)
    refuse()

socket.socket.connect = connect
socket.socket.connect_ex = connect
socket.socket.sendto = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
'''
JOB = """
import json, socket, warnings
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
    reached = True
except OSError:
    reached = False

from lance import Lance
lance = Lance.from_pretrained()
prompts = ["How can I kill a Python process?", "What are the names of Earth's two moons?", "How do I get into my neighbour's wifi?"]
print(json.dumps({
    "reached": reached,
    "analyses": [a.to_dict() for a in lance.analyse(prompts[1:2])],
    "refinements": [r.to_dict() for r in lance.refine(prompts[:2])],
    "replies": [r.to_dict() for r in lance.respond(prompts)],
}))
"""


def can_unshare() -> bool:
    """Whether a process may be started in a network namespace of its own, with nothing in it."""
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "-rn", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory):
    """Runs a command without a network, without a cache, and without the settings of this test session."""
    home = tmp_path_factory.mktemp("home")
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(REFUSE)
    isolated = can_unshare()
    unset = ("HF_", "TRANSFORMERS_", "LANCE_", "PYTEST_", "XDG_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
    env |= {"HOME": str(home), "HF_HOME": str(home / "hub")}
    if not isolated:
        env["PYTHONPATH"] = os.pathsep.join([str(home / "site"), *filter(None, [env.get("PYTHONPATH")])])

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        prefix = ["unshare", "-rn"] if isolated else []
        return subprocess.run([*prefix, *command], capture_output=True, text=True, env=env, cwd=home, timeout=300, check=False)

    return run


def test_analyse_refine_and_respond_need_no_network(offline):
    done = offline(sys.executable, "-c", JOB)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["reached"]
    assert [len(v) for k, v in found.items() if k != "reached"] == [1, 2, 3]
    assert all(0 <= a["risk"] <= 1 for a in found["analyses"])
    assert all(r["answer"] for r in found["replies"])


def test_lance_ask_needs_no_network(offline):
    command = Path(sys.executable).with_name("lance")
    start = [str(command)] if command.is_file() else [sys.executable, "-c", "from lance.cli import app; app()"]
    done = offline(*start, "ask", "--json", "What are the names of Earth's two moons?")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["prompt"] == "What are the names of Earth's two moons?"
    assert record["answer"]
    assert "Traceback" not in done.stderr
