"""Chat models: a local Llama with template and adapter, and an OpenAI-compatible endpoint in every mood a network has."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import adapter_of, bert_folder, chat_folder, completion, fake_server
from transformers import AutoModelForCausalLM

from lance.chat import ChatModel, EndpointChat, LocalChat, load_chat
from lance.errors import ChatError

HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
NOTHING = "{{ raise_exception('not today') }}"
PLAIN, TEMPLATED, ADAPTED = "written as plain lines", "written by the template, “äöü” 🙂", "spoken through the adapter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Folders of a scripted model, by chat template. The last character it reads decides: `:` of the plain layout, `>` of the template, `?` nothing."""
    root = tmp_path_factory.mktemp("chat")

    def make(template: str | None) -> Path:
        path = root / str(abs(hash(template)))
        return path if path.is_dir() else chat_folder(path, {":": PLAIN, ">": TEMPLATED, "!": ADAPTED}, template=template)

    return make


@pytest.fixture(scope="module")
def plain(folder: Callable[[str | None], Path]) -> LocalChat:
    return LocalChat.from_pretrained(str(folder(None)))


# -------------------------------------------------------------------- local models


def test_without_a_template_messages_are_plain_lines(plain: LocalChat):
    assert plain.reply(HELLO) == PLAIN
    assert isinstance(plain, ChatModel)


def test_with_a_template_it_is_used(folder: Callable[[str | None], Path]):
    chat = LocalChat.from_pretrained(str(folder(TEMPLATE)))
    assert chat.reply([{"role": "system", "content": "be kind"}, *HELLO]) == TEMPLATED


def test_a_template_that_takes_no_system_message_gets_it_within_the_first_user_message(folder: Callable[[str | None], Path]):
    chat = LocalChat.from_pretrained(str(folder(NO_SYSTEM)))
    messages = [{"role": "system", "content": "be kind"}, *HELLO]
    assert chat.reply(messages) == TEMPLATED
    assert messages[0] == {"role": "system", "content": "be kind"}  # the caller's list stays as it was


def test_a_template_that_takes_nothing_is_a_chat_error(folder: Callable[[str | None], Path]):
    with pytest.raises(ChatError, match="not today"):
        LocalChat.from_pretrained(str(folder(NOTHING))).reply(HELLO)


def test_an_adapter_changes_what_the_model_says(folder: Callable[[str | None], Path], tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(folder(None))
    n = base.config.vocab_size
    colon = LocalChat.from_pretrained(str(folder(None))).tokenizer(":")["input_ids"][-1]

    def prefer_the_last_token_after_a_colon(model: torch.nn.Module) -> None:
        a, b = (next(p for name, p in model.named_parameters() if part in name) for part in ("lora_A", "lora_B"))
        a.zero_()[0, colon] = 1.0
        b.zero_()[n - 1, 0] = 50.0

    adapter = adapter_of(tmp_path / "adapter", base, ["lm_head"], prefer_the_last_token_after_a_colon)
    assert LocalChat.from_pretrained(str(folder(None)), adapter=adapter).reply(HELLO) == ADAPTED
    assert LocalChat.from_pretrained(str(folder(None))).reply(HELLO) == PLAIN
    loaded = load_chat(str(folder(None)), adapter=adapter)
    assert loaded is not None
    assert loaded.reply(HELLO) == ADAPTED


@pytest.fixture(scope="module")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> LocalChat:
    """A model for which all characters are alike."""
    path = chat_folder(tmp_path_factory.mktemp("undecided") / "m", {":": "x"})
    chat = LocalChat.from_pretrained(str(path))
    with torch.no_grad():
        chat.model.lm_head.weight.zero_()
        chat.model.lm_head.weight[[0, 1, 2, 3]] = -5.0  # no special tokens
    return chat


def test_sampling_goes_by_the_seed_and_leaves_the_global_generator_alone(undecided: LocalChat):
    before = torch.random.get_rng_state()
    replies = [undecided.reply(HELLO, temperature=1.0, seed=s, max_tokens=12) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert replies[0] == replies[1] != replies[2]
    greedy = {undecided.reply(HELLO, temperature=0.0, seed=s, max_tokens=12) for s in range(3)}
    assert len(greedy) == 1


def test_replies_are_no_longer_than_wanted(undecided: LocalChat):
    def tokens(limit: int) -> int:
        text = undecided.reply(HELLO, temperature=0.0, max_tokens=limit)
        return len(undecided.tokenizer(text)["input_ids"])

    assert 1 <= tokens(3) <= 3
    assert tokens(30) > tokens(3)


def test_a_reply_without_text_is_a_chat_error(folder: Callable[[str | None], Path], tmp_path: Path):
    silent = chat_folder(tmp_path / "silent", {"?": "only after a question mark"})
    with pytest.raises(ChatError, match="without text"):
        LocalChat.from_pretrained(str(silent)).reply(HELLO)


def test_messages_longer_than_the_model_reads_are_a_chat_error(tmp_path: Path):
    chat = LocalChat.from_pretrained(str(chat_folder(tmp_path / "short", {":": "fine"}, positions=64)))
    assert chat.reply(HELLO, max_tokens=1000) == "fine"
    with pytest.raises(ChatError, match="tokens, more than"):
        chat.reply([{"role": "user", "content": "long " * 40}])


def test_characters_that_no_tokenizer_takes_do_no_harm(plain: LocalChat):
    assert plain.reply([{"role": "user", "content": "lone \ud800 surrogate"}]) == PLAIN


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder"])
def test_an_unknown_model_is_a_chat_error_that_names_it(name: str):
    with pytest.raises(ChatError, match=name):
        LocalChat.from_pretrained(name)


def test_a_folder_with_another_kind_of_model_is_a_chat_error(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ChatError, match="cannot load the chat model"):
        LocalChat.from_pretrained(str(tmp_path / "empty"))


def test_damaged_or_pickled_weights_are_a_chat_error(folder: Callable[[str | None], Path], tmp_path: Path):
    copy = Path(shutil.copytree(folder(None), tmp_path / "copy"))
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ChatError, match="cannot load"):
        LocalChat.from_pretrained(str(copy))
    weights.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ChatError, match="safetensors"):
        LocalChat.from_pretrained(str(copy))


