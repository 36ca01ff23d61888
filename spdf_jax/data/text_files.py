"""The documents of one file: plain text, JSON, CSV, Parquet or Arrow, packed or not. All of it is data, never code.

What a file is, its first bytes say, and where they cannot, its name. Documents come one at a time: memory is that of one.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spdf_jax.errors import InputError

Kind = Literal["text", "json lines", "json", "csv", "tsv", "parquet", "arrow"]

PACKED_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
_KINDS: dict[str, Kind] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_MARKS = {  # UTF-32's little-endian one starts with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SNIFF_BYTES = 1 << 16
_READ_CHARS = 1 << 20
_LONGEST_ITEM_CHARS = 1 << 28
_ROWS = 64  # of a table at a time: texts can be long
_BUFFER_BYTES = 1 << 20  # else a column of a row group is read whole, and a file may be one row group


class TextFile(NamedTuple):
    """A file that can be read, and how."""

    path: Path
    kind: Kind
    encoding: str


def plain_suffix(path: Path) -> str:
    """The file's suffix in lower case, without that of what packed it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def text_file(path: Path) -> TextFile:
    """Looks at a file's first bytes.

    Args:
      path: a regular file, as it is or packed by gzip, zstd, bzip2 or xz.

    Returns:
      How its documents are to be read.

    Raises:
      InputError: it holds no text that can be read; names the file.
    """
    with _faults(str(path)), _unpacked(path) as (stream, packed):
        head = stream.read(_SNIFF_BYTES)
    kind: Kind | None = "parquet" if head[:4] == b"PAR1" else "arrow" if head[:6] == b"ARROW1" else None
    if head[:4] == b"\xff\xff\xff\xff" and plain_suffix(path) == ".arrow":
        kind = "arrow"
    if kind and packed:
        raise InputError(f"{path}: a packed {kind.title()} file, which is packed in itself; unpack the outer {packed}")
    if kind:
        return TextFile(path, kind, "")
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8-sig")
    kind = _KINDS.get(plain_suffix(path), "text")
    if kind in ("parquet", "arrow"):
        raise InputError(f"{path}: no {kind.title()} file, whatever its name; fetch it again")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise InputError(f"{path}: holds zero bytes, so it is not text; convert it to UTF-8 or move it away")
    if not head.strip() and (packed or kind != "text"):
        raise InputError(f"{path}: holds nothing; fetch it again or remove it")
    return TextFile(path, _kind_of_text(head.decode(encoding, "replace"), kind), encoding)


def _kind_of_text(head: str, kind: Kind) -> Kind:
    """JSON lines go by many names: a first line that is an object says it, too."""
    head = head.lstrip()
    first_line = head.partition("\n")[0]
    if kind in ("text", "json") and first_line.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(first_line):
                return "json lines"
        # An object of another name that is longer than what was looked at.
        if kind == "text" and len(first_line) == len(head) >= _SNIFF_BYTES // 4 and re.match(r'\{\s*"[^"]*"\s*:', head):
            return "json lines"
    return kind


def file_documents(file: TextFile, text_key: str) -> Iterator[tuple[str, str]]:
    """The documents of a file in order.

    Args:
      file: from `text_file`.
      text_key: key or column of the text, where the file has such.

    Yields:
      What tells a document from the others of its file, such as its line, or "" for a whole file; and its text. Null
      is no text.

    Raises:
      InputError: the file is damaged, or has no text under `text_key`; says where.
    """
    with _faults(str(file.path)):
        if file.kind in ("parquet", "arrow"):
            yield from _table_documents(file, text_key)
            return
        newline = "" if file.kind in ("csv", "tsv") else "\n"
        with (
            _unpacked(file.path) as (stream, _),
            io.TextIOWrapper(stream, file.encoding, newline=newline) as reader,
        ):
            if file.kind == "text":
                yield "", _decode(stream.read(), file.encoding, str(file.path))
            elif file.kind == "json lines":
                yield from _line_documents(file, reader, text_key)
            elif file.kind == "json":
                yield from _json_documents(file, reader, text_key)
            else:
                yield from _csv_documents(file, reader, text_key)


