"""What the page of an evaluation adds to the stylesheet of report.html."""

from __future__ import annotations

STYLE = """
.verdict { font-size: 17px; margin: 14px 0 0; }
.verdict b { text-transform: capitalize; }
.better b { color: var(--good); }
.worse b { color: var(--warn); }
.numbers td, .numbers th { text-align: right; white-space: nowrap; width: auto; }
.numbers td:first-child, .numbers th:first-child { text-align: left; white-space: normal; }
.numbers td:last-child, .numbers th:last-child { padding-right: 0; }
.numbers .plain { color: var(--soft); }
.forest { width: 180px; display: inline-block; vertical-align: middle; }
.bar-base { fill: var(--soft); fill-opacity: .45; }
.bar-adapter { fill: var(--accent); fill-opacity: .75; }
.zero { stroke: var(--soft); stroke-dasharray: 3 3; }
.reach { stroke: var(--accent); stroke-width: 2; }
.middle { fill: var(--accent); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 10px; }
.key-base { background: var(--soft); opacity: .45; }
.key-adapter { background: var(--accent); opacity: .75; }
.row-head { display: flex; gap: 16px; justify-content: space-between; background: var(--card); color: var(--soft); }
.row-head b { color: var(--ink); font-weight: 600; }
.answers.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.read { border-top: 1px solid var(--faint); }
.d1 { background: rgba(36, 160, 84, .12); } .d2 { background: rgba(36, 160, 84, .24); }
.d3 { background: rgba(36, 160, 84, .38); } .d4 { background: rgba(36, 160, 84, .55); }
.u1 { background: rgba(214, 120, 20, .14); } .u2 { background: rgba(214, 120, 20, .28); }
.u3 { background: rgba(214, 120, 20, .44); } .u4 { background: rgba(214, 120, 20, .62); }
@media (max-width: 720px) {
  .answers.two { grid-template-columns: 1fr; }
  .numbers, .numbers tbody { display: block; }
  .numbers tr { display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 8px 0; }
  .numbers tr:first-child { display: none; }
  .numbers td, .numbers td:first-child { display: block; padding: 0; text-align: left; min-width: 76px; }
  .numbers td:first-child { flex-basis: 100%; font-weight: 600; }
  .numbers td:not(:first-child)::before {
    content: attr(data-name); display: block; color: var(--soft); font-size: 12px;
  }
  .forest { width: 220px; }
}
"""
