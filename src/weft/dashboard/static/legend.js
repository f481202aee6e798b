// The legend of a chart: a button for each curve, with its value at the cursor or the last one, in a fixed place.

import { WORDS } from "./axes.js";
import { h, replace, setText } from "./dom.js";
import { NONE } from "./format.js";

// One button a curve: its mark, its name, its values; pressed means drawn. Marks of incidents and resumes stand behind.
export function drawLegend(parts, at, what) {
  const names = [...new Map(at.entries.map((entry) => [entry.name, entry])).values()];
  at.rows = names.map((entry) => row(entry, at));
  const { incidents = [], resumes = [] } = at.data;
  const notes = [];
  if (incidents.length > 0)
    notes.push(note("incident", incidents.length === 1 ? "1 incident" : `${incidents.length} incidents`));
  if (what.large && resumes.length > 0) notes.push(note("resume", "resumed"));
  replace(
    parts.legend,
    at.rows.map(({ button }) => button),
    notes,
  );
}

function note(kind, text) {
  return h("span", { class: "legend-note" }, h("span", { class: `legend-mark legend-${kind}` }), text);
}

function row(entry, at) {
  const series = at.entries.flatMap((one, index) => (one.name === entry.name ? [index + 1] : []));
  const { kind } = at.entries[series.at(-1) - 1];
  const value = h("span", { class: "legend-value" });
  const raw = series.length > 1 ? h("span", { class: "legend-raw", title: "without smoothing" }) : null;
  const mark = h("span", { class: `legend-mark legend-${kind}`, style: { "--color": `var(${entry.color})` } });
  const pressed = String(!at.hidden.has(entry.name));
  const label = h("span", { class: "legend-label" }, entry.label);
  const button = h(
    "button",
    { class: "legend", type: "button", "aria-pressed": pressed, "data-series": entry.name },
    mark,
    label,
    value,
    raw,
  );
  button.addEventListener("click", () => toggle(at, entry.name, series, button));
  return { series, value, raw, button };
}

function toggle(at, name, series, button) {
  const shown = at.hidden.has(name);
  if (shown) at.hidden.delete(name);
  else at.hidden.add(name);
  button.setAttribute("aria-pressed", String(shown));
  at.plot.batch(() => {
    for (const index of series) at.plot.setSeries(index, { show: shown });
  });
  at.plot.redraw(true, true);
}

// The values at the cursor, else the last ones.
export function drawValues(parts, at, what) {
  const { plot } = at;
  if (!plot) return;
  const xs = plot.data[0];
  const hovered = plot.cursor.left >= 0 && xs[plot.cursor.idx] !== undefined;
  const index = hovered ? plot.cursor.idx : xs.length - 1;
  setText(parts.where, xs.length === 0 ? "" : hovered ? WORDS[at.look.xKind](xs[index]) : "last");
  const text = (series) => {
    const value = near(plot.data[series], index, hovered);
    return value === null ? NONE : what.write(value);
  };
  for (const { series, value, raw } of at.rows) {
    setText(value, text(series.at(-1)));
    if (raw) setText(raw, text(series[0]));
  }
}

// The known value nearest to an index; from the cursor only one that is near.
function near(values, index, hovered) {
  const reach = hovered ? Math.max(40, values.length / 50) : values.length;
  for (let away = 0; away <= reach; away += 1) {
    if (values[index - away] !== undefined) return values[index - away];
    if (hovered && values[index + away] !== undefined) return values[index + away];
  }
  return null;
}
