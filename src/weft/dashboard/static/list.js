// The list of runs: who lives, how far, what loss; filtered, sorted, chosen for comparison.

import { h, replace, setText, show } from "./dom.js";
import { about, ALIVE } from "./facts.js";
import * as keys from "./keys.js";
import { firstLoss, lazily, row } from "./row.js";

const ORDER = [
  "stalled",
  "crashed",
  "training",
  "validating",
  "sampling",
  "saving",
  "caching",
  "starting",
  "paused",
  "stopped",
  "finished",
];
const STATES = [
  ["", "Any state"],
  ["alive", "Alive"],
  ["finished", "Finished"],
  ["stopped", "Stopped"],
  ["broken", "Crashed or stalled"],
];
const SORTS = {
  newest: {
    name: "Newest first",
    by: (a, b) => (b.started_at ?? b.updated_at ?? 0) - (a.started_at ?? a.updated_at ?? 0),
  },
  state: { name: "By state", by: (a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) },
  loss: { name: "Lowest loss", by: (a, b) => lossOf(a) - lossOf(b) },
  name: { name: "By name", by: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }) },
};

const lossOf = (run) => run.validation?.loss ?? firstLoss(run) ?? Number.POSITIVE_INFINITY;

function nothingHere(root) {
  return h(
    "div",
    { class: "words", "data-testid": "no-runs" },
    h("h1", null, "No runs here yet"),
    h(
      "p",
      null,
      "This page shows every run below ",
      h("code", null, root),
      ". One that starts there appears by itself.",
    ),
    h(
      "pre",
      null,
      "weft demo                 # makes videos, trains on them, two minutes\nweft new run.yaml         # asks a few questions, writes a config\nweft train run.yaml",
    ),
  );
}

