"""The command line: ask, score, refine, train, evaluate."""

import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lance.errors import LanceError

if TYPE_CHECKING:
    from lance.pipeline import Lance, Reply

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line break
Model = Annotated[Path | None, typer.Option("--model", help="A model folder written by `lance train`; the shipped one by default.", show_default=False)]
Chat = Annotated[
    str | None, typer.Option("--chat", help="Who answers: a hub id, a model folder, or the URL of an OpenAI-compatible server.", show_default=False)
]
ChatName = Annotated[str | None, typer.Option("--chat-model", help="The model's name on the server.", show_default=False)]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda.", show_default="cpu")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
Output = Annotated[str, typer.Option("-o", "--output", help="Where to write: .jsonl, .csv, .parquet, or - for JSONL on standard output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the rows that the .jsonl output already holds and go on after them.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Windows in a forward pass.")]


class Adaptation(StrEnum):
    full = "full"
    lora = "lora"
    frozen = "frozen"


@app.callback()
def main() -> None:
    """LANCE: why a prompt should not simply be complied with, as a distribution; and what it could be instead."""


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: Model = None,
    chat: Chat = None,
    chat_model: ChatName = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Show the rejection distribution of a prompt, the spans behind it, the refined prompt, and the answer.

    Examples:

        lance ask "What will bitcoin cost in 2030?"

        lance ask --json "Who wrote it?" | jq .risk

        lance ask --chat http://localhost:8000/v1 --chat-model llama "Name Earth's two moons."
    """
    with _errors():
        from lance.pipeline import ask_record

        lance = _load(model, chat, chat_model, device, seed)
        reply = lance.respond(prompt)
        if as_json:
            typer.echo(json.dumps(ask_record(reply), ensure_ascii=True))
        else:
            _show(reply, lance)


@app.command()
def score(
    source: Annotated[str, typer.Argument(metavar="IN", help="Prompts: .jsonl, .csv or .parquet with a column `prompt`, .txt with one a line, or -.")],
    output: Output,
    model: Model = None,
    device: Device = None,
    batch_size: Batch = 64,
    resume: Resume = False,
) -> None:
    """Add risk, risk_upper, vacuity, top, top_category, distribution and categories to a table of prompts.

    Examples:

        lance score prompts.jsonl -o scores.parquet

        cat prompts.jsonl | lance score - -o - | jq .risk
    """
    with _errors():
        from lance.pipeline import score_record

        def work(lance: "Lance", texts: list[str]) -> list[dict[str, Any]]:
            return [score_record(d) for d in lance.score(texts, batch_size)]

        _table(source, output, resume, lambda: _load(model, None, None, device, 0), work, chunk=1024, name="score")


@app.command()
def refine(
    source: Annotated[str, typer.Argument(metavar="IN", help="Prompts: .jsonl, .csv or .parquet with a column `prompt`, .txt with one a line, or -.")],
    output: Output,
    model: Model = None,
    chat: Chat = None,
    chat_model: ChatName = None,
    device: Device = None,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Add refined, outcome, steps, risk, risk_after, verifier_risk_after and similarity to a table of prompts.

    `refined` is empty where nothing may be forwarded (clarify, declined, abstained); prompts that pass come back byte for byte.

    Examples:

        lance refine prompts.jsonl -o refined.jsonl

        lance refine prompts.csv -o refined.jsonl --resume
    """
    with _errors():
        columns = ("refined", "outcome", "steps", "risk", "risk_after", "verifier_risk_after", "similarity")

        def work(lance: "Lance", texts: list[str]) -> list[dict[str, Any]]:
            return [{k: v for k, v in r.to_dict().items() if k in columns} for r in lance.refine(texts)]

        _table(source, output, resume, lambda: _load(model, chat, chat_model, device, seed), work, chunk=64, name="refine")


