"""Tables of prompts in and out of files.

.jsonl, .csv and .parquet have a column `prompt`, .txt has one prompt a line; `-` is standard input or output, as JSONL.
"""

import csv
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lance.corpus import BOM, DataWarning, parse_rows, read_rows
from lance.errors import DataError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".csv", ".parquet", ".txt")
CHUNK, BLOCK = 1024, 8192  # rows read at a time, rows in a part of what is written
LONGEST = 1 << 30  # characters of a field


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
    csv.field_size_limit(LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            header: list[str] = []
            for name in next(lines, []):
                header.append(next(n for n in chain([name], (f"{name}.{i}" for i in count(1))) if n not in header))
            if not header:
                raise DataError(f"cannot read {str(path)!r} as csv: its first line should name the columns")
            for row in lines:
                if row and len(row) != len(header):
                    message = f"left out ({len(row)} fields, expected {len(header)}; put quotes around a text with commas)"
                    warnings.warn(f"{path}, line {lines.line_num}: {message}", DataWarning, stacklevel=2)
                elif row:
                    yield lines.line_num, dict(zip(header, row, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 (byte {error.start} of a block: {error.reason}); save it as UTF-8") from error
    except (csv.Error, OSError) as error:
        raise DataError(f"cannot read {str(path)!r} as csv: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile

    try:
        number = 1
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK):
                for row in batch.to_pylist():
                    yield number, {k: v for k, v in row.items() if not k.startswith("__index_level_")}  # pandas' row numbers
                    number += 1
    except (pa.ArrowException, OverflowError, OSError) as error:
        raise DataError(f"cannot read {str(path)!r} as parquet: {error}") from error


def _with_prompts(rows: Iterable[tuple[int, Row]], source: str) -> Iterator[Row]:
    for number, row in rows:
        if isinstance(row.get("prompt"), str):
            yield row
        else:
            warnings.warn(f"{source}, line {number}: left out (`prompt` is {row.get('prompt')!r}, expected a text)", DataWarning, stacklevel=2)


class TableWriter:
    """Writes rows as they come, and keeps a block of them in memory at most.

    JSONL is written line by line, so that an interrupted run can be resumed. Other formats are gathered in a temporary folder and written at the end, when all
    columns are known. An old file is replaced by the first `write` or by `close`, so that a run that fails before leaves it alone. With `resume`, rows that
    the JSONL file already holds are kept, and `done` says how many; a half-written last line is cut off.
    """

    def __init__(self, target: str, *, resume: bool = False) -> None:
        self.target = target
        self.path = None if target == "-" else Path(target)
        self.done = 0
        self._end: int | None = None  # where a resumed file goes on
        self._folder: TemporaryDirectory[str] | None = None
        self._parts: list[Path] = []
        self._waiting: list[Row] = []
        if self.path is not None:
            if self.path.suffix not in (".jsonl", ".csv", ".parquet"):
                raise DataError(f"cannot tell the format of {target!r}; expected .jsonl, .csv or .parquet, or - for JSONL on standard output")
            if not self.path.parent.is_dir():
                raise DataError(f"no folder {str(self.path.parent)!r} to write {self.path.name!r} to; create it first")
            if resume and self.path.suffix != ".jsonl":
                raise DataError(f"only .jsonl output can be resumed, {target!r} is {self.path.suffix}; leave --resume out or write .jsonl")
            if resume and self.path.is_file():
                self.done, self._end = _whole_lines(self.path)
        self._lines = self.path is None or self.path.suffix == ".jsonl"
        self._append = False

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows.

        Raises
        ------
        DataError
            When a .parquet file cannot hold their values.
        """
        if not self._lines:
            self._waiting += rows
            if len(self._waiting) >= BLOCK:
                self._write_part()
            return
        # Streams may know ASCII only; in a file, `backslashreplace` makes a lone surrogate the JSON escape that it was.
        text = "".join(json.dumps(_plain(row), ensure_ascii=self.path is None) + "\n" for row in rows)
        if self.path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        if not self._append and self._end is not None:
            os.truncate(self.path, self._end)
        with self.path.open("wb" if not self._append and self._end is None else "ab") as f:
            f.write(text.encode("utf-8", "backslashreplace"))
        self._append = True

    def close(self) -> None:
        """Write what is still held back.

        Raises
        ------
        DataError
            When no .parquet file can hold all rows, as a column is of one kind here and of another there; they are then in a .jsonl file beside it.
        """
        if self._lines:
            if not self._append:
                self.write([])
            return
        assert self.path is not None
        self._write_part()
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            (_join_csv if self.path.suffix == ".csv" else _join_parquet)(self._parts, partial, self.path)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
            if self._folder:
                self._folder.cleanup()

    def _write_part(self) -> None:
        rows, self._waiting = [_encodable(row) for row in self._waiting], []
        if not rows:
            return
        self._folder = self._folder or TemporaryDirectory(prefix="lance-")
        part = Path(self._folder.name) / str(len(self._parts))
        if self.target.endswith(".csv"):
            part.write_text("".join(json.dumps(_plain(row)) + "\n" for row in rows), encoding="utf-8")
        else:
            import pyarrow as pa  # type: ignore[import-untyped]
            from pyarrow import parquet

            columns = dict.fromkeys(c for row in rows for c in row)
            try:
                parquet.write_table(pa.table({c: pa.array([row.get(c) for row in rows]) for c in columns}), part)
            except (pa.ArrowException, OverflowError, OSError) as error:
                raise DataError(f"cannot write these rows to {self.target!r}: {error}; .jsonl holds values of any kind") from error
        self._parts.append(part)


def _whole_lines(path: Path) -> tuple[int, int]:
    """How many whole lines a file has, and where the last of them ends."""
    count = end = position = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            if b"\n" in block:
                end = position + block.rfind(b"\n") + 1
            position += len(block)
    return count, end


def _join_csv(parts: Sequence[Path], partial: Path, target: Path) -> None:
    def rows() -> Iterator[Row]:
        for part in parts:
            with part.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    columns = list(dict.fromkeys(c for row in rows() for c in row))
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")  # or a lone carriage return would go without quotes
        writer.writerow(columns)
        for row in rows():
            given = (row.get(c) for c in columns)
            writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for v in given])


def _join_parquet(parts: Sequence[Path], partial: Path, target: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = pa.unify_schemas([parquet.read_schema(p).remove_metadata() for p in parts], promote_options="permissive") if parts else pa.schema([])
        with parquet.ParquetWriter(partial, schema) as writer:
            for part in parts:
                table = parquet.read_table(part).replace_schema_metadata()
                writer.write_table(pa.concat_tables([schema.empty_table(), table], promote_options="permissive").cast(schema))
    except (pa.ArrowException, OverflowError, OSError) as error:
        rescue = target.with_name(f"{target.stem}.rescued.jsonl")
        with rescue.open("w", encoding="utf-8") as file:
            for part in parts:
                file.writelines(json.dumps(_plain(row)) + "\n" for row in parquet.read_table(part).to_pylist())
        raise DataError(f"cannot write {str(target)!r}: {error}; all rows are in {str(rescue)!r}") from error


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
