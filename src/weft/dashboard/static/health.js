// Adapter health: how far each layer's weight has moved and over how many directions, as a heat map of layers by steps.

import { getJson, runPath } from "./api.js";
import { h, replace, setText, show } from "./dom.js";
import { integer, number, NONE } from "./format.js";
import { check, dataTable, empty, field, part, region, select, told } from "./parts.js";

const WIDEST = 200; // pixels of a cell: few steps fill the page as far as one can still read across
const LONGEST = 18; // letters of a group's name, left of the cells
const FOOT = 22; // px for the steps, below them
const MEASURES = {
  change: { name: "‖ΔW‖ / ‖W‖", text: (value) => number(value, 3) },
  effective_rank: { name: "effective rank", text: (value) => (value === null ? NONE : value.toFixed(2)) },
};

// "blocks.12.attn1.to_q" -> block "blocks.12", kind "attn1.to_q"; a path without a number is its own kind.
export function layerOf(path) {
  const found = /^((?:.*?\.)?\d+)\.(.+)$/.exec(path);
  return found ? { path, block: found[1], kind: found[2] } : { path, block: "others", kind: path };
}

// sRGB of OKLab; Ottosson 2020, bottosson.github.io/posts/oklab.
function rgb(lightness, a, b) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const encoded = (x) => (x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055);
  return linear.map((x) => Math.round(255 * encoded(Math.min(1, Math.max(0, x)))));
}

// 256 colours, less to more, even for the eye (nearly a straight line in OKLab) and told apart without red and green:
// dark blue to yellow on a dark page, the page's own pale to dark blue on a light one.
export function ramp(dark) {
  const [low, high] = dark ? [[0.27, -0.07], [0.93, 0.14]] : [[0.95, 0.025], [0.3, -0.12]];
  return Array.from({ length: 256 }, (_, i) => {
    const t = i / 255;
    const between = (k) => low[k] + (high[k] - low[k]) * t;
    return `rgb(${rgb(between(0), -0.045 * Math.sin(Math.PI * t), between(1)).join(" ")})`;
  });
}

const isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

// Where a value stands between the smallest and the largest, 0..1; on a log scale zeros stand at the bottom.
function scaleOf(rows, logarithmic, bottom) {
  const values = rows.flat().filter((value) => Number.isFinite(value) && (!logarithmic || value > 0));
  if (values.length === 0) return null;
  const low = logarithmic ? values.reduce((x, y) => Math.min(x, y)) : bottom;
  const high = values.reduce((x, y) => Math.max(x, y));
  const warp = logarithmic ? Math.log : (x) => x;
  const span = warp(high) - warp(low);
  const at = (value) => (span > 0 ? Math.min(1, Math.max(0, (warp(Math.max(value, low)) - warp(low)) / span)) : 1);
  return { low, high, at };
}

function order(layers, byKind) {
  const rank = (name, names) => names.indexOf(name);
  const blocks = [...new Set(layers.map((layer) => layer.block))];
  const kinds = [...new Set(layers.map((layer) => layer.kind))];
  const keys = layers.map((layer) => {
    const pair = [rank(layer.block, blocks), rank(layer.kind, kinds)];
    return byKind ? pair.reverse() : pair;
  });
  return layers.map((_, i) => i).sort((i, j) => keys[i][0] - keys[j][0] || keys[i][1] - keys[j][1]);
}

const meanSquareRoot = (values) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);

function byKind(layers, values) {
  const kinds = new Map();
  layers.forEach((layer, i) => {
    if (Number.isFinite(values[i])) kinds.set(layer.kind, [...(kinds.get(layer.kind) ?? []), values[i]]);
  });
  const rows = [...kinds].map(([kind, all]) => ({ kind, count: all.length, typical: meanSquareRoot(all), largest: Math.max(...all) }));
  return rows.sort((a, b) => b.typical - a.typical);
}

const bar = (share) => h("span", { class: "share", "aria-hidden": "true" }, h("i", { style: { width: `${Math.max(1, 100 * share)}%` } }));

function topTable(layers, values) {
  const ranked = layers.map((layer, i) => [layer.path, values[i]]).filter(([, value]) => Number.isFinite(value));
  ranked.sort((a, b) => b[1] - a[1]);
  const rows = ranked.slice(0, 10).map(([path, value]) => [path, number(value, 3), bar(value / ranked[0][1])]);
  return dataTable({ caption: "The ten layers that moved most", columns: [["Layer", "mono"], [MEASURES.change.name, "num"], ["", "bars"]], rows, testid: "health-top" });
}

function kindTable(layers, values) {
  const kinds = byKind(layers, values);
  const rows = kinds.map((row) => [row.kind, integer(row.count), number(row.typical, 3), number(row.largest, 3), bar(row.typical / kinds[0].typical)]);
  const columns = [["Kind", "mono"], ["layers", "num"], ["root mean square", "num"], ["largest", "num"], ["", "bars"]];
  return dataTable({ caption: "By kind of layer", columns, rows, testid: "health-kinds" });
}

