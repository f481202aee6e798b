// What a run makes of its prompts, step by step: a grid of prompts by steps whose videos play together.

import { getJson, runPath } from "./api.js";
import { h, replace, setText, show } from "./dom.js";
import { integer } from "./format.js";
import * as keys from "./keys.js";
import { empty, field, region, select, told } from "./parts.js";
import { keep, makeLoader, makeTransport, named, still, tile } from "./tiles.js";
import { openViewer } from "./viewer.js";

const BASE = "base";
const SIZES = ["small", "medium", "large"];
const CHOICES = [["all", "all steps"], ["8", "8 spread evenly"], ["4", "last 4"], ["2nd", "every 2nd"], ["5th", "every 5th"], ["10th", "every 10th"]];

// The samples as rows (prompt and seed), columns (base first, then steps) and cells; a prompt given twice has two rows.
export function gridOf(samples) {
  const rows = new Map();
  const cells = new Map();
  const columns = new Set();
  const times = new Map();
  for (const sample of samples) {
    const column = sample.adapter ? String(sample.step) : BASE;
    const name = JSON.stringify([sample.prompt, sample.seed]);
    const here = `${sample.adapter} ${sample.step} ${name}`;
    const again = times.get(here) ?? 0;
    times.set(here, again + 1);
    const key = `${name} ${again}`;
    if (!rows.has(key)) rows.set(key, { key, prompt: sample.prompt, seed: sample.seed });
    columns.add(column);
    cells.set(`${key} ${column}`, sample);
  }
  const steps = [...columns].filter((key) => key !== BASE).sort((a, b) => a - b);
  const named = steps.map((key) => ({ key, label: `step ${integer(Number(key))}` }));
  if (columns.has(BASE)) named.unshift({ key: BASE, label: "base" });
  return { rows: [...rows.values()], columns: named, cellOf: (row, column) => cells.get(`${row.key} ${column.key}`) };
}

// The columns to draw; base and the newest always stay.
export function chosenColumns(columns, choice) {
  const base = columns.filter((one) => one.key === BASE);
  const steps = columns.filter((one) => one.key !== BASE);
  const last = steps.length - 1;
  if (choice === "4") return [...base, ...steps.slice(-4)];
  if (choice === "8" && steps.length > 8) return [...base, ...Array.from({ length: 8 }, (_, i) => steps[Math.round((i * last) / 7)])];
  const nth = parseInt(choice, 10);
  if (choice.endsWith("th") || choice.endsWith("nd")) return [...base, ...steps.filter((_, i) => (last - i) % nth === 0)];
  return columns;
}

// Width to height of what is sampled, for places that are kept before anything is loaded; null when the config does not say.
export async function shapeOf(id) {
  const { resolved } = await getJson(runPath(id, "/config"));
  const [width, height] = [resolved?.["samples.width"], resolved?.["samples.height"]];
  return width > 0 && height > 0 ? `${width} / ${height}` : null;
}

