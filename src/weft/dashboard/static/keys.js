// The keyboard: views name their keys with what they do; "?" shows all that work here.

import { h, icon } from "./dom.js";

const layers = []; // the last registered layer wins
let prefix = "";
let prefixAt = 0;

// keys: [[key, what it does, function]]; a key may be two in a row: "g l". Returns a function that takes them away.
export function register(title, keys) {
  const layer = { title, keys };
  layers.push(layer);
  return () => layers.splice(layers.indexOf(layer), 1);
}

function typing(target) {
  if (!(target instanceof Element)) return false;
  if (target.isContentEditable || target.matches("textarea, select")) return true;
  return target.matches("input") && !["checkbox", "radio", "button", "range"].includes(target.type);
}

function bound(key) {
  for (const layer of layers.toReversed()) {
    const found = layer.keys.find(([wanted]) => wanted === key);
    if (found) return found[2];
  }
  return null;
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (typing(event.target) || document.querySelector("dialog[open]")) return;
  const sequence = prefix && performance.now() - prefixAt < 1200 ? `${prefix} ${event.key}` : event.key;
  const begins = layers.some((layer) => layer.keys.some(([wanted]) => wanted.startsWith(`${event.key} `)));
  const act = bound(sequence) ?? bound(event.key);
  prefix = begins ? event.key : "";
  prefixAt = performance.now();
  if (!act) return;
  event.preventDefault();
  act(event);
}

function chips(key) {
  return key.split(" ").map((one) => h("kbd", null, one));
}

// The sheet of all keys, in a modal dialog that gives the focus back.
export function showKeys() {
  const rows = layers.toReversed().map(({ title, keys }) => [
    h("h3", null, title),
    h(
      "dl",
      { class: "keys" },
      keys.map(([key, text]) => h("div", null, h("dt", null, chips(key)), h("dd", null, text))),
    ),
  ]);
  const close = h(
    "button",
    { class: "quiet", type: "button", "aria-label": "Close", onclick: () => dialog.close() },
    icon("close"),
  );
  const head = h("header", null, h("h2", { id: "keys-title" }, "Keys"), close);
  const dialog = h("dialog", { class: "sheet", "aria-labelledby": "keys-title", "data-testid": "keys" }, head, rows);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
}

export function listen() {
  document.addEventListener("keydown", pressed);
}
