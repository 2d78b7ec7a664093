"""The look of report.html: light and dark, from a telephone to a wide screen."""

from ray_peft.report.palette import FAINT, GRID, INK, PAPER, VARIABLES, css_variables

_RULES = (
    f"""
:root {{ color-scheme: light dark; {css_variables(dark=False)}
  --ink: var({VARIABLES[INK]}); --faint: var({VARIABLES[FAINT]}); --line: var({VARIABLES[GRID]});
  --paper: var({VARIABLES[PAPER]}); --link: var({VARIABLES["#0072b2"]}); --panel: #f4f5f7; }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} --panel: #212329; }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 0.8rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.45rem; line-height: 1.2; margin: 0 0 0.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 0.7rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.5rem 0 0.5rem; overflow-wrap: anywhere; }
p, ul { max-width: 46rem; margin: 0.6rem 0; overflow-wrap: anywhere; }
p { white-space: pre-line; }
body > p { margin: 0.2rem 0; }
ul { padding-left: 1.3rem; }
li { margin: 0.25rem 0; }
a { color: var(--link); }
nav { font-size: 0.85rem; margin: 0.4rem 0; }
nav a { display: inline-block; margin: 0.1rem 0.9rem 0.1rem 0; }
.scroll { overflow-x: auto; margin: 0.9rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.4rem 0.7rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--panel); color: var(--ink); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: normal; }
tbody th div { width: max-content; max-width: 21rem; overflow-wrap: anywhere; }
.text { text-align: left; }
td.text { white-space: normal; min-width: 7rem; max-width: 34rem; overflow-wrap: break-word; }
th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th:first-child { background: var(--panel); }
.gallery table { width: auto; }
.gallery img { display: block; max-width: 12rem; height: auto; border-radius: 3px; }
.gallery tbody th div { max-width: 12rem; }
.gallery thead th { white-space: normal; overflow-wrap: anywhere; }
.gallery thead th:not(:first-child) { max-width: 12rem; }
figure { margin: 1.1rem 0; max-width: 46rem; overflow-x: auto; }
figcaption { font-size: 0.9rem; color: var(--faint); }
figure svg { display: block; width: 100%; min-width: 30rem; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo,
  Consolas, monospace; }
.code { background: var(--panel); border-radius: 6px; padding: 0.7rem 0.9rem; max-width: 60rem; }
details { margin: 0.7rem 0; border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.9rem; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.given, .answers { display: grid; gap: 0.8rem; margin: 0.8rem 0; }
.given { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.answers { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem 0.8rem; min-width: 0; }
.given .card { background: var(--panel); }
.card h4 { margin: 0 0 0.3rem; font-size: 0.82rem; color: var(--faint); overflow-wrap: anywhere; }
table.fits { table-layout: auto; }
.fits th, .fits td { white-space: normal; overflow-wrap: break-word; }
.fits td, .fits th { padding: 0.25rem 0.6rem; }
.fits tbody th div { width: auto; max-width: 30rem; }
figure.wide { max-width: none; margin: 0.4rem 0; }
figure.wide figcaption { margin-top: -0.3rem; }
thead button { all: unset; cursor: pointer; font-weight: 600; }
thead button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
thead button::after { content: "\\2195"; color: var(--faint); padding-left: 0.25em; font-weight: 400; }
[aria-sort="ascending"] button::after { content: "\\2191"; color: var(--ink); }
[aria-sort="descending"] button::after { content: "\\2193"; color: var(--ink); }
section:first-of-type > h2 { border: 0; margin: 0; padding: 0; font-size: 1.1rem; }
section:first-of-type > ul { max-width: none; margin: 0.3rem 0; }
section:first-of-type > ul li { margin: 0; }
#appendix > details > summary h2 { display: inline; border: 0; margin: 0; padding: 0; font-size: 1.02rem; }
.controls { display: flex; flex-wrap: wrap; gap: 0.4rem 1rem; align-items: center; margin: 0.7rem 0; font-size: 0.9rem;
}
.controls select { max-width: 16rem; }
.controls input[type="number"] { width: 4.5rem; }
.controls select, .controls input { font: inherit; }
.questions .list { max-height: 32rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px; }
.questions details { margin: 0; border-width: 0 0 1px; border-radius: 0; padding: 0.25rem 0.4rem; }
.questions summary { font-weight: 400; font-size: 0.9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0.5rem 1rem;
  margin: 0.4rem 0; }
dt { font-size: 0.82rem; font-weight: 600; color: var(--faint); overflow-wrap: anywhere; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.88rem; }
@media (max-width: 40rem) {
  tbody th div, .gallery tbody th div { max-width: 8.5rem; }
  .gallery img { max-width: 40vw; }
  thead th:first-child { white-space: normal; }
  th, td { padding: 0.35rem 0.5rem; }
}
@media print {
  body { max-width: none; font-size: 10pt; }
  nav, .controls, .questions details:not([open]), .questions details[hidden] { display: none; }
  .questions .list { max-height: none; border: 0; }
  thead button::after { content: none; }
  .scroll { overflow: visible; border: 0; }
  td, th { white-space: normal !important; overflow-wrap: anywhere; padding: 0.15rem 0.3rem; }
  td:not(.text), thead th { overflow-wrap: normal; }
  table { font-size: 7.5pt; }
  thead { display: table-header-group; }
  thead button { display: contents; }
  th:first-child { position: static; }
  h1, h2, h3, h4, summary { break-after: avoid; }
  tr, figure, .card { break-inside: avoid; }
  details { border: 0; padding: 0; }
}
"""
)

CSS = _RULES.strip()
"""The content of the page's only `style` element."""