// The drawing: canvas, a frame around the chosen cell, and where the pointer or the keys are.
function heatMap(choose) {
  const canvas = h("canvas", { class: "heat-cells", "aria-hidden": "true" });
  const frame = h("div", { class: "heat-frame", hidden: true });
  const box = h("div", { class: "heat", tabindex: "0", role: "application", "aria-roledescription": "heat map", "aria-label": "Layers by steps. Arrow keys move from cell to cell.", "aria-describedby": "heat-readout", "data-testid": "health-map" }, canvas, frame);
  const at = { row: 0, column: 0, shape: null };

  function chosen(row, column) {
    if (!at.shape) return;
    const { rows, steps, width, height } = at.shape;
    at.row = Math.min(rows.length - 1, Math.max(0, row));
    at.column = Math.min(steps.length - 1, Math.max(0, column));
    frame.hidden = false;
    const place = { left: at.shape.gutter + at.column * width, top: at.row * height, width, height };
    for (const [name, value] of Object.entries(place)) frame.style.setProperty(name, `${value}px`);
    choose(at.row, at.column);
  }

  function pointed(event) {
    if (!at.shape) return;
    const edge = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - edge.left - at.shape.gutter) / at.shape.width);
    const row = Math.floor((event.clientY - edge.top) / at.shape.height);
    if (column >= 0 && column < at.shape.steps.length && row >= 0 && row < at.shape.rows.length) chosen(row, column);
  }

  function pressed(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -1e9], End: [0, 1e9] };
    const move = moves[event.key];
    if (!move || !at.shape) return;
    event.preventDefault();
    chosen(at.row + move[0], at.column + move[1]);
    frame.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  box.addEventListener("pointermove", pointed);
  box.addEventListener("pointerdown", pointed);
  box.addEventListener("keydown", pressed);
  box.addEventListener("focus", () => chosen(at.row, at.column));

  // rows: {label, values} in drawn order, label on the first of its group; scale and colours: of a value.
  function draw(rows, steps, scale, colours) {
    const gutter = Math.ceil(20 + 6.7 * Math.min(LONGEST, Math.max(...rows.map((row) => row.label?.length ?? 0)))); // letters of 11 px
    const room = Math.max(160, box.clientWidth - gutter - 2);
    const width = Math.max(6, Math.min(WIDEST, Math.floor(room / steps.length)));
    const height = Math.max(3, Math.min(18, Math.round(720 / rows.length)));
    at.shape = { rows, steps, width, height, gutter };
    const ratio = window.devicePixelRatio || 1;
    const size = [gutter + steps.length * width + 2, rows.length * height + FOOT];
    [canvas.width, canvas.height] = size.map((length) => Math.round(length * ratio));
    canvas.style.setProperty("width", `${size[0]}px`);
    canvas.style.setProperty("height", `${size[1]}px`);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    drawCells(pen, at.shape, scale, colours);
    drawNames(pen, at.shape);
  }
  return { box, draw, chosen, at };
}

function drawCells(pen, { rows, width, height, gutter }, scale, colours) {
  const gap = width > 8 && height > 8 ? 1 : 0;
  rows.forEach((row, i) => {
    row.values.forEach((value, j) => {
      if (!Number.isFinite(value)) return;
      pen.fillStyle = colours[Math.round(255 * scale.at(value))];
      pen.fillRect(gutter + j * width, i * height, width - gap, height - gap);
    });
  });
}

function drawNames(pen, { rows, steps, width, height, gutter }) {
  const style = getComputedStyle(document.documentElement);
  pen.fillStyle = style.getPropertyValue("--muted");
  pen.font = "11px ui-monospace, monospace";
  pen.textBaseline = "top";
  let free = 0;
  rows.forEach((row, i) => {
    if (row.label === null) return;
    pen.fillRect(gutter - 8, i * height, 5, 1);
    if (i * height < free) return;
    const text = row.label.length > LONGEST ? `…${row.label.slice(1 - LONGEST)}` : row.label;
    pen.fillText(text, 0, i * height + Math.max(0, (Math.min(height, 14) - 11) / 2));
    free = i * height + 14;
  });
  let taken = 0;
  steps.forEach((step, j) => {
    const left = gutter + j * width;
    if (left < taken) return;
    const text = integer(step);
    const wide = pen.measureText(text).width;
    if (left + wide > gutter + steps.length * width + 2 && j > 0) return;
    pen.fillText(text, left, rows.length * height + 7);
    taken = left + wide + 14;
  });
}

function valueTable(rows, layers, steps, text) {
  const columns = [["Layer", "mono"], ...steps.map((step) => [integer(step), "num"])];
  return dataTable({ caption: "Values of all layers", visible: false, columns, rows: rows.map((row) => [layers[row.index].path, ...row.values.map(text)]) });
}

