// The chart maker: faint raw values under a strong mean, markers, a cursor in step with its neighbours, zoom, CSV.

import { WORDS } from "./axes.js";
import { trend } from "./curves.js";
import { h, icon, replace, setText, show } from "./dom.js";
import { change, number } from "./format.js";
import { drawLegend, drawValues } from "./legend.js";
import { plotOptions, steer } from "./plot.js";

// place: where it goes. given, once: {id, title, hint, sync (a name shared by charts with one cursor),
// write (value -> text), tick (the same for the axis), zero (y begins at 0), large, onZoom([from, to] | null)}.
// draw(data, look) draws: data = {lines: [{name, label, color: "--series-1", xs, ys, smoothed?, dash?}],
// points: [{name, label, color, xs, ys, shape: "disc" | "ring"}], incidents: [x], resumes: [x],
// empty: text when nothing is there}; look = {xKind: "step" | "clock" | "since" | "level", log, clip,
// range: [from, to] | null}.
export function chart(place, given) {
  const what = {
    write: number,
    ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)),
  };
  const at = { plot: null, shape: "", entries: [], data: null, look: null, hidden: new Set(), rows: [], outside: 0 };
  const parts = frame(what, at);
  replace(place, parts.figure);
  const size = new ResizeObserver(() => {
    const { clientWidth: width, clientHeight: height } = parts.box;
    if (at.plot && width > 0) at.plot.setSize({ width, height });
  });
  size.observe(parts.box);

  function draw(data, look) {
    at.data = data;
    at.look = look;
    const entries = entriesOf(data);
    const joined = joinedData(data);
    const marks = [data.incidents?.length ?? 0, (data.resumes?.length ?? 0) > 0];
    const shape = JSON.stringify([
      entries.map(({ name, label, color, kind }) => [name, label, color, kind]),
      look.xKind,
      look.log,
      marks,
    ]);
    show(parts.empty, joined[0].length === 0);
    setText(parts.empty, data.empty ?? "No values yet.");
    if (shape !== at.shape) build(entries, joined, shape);
    else at.plot.setData(joined);
    drawValues(parts, at, what);
    const words = spoken(what, at, parts);
    if (parts.box.getAttribute("aria-label") !== words) parts.box.setAttribute("aria-label", words);
  }

  function build(entries, joined, shape) {
    at.plot?.destroy();
    at.shape = shape;
    at.entries = entries;
    const options = plotOptions(what, at, {
      width: parts.box.clientWidth || 600,
      height: parts.box.clientHeight || 240,
    });
    options.hooks.setCursor = [() => drawValues(parts, at, what)];
    options.hooks.draw.push(() => setText(parts.foot, at.outside > 0 ? `${at.outside} outside the frame` : ""));
    at.plot = new uPlot(options, joined, parts.canvas);
    drawLegend(parts, at, what);
  }

  const recolour = () => {
    at.shape = "";
    if (at.data) draw(at.data, at.look);
  };
  document.addEventListener("theme", recolour);

  return {
    draw,
    figure: parts.figure,
    width: () => parts.box.clientWidth,
    destroy() {
      size.disconnect();
      document.removeEventListener("theme", recolour);
      at.plot?.destroy();
      at.plot = null;
    },
  };
}

// The chart in words, for those who do not see it: the last value of each curve and where it came from.
function spoken(what, at, parts) {
  const word = WORDS[at.look.xKind];
  const curve = ({ label, xs, ys, smoothed }) => `${label}: ${trend(xs, smoothed ?? ys, word, what.write, change)}`;
  const incidents = at.data.incidents?.length ? [`incidents: ${at.data.incidents.length}`] : [];
  const words = [...at.data.lines.map(curve), ...(at.data.points ?? []).map(curve), ...incidents];
  return `${what.title}. ${words.join("; ") || parts.empty.textContent}`;
}

function frame(what, at) {
  const legend = h("div", { class: "chart-legend", role: "group", "aria-label": `Curves of ${what.title}` });
  const where = h("span", { class: "chart-where" });
  const canvas = h("div", { class: "chart-canvas" });
  const empty = h("p", { class: "chart-empty", hidden: true });
  const foot = h("span", { class: "chart-foot" });
  const box = h(
    "div",
    {
      class: "chart-box",
      role: "img",
      tabindex: "0",
      "aria-label": what.title,
      onkeydown: (event) => steer(event, at, what),
    },
    canvas,
  );
  const save = h(
    "button",
    {
      class: "quiet chart-csv",
      type: "button",
      title: "Download what is drawn as CSV",
      "aria-label": `${what.title} as CSV`,
      onclick: () => download(what, at),
    },
    icon("download"),
  );
  const title = h("h2", { title: what.hint ?? null }, what.title);
  const head = h("div", { class: "chart-head" }, title, where, foot, save);
  const figure = h(
    "figure",
    { class: "chart panel", "data-testid": `chart-${what.id}` },
    head,
    legend,
    h("div", { class: "chart-hold" }, box, empty),
  );
  return { figure, legend, where, canvas, empty, foot, box };
}

function entriesOf(data) {
  const lines = data.lines.flatMap((line) => [
    { name: line.name, label: line.label, color: line.color, kind: line.smoothed ? "faint" : "line", dash: line.dash },
    ...(line.smoothed
      ? [{ name: line.name, label: line.label, color: line.color, kind: "line", dash: line.dash }]
      : []),
  ]);
  return [
    ...lines,
    ...(data.points ?? []).map(({ name, label, color, shape }) => ({ name, label, color, kind: shape })),
  ];
}

const REMAINS = 1; // uPlot.join: a null stays where it is
const EXPANDS = 2; // a null reaches to the curve's next points, whatever other curves have between

// All series over one x, as uPlot wants it: undefined where a series has no point, null where it has a gap.
function joinedData(data) {
  const lines = data.lines.map((line) => (line.smoothed ? [line.xs, line.ys, line.smoothed] : [line.xs, line.ys]));
  const tables = [...lines, ...(data.points ?? []).map((one) => [one.xs, one.ys])];
  if (tables.every(([xs]) => xs.length === 0)) return [[], ...tables.flatMap((table) => table.slice(1).map(() => []))];
  if (tables.length === 1) return tables[0];
  return uPlot.join(
    tables,
    tables.map((table, index) => table.map(() => (index < lines.length ? EXPANDS : REMAINS))),
  );
}

// Text that a table program would take for a formula is marked as text.
function cell(value) {
  const text = typeof value === "string" && /^[=+@\-\t]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function download(what, at) {
  const rows = [["curve", at.look.xKind, "value", "smoothed"]];
  for (const line of [...at.data.lines, ...(at.data.points ?? [])]) {
    line.xs.forEach((x, index) => rows.push([line.label, x, line.ys[index] ?? "", line.smoothed?.[index] ?? ""]));
  }
  const url = URL.createObjectURL(
    new Blob([`${rows.map((row) => row.map(cell).join(",")).join("\n")}\n`], { type: "text/csv" }),
  );
  h("a", { href: url, download: `${what.id}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
