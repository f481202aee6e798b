// Several runs beside each other: final numbers, curves in one chart, what differs in the config, samples of one step.

import { getJson, getSeries, runPath } from "./api.js";
import { chart } from "./charts.js";
import { folded, written } from "./config.js";
import { h, icon, replace, setText, show } from "./dom.js";
import { capital, integer, NONE, number, pace } from "./format.js";
import { live } from "./live.js";
import { check, chip, dataTable, empty, field, part, region, select, told } from "./parts.js";
import { gridOf, shapeOf } from "./samples.js";
import { keep, makeLoader, makeTransport, named, still, tile } from "./tiles.js";
import { openViewer } from "./viewer.js";

const SMOOTH = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999];
const DASHES = [undefined, [8, 4], [2, 3]]; // from the ninth run on the colours come again, dashed
const RATE = /\/lr(_\d+)?$/; // a planned number has no noise to smooth
const MOST = 24; // runs in one page
const AGAIN = 5000; // ms between two readings of a run that goes on

const lineOf = (index) => ({ color: `--series-${(index % 8) + 1}`, dash: DASHES[Math.floor(index / 8) % 3] });
const swatch = (index) => h("i", { class: `swatch dash-${Math.floor(index / 8) % 3}`, style: { "--color": `var(${lineOf(index).color})` } });

function asked(query) {
  const smooth = Number(query.get("smooth") ?? 0.9);
  return {
    runs: [...new Set(query.getAll("runs"))].slice(0, MOST),
    metrics: query.getAll("m"),
    smooth: smooth >= 0 && smooth < 1 ? smooth : 0.9,
    x: query.get("x") === "time" ? "time" : "step",
    log: query.has("log"),
    step: query.has("step") ? Number(query.get("step")) : null,
  };
}

function hashOf({ runs, metrics, smooth, x, log, step }) {
  const query = new URLSearchParams([...runs.map((id) => ["runs", id]), ...metrics.map((name) => ["m", name])]);
  if (smooth !== 0.9) query.set("smooth", String(smooth));
  if (x === "time") query.set("x", x);
  if (log) query.set("log", "1");
  if (step !== null) query.set("step", String(step));
  return `#/compare?${query}`;
}

function best(run) {
  return (run.evaluations ?? []).filter((one) => one.loss !== null).reduce((low, one) => (low === null || one.loss < low.loss ? one : low), null);
}

function numbersTable(runs, remove) {
  const columns = [["Run", null], ["state", null], ...["step", "loss, smoothed", "best validation", "at step", "without adapter", "per step"].map((text) => [text, "num"]), ["", null]];
  const rows = runs.map((run, index) => {
    const low = best(run);
    const several = Object.keys(run.losses ?? {}).length > 1;
    const losses = Object.entries(run.losses ?? {}).map(([phase, loss]) => (several ? `${phase} ${number(loss)}` : number(loss))).join(", ");
    const away = h("button", { type: "button", class: "quiet", "aria-label": `Take ${run.id} away`, "data-testid": "compare-remove", onclick: () => remove(run.id) }, icon("close"));
    const name = [swatch(index), h("a", { href: `#/run/${encodeURIComponent(run.id)}`, "data-testid": "compare-run" }, run.id)];
    const state = h("span", { class: `state-word ${run.state}` }, icon(run.state), " ", capital(run.state));
    return [name, state, integer(run.step), losses || NONE, number(low?.loss), integer(low?.step), number(low?.baseline), pace(run.seconds_per_step), away];
  });
  return dataTable({ caption: "Final numbers", visible: false, columns, rows, testid: "compare-numbers" });
}

function differenceTable({ runs, differing, same }) {
  const columns = [["Key", "mono"], ...runs.map((id, i) => [[swatch(i), id], "mono"])];
  const rows = differing.map(({ key, values }) => [key, ...values.map((value) => (value === null ? NONE : folded(written(value))))]);
  const count = h("p", { class: "muted" }, differing.length === 0 ? `All ${integer(same)} keys are the same.` : `${integer(differing.length)} keys differ, ${integer(same)} are the same.`);
  if (differing.length === 0) return [count];
  return [count, region("What differs in the config", dataTable({ caption: "Config keys that differ", visible: false, columns, rows, testid: "compare-config", look: "config" }))];
}

