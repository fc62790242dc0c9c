from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from lora_cli.report.preview import render_preview


@dataclass(frozen=True)
class Example:
    tokens: tuple[str, ...]
    trained: tuple[int, ...]
    place: str = "train.jsonl:1"
    truncated: bool = False
    notes: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()


def body(screen: str) -> list[str]:
    """The lines between the heading and the legend."""
    lines = screen.split("\n")
    return lines[2:-2]


CHAT = Example(
    (
        "<|im_start|>",
        "user",
        "\n",
        "What",
        " does",
        "?",
        "<|im_end|>",
        "\n",
        "conv",
        "(self",
        ")",
        "<|im_end|>",
        "\n",
    ),
    (0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0),
    notes=("ends in a trained <|im_end|>",),
)


def test_the_screen_of_a_chat() -> None:
    assert render_preview([CHAT], width=60).split("\n") == [
        "  train.jsonl:1, 13 tokens, 4 trained",
        "",
        "    <|im_start|>user|⏎",
        "    What|·does|?<|im_end|>⏎",
        "  ▌ conv|(self|)<|im_end|>",
        "    ⏎",
        "",
        "  ends in a trained <|im_end|>",
        "",
        "  ▌ trained | token edge · space ⏎ newline",
    ]


tokens = st.lists(
    st.tuples(st.sampled_from(["a", "word", " and", "中文字", "x" * 90, "\n", ".\n\n", "<s>"]), st.integers(0, 1)),
    min_size=1,
    max_size=60,
)


@given(tokens, st.integers(40, 100))
def test_marked_lines_hold_exactly_the_trained_tokens(pairs: list[tuple[str, int]], width: int) -> None:
    example = Example(tuple(text for text, _ in pairs), tuple(flag for _, flag in pairs))
    lines = body(render_preview([example], width=width))
    assert all(cell_len(line) <= width for line in lines)
    marked = "".join(line[4:] for line in lines if line.startswith("  ▌ "))
    expected = "".join(text for text, flag in pairs if flag).replace(" ", "·").replace("\n", "⏎")
    assert marked.replace("|", "") == expected


def test_data_cannot_steer_the_terminal() -> None:
    screen = render_preview([Example(("\x1b[2J", "\t"), (1, 1))], width=80)
    assert "\x1b" not in screen
    assert r"\x1b[2J|\t" in screen


def test_truncation_is_said() -> None:
    assert "2 tokens, 1 trained, truncated" in render_preview([Example(("a", "b"), (0, 1), truncated=True)], width=80)


@dataclass(frozen=True)
class Packed:
    places: tuple[str, ...]
    boundaries: tuple[int, ...]


def test_roles_stand_in_the_margin_and_packs_below() -> None:
    roles = ("", "", "", "user", "user", "user", "", "", *["assistant"] * 4, "")
    packs = [Packed(("train.jsonl:1", "train.jsonl:4"), (0, 13, 40)), Packed(("train.jsonl:2",), (0, 90))]
    screen = render_preview([replace(CHAT, roles=roles, notes=())], packs, 4096, width=72)
    assert screen.split("\n") == [
        "  train.jsonl:1, 13 tokens, 4 trained",
        "",
        "    <|im_start|>user|⏎",
        "u   What|·does|?",
        "    <|im_end|>⏎",
        "  ▌ conv|(self|)<|im_end|>",
        "    ⏎",
        "",
        "  as one step, in micro-batches of at most 4,096 tokens:",
        "    40 tokens: train.jsonl:1 at 0, train.jsonl:4 at 13",
        "    90 tokens: train.jsonl:2 at 0",
        "",
        "  ▌ trained | token edge · space ⏎ newline",
        "  u user, a assistant",
    ]
    narrow = render_preview([replace(CHAT, roles=roles)], packs, 4096, width=40)
    assert all(cell_len(line) <= 40 for line in narrow.split("\n"))
