// Curves as the server sends them, and how live points lengthen them; no element is touched here.

// One step's value of a series: "train/loss" is a metric, "seconds/data" a part of the step's time.
export function valueOf(point, name) {
  const value = rawValue(point, name);
  return value === undefined ? undefined : Number.isFinite(value) ? value : null;
}

function rawValue(point, name) {
  if (name === "memory/used") return point.memory ?? undefined;
  if (name === "speed/items") return point.items ? point.items / point.seconds?.total : undefined;
  return name.startsWith("seconds/") ? point.seconds?.[name.slice(8)] : point.metrics?.[name];
}

// A debiased moving mean goes on: s = biased / (1 - β^n), so the biased sum is s (1 - β^n).
function smoother(curve, value, smooth) {
  const count = curve.count ?? curve.values.filter((one) => one !== null).length;
  curve.count = count + 1;
  const before = count > 0 ? curve.latest * (1 - smooth ** count) : 0;
  return (smooth * before + (1 - smooth) * value) / (1 - smooth ** (count + 1));
}

// Prepares curves for lengthening: `latest` is the last smoothed value, `count` how many values stand behind it.
export function opened(series) {
  for (const curve of Object.values(series)) {
    const last = curve.steps.length - 1;
    curve.latest = curve.smoothed?.findLast((value) => value !== null && value !== undefined) ?? 0;
    curve.count =
      last < 0
        ? 0
        : Math.max(curve.values.filter((value) => value !== null).length, curve.steps[last] - curve.steps[0]);
  }
  return series;
}

// Adds live points; what is already there (the server replays after a reconnection) is passed over. Says what changed.
export function lengthen(series, names, points, smooth) {
  const changed = new Set();
  for (const point of points) {
    for (const name of names) {
      const value = valueOf(point, name);
      if (value === undefined) continue;
      series[name] ??= { steps: [], times: [], values: [], smoothed: [], latest: 0, count: 0 };
      const curve = series[name];
      if (curve.steps.length > 0 && point.step <= curve.steps.at(-1)) continue;
      if (value !== null) curve.latest = smoother(curve, value, smooth);
      curve.steps.push(point.step);
      curve.times.push(Math.max(point.time, curve.times.at(-1) ?? 0)); // a clock may be set back
      curve.values.push(value);
      curve.smoothed.push(curve.count > 0 ? curve.latest : null);
      changed.add(name);
    }
  }
  return changed;
}

// With a gap wherever a phase rested, as an expert does in the other's turn: where points lie far apart.
export function rested({ xs, ys, smoothed }) {
  if (xs.length < 3) return { xs, ys, smoothed };
  const widths = Float64Array.from(xs.slice(1), (x, index) => x - xs[index]).sort();
  const wide = 8 * widths[widths.length >> 1];
  const out = { xs: [], ys: [], smoothed: smoothed ? [] : null };
  xs.forEach((x, index) => {
    if (index > 0 && x - xs[index - 1] > wide) {
      out.xs.push((x + xs[index - 1]) / 2);
      out.ys.push(null);
      out.smoothed?.push(null);
    }
    out.xs.push(x);
    out.ys.push(ys[index]);
    out.smoothed?.push(smoothed[index]);
  });
  return out;
}

export function longest(series) {
  return Math.max(0, ...Object.values(series).map((curve) => curve.steps.length));
}

// Where time t lies in steps, between the points of a curve; for asking a range that was drawn on a clock.
export function stepAt(curve, time) {
  const { steps, times } = curve;
  if (steps.length === 0) return null;
  let low = 0;
  let high = times.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (times[middle] <= time) low = middle;
    else high = middle;
  }
  const width = times[high] - times[low];
  const share = width > 0 ? Math.min(1, Math.max(0, (time - times[low]) / width)) : 0;
  return Math.round(steps[low] + share * (steps[high] - steps[low]));
}

// "0.2151 at step 300, 12 % lower than at step 225": what a screen reader hears of a curve.
export function trend(xs, ys, word, write, change) {
  const known = [];
  for (let index = 0; index < ys.length; index += 1)
    if (ys[index] !== null && ys[index] !== undefined) known.push(index);
  if (known.length === 0) return "no values yet";
  const last = known.at(-1);
  const text = `${write(ys[last])} at ${word(xs[last])}`;
  const before = known[Math.floor((known.length - 1) * 0.75)];
  if (before === last || ys[before] === 0) return text;
  return `${text}, ${change(ys[last] / ys[before] - 1)} since ${word(xs[before])}`;
}
