// SPDX-License-Identifier: Apache-2.0
// Where boot time went: a line for each boot, all drawn from their fork so that they compare.

import { bar, find, h, list, say, show } from "./dom.js";
import { ceiling, STAGES, took } from "./format.js";

const OUTCOMES = { booting: "so far", ready: "ready", gone: "gone", failed: "failed" };
const KINDS = ["import", "preload", "start", "wait", "load", "to_device", "warmup"];
const MOST_LINES = 24; // beyond this, earlier boots are shown when asked for
let redraw = () => {};

export function start(again) {
  redraw = again;
  find("earlier").addEventListener("change", redraw);
  find("boots").append(
    h("p", { class: "legend", "aria-hidden": "true" }),
    h("div", { class: "gantt" }, line({ id: "axis", axis: true }).node, h("ol", { class: "lines" })),
  );
}

export function update({ service, slots }) {
  const all = slots.flatMap((slot) => (slot.boots ?? []).map((boot, i, those) => lineOf(slot, boot, service, i === those.length - 1)));
  const many = all.length > MOST_LINES;
  show(find("history"), many);
  const shown = many && !find("earlier").checked ? all.filter((one) => one.last) : all;
  const lead = (service.import_seconds ?? 0) + (service.preload_seconds ?? 0);
  const longest = Math.max(...shown.map((one) => one.seconds), 0.1);
  const root = find("boots");
  const used = new Set(shown.flatMap((one) => one.parts.filter((part) => part.size >= 0.001).map((part) => part.kind)));
  if (service.import_seconds) used.add("import");
  if (service.preload_seconds > 0.01) used.add("preload");
  legend(root.querySelector(".legend"), KINDS.filter((kind) => used.has(kind)));
  const first = { id: "service", name: "service", when: "once, before the fork", seconds: lead, outcome: "", parts: [
    { kind: "import", from: 0, size: service.import_seconds ?? 0, title: `import ${took(service.import_seconds)}` },
    { kind: "preload", from: service.import_seconds ?? 0, size: service.preload_seconds ?? 0, title: `weights ${took(service.preload_seconds)}` },
  ] };
  const total = ceiling(Math.max(longest, lead));
  const lines = [first, ...shown].map((one) => ({ ...one, total }));
  list(root.querySelector(".lines"), lines, (one) => one.id, line);
  root.querySelector(".lines").tabIndex = lines.length > MOST_LINES ? 0 : -1; // it scrolls
  root.querySelectorAll(".axis b").forEach((tick, i) => say(tick, i ? took((total * i) / 2) : "fork"));
}

function lineOf(slot, boot, service, last) {
  const now = service.uptime_seconds;
  const end = boot.ready_at ?? boot.ended_at;
  const first = boot.stages?.[0]?.at ?? end ?? now;
  const start = { kind: "start", from: 0, size: first - boot.began, title: `start ${took(first - boot.began)}` };
  const parts = [start, ...(boot.stages ?? []).map((stage) => {
    const size = stage.seconds ?? Math.max(0, (end ?? now) - stage.at);
    return { kind: stage.stage, from: Math.max(0, stage.at - boot.began), size, title: `${STAGES[stage.stage] ?? stage.stage} ${took(size)}` };
  })];
  const reach = Math.max(...parts.map((part) => part.from + part.size), (end ?? now) - boot.began);
  return {
    id: `${slot.slot}/${boot.generation}`,
    name: `${slot.slot}`,
    generation: boot.generation,
    when: `began ${took(boot.began)} after the service`,
    seconds: reach,
    outcome: boot.outcome,
    parts,
    last,
  };
}

function line(made) {
  const name = h("span", { class: "name" });
  const what = h("span", { class: "what" });
  if (made.axis) {
    const scale = h("span", { class: "scale" }, ...[0, 1, 2].map(() => h("b")));
    return { node: h("div", { class: "lane axis", "aria-hidden": "true" }, name, scale, what) };
  }
  const track = bar("track");
  const node = h("li", { class: "lane" }, name, track.node, what);
  return {
    node,
    update(one) {
      node.dataset.outcome = one.outcome;
      say(name, one.generation === undefined ? one.name : `slot ${one.name} · ${one.generation}`);
      const words = one.outcome ? OUTCOMES[one.outcome] ?? one.outcome : one.when;
      const stages = one.parts.filter((part) => part.size > 0).map((part) => part.title).join(", ");
      track.update(one.parts, one.total, `${one.generation === undefined ? "the service" : `slot ${one.name}, boot ${one.generation}, ${one.when}`}: ${stages || "nothing yet"}; ${words}`);
      say(what, one.outcome === "ready" || !one.outcome ? took(one.seconds) : `${took(one.seconds)}, ${words}`);
    },
  };
}

function legend(node, kinds) {
  list(node, kinds, (kind) => kind, (kind) => ({ node: h("span", { class: `key ${kind}` }, STAGES[kind]) }));
}
