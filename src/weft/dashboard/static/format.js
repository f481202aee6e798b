// Numbers, durations, bytes and times as a reader wants them; null is an em dash everywhere.

export const NONE = "—";

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function integer(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en-US").replaceAll(",", "\u202f") : NONE;
}

// Four significant digits: a loss, a norm.
export function number(value, digits = 4) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(Math.max(1, digits - 2)).replace("e+", "e");
  if (size >= 10 ** digits) return integer(value);
  return value.toPrecision(digits);
}

// A learning rate, as one writes it in a config: 5e-5, 1.25e-4, 0.001.
export function rate(value) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e-3) return String(Number(value.toPrecision(4)));
  return value.toExponential(3).replace(/\.?0+e/, "e");
}

export function percent(share, digits = 0) {
  return isNumber(share) ? `${(share * 100).toFixed(digits)}\u202f%` : NONE;
}

// A change with its sign: −42 %.
export function change(share) {
  if (!isNumber(share)) return NONE;
  const points = Math.abs(share * 100);
  const text = `${points >= 10 ? points.toFixed(0) : points.toFixed(1)}\u202f%`;
  return `${share > 0 ? "+" : share < 0 ? "−" : ""}${text}`;
}

export function bytes(value) {
  if (!isNumber(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? size : size >= 100 ? size.toFixed(0) : size.toFixed(1)} ${units[unit]}`;
}

// A tick's bytes, without a zero that says nothing: 512 MiB, 1.5 GiB.
export function roundBytes(value) {
  return bytes(value).replace(".0 ", " ");
}

// 40.0 of 140 GiB, the unit once where both have the same.
export function bytesOf(part, whole) {
  if (!isNumber(part)) return NONE;
  if (!(whole > 0)) return bytes(part);
  const [mine, all] = [bytes(part), bytes(whole)];
  const unit = ` ${all.split(" ")[1]}`;
  return `${mine.endsWith(unit) ? mine.slice(0, -unit.length) : mine} of ${all}`;
}

// Exact to two units: 45 s, 14 min 05 s, 3 h 20 min, 2 d 4 h.
export function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  const whole = Math.max(0, Math.round(seconds));
  const two = (value) => String(value).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

// No finer than it is known: "14 min", "3 h 20 min".
export function roughly(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 10) return "a few seconds";
  if (seconds < 90) return `${Math.round(seconds / 5) * 5} s`;
  if (seconds < 3570) return `${Math.round(seconds / 60)} min`;
  if (seconds < 10 * 3600) {
    const steps = Math.round(seconds / 300) * 5;
    return `${Math.floor(steps / 60)} h ${String(steps % 60).padStart(2, "0")} min`;
  }
  if (seconds < 48 * 3600) return `${Math.round(seconds / 3600)} h`;
  const hours = Math.round(seconds / 3600);
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// Seconds for one step, or steps for one second when they are quick.
export function pace(secondsPerStep) {
  if (!isNumber(secondsPerStep)) return NONE;
  if (secondsPerStep >= 100) return `${secondsPerStep.toFixed(0)} s`;
  if (secondsPerStep >= 0.1) return `${secondsPerStep.toPrecision(3)} s`;
  return `${(secondsPerStep * 1000).toPrecision(3)} ms`;
}

const two = (value) => String(value).padStart(2, "0");

// Seconds since 1970 in local time: 14:02 today, 11-20 14:02 this year, else 2025-11-21 14:02.
export function clock(time, withSeconds = false) {
  if (!isNumber(time)) return NONE;
  const date = new Date(time * 1000);
  const now = new Date();
  const hours = `${two(date.getHours())}:${two(date.getMinutes())}${withSeconds ? `:${two(date.getSeconds())}` : ""}`;
  if (date.toDateString() === now.toDateString()) return hours;
  const year = date.getFullYear() === now.getFullYear() ? "" : `${date.getFullYear()}-`;
  return `${year}${two(date.getMonth() + 1)}-${two(date.getDate())} ${hours}`;
}

export function ago(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 5) return "now";
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} d ago`;
}

// The share of the whole that is done, 0..1, or null: in steps, else in the phase's own units.
export function progressOf(run) {
  const counted =
    ["starting", "caching"].includes(run.phase ?? run.state) || ["starting", "caching"].includes(run.state);
  if (counted && isNumber(run.done) && run.total > 0) return Math.min(1, run.done / run.total);
  if (run.total_steps > 0 && isNumber(run.step)) return Math.min(1, run.step / run.total_steps);
  return null;
}

export function capital(word) {
  return word ? word[0].toUpperCase() + word.slice(1) : "";
}
