"""Tables of prompts in and out of files.

.jsonl, .csv and .parquet have a column `prompt`, .txt has one prompt a line; `-` is standard input or output, as JSONL.
"""

import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lance.corpus import BOM, DataWarning, parse_rows, read_rows
from lance.errors import DataError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".csv", ".parquet", ".txt")
NESTED = (dict, list, np.ndarray)
CHUNK = 1024  # rows read at a time


def read_table(source: str) -> list[Row]:
    """Rows of a table, each with a text `prompt`; rows without one are reported with file and line, and the others kept.

    Raises
    ------
    DataError
        For an unknown ending, an unreadable file, or a table without the column.
    """
    return list(iter_table(source))


def iter_table(source: str) -> Iterator[Row]:
    """What `read_table` gives, row by row, for tables that do not fit into memory. What is wrong with the source as a whole is raised at once."""
    rows = _numbered_rows(source)
    first: list[tuple[int, Row]] = []
    for numbered in rows:
        first.append(numbered)
        if "prompt" in numbered[1]:
            break
    else:
        if first:
            raise DataError(f"{source!r} has no column 'prompt'; its columns are {', '.join(first[0][1]) or 'none'}. Rename the one that holds the prompts")
    return _with_prompts(chain(first, rows), "standard input" if source == "-" else source)


def count_rows(source: str) -> int | None:
    """How many rows a file has, for a progress bar, where that is quickly told: lines of text, empty ones included, or what a .parquet file says of itself."""
    path = Path(source)
    if path.suffix in (".jsonl", ".txt"):
        with path.open("rb") as file:
            return sum(1 for _ in file)
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

        return int(ParquetFile(path).metadata.num_rows)
    return None


def _numbered_rows(source: str) -> Iterator[tuple[int, Row]]:
    if source == "-":
        return parse_rows(sys.stdin.buffer, "standard input")
    path = Path(source)
    if path.suffix not in ENDINGS:
        raise DataError(f"cannot tell the format of {source!r}; expected one of {', '.join(ENDINGS)}, or - for JSONL on standard input")
    if not path.is_file():
        raise DataError(f"no file {source!r}; give the path of a table of prompts")
    return {".jsonl": read_rows, ".txt": _text_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix](path)


def _text_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, given in enumerate(file, start=1):
            try:
                text = (given.removeprefix(BOM) if number == 1 else given).decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                warnings.warn(f"{path}, line {number}: left out ({error})", DataWarning, stacklevel=2)
                continue
            if text.strip():
                yield number, {"prompt": text}


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pandas as pd

    try:
        number = 2
        with pd.read_csv(path, keep_default_na=False, dtype=str, encoding="utf-8-sig", chunksize=CHUNK) as frames:
            for frame in frames:
                for row in frame.to_dict("records"):
                    yield number, {str(k): v for k, v in row.items()}
                    number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 (byte {error.start} of a block: {error.reason}); save it as UTF-8") from error
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"cannot read {str(path)!r} as csv: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow.parquet import ParquetFile

        number = 1
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK):
                for row in batch.to_pylist():
                    yield number, {k: v for k, v in row.items() if not k.startswith("__index_level_")}  # pandas' row numbers
                    number += 1
    except (ImportError, ValueError, OSError) as error:  # pyarrow's errors are of these kinds
        raise DataError(f"cannot read {str(path)!r} as parquet: {error}") from error


def _with_prompts(rows: Iterable[tuple[int, Row]], source: str) -> Iterator[Row]:
    for number, row in rows:
        if isinstance(row.get("prompt"), str):
            yield row
        else:
            warnings.warn(f"{source}, line {number}: left out (`prompt` is {row.get('prompt')!r}, expected a text)", DataWarning, stacklevel=2)


