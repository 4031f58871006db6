// SPDX-License-Identifier: Apache-2.0
// Memory against the budget: a bar for each room, and what one more worker would need of it.

import { bar, facts, find, h, list, say, set, show } from "./dom.js";
import { bytes, percent, plural } from "./format.js";

const NAMES = { private: "private", context: "driver context", weights: "weights", batch: "batch", slack: "slack", busy: "when busy" };

export function update({ budget }) {
  const rooms = budget?.rooms ?? [];
  const text = budget?.text ?? [];
  say(find("budget-words"), rooms.length ? verdict(budget) : text[0] ?? "not known yet");
  list(find("rooms"), rooms.map((room) => ({ ...room, binding: room.binding && rooms.length > 1 })), (room) => room.name, roomView);
  show(find("sum"), rooms.length > 0 && text.length > 0);
  list(find("sum").querySelector("div"), text.map((words, index) => ({ words, index })), (line) => line.index, () => {
    const node = h("p");
    return { node, update: (line) => say(node, line.words) };
  });
}

function verdict(budget) {
  const kills = budget.oom_kills ? ` · ${plural(budget.oom_kills, "kill")} for want of memory` : "";
  const binding = budget.binding ? `; ${budget.binding.replaceAll("_", " ")} allows no more` : "";
  return `room for ${plural(budget.fits, "worker")}${binding} · wanted ${budget.wanted}, policy ${budget.policy}${kills}`;
}

/** The pieces of a room in the order of its bar, each with where it begins. Bytes. */
function piecesOf(room) {
  const pieces = [];
  let at = 0;
  const put = (kind, size, title) => {
    if (size > 0) pieces.push({ kind, from: at, size, title: `${title} ${bytes(size)}` });
    at += Math.max(0, size);
  };
  put("others", room.others_bytes ?? 0, "others");
  put("shared", room.shared_bytes ?? 0, room.shared_name ?? "shared");
  for (const worker of room.workers ?? []) {
    const named = Object.entries(worker.parts ?? {});
    const rest = worker.bytes - named.reduce((sum, [, size]) => sum + size, 0);
    for (const [name, size] of named) put(`worker ${name}`, size, `slot ${worker.slot}, ${NAMES[name] ?? name}`);
    if (named.length === 0 || rest > 0) put("worker", named.length ? rest : worker.bytes, `slot ${worker.slot}`);
  }
  const used = at;
  if (room.next_worker) put(`next${room.next_worker.fits ? "" : " over"}`, room.next_worker.bytes, "one more worker");
  return { pieces, used };
}

function roomView() {
  const name = h("h3");
  const source = h("span", { class: "aside" });
  const picture = bar("room");
  const limit = h("span", { class: "limit", "aria-hidden": "true" });
  const figures = h("dl", { class: "keys" });
  const next = h("p", { class: "next" });
  const byWorker = h("dl", { class: "small" });
  const more = h("details", { class: "more" }, h("summary", null, "By worker"), byWorker);
  const node = h("article", { class: "room" }, h("div", { class: "title" }, name, source),
    h("div", { class: "stage" }, picture.node, limit), figures, next, more);
  return {
    node,
    update(room) {
      const { pieces, used } = piecesOf(room);
      const parts = byPart(room);
      const scale = Math.max(room.total_bytes, used, 1);
      const workers = (room.workers ?? []).reduce((sum, worker) => sum + worker.bytes, 0);
      say(name, room.kind === "host" ? "Host" : `Device ${room.name}`);
      say(source, `${bytes(room.total_bytes)}${room.source ? `, ${room.source.replace(/ of \/.*/, "")}` : ""}${room.binding ? " · this is what binds" : ""}`);
      set(source, "title", room.source);
      const beyond = Math.max(0, room.total_bytes - room.limit_bytes);
      picture.update([...pieces, { kind: "beyond", from: room.limit_bytes, size: beyond, title: `not to be used ${bytes(beyond)}` }], scale,
        `${bytes(room.limit_bytes)} may be used: ${pieces.map((piece) => piece.title).slice(0, 12).join(", ")}; head-room ${bytes(room.headroom_bytes)}`);
      limit.style.left = `${(100 * Math.min(1, room.limit_bytes / scale)).toFixed(2)}%`;
      set(limit, "data-words", `limit ${bytes(room.limit_bytes)}`);
      const many = room.workers?.length ?? 0;
      list(figures, [
        ["others", "others", room.others_bytes || null],
        ["shared", room.shared_name ?? "shared", room.shared_bytes || null],
        [parts.length ? "sum" : "worker", plural(many, "worker"), workers],
        ...parts,
        ["free", "head-room", room.headroom_bytes],
        ["beyond", `limit ${percent(room.utilization)}`, room.limit_bytes],
      ].filter((row) => (row[2] ?? null) !== null), (row) => row[0], (row) => {
        const [label, value] = [h("dt", { class: `key ${row[0]}` }), h("dd")];
        return { node: h("div", null, label, value), update: (one) => { say(label, one[1]); say(value, bytes(one[2])); } };
      });
      say(next, priced(room));
      set(next, "data-fits", room.next_worker ? String(Boolean(room.next_worker.fits)) : null);
      facts(byWorker, (room.workers ?? []).map((worker) => [`slot ${worker.slot}`, `${bytes(worker.bytes)}: ${Object.entries(worker.parts ?? {}).map(([part, size]) => `${NAMES[part] ?? part} ${bytes(size)}`).join(", ")}`]));
      show(more, many > 0);
    },
  };
}

/** What the workers take together of each part, where there is more than one. */
function byPart({ workers }) {
  const sums = {};
  for (const worker of workers ?? []) for (const [part, size] of Object.entries(worker.parts ?? {})) sums[part] = (sums[part] ?? 0) + size;
  const found = Object.entries(sums);
  return found.length > 1 ? found.map(([part, size]) => [part, NAMES[part] ?? part, size]) : [];
}

function priced({ next_worker: next, headroom_bytes: room, fits }) {
  if (!next) return "";
  const parts = Object.entries(next.parts ?? {}).filter(([, size]) => size > 0).map(([part, size]) => `${NAMES[part] ?? part} ${bytes(size)}`).join(" + ");
  const answer = next.fits ? "it fits" : `it does not fit: ${bytes(Math.max(0, next.bytes - room))} short`;
  const total = (fits ?? null) === null ? "" : `; ${plural(fits, "worker")} fit in all`;
  return `One more worker needs ${bytes(next.bytes)}${parts ? ` (${parts})` : ""}: ${answer}${total}.`;
}
