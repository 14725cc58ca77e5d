"""Every bad record is refused for a reason and counted; none stops the reading or fills memory."""

import gzip
import json
import random
import tracemalloc
from itertools import groupby

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from drawplate.core.errors import UserError
from drawplate.data.source import Bad, Document, vet
from drawplate.data.source.jsonl import Jsonl
from drawplate.data.source.parquet import Parquet
from drawplate.data.source.text import Text
from tests.data_cases import packed

LONGEST = 2000
DIGITS = b"1" * 4400

JSON_LINES = {
    "nothing": (b"", "empty"),
    "spaces": (b" \t ", "empty"),
    "not json": (b"hello", "Expecting value"),
    "cut": (b'{"text": "a', "Unterminated"),
    "single quotes": (b"{'text': 'a'}", "Expecting property name"),
    "trailing comma": (b'{"text": "a",}', "not JSON"),
    "comment": (b'{"text": "a"} // b', "Extra data"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "Extra data"),
    "array": (b'["text", "a"]', "not an object"),
    "string": (b'"text"', "not an object"),
    "number": (b"12", "not an object"),
    "null": (b"null", "not an object"),
    "true": (b"true", "not an object"),
    "no field": (b'{"body": "a"}', "no field 'text'"),
    "field in another case": (b'{"Text": "a"}', "no field 'text'"),
    "null field": (b'{"text": null}', "is null"),
    "integer field": (b'{"text": 3}', "is a number"),
    "float field": (b'{"text": 3.5}', "is a number"),
    "boolean field": (b'{"text": false}', "is a boolean"),
    "list field": (b'{"text": ["a"]}', "is a list"),
    "object field": (b'{"text": {"text": "a"}}', "is an object"),
    "empty field": (b'{"text": ""}', "empty"),
    "blank field": (b'{"text": " \\n\\t\\u00a0"}', "empty"),
    "NaN": (b'{"text": "a", "x": NaN}', "not a finite number"),
    "Infinity": (b'{"text": "a", "x": Infinity}', "not a finite number"),
    "minus Infinity": (b'{"text": "a", "x": -Infinity}', "not a finite number"),
    "NaN as text": (b'{"text": NaN}', "not a finite number"),
    "overflow": (b'{"text": "a", "x": 1e999}', "not a finite number"),
    "minus overflow": (b'{"text": "a", "x": [-1e999]}', "not a finite number"),
    "huge integer": (b'{"text": "a", "x": ' + DIGITS + b"}", "longer than"),
    "key twice": (b'{"text": "a", "text": "b"}', "a key twice"),
    "inner key twice": (b'{"text": "a", "x": {"y": 1, "y": 1}}', "a key twice"),
    "escaped key twice": (b'{"text": "a", "\\u0074ext": "b"}', "a key twice"),
    "deep lists": (b'{"text": "a", "x": ' + b"[" * 600 + b"]" * 600 + b"}", "deeper than 100"),
    "deep objects": (b'{"a":' * 300 + b"1" + b"}" * 300, "deeper than 100"),
    "deep and cut": (b"[" * 1900, "deeper than 100"),
    "high surrogate": (b'{"text": "a \\ud800 b"}', "lone surrogate (U+D800)"),
    "low surrogate": (b'{"text": "\\udfff"}', "lone surrogate (U+DFFF)"),
    "surrogates in wrong order": (b'{"text": "\\ude00\\ud83d"}', "lone surrogate (U+DE00)"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "NUL"),
    "raw NUL": (b'{"text": "a\0b"}', "Invalid control character"),
    "raw tab": (b'{"text": "a\tb"}', "Invalid control character"),
    "bad escape": (b'{"text": "\\x41"}', "escape"),
    "bad unicode escape": (b'{"text": "\\u12G4"}', "escape"),
    "latin-1": (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9"),
    "windows-1252": (b'{"text": "\x93a\x94"}', "not UTF-8 (byte 0x93"),
    "overlong encoding": (b'{"text": "\xc0\xaf"}', "not UTF-8"),
    "beyond unicode": (b'{"text": "\xf4\x90\x80\x80"}', "not UTF-8"),
    "cut character": (b'{"text": "\xe2\x82"}', "not UTF-8"),
    "byte order mark inside": (b'\xef\xbb\xbf{"text": "a"}', "BOM"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    "UTF-16 without mark": ('{"text": "a"}'.encode("utf-16-be"), "not JSON"),
    "UTF-32": ('{"text": "a"}'.encode("utf-32"), "not UTF-8"),
    "too long": (b'{"text": "' + b"a" * LONGEST + b'"}', "longer than 2000"),
    "too long and not UTF-8": (b"\xff" * 3 * LONGEST, "longer than 2000"),
    "a gzip member": (packed(b'{"text": "a"}').replace(b"\n", b" "), "not UTF-8"),
    "leading zero": (b'{"text": "a", "x": 01}', "not JSON"),
    "plus sign": (b'{"text": "a", "x": +1}', "not JSON"),
    "hexadecimal": (b'{"text": "a", "x": 0x1}', "not JSON"),
    "bare point": (b'{"text": "a", "x": .5}', "not JSON"),
    "unquoted key": (b'{text: "a"}', "not JSON"),
    "vertical tab between": (b'{"text":\x0b"a"}', "not JSON"),
    "no-break space between": (b'{"text":\xc2\xa0"a"}', "not JSON"),
}
GOOD_LINES = {
    "plain": (b'{"text": "a"}', "a"),
    "windows line": (b'{"text": "a"}\r', "a"),
    "windows text": (b'{"text": "a\\r\\nb\\rc"}', "a\nb\nc"),
    "surrogate pair": (b'{"text": "\\ud83d\\ude00"}', "😀"),
    "special tokens": (b'{"text": "<|end|> [PAD] </s>"}', "<|end|> [PAD] </s>"),
    "brackets in text": (b'{"text": "' + b"[" * 500 + b'"}', "[" * 500),
    "brackets after a quote": (b'{"text": "\\"' + b"{" * 500 + b'"}', '"' + "{" * 500),
    "not nested": (b'{"text": "a", "x": [' + b"[]," * 300 + b"1]}", "a"),
    "a hundred deep": (b'{"text": "a", "x": ' + b"[" * 99 + b"]" * 99 + b"}", "a"),
    "null elsewhere": (b'{"text": "a", "x": null}', "a"),
    "small float": (b'{"text": "a", "x": 1e-999}', "a"),
    "long integer": (b'{"text": "a", "x": ' + b"1" * 1900 + b"}", "a"),
    "spaces around": (b'  {"text": "a"}  ', "a"),
}
TEXT_FILES = {
    "nothing": (b"", "no record"),
    "newlines": (b"\n\n\n", "empty"),
    "mark alone": (b"\xef\xbb\xbf", "no record"),
    "NUL": (b"a\0b", "NUL"),
    "latin-1 on line 3": (b"a\nb\n\xe9", "not UTF-8 (byte 0xe9"),
    "UTF-16": ("text".encode("utf-16"), "not UTF-8"),
    "UTF-16 without mark": ("text".encode("utf-16-be"), "NUL"),
    "UTF-32": ("text".encode("utf-32-le"), "NUL"),
    "mixed encodings": ("é".encode() + "é".encode("latin-1"), "not UTF-8"),
    "too long": (b"a" * (LONGEST + 1), "longer than 2000"),
    "too long in lines": (b"a\n" * LONGEST, "longer than 2000"),
    "an image": (b"\x89PNG\r\n\x1a\n\0", "not UTF-8"),
    "gzip without the name": (packed(b"text"), "not UTF-8"),
    "surrogate": (b"\xed\xb2\x80", "not UTF-8"),
}
GZIP_FILES = {
    "no bytes": (b"", "no record"),
    "nothing inside": (packed(b""), "no record"),
    "not gzip": (b"plain text\n", "from here on"),
    "header alone": (packed(b"text")[:10], "from here on"),
    "cut": (packed(b"text " * 100)[:-4], "from here on"),
    "wrong checksum": (packed(b"text")[:-8] + bytes(8), "from here on"),
    "flipped": (
        packed(b"text " * 100)[:12] + b"\xff" + packed(b"text " * 100)[13:],
        "from here on",
    ),
    "too long": (packed(b"a" * 10**6), "longer than 2000"),
}


def verdicts(source, longest=LONGEST):
    return [vet(record, longest) for record in source.read(longest)]


@pytest.mark.parametrize("name", JSON_LINES)
def test_bad_json_line(tmp_path, name):
    raw, reason = JSON_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + raw + b'\n{"text": "after"}\n')
    before, *bad, after = verdicts(Jsonl(files=f"{tmp_path}/a.jsonl"))
    assert (before.text, after.text) == ("before", "after")
    assert all(isinstance(record, Bad) for record in bad)
    assert bad[0].line == 2
    assert bad[0].file == f"{tmp_path}/a.jsonl"
    assert reason in bad[0].reason
    assert len(bad) == raw.count(b"\n") + 1
    assert "\n" not in bad[0].reason


@pytest.mark.parametrize("name", GOOD_LINES)
def test_good_json_line(tmp_path, name):
    raw, text = GOOD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + raw + b"\n" + raw)
    assert [record.text for record in verdicts(Jsonl(files=f"{tmp_path}/*"))] == [text, text]


