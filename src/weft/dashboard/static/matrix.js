// The continual matrix: how well a model that has learned up to one experience does on each, later ones too.

import { getJson, runPath } from "./api.js";
import { h, replace, setText, show } from "./dom.js";
import { NONE } from "./format.js";
import { dataTable, empty, part, region, told } from "./parts.js";

const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const known = (values) => values.filter((value) => Number.isFinite(value));
const shown = (value) => (Number.isFinite(value) ? value.toFixed(3) : NONE);
const signed = (value) => (Number.isFinite(value) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}` : NONE);

// Of one row: the mean over what was learned, and how that differs from when each was new.
// Lopez-Paz and Ranzato 2017, arXiv:1706.08840, eq. 2 and 3, here after each experience.
export function averages(rows, experiences, index) {
  const at = experiences.indexOf(rows[index].after);
  const values = rows[index].values;
  const kept = experiences.flatMap((name, j) => {
    const learned = rows.find((row) => row.after === name);
    return j < at && learned && Number.isFinite(values[j]) && Number.isFinite(learned.values[j]) ? [values[j] - learned.values[j]] : [];
  });
  return { learned: mean(known(values.slice(0, at + 1))), change: mean(kept) };
}

function cell(value, column, at, scale) {
  const kind = column === at ? "now" : column > at ? "future" : "past";
  const aside = { now: ", just learned", future: ", not learned yet", past: "" }[kind];
  const share = Number.isFinite(value) ? Math.round(6 + 34 * scale(value)) : 0;
  return h("td", { class: `num cell ${kind}`, style: { "--share": `${share}%` } }, shown(value), aside && h("span", { class: "visually-hidden" }, aside));
}

function matrixTable({ metric, experiences, rows }) {
  const all = known(rows.flatMap((row) => row.values));
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const scale = (value) => (high > low ? (value - low) / (high - low) : 1);
  const columns = [["after learning", null], ...experiences.map((name) => [h("span", { title: name }, name), "num"]), ["mean learned", "num mean"], ["since new", "num mean"]];
  const lines = rows.map((row, i) => {
    const at = experiences.indexOf(row.after);
    const { learned, change } = averages(rows, experiences, i);
    return [row.after, ...experiences.map((_, j) => cell(row.values[j], j, at, scale)), shown(learned), signed(change)];
  });
  return dataTable({ caption: `${metric}: rows after learning an experience, columns measured on each`, visible: false, columns, rows: lines, testid: "matrix-table", look: "matrix" });
}

export function mount(element, context) {
  const words = empty("Reading …");
  const place = region("Continual matrix");
  const legend = h("p", { class: "muted matrix-key", hidden: true },
    h("span", { class: "key-mark now" }), "just learned ", h("span", { class: "key-mark past" }), "learned before ", h("span", { class: "key-mark future" }), "not learned yet. ",
    "Mean learned: over all learned so far. Since new: how these differ, on average, from when each was just learned.");
  replace(element, part("What was learned, what was kept", "matrix", words, place, legend));
  const view = { gone: false, last: newestScore(context.run) };

  async function load() {
    try {
      const scores = await getJson(runPath(context.id, "/scores"));
      if (view.gone) return;
      const some = scores.rows.length > 0;
      setText(words, some ? `${scores.metric}: columns say on which experience it was measured.` : "No experience has been scored yet.");
      words.className = some ? "muted" : "empty";
      show(legend, some);
      show(place, some);
      if (some) replace(place, matrixTable(scores));
    } catch (error) {
      if (view.gone) return;
      view.last = undefined; // the next news tries again
      setText(words, told(error));
    }
  }
  load();
  return {
    update(run) {
      if (newestScore(run) === view.last) return;
      view.last = newestScore(run);
      load();
    },
    destroy() {
      view.gone = true;
    },
  };
}

function newestScore(run) {
  return run?.entries?.findLast((entry) => entry.kind === "scored")?.time ?? null;
}
