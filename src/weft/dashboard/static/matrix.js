// The continual matrix: how well a model that has learned up to one experience does on each, later ones too.

import { getJson, runPath } from "./api.js";
import { h, replace, setText, show } from "./dom.js";
import { NONE } from "./format.js";
import { dataTable, empty, part, region, select, told } from "./parts.js";

const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const known = (values) => values.filter((value) => Number.isFinite(value));
const shown = (value) => (Number.isFinite(value) ? value.toFixed(3) : NONE);
const signed = (value) => (Number.isFinite(value) ? `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}` : NONE);

// Of one row: the mean over what was learned, and how that differs from when each was new.
// Lopez-Paz and Ranzato 2017, arXiv:1706.08840, eq. 2 and 3, here after each experience.
export function averages(rows, experiences, index) {
  const { learned, values } = rows[index];
  const kept = experiences.slice(0, Math.max(0, learned - 1)).flatMap((name, j) => {
    const then = rows.find((row) => row.after === name);
    return then && Number.isFinite(values[j]) && Number.isFinite(then.values[j]) ? [values[j] - then.values[j]] : [];
  });
  return { learned: mean(known(values.slice(0, learned))), change: mean(kept) };
}

function cell(value, kind, scale) {
  const aside = { now: ", just learned", future: ", not learned yet", past: "" }[kind];
  const share = Number.isFinite(value) ? Math.round(6 + 34 * scale(value)) : 0;
  return h("td", { class: `num cell ${kind}`, style: { "--share": `${share}%` } }, shown(value), aside && h("span", { class: "visually-hidden" }, aside));
}

function matrixTable(metric, experiences, { rows, untrained }) {
  const all = known(rows.flatMap((row) => row.values));
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const scale = (value) => (high > low ? (value - low) / (high - low) : 1);
  const columns = [["after learning", null], ...experiences.map((name) => [h("span", { title: name }, name), "num"]), ["mean learned", "num mean"], ["since new", "num mean"]];
  const kind = (row, j) => (j >= row.learned ? "future" : experiences[j] === row.after ? "now" : "past");
  const cells = (row) => experiences.map((_, j) => cell(row.values[j], kind(row, j), scale));
  const lines = rows.map((row, i) => {
    const { learned, change } = averages(rows, experiences, i);
    return [row.after, ...cells(row), shown(learned), signed(change)];
  });
  if (untrained) lines.unshift({ cells: [untrained.after, ...cells(untrained), NONE, NONE], class: "untrained" });
  return dataTable({ caption: `${metric}: rows after learning an experience, columns measured on each`, visible: false, columns, rows: lines, testid: "matrix-table", look: "matrix" });
}

export function mount(element, context) {
  const words = empty("Reading …");
  const choice = h("div", { class: "matrix-metric", hidden: true });
  const place = region("Continual matrix");
  const legend = h("p", { class: "muted matrix-key", hidden: true },
    h("span", { class: "key-mark now" }), "just learned ", h("span", { class: "key-mark past" }), "learned before ", h("span", { class: "key-mark future" }), "not learned yet. ",
    "Mean learned: over all learned so far. Since new: how these differ, on average, from when each was just learned.");
  replace(element, part("What was learned, what was kept", "matrix", words, choice, place, legend));
  const view = { gone: false, last: newestScore(context.run), metric: null, metrics: "", scores: null };

  function draw() {
    const { scores } = view;
    const metric = view.metric in scores.metrics ? view.metric : scores.metric;
    const some = metric !== null;
    setText(words, some ? `${metric}: columns say on which experience it was measured.` : "No experience has been scored yet.");
    words.className = some ? "muted" : "empty";
    show(legend, some);
    show(place, some);
    offer(Object.keys(scores.metrics), metric);
    if (some) replace(place, matrixTable(metric, scores.experiences, scores.metrics[metric]));
  }

  // Drawn anew only when another metric is there, so that a list that is open stays open.
  function offer(metrics, chosen) {
    show(choice, metrics.length > 1);
    if (view.metrics === metrics.join("\n")) return;
    view.metrics = metrics.join("\n");
    const list = select(metrics.map((name) => [name, name]), (name) => { view.metric = name; draw(); }, "matrix-metric", "Metric");
    list.value = chosen;
    replace(choice, list);
  }

  async function load() {
    try {
      const scores = await getJson(runPath(context.id, "/scores"));
      if (view.gone) return;
      view.scores = scores;
      draw();
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
