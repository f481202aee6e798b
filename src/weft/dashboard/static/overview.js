// The first tab of a run: its curves, its devices, its validation, what happened.

import { clamp, kept, keep, toolbar } from "./toolbar.js";
import { chart } from "./charts.js";
import { lengthen, longest, opened, rested, stepAt } from "./curves.js";
import { h, replace, show } from "./dom.js";
import * as entries from "./entries.js";
import { bytes, capital, pace, rate, roundBytes } from "./format.js";
import * as gpus from "./gpus.js";
import * as matrix from "./matrix.js";
import * as validation from "./validation.js";

const COLORS = 7;
const KNOWN = /(^|\/)(loss|lr(_\d+)?|grad_norm|skipped)$|^(seconds|memory|speed)\//;
const OWN_RANK = /^(seconds|memory|speed)\//;

// The charts of a run: which series each has. The first is the large one.
function chartsOf(run, more) {
  const named = (pattern) => run.series.filter((name) => pattern.test(name));
  const charts = [
    {
      id: "loss",
      title: "Loss",
      hint: "Mean over the items of a step; the strong line is the moving mean",
      names: run.phases.map((phase) => `${phase}/loss`),
      smooth: true,
    },
    { id: "lr", title: "Learning rate", names: named(/\/lr(_\d+)?$/), write: rate, tick: rate },
    {
      id: "grad-norm",
      title: "Gradient norm",
      hint: "Of the whole gradient, before clipping",
      names: named(/\/grad_norm$/),
      smooth: true,
      zero: true,
    },
    {
      id: "seconds",
      title: "Seconds per step",
      hint: "Of the host's clock, with the time that it waited for data",
      names: ["seconds/total", "seconds/data"].filter((name) => run.series.includes(name)),
      smooth: true,
      zero: true,
      write: pace,
      seconds: true,
    },
    {
      id: "speed",
      title: run.medium === "text" ? "Tokens per second" : "Items per second",
      hint: "Of all processes together, without validation, samples and saving",
      names: named(/^speed\//),
      smooth: true,
      zero: true,
    },
    {
      id: "memory",
      title: "Memory",
      hint: "That the process has of its GPU, or of the machine",
      names: named(/^memory\//),
      zero: true,
      write: bytes,
      tick: roundBytes,
      inBytes: true,
    },
  ].filter((one, index) => index === 0 || one.names.length > 0);
  if (!more) return charts;
  const groups = Map.groupBy(
    run.series.filter((name) => !KNOWN.test(name)),
    (name) => name.slice(name.indexOf("/") + 1),
  );
  const rest = [...groups].map(([quantity, names]) => ({
    id: quantity.replaceAll(/[^a-z0-9]+/gi, "-"),
    title: capital(quantity.replaceAll("_", " ").replaceAll("/", ", ")),
    names,
    smooth: true,
  }));
  const parts = named(/^seconds\/(?!total$|data$)/);
  if (parts.length > 0)
    rest.push({
      id: "seconds-parts",
      title: "Seconds by part",
      names: parts,
      smooth: true,
      zero: true,
      write: pace,
      seconds: true,
    });
  return [...charts, ...rest];
}

function labelOf(name, names) {
  if (name.startsWith("seconds/"))
    return { total: "whole step", data: "waiting for data" }[name.slice(8)] ?? name.slice(8);
  if (OWN_RANK.test(name)) return { "memory/used": "used", "speed/items": "learned" }[name];
  const slash = name.indexOf("/");
  const [role, quantity] = [name.slice(0, slash), name.slice(slash + 1)];
  const roles = new Set(names.map((one) => one.slice(0, one.indexOf("/"))));
  if (names.length > roles.size)
    return `${roles.size > 1 ? `${role} ` : ""}${quantity === "lr" ? "group 1" : quantity.replace(/^lr_/, "group ")}`;
  return role;
}

// One colour for one phase, role or optimizer, the same in all charts.
function colorOf(name, run) {
  if (name === "seconds/data") return "--series-2";
  if (name.startsWith("seconds/"))
    return `--series-${1 + ((["total", "data", "forward", "backward", "optimizer"].indexOf(name.slice(8)) + COLORS) % COLORS)}`;
  const [role, quantity] = [name.slice(0, name.indexOf("/")), name.slice(name.indexOf("/") + 1)];
  const index = Math.max(run.phases.indexOf(role), run.optimizers.indexOf(role), 0);
  const second = /^lr_\d+$/.test(quantity) ? Number(quantity.slice(3)) - 1 : 0;
  return `--series-${1 + ((index + second * Math.max(1, run.phases.length)) % COLORS)}`;
}

function whyEmpty(run) {
  if (run.state === "caching")
    return run.total ? `Clips are being encoded: ${run.done ?? 0} of ${run.total}.` : "Clips are being encoded.";
  if (run.state === "starting") return "The model is being loaded; the first step comes after it.";
  if (["finished", "stopped", "crashed"].includes(run.state)) return "The run ended before its first step.";
  if (run.state === "stalled") return "No step yet, and no sign of life.";
  return "The first step is on its way.";
}

export function mount(element, context) {
  const at = {
    run: context.run,
    series: {},
    charts: [],
    shape: "",
    look: { ...kept(), range: null },
    waiting: [],
    loaded: false,
    asked: null,
    over: false,
    frame: 0,
  };
  const bar = toolbar({
    look: at.look,
    run: at.run,
    onLook: looked,
    onSmooth: () => load(),
    onReset: () => zoom(null),
  });
  const large = h("div", { class: "charts-large" });
  const small = h("div", { class: "charts-small" });
  const aside = h("div", { class: "overview-aside" });
  const matrixPlace = h("div", { class: "overview-matrix" });
  const mainPart = h("div", { class: "overview-main" }, bar.element, large);
  replace(element, h("div", { class: "overview" }, mainPart, aside));
  const strip = gpus.mount(mainPart, context);
  mainPart.append(small, matrixPlace);
  const levels = validation.mount(aside);
  const happened = h("div");
  aside.append(happened);
  const panels = [strip, levels, entries.mount(happened, context)];
  let scores = null;
  shape();
  for (const panel of panels) panel.update(at.run);
  load();

  function names() {
    return [...new Set(at.charts.flatMap((one) => one.names))];
  }

  // Makes the charts anew when the run has other series than before.
  function shape() {
    const wanted = chartsOf(at.run, at.look.more);
    const key = JSON.stringify(wanted.map(({ id, names: of }) => [id, of]));
    if (key === at.shape) return false;
    at.shape = key;
    for (const one of at.charts) one.chart.destroy();
    replace(large);
    replace(small);
    at.charts = wanted.map((one, index) => {
      const place = h("div", { class: index === 0 ? "chart-place chart-large" : "chart-place" });
      (index === 0 ? large : small).append(place);
      return {
        ...one,
        chart: chart(place, {
          id: one.id,
          title: one.title,
          hint: one.hint,
          write: one.write,
          tick: one.tick,
          zero: one.zero,
          inBytes: one.inBytes,
          large: index === 0,
          sync: "run",
          onZoom: zoom,
        }),
      };
    });
    if (at.run.has?.scores && !scores) {
      scores = matrix.mount(matrixPlace, context);
      panels.push(scores);
    }
    draw();
    return true;
  }

  async function load() {
    if (names().length === 0) {
      at.loaded = true;
      draw();
      return;
    }
    performance.mark("weft-ask");
    at.asked?.abort();
    const asked = new AbortController();
    at.asked = asked;
    const points = clamp(Math.ceil(at.charts[0].chart.width() || 1200), 400, 3000);
    const range = at.look.range ? stepsOf(at.look.range) : [];
    const [from, to] = range;
    const smooth = at.look.smooth;
    try {
      const answer = await context.api.getSeries(
        context.id,
        { names: names(), from, to, points, smooth, rank: at.look.rank },
        asked.signal,
      );
      if (at.over || asked !== at.asked) return;
      at.series = opened(answer.series);
      at.points = points;
      at.smooth = smooth;
      at.zoomed = at.look.range !== null;
      at.loaded = true;
      at.failed = null;
      append(at.waiting.splice(0));
      draw();
      performance.mark("weft-drawn");
      performance.measure("weft-curves", "weft-ask", "weft-drawn");
    } catch (error) {
      if (error.name === "AbortError" || at.over) return;
      at.failed = error.message;
      draw();
    }
  }

  // A range on the clock as steps, for that is what the server is asked for.
  function stepsOf([from, to]) {
    if (at.look.xKind === "step") return [Math.max(0, Math.floor(from)), Math.ceil(to)];
    const curve = Object.values(at.series).find((one) => one.steps.length > 1);
    return curve ? [stepAt(curve, from), stepAt(curve, to)] : [];
  }

  function append(points) {
    if (points.length === 0 || (at.zoomed && at.loaded)) return;
    const own = at.look.rank > 0 ? names().filter((name) => !OWN_RANK.test(name)) : names();
    lengthen(at.series, own, points, at.smooth);
    if (longest(at.series) > at.points * 3) load();
  }

  function draw() {
    cancelAnimationFrame(at.frame);
    const empty =
      at.failed && !at.loaded
        ? at.failed
        : at.loaded || !at.run.phases.length
          ? whyEmpty(at.run)
          : "Reading the curves …";
    at.charts.forEach((one, index) =>
      one.chart.draw(
        { ...dataOf(one, index), empty },
        { ...at.look, log: at.look.log && index === 0, clip: at.look.clip },
      ),
    );
    bar.update(at.look, at.run);
    show(small, at.charts.length > 1);
  }

  const soon = () => {
    cancelAnimationFrame(at.frame);
    at.frame = requestAnimationFrame(draw);
  };

  function dataOf(one, index) {
    const clock = at.look.xKind === "clock";
    const lines = one.names
      .filter((name) => at.series[name])
      .map((name) => {
        const curve = at.series[name];
        const ys = at.look.log && index === 0 ? curve.values.map(positive) : curve.values;
        const strong = one.smooth && at.smooth > 0 && curve.smoothed?.length ? curve.smoothed : null;
        const drawn = { xs: clock ? curve.times : curve.steps, ys, smoothed: strong };
        return {
          name,
          label: labelOf(name, one.names),
          color: colorOf(name, at.run),
          ...(at.run.phases.length > 1 ? rested(drawn) : drawn),
        };
      });
    const where = (list) => list.map((item) => (clock ? item.time : item.step));
    const resumes = where(at.run.resumes ?? []);
    if (index > 0) return { lines, resumes };
    return {
      lines,
      resumes,
      points: measured(where),
      incidents: where((at.run.entries ?? []).filter((entry) => entry.kind === "incident" && entry.step !== null)),
    };
  }

  const positive = (value) => (value > 0 ? value : null);

  function measured(where) {
    const known = (at.run.evaluations ?? []).filter((one) => one.loss !== null);
    if (known.length === 0) return [];
    const based = known.filter((one) => one.baseline !== null);
    const base = {
      name: "baseline",
      label: "base model",
      color: "--muted",
      shape: "ring",
      xs: where(based),
      ys: based.map((one) => one.baseline),
    };
    return [
      ...(based.length > 0 ? [base] : []),
      {
        name: "validation",
        label: "validation",
        color: "--ink",
        shape: "disc",
        xs: where(known),
        ys: known.map((one) => one.loss),
      },
    ];
  }

  function zoom(range) {
    if (range === null && at.look.range === null) return;
    const curves = Object.values(at.series).filter((one) => one.steps.length > 0);
    if (range && (curves.length === 0 || range[1] - range[0] < (at.look.xKind === "step" ? 1 : 0.5))) return;
    at.look.range = range;
    draw();
    load();
  }

  function looked(next) {
    const again = next.rank !== at.look.rank || next.more !== at.look.more;
    if (next.xKind !== at.look.xKind && at.look.range) next.range = null;
    const unzoomed = next.range === null && at.look.range !== null;
    Object.assign(at.look, next);
    keep(at.look);
    const reshaped = shape();
    if (!reshaped) draw();
    if (again || unzoomed || reshaped) load();
  }

  return {
    update(run) {
      at.run = run;
      const reshaped = shape();
      for (const panel of panels) panel.update?.(run);
      if (reshaped) load();
      else soon();
    },
    points(points) {
      if (!at.loaded) return void at.waiting.push(...points);
      append(points);
      soon();
    },
    reload: load,
    destroy() {
      at.over = true;
      at.asked?.abort();
      cancelAnimationFrame(at.frame);
      for (const one of at.charts) one.chart.destroy();
      for (const panel of panels) panel.destroy();
      bar.destroy();
    },
  };
}
