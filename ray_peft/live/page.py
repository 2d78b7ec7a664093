"""The live page: one HTML text that asks the server for the sweep's state every two seconds and draws it."""

from __future__ import annotations

import base64
import hashlib

from ray_peft.report.palette import FAINT, GRID, INK, PAPER, SERIES, VARIABLES, css_variables

_STYLE = (
    f"""
:root {{ color-scheme: light dark; {css_variables(dark=False)}
  --ink: var({VARIABLES[INK]}); --faint: var({VARIABLES[FAINT]}); --line: var({VARIABLES[GRID]});
  --paper: var({VARIABLES[PAPER]}); --panel: #f4f5f7; }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} --panel: #212329; }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0.8rem 1rem 3rem; max-width: 80rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.02rem; margin: 1.3rem 0 0.4rem; }
p { margin: 0.2rem 0; color: var(--faint); }
#plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 1.5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 12px; }
svg .axis { stroke: var(--line); }
svg .gap { fill: var(--panel); stroke: var(--faint); stroke-width: 0.6; stroke-dasharray: 3 3; }
svg .predicted { fill: none; stroke: var(--ink); stroke-width: 1.5; }
svg .name { fill: var(--ink); }
#legend span { display: inline-block; margin-right: 1rem; }
#legend i { display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 2px; margin-right: 0.35rem;
  vertical-align: -0.08rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { background: var(--panel); font-weight: 600; }
.text { text-align: left; }
"""
)

_BODY = """
<h1 id="name"></h1>
<p id="counts" role="status"></p>
<p id="legend"></p>
<div id="plots">
<section><h2>Training loss (points: held-out loss)</h2><svg id="losses" role="img" aria-label="Losses"></svg></section>
<section><h2>Memory: used, and predicted as a frame [GiB]</h2>
<svg id="memory" role="img" aria-label="Memory of trials"></svg></section>
</div>
<h2>Where trials ran; dashed: nothing ran there</h2>
<svg id="timeline" role="img" aria-label="Timeline of GPUs"></svg>
<h2>Trials</h2>
<div class="scroll"><table><thead><tr><th class="text">trial</th><th class="text">method</th><th class="text">state</th>
<th>step</th><th>loss</th><th>tokens/s</th><th>memory GiB</th><th>predicted GiB</th><th>left</th></tr></thead>
<tbody id="trials"></tbody></table></div>
"""

