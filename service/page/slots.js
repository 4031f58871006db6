// SPDX-License-Identifier: Apache-2.0
// The workers: a card for each slot while they are few, a row for each when they are many.

import { bar, facts, find, h, list, say, set, show } from "./dom.js";
import { age, bytes, count, plural, rate, STAGES, took, tone } from "./format.js";

const MOST_CARDS = 12;
const SILENT_S = 3; // as /ready has it
const GOING = ["loading", "warming"];
let mode = "";

export function start(redraw) {
  find("odd").addEventListener("change", redraw);
}

export function update({ slots }, history) {
  const rows = slots.length > MOST_CARDS;
  const root = find("slots");
  if (mode !== (rows ? "rows" : "cards")) {
    mode = rows ? "rows" : "cards";
    root.replaceChildren(...(rows ? [h("div", { class: "tops", "aria-hidden": "true" }, heads(), heads()), h("ol", { class: "rows" })] : [h("ol", { class: "cards" })]));
  }
  show(find("filter"), rows);
  const shown = rows && find("odd").checked ? slots.filter((slot) => slot.state !== "ready") : slots;
  const most = Math.max(...slots.map((slot) => sizeOf(memoryParts(slot))), 1);
  const speeds = history.latest?.slots ?? {};
  const told = shown.map((slot) => ({ slot, most, speed: speeds[slot.slot] ?? (history.latest ? 0 : null) }));
  root.lastChild.style.setProperty("--half", Math.ceil(shown.length / 2));
  list(root.lastChild, told, (item) => item.slot.slot, rows ? row : card);
}

function heads() {
  const names = ["", "state", "since", "", "in work", "texts/s", "memory"];
  return h("div", { class: "row heads" }, ...names.map((name) => h("span", null, name)));
}

function card(item) {
  const number = item.slot.slot;
  const top = stateOf();
  const doing = doings();
  const [load, speed, memory] = [h("dd"), h("dd"), h("dd")];
  const more = detail();
  const parts = bar("thin");
  const node = h("li", { class: "card", id: `slot-${number}`, "aria-labelledby": `slot-${number}-name` },
    h("div", { class: "head" }, h("h3", { id: `slot-${number}-name` }, h("span", { class: "vh" }, "slot "), String(number)), top.node, top.since),
    doing.node,
    h("dl", { class: "figures" },
      h("div", null, h("dt", null, "in work"), load),
      h("div", null, h("dt", null, "texts/s"), speed),
      h("div", null, h("dt", null, "memory"), memory)),
    parts.node, more.node);
  return {
    node,
    update({ slot, most, speed: texts }) {
      set(node, "data-tone", tone(slot.state));
      top.update(slot);
      doing.update(slot);
      say(load, count(slot.requests_in_flight ?? slot.load));
      say(speed, rate(texts));
      const found = memoryParts(slot);
      say(memory, bytes(sizeOf(found)));
      parts.update(lined(found), most, found.map((part) => part.title).join(", ") || "memory is not known yet");
      more.update(slot);
    },
  };
}

function row(item) {
  const number = item.slot.slot;
  const top = stateOf();
  const doing = doings();
  const [load, speed, memory] = ["in work ", "texts a second ", "memory "].map((name) => {
    const value = h("span");
    return { node: h("span", { class: "num" }, h("span", { class: "vh" }, name), value), value };
  });
  const more = detail(h("span", { class: "row" }, h("span", { class: "num slot" }, h("span", { class: "vh" }, "slot "), String(number)),
    top.node, top.since, doing.node, load.node, speed.node, memory.node));
  const node = h("li", { id: `slot-${number}` }, more.node);
  return {
    node,
    update({ slot, speed: texts }) {
      set(node, "data-tone", tone(slot.state));
      top.update(slot);
      doing.update(slot, slot.state === "ready" && !silent(slot) ? `boot took ${took(bootSeconds(slot))}` : at(slot));
      say(load.value, count(slot.requests_in_flight ?? slot.load));
      say(speed.value, rate(texts));
      say(memory.value, bytes(sizeOf(memoryParts(slot))));
      more.update(slot);
    },
  };
}

function stateOf() {
  const node = h("span", { class: "state" });
  const since = h("span", { class: "since" });
  return {
    node,
    since,
    update(slot) {
      say(node, slot.state);
      set(node, "data-tone", tone(slot.state));
      say(since, slot.state === "empty" ? "" : age(slot.seconds_in_state));
    },
  };
}

/** What a worker is at: a bar while it boots, one line of its boot afterwards. */
function doings() {
  const text = h("span", { class: "text" });
  const why = h("span", { class: "why" });
  const progress = h("progress", { max: 1 });
  const node = h("div", { class: "doing" }, progress, text, why);
  return {
    node,
    update(slot, words = at(slot)) {
      const going = GOING.includes(slot.state);
      show(progress, going);
      const share = going ? advance(slot) : null;
      if (share === null) progress.removeAttribute("value");
      else progress.value = share;
      set(progress, "aria-label", `slot ${slot.slot} is ${slot.state}`);
      say(text, words);
      const failing = !["ready", "draining"].includes(slot.state) && slot.failures > 0 && slot.last_error;
      show(why, Boolean(failing));
      if (failing) say(why, `${slot.last_error.state}: ${slot.last_error.text}`.slice(0, 200));
    },
  };
}