@pytest.mark.parametrize("sign", ["", "-"])
def test_whole_numbers_may_have_any_length(tmp_path, sign):
    number = sign + "1" * 5000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "x": {number}}}\n{{"text": {number}}}\n')
    good, bad = verdicts(Jsonl(files=f"{tmp_path}/*"), 10_000)
    assert good.text == "a"
    assert bad.reason == "field 'text' is a number, not a string"


@pytest.mark.parametrize("name", TEXT_FILES)
def test_bad_text_file(tmp_path, name):
    raw, reason = TEXT_FILES[name]
    (tmp_path / "a.txt").write_bytes(raw)
    (record,) = verdicts(Text(files=f"{tmp_path}/*"))
    assert isinstance(record, Bad)
    assert reason in record.reason
    assert record.line == (3 if "line 3" in name else 1)


@pytest.mark.parametrize("name", GZIP_FILES)
@pytest.mark.parametrize("leaf", [Text, Jsonl])
def test_bad_gzip_file(tmp_path, name, leaf):
    raw, reason = GZIP_FILES[name]
    (tmp_path / "a.gz").write_bytes(raw)
    (record,) = verdicts(leaf(files=f"{tmp_path}/*"))
    assert isinstance(record, Bad)
    assert reason in record.reason


def test_many_kinds_are_tried():
    assert len(JSON_LINES) + len(TEXT_FILES) + len(GZIP_FILES) >= 80


