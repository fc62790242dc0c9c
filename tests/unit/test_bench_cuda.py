"""What the bench on a card computes from what it measured, on figures that can be checked by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench.cuda_page import cuda_table, longest_table, write_cuda_page
from bench.cuda_run import Asked, Child
from bench.cuda_ways import CUDA_WAYS, CudaWay, chosen, climbers
from bench.cuda_weights import write_safetensors
from bench.cuda_world import SHAPES, Shape, write_ladder, write_rows
from bench.profiles import Kernel, busy, class_of, page_of
from bench.watch import limit_card
from bench_cuda import figures

from lora_cli.data.order import step_examples


def test_the_shape_is_llama_8bs() -> None:
    """8,030,261,248 parameters: those multiplied, the embedding, two norms for each layer and one behind the last."""
    shape = Shape()
    norms = (2 * shape.layers + 1) * shape.hidden
    assert shape.multiplied + shape.vocabulary * shape.hidden + norms == 8_030_261_248
    assert shape.tokens == 4096


def test_rows_of_the_file_are_lora_steps(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shape = SHAPES["tiny"]
    write_rows(tmp_path, shape, 5)
    rows = [json.loads(line)["text"] for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and len(steps) == 5
    for number, documents in enumerate(steps, start=1):
        assert [len(document) for document in documents] == list(shape.documents)
        places = step_examples(number, seed=42, count=20, batch_size=4)
        for place, document in zip(places, documents, strict=True):
            words = [int(word[1:]) + 2 for word in rows[int(place)].split()]
            assert [*words, 0] == document


def test_the_ladder_climbs_in_loras_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_ladder(tmp_path, (8, 16, 32, 64, 128))
    rows = [json.loads(line)["text"] for line in (tmp_path / "data" / "ladder.jsonl").read_text().splitlines()]
    lengths = [len(rows[int(step_examples(n, seed=42, count=5, batch_size=1)[0])].split()) + 1 for n in range(1, 6)]
    assert lengths == [8, 16, 32, 64, 128]


def test_the_longest_document_is_read_off_a_line() -> None:
    """10 GiB at 1,000 tokens and 20 GiB at 2,000 of 145 GiB: 14,500 tokens, rounded down; of 24 GiB: 2,400."""
    row = {"says": "lora", "ladder": [1000, 2000, 4000], "total_bytes": 145 * 2**30, "error": "out of memory"}
    peaks = {"step_peaks": [[10 * 2**30, 0], [20 * 2**30, 0]], "step_seconds": [2.25]}
    flat = {"step_peaks": [[0, 0], [0, 0], [0, 0]], "step_seconds": [1.0, 4.0]}
    lines = longest_table([row | peaks, row, row | peaks | {"limit_bytes": 24 * 2**30}, row | flat]).splitlines()
    assert lines[2] == "| lora | 10.0 GiB | 20.0 GiB | - | 2,000 | 2.2 s | 14,000 | out of memory |"
    assert lines[3] == "| lora | - | - | - | - | - | - | out of memory |"
    assert lines[4].endswith("| 2,000 | 2.2 s | 2,000 | out of memory |")
    assert lines[5].endswith("| 4,000 | 4.0 s | - | out of memory |")


def test_each_base_and_limit_has_a_table_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "measurements").mkdir()
    page = tmp_path / "speed.md"
    page.write_text("<!-- cuda: begin -->\n<!-- cuda: end -->\n")
    way = {"way": "longest-lora", "says": "lora train", "card": "NVIDIA X", "base": "bf16", "ladder": [8, 16]}
    done = {"step_peaks": [[2**30, 0], [2 * 2**30, 0]], "step_seconds": [0.5], "limit_bytes": None}
    rows = [
        way | done | {"error": "no end in time"},
        way | done,  # once more, and it is the last that counts
        way | done | {"limit_bytes": 24 * 2**30, "error": "out of memory"},
        way | done | {"base": "nf4", "limit_bytes": 24 * 2**30},
        way
        | {"base": "nf4", "limit_bytes": 24 * 2**30, "ladder": [12], "step_peaks": [[2**30, 0]], "step_seconds": []}
        | {"versions": {"flash-attn-4": "4"}},
    ]
    (tmp_path / "measurements" / "longest-x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    write_cuda_page(tmp_path / "measurements", page)
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("One document")] == [
        "One document in one step, base in bf16, NVIDIA X, all of it; peak of allocated memory:",
        "One document in one step, base in bf16, NVIDIA X, 24.0 GiB of it; peak of allocated memory:",
        "One document in one step, base in NF4, NVIDIA X, 24.0 GiB of it; peak of allocated memory:",
    ]
    assert "no end in time" not in text and text.count("| lora train |") == 3
    assert "| lora train | 1.0 GiB |  | 2.0 GiB | 16 |" in text
    assert "| lora train, FlashAttention 4 |  | 1.0 GiB |  | 12 |" in text


def test_ways_that_climb_are_chosen_by_name() -> None:
    ways = climbers((8, 16), "nf4")
    assert {(way.base, way.checkpointing, way.ladder) for way in ways} == {("nf4", True, (8, 16))}
    assert [way.name for way in chosen(ways, "longest-trl,longest-lora", lambda _: False)] == [
        "longest-trl",
        "longest-lora",
    ]
    assert chosen(CUDA_WAYS, "none", lambda _: False) == []
    assert [way.tool for way in chosen(ways, None, lambda way: way.tool != "lora")] == ["lora"] * 3
    with pytest.raises(SystemExit, match="no such way: longest-x; there are longest-lora, "):
        chosen(ways, "longest-x", lambda _: False)


@dataclass(frozen=True)
class Told(CudaWay):
    """A way whose program is given, and imports nothing before it."""

    code: str = ""

    def program(self, folder: Path, shape: Shape, steps: int) -> list[str]:
        (folder / "program.py").write_text(self.code)
        return [str(folder / "program.py")]


STEPS = (
    "import torch\nweight = torch.nn.Parameter(torch.zeros(3))\noptimizer = torch.optim.SGD([weight], lr=0.1)\n"
    "for _ in range({}): optimizer.step()\n"
)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')", "out of memory"),
        ("import torch; raise torch.OutOfMemoryError", "out of memory"),
        ("raise ValueError('no such option')", "exit code 1"),
        ("pass", "it ended before its steps were taken"),
        (STEPS.format(1) + "raise SystemExit('error: out of memory at step 2')", "out of memory"),
        (STEPS.format(2), None),
    ],
)
def test_a_way_that_climbs_says_what_ended_it(tmp_path: Path, code: str, error: str | None) -> None:
    way = Told("longest", "told", "unsloth", "bf16", True, (), (8, 16), code)
    child = Child(way, Asked(tmp_path, SHAPES["tiny"], 4, limit_gib=24.0))
    report = child.train(100, time.monotonic() + 200)
    assert report.get("error") == error
    assert len(report.get("step_peaks", ())) == code.count("range(1)") + 2 * code.count("range(2)")


def test_a_smaller_card_is_pretended_only_once_the_program_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB of 140: the fraction is set when CUDA begins, not before; 130 GiB free are 24 less what is held."""
    queued: list[Any] = []
    fractions: list[float] = []
    card = {"mem_get_info": lambda device=None: (130 * 2**30, 140 * 2**30), "memory_reserved": lambda device: 2**30}
    card |= {"is_available": lambda: True, "current_device": lambda: 0, "_lazy_call": queued.append}
    card |= {"get_device_properties": lambda _: SimpleNamespace(total_memory=140 * 2**30)}
    card |= {"set_per_process_memory_fraction": fractions.append}
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, value)
    limit_card(24 * 2**30)
    assert not fractions
    assert torch.cuda.mem_get_info() == (23 * 2**30, 140 * 2**30)
    queued[0]()
    assert fractions == [pytest.approx(24 / 140)]
    fractions.clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", card["mem_get_info"])
    limit_card(200 * 2**30)
    queued[1]()
    assert not fractions and torch.cuda.mem_get_info()[0] == 130 * 2**30


