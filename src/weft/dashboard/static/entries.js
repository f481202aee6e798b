// What happened in a run: notices, incidents, checkpoints, controls and resumes, the newest first.

import { h, icon, replace, setText, show } from "./dom.js";
import { clock, integer } from "./format.js";
import { chip, empty, part, partHead } from "./parts.js";
import { keep } from "./tiles.js";

const FILTERS = {
  all: { name: "All", holds: () => true },
  trouble: { name: "Warnings", holds: (entry) => entry.level !== "info" },
  saves: { name: "Saved", holds: (entry) => ["saved", "exported"].includes(entry.kind) },
  measures: { name: "Measured", holds: (entry) => ["evaluated", "sampled", "scored"].includes(entry.kind) },
  control: { name: "Control", holds: (entry) => ["control", "resumed", "ended"].includes(entry.kind) },
};
const FIRST = 12; // shown at once; the others on demand

const keyOf = (entry) => `${entry.time} ${entry.kind} ${entry.step} ${entry.text}`;

function line(entry) {
  const aside = entry.level === "info" ? null : h("span", { class: "visually-hidden" }, entry.level === "bad" ? "Trouble: " : "Warning: ");
  const step = h("span", { class: "entry-step num" }, entry.step === null || entry.step === undefined ? "" : `step ${integer(entry.step)}`);
  const time = h("time", { class: "entry-time num", datetime: new Date(entry.time * 1000).toISOString() }, clock(entry.time));
  const mark = h("span", { class: `entry-mark ${entry.level}` }, entry.level === "info" ? h("i", { class: "dot" }) : icon(entry.level));
  return h("li", { "data-kind": entry.kind, "data-level": entry.level, "data-testid": "entry" }, mark, time, step, h("span", { class: "entry-text" }, aside, entry.text));
}

export function mount(element, context) {
  const view = { entries: context.run?.entries ?? [], filter: "all", whole: false, lines: new Map() };
  const buttons = Object.entries(FILTERS).map(([key, filter]) =>
    chip([filter.name, " ", h("span", { class: "count" })], () => choose(key), { "data-filter": key }));
  const list = h("ol", { class: "entries", "aria-label": "Newest first" });
  const none = empty("");
  const more = h("button", { type: "button", class: "quiet", onclick: unfold, hidden: true });
  const bar = h("div", { class: "chips", role: "group", "aria-label": "Which" }, buttons);
  replace(element, part(null, "entries", partHead("What happened", bar), list, none, more));

  function choose(filter) {
    view.filter = filter;
    draw();
  }

  function unfold() {
    view.whole = !view.whole;
    draw();
  }

  // Lines are kept and only moved in, so that a reader's selection and place survive a new one.
  function draw() {
    for (const button of buttons) {
      const filter = FILTERS[button.dataset.filter];
      button.setAttribute("aria-pressed", String(button.dataset.filter === view.filter));
      setText(button.lastElementChild, view.entries.filter(filter.holds).length);
    }
    const held = view.entries.filter(FILTERS[view.filter].holds).toReversed();
    const wanted = view.whole ? held : held.slice(0, FIRST);
    const lines = new Map();
    for (const entry of wanted) {
      const key = keyOf(entry);
      lines.set(key, view.lines.get(key) ?? line(entry));
    }
    keep(list, [...lines.values()]);
    view.lines = lines;
    show(none, held.length === 0);
    setText(none, view.entries.length === 0 ? "Nothing to tell yet." : "None of this kind.");
    show(more, held.length > FIRST);
    setText(more, view.whole ? `Show the newest ${FIRST}` : `Show all ${held.length}`);
  }

  draw();
  return {
    update(run) {
      if (run.entries === view.entries) return;
      view.entries = run.entries;
      draw();
    },
    destroy() {
      view.lines.clear();
    },
  };
}
