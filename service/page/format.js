// SPDX-License-Identifier: Apache-2.0
// Figures as people read them. Pure.

export const NONE = "–";
const GROUPED = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });

const missing = (value) => Number.isNaN(value ?? NaN);

export function count(value) {
  return missing(value) ? NONE : GROUPED.format(value);
}

/** Three figures at most before a unit: 0, 0.4, 3.2, 312, 3,120, 45.1 k. */
export function rate(value) {
  if (missing(value)) return NONE;
  if (value >= 9.95e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 9.95e3) return `${(value / 1e3).toFixed(value >= 9.95e4 ? 0 : 1)} k`;
  return value >= 9.95 || value === 0 ? GROUPED.format(value) : value.toFixed(1);
}

/** How long something took: 420 µs, 3.1 ms, 312 ms, 2.4 s, 42 s, then as an age. */
export function took(seconds) {
  if (missing(seconds)) return NONE;
  if (seconds === 0) return "0 s";
  if (seconds < 0.000995) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (seconds < 0.00995) return `${(seconds * 1e3).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${(seconds * 1e3).toFixed(0)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  return age(seconds);
}

/** Time gone by, in whole seconds at best: 3 s, 2 min 4 s, 5 h 3 min, 3 d 4 h. */
export function age(seconds) {
  if (missing(seconds)) return NONE;
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return pair(whole, 60, "min", 1, "s");
  if (whole < 86400) return pair(whole, 3600, "h", 60, "min");
  return pair(whole, 86400, "d", 3600, "h");
}

function pair(whole, big, bigName, small, smallName) {
  const rest = Math.floor((whole % big) / small);
  return `${Math.floor(whole / big)} ${bigName}${rest ? ` ${rest} ${smallName}` : ""}`;
}

export function bytes(value) {
  if (missing(value)) return NONE;
  const sign = value < 0 ? "-" : "";
  let size = Math.abs(value);
  if (size < 1024) return `${sign}${size} B`;
  for (const unit of ["KiB", "MiB", "GiB", "TiB"]) {
    size /= 1024;
    if (size < 999.5 || unit === "TiB") return `${sign}${size < 9.95 ? size.toFixed(1) : size.toFixed(0)} ${unit}`;
  }
  return NONE;
}

export function percent(share) {
  return missing(share) ? NONE : `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
}

export function plural(number, one, many) {
  return `${count(number)} ${number === 1 ? one : (many ?? `${one}s`)}`;
}

export const STAGES = {
  import: "import", preload: "weights", start: "start", wait: "wait", load: "load", to_device: "to device", warmup: "warm-up",
};

export const PARTS = {
  tokenize: "tokenise", queue: "queue", forward: "forward", encode: "encode", total: "whole request",
};

const TONES = { backoff: "failed", degraded: "failed", starting: "warming", spawned: "waiting", pinned: "waiting" };

/** The tone of a state; what the colour says is said by a word beside it as well. */
export const tone = (state) => TONES[state] ?? state;

/** The next round number: 1, 1.5, 2, 3, 5, 7 or 10 of a power of ten. */
export function ceiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7, 10].map((step) => step * unit).find((step) => step >= value * 0.999) ?? value;
}
