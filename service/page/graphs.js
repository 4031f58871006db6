// SPDX-License-Identifier: Apache-2.0
// Five minutes of traffic: small graphs on one time axis, the newest at the right edge.

import { find, h, list, say, set, show, svg } from "./dom.js";
import { age, ceiling, count, PARTS, percent, rate, took } from "./format.js";
import { SPAN_S } from "./model.js";

const HEIGHT = 56;

const GRAPHS = [
  { title: "Texts a second", lines: [["", "main area", (p) => p.texts]], format: rate, least: 1 },
  { title: "Whole request", lines: [["p50", "main", (p) => p.stages.total?.p50], ["p99", "high", (p) => p.stages.total?.p99]], format: took, least: 0.001 },
  { title: "Texts a batch", lines: [["", "main", (p) => p.batch]], format: rate, least: 1 },
  { title: "Padding computed", lines: [["", "main area", (p) => p.padding]], format: percent, least: 0.01 },
  { title: "Queue", lines: [["texts", "main area", (p) => p.queue], ["in the kernel", "high", (p) => p.kernel]], format: count, least: 1 },
  { title: "Turned away a second", lines: [["429", "warn", (p) => p.refused], ["5xx", "bad", (p) => p.failed]], format: rate, least: 1 },
];

let views = null;
let shown = null; // what was drawn last: {points, now, span}
let pointed = null; // seconds ago that the pointer is at

export function update(document, { points }) {
  const now = document.time;
  shown = { points, now, span: Math.min(SPAN_S, Math.max(60, now - (points[0]?.time ?? now))) };
  views ??= GRAPHS.map((spec) => {
    const view = graph(spec);
    find("graphs").append(view.node);
    return view;
  });
  for (const view of views) view.update(shown);
  stages(document);
}

/** Pointing at any graph reads all of them at that time. */
export function start() {
  const read = (seconds) => {
    pointed = seconds;
    for (const view of shown ? views : []) view.update(shown);
  };
  find("graphs").addEventListener("pointermove", (event) => {
    const box = event.target.closest(".area")?.getBoundingClientRect();
    read(box && shown ? shown.span * (1 - (event.clientX - box.left) / box.width) : null);
  });
  find("graphs").addEventListener("pointerleave", () => read(null));
}

function graph({ title, lines, format, least }) {
  const drawing = plot(lines, least);
  const top = h("span", { class: "top", "aria-hidden": "true" });
  const from = h("span", { class: "from", "aria-hidden": "true" });
  const cursor = h("span", { class: "cursor", hidden: "" });
  const values = lines.map(([name, kind]) => {
    const value = h("b");
    return { value, node: h("span", { class: `value ${kind}` }, value, name ? h("span", null, ` ${name}`) : "") };
  });
  const node = h("figure", { class: "graph" },
    h("figcaption", null, h("span", { class: "name" }, title), h("span", { class: "values" }, ...values.map((one) => one.node))),
    h("div", { class: "plot" }, top, h("div", { class: "area" }, drawing.node, cursor), from));
  return {
    node,
    update(drawn) {
      const { most, last, at } = drawing.update(drawn);
      show(cursor, pointed !== null);
      cursor.style.left = `${100 * (1 - (pointed ?? 0) / drawn.span)}%`;
      say(from, pointed === null ? `${age(drawn.span)} ago` : `${age(pointed)} ago`);
      values.forEach(({ value }, i) => {
        const number = (pointed === null ? last : at)[i];
        say(value, format(number));
        value.className = number ? "" : "nil";
      });
      say(top, format(most));
      set(drawing.node, "aria-label", `${title}, the last ${age(drawn.span)}: ${lines.map(([name], i) => `${name} ${format(last[i])} now`.trim()).join(", ")}; the scale ends at ${format(most)}`);
    },
  };
}

/** Lines over the last five minutes; a line breaks where nothing is known. */
function plot(lines, least, height = HEIGHT) {
  const paths = lines.map(([, kind]) => svg("path", { class: kind.split(" ")[0] }));
  const areas = lines.map(([, kind]) => (kind.includes("area") ? svg("path", { class: "under" }) : null));
  const grid = svg("path", { class: "grid" });
  const node = svg("svg", { role: "img", viewBox: `0 0 ${SPAN_S} ${height}`, preserveAspectRatio: "none" }, grid, ...areas.filter(Boolean), ...paths);
  return {
    node,
    update({ points, now, span }) {
      const minutes = [1, 2, 3, 4].filter((minute) => 60 * minute < span);
      const uprights = minutes.map((minute) => `M${(SPAN_S * (1 - (60 * minute) / span)).toFixed(1)} 0V${height}`);
      set(grid, "d", `M0 ${height - 0.5}H${SPAN_S}M0 0.5H${SPAN_S}${uprights.join("")}`);
      const columns = lines.map(([, , read]) => points.map((point) => (point.gap ? null : read(point) ?? null)));
      const most = ceiling(Math.max(least, ...columns.flat().filter((value) => value !== null)));
      columns.forEach((values, i) => {
        const runs = !values.some(Boolean) ? [] : runsOf(points, values, { now, span, most, height });
        set(paths[i], "d", runs.map((run) => `M${run.join("L")}`).join("") || null);
        if (areas[i]) set(areas[i], "d", runs.map((run) => `M${run[0].split(" ")[0]} ${height}L${run.join("L")}L${run.at(-1).split(" ")[0]} ${height}Z`).join("") || null);
      });
      const near = pointed === null ? -1 : points.findLastIndex((point) => point.time <= now - pointed + 0.5);
      return { most, last: columns.map((values) => values.at(-1) ?? null), at: columns.map((values) => values[near] ?? null) };
    },
  };
}

function runsOf(points, values, { now, span, most, height }) {
  const runs = [];
  let run = [];
  values.forEach((value, i) => {
    if (value === null) {
      if (run.length) runs.push(run);
      run = [];
      return;
    }
    const x = SPAN_S * (1 - (now - points[i].time) / span);
    run.push(`${x.toFixed(1)} ${(height - 1 - (height - 2) * (value / most)).toFixed(1)}`);
  });
  if (run.length) runs.push(run);
  return runs.map((one) => (one.length === 1 ? [one[0], one[0]] : one));
}

function stages(document) {
  const root = find("stages");
  if (!root.firstChild) {
    const heads = ["stage", "", "p50", "p99"].map((name) => h("th", { scope: "col" }, name));
    root.append(h("table", { "aria-labelledby": "stages-title" }, h("thead", null, h("tr", null, ...heads)), h("tbody")));
  }
  say(root.querySelector("th:nth-child(2)"), `last ${age(shown.span)}`);
  const named = Object.keys(PARTS).filter((stage) => document.totals?.stages?.counts?.[stage]);
  list(root.querySelector("tbody"), named, (stage) => stage, (stage) => {
    const drawing = plot([["p50", "main", (p) => p.stages[stage]?.p50], ["p99", "high", (p) => p.stages[stage]?.p99]], 0.0005, 22);
    const [p50, p99] = [h("td", { class: "num" }), h("td", { class: "num" })];
    const node = h("tr", null, h("th", { scope: "row" }, PARTS[stage]), h("td", { class: "spark" }, drawing.node), p50, p99);
    return {
      node,
      update() {
        const { last } = drawing.update(shown);
        say(p50, took(last[0]));
        say(p99, took(last[1]));
        set(drawing.node, "aria-label", `${PARTS[stage]}: p50 ${took(last[0])}, p99 ${took(last[1])} now`);
      },
    };
  });
}
