// SPDX-License-Identifier: Apache-2.0
// What two documents say of the time between them: rates, percentiles, and five minutes of them. Pure.

export const SPAN_S = 300;
const RATES_S = 5; // rates are over this long, so that a figure can be read
const QUANTILES_S = 10; // percentiles over this long, so that there is something to count
const GAP_S = 15; // more than this between documents: nothing is known of what lay between
const STEP_S = 0.9; // points are no closer than this, however often documents come

/** The value below which a share of a histogram lies. `counts` has one more entry than `le`: what is above all. */
export function quantile(le, counts, share) {
  const all = counts.reduce((sum, value) => sum + value, 0);
  if (!(all > 0)) return null;
  let left = share * all;
  for (let i = 0; i < le.length; i += 1) {
    if (left <= counts[i] && counts[i] > 0) {
      const low = i ? le[i - 1] : 0;
      return low + (le[i] - low) * (left / counts[i]);
    }
    left -= counts[i];
  }
  return le.at(-1);
}

const gained = (before, after) => Math.max(0, (after ?? 0) - (before ?? 0));

/** Rates between two documents; null where nothing can be said. */
export function rates(before, after) {
  const seconds = after.time - before.time;
  const [old, now] = [before.totals, after.totals];
  const of = (name) => gained(old[name], now[name]);
  const answered = (test) => Object.entries(now.requests ?? {})
    .filter(([code]) => test(Number(code)))
    .reduce((sum, [code, number]) => sum + gained(old.requests?.[code], number), 0);
  const batches = of("batches");
  const padded = of("padding_tokens");
  const slots = {};
  for (const [slot, row] of Object.entries(now.by_slot ?? {})) {
    slots[slot] = gained(old.by_slot?.[slot]?.texts, row.texts) / seconds;
  }
  return {
    texts: of("texts") / seconds,
    tokens: of("tokens") / seconds,
    requests: answered(() => true) / seconds,
    refused: answered((code) => code === 429) / seconds,
    failed: answered((code) => code >= 500) / seconds,
    batch: batches ? of("batch_texts") / batches : null,
    padding: batches ? padded / Math.max(1, of("batch_tokens") + padded) : null,
    slots,
  };
}

/** p50 and p99 of each stage between two documents. */
export function latencies(before, after) {
  const { le, counts } = after.totals.stages ?? { le: [], counts: {} };
  const found = {};
  for (const [stage, now] of Object.entries(counts)) {
    const old = before.totals.stages?.counts?.[stage] ?? [];
    const between = now.map((value, i) => gained(old[i], value));
    found[stage] = { p50: quantile(le, between, 0.5), p99: quantile(le, between, 0.99) };
  }
  return found;
}

/** Whether the second document comes from another life of the service than the first. */
export function restarted(before, after) {
  return after.service.uptime_seconds < before.service.uptime_seconds - 1
    || after.service.arbiter_pid !== before.service.arbiter_pid
    || after.service.host !== before.service.host;
}

/** Five minutes of points, made of the documents as they come; bounded. */
export class History {
  points = []; // {time, ...rates, stages, queue, kernel}; a point that is only {time, gap: true} breaks the lines
  latest = null; // rates of the last point, for the cards
  #documents = []; // those of the last ten seconds

  add(document) {
    if (!document.totals) return;
    const last = this.#documents.at(-1);
    if (last && (restarted(last, document) || document.time - last.time > GAP_S || document.time < last.time)) {
      this.points.push({ time: last.time, gap: true });
      this.#documents = [];
      this.latest = null;
    } else if (last && document.time - last.time < STEP_S) {
      return;
    }
    if (this.#documents.length) {
      const since = (seconds) => this.#documents.find((one) => document.time - one.time <= seconds) ?? this.#documents.at(-1);
      this.latest = {
        time: document.time,
        ...rates(since(RATES_S), document),
        stages: latencies(since(QUANTILES_S), document),
        queue: document.slots.reduce((sum, slot) => sum + (slot.queued_texts ?? 0), 0),
        kernel: document.listen_queue?.main ?? 0,
      };
      this.points.push(this.latest);
    }
    this.#documents.push(document);
    this.#documents = this.#documents.filter((one) => document.time - one.time <= QUANTILES_S + 1);
    this.points = this.points.filter((point) => document.time - point.time <= SPAN_S && point.time <= document.time);
  }
}