def test_a_bad_block_costs_one_block(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        b"one\n\ntwo\n\xff\n\nthree\n\n" + b"x" * 3000 + b"\ny\n\nfour"
    )
    one, two, three, long, four = verdicts(Text(files=f"{tmp_path}/*", document="block"))
    assert [r.text for r in (one, three, four)] == ["one\n", "three\n", "four"]
    assert (two.line, three.line, long.line, four.line) == (4, 6, 8, 11)
    assert "not UTF-8" in two.reason
    assert "longer" in long.reason


def test_the_limit_is_exact(tmp_path):
    path = tmp_path / "a.txt"
    for mark in (b"", b"\xef\xbb\xbf"):
        for end in (b"", b"\n", b"\r\n"):
            for size, good in ((10, True), (11, False), (12, False), (13, False), (16, False)):
                path.write_bytes(mark + b"a" * size + end)
                (record,) = Text(files=str(path)).read(10)
                assert isinstance(record, Document) == good, (mark, end, size)


def test_a_folder_or_pipe_is_no_file(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="no file matches"):
        list(Text(files=f"{tmp_path}/*").read(10))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    (record,) = verdicts(Text(files=f"{tmp_path}/*"))
    assert record.reason == "cannot be read from here on: Permission denied"


@pytest.mark.parametrize("cell", [None, b"caf\xe9", b"\xed\xa0\x80", b"a\0", b"", b"a" * 3000])
def test_bad_cell(tmp_path, cell):
    texts = pyarrow.array([b"before", cell, b"after"], pyarrow.binary())
    # What the type says and what the bytes are need not agree.
    text = pyarrow.StringArray.from_buffers(3, *texts.buffers()[1:], texts.buffers()[0])
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    before, bad, after = verdicts(Parquet(files=f"{tmp_path}/*"))
    assert (before.text, after.text) == ("before", "after")
    assert (type(bad), bad.line) == (Bad, 2)


