"""What the page of a sweep adds to the stylesheet of report.html; its script: who is under the pointer stands out."""

from __future__ import annotations

STYLE = """
a { color: inherit; text-decoration-color: var(--pale); text-underline-offset: 3px; }
.board td, .board th { width: auto; white-space: nowrap; text-align: right; padding: 5px 0 5px 18px; }
.board td:nth-child(1), .board th:nth-child(1) { text-align: right; padding-left: 0; color: var(--soft); }
.board td:nth-child(2), .board th:nth-child(2) { text-align: left; white-space: normal; min-width: 150px; }
.board tr:has(+ .why) { border: none; }
.board .why td { color: var(--soft); font-size: 12px; padding-top: 0; }
.board .best td { font-weight: 600; }
.board .gone td { color: var(--soft); }
.board tr[data-member]:hover td { background: var(--card); }
.wide { overflow-x: auto; }
.member { stroke: var(--pale); stroke-width: 1.4; stroke-linejoin: round; stroke-linecap: round; }
.member.early { stroke-dasharray: 3 3; }
.member.best { stroke: var(--accent); stroke-width: 2.2; }
svg .end { font-size: 10.5px; }
.spot { fill: var(--pale); stroke: var(--paper); }
.spot.early { fill: var(--paper); stroke: var(--pale); stroke-width: 1.5; }
.spot.best { fill: var(--accent); }
path.on { stroke: var(--ink); stroke-width: 2.6; }
circle.on { fill: var(--ink); }
svg text.on { fill: var(--ink); font-weight: 700; }
.strips { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 4px 28px; }
@media (max-width: 720px) { .strips { grid-template-columns: 1fr; } }
"""

SCRIPT = """
"use strict";
const marked = [...document.querySelectorAll("[data-member]")];
for (const one of marked) {
  one.addEventListener("pointerenter", () => {
    for (const other of marked) other.classList.toggle("on", other.dataset.member === one.dataset.member);
  });
  one.addEventListener("pointerleave", () => {
    for (const other of marked) other.classList.remove("on");
  });
}
for (const button of document.querySelectorAll("button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copies).textContent);
    button.textContent = "copied";
  });
}
"""
