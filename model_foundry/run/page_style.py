"""The one style sheet of report.html: light and dark, wide and narrow, and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5b6570; --paper: #fff; --panel: #f5f6f8; --rule: #dde1e6;
  --pass: #1a7f4b; --fail: #c0362c; --none: #6b7280; --pass-bg: #e6f4ec; --fail-bg: #fbeae8;
  --series-1: #2f6fde; --series-2: #d9730d; --series-3: #1a8f6a; --series-4: #8a4fd0; --series-5: #c23b78;
  --series-6: #7a8491; --series-7: #0e8ba0; --series-8: #a1702b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --paper: #14171b; --panel: #1d2127; --rule: #333a43;
    --pass: #4cc38a; --fail: #ff7b6f; --none: #9aa5b1; --pass-bg: #16301f; --fail-bg: #3a1d1a;
    --series-1: #6ea3ff; --series-2: #f5a04c; --series-3: #4cc38a; --series-4: #b58cf0; --series-5: #f07aaf;
    --series-6: #9aa5b1; --series-7: #4cc5d8; --series-8: #d3a567; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 24px 20px 48px; }
header { border-left: 6px solid var(--none); background: var(--panel); border-radius: 8px; padding: 16px 20px; }
header.pass { border-color: var(--pass); background: var(--pass-bg); }
header.fail { border-color: var(--fail); background: var(--fail-bg); }
header .run { margin: 0; color: var(--soft); }
h1 { margin: 0; font-size: 2rem; line-height: 1.25; }
header.pass h1 { color: var(--pass); } header.fail h1 { color: var(--fail); }
h1 small { color: var(--ink); font-size: 1rem; font-weight: 400; margin-left: 14px; }
h2 { font-size: 1.25rem; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 20px 0 6px; text-transform: capitalize; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px; }
.tile { flex: 1 1 150px; background: var(--panel); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.25rem; white-space: nowrap; }
.tile span, small, footer, figcaption .legend { color: var(--soft); font-size: .875rem; }
.notes { background: var(--panel); border-radius: 8px; margin: 14px 0 0; padding: 10px 14px 10px 34px; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: start; vertical-align: top; padding: 7px 10px; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 600; font-size: .8125rem; }
td.num { white-space: nowrap; font-variant-numeric: tabular-nums; }
table.narrow { width: auto; min-width: 320px; margin: 10px 0; }
table.facts th { width: 34%; font-weight: 500; color: var(--soft); }
table.checks td:first-child { white-space: nowrap; } table.checks td:nth-child(3) { min-width: 150px; }
table.gate th:nth-child(1) { width: 20%; } table.gate th:nth-child(2) { width: 8%; }
table.gate th:nth-child(3) { width: 18%; }
ul.examples { margin: 6px 0 0; padding-left: 18px; font-size: .875rem; color: var(--soft); }
ul.examples q { color: var(--ink); }
table.cases { table-layout: fixed; } table.cases td { white-space: pre-wrap; unicode-bidi: isolate; }
table.cases th:nth-child(2) { width: 20%; } table.cases th:nth-child(4) { width: 22%; }
.badge, .mark { display: inline-block; border-radius: 4px; padding: 0 6px; font-size: .75rem; font-weight: 600;
  background: var(--panel); color: var(--soft); white-space: nowrap; }
.badge.pass, .mark.good { background: var(--pass-bg); color: var(--pass); }
.badge.fail { background: var(--fail-bg); color: var(--fail); }
.changes { display: flex; height: 14px; border-radius: 7px; overflow: hidden; gap: 2px; }
.changes i { flex-basis: 4px; } .changes .improved { background: var(--pass); }
.changes .same { background: var(--none); } .changes .worse { background: var(--fail); }
summary { cursor: pointer; font-weight: 600; padding: 10px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px; }
figure { margin: 0; } figcaption { font-weight: 600; display: flex; flex-wrap: wrap; gap: 4px 16px; }
.legend { display: inline-flex; flex-wrap: wrap; gap: 0 14px; font-weight: 400; align-items: center; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.legend .faint { opacity: .45; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
svg .label { fill: var(--ink); } svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; } svg .mark { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .faint { fill: none; stroke-width: 1; opacity: .45; }
pre { background: var(--panel); border-radius: 8px; padding: 12px 14px; overflow-x: auto; }
code, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; font-size: .875em; }
footer { margin-top: 40px; }
@media (max-width: 640px) {
  main { padding: 14px 14px 32px; } h1 small { display: block; margin: 4px 0 0; }
  svg text { font-size: 16px; }
  table.checks thead, table.cases thead { display: none; }
  table.checks tr, table.cases tr { display: block; border: 1px solid var(--rule); border-radius: 8px;
    margin-bottom: 10px; padding: 6px 10px; }
  table.checks td, table.cases td { display: block; border: 0; padding: 3px 0; }
  table.checks td::before, table.cases td::before { content: attr(data-label); display: block; color: var(--soft);
    font-size: .75rem; }
  table.checks td:first-child::before { content: none; } table.facts th { width: 42%; }
}
@media print { main { max-width: none; } details { break-inside: auto; } tr { break-inside: avoid; } }
"""
