"""The stylesheet and the script of report.html, as text.

They stand in the page itself, and its security policy names their hashes, so nothing else can run or style
it. The script is optional: it adds the read-out under the pointer and the copy button.
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --soft: #5c6670; --faint: #d9dee3; --paper: #fff; --card: #f6f7f9;
  --accent: #0a66c2; --pale: #a9c8ea; --good: #17803d; --warn: #9a5b00; --mark: #fff1b8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ec; --soft: #98a2ad; --faint: #30363d; --paper: #0f1317; --card: #171c22;
    --accent: #6cb4ff; --pale: #2f5a86; --good: #5fce86; --warn: #f0b45a; --mark: #57470f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 908px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 52px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--faint); }
h3 { font-size: 13px; font-weight: 600; margin: 22px 0 2px; color: var(--soft); }
p { margin: 6px 0; }
.soft, figcaption { color: var(--soft); }
figcaption, output { font-size: 13px; }

.figures {
  display: flex; flex-wrap: wrap; gap: 1px; margin: 26px 0 8px; overflow: hidden;
  background: var(--faint); border: 1px solid var(--faint); border-radius: 8px;
}
.figures div { flex: 1 0 auto; background: var(--paper); padding: 11px 14px; }
.figures dt, small { color: var(--soft); font-size: 12px; font-weight: 400; }
.figures dd { margin: 2px 0 0; font-size: 17px; font-weight: 600; white-space: nowrap; }
small { display: block; }
.warning { border-left: 3px solid var(--warn); padding: 2px 0 2px 12px; overflow-wrap: anywhere; }
.warning b { color: var(--warn); }

figure { margin: 0; }
output {
  display: block; position: sticky; top: 0; min-height: 24px; white-space: pre-wrap;
  background: var(--paper); color: var(--soft);
}
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11.5px; }
svg path { fill: none; }
.halo { stroke: var(--paper); stroke-width: 4px; paint-order: stroke; stroke-linejoin: round; }
.bar { fill: var(--accent); }
.grid { stroke: var(--faint); }
.raw { stroke: var(--pale); stroke-width: 1.2; }
.smooth, .line { stroke: var(--accent); stroke-linejoin: round; stroke-linecap: round; }
.smooth { stroke-width: 1.8; }
.line { stroke-width: 1.3; }
.dot { fill: var(--ink); }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.level { stroke: var(--soft); stroke-dasharray: 5 4; }
.epoch { stroke: var(--faint); stroke-dasharray: 2 3; stroke-width: 1.5; }
.resume { stroke: var(--soft); stroke-width: 1.5; }
.halving { stroke: var(--warn); stroke-width: 1.5; }
svg .checkpoint { fill: var(--soft); }
.cursor { stroke: var(--soft); pointer-events: none; }

table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; overflow-wrap: anywhere; }
tr { border-bottom: 1px solid var(--faint); }
th { font-weight: 400; color: var(--soft); width: 170px; }

.sample { border: 1px solid var(--faint); border-radius: 8px; margin: 14px 0; overflow: hidden; }
.sample > * { padding: 10px 16px; margin: 0; }
.prompt { background: var(--card); }
.answers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0 20px; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.masked { background: var(--card); border-radius: 8px; padding: 10px 16px; margin: 8px 0; }
ins { text-decoration: underline 2px var(--accent); text-underline-offset: 3px; }
.same { color: var(--good); font-size: 12px; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }

.code { position: relative; }
pre {
  background: var(--card); border-radius: 8px; padding: 14px 16px; margin: 8px 0; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
pre b { color: var(--accent); }
button {
  position: absolute; top: 0; right: 0; margin: 8px; padding: 2px 10px; cursor: pointer;
  font: inherit; font-size: 12px; color: var(--soft); background: var(--paper);
  border: 1px solid var(--faint); border-radius: 6px;
}
button[hidden] { display: none; }

@media (max-width: 720px) {
  .answers { grid-template-columns: 1fr; gap: 10px; }
  th { width: 110px; }
}
@media print {
  main { padding: 0; max-width: none; }
  h2, h3 { break-after: avoid; }
  figure, .sample { break-inside: avoid; }
  button, output, .cursor { display: none; }
  pre { white-space: pre-wrap; }
}
"""

SCRIPT = """
"use strict";
const lines = JSON.parse(document.getElementById("metrics").textContent).training;
const readout = document.querySelector("output");
const charts = [...document.querySelectorAll("svg[data-first]")];
const names = { loss: "loss", learning_rate: "lr", grad_norm: "grad", tokens_per_second: "tok/s" };

function nearest(step) {
  const steps = lines.step;
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] < steps[high] - step ? low : high;
}

function show(event) {
  const { left: edge, width } = event.currentTarget.getBoundingClientRect();
  const { first, last, left, right } = event.currentTarget.dataset;
  const x = (event.clientX - edge) / width * event.currentTarget.viewBox.baseVal.width;
  const index = nearest(+first + (x - left) / (right - left) * (last - first));
  const at = +left + (lines.step[index] - first) / (last - first) * (right - left);
  for (const chart of charts) {
    const cursor = chart.querySelector(".cursor");
    cursor.setAttribute("d", cursor.getAttribute("d").replace(/^M[\\d.]+/, "M" + at.toFixed(1)));
    cursor.setAttribute("visibility", "visible");
  }
  const values = Object.keys(names)
    .filter(key => lines[key][index] !== null)
    .map(key => names[key] + " " + lines[key][index].toLocaleString("en", { maximumSignificantDigits: 5 }));
  readout.textContent = ["step " + lines.step[index].toLocaleString("en"), ...values].join("   ");
}

function hide() {
  readout.textContent = "";
  for (const chart of charts) chart.querySelector(".cursor").setAttribute("visibility", "hidden");
}

for (const chart of charts) {
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerleave", hide);
}
for (const button of document.querySelectorAll("button")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copies).textContent);
    button.textContent = "copied";
  });
}
"""
