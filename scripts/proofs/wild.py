"""Configs, rows and files as nobody writes them, for hypothesis: near enough to right ones to get far.

Each strategy gives the content of a file. None names a path outside the folder that it will be written to.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from ruamel.yaml import YAML

from lora_cli.config.json_schema import config_schema

WORDS = (
    "",
    " ",
    "auto",
    "all-linear",
    "c_attn",
    "(",
    "transformer.h.0",
    "assistant",
    "null",
    "1e-4",
    "~",
    "日本\u202e",
    "\x00a",
)
NUMBERS = (0, 1, -1, 2, 3, 7, 128, 1024, 10**6, 10**12, 2**63, 10**30, 0.5, 1.0, 1e-300, 1e300, -0.0)
ODD: tuple[Any, ...] = (None, True, False, float("nan"), float("inf"), [], {}, [[]], {"": ""}, [None], {"path": 3})

_text = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
_scalars = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(ODD), _text, st.integers(-3, 40))
values = st.recursive(
    _scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_text, inner, max_size=3)),
    max_leaves=5,
)
"""Anything that YAML or JSON can say."""


def _keys() -> list[tuple[str, ...]]:
    """Every key of the config, with what leads to it."""
    schema = config_schema()

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> list[tuple[str, ...]]:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        found = [one for part in node.get("anyOf", ()) for one in walk(part, path)]
        for name, inner in node.get("properties", {}).items():
            found += [(*path, name), *walk(inner, (*path, name))]
        return found

    return sorted(set(walk(schema, ())))


KEYS = _keys()
_SAID = {
    ("model", "dtype"): ("float32", "bfloat16", "float16"),
    ("model", "quantization"): ({"type": "nf4"}, {"type": "fp4", "double_quant": False}, {"type": "int8"}),
    ("model", "attn_implementation"): ("sdpa", "eager", "documents", "flash_attention_2"),
    ("adapter",): (None, {}, {"r": 2}, {"target_parameters": ["x"]}),
    ("adapter", "target_modules"): (["c_attn"], "all-linear", ["nothing"], r".*\.c_proj", ["c_attn", "lm_head"]),
    ("adapter", "modules_to_save"): (["lm_head"], ["wte"], ["ln_f"]),
    ("data", "format"): ("chat", "text", "instruction", "prompt_completion"),
    ("data", "validation"): (0.2, 0.99, "rows.jsonl", [{"path": "rows.jsonl"}]),
    ("data", "columns"): ({"messages": "text"}, {"prompt": "messages"}),
    ("adapter", "use_dora"): (True,),
    ("adapter", "use_rslora"): (True,),
    ("adapter", "r"): (1, 3, 32, 64),
    ("adapter", "lora_dropout"): (0.1, 0.9),
    ("adapter", "bias"): ("all", "lora_only"),
    ("adapter", "init_lora_weights"): (False, "gaussian", "orthogonal"),
    ("adapter", "rank_pattern"): ({"c_attn": 3}, {"x": 1}, {"h.0.attn": 2}),
    ("adapter", "layers_to_transform"): (0, [1], [7]),
    ("data", "train_on"): ("all",),
    ("data", "max_length"): (2, 5, 64, 129, 10**6),
    ("data", "overlong"): ("drop", "error"),
    ("train", "batch_size"): (1, 7, 10**6),
    ("train", "micro_batch_tokens"): (1, 64, 10**6),
    ("train", "num_train_epochs"): (0.01, 0.5, 1e6),
    ("train", "learning_rate"): (1e-300, 1e30),
    ("train", "warmup_steps"): (0, 0.9, 10**6),
    ("train", "eval_steps"): (1, 0.01, 0.99),
    ("train", "load_best_model_at_end"): (True,),
    ("train", "gradient_checkpointing"): (True, False),
    ("train", "loss"): ("full",),
    ("train", "optim"): ("sgd", "adamw_8bit", "adafactor", "paged_adamw_8bit"),
    ("train", "lr_scheduler_type"): ("constant", "polynomial", "cosine_with_restarts", "inverse_sqrt"),
}
"""What is right, or might be, at some places: what isn't gets no further than the schema."""


@st.composite
def configs(draw: st.DrawFn, plain: dict[str, Any]) -> dict[str, Any]:
    """A good config with one to four keys set, unset or renamed."""
    config: dict[str, Any] = json.loads(json.dumps(plain))
    for _ in range(draw(st.integers(1, 3))):
        change = draw(st.sampled_from(("say", "say", "say", "set", "remove", "rename")))
        path = draw(st.sampled_from(sorted(_SAID) if change == "say" else KEYS))
        section: Any = config
        for name in path[:-1]:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        match change:
            case "say":
                section[path[-1]] = copy.deepcopy(draw(st.sampled_from(_SAID[path])))
            case "set":
                section[path[-1]] = copy.deepcopy(draw(values))
            case "remove":
                section.pop(path[-1], None)
            case _:
                section[draw(_text)] = section.pop(path[-1], copy.deepcopy(draw(values)))
    return config