def write_table(path, rows=40):
    texts = pyarrow.array([f"text {i}" for i in range(rows)], pyarrow.string())
    table = pyarrow.table({"text": texts, "n": range(rows)})
    parquet.write_table(table, path, row_group_size=10, compression="none")


def test_parquet_without_rows_is_told(tmp_path):
    write_table(tmp_path / "a.parquet", rows=0)
    (record,) = verdicts(Parquet(files=f"{tmp_path}/*"))
    assert "no record" in record.reason


def test_every_cut_of_a_parquet_file_is_told(tmp_path):
    whole = tmp_path / "a.parquet"
    write_table(whole)
    raw = whole.read_bytes()
    assert len(verdicts(Parquet(files=str(whole)))) == 40
    for size in range(0, len(raw), 7):
        whole.write_bytes(raw[:size])
        (record,) = verdicts(Parquet(files=str(whole)))
        assert isinstance(record, Bad)


def test_flipped_parquet_bytes_stop_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path)
    raw = path.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        changed = bytearray(raw)
        # The data pages; the footer may turn the column into one of another name or type.
        changed[draw.randrange(4, raw.index(b"text 39"))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        assert 1 <= len(verdicts(Parquet(files=str(path)))) <= 41


def test_every_cut_of_a_gzip_file_keeps_the_lines_before_it(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"text": random.Random(i).randbytes(20).hex()}) for i in range(20)]
    raw = packed("\n".join(lines).encode())
    for size in range(1, len(raw), 5):
        path.write_bytes(raw[:size])
        *good, last = verdicts(Jsonl(files=str(path)))
        assert isinstance(last, Bad)
        assert [d.text for d in good] == [json.loads(line)["text"] for line in lines[: len(good)]]


piece = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n", b"\xef\xbb\xbf", b"\0", b"\xed\xa0\x80"]),
    st.sampled_from([raw for raw, _ in [*JSON_LINES.values(), *GOOD_LINES.values()]]),
)


fuzz = given(st.lists(piece, max_size=8), st.sampled_from([3, 40, LONGEST]), st.booleans())


@settings(max_examples=200, deadline=None)
@fuzz
def test_every_record_of_any_file_is_counted(tmp_path_factory, pieces, longest, zipped):
    every_record_is_counted(tmp_path_factory.getbasetemp(), pieces, longest, zipped)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@fuzz
def test_every_record_of_very_many_files_is_counted(tmp_path_factory, pieces, longest, zipped):
    every_record_is_counted(tmp_path_factory.getbasetemp(), pieces, longest, zipped)


def every_record_is_counted(folder, pieces, longest, zipped):
    raw = b"".join(pieces)
    path = folder / f"fuzz{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(raw, 1) if zipped else raw)
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    count = len(lines) - (not lines[-1])
    blocks = sum(full for full, _ in groupby(lines, key=lambda line: bool(line.strip())))
    # Of a line too long to be kept nobody knows whether it is blank.
    long_blank = any(len(line) > longest and not line.strip() for line in lines)
    sources = {
        Jsonl(files=str(path)): max(count, 1),
        Text(files=str(path)): 1,
    }
    if not long_blank:
        sources[Text(files=str(path), document="block")] = max(blocks, 1)
    for source, expected in sources.items():
        found = verdicts(source, longest)
        assert len(found) == expected
        for record in found:
            assert record.line >= 1
            if isinstance(record, Document):
                assert len(record.text.encode()) <= longest
                assert "\r" not in record.text
                assert "\0" not in record.text
            else:
                assert record.reason


@pytest.mark.parametrize(
    "size", [32 << 20, pytest.param(1 << 30, marks=pytest.mark.slow)], ids=["32 MB", "1 GB"]
)
@pytest.mark.parametrize("leaf", [Text, Jsonl])
def test_memory_does_not_grow_with_a_line(tmp_path, leaf, size):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n')
        file.seek(size, 1)  # a hole: one line of NULs
        file.write(b'\n{"text": "after"}\n')
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(min(size, 64 << 20) >> 20):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    found = verdicts(leaf(files=f"{tmp_path}/*"), longest=10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20
    assert [isinstance(record, Bad) for record in found] == (
        [False, True, False, True] if leaf is Jsonl else [True, True]
    )
