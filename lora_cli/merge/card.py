"""The model card of a merged model. Says only what holds on any machine: hub ids and figures, never a local path."""

from __future__ import annotations

import json
import re

from lora_cli.engine.trained import Target
from lora_cli.merge.result import Extraction, MergeReport
from lora_cli.runs.card import hub_id


def merged_card(target: Target, report: MergeReport, settings: str) -> str:
    """README.md of the merged model; `settings` describes the adapter."""
    base = hub_id(target.model.name_or_path)
    title = re.sub(r"[^\w .-]", " ", target.title).strip()
    lines = ["---"]
    if base:
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: finetune"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- lora", "- merged", "---"]
    about = f"[{base}](https://huggingface.co/{base})" if base else "a local model"
    lines += ["", f"# {title}", "", f"A LoRA adapter merged into {about}.", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {text} |" for label, text in _figures(report, settings)]
    return "\n".join([*lines, ""])


def extracted_card(target: Target, found: Extraction) -> str:
    """README.md of an extracted adapter; `target` is the tuned model, `target.model` its base."""
    base = hub_id(target.model.name_or_path)
    tuned = hub_id(target.name) if target.whole else None
    lines = ["---"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora"]
    if base:
        lines.append(f"- {json.dumps(f'base_model:adapter:{base}')}")
    title = re.sub(r"[^\w .-]", " ", target.title).strip()
    lines += ["---", "", f"# {title}, as an adapter", ""]
    lines.append(
        f"A LoRA of rank {found.rank} that explains how {tuned or 'a fully fine-tuned model'} differs from "
        f"{base or 'its base'}: the truncated singular value decomposition of each layer's change."
    )
    rows = [("layers", f"{len(found.modules):,}"), ("missed of the change", f"{found.error:.1%} (Frobenius norm)")]
    check = found.likeness
    if check is not None:
        losses = (
            f"tuned {check.loss_tuned:.4f}, base {check.loss_base:.4f}, base + adapter {check.loss_adapter:.4f} "
            f"(nats per token, {check.rows})"
        )
        rows.append(("KL to the tuned model", f"base {check.kl_base:.2e}, base + adapter {check.kl_adapter:.2e}"))
        rows.append(("loss", losses))
    if found.left_out:
        rows.append(("not held", f"{len(found.left_out):,} other tensors that changed"))
    return "\n".join([*lines, "", "| | |", "|---|---|", *(f"| {label} | {text} |" for label, text in rows), ""])


def _figures(report: MergeReport, settings: str) -> list[tuple[str, str]]:
    figures = [
        ("adapter", settings),
        (
            "merged",
            f"{report.changed:,} of {report.tensors:,} tensors, summed in float32"
            + ("" if report.dtype == "float32" else f", rounded once to {report.dtype}"),
        ),
        ("into", f"the {report.base.base} weights: {report.base.why}"),
    ]
    check = report.verification
    if check is None:
        return [*figures, ("verification", "every tensor accounted for; the numbers were not compared")]
    verdict = "verified" if check.verified else "not verified"
    agreement = (
        f"{verdict}: over {check.positions:,} positions logits differ from base + adapter by at most "
        f"{check.max_logit_difference:.2g} (tolerance {check.tolerance:.2g}), KL {check.kl:.1e}, "
        f"same top token {check.top1_agreement:.2%}"
    )
    losses = (
        f"base {check.loss_base:.4f}, base + adapter {check.loss_adapter:.4f}, merged {check.loss_merged:.4f} "
        f"(nats per token, {check.rows})"
    )
    return [
        *figures,
        ("verification", agreement),
        ("loss", losses),
    ]