@contextlib.contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turns what a damaged file can do into one line."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not {error.encoding.upper()}; convert it to UTF-8 or move it away") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{where}: cut or damaged ({error}); fetch it again or move it away") from error
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise InputError(f"{where}: cannot be read ({reason}); fix it or its permissions, or move it away") from error


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[tuple[Any, str]]:
    """The content of a file, to be read as bytes, and the name of what it was packed by, or ""."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        head = raw.read(6)
        raw.seek(0)
        if head[:2] == b"\x1f\x8b":
            yield stack.enter_context(gzip.open(raw)), "gzip"
        elif head[:3] == b"BZh":
            yield stack.enter_context(bz2.open(raw)), "bzip2"
        elif head == b"\xfd7zXZ\0":
            yield stack.enter_context(lzma.open(raw)), "xz"
        elif head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
            import pyarrow  # here, not above: few need it, and it is slow to import

            unpacked = stack.enter_context(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))
            yield io.BufferedReader(unpacked, _SNIFF_BYTES), "zstd"
        else:
            yield raw, ""


def _decode(raw: bytes, encoding: str, where: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise InputError(f"{where}: not {name} (byte {error.start}); convert it to UTF-8 or move it away") from error


def _line_documents(file: TextFile, reader: io.TextIOWrapper, text_key: str) -> Iterator[tuple[str, str]]:
    # Line by line where bytes show the lines, so that a message names the one that is not UTF-8.
    lines: Any = reader.buffer if file.encoding == "utf-8-sig" else reader
    for number, raw in enumerate(lines, start=1):
        where = f"{file.path}:{number}"
        line = _decode(raw, file.encoding, where) if isinstance(raw, bytes) else raw
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not a line of JSON ({error}); fix or remove the line") from error
        yield f":{number}", _row_text(row, text_key, where)


def _json_documents(file: TextFile, reader: io.TextIOWrapper, text_key: str) -> Iterator[tuple[str, str]]:
    """The items of a list, or objects one after another, each over as many lines as it likes."""
    decoder, buffer, at, item = json.JSONDecoder(), reader.read(_READ_CHARS), 0, 0
    is_list = buffer.lstrip().startswith("[")
    at = buffer.index("[") + 1 if is_list else 0
    while True:
        before_item = re.compile(r"\s*,\s*|\s*(?=\])" if is_list and item else r"\s*").match(buffer, at)
        start = before_item.end() if before_item else at
        try:
            if is_list and buffer[start : start + 1] == "]":
                break
            row, end = decoder.raw_decode(buffer, start)
        except (json.JSONDecodeError, RecursionError) as error:
            more = reader.read(max(_READ_CHARS, len(buffer) - at))
            if more and len(buffer) - at < _LONGEST_ITEM_CHARS:
                buffer, at = buffer[at:] + more, 0
                continue
            if not is_list and item and not buffer[at:].strip():
                return
            raise InputError(f"{file.path}: item {item + 1}: not JSON ({error}); fix or remove it") from error
        item, at = item + 1, end
        yield f":{item}", _row_text(row, text_key, f"{file.path}: item {item}")
    if buffer[start + 1 :].strip() or reader.read(_READ_CHARS).strip():
        raise InputError(f"{file.path}: more after the end of its list; fix it")


def _row_text(row: Any, text_key: str, where: str) -> str:
    text = row[text_key] if isinstance(row, dict) and text_key in row else 0
    if text is None:
        return ""
    if not isinstance(text, str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: no text under data.text_key={text_key!r}, found {keys}; set data.text_key")
    # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _csv_documents(file: TextFile, lines: io.TextIOWrapper, text_key: str) -> Iterator[tuple[str, str]]:
    reader = csv.reader(lines, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
    before = csv.field_size_limit(2**31 - 1)  # a document can be longer than the module's 128 KiB
    try:
        header = [name.strip() for name in next(reader, [])]
        if header.count(text_key) != 1:
            raise InputError(f"{file.path}:1: no column data.text_key={text_key!r}, found {header}; set data.text_key")
        column = header.index(text_key)
        for row in reader:
            if row and len(row) != len(header):
                message = f"{len(row)} fields under {len(header)} columns; quote or remove the row"
                raise InputError(f"{file.path}:{reader.line_num}: {message}")
            if row:
                yield f":{reader.line_num}", row[column]
    except csv.Error as error:
        raise InputError(f"{file.path}:{reader.line_num}: not CSV ({error}); fix or remove the row") from error
    finally:
        csv.field_size_limit(before)


def _table_documents(file: TextFile, text_key: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if file.kind == "parquet":
            table = parquet.ParquetFile(
                file.path, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
            )
            _check_column(file.path, table.schema_arrow, text_key)
            batches = table.iter_batches(_ROWS, columns=[text_key])
        else:
            source = pyarrow.memory_map(str(file.path))
            with file.path.open("rb") as stream:
                in_order = stream.read(6) != b"ARROW1"
            table = ipc.open_stream(source) if in_order else ipc.open_file(source)
            _check_column(file.path, table.schema, text_key)
            batches = iter(table) if in_order else map(table.get_batch, range(table.num_record_batches))
        row = 0
        for batch in batches:
            batch.validate(full=True)  # what is read is trusted from here on
            for start in range(0, batch.num_rows, _ROWS):
                for text in batch.column(text_key).slice(start, _ROWS).to_pylist():
                    row += 1
                    yield f":{row}", text or ""
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file.path}: cut or damaged ({reason}); fetch it again or move it away") from error


def _check_column(path: Path, schema: Any, text_key: str) -> None:
    import pyarrow

    if schema.names.count(text_key) != 1:
        raise InputError(f"{path}: no column data.text_key={text_key!r}, found {schema.names}; set data.text_key")
    kind = schema.field(text_key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise InputError(f"{path}: column data.text_key={text_key!r} holds {kind}, not text; set data.text_key")