_SCRIPT = (
    r"""
"use strict";
const COLOURS = %s, MOST_BARS = 16, ENDED = ["finished", "stopped_early", "failed", "out_of_memory", "cancelled"];
const colours = new Map();
const colour = (method) => {
  if (!colours.has(method)) colours.set(method, `var(${COLOURS[colours.size %% COLOURS.length]})`);
  return colours.get(method);
};
const byId = (id) => document.getElementById(id);
function shape(kind, settings, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
function titled(element, text) { element.append(shape("title", {}, text)); return element; }
const digits = (value, places) => typeof value === "number" ? value.toFixed(places) : value ?? "";
function duration(s) {
  if (s == null) return "";
  if (s < 90) return `${s.toFixed(0)} s`;
  return s < 5400 ? `${(s / 60).toFixed(0)} min` : `${Math.floor(s / 3600)} h ${Math.round(s %% 3600 / 60)} min`;
}
function ticks(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) values.push(value);
  return values.map((value) => [value, String(+value.toPrecision(6))]);
}
function losses(trials) {
  const svg = byId("losses"), width = 620, height = 300, left = 48, bottom = 34;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const points = trials.flatMap((trial) => [...trial.train_loss, ...trial.eval_loss]);
  if (!points.length) return svg.replaceChildren(shape("text", {x: 8, y: 24}, "no loss was logged yet"));
  const most = Math.max(...points.map(([step]) => step), 1), values = points.map(([, loss]) => loss);
  let low = Math.min(...values), high = Math.max(...values);
  if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
  const x = (step) => left + (width - left - 8) * step / most;
  const y = (loss) => 8 + (height - bottom - 8) * (high - loss) / (high - low);
  const drawn = [];
  for (const [value, text] of ticks(low, high, 5)) {
    drawn.push(shape("line", {class: "axis", x1: left, x2: width - 8, y1: y(value), y2: y(value)}));
    drawn.push(shape("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, text));
  }
  for (const [value, text] of ticks(0, most, 6)) {
    if (value === Math.round(value)) {
      drawn.push(shape("text", {x: x(value), y: height - 14, "text-anchor": "middle"}, text));
    }
  }
  drawn.push(shape("text", {x: width - 8, y: height, "text-anchor": "end"}, "optimizer step"));
  for (const trial of trials) {
    const line = trial.train_loss.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
    const style = {stroke: colour(trial.method), fill: "none", "stroke-width": ENDED.includes(trial.state) ? 1 : 2};
    if (line) drawn.push(titled(shape("polyline", {points: line, ...style}), `${trial.trial_id} ${trial.method}`));
    for (const [step, loss] of trial.eval_loss) {
      const text = `${trial.trial_id} ${trial.method}: held-out loss ${loss.toFixed(4)} at step ${step}`;
      drawn.push(titled(shape("circle", {cx: x(step), cy: y(loss), r: 3.5, fill: colour(trial.method)}), text));
    }
  }
  svg.replaceChildren(...drawn);
}
function memory(trials) {
  const svg = byId("memory"), width = 620, left = 190, row = 24;
  const shown = trials.filter((trial) => trial.memory_gib != null).slice(0, MOST_BARS);
  svg.setAttribute("viewBox", `0 0 ${width} ${Math.max(1, shown.length) * row + 24}`);
  if (!shown.length) return svg.replaceChildren(shape("text", {x: 8, y: 24}, "no trial has told its memory yet"));
  const most = Math.max(...shown.flatMap((trial) => [trial.memory_gib, trial.predicted_gib ?? 0]));
  const x = (gib) => (width - left - 84) * gib / most;
  const drawn = shown.flatMap((trial, place) => {
    const y = place * row, bar = {x: left, y: y + 4, height: row - 8};
    const label = `${trial.trial_id.slice(0, 22)} ${ENDED.includes(trial.state) ? "" : "(runs)"}`;
    const parts = [
      shape("text", {class: "name", x: left - 6, y: y + 16, "text-anchor": "end"}, label),
      titled(shape("rect", {...bar, width: x(trial.memory_gib), fill: colour(trial.method)}), trial.method),
    ];
    if (trial.predicted_gib != null) {
      parts.push(shape("rect", {...bar, class: "predicted", width: x(trial.predicted_gib)}));
    }
    const end = left + x(Math.max(trial.memory_gib, trial.predicted_gib ?? 0)) + 6;
    const more = trial.predicted_gib != null ? ` of ${digits(trial.predicted_gib, 2)}` : "";
    return [...parts, shape("text", {x: end, y: y + 16}, digits(trial.memory_gib, 2) + more)];
  });
  svg.replaceChildren(...drawn);
}
function timeline(lanes, end) {
  const svg = byId("timeline"), width = 1240, left = 230, row = 28;
  svg.setAttribute("viewBox", `0 0 ${width} ${Math.max(1, lanes.length) * row + 26}`);
  if (!lanes.length) return svg.replaceChildren(shape("text", {x: 8, y: 20}, "no trial has begun yet"));
  const x = (s) => left + (width - left - 8) * s / (end || 1), drawn = [];
  lanes.forEach((lane, place) => {
    const y = place * row, bar = {y: y + 3, height: row - 6};
    const busy = lane.spans.reduce((sum, span) => sum + span.end_s - span.start_s, 0);
    const name = `${lane.name.slice(-24)}: ${Math.round(100 * busy / (end || 1))} %%`;
    drawn.push(titled(shape("text", {class: "name", x: left - 8, y: y + 18, "text-anchor": "end"}, name), lane.name));
    for (const [from, to] of lane.gaps) {
      const gap = shape("rect", {...bar, class: "gap", x: x(from), width: Math.max(0.5, x(to) - x(from))});
      drawn.push(titled(gap, `idle for ${duration(to - from)}`));
    }
    for (const span of lane.spans) {
      const settings = {...bar, x: x(span.start_s), width: Math.max(1, x(span.end_s) - x(span.start_s) - 0.7)};
      const text = `${span.trial} ${span.method}: ${span.state}, ${duration(span.end_s - span.start_s)}`;
      const faded = ENDED.includes(span.state) && span.state !== "finished" ? 0.4 : 1;
      drawn.push(titled(shape("rect", {...settings, fill: colour(span.method), opacity: faded}), text));
    }
  });
  for (const [value, text] of ticks(0, end, 8)) {
    drawn.push(shape("text", {x: x(value), y: lanes.length * row + 18, "text-anchor": "middle"}, text));
  }
  drawn.push(shape("text", {x: left - 8, y: lanes.length * row + 18, "text-anchor": "end"}, "seconds"));
  svg.replaceChildren(...drawn);
}
function table(trials) {
  byId("trials").replaceChildren(...trials.map((trial) => {
    const row = document.createElement("tr");
    const step = trial.steps ? `${trial.step ?? 0}/${trial.steps}` : String(trial.step || "");
    [trial.trial_id, trial.method, trial.state, step, digits(trial.loss, 4), digits(trial.tokens_per_s, 0),
      digits(trial.memory_gib, 2), digits(trial.predicted_gib, 2), duration(trial.left_s)].forEach((text, place) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      if (place < 3) cell.className = "text";
      row.append(cell);
    });
    return row;
  }));
}
function draw(state) {
  const rank = (trial) => ENDED.includes(trial.state) ? 1 : trial.state === "waiting" ? 2 : 0;
  const trials = [...state.trials].sort((a, b) => rank(a) - rank(b) || (b.ended ?? 0) - (a.ended ?? 0));
  const count = (test) => state.trials.filter(test).length;
  const driver = {running: "the sweep runs", paused: "the sweep is paused", ended: "the sweep has ended",
    silent: "nothing was heard of the sweep for long"}[state.driver] ?? state.driver;
  document.title = byId("name").textContent = state.name;
  byId("counts").textContent = `${driver}: ${state.trials.length} trials, ${count((t) => rank(t) === 0)} running, `
    + `${count((t) => t.state === "finished")} finished, `
    + `${count((t) => rank(t) === 1 && t.state !== "finished")} ended otherwise, `
    + `${count((t) => rank(t) === 2)} waiting`;
  losses(state.trials); memory(trials); timeline(state.lanes, state.end_s); table(trials);
  byId("legend").replaceChildren(...[...colours].filter(([method]) => method).map(([method, value]) => {
    const entry = document.createElement("span"), box = document.createElement("i");
    box.style.background = value;
    entry.append(box, method);
    return entry;
  }));
  return state.driver === "running" || state.driver === "paused" || state.driver === "unknown";
}
async function look() {
  let again = true;
  try {
    const answer = await fetch("state.json", {cache: "no-store"});
    if (answer.ok) again = draw(await answer.json());
  } catch (error) {
    byId("counts").textContent = "the page's server has ended: ray-peft ui --live starts it again";
  }
  setTimeout(look, again ? 2000 : 10000);
}
look();
"""
    % [VARIABLES[series] for series in SERIES]
).strip()

_HASH = base64.b64encode(hashlib.sha256(f"\n{_SCRIPT}\n".encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'sha256-{_HASH}'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)
"""Of the page: its own script alone runs, and it asks nobody but its server."""

PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ray_peft</title>
<style>{_STYLE}</style>
</head>
<body>{_BODY}<script>
{_SCRIPT}
</script>
</body>
</html>
"""