// Samples of one step in all runs: of each the newest at or before it, else its base.
function samplesPart(grids, shape, chosenStep, slid) {
  const transport = makeTransport();
  const loader = makeLoader(transport.clock);
  const steps = [...new Set(grids.flatMap(({ grid }) => grid.columns.map((one) => one.key)))].filter((key) => key !== "base").map(Number).sort((a, b) => a - b);
  const holders = (row) => grids.filter(({ grid }) => grid.rows.some((one) => one.key === row.key)).length;
  const rows = [...new Map(grids.flatMap(({ grid }) => grid.rows.map((row) => [row.key, row]))).values()].sort((a, b) => holders(b) - holders(a));
  const slider = h("input", { type: "range", min: "0", max: String(Math.max(0, steps.length - 1)), step: "1", "aria-label": "Step", "data-testid": "compare-step", oninput: moved });
  const text = h("output", { class: "num" });
  const head = h("tr", null);
  const body = h("tbody", null);
  const cells = new Map();
  const lines = new Map();
  let step = chosenStep ?? steps.at(-1) ?? 0;
  slider.value = String(Math.max(0, steps.findLastIndex((one) => one <= step)));

  const upTo = (grid) => grid.columns.filter((one) => one.key === "base" || Number(one.key) <= step);
  const columns = () => grids.map(({ id, grid }) => ({ key: id, label: `${id} · ${upTo(grid).at(-1)?.label ?? "nothing yet"}`, grid }));
  const innerOf = (row, column) => upTo(column.grid).findLast((one) => column.grid.cellOf(row, one) !== undefined);
  const cellOf = (row, column) => {
    const inner = innerOf(row, column);
    return inner && column.grid.cellOf(row, inner);
  };

  function moved() {
    step = steps[Number(slider.value)];
    slid(step);
    draw();
  }

  function cell(row, column) {
    const inner = innerOf(row, column);
    const key = `${row.key} ${column.key} ${inner?.key}`;
    if (cells.has(key)) return cells.get(key);
    const sample = cellOf(row, column);
    const open = () => openViewer({ rows, columns: columns(), cellOf, row: rows.indexOf(row), column: grids.findIndex(({ id }) => id === column.key), reference: grids[0].id });
    const inside = tile(sample, loader);
    const made = h("td", null, h("div", { class: "muted" }, inner?.label ?? NONE), sample ? h("button", { type: "button", class: "tile", "data-testid": "sample", onclick: open }, named(inside, column.label)) : inside);
    cells.set(key, made);
    return made;
  }

  function draw() {
    const now = columns();
    setText(text, steps.length ? `at step ${integer(step)} or the nearest before` : "");
    replace(head, h("th", { scope: "col" }, "Prompt"), now.map((column, i) => h("th", { scope: "col" }, swatch(i), column.key)));
    keep(body, rows.map((row) => {
      if (!lines.has(row.key)) lines.set(row.key, h("tr", null, h("th", { scope: "row" }, h("div", { class: "prompt" }, row.prompt), h("div", { class: "muted" }, `seed ${row.seed}`))));
      const line = lines.get(row.key);
      keep(line, [line.firstElementChild, ...now.map((column) => cell(row, column))]);
      return line;
    }));
  }
  draw();
  const kinds = new Set(grids.flatMap(({ grid }) => grid.rows.flatMap((row) => grid.columns.map((column) => grid.cellOf(row, column)?.kind))));
  show(transport.element, kinds.has("video"));
  const table = h("table", { class: `grid compare-samples${kinds.has("text") ? " texts" : ""}`, style: { "--count": String(grids.length), "--shape": shape ?? "16 / 9" }, "data-testid": "compare-samples" }, h("caption", { class: "visually-hidden" }, "Samples: prompts by runs"), h("thead", null, head), body);
  const bar = h("div", { class: "step-bar some always" }, slider, text);
  const box = region("Samples", table);
  box.classList.add("samples");
  if (!still() && kinds.has("video")) transport.clock.play();
  const element = [h("div", { class: "tools" }, transport.element, steps.length > 1 && bar), box];
  return { element: rows.length ? element : [empty("None of these runs has made samples yet.")], close: loader.close };
}

