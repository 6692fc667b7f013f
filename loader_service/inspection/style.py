"""The head of a page: its policy, which forbids every request, and its style sheet."""

from __future__ import annotations

POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
_STYLE = """
:root{--ink:#1d2329;--dim:#5c6873;--paper:#fff;--card:#f6f8fa;--line:#d5dce2;--label:#b9efc5;--special:#fff;--frame:#5b4bd6;
--action:#ffe2a8;--bar:#7aa7d9;--outline:#b3401f;--wrong:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ee;--dim:#9aa7b3;--paper:#14181c;--card:#1d2329;--line:#38424b;
--label:#1f5a33;--special:#14181c;--frame:#a79bff;--action:#6b4a08;--bar:#4b7fb8;--outline:#ff9b7a;--wrong:#ff8a80}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;padding:1.2rem;max-width:1200px}
h1{font-size:1.25rem;overflow-wrap:anywhere}h2{font-size:1rem;margin:0 0 .3rem}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;margin:1rem 0}
p{margin:.3rem 0}.where,.size,.axis,.legend{color:var(--dim);font-size:.85rem;overflow-wrap:anywhere}
.images{display:flex;flex-wrap:wrap;gap:.5rem}
img{max-width:100%;min-width:min(160px,100%);height:auto;border:1px solid var(--line);image-rendering:pixelated}
.text{font:13px/1.9 ui-monospace,monospace;overflow-wrap:anywhere;white-space:pre-wrap}
.t{padding:.1em 0;border-radius:3px}.l{background:var(--label)}
.s{border:1.5px solid var(--frame);background:var(--special);color:var(--frame);font-weight:600;padding:0 .25em;margin:0 1px}
.s.l{background:var(--label)}.a{background:var(--action);padding:0 .25em;
margin:0 1px;border:1px solid var(--outline);white-space:nowrap}
.a.l{background:linear-gradient(var(--action) 60%,var(--label) 60%)}
.t b{font-weight:600;font-size:.85em;padding-left:.2em}.feed{color:var(--dim)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:.4rem 0}
td,th{border:1px solid var(--line);padding:.15rem .5rem;text-align:right}td:first-child,th:first-child{text-align:left}
.error td{color:var(--outline)}.wrong{color:var(--wrong)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:1rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem}
figcaption{font-size:.8rem;min-height:3.6em}svg{width:100%;height:90px;display:block;border-bottom:1px solid var(--line)}
.bar{fill:var(--bar)}.outline{fill:none;stroke:var(--outline);stroke-width:1.5;vector-effect:non-scaling-stroke}
.axis{display:flex;justify-content:space-between}
"""
HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    f'{POLICY}<link rel="icon" href="data:,"><style>{_STYLE}</style>'
)