export function mount(element, context) {
  const at = {
    runs: new Map(),
    rows: new Map(),
    chosen: new Set(context.query.getAll("runs")),
    text: "",
    state: "",
    sort: "newest",
    order: "",
    feed: null,
    timer: 0,
    over: false,
    root: "",
  };
  const watch = lazily();
  const filter = h("input", {
    type: "search",
    class: "list-filter",
    placeholder: "Filter by name, model, method",
    "aria-label": "Filter runs",
    "data-testid": "filter",
    oninput: () => {
      at.text = filter.value.trim().toLowerCase();
      arrange();
    },
  });
  const states = h(
    "select",
    {
      "aria-label": "State",
      "data-testid": "filter-state",
      onchange: () => {
        at.state = states.value;
        arrange();
      },
    },
    STATES.map(([value, name]) => h("option", { value }, name)),
  );
  const sorts = h(
    "select",
    {
      "aria-label": "Order",
      "data-testid": "sort",
      onchange: () => {
        at.sort = sorts.value;
        arrange();
      },
    },
    Object.entries(SORTS).map(([value, { name }]) => h("option", { value }, name)),
  );
  const count = h("span", { class: "list-count muted", role: "status" });
  const compare = h("a", { class: "button primary", hidden: true, "data-testid": "compare" });
  const list = h("ul", { class: "rows", "aria-label": "Runs" });
  const none = h("p", { class: "muted list-none", hidden: true }, "No run answers to this filter.");
  const page = [
    h(
      "div",
      { class: "list-head" },
      h("h1", null, "Runs"),
      count,
      h("span", { class: "list-tools" }, compare, filter, states, sorts),
    ),
    list,
    none,
  ];
  const empty = h("div");
  const body = h("div", { class: "list" }, page);
  replace(element, body, empty);
  const unregister = keys.register("The list", [
    ["j", "next run", () => step(1)],
    ["k", "previous run", () => step(-1)],
    ["Enter", "open the run", openFocused],
    ["c", "choose for comparison", toggleFocused],
    ["/", "filter", () => filter.focus()],
  ]);
  filter.addEventListener("keydown", (event) => event.key === "Escape" && filter.blur());
  begin();

  async function begin() {
    try {
      const answer = await context.api.getJson("/api/runs");
      if (at.over) return;
      at.root = answer.root;
      heard({ runs: answer.runs, gone: [] });
    } catch (error) {
      if (at.over) return;
      if (error.status !== 0) return void context.words("The runs could not be read.", error.message);
      context.connected({ word: "waiting", attempt: 1, until: Date.now() + 2000, seen: null });
      at.timer = setTimeout(begin, 2000);
      return;
    }
    context.title("Runs", "Runs · Weft");
    at.feed = context.api.live({ hear: { runs: heard, state: context.connected } });
    at.timer = setInterval(refresh, 5000);
  }

  function heard({ runs, gone }) {
    for (const run of runs) at.runs.set(run.id, run);
    for (const id of gone) forget(id);
    for (const run of runs) drawRow(run);
    arrange();
  }

  function forget(id) {
    at.runs.delete(id);
    at.rows.get(id)?.element.remove();
    at.rows.delete(id);
    at.chosen.delete(id);
  }

  function drawRow(run) {
    if (!at.rows.has(run.id)) at.rows.set(run.id, row(run, { onChoose: chose, watch }));
    const one = at.rows.get(run.id);
    one.choose.checked = at.chosen.has(run.id);
    one.update(run, context.api.now());
  }

  function refresh() {
    if (document.hidden) return;
    for (const run of at.runs.values()) drawRow(run);
  }

  function wanted(run) {
    const broken = run.state === "crashed" || run.state === "stalled";
    if (at.state === "alive" && !ALIVE.has(run.state)) return false;
    if (at.state === "broken" && !broken) return false;
    if (["finished", "stopped"].includes(at.state) && run.state !== at.state) return false;
    const words = `${run.name} ${run.id} ${run.state} ${about(run).join(" ")}`.toLowerCase();
    return at.text.split(/\s+/).every((part) => words.includes(part));
  }

  // Puts the rows in order; moves elements only when the order changed.
  function arrange() {
    const shown = [...at.runs.values()]
      .filter(wanted)
      .sort((a, b) => SORTS[at.sort].by(a, b) || a.id.localeCompare(b.id));
    const order = JSON.stringify(shown.map((run) => run.id));
    if (order !== at.order) {
      const focused = document.activeElement;
      list.replaceChildren(...shown.map((run) => at.rows.get(run.id).element));
      if (list.contains(focused)) focused.focus({ preventScroll: true });
      at.order = order;
    }
    list.classList.toggle(
      "with-thumbs",
      shown.some((run) => run.sample),
    );
    const alive = [...at.runs.values()].filter((run) => ALIVE.has(run.state)).length;
    setText(
      count,
      `${shown.length === at.runs.size ? at.runs.size : `${shown.length} of ${at.runs.size}`} ${at.runs.size === 1 ? "run" : "runs"}${alive ? `, ${alive} alive` : ""}`,
    );
    show(none, at.runs.size > 0 && shown.length === 0);
    show(body, at.runs.size > 0);
    replace(empty, at.runs.size === 0 ? nothingHere(at.root) : null);
    drawCompare();
  }

  function chose(id, chosen) {
    if (chosen) at.chosen.add(id);
    else at.chosen.delete(id);
    drawCompare();
  }

  function drawCompare() {
    const runs = [...at.chosen].filter((id) => at.runs.has(id));
    show(compare, runs.length > 1);
    setText(compare, `Compare ${runs.length}`);
    compare.href = `#/compare?${new URLSearchParams(runs.map((id) => ["runs", id]))}`;
  }

  function links() {
    return [...list.querySelectorAll("a[data-row]")];
  }

  function step(by) {
    const all = links();
    const now = all.indexOf(document.activeElement);
    const next = all[Math.min(all.length - 1, Math.max(0, now < 0 ? (by > 0 ? 0 : all.length - 1) : now + by))];
    next?.focus();
    next?.scrollIntoView({ block: "nearest" });
  }

  function openFocused() {
    const focused = document.activeElement;
    if (focused?.matches("a, button, summary, label")) focused.click();
  }

  function toggleFocused() {
    document.activeElement?.closest("[data-id]")?.querySelector("input").click();
  }

  return {
    destroy() {
      at.over = true;
      clearTimeout(at.timer);
      clearInterval(at.timer);
      at.feed?.close();
      watch.disconnect();
      unregister();
    },
  };
}