export function mount(element, context) {
  const at = { ...asked(context.query ?? new URLSearchParams()), known: new Map(), all: [], charts: new Map(), samples: null, range: null, gone: false, notice: "", turn: 0, timer: 0, stale: new Set() };
  const add = select([], (id) => id && go({ runs: [...at.runs, id] }), "compare-add", "Add a run");
  const words = h("p", { class: "empty", role: "status" }, "Reading …");
  const numbers = region("Final numbers");
  const metrics = h("div", { class: "chips metrics", role: "group", "aria-label": "Curves" });
  const smooth = h("input", { type: "range", min: "0", max: String(SMOOTH.length - 1), "aria-label": "Smoothing", "data-testid": "compare-smooth", oninput: (event) => go({ smooth: SMOOTH[Number(event.target.value)] }) });
  const smoothText = h("output", { class: "num" });
  const x = select([["step", "step"], ["time", "time since the start"]], (value) => go({ x: value }), "compare-x");
  const log = check("log scale", at.log, (on) => go({ log: on }), "compare-log");
  const tools = h("div", { class: "tools" }, field("Smoothing", smooth, smoothText), field("by", x), log);
  const charts = h("div", { class: "compare-charts" });
  const difference = h("div", null);
  const samples = h("div", null);
  const whole = [part(null, "compare-runs", numbers), part("Curves", "compare-curves", metrics, tools, charts), part("Config", "compare-difference", difference), part("Samples", "samples", samples)];
  for (const one of whole) show(one, false);
  replace(element, h("div", { class: "part-head" }, h("h1", null, "Compare"), add), words, whole);

  function go(changes) {
    const runs = at.runs;
    Object.assign(at, changes);
    if (changes.x) at.range = null;
    history.replaceState(history.state, "", hashOf(at));
    if (at.runs !== runs) load();
    else drawCurves();
  }

  const runs = () => at.runs.map((id) => at.known.get(id)).filter(Boolean);

  async function read(id) {
    at.known.set(id, await getJson(runPath(id)));
  }

  async function load() {
    at.turn += 1;
    const mine = at.turn;
    try {
      at.all = (await getJson("/api/runs")).runs;
      const there = at.runs.filter((id) => at.all.some((run) => run.id === id));
      const lost = at.runs.filter((id) => !there.includes(id));
      await Promise.all(there.filter((id) => !at.known.has(id)).map(read));
      if (at.gone || mine !== at.turn) return;
      at.runs = there;
      context.title?.(`Compare ${there.join(", ")}`);
      drawPicker();
      at.notice = lost.length ? `Not there any more: ${lost.join(", ")}.` : there.length < 2 ? "Choose at least two runs to compare." : "";
      say(at.notice);
      for (const one of whole) if (there.length === 0) show(one, false);
      if (there.length === 0) return;
      // From above to below, each part once it is filled, so that nothing that is seen moves.
      for (const [index, fill] of [drawNumbers, drawCurves, () => drawDifference(mine), () => drawSamples(mine)].entries()) {
        await fill();
        if (at.gone || mine !== at.turn) return;
        show(whole[index], true);
      }
    } catch (error) {
      if (!at.gone) say(told(error));
    }
  }

  function drawPicker() {
    const others = at.all.filter((run) => !at.runs.includes(run.id));
    replace(add, h("option", { value: "" }, others.length ? "Add a run …" : "All runs are here"), others.map((run) => h("option", { value: run.id }, run.id)));
    add.disabled = others.length === 0 || at.runs.length >= MOST;
  }

  // What was focused is so again, or what came in its place.
  function drawNumbers() {
    const reachable = () => [...numbers.querySelectorAll("a, button")];
    const focused = reachable().indexOf(document.activeElement);
    replace(numbers, numbersTable(runs(), (id) => go({ runs: at.runs.filter((one) => one !== id) })));
    if (focused >= 0) (reachable()[focused] ?? add).focus();
  }

  function say(text) {
    show(words, text !== "");
    setText(words, text);
  }

  function chosenMetrics(all) {
    const given = at.metrics.filter((name) => all.includes(name));
    if (given.length > 0) return given;
    const losses = all.filter((name) => name.endsWith("/loss"));
    return (losses.length ? losses : all).slice(0, 4);
  }

  function turnMetric(name, chosen) {
    go({ metrics: chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name] });
  }

  async function drawCurves() {
    const all = [...new Set(runs().flatMap((run) => run.series))].sort((a, b) => b.endsWith("/loss") - a.endsWith("/loss"));
    const chosen = chosenMetrics(all);
    const buttons = all.map((name) => chip(name, () => turnMetric(name, chosen), { "data-name": name, "aria-pressed": String(chosen.includes(name)) }));
    const focused = metrics.contains(document.activeElement) ? document.activeElement.dataset.name : null;
    replace(metrics, buttons);
    buttons.find((button) => button.dataset.name === focused)?.focus();
    smooth.value = String(SMOOTH.findLastIndex((one) => one <= at.smooth));
    setText(smoothText, String(at.smooth));
    smooth.setAttribute("aria-valuetext", String(at.smooth));
    x.value = at.x;
    log.firstChild.checked = at.log;
    for (const [name, one] of at.charts) if (!chosen.includes(name)) drop(name, one);
    for (const name of chosen) if (!at.charts.has(name)) addChart(name);
    keep(charts, chosen.map((name) => at.charts.get(name).place));
    at.asking?.abort();
    at.asking = new AbortController();
    const zoom = at.x === "step" && at.range ? { from: Math.floor(at.range[0]), to: Math.ceil(at.range[1]) } : {};
    const answers = await Promise.all(runs().map((run) => seriesOf(run, chosen, zoom, at.asking.signal)));
    if (at.gone || answers.includes(null)) return;
    say(at.notice);
    chosen.forEach((name) => drawChart(name, answers));
  }

  async function seriesOf(run, chosen, zoom, signal) {
    const names = chosen.filter((name) => run.series.includes(name));
    if (names.length === 0) return {};
    try {
      return (await getSeries(run.id, { names, points: 1200, smooth: at.smooth, ...zoom }, signal)).series;
    } catch (error) {
      if (error.name !== "AbortError") say(told(error));
      return null; // what is drawn stays
    }
  }

  function addChart(name) {
    const place = h("div", null);
    const onZoom = (range) => {
      at.range = range;
      drawCurves();
    };
    at.charts.set(name, { place, chart: chart(place, { id: name.replaceAll("/", "-"), title: name, sync: "compare", onZoom }) });
  }

  function drop(name, one) {
    one.chart.destroy();
    at.charts.delete(name);
  }

  function drawChart(name, answers) {
    const lines = runs().flatMap((run, index) => {
      const curve = answers[index]?.[name];
      if (!curve) return [];
      const xs = at.x === "step" ? curve.steps : curve.times.map((time) => time - run.started_at);
      return [{ name: run.id, label: run.id, ...lineOf(index), xs, ys: curve.values, smoothed: at.smooth > 0 && !RATE.test(name) ? curve.smoothed : undefined }];
    });
    at.charts.get(name)?.chart.draw({ lines, empty: "None of these runs has it yet." }, { xKind: at.x === "step" ? "step" : "since", log: at.log, clip: true, range: at.range });
  }

  async function drawDifference(mine) {
    const answer = await getJson(`/api/compare?${new URLSearchParams(at.runs.map((id) => ["runs", id]))}`);
    if (!at.gone && mine === at.turn) replace(difference, differenceTable(answer));
  }

  async function drawSamples(mine) {
    const grids = await Promise.all(at.runs.map(async (id) => ({ id, grid: gridOf((await getJson(runPath(id, "/samples"))).samples) })));
    const shape = await shapeOf(at.runs[0]);
    if (at.gone || mine !== at.turn) return;
    at.samples?.close();
    at.samples = samplesPart(grids, shape, at.step, (step) => {
      at.step = step;
      history.replaceState(history.state, "", hashOf(at));
    });
    replace(samples, at.samples.element);
  }

  // Runs that go on are read again, numbers and curves together.
  async function again() {
    at.timer = 0;
    const stale = [...at.stale].filter((id) => at.runs.includes(id));
    at.stale.clear();
    try {
      await Promise.all(stale.map(read));
    } catch (error) {
      say(told(error));
    }
    if (at.gone || stale.length === 0) return;
    drawNumbers();
    drawCurves();
  }

  function changed(summaries) {
    for (const run of summaries) at.stale.add(run.id);
    at.timer ||= setTimeout(again, AGAIN);
  }

  const stream = live({ hear: { runs: (news) => changed(news.runs), state: (state) => context.connected?.(state) } });
  load();
  return {
    go(here) {
      Object.assign(at, asked(here.query), { range: null });
      load();
    },
    destroy() {
      at.gone = true;
      clearTimeout(at.timer);
      stream.close();
      at.asking?.abort();
      at.samples?.close();
      for (const [name, one] of at.charts) drop(name, one);
    },
  };
}
