// SPDX-License-Identifier: Apache-2.0
// Elements: made once, changed only where something changed. All text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

export function h(name, attributes, ...children) {
  return build(document.createElement(name), attributes, children);
}

export function svg(name, attributes, ...children) {
  return build(document.createElementNS(SVG, name), attributes, children);
}

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) set(node, name, value);
  node.append(...children);
  return node;
}

export function say(node, text) {
  const words = String(text ?? "");
  if (node.textContent !== words) node.textContent = words;
}

export function set(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

const kept = new WeakMap();

/** Keep one child for each item: `make(item)` returns {node, update}; order and identity follow the key. */
export function list(parent, items, keyOf, make) {
  const before = kept.get(parent) ?? new Map();
  const after = new Map();
  for (const item of items) {
    const key = keyOf(item);
    after.set(key, before.get(key) ?? make(item));
  }
  for (const [key, view] of before) if (!after.has(key)) view.node.remove();
  let place = 0;
  for (const item of items) {
    const view = after.get(keyOf(item));
    const there = parent.children[place++];
    if (there !== view.node) parent.insertBefore(view.node, there ?? null);
    view.update?.(item);
  }
  kept.set(parent, after);
}

/** A bar of parts. `parts`: {from, size, kind, title}, in the unit of `total`; told to those who listen by `label`. */
export function bar(className) {
  const node = svg("svg", { class: `parts ${className}`, role: "img" });
  return {
    node,
    update(parts, total, label) {
      set(node, "aria-label", label);
      const shown = parts.filter((part) => part.size > 0).map((part, index) => ({ ...part, index, total }));
      list(node, shown, (part) => part.index, piece);
    },
  };
}

function piece() {
  const title = svg("title");
  const node = svg("rect", { height: "100%" }, title);
  return {
    node,
    update({ kind, from, size, total, title: words }) {
      set(node, "class", kind);
      set(node, "x", percent(from / total));
      set(node, "width", percent(size / total));
      say(title, words);
    },
  };
}

const percent = (share) => `${(100 * Math.max(0, Math.min(1, share || 0))).toFixed(2)}%`;

/** Figures with their names: rows of [name, value], an absent value leaves the row out. */
export function facts(parent, rows) {
  list(parent, rows.filter(([, value]) => (value ?? "") !== ""), ([name]) => name, ([name]) => {
    const value = h("dd");
    return { node: h("div", null, h("dt", null, name), value), update: (row) => say(value, row[1]) };
  });
}