export function mount(element, context) {
  const narrow = matchMedia("(max-width: 640px)");
  const transport = makeTransport();
  const view = { grid: null, choice: null, narrowAt: null, cells: new Map(), rows: new Map(), focus: null, gone: false, mark: newestSample(context.run), columns: [] };
  const words = empty("Reading …", "samples-empty");
  const choice = select(CHOICES, choose, "samples-columns");
  const size = select(SIZES.map((one) => [one, one]), (value) => (table.dataset.size = value), "samples-size");
  const sizeField = field("Tiles", size);
  const count = h("span", { class: "muted" });
  const slider = h("input", { type: "range", min: "0", step: "1", "data-testid": "samples-step", "aria-label": "Step", oninput: () => slid() });
  const sliderText = h("output", { class: "num" });
  const stepBar = h("div", { class: "step-bar" }, slider, sliderText);
  const head = h("tr", null);
  const body = h("tbody", null);
  const table = h("table", { class: "grid", "data-testid": "samples-grid", onkeydown: pressed }, h("caption", { class: "visually-hidden" }, "Samples: prompts by steps"), h("thead", null, head), body);
  const scroller = region("Samples", table);
  scroller.classList.add("samples");
  const columnField = field("Columns", choice);
  const tools = h("div", { class: "tools", hidden: true }, transport.element, columnField, sizeField, count);
  replace(element, h("section", { class: "part samples-part", "data-testid": "samples" }, h("h2", { class: "visually-hidden" }, "Samples"), tools, stepBar, words, scroller));
  const loader = makeLoader(transport.clock, null);
  const stop = keys.register("Samples", [["p", "play or pause all", () => (transport.clock.playing ? transport.clock.pause() : transport.clock.play())]]);

  function choose(value) {
    view.choice = value;
    draw();
  }

  function slid() {
    view.narrowAt = Number(slider.value) === view.grid.columns.length - 1 ? null : view.grid.columns[Number(slider.value)].key;
    draw();
  }

  // On a narrow page one column, the newest unless another was chosen.
  function visible() {
    if (!narrow.matches) return chosenColumns(view.grid.columns, view.choice);
    const found = view.grid.columns.find((one) => one.key === view.narrowAt);
    return [found ?? view.grid.columns.at(-1)];
  }

  function open(row, column) {
    const playing = transport.clock.playing;
    transport.clock.pause();
    const { rows, columns, cellOf } = view.grid;
    const dialog = openViewer({ rows, columns, cellOf, row: rows.indexOf(row), column: columns.indexOf(column), reference: columns[0].key });
    dialog.addEventListener("close", () => playing && !view.gone && transport.clock.play());
  }

  // A cell is made anew only when its file changed.
  function cell(row, column) {
    const sample = view.grid.cellOf(row, column);
    const key = `${row.key} ${column.key}`;
    const content = sample ? `${sample.media} ${sample.text}` : null;
    const known = view.cells.get(key);
    if (known?.content === content) return known.element;
    const base = view.grid.columns[0].key === BASE ? view.grid.cellOf(row, view.grid.columns[0]) : undefined;
    const inside = tile(sample, loader, sample?.kind === "text" && sample.adapter ? (base?.text ?? null) : null);
    const button = h("button", { type: "button", class: "tile", tabindex: "-1", "data-testid": "sample", "data-key": key, onclick: () => openNow(row.key, column.key) }, named(inside, column.label));
    const made = h("td", { class: column.key === BASE ? "base" : null }, sample ? button : tile(undefined, loader));
    view.cells.set(key, { element: made, content });
    return made;
  }

  function openNow(row, column) {
    open(view.grid.rows.find((one) => one.key === row), view.grid.columns.find((one) => one.key === column));
  }

  function rowOf(row, columns) {
    if (!view.rows.has(row.key)) {
      const prompt = h("th", { scope: "row" }, h("div", { class: "prompt", title: row.prompt }, row.prompt), h("div", { class: "muted" }, `seed ${row.seed}`));
      view.rows.set(row.key, h("tr", null, prompt));
    }
    const line = view.rows.get(row.key);
    keep(line, [line.firstElementChild, ...columns.map((column) => cell(row, column))]);
    return line;
  }

  function draw() {
    if (!view.grid || view.grid.columns.length === 0) return;
    const columns = visible();
    show(sizeField, !narrow.matches);
    show(columnField, !narrow.matches && view.grid.columns.length > 3);
    const atEnd = scroller.scrollLeft + scroller.clientWidth >= scroller.scrollWidth - 4;
    const added = columns.map((one) => one.key).join() !== view.columns.map((one) => one.key).join();
    view.columns = columns;
    if (added) replace(head, h("th", { scope: "col" }, "Prompt"), columns.map((one) => h("th", { scope: "col", class: one.key === BASE ? "base num" : "num", title: one.key === BASE ? "The model without the adapter" : null }, one.label)));
    keep(body, view.grid.rows.map((row) => rowOf(row, columns)));
    if (atEnd && added) scroller.scrollLeft = scroller.scrollWidth;
    const tabbable = body.querySelector('.tile[tabindex="0"]') ?? body.querySelector(".tile");
    if (tabbable) tabbable.tabIndex = 0;
    const steps = view.grid.columns.filter((one) => one.key !== BASE).length;
    const many = (amount, word) => `${amount} ${word}${amount === 1 ? "" : "s"}`;
    setText(count, `${many(view.grid.rows.length, "prompt")}, ${many(steps, "step")}`);
    slider.max = String(view.grid.columns.length - 1);
    slider.value = String(view.grid.columns.indexOf(columns.at(-1)));
    slider.setAttribute("aria-valuetext", columns.at(-1).label);
    setText(sliderText, columns.at(-1).label);
  }

  // One tile is in the tab order; arrows go from there.
  function pressed(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    const mine = event.target.closest("td");
    if (!move || !mine) return;
    const line = mine.parentElement;
    const next = body.children[[...body.children].indexOf(line) + move[0]]?.children[[...line.children].indexOf(mine) + move[1]]?.querySelector(".tile");
    if (!next) return;
    event.preventDefault();
    for (const one of body.querySelectorAll('.tile[tabindex="0"]')) one.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  async function load() {
    try {
      const first = view.grid === null;
      const [{ samples }, shape] = await Promise.all([getJson(runPath(context.id, "/samples")), first ? shapeOf(context.id) : null]);
      if (view.gone) return;
      if (shape) table.style.setProperty("--shape", shape);
      view.grid = gridOf(samples);
      const kinds = new Set(samples.map((sample) => sample.kind));
      table.classList.toggle("texts", kinds.has("text"));
      show(transport.element, kinds.has("video"));
      view.choice ??= view.grid.columns.length > 9 ? "8" : "all";
      choice.value = view.choice;
      table.dataset.size ??= view.grid.columns.length > 3 ? "medium" : "large";
      size.value = table.dataset.size;
      show(words, samples.length === 0);
      for (const part of [tools, scroller]) show(part, samples.length > 0);
      stepBar.classList.toggle("some", view.grid.columns.length > 1);
      setText(words, "No samples yet. They are made at the steps of samples.every, of the prompts in samples.prompts.");
      draw();
      if (first && !still() && kinds.has("video")) transport.clock.play();
    } catch (error) {
      if (view.gone) return;
      view.mark = null; // the next news tries again
      show(words, true);
      setText(words, told(error));
    }
  }

  narrow.addEventListener("change", draw);
  load();
  return {
    reload: load,
    update(run) {
      if (newestSample(run) === view.mark) return;
      view.mark = newestSample(run);
      load();
    },
    destroy() {
      view.gone = true;
      stop();
      narrow.removeEventListener("change", draw);
      loader.close();
    },
  };
}

// Changes with each sample: the newest thumbnail, and when one was told last.
function newestSample(run) {
  return `${run?.sample} ${run?.entries?.findLast((entry) => entry.kind === "sampled")?.time}`;
}
