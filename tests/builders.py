"""Small real models, written to a folder with their tokenizers, and a server that stands for the network."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel
from transformers.utils import logging

logging.disable_progress_bar()

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ("the", "how", "what", "who", "is", "kill", "process", "python", "a", "bomb", "build", "moon", "name", "neighbour", "house", "they", "like")


def wordpiece() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer as BERT has it, over letters, digits and a few words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *".,;:!?'\"()-", *(w for w in WORDS if len(w) > 1)]
    core = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def bytes_tokenizer(*, specials: bool, extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; with `specials`, every text is put between <s> and </s>. `extra` are tokens that only decoding uses."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = ["<s>", "<pad>", "</s>", "<mask>", *sorted(level.alphabet()), *(level.pre_tokenize_str(t)[0][0] for t in extra)]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = level
    core.decoder = decoders.ByteLevel()
    if specials:
        core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", mask_token="<mask>")


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert_folder(folder: Path, *, hidden: int = 32, positions: int = 512) -> Path:
    """A BERT encoder with random weights."""
    tokenizer = wordpiece()
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * hidden}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **sizes))
    return _save(model, tokenizer, folder)


def roberta_folder(folder: Path, *, hidden: int = 16, positions: int = 130) -> Path:
    """A RoBERTa encoder with random weights; its first two positions are never used, as in the original."""
    tokenizer = bytes_tokenizer(specials=True)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * hidden}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RobertaModel(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, pad_token_id=1, **sizes))
    return _save(model, tokenizer, folder)


def llama_encoder_folder(folder: Path, *, hidden: int = 16) -> Path:
    """A Llama body as an encoder; its tokenizer adds no special tokens."""
    tokenizer = bytes_tokenizer(specials=False)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 2 * hidden}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    return _save(model, tokenizer, folder)


def chat_folder(folder: Path, after: dict[str, str], *, template: str | None = None, positions: int = 4096) -> Path:
    """A Llama causal model whose reply depends on the last character that it reads alone: `after` maps that character to the reply.

    Attention and MLP write nothing to the residual stream, so that the output is a table over the last token: a character leads to a token that
    decodes to the whole reply, and that one to the end. An unlisted character leads to the end at once.
    """
    tokenizer = bytes_tokenizer(specials=False, extra=list(after.values()))
    n = len(tokenizer)
    config = LlamaConfig(
        vocab_size=n, hidden_size=n + n % 2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8, intermediate_size=8,
        max_position_embeddings=positions, tie_word_embeddings=False, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    end = tokenizer.eos_token_id
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(n, config.hidden_size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        head = model.lm_head.weight.zero_()
        head[end] = 5.0
        for i, character in enumerate(after):
            reply = n - len(after) + i
            head[reply, tokenizer(character)["input_ids"][-1]] = 10.0
    if template is not None:
        tokenizer.chat_template = template
    return _save(model, tokenizer, folder)


def adapter_of(folder: Path, model: Any, target: Sequence[str], change: Callable[[Any], None]) -> Path:
    """A LoRA adapter of rank 1 for a model, changed by `change`, saved in PEFT's layout. The model given is left with the adapter on."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=list(target)))
    with torch.no_grad():
        change(adapted)
    adapted.save_pretrained(folder)
    return folder


def completion(text: Any) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "message": message}]}).encode()


class FakeServer(ThreadingHTTPServer):
    """An OpenAI-compatible server on loopback that sends one answer after another, (status, body[, content type]), the last one again and again.

    `requests` holds the (path, JSON body) pairs that it got; a body of None breaks the connection off, and `delay` seconds pass before each answer.
    """

    daemon_threads = True

    def __init__(self, answers: Sequence[tuple[Any, ...]], delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.delay = delay
        self.requests: list[tuple[str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up (a timeout) is what some tests want."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        index = min(len(self.server.requests), len(self.server.answers) - 1)
        self.server.requests.append((self.path, body))
        time.sleep(self.server.delay)
        status, payload, kind = (*self.server.answers[index], "application/json")[:3]
        if payload is None:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(payload)))
        if status >= 429:
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def fake_server(*answers: tuple[Any, ...], delay: float = 0.0) -> Iterator[FakeServer]:
    """A running FakeServer."""
    server = FakeServer(answers, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def flip_byte(path: Path, position: int = -1) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
