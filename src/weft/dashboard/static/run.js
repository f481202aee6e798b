// A run's page: its head stays, the tabs change below it, and news come by one connection.

import { replace, h, show } from "./dom.js";
import { ALIVE, head } from "./facts.js";
import { percent, progressOf } from "./format.js";
import * as controls from "./controls.js";
import * as keys from "./keys.js";

const TABS = [
  { key: "overview", label: "Overview", load: () => import("./overview.js") },
  { key: "samples", label: "Samples", load: () => import("./samples.js") },
  { key: "config", label: "Config", load: () => import("./config.js") },
  { key: "adapter", label: "Adapter", load: () => import("./health.js") },
  { key: "log", label: "Log", load: () => import("./log.js") },
];
const MOST_ENTRIES = 200;

const tabOf = (key) => TABS.find((one) => one.key === key) ?? TABS[0];

export function mount(element, context) {
  const at = { run: null, tab: null, view: null, feed: null, over: false, asOf: null, parts: null, timer: 0, retry: 0 };
  const inner = { ...context, keys };
  const unregister = keys.register(
    "A run",
    TABS.map(({ key, label }, index) => [String(index + 1), label, () => go({ tab: key, move: true })]),
  );
  replace(element, skeleton());
  begin();

  async function begin() {
    try {
      // The tab's modules come while the server reads the run.
      [at.run] = await Promise.all([context.api.getJson(context.api.runPath(context.id)), tabOf(context.tab).load()]);
    } catch (error) {
      if (!at.over) failed(error);
      return;
    }
    if (at.over) return;
    build();
    at.feed = context.api.live({
      run: context.id,
      after: at.run.position,
      hear: { run: heardRun, points: heardPoints, entry: heardEntry, reset, state: heardState },
    });
  }

  function failed(error) {
    if (error.status === 404) return void context.words("This run is not here.", error.message);
    if (error.status !== 0) return void context.words("The run could not be read.", error.message);
    context.connected({ word: "waiting", attempt: 1, until: Date.now() + 2000, seen: null });
    at.retry = setTimeout(begin, 2000);
  }

  function build() {
    inner.run = at.run;
    const acts = controls.mount(inner);
    const top = head(at.run, acts);
    const links = TABS.map((tab) =>
      h("a", { href: address(tab.key), "data-tab": tab.key, "data-testid": `tab-${tab.key}` }, tab.label),
    );
    const report = h(
      "a",
      {
        class: "tab-report",
        href: context.api.runPath(context.id, "/report"),
        download: "",
        "data-testid": "report",
        title: "One HTML file with charts, samples and config",
      },
      "Report",
    );
    const tabs = h("nav", { class: "tabs", "aria-label": "Parts of the run" }, links, report);
    const body = h("div", { class: "tab-body" });
    replace(element, top.element, tabs, body);
    at.parts = { top, links, body, acts };
    at.timer = setInterval(drawHead, 1000);
    context.crumb(at.run.name);
    drawHead();
    go({ tab: context.tab });
  }

  const address = (tab) => `#/run/${encodeURIComponent(context.id)}${tab === "overview" ? "" : `/${tab}`}`;

  // Another tab of the same run: `move` also changes the address, which calls this once more.
  async function go({ tab, move = false, query }) {
    if (!at.parts) return;
    const next = tabOf(tab);
    if (move) return void context.navigate(address(next.key));
    if (query) inner.query = query;
    if (at.tab === next) return;
    at.tab = next;
    at.view?.destroy();
    at.view = null;
    for (const link of at.parts.links) {
      if (link.dataset.tab === next.key) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const place = h("div", { class: `tab tab-${next.key}` });
    at.parts.body.style.setProperty("min-height", "100vh");
    try {
      const module = await next.load();
      if (at.tab !== next || at.over) return;
      replace(at.parts.body, place);
      at.view = module.mount(place, { ...inner, run: at.run, tab: next.key });
    } catch (error) {
      replace(at.parts.body, h("p", { class: "wrong" }, `This part could not be drawn: ${error.message}`));
      throw error;
    }
  }

  function drawHead() {
    if (document.hidden) return;
    const share = progressOf(at.run);
    const first = ALIVE.has(at.run.state) && share !== null ? percent(share) : at.run.state;
    context.title(`${first} · ${at.run.name}`, `${first} · ${at.run.name}`);
    at.parts.top.update(at.run, context.api.now(), at.asOf);
  }

  function drawRun() {
    drawHead();
    at.parts.acts.update(at.run);
    at.view?.update?.(at.run);
  }

  function heardRun(run) {
    at.run = { ...at.run, ...run };
    drawRun();
  }

  function heardPoints({ points }) {
    at.view?.points?.(points);
  }

  function heardEntry(entry) {
    const known = at.run.entries.some(
      (one) => one.time === entry.time && one.text === entry.text && one.kind === entry.kind,
    );
    if (known) return;
    at.run = { ...at.run, entries: [...at.run.entries, entry].slice(-MOST_ENTRIES) };
    drawRun();
  }

  // The curves were cut or the files replaced: what is drawn is no longer so.
  async function reset() {
    const run = await context.api.getJson(context.api.runPath(context.id));
    if (at.over) return;
    at.run = run;
    drawRun();
    at.view?.reload?.();
    at.feed.moveTo(run.position);
  }

  function heardState(state) {
    context.connected(state);
    const before = at.asOf;
    if (state.word === "live") at.asOf = null;
    else if (state.attempt > 0) at.asOf ??= context.api.now();
    if (before !== at.asOf) drawHead();
  }

  return {
    go,
    destroy() {
      at.over = true;
      clearInterval(at.timer);
      clearTimeout(at.retry);
      at.feed?.close();
      at.view?.destroy();
      at.parts?.acts.destroy();
      unregister();
    },
  };
}

// The page's frame before anything is known, so that nothing moves when it comes.
function skeleton() {
  const block = (name) => h("div", { class: `wait ${name}` });
  const words = h("p", { class: "visually-hidden", role: "status" }, "Loading the run");
  const frame = h(
    "div",
    { class: "skeleton" },
    words,
    block("wait-title"),
    block("wait-bar"),
    block("wait-facts"),
    block("wait-chart"),
  );
  show(frame, true);
  return frame;
}
