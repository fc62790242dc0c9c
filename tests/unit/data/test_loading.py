"""A config's data to examples: the account of every row, lengths, validation, weights, the cache."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import lora_cli.data.cache
from lora_cli.config import DataConfig
from lora_cli.data.account import histogram
from lora_cli.data.cache import Cache, cache_folder, code_version
from lora_cli.data.examples import Examples, Joined
from lora_cli.data.loading import load_examples
from lora_cli.data.mixing import drawn, held_out
from lora_cli.data.order import step_examples
from lora_cli.data.parallel import MOST_WORKERS, workers_for
from lora_cli.data.store import ArrayStore
from lora_cli.errors import DataError
from tests.unit.data.conftest import WriteRows, config, tokenizer_of
from tests.unit.data.templates import BY_NAME

CHATML = BY_NAME["chatml"]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load(data: DataConfig, **options: Any) -> tuple[Examples, Examples | None]:
    tokenizer, stops = tokenizer_of(CHATML)
    return load_examples(data, tokenizer, stops, seed=options.pop("seed", 1), **options)


def load_plain(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Examples:
    return load_examples(data, tokenizer, frozenset({tokenizer.eos_token_id}), seed=1)[0]


def texts(examples: Examples, tokenizer: PreTrainedTokenizerFast | None = None) -> list[str]:
    tokenizer = tokenizer or tokenizer_of(CHATML)[0]
    return [tokenizer.decode(examples.example(index).input_ids) for index in range(len(examples))]


# Plain layouts


def test_text_ends_in_one_eos_and_trains_all_but_the_first(
    write_rows: WriteRows, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows({"text": "Grüße from here"}, {"text": "has one<|endoftext|>"})
    examples = load_plain(config(path), plain_tokenizer)
    assert texts(examples, plain_tokenizer) == ["Grüße from here<|endoftext|>", "has one<|endoftext|>"]
    for index in range(2):
        example = examples.example(index)
        assert example.trained.tolist() == [False] + [True] * (len(example.input_ids) - 1)
        assert (example.input_ids == plain_tokenizer.eos_token_id).sum() == 1


def test_a_bos_that_the_tokenizer_adds_by_itself_comes_first(write_rows: WriteRows) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer, stops = tokenizer_of(BY_NAME["llama2"])
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    path = write_rows({"text": "one"}, {"text": "<s>two</s>"})
    examples, _ = load_examples(config(path), tokenizer, stops, seed=1)
    assert texts(examples, tokenizer) == ["<s>one</s>", "<s>two</s>"]
    assert examples.example(0).trained.tolist()[:2] == [False, True]


def test_a_completion_follows_its_prompt_verbatim(
    write_rows: WriteRows, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The token `Wh` reaches from the completion into the prompt, and so is not trained."""
    assert plain_tokenizer.tokenize("A:What")[-2:] == ["Wh", "at"]
    path = write_rows({"prompt": "date: ", "completion": "today"}, {"prompt": "A:W", "completion": "hat"})
    examples = load_plain(config(path), plain_tokenizer)
    assert texts(examples, plain_tokenizer) == ["date: today<|endoftext|>", "A:What<|endoftext|>"]

    def trained(index: int) -> str:
        example = examples.example(index)
        return str(plain_tokenizer.decode(example.input_ids[example.trained]))

    assert trained(0).strip() == "today<|endoftext|>"
    assert trained(1) == "at<|endoftext|>"