def test_weights_written_through_memory_maps_are_read_back(tmp_path: Path) -> None:
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2), "d": (1, 9)}
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    write_safetensors(tmp_path, shapes, lambda name, shape: tensors[name], 3)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    read = {name: value for file in files for name, value in load_file(file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in shapes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>(Params)", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<x>", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80", "attention"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(x)>", "copies and fills"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("Memset (Device)", "copies and fills"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<x>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, x>", "reductions"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*)", "dequantize"),
        ("_swiglu_backward_kernel", "Triton"),
        ("gated_back", "Triton"),
        ("rms_norm", "Triton"),
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", "matrix products"),
        ("triton_red_fused_mul_sum_3", "Triton"),
        ("liger_cross_entropy_kernel", "cross-entropy"),
        ("void (anonymous namespace)::softmax_warp_forward<x>", "cross-entropy"),
    ],
)
def test_kernels_have_a_class(name: str, label: str) -> None:
    assert class_of(name) == label


def test_time_in_which_nothing_runs_is_idle() -> None:
    """Two kernels overlap on two streams from 0 to 30; a third runs from 50 to 100: 20 of 100 microseconds are idle."""
    kernels = [Kernel("nvjet_a", 0, 20), Kernel("_own", 10, 30), Kernel("nvjet_a", 50, 100)]
    assert busy(kernels) == 80
    lines = {line.split("  ")[0]: line.split() for line in page_of(kernels, 1).splitlines() if line}
    assert lines["idle"][-2] == "20.0%"
    assert lines["matrix products"][-2:] == ["70.0%", "2"]