def test_a_missing_or_pickled_or_misfit_adapter_is_a_chat_error(folder: Callable[[str | None], Path], tmp_path: Path):
    with pytest.raises(ChatError, match="adapter"):
        LocalChat.from_pretrained(str(folder(None)), adapter=tmp_path / "nothing")
    base = AutoModelForCausalLM.from_pretrained(folder(None))
    adapter = adapter_of(tmp_path / "adapter", base, ["lm_head"], lambda model: None)
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ChatError, match=r"adapter_model\.safetensors"):
        LocalChat.from_pretrained(str(folder(None)), adapter=adapter)
    from transformers import AutoModel

    other = adapter_of(tmp_path / "bert-adapter", AutoModel.from_pretrained(bert_folder(tmp_path / "bert")), ["query"], lambda model: None)
    with pytest.raises(ChatError, match="cannot load"):
        LocalChat.from_pretrained(str(folder(None)), adapter=other)


# ----------------------------------------------------------------------- endpoints


def test_an_endpoint_gets_the_messages_and_its_text_comes_back():
    with fake_server((200, completion("  Phobos and Deimos orbit Mars.\n"))) as server:
        chat = EndpointChat(server.url, "some-model", api_key="secret")
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "moons? 🙂"}]
        assert chat.reply(messages, max_tokens=7, temperature=0.5, seed=3) == "Phobos and Deimos orbit Mars."
        assert chat.name == "some-model"
        assert isinstance(chat, ChatModel)
    ((path, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert body == {"messages": messages, "model": "some-model", "max_tokens": 7, "temperature": 0.5, "seed": 3}


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_trouble_is_tried_again(status: int):
    trouble = (status, b'{"error": {"message": "come back later"}}')
    with fake_server(trouble, trouble, (200, completion("here now"))) as server:
        assert EndpointChat(server.url, "m").reply(HELLO) == "here now"
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_a_lasting_trouble_is_a_chat_error_with_its_status(status: int):
    with fake_server((status, b'{"error": {"message": "come back later"}}')) as server:
        with pytest.raises(ChatError, match=rf"answered {status} for model 'm'.*come back later"):
            EndpointChat(server.url, "m", max_retries=1).reply(HELLO)
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refused_request_is_not_repeated(status: int):
    with fake_server((status, b'{"error": {"message": "no model m"}}')) as server:
        with pytest.raises(ChatError, match=rf"answered {status}.*no model m"):
            EndpointChat(server.url, "m").reply(HELLO)
        assert len(server.requests) == 1


def test_a_slow_server_is_a_chat_error_that_names_the_timeout():
    with fake_server((200, completion("too late")), delay=1.0) as server:
        start = time.perf_counter()
        with pytest.raises(ChatError, match=r"within 0\.2 s"):
            EndpointChat(server.url, "m", timeout=0.2, max_retries=0).reply(HELLO)
        assert time.perf_counter() - start < 0.9


MALFORMED = [
    (b"", "application/json"),
    (b'{"choices": [', "application/json"),
    (b"<html>hello</html>", "text/html"),
    (b"\xff\xfe\x00", "application/json"),
    (b"null", "application/json"),
    (b"[]", "application/json"),
    (b'"text"', "application/json"),
    (b"{}", "application/json"),
    (b'{"error": "out of memory"}', "application/json"),
    (b'{"choices": []}', "application/json"),
    (b'{"choices": 3}', "application/json"),
    (b'{"choices": [3]}', "application/json"),
    (b'{"choices": [{}]}', "application/json"),
    (b'{"choices": [{"message": "text"}]}', "application/json"),
    (b'{"choices": [{"message": {"content": 7}}]}', "application/json"),
    (completion(""), "application/json"),
    (completion(" \n"), "application/json"),
    (completion(None), "application/json"),
]


@pytest.mark.parametrize(("body", "kind"), MALFORMED, ids=[repr(b)[:40] for b, _ in MALFORMED])
def test_a_malformed_or_empty_reply_is_a_chat_error(body: bytes, kind: str):
    with fake_server((200, body, kind)) as server, pytest.raises(ChatError, match=server.url):
        EndpointChat(server.url, "m", max_retries=0).reply(HELLO)


def test_a_server_that_hangs_up_is_tried_again_and_then_a_chat_error():
    with fake_server((0, None), (200, completion("sorry, the line was bad"))) as server:
        assert EndpointChat(server.url, "m").reply(HELLO) == "sorry, the line was bad"
    with fake_server((0, None)) as server, pytest.raises(ChatError, match="cannot be reached"):
        EndpointChat(server.url, "m", max_retries=0).reply(HELLO)


def test_a_reply_that_breaks_off_is_a_chat_error():
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n" + completion("cut")[:40])
        connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener, pytest.raises(ChatError, match="cannot be reached"):
        EndpointChat(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", max_retries=0).reply(HELLO)
    thread.join()


def test_a_killed_server_is_a_chat_error():
    with fake_server((200, completion("alive"))) as server:
        chat = EndpointChat(server.url, "m", max_retries=0)
        assert chat.reply(HELLO) == "alive"
    with pytest.raises(ChatError, match="cannot be reached"):
        chat.reply(HELLO)


def test_an_address_where_nobody_listens_is_a_chat_error():
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with pytest.raises(ChatError, match=f"127.0.0.1:{port}.*start it, or check the address"):
        EndpointChat(f"http://127.0.0.1:{port}/v1", "m", max_retries=0).reply(HELLO)


def test_an_impossible_address_is_a_chat_error():
    with pytest.raises(ChatError, match="address"):
        EndpointChat("http://[::bad/v1", "m")


def test_characters_that_json_cannot_carry_are_replaced():
    with fake_server((200, completion("fine"))) as server:
        assert EndpointChat(server.url, "m").reply([{"role": "user", "content": "lone \ud800 surrogate"}]) == "fine"
        assert json.dumps(server.requests[0][1]["messages"][0]["content"]) == '"lone ? surrogate"'


# ------------------------------------------------------------------------- loading


def test_a_chat_model_passes_through_and_none_stays_none(plain: LocalChat):
    assert load_chat(plain) is plain
    assert load_chat(None) is None


def test_a_url_needs_the_name_of_a_model():
    for url in ("http://localhost:8000/v1", "https://localhost/v1"):
        with pytest.raises(ChatError, match="--chat-model"):
            load_chat(url)
        chat = load_chat(url, model="m", timeout=5.0)
        assert isinstance(chat, EndpointChat)
        assert (chat.base_url, chat.name, chat.timeout) == (url, "m", 5.0)


def test_anything_else_is_a_hub_id_or_a_folder(folder: Callable[[str | None], Path]):
    chat = load_chat(str(folder(None)))
    assert isinstance(chat, LocalChat)
    assert chat.reply(HELLO) == PLAIN
