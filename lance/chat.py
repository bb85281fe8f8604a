"""Chat models behind one interface: a local transformers causal model, or any OpenAI-compatible endpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from lance.errors import ChatError, ModelError

Message = dict[str, str]


@runtime_checkable
class ChatModel(Protocol):
    """Anything that replies to a list of messages, each with `role` (system, user, assistant) and `content`."""

    name: str

    def reply(self, messages: Sequence[Message], *, max_tokens: int = 512, temperature: float = 0.0, seed: int = 0) -> str: ...


class LocalChat:
    """A transformers causal language model, with an optional PEFT adapter.

    The tokenizer's chat template is used when it has one; otherwise the messages are written as plain `role: content` lines.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "local") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @classmethod
    def from_pretrained(cls, name: str, *, adapter: str | Path | None = None, revision: str | None = None, device: str | None = None) -> "LocalChat":
        """Load from the hub or a local folder; safetensors only.

        Raises
        ------
        ChatError
            When there is no such model, or it is no causal language model.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from lance.encoder import quiet, require_adapter, usable_device

        try:
            place = usable_device(device or "cpu")
            dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
                model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True)
                if adapter is not None:
                    from peft import PeftModel

                    require_adapter(adapter)
                    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except (OSError, ValueError, RuntimeError, SafetensorError, ModelError) as error:
            raise ChatError(f"cannot load the chat model {name!r}: {error}; give a hub id or a folder with a causal model, or the URL of a server") from error
        return cls(model.to(place).eval(), tokenizer, name)

    def reply(self, messages: Sequence[Message], *, max_tokens: int = 512, temperature: float = 0.0, seed: int = 0) -> str:
        """Generate one reply; greedy at temperature 0, otherwise sampled with the seed."""
        import torch

        messages = [{**m, "content": _encodable(m["content"])} for m in messages]
        if getattr(self.tokenizer, "chat_template", None):
            enc = self._templated(messages)
        else:
            text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
            enc = self.tokenizer(text, return_tensors="pt")
        enc = {k: v.to(self.model.device) for k, v in enc.items() if k in ("input_ids", "attention_mask")}
        room = int(getattr(self.model.config, "max_position_embeddings", 1 << 20)) - enc["input_ids"].shape[1]
        if room < 1:
            raise ChatError(f"the messages have {enc['input_ids'].shape[1]} tokens, more than the chat model {self.name!r} can read; shorten the prompt")
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            out = self.model.generate(**enc, max_new_tokens=min(max_tokens, room), pad_token_id=pad, **sampling)
        text = str(self.tokenizer.decode(out[0, enc["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
        if not text:
            raise ChatError(f"the chat model {self.name!r} replied without text; is it made for chat?")
        return text

    def _templated(self, messages: Sequence[Message]) -> Any:
        """The messages in the model's template; a system message goes into the first user message where the template takes none."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
        except TemplateError as error:
            if len(messages) > 1 and messages[0]["role"] == "system":
                first = {**messages[1], "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
                return self._templated([first, *messages[2:]])
            raise ChatError(f"the chat template of {self.name!r} does not take these messages: {error}") from error


class EndpointChat:
    """A model behind an OpenAI-compatible server.

    Parameters
    ----------
    base_url : str
        Such as http://localhost:8000/v1.
    model : str
        The model's name on that server.
    timeout : float
        Seconds for one request.
    max_retries : int
        Repeats after a lost connection, a rate limit or a server error, with growing pauses.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout: float = 60.0, max_retries: int = 2) -> None:
        import openai

        self.base_url, self.name = base_url, model
        self.timeout = timeout
        self._openai = openai
        try:
            self.client = openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=max_retries)
        except Exception as error:
            raise ChatError(f"{base_url!r} is no address of a server: {error}; expected something like http://localhost:8000/v1") from error

    def reply(self, messages: Sequence[Message], *, max_tokens: int = 512, temperature: float = 0.0, seed: int = 0) -> str:
        """Ask the server for one reply.

        Raises
        ------
        ChatError
            When it cannot be reached, is too slow, refuses the request, or replies without text.
        """
        where = f"the server at {self.base_url}"
        try:
            done = self.client.chat.completions.create(
                model=self.name,
                messages=cast(Any, [{**m, "content": _encodable(m["content"])} for m in messages]),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )
        except self._openai.APITimeoutError as error:
            raise ChatError(f"{where} did not answer within {self.timeout:g} s; is the model loaded? A longer timeout may help") from error
        except self._openai.APIConnectionError as error:
            raise ChatError(f"{where} cannot be reached ({error.__cause__ or error}); start it, or check the address") from error
        except self._openai.APIStatusError as error:
            raise ChatError(f"{where} answered {error.status_code} for model {self.name!r}: {error.message}") from error
        except (self._openai.OpenAIError, ValueError) as error:
            raise ChatError(f"{where} sent something that is no chat completion: {error}") from error
        try:
            text = done.choices[0].message.content
        except (AttributeError, IndexError, TypeError):  # the client does not check the shape of what it got
            text = None
        if not isinstance(text, str) or not text.strip():
            raise ChatError(f"{where} sent a reply without text for model {self.name!r}; check that it serves /chat/completions")
        return text.strip()


def _encodable(text: str) -> str:
    """The text without lone surrogates, which no model and no server takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def load_chat(
    chat: "str | ChatModel | None", *, model: str | None = None, adapter: str | Path | None = None, device: str | None = None, **endpoint: Any
) -> ChatModel | None:
    """A chat model from a URL (with `model`), a hub id or a folder; a ChatModel passes through.

    Raises
    ------
    ChatError
        When a URL comes without a model name, or the model cannot be loaded.
    """
    if chat is None or not isinstance(chat, str):
        return chat
    if chat.startswith(("http://", "https://")):
        if not model:
            raise ChatError(f"{chat!r} is a server; name the model it should use with model=… (--chat-model on the command line)")
        return EndpointChat(chat, model, **endpoint)
    return LocalChat.from_pretrained(chat, adapter=adapter, device=device)
