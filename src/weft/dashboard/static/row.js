// One run in the list: state, progress, loss with its sparkline, validation, the newest sample.

import { h, replace, setText, setTitle, svg } from "./dom.js";
import { about, ALIVE, learning, noEta, progressBar, stateSign, stepsText } from "./facts.js";
import { ago, change, clock, number, percent, progressOf, roughly } from "./format.js";

export const firstLoss = (run) => Object.values(run.losses ?? {}).find((loss) => loss !== null) ?? null;
const runHash = (id) => `#/run/${encodeURIComponent(id)}`;

function spark(values) {
  const known = (values ?? []).filter((value) => value !== null);
  if (known.length < 2) return null;
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const y = (value) => (high > low ? 21 - ((value - low) / (high - low)) * 18 : 12).toFixed(1);
  const x = (index) => ((index / (values.length - 1)) * 88).toFixed(1);
  const points = values.flatMap((value, index) => (value === null ? [] : [`${x(index)},${y(value)}`]));
  return svg(
    "svg",
    { class: "spark", viewBox: "0 0 88 24", "aria-hidden": "true", preserveAspectRatio: "none" },
    svg("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }),
  );
}

function thumbnail(path) {
  if (!path) return null;
  if (/\.(png|jpe?g|webp|gif)$/i.test(path)) return h("img", { src: path, alt: "", loading: "lazy" });
  return h("video", {
    "data-src": `${path}#t=0.1`,
    muted: true,
    playsinline: true,
    preload: "metadata",
    "aria-hidden": "true",
    tabindex: "-1",
  });
}

// Loads the videos of rows that are near the window.
export function lazily() {
  const watch = new IntersectionObserver(
    (seen) => {
      for (const { target, isIntersecting } of seen) {
        if (!isIntersecting) continue;
        watch.unobserve(target);
        target.src = target.dataset.src;
      }
    },
    { rootMargin: "200px" },
  );
  return watch;
}

export function row(run, { onChoose, watch }) {
  const state = stateSign();
  const choose = h("input", {
    type: "checkbox",
    "aria-label": `Choose ${run.name} for comparison`,
    onchange: () => onChoose(run.id, choose.checked),
  });
  const link = h("a", { href: runHash(run.id), "data-row": true });
  const folder = h("span", { class: "row-folder muted" });
  const line = h("span", { class: "row-about muted" });
  const bar = progressBar("Progress");
  const cells = {
    steps: h("span"),
    eta: h("span", { class: "muted", "data-testid": "eta" }),
    loss: h("span", { class: "row-number" }),
    lossNote: h("span", { class: "row-note" }),
    sparkline: h("span", { class: "row-spark" }),
    value: h("span", { class: "row-number" }),
    valueNote: h("span", { class: "row-note" }),
    when: h("span", { class: "row-when muted" }),
    reason: h("span", { class: "row-reason" }),
    thumb: h("span", { class: "row-thumb" }),
  };
  const element = h(
    "li",
    { class: "row", "data-testid": "run-row", "data-id": run.id },
    h("label", { class: "row-choose" }, choose),
    cells.thumb,
    h("div", { class: "row-name" }, h("span", { class: "row-title" }, link, folder), line),
    h("div", { class: "row-state" }, state.element, cells.reason),
    h("div", { class: "row-progress" }, bar.element, h("span", { class: "row-steps" }, cells.steps, cells.eta)),
    h("div", { class: "row-loss" }, h("span", { class: "row-pair" }, cells.loss, cells.lossNote), cells.sparkline),
    h("div", { class: "row-validation" }, cells.value, cells.valueNote),
    cells.when,
  );
  let drawn = {};
  let known = "";

  function update(next, now) {
    const moved = next.updated_at ?? next.started_at;
    setText(cells.when, moved ? ago(now - moved) : "");
    const words = JSON.stringify(next);
    if (words === known) return;
    known = words;
    state.update(next.state);
    setText(link, next.name);
    const parent = next.id.includes("/") ? next.id.slice(0, next.id.lastIndexOf("/")) : "";
    setText(folder, parent && `in ${parent}`);
    setText(line, about(next).join(" · "));
    setTitle(line, [next.family, next.model].filter(Boolean).join(", "));
    setText(cells.reason, ["crashed", "stalled"].includes(next.state) ? next.reason : "");
    setTitle(cells.reason, cells.reason.textContent);
    const share = progressOf(next);
    bar.update(share, next.state, stepsText(next));
    setText(cells.steps, stepsText(next));
    setText(
      cells.eta,
      typeof next.eta === "number"
        ? `${next.eta < 10 ? "seconds" : roughly(next.eta)} left`
        : share === null || !ALIVE.has(next.state)
          ? ""
          : percent(share),
    );
    setTitle(cells.eta, typeof next.eta === "number" ? `Done about ${clock(now + next.eta)}` : noEta(next));
    setText(cells.loss, number(firstLoss(next)));
    setText(cells.lossNote, "loss");
    const learned = learning(next.validation);
    setText(cells.value, learned.value);
    setText(
      cells.valueNote,
      learned.share === null
        ? "validation"
        : Math.abs(learned.share) < 0.0005
          ? "as the base"
          : `${change(learned.share)} to base`,
    );
    setTitle(cells.when, `Started ${clock(next.started_at)}, last word ${clock(next.updated_at)}`);
    redraw(next);
  }

  function redraw(next) {
    const key = (next.spark ?? []).join(",");
    if (drawn.spark !== key) replace(cells.sparkline, spark(next.spark));
    if (drawn.sample !== next.sample) {
      const media = thumbnail(next.sample);
      replace(cells.thumb, media);
      if (media?.dataset.src) watch.observe(media);
    }
    drawn = { spark: key, sample: next.sample };
  }

  return { element, update, link, choose };
}