def _as_yaml(config: Any, *, flow: bool) -> str:
    writer, text = YAML(typ="safe", pure=True), io.StringIO()
    writer.default_flow_style = flow
    writer.dump(config, text)
    return text.getvalue()


def config_files(plain: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Such a config as YAML or JSON, or one of them with some of its characters changed."""
    dumps: tuple[Callable[[Any], str], ...] = (
        lambda config: _as_yaml(config, flow=False),
        lambda config: _as_yaml(config, flow=True),
        json.dumps,
    )
    whole = st.builds(lambda config, dump: dump(config), configs(plain), st.sampled_from(dumps))
    text = whole.map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.one_of(text, text, text, damaged(text))


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[bytes]) -> bytes:
    """A file with pieces cut out, doubled, or put in."""
    content = draw(files)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 12))
        put = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from((b"\n", b"\t", b": ", b"&a ", b"*a", b"\r", b'"', b"{")))
        )
        content = (
            content[:at] + draw(st.sampled_from((b"", put, content[at : at + length] * 2))) + content[at + length :]
        )
    return content


_say = st.one_of(
    st.sampled_from(("", " ", "noon", "<|endoftext|>", "<|im_start|>assistant\n", "{{ 7 }}", "\ud83d\ude00", "a\x00b")),
    st.text(max_size=20),
)
_roles = st.sampled_from(("user", "user", "assistant", "assistant", "system", "tool", "developer", "gpt", "human", ""))


def _turns(role: str, content: str) -> st.SearchStrategy[dict[str, Any]]:
    extra = st.dictionaries(
        st.sampled_from(("train", "tool_calls", "name", "tool_call_id", "reasoning_content")), values, max_size=1
    )
    said = st.one_of(_say, _say, _say, values, st.just([{"type": "text", "text": "a"}]))
    return st.builds(lambda who, what, more: {role: who, content: what, **more}, _roles, said, extra)


_good_chat = st.builds(
    lambda asked, answered: {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    },
    _say,
    _say,
)
_rows: st.SearchStrategy[Any] = st.one_of(
    _good_chat,
    _good_chat,
    st.builds(lambda turns: {"messages": turns}, st.lists(_turns("role", "content"), max_size=5)),
    st.builds(lambda turns: {"conversations": turns}, st.lists(_turns("from", "value"), max_size=4)),
    st.builds(lambda prompt, completion: {"prompt": prompt, "completion": completion}, _say, st.one_of(_say, values)),
    st.builds(
        lambda one, two, extra: {"instruction": one, "output": two, "input": extra}, _say, _say, st.one_of(_say, values)
    ),
    st.builds(lambda text: {"text": text}, st.one_of(_say, values)),
    st.builds(lambda row, tools: {**row, "tools": tools}, _good_chat, values),
    values,
)


def row_files() -> st.SearchStrategy[tuple[str, bytes]]:
    """A file of rows, by its name: JSON Lines, a JSON list, CSV, something damaged."""
    rows = st.lists(_rows, max_size=6)
    like = st.builds(
        lambda good, odd: [*good, *odd], st.lists(_good_chat, min_size=1, max_size=4), st.lists(_rows, max_size=1)
    )
    lines = st.one_of(rows, like).map(lambda found: "\n".join(json.dumps(row) for row in found).encode())
    single = st.builds(lambda row, count: "\n".join([json.dumps(row)] * count).encode(), _rows, st.integers(1, 3))
    return st.one_of(
        st.tuples(st.just("rows.jsonl"), st.one_of(lines, single, damaged(lines))),
        st.tuples(st.just("rows.json"), rows.map(lambda found: json.dumps(found).encode())),
        st.tuples(
            st.just("rows.csv"), st.one_of(lines, damaged(st.just(b'prompt,completion\nwhen?,"at ""noon"""\nwho,we\n')))
        ),
        st.tuples(st.just("rows.parquet"), damaged(lines)),
    )


def data_settings() -> st.SearchStrategy[dict[str, Any]]:
    """Settings under which rows are read."""
    return st.fixed_dictionaries(
        {},
        optional={
            "format": st.sampled_from(("chat", "text", "instruction", "prompt_completion")),
            "train_on": st.sampled_from(("assistant", "all")),
            "overlong": st.sampled_from(("truncate", "drop", "error")),
            "max_length": st.sampled_from((2, 3, 8, 128)),
            "validation": st.sampled_from((0.2, 0.5)),
            "columns": st.dictionaries(
                st.sampled_from(("messages", "text", "prompt", "completion")), _text, max_size=2
            ),
        },
    )
