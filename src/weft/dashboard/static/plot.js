// How uPlot is told to draw a chart: series, ranges, gaps, marks, zoom.

import { axes, tick, tokens, xRange, yRange } from "./axes.js";

export function plotOptions(what, at, { width, height }) {
  const token = tokens();
  const { look, entries } = at;
  return {
    width,
    height,
    padding: [8, 24, 0, 0],
    legend: { show: false },
    scales: {
      x: { time: look.xKind === "clock", range: (_plot, low, high) => xRange(low, high, at.look.range) },
      y: { distr: look.log ? 3 : 1, range: (plot) => visibleRange(plot, at, what) },
    },
    axes: axes(token, look.xKind, what.tick ?? tick, what.inBytes),
    series: [{}, ...entries.map((entry) => seriesOptions(entry, token, at))],
    cursor: cursorOptions(what),
    hooks: { draw: [(plot) => drawMarks(plot, at, token)], setSelect: [(plot) => zoomed(plot, what)] },
  };
}

// y from what is drawn between the ends of x; counts what lies outside of it.
function visibleRange(plot, at, what) {
  const xs = plot.data[0];
  const [from, to] = at.look.range ?? [xs[0], xs.at(-1)]; // the plot's own x scale is set only after this
  const first = xs.findIndex((x) => x >= from);
  const last = xs.findLastIndex((x) => x <= to);
  const seen = { raw: [], strong: [], marks: [] };
  const kinds = { faint: "raw", line: "strong", disc: "marks", ring: "marks" };
  at.entries.forEach(({ kind }, index) => {
    if (plot.series[index + 1]?.show === false) return;
    for (let one = Math.max(0, first); one <= last; one += 1) {
      const value = plot.data[index + 1][one];
      if (value !== null && value !== undefined) seen[kinds[kind]].push(value);
    }
  });
  const limits = yRange({ ...seen, clip: at.look.clip, log: at.look.log, zero: what.zero });
  at.outside = [...seen.raw, ...seen.strong].filter((value) => value < limits[0] || value > limits[1]).length;
  return limits;
}

function seriesOptions(entry, token, at) {
  const color = token(entry.color);
  const shown = !at.hidden.has(entry.name);
  const isolated = (plot, index) => alone(plot.data[index], plot.series[index].idxs);
  const lone = (size, stroke) => ({ show: false, size, filter: isolated, stroke, fill: color });
  if (entry.kind === "faint") return { show: shown, stroke: `${color}48`, width: 1, points: lone(5, `${color}a0`) };
  if (entry.kind === "line")
    return { show: shown, stroke: color, width: 1.75, dash: entry.dash, points: lone(7, color) };
  const ring = entry.kind === "ring";
  const points = {
    show: true,
    size: 8,
    width: 1.5,
    stroke: ring ? color : token("--panel"),
    fill: ring ? token("--panel") : color,
  };
  return { show: shown, stroke: `${color}b0`, width: 1, dash: ring ? [2, 4] : [6, 4], points };
}

// Values that no line reaches: those between two gaps, or the only one.
function alone(values, [first, last]) {
  const found = [];
  let before = null;
  let run = 0;
  for (let index = first; index <= last; index += 1) {
    const value = values[index];
    if (value === undefined) continue;
    if (value === null) {
      if (run === 1) found.push(before);
      run = 0;
    } else {
      run += 1;
      before = index;
    }
  }
  if (run === 1) found.push(before);
  return found;
}

// Neighbours follow the cursor; a zoom is told by the chart that was dragged, once.
const shared = (kind) => kind === "mousemove" || kind === "mouseleave";

function cursorOptions(what) {
  return {
    y: false,
    points: { size: 7, width: 1.5 },
    drag: { x: true, y: false, setScale: false, dist: 4 },
    sync: what.sync
      ? { key: what.sync, scales: ["x", null], setSeries: false, filters: { pub: shared, sub: () => true } }
      : undefined,
    bind: { dblclick: () => () => void what.onZoom?.(null) },
  };
}

function zoomed(plot, what) {
  const { left, width } = plot.select;
  if (width < 4) return;
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  what.onZoom?.([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
}

function drawMarks(plot, at, token) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  const inside = (x) => x >= plot.scales.x.min && x <= plot.scales.x.max;
  ctx.save();
  ctx.strokeStyle = token("--muted");
  ctx.lineWidth = ratio;
  ctx.setLineDash([2 * ratio, 3 * ratio]);
  for (const x of (at.data.resumes ?? []).filter(inside)) {
    const left = Math.round(plot.valToPos(x, "x", true)) + 0.5;
    ctx.beginPath();
    ctx.moveTo(left, bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.fillStyle = token("--bad");
  for (const x of (at.data.incidents ?? []).filter(inside)) {
    const left = plot.valToPos(x, "x", true);
    const bottom = bbox.top + bbox.height;
    ctx.beginPath();
    ctx.moveTo(left, bottom - 10 * ratio);
    ctx.lineTo(left + 5 * ratio, bottom - 1);
    ctx.lineTo(left - 5 * ratio, bottom - 1);
    ctx.fill();
  }
  ctx.restore();
}

// The chart by keyboard: arrows move the cursor, + and - zoom about it, 0 shows all.
export function steer(event, at, what) {
  const { plot } = at;
  if (!plot || plot.data[0].length === 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const { min, max } = plot.scales.x;
  const middle = plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : (min + max) / 2;
  const zoom = (factor) => what.onZoom?.([middle - (middle - min) * factor, middle + (max - middle) * factor]);
  const width = plot.over.clientWidth;
  const move = (pixels) => {
    const left = (plot.cursor.left < 0 ? width : plot.cursor.left) + pixels;
    plot.setCursor({ left: Math.min(width - 1, Math.max(0, left)), top: plot.over.clientHeight / 2 });
  };
  const acts = {
    ArrowLeft: () => move(event.shiftKey ? -width / 10 : -width / 200),
    ArrowRight: () => move(event.shiftKey ? width / 10 : width / 200),
    "+": () => zoom(0.5),
    "-": () => zoom(2),
    0: () => what.onZoom?.(null),
    Escape: () => what.onZoom?.(null),
  };
  if (!acts[event.key]) return;
  event.preventDefault();
  event.stopPropagation();
  acts[event.key]();
}
