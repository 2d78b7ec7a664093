"""What a reader can do with report.html: sort tables, filter rows, compare settings. The page reads without it."""

from __future__ import annotations

import base64
import hashlib

SCRIPT = r"""
"use strict";
const UNITS = {s: 1, min: 60, h: 3600, MiB: 1, GiB: 1024};
function make(name, settings, ...children) {
  const element = Object.assign(document.createElement(name), settings);
  element.append(...children);
  return element;
}
function number(text) {
  const match = /^([-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?)\s*(min|MiB|GiB|[sh](?![a-z]))?/i.exec(text.trim());
  return match ? parseFloat(match[1].replace(/,/g, "")) * (UNITS[match[2]] || 1) : NaN;
}
function sortBy(table, header, place) {
  const up = header.getAttribute("aria-sort") === "descending" || (!header.hasAttribute("aria-sort")
    && header.classList.contains("text"));
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const lines = [...table.tBodies[0].rows].map((row) => [row.cells[place].textContent.trim(), row]);
  const numeric = lines.some(([text]) => !isNaN(number(text))) && !header.classList.contains("text");
  lines.sort(([a], [b]) => {
    if (!numeric) return (up ? 1 : -1) * a.localeCompare(b, undefined, {numeric: true});
    const x = number(a), y = number(b);
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
    return up ? x - y : y - x;
  });
  table.tBodies[0].append(...lines.map(([, row]) => row));
}
function sortable(table) {
  if (table.tBodies[0].rows.length < 2) return;
  [...table.tHead.rows[0].cells].forEach((header, place) => {
    const button = make("button", {type: "button", title: "sort"});
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sortBy(table, header, place));
  });
}
function choice(label, names, chosen) {
  const options = names.map((name, place) => make("option", {value: place, selected: place === chosen}, name));
  const select = make("select", {}, ...options);
  return [make("label", {}, label + " ", select), select];
}
function filterable(box) {
  const systems = JSON.parse(box.dataset.systems), rows = [...box.querySelectorAll("details")];
  const scores = rows.map((row) => row.dataset.scores.split(" ").map(Number));
  const [first, a] = choice("A", systems, 0), [second, b] = choice("B", systems, Math.min(1, systems.length - 1));
  const kinds = ["all rows", "only A is right", "only B is right", "both are right", "both missed", "all missed"];
  const [third, kind] = choice("Show", kinds, 0);
  const limit = make("input", {type: "number", min: 0, max: 1, step: 0.05, value: box.dataset.right});
  const words = make("input", {type: "search"}), said = make("output", {});
  const update = () => {
    let shown = 0;
    rows.forEach((row, place) => {
      const right = scores[place].map((score) => score >= Number(limit.value));
      const own = right[a.value], other = right[b.value];
      const fits = [true, own && !other, other && !own, own && other, !own && !other, !right.includes(true)];
      const text = words.value.trim().toLowerCase();
      row.hidden = !(fits[kind.value] && (!text || row.textContent.toLowerCase().includes(text)));
      shown += !row.hidden;
    });
    said.value = shown + " of " + rows.length + " rows";
  };
  const limited = make("label", {}, "right from " + box.dataset.measure + " ", limit);
  const searched = make("label", {}, "with the words ", words);
  const controls = make("div", {className: "controls"}, first, second, third, limited, searched, said);
  box.prepend(controls);
  controls.addEventListener("input", update);
  update();
}
function comparable(box) {
  const {trials, settings} = JSON.parse(box.dataset.settings);
  const [first, a] = choice("A", trials, 0), [second, b] = choice("B", trials, 1);
  const body = make("tbody", {}), said = make("output", {});
  const named = (kind, text) => make("th", {scope: kind, className: "text"}, text);
  const header = make("tr", {}, ...["Setting", "A", "B"].map((text) => named("col", text)));
  const table = make("table", {className: "fits"}, make("thead", {}, header), body);
  const update = () => {
    const differing = settings.filter(([, values]) => values[a.value] !== values[b.value]);
    const cells = (values) => [a, b].map((one) => make("td", {className: "text"}, values[one.value] ?? "-"));
    body.replaceChildren(...differing.map(([name, values]) => make("tr", {}, named("row", name), ...cells(values))));
    said.value = differing.length + " of " + settings.length + " settings differ";
  };
  const controls = make("div", {className: "controls"}, first, second, said);
  box.append(controls, make("div", {className: "scroll"}, table));
  controls.addEventListener("input", update);
  update();
}
document.querySelectorAll("table").forEach(sortable);
document.querySelectorAll(".questions").forEach(filterable);
document.querySelectorAll(".comparison").forEach(comparable);
function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.appendix:not([open])")];
  opened.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));
""".strip()
"""The content of the page's only `script` element."""

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(f'{chr(10)}{SCRIPT}{chr(10)}'.encode()).digest()).decode()}'"
)
"""The page's content security policy: this script alone runs, and nothing is loaded from anywhere."""
