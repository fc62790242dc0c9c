"""Reading rows, and what is said about files that can't be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.config import Source
from lora_cli.data.files import open_file
from lora_cli.data.sources import open_source
from lora_cli.errors import DataError

ROWS = [{"text": "one"}, {"text": "zwei, Grüße"}, {"text": "three\nlines\n"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path: Path) -> list[tuple[int, dict[str, object]]]:
    return list(open_source(Source(path=str(path))))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.rstrip(b"\n")),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    ],
)
def test_json_in_all_its_clothes(tmp_path: Path, name: str, content: bytes) -> None:
    assert [row for _, row in read(written(tmp_path / name, content))] == ROWS


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert [number for number, _ in read(path)] == [1, 4]
    assert open_file(path).count() == 2


@pytest.mark.parametrize("text", ["[]", "[ ]\n", " \n[\n]"])
def test_an_empty_list(tmp_path: Path, text: str) -> None:
    assert read(written(tmp_path / "a.json", text.encode())) == []


def test_rows_of_a_list_know_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", b'[\n  {"text": "one"},\n\n  {"text":\n "two"}\n, {"text": "three"}]')
    assert [(number, row["text"]) for number, row in read(path)] == [(2, "one"), (4, "two"), (6, "three")]


def test_csv_fields_with_newlines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b'prompt,completion\n"two\nlines","a, b"\nplain,more\n')
    assert read(path) == [
        (2, {"prompt": "two\nlines", "completion": "a, b"}),
        (4, {"prompt": "plain", "completion": "more"}),
    ]


def test_csv_fields_longer_than_pythons_default(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert read(written(tmp_path / "a.csv", f"text\n{long}\n".encode()))[0][1] == {"text": long}


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read(path) == list(enumerate(ROWS, start=1))
    assert open_file(path).count() == 3


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(
        str(tmp_path / "several")
    )
    one = open_source(Source(path=str(tmp_path / "one")))
    assert [row for _, row in one] == ROWS
    assert one.around_number == ("one[", "]")
    assert len(list(open_source(Source(path=str(tmp_path / "several"), split="test")))) == 1
    assert len(list(open_source(Source(path=str(tmp_path / "several"))))) == 3
    with pytest.raises(DataError, match=r"no split 'dev'\nIt has: train, test"):
        open_source(Source(path=str(tmp_path / "several"), split="dev"))


BAD = [
    ("broken.jsonl", b'{"text": "a"}\n{"text": oh}\n', r"broken\.jsonl:2: broken JSON: Expecting value at column 10"),
    ("half.jsonl", b'{"text": "a"}\n{"text": "b', r"half\.jsonl:2: broken JSON.*\n.*half-written"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "gr\xfc\xdfe"}\n', r"latin\.jsonl:2: not UTF-8: byte 0xfc at column 13"),
    ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"utf16\.jsonl:1: not UTF-8"),
    (
        "zip.jsonl",
        gzip.compress(LINES, mtime=0),
        r"compressed with gzip, although its name says \.jsonl\nName it zip\.jsonl\.",
    ),
    ("cut.jsonl.gz", gzip.compress(LINES * 1000, mtime=0)[:-20], r"cut\.jsonl\.gz: can't be read past line"),
    ("plain.jsonl.gz", LINES, r"plain\.jsonl\.gz: can't be read"),
    ("empty.jsonl", b"", r"empty\.jsonl: the file is empty"),
    ("list.jsonl", b'[{"text": "a"}]\n', r"list\.jsonl:1: the row is a list, not an object"),
    ("number.jsonl", b"3\n", r"number\.jsonl:1: the row is the number 3"),
    ("null.jsonl", b"null\n", r"null\.jsonl:1: the row is null"),
    ("open.json", b'[{"text": "a"},\n{"text": "b"}', r"open\.json:2: broken JSON: expected ','"),
    ("comma.json", b'[{"text": "a"}\n{"text": "b"}]', r"comma\.json:2: broken JSON: expected ','"),
    ("bad.json", b'[{"text": "a"},\n{"text": b}]', r"bad\.json:2: broken JSON"),
    ("strings.json", b'["a"]', r"strings\.json:1: the row is a string"),
    ("fields.csv", b"a,b\n1,2\n1,2,3\n", r"fields\.csv:3: 3 fields, the header 2: a, b"),
    ("quote.csv", b'a,b\n1,"2\n', r"quote\.csv:2: broken CSV"),
    ("fake.parquet", b"not parquet at all", r"fake\.parquet: not a readable Parquet file"),
    ("notes.txt", b"hello", r"notes\.txt: no reader for \.txt"),
    ("weights.pkl", b"\x80\x04", r"weights\.pkl: no reader for \.pkl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(written(tmp_path / name, content))


def test_a_missing_file_is_named_in_full(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path / "gone.jsonl") + ": no such file or folder"):
        read(tmp_path / "gone.jsonl")


def test_a_missing_relative_file_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(DataError, match=r"/.*data/gone\.jsonl: no such file"):
        open_source(Source(path="data/gone.jsonl"))


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", LINES)
    with pytest.raises(DataError, match="a file has no splits, but split 'test' was asked for"):
        open_source(Source(path=str(path), split="test"))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder without"):
        read(tmp_path)


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", LINES)
    before = open_file(path).fingerprint()
    assert open_file(path).fingerprint() == before
    path.write_bytes(LINES.replace(b"one", b"uno"))
    assert open_file(path).fingerprint() != before


def test_local_rows_need_no_datasets(tmp_path: Path) -> None:
    """The import takes seconds, and every start would pay."""
    path = written(tmp_path / "a.jsonl", LINES)
    code = (
        "import sys\n"
        "from lora_cli.config import Source\n"
        "from lora_cli.data import loading, preview\n"
        "from lora_cli.data.sources import open_source\n"
        f"assert len(list(open_source(Source(path={str(path)!r})))) == 3\n"
        "heavy = {'datasets', 'torch', 'transformers', 'pyarrow', 'pandas', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = written(tmp_path / "a.jsonl.zst", zstandard.ZstdCompressor().compress(LINES))
    assert [row for _, row in read(path)] == ROWS
    frames = zstandard.ZstdCompressor().compress(LINES) + zstandard.ZstdCompressor().compress(LINES)
    assert [row for _, row in read(written(tmp_path / "two.jsonl.zst", frames))] == ROWS * 2
    big = zstandard.ZstdCompressor().compress(LINES * 5000)
    assert len(read(written(tmp_path / "big.jsonl.zst", big))) == 15000
    cut = written(tmp_path / "cut.jsonl.zst", zstandard.ZstdCompressor().compress(LINES * 1000)[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl\.zst: can't be read past line \d+: the file ends"):
        read(cut)
    plain = written(tmp_path / "plain.jsonl.zst", LINES)
    with pytest.raises(DataError, match=r"plain\.jsonl\.zst: can't be read"):
        read(plain)


def test_zstandard_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: reading Zstandard needs a package.*\n.*pip install zstandard"):
        read(written(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What is asked of the hub, which answers from local files: `load_dataset` itself does the rest."""
    import datasets

    for name in ("train", "test"):
        written(tmp_path / f"{name}.jsonl", LINES if name == "train" else LINES.splitlines(keepends=True)[0])
    asked: list[dict[str, object]] = []
    real = datasets.load_dataset

    def answer(path: str, *, split: str | None, revision: str | None) -> object:
        asked.append({"path": path, "split": split, "revision": revision})
        if path != "someone/rows":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
        return real("json", data_files=files, split=split, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return asked


def test_a_hub_id_with_split_and_revision(hub: list[dict[str, object]]) -> None:
    source = open_source(Source(path="someone/rows", split="test", revision="abc123"))
    assert hub == [{"path": "someone/rows", "split": "test", "revision": "abc123"}]
    assert [row for _, row in source] == ROWS[:1]
    assert source.around_number == ("someone/rows[test][", "]")
    assert open_source(Source(path="someone/rows")).count() == 3  # of several splits, train
    first, again = (open_source(Source(path="someone/rows", split="train")) for _ in range(2))
    assert first.fingerprint() == again.fingerprint() != source.fingerprint()


def test_what_the_hub_does_not_have(hub: list[dict[str, object]]) -> None:
    with pytest.raises(
        DataError, match=r"nobody/none: neither a local path nor a data set on the hub.*\n.*/nobody/none"
    ):
        open_source(Source(path="nobody/none"))
    with pytest.raises(DataError, match=r"someone/rows: datasets can't load it: .*dev.*\nCheck `split` and `revision`"):
        open_source(Source(path="someone/rows", split="dev"))
