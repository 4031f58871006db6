// SPDX-License-Identifier: Apache-2.0
// Documents as they come: by a stream of events, else by asking every two seconds, and again when all is lost.

const POLL_MS = 2000;
const ANSWER_MS = 4000; // for one answer to a question
const SILENT_MS = 7000; // a stream that says nothing for so long is dead, whatever the socket says
const STREAM_AGAIN_MS = 15000; // where no stream is to be had, one is tried this often
const HIDDEN_MS = 60000; // a page that nobody looks at lets go of its stream

const jitter = (least, most) => least + Math.random() * (most - least);

/** Calls `onDocument(document)`, and `onState(state)` with live, polling, away, paused or connecting. */
export class Connection {
  state = "connecting";
  answered = performance.now(); // when the service last said anything
  #stream = null;
  #heard = false; // anything, on this stream
  #timers = {};

  constructor({ onDocument, onState }) {
    this.onDocument = onDocument;
    this.onState = onState;
    document.addEventListener("visibilitychange", () => this.#seen());
    addEventListener("pagehide", () => this.#stop());
    addEventListener("pageshow", (event) => event.persisted && this.open());
  }

  /** Seconds since the last answer. */
  get silence() {
    return (performance.now() - this.answered) / 1000;
  }

  open() {
    this.#stop();
    const stream = new EventSource("events");
    this.#stream = stream;
    this.#heard = false;
    stream.addEventListener("status", (event) => {
      if (stream !== this.#stream) return;
      this.#heard = true;
      this.#after("silent", SILENT_MS, () => this.#lost());
      this.#clear("poll");
      this.#take(JSON.parse(event.data), "live");
    });
    stream.addEventListener("bye", () => { // the worker goes; another one will answer
      if (stream === this.#stream) this.#lost();
    });
    stream.onerror = () => stream === this.#stream && this.#lost();
    this.#after("silent", SILENT_MS, () => this.#lost());
  }

  /** A stream that ended is opened again at once; where there is none, ask, and try again later. */
  #lost() {
    this.#stop();
    this.#after("open", this.#heard ? jitter(100, 1000) : jitter(0.7, 1.3) * STREAM_AGAIN_MS, () => this.open());
    this.#after("poll", this.#heard ? POLL_MS : jitter(50, 400), () => this.#poll());
  }

  async #poll() {
    try {
      const reply = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
      if (!reply.ok) throw new Error(`status ${reply.status}`);
      const found = await reply.json();
      if (this.#settled) return;
      const back = this.state === "away";
      this.#take(found, "polling");
      if (back) {
        this.open(); // it is back: no need to wait for the next try
        this.#after("poll", POLL_MS, () => this.#poll()); // which an answer of the stream ends
        return;
      }
    } catch {
      if (!this.#settled) this.#become("away");
    }
    if (!this.#settled) this.#after("poll", jitter(0.9, 1.1) * POLL_MS, () => this.#poll());
  }

  /** Whether no answer to a question is wanted any more: a stream tells all, or nobody looks. */
  get #settled() {
    return this.state === "paused" || (this.state === "live" && this.#stream !== null);
  }

  #take(found, state) {
    this.answered = performance.now();
    this.#become(state);
    this.onDocument(found);
  }

  #become(state) {
    if (state === this.state) return;
    this.state = state;
    this.onState(state);
  }

  #seen() {
    if (document.hidden) {
      this.#after("hide", HIDDEN_MS, () => {
        this.#stop();
        this.#become("paused");
      });
      return;
    }
    this.#clear("hide");
    if (this.state === "paused") {
      this.answered = performance.now();
      this.#become("connecting");
      this.open();
    }
  }

  #stop() {
    this.#stream?.close();
    this.#stream = null;
    for (const name of ["silent", "open", "poll"]) this.#clear(name);
  }

  #after(name, milliseconds, action) {
    this.#clear(name);
    this.#timers[name] = setTimeout(action, milliseconds);
  }

  #clear(name) {
    clearTimeout(this.#timers[name]);
  }
}