export function mount(element, context) {
  const view = { data: null, role: null, measure: "change", order: "block", log: false, mark: newestSave(context.run), gone: false };
  const tools = h("div", { class: "tools" });
  const about = h("span", { class: "muted" });
  const readout = h("p", { class: "readout mono", id: "heat-readout", role: "status" }, " ");
  const legend = h("div", { class: "heat-legend", "aria-hidden": "true" });
  const words = empty("Reading …", "health-empty");
  const lists = h("div", { class: "halves" });
  const table = h("details", { class: "fold", ontoggle: () => filled() }, h("summary", null, "The same as a table"), region("Values of all layers"));
  const map = heatMap(tell);
  const whole = h("div", { hidden: true }, tools, map.box, h("div", { class: "heat-under" }, legend, readout), lists, table);
  replace(element, part("Adapter health", "health", words, whole));

  const role = () => view.data[view.role];
  const layers = () => role().paths.map(layerOf);
  const rowsOf = () => {
    const all = layers();
    const values = role()[view.measure];
    let last = null;
    return order(all, view.order === "kind").map((index) => {
      const group = all[index][view.order];
      const label = group === last ? null : group;
      last = group;
      return { index, label, values: values.map((column) => column[index] ?? null) };
    });
  };

  function tell(row, column) {
    const { rows, steps } = map.at.shape;
    const value = rows[row].values[column];
    setText(readout, `${role().paths[rows[row].index]} · step ${integer(steps[column])} · ${MEASURES[view.measure].name} ${MEASURES[view.measure].text(value)}`);
  }

  function scale() {
    return scaleOf(role()[view.measure], view.log, 0);
  }

  function draw() {
    if (!view.data || view.gone) return;
    const range = scale();
    const colours = ramp(isDark());
    map.draw(rowsOf(), role().steps, range ?? { at: () => 0 }, colours);
    const text = MEASURES[view.measure].text;
    const strip = h("span", { class: "heat-ramp" }, colours.filter((_, i) => i % 8 === 0).map((colour) => h("i", { style: { background: colour } })));
    if (range) replace(legend, h("span", null, text(range.low)), strip, h("span", null, text(range.high)));
    else replace(legend, h("span", null, "not measured for this adapter"));
    if (!map.box.querySelector(".heat-frame").hidden) map.chosen(map.at.row, map.at.column);
  }

  function filled() {
    if (!table.open || !view.data) return;
    replace(table.lastElementChild, valueTable(rowsOf(), layers(), role().steps, MEASURES[view.measure].text));
  }

  function redraw() {
    draw();
    filled();
    const newest = role().change.at(-1);
    const kind = role().rank === null ? role().kind : `${role().kind}, rank ${role().rank}`;
    setText(about, `${kind} · ${integer(role().paths.length)} layers, measured ${integer(role().steps.length)} times`);
    replace(lists, topTable(layers(), newest), kindTable(layers(), newest));
  }

  function set(name, value) {
    view[name] = value;
    redraw();
  }

  function drawTools() {
    const names = Object.keys(view.data);
    const choice = (text, name, options, testid) => {
      const control = select(options, (value) => set(name, value), testid);
      control.value = view[name];
      return field(text, control);
    };
    replace(tools,
      names.length > 1 && choice("Adapter", "role", names.map((name) => [name, name]), "health-role"),
      choice("Value", "measure", Object.entries(MEASURES).map(([key, one]) => [key, one.name]), "health-measure"),
      choice("Layers by", "order", [["block", "block"], ["kind", "kind"]], "health-order"),
      check("log scale", view.log, (on) => set("log", on), "health-log"), about);
  }

  async function load() {
    try {
      const { roles } = await getJson(runPath(context.id, "/health"));
      if (view.gone) return;
      const names = Object.keys(roles).filter((name) => roles[name].steps.length > 0);
      show(words, names.length === 0);
      show(whole, names.length > 0);
      setText(words, "Nothing is measured yet. The first checkpoint brings it: how far each layer of the adapter has moved.");
      if (names.length === 0) return;
      const before = JSON.stringify(view.data && Object.keys(view.data));
      view.data = Object.fromEntries(names.map((name) => [name, roles[name]]));
      if (!names.includes(view.role)) view.role = names[0];
      if (before !== JSON.stringify(names) || !tools.firstChild) drawTools();
      redraw();
    } catch (error) {
      if (view.gone) return;
      view.mark = null; // the next news tries again
      show(words, true);
      setText(words, told(error));
    }
  }

  const sized = new ResizeObserver(() => requestAnimationFrame(draw));
  sized.observe(element);
  document.addEventListener("theme", draw);
  load();

  return {
    reload: load,
    update(run) {
      if (newestSave(run) === view.mark) return;
      view.mark = newestSave(run);
      load();
    },
    destroy() {
      view.gone = true;
      sized.disconnect();
      document.removeEventListener("theme", draw);
    },
  };
}

// A measurement comes with each checkpoint.
function newestSave(run) {
  return `${run?.has?.health} ${run?.entries?.findLast((entry) => entry.kind === "saved")?.time}`;
}