@app.command()
def train(
    output: Annotated[Path, typer.Option("-o", "--output", help="The model folder to write.")],
    data: Annotated[
        Path | None, typer.Argument(help="Labelled prompts (.jsonl with `text` and `labels`); the embedded corpus by default.", show_default=False)
    ] = None,
    taxonomy: Annotated[Path | None, typer.Option("--taxonomy", help="Your own taxonomy (YAML).", show_default=False)] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="A hub id or folder.", show_default="packaged all-MiniLM-L6-v2")] = None,
    adaptation: Annotated[
        Adaptation, typer.Option("--encoder-training", help="Train all linear layers of the encoder along, a LoRA adapter, or nothing of it.")
    ] = Adaptation.full,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the rows.", show_default=False)] = None,
    public: Annotated[bool, typer.Option("--public/--no-public", help="With the embedded corpus: add the public training rows of LANCE_DATA.")] = True,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Train enhancer and verifier, calibrate them, set the threshold, and write a model folder with its card.

    Rows of the split `validation` serve for calibration (a tenth is drawn when there are none); those of the split `test` are measured at the end.

    Examples:

        lance train -o my-model

        lance train prompts.jsonl --taxonomy mine.yml --encoder-training frozen -o my-model
    """
    with _errors():
        from lance import training
        from lance.corpus import load_corpus, read_prompts
        from lance.encoder import PromptEncoder
        from lance.fitting import EnhancerConfig, hold_out
        from lance.metrics import classification_figures
        from lance.taxonomy import Taxonomy

        kinds = Taxonomy.from_yaml(taxonomy) if taxonomy else Taxonomy.builtin()
        enc = PromptEncoder.from_pretrained(encoder, device=device)
        given: dict[str, Any] = {"seed": seed} | ({"epochs": epochs} if epochs else {})
        settings: dict[Adaptation, Callable[..., EnhancerConfig]] = {
            Adaptation.full: EnhancerConfig.full,
            Adaptation.lora: EnhancerConfig.lora,
            Adaptation.frozen: EnhancerConfig,
        }
        config = settings[adaptation](**given)
        if data is None:
            rows, test, corpus = training.embedded_training_set(kinds, enc, use_public=public, seed=seed), load_corpus("test"), load_corpus("train")
        else:
            every = read_prompts(data, kinds)
            test = [p for p in every if p.split == "test"]
            corpus, held = hold_out([p for p in every if p.split != "test"], None, seed)
            rows = training.TrainingSet(training.augmented(corpus, kinds, seed), training.augmented(held, kinds, seed), {str(data): len(corpus)})

        def show(record: dict[str, Any]) -> None:
            typer.echo(f"epoch {record['epoch']:.0f}: objective {record['objective']:.2f}, label {record['label']:.3f}, KL(d) {record['kl_d']:.1f}", err=True)

        start = time.perf_counter()
        fitted = training.train(rows, taxonomy=kinds, encoder=enc, config=config, exemplars=corpus, progress=show)
        seconds = time.perf_counter() - start
        figures: dict[str, Any] = {}
        if test:
            figures = {f"test split: {k}": v for k, v in classification_figures(fitted.enhancer.predict_proba([p.text for p in test]), test, kinds).items()}
        fitted.save_pretrained(output)
        training.write_model_card(fitted, rows, output, figures, seconds)
        for key, value in figures.items():
            typer.echo(f"{key} {value:.3f}", err=True)
        typer.echo(str(output))


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Labelled prompts: .jsonl with `text` and `labels`.")],
    model: Model = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model on labelled prompts: accuracy, macro-F1, AUROC, calibration, and the share of benign prompts that pass.

    Example:

        lance evaluate my-test.jsonl --model my-model
    """
    with _errors():
        import numpy as np

        from lance.corpus import read_prompts
        from lance.metrics import classification_figures

        lance = _load(model, None, None, device, 0)
        prompts = read_prompts(data, lance.taxonomy)
        found = lance.score([p.text for p in prompts])
        means = np.array([list(d.mean.values()) for d in found])
        figures: dict[str, Any] = {"n": len(prompts), **classification_figures(means, prompts, lance.taxonomy)}
        passed = [d.risk_upper < lance.threshold for d, p in zip(found, prompts, strict=True) if p.benign]
        stopped = [d.risk_upper >= lance.threshold for d, p in zip(found, prompts, strict=True) if not p.benign]
        figures |= {"benign_passed": float(np.mean(passed)) if passed else None, "noncompliant_stopped": float(np.mean(stopped)) if stopped else None}
        if as_json:
            typer.echo(json.dumps({k: v if v is None or math.isfinite(v) else None for k, v in figures.items()}))
        else:
            for key, value in figures.items():
                typer.echo(f"{key:22}{value:.4f}" if isinstance(value, float) else f"{key:22}{value}")


