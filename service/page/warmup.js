// SPDX-License-Identifier: Apache-2.0
// The warm-up of one slot: for each shape the time of every pass, until it settles.

import { find, h, list, say, set, show, svg } from "./dom.js";
import { plural, took } from "./format.js";

const MOST_PASSES = 20;

export function start(redraw) {
  find("warm-slot").addEventListener("change", redraw);
  find("warmup").append(h("p", { class: "empty" }), h("ol", { class: "shapes" }));
}

export function update({ slots }) {
  const warmed = slots.filter((slot) => slot.warmup?.length);
  const select = find("warm-slot");
  list(select, warmed, (slot) => slot.slot, (slot) => ({ node: h("option", { value: slot.slot }, String(slot.slot)) }));
  show(find("whose"), warmed.length > 1);
  const slot = warmed.find((one) => String(one.slot) === select.value) ?? warmed[0];
  const empty = find("warmup").querySelector(".empty");
  show(empty, !slot);
  say(empty, "No worker has warmed up yet: the time of each pass will be shown here, by shape of batch, until it settles.");
  const longest = Math.max(...(slot?.warmup ?? []).flatMap((shape) => shape.passes ?? []), 0.000001);
  const shapes = (slot?.warmup ?? []).map((shape) => ({ ...shape, longest }));
  list(find("warmup").querySelector(".shapes"), shapes, (shape) => `${shape.texts}x${shape.tokens}`, shapeLine);
}

function shapeLine() {
  const name = h("span", { class: "name" });
  const curve = svg("svg", { class: "passes", role: "img", viewBox: "0 0 100 32", preserveAspectRatio: "none" });
  const figures = h("span", { class: "what" });
  const node = h("li", { class: "shape" }, name, curve, figures);
  return {
    node,
    update(shape) {
      const passes = (shape.passes ?? []).slice(0, MOST_PASSES);
      const worst = Math.max(...passes, 1e-9);
      const step = 100 / Math.max(8, passes.length);
      list(curve, passes.map((seconds, index) => ({ seconds, index, worst, step })), (pass) => pass.index, column);
      say(name, `${shape.texts} × ${shape.tokens}`);
      set(name, "title", `${plural(shape.texts, "text")} of ${plural(shape.tokens, "token")}`);
      const settled = shape.converged ? "settled" : shape.steady_s ? plural(passes.length, "pass", "passes") : "so far";
      const last = passes.length > 1 ? ` → ${took(shape.steady_s || passes.at(-1))}` : "";
      say(figures, `${took(shape.first_s)}${last}, ${settled}`);
      set(curve, "aria-label", `${plural(shape.texts, "text")} of ${plural(shape.tokens, "token")}: passes took ${passes.map(took).join(", ")}; ${settled}`);
    },
  };
}

function column() {
  const title = svg("title");
  const rect = svg("rect", { rx: 0.6 }, title);
  return {
    node: rect,
    update({ seconds, index, worst, step }) {
      const height = Math.max(1, (32 * seconds) / worst);
      set(rect, "class", index === 0 ? "first" : "pass");
      set(rect, "x", (index * step).toFixed(2));
      set(rect, "width", (step * 0.72).toFixed(2));
      set(rect, "y", (32 - height).toFixed(2));
      set(rect, "height", height.toFixed(2));
      say(title, `pass ${index + 1}: ${took(seconds)}`);
    },
  };
}
