// SPDX-License-Identifier: Apache-2.0
// The fleet at a glance, and whether what is shown is true now.

import { facts, find, h, list, say, set, show } from "./dom.js";
import { age, count, plural, took, tone } from "./format.js";

const CONNECTION = {
  connecting: "connecting",
  live: "live",
  polling: "live, asking every 2 s",
  away: "not answering",
  paused: "paused while hidden",
};
const TONES = { ready: "#2f9e6b", warming: "#d9822b", failed: "#d64545", draining: "#2a93ad", waiting: "#7d8590" };
const ORDER = ["ready", "warming", "loading", "waiting", "pinned", "spawned", "draining", "backoff", "failed", "empty"];
let told = "";

export function update({ service, fleet, slots, budget }) {
  const colour = tone(fleet.status);
  say(find("status"), fleet.status);
  set(find("status"), "data-tone", colour);
  say(find("count"), `${fleet.ready_workers} of ${plural(fleet.target_workers, "worker")} ready`);
  say(find("words"), fleet.verdict ?? fleet.detail);
  set(find("words"), "title", fleet.detail);
  say(find("model"), modelName(service.model));
  set(find("model"), "title", service.model);
  const title = `${fleet.ready_workers}/${fleet.target_workers} ${fleet.status} · ${modelName(service.model)}`;
  if (document.title !== title) document.title = title;
  icon(TONES[colour] ?? TONES.waiting);
  strip(slots);
  facts(find("facts"), figures(service, fleet, budget));
  show(find("warning"), Boolean(service.warning));
  say(find("warning"), service.warning);
  say(find("versions"), Object.entries(service.versions ?? {}).map((pair) => pair.join(" ")).join(" · "));
  announce(`${fleet.status}: ${fleet.ready_workers} of ${fleet.target_workers} workers are ready`);
}

/** The model by the name that people call it: of a wheel its package, of a folder its last part. */
function modelName(model) {
  const name = String(model ?? "");
  if (name.startsWith("package:")) return name.slice(8).split("/")[0];
  return name.startsWith("/") ? name.split("/").filter(Boolean).at(-1) : name;
}

function figures(service, fleet, budget) {
  const planned = fleet.planned_workers && fleet.planned_workers !== fleet.target_workers ? ` of ${fleet.planned_workers} planned` : "";
  const room = budget?.fits ? ` · room for ${budget.fits}` : "";
  return [
    ["up", age(service.uptime_seconds)],
    ["needs", fleet.was_ready ? `${fleet.floor} ready (floor)` : `${fleet.wanted_workers} ready (quorum), later ${fleet.floor} (floor)`],
    ["workers", `${count(fleet.target_workers)}${planned}${room}`],
    ["backend", `${service.backend} on ${service.device}`],
    ["before the fork", before(service)],
    ["roll", service.roll_epoch ? `${service.roll_epoch}` : null],
    ["revision", service.revision],
    ["API", service.api],
    ["host", `${service.host}, pid ${service.arbiter_pid}`],
  ];
}

function before(service) {
  const loaded = service.preload_seconds > 0.01 ? `, weights ${took(service.preload_seconds)}` : "";
  return `imports ${took(service.import_seconds)}${loaded}`;
}

function strip(slots) {
  list(find("strip"), slots, (slot) => slot.slot, () => {
    const node = h("span", { class: "cell" });
    return { node, update: (slot) => set(node, "data-tone", tone(slot.state)) };
  });
  const counts = {};
  for (const slot of slots) counts[slot.state] = (counts[slot.state] ?? 0) + 1;
  const found = ORDER.filter((state) => counts[state]).map((state) => ({ state, number: counts[state] }));
  list(find("tally"), found, ({ state }) => state, ({ state }) => {
    const value = h("b");
    const node = h("span", { class: "state", "data-tone": tone(state) }, value, ` ${state}`);
    return { node, update: ({ number }) => say(value, count(number)) };
  });
}

let drawn = "";
function icon(colour) {
  if (colour === drawn) return;
  drawn = colour;
  const bars = "<rect x='1' y='9' width='4' height='6' rx='1'/><rect x='6' y='5' width='4' height='10' rx='1'/><rect x='11' y='1' width='4' height='14' rx='1'/>";
  const text = `<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='${colour}'>${bars}</svg>`;
  find("icon").href = `data:image/svg+xml,${encodeURIComponent(text)}`;
}

/** For those who listen: when something has changed, not with every figure. */
function announce(text) {
  if (text === told) return;
  told = text;
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => say(find("announcer"), told), 1000);
}

export function connection(state, silence) {
  set(document.body, "data-connection", state);
  say(find("connection"), CONNECTION[state]);
  const gone = state === "away";
  show(find("away"), gone);
  if (gone) {
    say(find("away"), `The service has not answered for ${age(silence)}; trying again. What you see below is from before.`);
    announce("The service does not answer; trying again.");
  }
}