def row(way: str, tool: str, speed: float, **others: object) -> dict[str, object]:
    step = 4096 / speed
    return {
        "way": way,
        "says": way,
        "tool": tool,
        "base": "bf16",
        "checkpointing": False,
        "tokens_per_second": speed,
        "seconds_per_step": step,
        "timed_seconds": [step, 1.5 * step],
        "multiplied_parameters": 5_000_000_000,
        "matmul_peak_flops": 8e14,
        "peak_allocated_bytes": 3 * 2**30,
        "peak_reserved_bytes": 4 * 2**30,
        "card_bytes": None,
        "import_seconds": 4.0,
        "first_step_seconds": 7.5,
        "mean_loss": 11.75,
    } | others


def test_the_table_compares_like_with_like() -> None:
    failed = {"error": "exit code 1", "last_lines": "Traceback\nValueError: no | here"}
    rows = [
        row("lora-unfused", "lora", 12_345.0),
        row("lora", "lora", 20_480.0),
        row("peer", "trl", 10_240.0),
        row("peer ckpt", "trl", 8_192.0, checkpointing=True),
        row("broken", "unsloth", 1.0) | failed,
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in cuda_table(rows).splitlines()]
    assert len({len(line) for line in lines}) == 1
    _, _, _, ours, peer, other, broken = lines
    assert ours[2:6] == ["20,480", "1.00 times", "51.2%", "200.0 (200.0 to 300.0)"]
    assert peer[3] == "2.00 times" and peer[6:10] == ["3.0 GiB", "4.0 GiB", "-", "11.5 s"]
    assert other[3] == "-"
    assert "ValueError: no / here" in broken[2]


def test_speed_counts_the_tokens_that_a_way_really_took(tmp_path: Path) -> None:
    """A peer that silently doesn't pack takes one document a step: 100 tokens in 0.5 s, whatever was asked for."""
    way = next(way for way in CUDA_WAYS if way.name == "trl")
    log = [{"step": n, "loss": 2.0 + n, "num_tokens": 100.0 * n} for n in range(1, 5)]
    told = way.told(tmp_path, "warning\n" + "\n".join(map(json.dumps, log)))
    assert told == [(3.0, 100.0), (4.0, 100.0), (5.0, 100.0), (6.0, 100.0)]
    report = {"step_seconds": [9.0, 0.5, 0.5], "losses": [3.0, 4.0], "step_tokens": [count for _, count in told]}
    assert figures(way, Shape(), 2, report)["tokens_per_second"] == 200.0
    assert figures(way, Shape(), 2, report | {"step_tokens": [None] * 4})["tokens_per_second"] == 8192.0


def test_the_page_keeps_a_way_that_was_measured_before_it_failed(tmp_path: Path) -> None:
    (tmp_path / "measurements").mkdir()
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- cuda: begin -->\nold\n<!-- cuda: end -->\nafter\n")
    write_cuda_page(tmp_path / "measurements", page)
    assert page.read_text().splitlines()[2:3] == ["No rows have been measured yet."]
    common = {"card": "NVIDIA X", "driver": "1.2", "versions": {"torch": "2.11.0"}}
    failed = {"error": "exit code 1", "last_lines": "MemoryError"}
    rows = [row("lora", "lora", 20_480.0) | common, row("lora", "lora", 1.0) | common | failed]
    (tmp_path / "measurements" / "cuda-x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    write_cuda_page(tmp_path / "measurements", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "NVIDIA X, driver 1.2; bf16 product 800 TFLOP/s; torch 2.11.0." in text
    assert "20,480" in text and "MemoryError" not in text
    absent = next(line for line in text.splitlines() if line.startswith("Not measured: "))
    assert "`trl`" in absent and "`lora`" not in absent


def test_a_watched_program_is_timed_and_ended(tmp_path: Path) -> None:
    """Twenty steps on a CPU, of which two are seen and the fifth ends the process; one on `meta` doesn't count."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\n"
        "def steps(device, count):\n"
        "    weight = torch.nn.Parameter(torch.zeros(3, device=device))\n"
        "    optimizer = torch.optim.SGD([weight], lr=0.1)\n"
        "    for step in range(count):\n"
        "        weight.grad = torch.ones_like(weight)\n"
        "        optimizer.step()\n"
        "        print(device, step, sys.argv[1], flush=True)\n"
        "steps('meta', 1)\n"
        "steps('cpu', 20)\n"
    )
    report = tmp_path / "report.json"
    watch = Path(__file__).parents[2] / "scripts" / "bench" / "watch.py"
    command = [sys.executable, str(watch), str(report), "2", "--", str(program), "argument"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split("\n")[:-1] == ["meta 0 argument", *(f"cpu {n} argument" for n in range(4))]
    found = json.loads(report.read_text())
    assert len(found["step_seconds"]) == 1 and np.isfinite(found["step_seconds"]).all()
    assert found["first_step_seconds"] > 0 and found["versions"]["torch"] == torch.__version__
