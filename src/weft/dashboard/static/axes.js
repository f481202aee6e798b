// Ranges, ticks and colours of the charts.

import { clock, duration, integer } from "./format.js";

const NICE = [1, 2, 5];
const UNITS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400];

const whole = Array.from({ length: 12 }, (_, power) => NICE.map((one) => one * 10 ** power)).flat();
const binary = Array.from({ length: 41 }, (_, power) => 2 ** (power + 10)); // bytes: 512 MiB, 16 GiB
const seconds = [...UNITS, ...whole.map((days) => days * 86_400)];

// The tokens of app.css as the canvas needs them.
export function tokens() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(name).trim();
}

export const WORDS = {
  step: (x) => `step ${integer(x)}`,
  clock: (x) => clock(x, true),
  since: (x) => duration(x),
  level: (x) => `noise ${x}`,
};

function clockTicks(plot, splits) {
  const wide = plot.scales.x.max - plot.scales.x.min > 86_400;
  return splits.map((time) => {
    const date = new Date(time * 1000);
    const two = (value) => String(value).padStart(2, "0");
    const day = `${two(date.getMonth() + 1)}-${two(date.getDate())}`;
    if (wide && date.getHours() === 0 && date.getMinutes() === 0) return day;
    const fine = splits.length > 1 && splits[1] - splits[0] < 60 ? `:${two(date.getSeconds())}` : "";
    return `${wide ? `${day} ` : ""}${two(date.getHours())}:${two(date.getMinutes())}${fine}`;
  });
}

function sinceTicks(_plot, splits) {
  return splits.map((time) =>
    time % 86_400 === 0 && time > 0
      ? `${time / 86_400} d`
      : time % 3600 === 0 && time > 0
        ? `${time / 3600} h`
        : time % 60 === 0
          ? `${time / 60} min`
          : `${time} s`,
  );
}

const X_TICKS = {
  step: { values: (_plot, splits) => splits.map(integer), incrs: whole, space: 72 },
  clock: { values: clockTicks, space: 88 },
  since: { values: sinceTicks, incrs: seconds, space: 72 },
  level: { values: (_plot, splits) => splits.map((x) => String(Number(x.toPrecision(3)))), space: 60 },
};

const FONT = "11px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";

export function axes(token, xKind, writeY, inBytes) {
  const common = { stroke: token("--muted"), font: FONT, ticks: { show: false } };
  const grid = { stroke: token("--line"), width: 1 };
  const x = { ...common, ...X_TICKS[xKind], grid: { show: false }, size: 26, gap: 6 };
  const y = {
    ...common,
    grid,
    size: 58,
    gap: 8,
    space: 34,
    values: (_plot, splits) => splits.map((value) => (value === null ? "" : writeY(value))),
    ...(inBytes ? { incrs: binary } : {}),
  };
  return [x, y];
}

// A tick's number, short: 0.25, 1e-4, 1 200.
export function tick(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  if (size >= 1000) return integer(value);
  return String(Number(value.toPrecision(4)));
}

// x from the data or the zoom; one point stands in the middle of its own small range.
export function xRange(low, high, asked) {
  const [from, to] = asked ?? [low, high];
  if (from === null || from === undefined || !Number.isFinite(from)) return [0, 1];
  if (from === to) return [from - 1, to + 1];
  return [from, to];
}

function sorted(values) {
  return Float64Array.from(values).sort();
}

// Limits of y over what is visible: raw values are faint, strong are their moving means, marks stand alone and are
// always inside. `clip` leaves out the outer 1 % of the raw and 0.4 % of the strong values at each end.
export function yRange({ raw, strong, marks, clip, log, zero }) {
  const usable = (values) => sorted(log ? values.filter((value) => value > 0) : values);
  const ends = [
    [usable(raw), 0.01],
    [usable(strong), 0.004],
    [usable(marks), 0],
  ].flatMap(([values, share]) => {
    const edge = clip && values.length >= 50 ? Math.floor(values.length * share) : 0;
    return values.length > 0 ? [values[edge], values[values.length - 1 - edge]] : [];
  });
  if (ends.length === 0) return log ? [0.1, 1] : [0, 1];
  const low = Math.min(...ends);
  const high = Math.max(...ends);
  if (log) return high > low ? [low * (low / high) ** 0.06, high * (high / low) ** 0.06] : [low / 2, high * 2];
  const pad = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
  if (zero && low >= 0) return [0, high + pad];
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}
