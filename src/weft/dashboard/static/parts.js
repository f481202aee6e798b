// Pieces that several views share: parts with a title, fields, boxes that scroll, tables.

import { ApiError } from "./api.js";
import { h } from "./dom.js";

export const part = (title, testid, ...inside) => h("section", { class: "part", "data-testid": testid }, title && h("h2", null, title), inside);

export const partHead = (title, ...inside) => h("div", { class: "part-head" }, h("h2", null, title), inside);

export const empty = (text, testid) => h("p", { class: "empty", "data-testid": testid }, text);

// A box that scrolls by itself can be reached by keyboard and has a name.
export const region = (label, ...inside) => h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, inside);

export const field = (text, ...control) => h("label", { class: "field" }, h("span", null, text), control);

export function check(text, on, change, testid) {
  return h("label", { class: "check" }, h("input", { type: "checkbox", checked: on, "data-testid": testid, onchange: (event) => change(event.target.checked) }), text);
}

// options: [[value, text]]
export function select(options, change, testid, label = null) {
  return h("select", { "data-testid": testid, "aria-label": label, onchange: (event) => change(event.target.value) }, options.map(([value, text]) => h("option", { value }, text)));
}

export const chip = (text, act, more) => h("button", { type: "button", class: "chip", onclick: act, ...more }, text);

// columns: [[head, class of its cells]], an empty head for none; rows: lists of cells, or {cells, class}; the first cell names its row.
export function dataTable({ caption, columns, rows, testid, look = "", visible = true }) {
  const head = ([content, name]) => (content === "" ? h("td", null) : h("th", { scope: "col", class: name }, content));
  const cell = (content, i) => h(i === 0 ? "th" : "td", { scope: i === 0 ? "row" : null, class: columns[i][1] }, content);
  const line = (row) => h("tr", { class: row.class }, (row.cells ?? row).map((content, i) => (content instanceof HTMLTableCellElement ? content : cell(content, i))));
  return h("table", { class: `data ${look}`, "data-testid": testid }, h("caption", { class: visible ? null : "visually-hidden" }, caption),
    h("thead", null, h("tr", null, columns.map(head))), h("tbody", null, rows.map(line)));
}

// What to say of an answer that did not come; a mistake of ours is not passed off as one.
export function told(error) {
  if (!(error instanceof ApiError)) throw error;
  return error.message;
}