/** The share of the stage that is done: as told, else by the time it took last. */
function advance(slot) {
  const left = slot.eta_seconds ?? null;
  const timed = left === null ? null : slot.seconds_in_state / Math.max(0.001, slot.seconds_in_state + left);
  const told = slot.state === "warming" ? slot.progress : null;
  return told || timed;
}

function at(slot) {
  const left = (slot.eta_seconds ?? null) === null ? "" : `, ${took(slot.eta_seconds)} left`;
  switch (slot.state) {
    case "warming": return `warming ${slot.doing ?? "up"}${left}`;
    case "loading": return `${slot.doing ? `loading ${slot.doing}` : "loading the model"}${left}`;
    case "waiting": return "waits for a permit to load";
    case "backoff": return `tries again in ${took(Math.max(0, slot.retry_in_seconds ?? 0))}`;
    case "failed": return "could not become ready";
    case "draining": return `finishing ${plural(slot.requests_in_flight ?? 0, "request")}`;
    case "ready": return silent(slot) ? `not heard of for ${age(slot.heartbeat_age_seconds)}` : booted(slot);
    case "empty": return "no process";
    default: return "starting";
  }
}

const silent = (slot) => slot.heartbeat_age_seconds > SILENT_S;
const bootStages = (slot) => Object.entries(slot.stage_seconds ?? {}).filter(([name, seconds]) => name !== "import" && seconds >= 0.0005);
const bootSeconds = (slot) => bootStages(slot).reduce((sum, [, seconds]) => sum + seconds, 0);

const whole = (words) => words.replaceAll(" ", "\u00a0").replaceAll("-", "\u2011"); // breaks nowhere

function booted(slot) {
  return bootStages(slot).filter(([, seconds]) => seconds > 0.03 * bootSeconds(slot)).map(([name, seconds]) => whole(`${STAGES[name] ?? name} ${took(seconds)}`)).join("\u00a0· ");
}

/** Memory of a worker by part: on a device what it holds there, else its own and its share of what is shared. */
function memoryParts({ memory_bytes: memory }) {
  if (!memory) return [];
  const device = [
    ["driver context", "context", memory.device_context],
    ["tensors", "weights", memory.device_allocated],
    ["kept by the allocator", "batch", (memory.device_reserved ?? 0) - (memory.device_allocated ?? 0)],
  ];
  const host = [
    ["private", "private", memory.uss],
    ["its share of shared pages", "shared", (memory.pss ?? memory.uss) - memory.uss],
  ];
  const found = memory.device_context || memory.device_allocated ? device : host;
  return found.filter(([, , size]) => size > 0).map(([name, kind, size]) => ({ kind, size, title: `${name} ${bytes(size)}` }));
}

const sizeOf = (parts) => (parts.length ? parts.reduce((sum, part) => sum + part.size, 0) : null);

function lined(parts) {
  let from = 0;
  return parts.map((part) => ({ ...part, from: (from += part.size) - part.size }));
}

function detail(line) {
  const summary = h("summary");
  const text = h("span", { class: "hint" });
  summary.append(line ?? text);
  const list1 = h("dl", { class: "small" });
  const error = h("pre", { class: "error", tabindex: "0", "aria-label": "last error" });
  const node = h("details", { class: line ? "line" : "more" }, summary, h("div", { class: "inside" }, list1, error));
  return {
    node,
    update(slot) {
      const bad = Boolean(slot.failures || slot.last_error);
      set(text, "class", bad && tone(slot.state) === "failed" ? "hint bad" : "hint");
      say(text, hint(slot));
      facts(list1, rows(slot));
      show(error, Boolean(slot.last_error));
      if (slot.last_error) say(error, `while ${slot.last_error.state}: ${slot.last_error.text}`);
    },
  };
}

function hint(slot) {
  const where = `${slot.device ?? "–"} · boot ${slot.generation}`;
  if (slot.failures) return `${where} · ${plural(slot.failures, "failure")}`;
  const earlier = Object.values(slot.failures_by_reason ?? {}).reduce((sum, times) => sum + times, 0);
  return earlier ? `${where} · ${plural(earlier, "earlier failure")}` : where;
}

function rows(slot) {
  const memory = slot.memory_bytes ?? {};
  const reasons = Object.entries(slot.failures_by_reason ?? {}).filter(([, times]) => times);
  return [
    ["process", slot.pid],
    ["heartbeat", slot.heartbeat_age_seconds === null ? "" : `${took(Math.max(0, slot.heartbeat_age_seconds))} ago`],
    ["boot", booted(slot)],
    ["queued", `${plural(slot.queued_texts ?? 0, "text")}, ${plural(slot.queued_tokens ?? 0, "token")}`],
    ["batch limit", slot.max_batch_tokens ? `${plural(slot.max_batch_tokens, "token")}${slot.declared_batch_tokens > slot.max_batch_tokens ? `, declared ${count(slot.declared_batch_tokens)}` : ""}` : null],
    ["host", memory.rss ? `private ${bytes(memory.uss)}, share ${bytes(memory.pss)}, resident ${bytes(memory.rss)}` : null],
    ["on device", memory.device_allocated ? `context ${bytes(memory.device_context)}, tensors ${bytes(memory.device_allocated)}, reserved ${bytes(memory.device_reserved)}, peak ${bytes(memory.device_peak)}` : null],
    ["failures", reasons.length ? reasons.map(([reason, times]) => `${reason.replaceAll("_", " ")} ${times}`).join(", ") : null],
  ];
}