class TableWriter:
    """Writes rows as they come, and keeps none of them in memory. JSONL is written line by line, so that an interrupted run can be resumed; other formats
    are gathered in a temporary folder and written at the end, when all columns are known.

    An old file is replaced by the first `write` or `close`, so that a run that fails before leaves it alone. With `resume`, rows that the JSONL file
    already holds are kept, and `done` says how many; a half-written last line is cut off.
    """

    def __init__(self, target: str, *, resume: bool = False) -> None:
        self.target = target
        self.path = None if target == "-" else Path(target)
        self.done = 0
        self._folder: TemporaryDirectory[str] | None = None
        self._parts: list[Path] = []
        if self.path is not None:
            if self.path.suffix not in (".jsonl", ".csv", ".parquet"):
                raise DataError(f"cannot tell the format of {target!r}; expected .jsonl, .csv or .parquet, or - for JSONL on standard output")
            if not self.path.parent.is_dir():
                raise DataError(f"no folder {str(self.path.parent)!r} to write {self.path.name!r} to; create it first")
            if resume and self.path.suffix != ".jsonl":
                raise DataError(f"only .jsonl output can be resumed, {target!r} is {self.path.suffix}; leave --resume out or write .jsonl")
            if resume and self.path.is_file():
                kept = self.path.read_bytes()
                kept = kept[: kept.rfind(b"\n") + 1]
                self.path.write_bytes(kept)
                self.done = kept.count(b"\n")
        self._lines = self.path is None or self.path.suffix == ".jsonl"
        self._append = self.done > 0

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows."""
        if not self._lines:
            self._write_part([_encodable(row) for row in rows])
            return
        # Streams may know ASCII only; in a file, `backslashreplace` makes a lone surrogate the JSON escape that it was.
        text = "".join(json.dumps(_plain(row), ensure_ascii=self.path is None) + "\n" for row in rows)
        if self.path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            with self.path.open("ab" if self._append else "wb") as f:
                f.write(text.encode("utf-8", "backslashreplace"))
            self._append = True

    def close(self) -> None:
        """Write what is still held back."""
        if self.path is None:
            return
        if self._lines:
            if not self._append:
                self.path.write_bytes(b"")
            return
        import pandas as pd

        ending = self.path.suffix
        if not self._parts:
            pd.DataFrame([]).to_csv(self.path, index=False) if ending == ".csv" else pd.DataFrame([]).to_parquet(self.path, index=False)
        elif ending == ".csv":
            _join_csv(self._parts, self.path)
        else:
            _join_parquet(self._parts, self.path)
        if self._folder:
            self._folder.cleanup()

    def _write_part(self, rows: list[Row]) -> None:
        import pandas as pd

        if not rows:
            return
        self._folder = self._folder or TemporaryDirectory(prefix="lance-")
        part = Path(self._folder.name) / str(len(self._parts))
        self._parts.append(part)
        if self.target.endswith(".csv"):
            rows = [{k: json.dumps(_plain(v), ensure_ascii=False) if isinstance(v, NESTED) else v for k, v in row.items()} for row in rows]
            pd.DataFrame(rows).to_csv(part, index=False)
            return
        try:
            pd.DataFrame(rows).to_parquet(part, index=False)
        except (ValueError, TypeError) as error:
            raise DataError(f"cannot write these rows to {self.target!r}: {error}; .jsonl holds columns of mixed kinds") from error


def _join_csv(parts: Sequence[Path], target: Path) -> None:
    import pandas as pd

    headers = [pd.read_csv(p, nrows=0).columns for p in parts]
    columns = list(dict.fromkeys(c for h in headers for c in h))
    with target.open("wb") as out:
        out.write(pd.DataFrame(columns=columns).to_csv(index=False).encode())
        for part, header in zip(parts, headers, strict=True):
            if list(header) == columns:
                out.write(part.read_bytes()[len(pd.DataFrame(columns=columns).to_csv(index=False).encode()) :])
            else:
                given = pd.read_csv(part, keep_default_na=False, dtype=str).reindex(columns=columns)
                out.write(given.to_csv(index=False, header=False).encode())


def _join_parquet(parts: Sequence[Path], target: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        schema = pa.unify_schemas([parquet.read_schema(p).remove_metadata() for p in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"cannot write {str(target)!r}: {error}; .jsonl holds columns of mixed kinds") from error
    with parquet.ParquetWriter(target, schema) as writer:
        for part in parts:
            table = parquet.read_table(part).replace_schema_metadata()
            writer.write_table(pa.concat_tables([schema.empty_table(), table], promote_options="permissive").cast(schema))


def _plain(value: Any) -> Any:
    """Data that JSON can hold: values of numpy and pandas become plain ones; gaps, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return None if str(value) in ("NaT", "<NA>") else str(value)


def _encodable(value: Any) -> Any:
    """The value with lone surrogates, which no encoding has, as replacement characters."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, dict):
        return {_encodable(k): _encodable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_encodable(v) for v in value]
    return value
