"""Tables of prompts in and out of files.

.jsonl, .csv and .parquet have a column `prompt`, .txt has one prompt a line; `-` is standard input or output, as JSONL.
"""

import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lance.corpus import BOM, DataWarning, parse_rows, read_rows
from lance.errors import DataError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".csv", ".parquet", ".txt")
NESTED = (dict, list, np.ndarray)


def read_table(source: str) -> list[Row]:
    """Rows of a table, each with a text `prompt`; rows without one are reported with file and line, and the others kept.

    Raises
    ------
    DataError
        For an unknown ending, an unreadable file, or a table without the column.
    """
    if source == "-":
        return _checked(list(parse_rows(sys.stdin.buffer.read(), "standard input")), "standard input")
    path = Path(source)
    if path.suffix not in ENDINGS:
        raise DataError(f"cannot tell the format of {source!r}; expected one of {', '.join(ENDINGS)}, or - for JSONL on standard input")
    if not path.is_file():
        raise DataError(f"no file {source!r}; give the path of a table of prompts")
    if path.suffix == ".jsonl":
        return _checked(list(read_rows(path)), source)
    if path.suffix == ".txt":
        return _checked(list(_text_lines(path)), source)
    import pandas as pd

    try:
        frame = pd.read_csv(path, keep_default_na=False, dtype=str, encoding="utf-8-sig") if path.suffix == ".csv" else pd.read_parquet(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{source!r} is not UTF-8 (byte {error.start} of a block: {error.reason}); save it as UTF-8") from error
    except Exception as error:
        raise DataError(f"cannot read {source!r} as {path.suffix[1:]}: {error}") from error
    return _checked(
        [(i, {str(k): v for k, v in row.items()}) for i, row in enumerate(frame.to_dict("records"), start=2 if path.suffix == ".csv" else 1)], source
    )


def _text_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(path.read_bytes().removeprefix(BOM).splitlines(), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            warnings.warn(f"{path}, line {number}: left out ({error})", DataWarning, stacklevel=2)
            continue
        if text.strip():
            yield number, {"prompt": text}


def _checked(rows: list[tuple[int, Row]], source: str) -> list[Row]:
    if rows and not any("prompt" in row for _, row in rows):
        raise DataError(f"{source!r} has no column 'prompt'; its columns are {', '.join(rows[0][1]) or 'none'}. Rename the one that holds the prompts")
    out = []
    for number, row in rows:
        if isinstance(row.get("prompt"), str):
            out.append(row)
        else:
            warnings.warn(f"{source}, line {number}: left out (`prompt` is {row.get('prompt')!r}, expected a text)", DataWarning, stacklevel=2)
    return out


class TableWriter:
    """Writes rows as they come. JSONL is written line by line, so that an interrupted run can be resumed; other formats are written at the end.

    An old file is replaced by the first `write` or `close`, so that a run that fails before leaves it alone. With `resume`, rows that the JSONL file
    already holds are kept, and `done` says how many; a half-written last line is cut off.
    """

    def __init__(self, target: str, *, resume: bool = False) -> None:
        self.target = target
        self.path = None if target == "-" else Path(target)
        self.done = 0
        self._rows: list[Row] = []
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
            self._rows += rows
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

        rows = [_encodable(row) for row in self._rows]
        if self.path.suffix == ".csv":
            rows = [{k: json.dumps(_plain(v), ensure_ascii=False) if isinstance(v, NESTED) else v for k, v in row.items()} for row in rows]
            pd.DataFrame(rows).to_csv(self.path, index=False)
        else:
            pd.DataFrame(rows).to_parquet(self.path, index=False)


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