def _load(model: Path | None, chat: str | None, chat_model: str | None, device: str | None, seed: int) -> "Lance":
    from lance.pipeline import Lance

    return Lance.from_pretrained(model, chat=chat, model=chat_model, device=device, seed=seed)


def _open(source: str, output: str, resume: bool) -> tuple[Iterable[dict[str, Any]], Any, Callable[[], None]]:
    """Rows as they are read, a writer, and what is left to do when all is written: a table that is written over stays as it is until then."""
    from lance.errors import DataError
    from lance.tables import TableWriter, iter_table

    rows, path = iter_table(source), Path(output)
    if "-" in (source, output) or not path.exists() or not path.samefile(source):
        writer = TableWriter(output, resume=resume)
        return rows, writer, writer.close
    if resume:
        raise DataError(f"{output!r} is input and output, so there is no telling what is done; give another output, or leave --resume out")
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    writer = TableWriter(str(partial))

    def finish() -> None:
        writer.close()
        partial.replace(path)

    return rows, writer, finish


def _table(
    source: str, output: str, resume: bool, load: Callable[[], "Lance"], work: Callable[["Lance", list[str]], list[dict[str, Any]]], *, chunk: int, name: str
) -> None:
    """Work through a table in chunks, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    from lance.tables import count_rows

    rows, writer, finish = _open(source, output, resume)
    lance, console = load(), Console(stderr=True)
    total = count_rows(source) if console.is_terminal else None
    writer.write([])  # the model is there: from here on a run that is interrupted resumes from its own rows, not from those of an older one
    given = islice(track(rows, description=name, total=total, console=console, disable=not console.is_terminal), writer.done, None)
    while part := list(islice(given, chunk)):
        writer.write([{**row, **found} for row, found in zip(part, work(lance, [row["prompt"] for row in part]), strict=True)])
    finish()


@contextmanager
def _errors() -> Iterator[None]:
    """Report what went wrong in one line and exit with 1; report rows that were left out on standard error."""

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        from lance.corpus import DataWarning

        if issubclass(category, DataWarning):
            typer.echo(f"lance: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (LanceError, OSError) as error:
            typer.echo(f"lance: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("lance: interrupted", err=True)
            raise typer.Exit(1) from None


def _show(reply: "Reply", lance: "Lance") -> None:
    """The answer to `ask` for a person."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    r = reply.refinement

    def say(label: str, *parts: str | tuple[str, str]) -> None:
        """Print a line without control characters and lone surrogates: most of its text was written by others."""
        line = Text.assemble((f"{label:8}", "bold"), *parts)
        line.plain = CONTROL.sub("\ufffd", line.plain)
        console.print(line)

    say("prompt", r.prompt)
    if r.outcome != "abstained":
        table = Table(box=None, show_header=False, padding=(0, 1))
        for key, value in sorted(r.before.mean.items(), key=lambda kv: -kv[1])[:6]:
            if value >= 0.01:
                c = lance.taxonomy[key]
                table.add_row(c.name, Text("█" * max(1, round(30 * value)), style=c.colour), f"{value:.2f}")
        console.print(table)
        low, high = r.before.risk_interval
        say("risk", f"{r.before.risk:.2f}, 90 % interval {low:.2f} to {high:.2f} (passes below {lance.threshold:.2f} at the upper end)")
    for g in r.gradient.gradients:
        spans = ", ".join(f"“{s.text}” ({s.occlusion:+.1f})" for s in g.spans) or "no single span"
        say("because", (f"{g.name} {g.weight:.2f}", lance.taxonomy[g.category].colour), f": {spans}")
    for i, step in enumerate(r.steps, start=1):
        say(f"step {i}", f"{step.text}  [U95 {step.risk_upper:.2f}, cosine {step.similarity:.2f}, {step.proposer}]")
    say("outcome", f"{r.outcome}: {r.reason}")
    if r.refined is not None:
        say("refined", "as it is" if r.refined == r.prompt else r.refined)
        if r.refined != r.prompt:
            verifier = f"verifier {r.verifier_risk_after:.2f} (was {r.verifier_risk_before:.2f})"
            say("after", f"risk {r.after.risk:.2f}, upper {r.after.risk_upper:.2f}; {verifier}")
    say("answer", reply.text)


if __name__ == "__main__":
    app()