def test_instructions_without_a_template_have_a_layout_of_their_own(
    write_rows: WriteRows, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows({"instruction": "Add {x}.", "input": "1 2", "output": "3"})
    examples = load_plain(config(path), plain_tokenizer)
    assert texts(examples, plain_tokenizer) == ["### Task\nAdd {x}.\n\n### Input\n1 2\n\n### Answer\n3<|endoftext|>"]
    assert examples.supervised.tolist() == [2]


def test_instructions_go_through_the_template_where_there_is_one(write_rows: WriteRows) -> None:
    path = write_rows({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert texts(load(config(path))[0]) == [
        "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    ]


def test_conversations_need_a_template(write_rows: WriteRows, plain_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(chat("hi", "hello"))
    with pytest.raises(DataError, match=r"train.jsonl:1: a conversation, but .*\n.*data.chat_template"):
        load_plain(config(path), plain_tokenizer)


def test_a_template_from_a_file(
    write_rows: WriteRows, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    examples = load_plain(config(write_rows(chat("hi", "hello")), chat_template=str(template)), plain_tokenizer)
    assert texts(examples, plain_tokenizer) == ["user: hi\nassistant: hello\n<|endoftext|>"]
    assert "m.role" in plain_tokenizer.chat_template
    with pytest.raises(DataError, match=r"data.chat_template: .*/gone.jinja can't be read"):
        load(config(write_rows(chat("hi", "hello")), chat_template=str(tmp_path / "gone.jinja")))


def test_half_a_surrogate_pair_is_placed(write_rows: WriteRows, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(chat("hi", "hello")) + "\n" + '{"messages": [{"role": "user", "content": "\\ud83d"}, '
                    '{"role": "assistant", "content": "b"}]}\n')  # fmt: skip
    with pytest.raises(DataError, match=r"train.jsonl:2: the text holds half of a surrogate pair, \\ud83d"):
        load(config(path))


# The account


def test_every_row_is_accounted_for(write_rows: WriteRows) -> None:
    rows = [
        chat("one", "two"),
        chat("blank", "  "),
        chat("x " * 100, "lost"),
        chat("long", "y " * 100),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]},
        chat("three", "four"),
    ]
    examples, _ = load(config(write_rows(*rows), max_length=60))
    account = examples.account
    assert (account.rows, account.used, account.truncated, account.dropped) == (6, 3, 1, 3)
    assert account.reasons == {
        "answer empty": ("train.jsonl:2",),
        "no trained token within data.max_length 60": ("train.jsonl:3",),
        "no turn is trained": ("train.jsonl:5",),
    }
    assert list(examples.places) == ["train.jsonl:1", "train.jsonl:4", "train.jsonl:6"]
    assert examples.truncated.tolist() == [1]
    assert account.longest == 60
    assert account.longest_seen > 200
    assert account.num_tokens == len(examples.input_ids) == examples.lengths.sum()
    assert account.num_supervised_tokens == examples.trained.sum() == examples.supervised.sum()
    assert any(warning.startswith("1 row loses the end at data.max_length 60") for warning in account.warnings)


def test_overlong_rows_can_be_dropped_or_refused(write_rows: WriteRows) -> None:
    path = write_rows(chat("one", "two"), chat("long", "y " * 100))
    examples, _ = load(config(path, max_length=60, overlong="drop"))
    assert examples.account.reasons == {"longer than data.max_length 60": ("train.jsonl:2",)}
    with pytest.raises(DataError, match=r"train.jsonl:2: \d+ tokens, more than data.max_length 60"):
        load(config(path, max_length=60, overlong="error"))


def test_a_length_that_just_fits_is_kept_whole(write_rows: WriteRows) -> None:
    path = write_rows(chat("one", "two"))
    length = int(load(config(path))[0].lengths[0])
    assert load(config(path, max_length=length))[0].account.truncated == 0
    assert load(config(path, max_length=length - 1))[0].account.truncated == 1


def test_nothing_left_is_an_error_with_the_reasons(write_rows: WriteRows) -> None:
    path = write_rows(chat("a", ""), chat("b", " "))
    with pytest.raises(DataError, match=r"data.train: none of the 2 rows .*\n2 dropped, answer empty: train.jsonl:1, "):
        load(config(path))


def test_a_file_of_blank_lines_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"train.jsonl: there are no rows"):
        load(config(path))


def test_warnings_worth_having(write_rows: WriteRows) -> None:
    cut = load(config(write_rows(chat("q", "y " * 100)), max_length=40))[0].account.warnings
    assert any("all 1 rows" in warning or "1 row loses" in warning for warning in cut)
    few = load(config(write_rows(chat("q " * 500, "y")), max_length=4000))[0].account.warnings
    assert any("% of the tokens are trained" in warning for warning in few)
    spelled = load(config(write_rows(chat("what is <|im_end|>?", "a token"))))[0].account.warnings
    assert spelled == ("1 row spells control tokens, kept as plain text; the first is train.jsonl:1",)
    twice = load(config(write_rows(chat("q", "a"), chat("r", "a"), chat("q", "a"))))[0].account.warnings
    assert twice == ("1 example is an exact duplicate; it is train.jsonl:3",)


def test_a_tokenizer_without_stop_tokens_is_warned_of(write_rows: WriteRows) -> None:
    tokenizer, _ = tokenizer_of(CHATML)
    examples, _ = load_examples(config(write_rows(chat("q", "a"))), tokenizer, frozenset(), seed=1)
    assert any("no example ends in a trained stop token" in warning for warning in examples.account.warnings)


def test_fingerprints_follow_the_content(write_rows: WriteRows) -> None:
    first = load(config(write_rows(chat("q", "a"), chat("r", "b"))))[0].fingerprint
    assert load(config(write_rows(chat("q", "a"), chat("r", "b"), name="other.jsonl")))[0].fingerprint == first
    assert load(config(write_rows(chat("q", "a"), chat("r", "c"))))[0].fingerprint != first


def test_many_chunks_are_one(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(*(chat(f"question {number}", f"answer {number}") for number in range(25)))
    whole, _ = load(config(path))
    monkeypatch.setattr("lora_cli.data.chunks.CHUNK_ROWS", 4)
    seen: list[tuple[str, int, int | None]] = []
    parts, _ = load(config(path), progress=lambda *event: seen.append(event))
    assert np.array_equal(whole.input_ids, parts.input_ids)
    assert np.array_equal(whole.trained, parts.trained)
    assert np.array_equal(whole.offsets, parts.offsets)
    assert whole.fingerprint == parts.fingerprint
    assert seen[0] == ("tokenizing train.jsonl", 0, 25)
    assert seen[-1] == ("tokenizing train.jsonl", 25, 25)


# Validation and weights


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(0, 5))
def test_a_fraction_leaves_at_least_one_on_either_side(count: int, fraction: float, seed: int) -> None:
    flags = held_out(count, fraction, seed)
    assert 1 <= flags.sum() <= count - 1
    assert abs(flags.sum() - count * fraction) <= 1


def test_a_fraction_divides_the_rows(write_rows: WriteRows) -> None:
    path = write_rows(*(chat(f"question {number}", "a") for number in range(20)))
    train, validation = load(config(path, validation=0.25))
    assert validation is not None
    assert (train.account.rows, validation.account.rows) == (15, 5)
    assert sorted([*train.places, *validation.places]) == sorted(f"train.jsonl:{line}" for line in range(1, 21))
    again = load(config(path, validation=0.25))[1]
    assert again is not None
    assert list(again.places) == list(validation.places)
    other = load(config(path, validation=0.25), seed=2)[1]
    assert other is not None
    assert list(other.places) != list(validation.places)


def test_one_row_can_not_be_divided(write_rows: WriteRows) -> None:
    with pytest.raises(DataError, match="1 row can't be divided"):
        load(config(write_rows(chat("q", "a")), validation=0.5))


def test_validation_rows_that_are_in_train_are_found(write_rows: WriteRows) -> None:
    train = write_rows(chat("q", "a"), chat("r", "b"))
    held = write_rows(chat("s", "c"), chat("r", "b"), name="held.jsonl")
    _, validation = load(config(train, validation=[{"path": str(held)}]))
    assert validation is not None
    assert validation.account.warnings == ("1 validation example is also in train; the first is held.jsonl:2",)


def test_several_sources_lie_end_to_end(write_rows: WriteRows, tmp_path: Path) -> None:
    first = write_rows(chat("q", "a"))
    (tmp_path / "more").mkdir()
    second = write_rows({"instruction": "r", "output": "b"}, name="more/train.jsonl")
    examples, _ = load(config([{"path": str(first)}, {"path": str(second)}]))
    assert [text.split("\n")[1] for text in texts(examples)] == ["q<|im_end|>", "r<|im_end|>"]
    assert list(examples.places) == [f"{first}:1", f"{second}:1"]  # the names alone would be the same
    assert examples.account.rows == 2


def test_weights_are_shares_of_the_epoch(write_rows: WriteRows) -> None:
    small = write_rows(*(chat(f"s {n}", "a") for n in range(10)), name="small.jsonl")
    large = write_rows(*(chat(f"l {n}", "a") for n in range(90)), name="large.jsonl")
    data = config([{"path": str(small), "weight": 0.5}, {"path": str(large), "weight": 0.5}])
    examples, _ = load(data)
    assert examples.draw is not None
    assert (len(examples), examples.account.rows) == (100, 100)
    for epoch in range(3):
        places = [examples.places[index] for index in examples.draw.epoch(epoch)]
        assert Counter(place.split(":")[0] for place in places) == {"small.jsonl": 50, "large.jsonl": 50}
        assert max(Counter(places).values()) == 5  # whole repeats: none more often than another
    first, second = (set(examples.draw.epoch(epoch).tolist()) for epoch in (0, 1))
    assert first != second  # what one epoch leaves out, another has
    picked = examples.draw.epoch(0)
    assert examples.account.num_tokens == examples.lengths[picked].sum()
    assert examples.account.num_supervised_tokens == examples.supervised[picked].sum()
    assert examples.supervised.tolist() == [int(examples.example(i).trained.sum()) for i in range(len(examples))]
    for index in (0, 9, 10, 99):  # gathered from the right place
        place = examples.places[index]
        line = int(place.split(":")[1])
        assert f"\n{place[0]} {line - 1}<|im_end|>" in texts(examples)[index]
    steps = [step_examples(step, seed=1, count=100, batch_size=30, draw=examples.draw) for step in range(5, 9)]
    assert sorted(np.concatenate(steps).tolist()) == sorted(examples.draw.epoch(1).tolist())
    assert any("repeats its examples 5.00 times" in warning for warning in examples.account.warnings)
    with pytest.raises(DataError, match="some sources have a weight"):
        load(config([{"path": str(small), "weight": 0.5}, {"path": str(large)}]))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_draws_keep_the_length_and_the_shares(sources: list[tuple[int, float]], seed: int, epoch: int) -> None:
    counts, weights = [count for count, _ in sources], [weight for _, weight in sources]
    picked = drawn(counts, weights, seed, epoch)
    assert len(picked) == sum(counts)
    edges = np.cumsum([0, *counts])
    for index, weight in enumerate(weights):
        own = picked[(picked >= edges[index]) & (picked < edges[index + 1])]
        assert abs(len(own) - sum(counts) * weight / sum(weights)) < 1
        times = np.bincount(own - edges[index], minlength=counts[index])
        assert times.max() - times.min() <= 1


def test_epochs_take_turns_with_what_a_weight_leaves_out() -> None:
    """A tenth of a source an epoch: after ten epochs all of it was seen, and nothing twice."""
    seen = np.concatenate([draw[draw < 100] for draw in (drawn([100, 100], [0.05, 0.95], 3, e) for e in range(10))])
    assert sorted(seen.tolist()) == list(range(100))


# The cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    return cache_folder()


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} if cache.is_dir() else set()


def same(left: Examples, right: Examples) -> bool:
    return (
        np.array_equal(left.input_ids, right.input_ids)
        and np.array_equal(left.trained, right.trained)
        and np.array_equal(left.offsets, right.offsets)
        and np.array_equal(left.truncated, right.truncated)
        and list(left.places) == list(right.places)
        and (left.account, left.fingerprint) == (right.account, right.fingerprint)
    )


def test_a_second_start_reads_the_cache(write_rows: WriteRows, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(chat("q", "a"), chat("r", ""), chat("x", "y " * 100))
    fresh, _ = load(config(path, cache=True, max_length=60))
    assert len(entries(cache)) == 1
    monkeypatch.setattr("lora_cli.data.loading.collect", None)  # would fail if it were called
    again, _ = load(config(path, cache=True, max_length=60))
    assert isinstance(again.input_ids, np.memmap)
    assert same(fresh, again)
    monkeypatch.undo()
    assert same(fresh, load(config(path, cache=False, max_length=60))[0])


def test_the_cache_misses_when_anything_changes(
    write_rows: WriteRows, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(f"q {number}", "a") for number in range(12)]
    path = write_rows(*rows)
    known = 0

    def missed(data: DataConfig, *, template: str = CHATML.template, style: str = "chatml", seed: int = 1) -> bool:
        nonlocal known
        tokenizer, stops = tokenizer_of(BY_NAME[style])
        tokenizer.chat_template = template
        load_examples(data, tokenizer, stops, seed=seed)
        before, known = known, len(entries(cache))
        return known > before

    base = config(path, cache=True)
    assert missed(base)
    assert not missed(base)
    assert missed(base, template=CHATML.template.replace("\n", " "))
    assert missed(base, style="qwen2.5", template=CHATML.template)  # another vocabulary
    assert missed(config(path, cache=True, max_length=100))
    assert missed(config(path, cache=True, train_on="all"))
    assert missed(config(path, cache=True, overlong="drop"))
    assert missed(config(path, cache=True, validation=0.5))
    assert missed(config(path, cache=True, validation=0.5), seed=3)
    write_rows(*rows[1:], chat("r", "c"))
    assert missed(base)
    monkeypatch.setattr("lora_cli.data.loading.code_version", lambda: "another")
    assert missed(base)


def test_the_version_of_the_code_is_that_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(Path(lora_cli.data.cache.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_version(folder) == code_version()
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "template.py").write_text((folder / "template.py").read_text() + "\n# changed\n")
    assert code_version(changed) != code_version()


def test_a_date_in_the_template_does_not_age_the_cache(write_rows: WriteRows, cache: Path) -> None:
    """A template that writes today's date is told a fixed one, so tomorrow's run finds today's rows."""
    tokenizer, stops = tokenizer_of(BY_NAME["llama3.2"])
    data = config(write_rows(chat("q", "a")), cache=True)
    first, _ = load_examples(data, tokenizer, stops, seed=1)
    again, _ = load_examples(data, tokenizer, stops, seed=1)
    assert len(entries(cache)) == 1
    assert "Today Date: 26 Jul 2024" in texts(again, tokenizer)[0]
    assert any("writes today's date" in warning for warning in first.account.warnings)


def test_a_damaged_entry_is_made_anew(write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(chat("q", "a"), chat("r", "b"))
    fresh, _ = load(config(path, cache=False))
    load(config(path, cache=True))
    (key,) = entries(cache)
    (cache / key / "input_ids.bin").write_bytes(b"\x00" * 8)
    assert same(fresh, load(config(path, cache=True))[0])
    (cache / key / "meta.json").write_text('{"bytes"')
    assert same(fresh, load(config(path, cache=True))[0])


def test_a_failure_leaves_nothing_behind(write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(chat("q", "a"), {"messages": 3})
    with pytest.raises(DataError):
        load(config(path, cache=True))
    assert entries(cache) == set()


def test_a_cache_that_can_not_be_written(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/tokenized: tokenized data can't be kept here: Not a directory\n"):
        load(config(write_rows(chat("q", "a")), cache=True))


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    """Replacing a complete entry would take it away under a process that has just found it."""
    cache = Cache(tmp_path)
    for number in range(2):
        folder = cache.begin()
        store = ArrayStore(folder)
        store.append({"input_ids": np.array([number])})
        store.close()
        entry = cache.complete(folder, "key", {"number": number})
        assert entry.meta == {"number": 0}
        assert entry.arrays["input_ids"].tolist() == [0]
    assert entries(tmp_path) == {"key"}


def _load_and_sum(path: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    examples, _ = load(config(path, cache=True))
    results.put((examples.fingerprint, int(examples.input_ids.sum())))


def test_two_processes_that_start_at_once(write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(*(chat(f"q {number}", "a") for number in range(300)))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_load_and_sum, args=(path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1
    assert len(entries(cache)) == 1  # and no folder half-written


# Size


def test_several_sources_stay_in_their_files(write_rows: WriteRows) -> None:
    first = write_rows(chat("q", "a"), chat("r", "bb"), name="first.jsonl")
    second = write_rows(chat("s", "c"), name="second.jsonl")
    examples, _ = load(config([{"path": str(first)}, {"path": str(second)}]))
    alone = [load(config(path))[0] for path in (first, second)]
    assert isinstance(examples.input_ids, Joined)
    assert all(isinstance(one.input_ids, np.memmap) for one in alone)
    wanted = [one.example(index) for one in alone for index in range(len(one))]
    for index, want in enumerate(wanted):
        got = examples.example(index)
        assert isinstance(got.input_ids, np.memmap)
        assert got.input_ids.tolist() == want.input_ids.tolist()
        assert got.trained.tolist() == want.trained.tolist()


def test_any_number_of_processes_gives_the_same(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several shapes and fates over several chunks; shapes are derived in each process anew."""
    rows = [chat(f"question {number}", "y " * (number % 40)) for number in range(60)]
    path = write_rows(*rows)
    monkeypatch.setattr("lora_cli.data.chunks.CHUNK_ROWS", 7)
    alone, _ = load(config(path, max_length=60))
    whole, _ = load(config(path, max_length=1000))
    cut = {place for place, length in zip(whole.places, whole.lengths, strict=True) if length > 60}
    assert {alone.places[index] for index in alone.truncated} == cut and len(cut) > 10
    monkeypatch.setattr("lora_cli.data.loading.workers_for", lambda rows: 3)
    seen: list[int] = []
    together, _ = load(config(path, max_length=60), progress=lambda what, done, total: seen.append(done))
    assert same(alone, together)
    assert seen == [*range(0, 60, 7), 60]

    broken = write_rows(*rows, {"messages": [{"role": "robot", "content": "x"}]}, {"messages": 3})
    with pytest.raises(DataError, match=r"train.jsonl:61: messages\[0\].role is \"robot\"") as caught:
        load(config(broken, max_length=60))
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("Known are system")


def test_few_rows_need_no_processes() -> None:
    assert workers_for(10_000) == 1
    assert 1 <= workers_for(10_000_000) <= MOST_WORKERS


def test_lengths_are_counted_in_bins_that_double() -> None:
    assert histogram(np.array([], dtype=np.int64)) == ()
    assert histogram(np.array([5])) == ((5, 1),)
    assert histogram(np.array([3, 4, 5, 8, 9, 40])) == ((4, 2), (8, 2), (16, 1), (32, 0), (40, 1))


def test_the_account_names_the_rows_it_speaks_of(write_rows: WriteRows) -> None:
    account = load(config(write_rows(chat("q", "a"), chat("r", "y " * 100), chat("q", "a")), max_length=60))[0].account
    assert account.truncated_places == ("train.jsonl:2",)
    assert account.longest_place == "train.jsonl:2"
    assert (account.duplicates, account.duplicate_places) == (1, ("train.jsonl:3",))
    assert sum(count for _, count in account.lengths) == 3
