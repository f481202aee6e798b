// The head of a run's page: what it is, whether it lives, how far it is, how long it will take, whether it learns.

import { h, setIcon, setText, setTitle, show } from "./dom.js";
import { ago, capital, clock, duration, integer, NONE, number, pace, percent, progressOf, roughly } from "./format.js";

export const ALIVE = new Set([
  "starting",
  "caching",
  "training",
  "validating",
  "sampling",
  "saving",
  "paused",
  "stalled",
]);
const MOVING = new Set(["starting", "caching", "training", "validating", "sampling", "saving"]);

export function stateSign() {
  const mark = h("span", { class: "state-mark" });
  const word = h("span", { class: "state-word" });
  const element = h("span", { class: "state", "data-testid": "state" }, mark, word);
  return {
    element,
    update(state) {
      setIcon(mark, state);
      setText(word, capital(state));
      if (element.dataset.state !== state) element.dataset.state = state;
    },
  };
}

// A bar without numbers of its own; `share` null is a run whose length is not known.
export function progressBar(label) {
  const done = h("span", { class: "bar-done" });
  let drawn = "";
  const element = h(
    "div",
    { class: "bar", role: "progressbar", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" },
    done,
  );
  return {
    element,
    update(share, state, text) {
      const now = `${share} ${state} ${text}`;
      if (now === drawn) return;
      drawn = now;
      element.dataset.state = state;
      element.classList.toggle("bar-unknown", share === null && MOVING.has(state));
      done.style.setProperty("width", `${((share ?? 0) * 100).toFixed(2)}%`);
      if (share === null) element.removeAttribute("aria-valuenow");
      else element.setAttribute("aria-valuenow", String(Math.round(share * 100)));
      element.setAttribute("aria-valuetext", text);
    },
  };
}

// "186 / 300", or the units of the phase while there are no steps: "37 / 100 encoded".
export function stepsText(run) {
  if (["starting", "caching"].includes(run.state) && run.total > 0)
    return `${integer(run.done ?? 0)} / ${integer(run.total)}`;
  if (!run.total_steps) return run.step ? integer(run.step) : NONE;
  return `${integer(run.step ?? 0)} / ${integer(run.total_steps)}`;
}

// Why a time left is not told.
export function noEta(run) {
  if (!ALIVE.has(run.state)) return `The run is ${run.state}.`;
  if (run.state === "paused") return "Paused: it goes on when somebody says so.";
  if (run.state === "stalled") return "No sign of life from the training: no honest time can be told.";
  if (!run.total_steps) return "The number of steps is known when the model is ready.";
  return "Known after some steps: the first ones are slower.";
}

function leftText(run) {
  if (typeof run.eta === "number") return run.eta < 10 ? roughly(run.eta) : `about ${roughly(run.eta)}`;
  return NONE;
}

// Validation against the base model: the one number that says whether something was learned.
export function learning(validation) {
  const { loss = null, baseline = null } = validation ?? {};
  if (loss === null) return { value: NONE, note: "no validation yet", share: null };
  if (!baseline) return { value: number(loss), note: `at step ${integer(validation.step)}`, share: null };
  const share = loss / baseline - 1;
  if (Math.abs(share) < 0.0005) return { value: number(loss), note: "as the base model", share };
  return {
    value: number(loss),
    note: `${percent(Math.abs(share), Math.abs(share) < 0.1 ? 1 : 0)} ${share < 0 ? "below" : "above"} the base`,
    share,
  };
}

function fact(name, id) {
  const value = h("span", { class: "fact-value" });
  const note = h("span", { class: "fact-note" });
  const element = h("div", { class: "fact" }, h("dt", null, name), h("dd", { "data-testid": id }, value, note));
  return {
    element,
    set(text, under = "", title = "") {
      setText(value, text);
      value.classList.toggle("long", text.length > 12);
      setText(note, under);
      setTitle(element, title);
    },
  };
}

function lossOf(run) {
  const losses = Object.entries(run.losses ?? {}).filter(([, loss]) => loss !== null);
  if (losses.length === 0) return [NONE, "no step yet"];
  if (losses.length === 1) return [number(losses[0][1]), "moving mean"];
  return [losses.map(([, loss]) => number(loss, 3)).join(" · "), losses.map(([phase]) => phase).join(" · ")];
}

function elapsed(run, now) {
  if (!run.started_at) return null;
  return (ALIVE.has(run.state) ? now : (run.updated_at ?? now)) - run.started_at;
}

// What the run says about itself in one line: model, objective, adapter, where.
export function about(run) {
  return [lastPart(run.model) ?? run.family, run.objective, run.adapter].filter(Boolean);
}

function lastPart(model) {
  return model ? model.replace(/\/+$/, "").split("/").slice(-1)[0] : null;
}

function place(run) {
  const processes = run.world > 1 ? `${run.world} processes` : null;
  const started = run.started_at ? `started ${clock(run.started_at)}` : null;
  return [run.host ? `on ${run.host}` : null, processes, started].filter(Boolean);
}

// Why a run is as it is, and the end of its log where it is broken.
function trouble() {
  const text = h("p", { class: "reason-text", "data-testid": "reason" });
  const lines = h("pre", {
    class: "reason-log",
    tabindex: "0",
    "aria-label": "Last lines of the log",
    "data-testid": "reason-log",
  });
  const element = h("div", { class: "reason", hidden: true }, text, lines);
  return {
    element,
    update(run) {
      const log = run.log ?? [];
      show(element, Boolean(run.reason) || log.length > 0);
      element.dataset.state = run.state;
      setText(text, run.reason ?? "");
      show(lines, log.length > 0);
      const words = log.map((line) => (typeof line === "string" ? line : line.text)).join("\n");
      if (lines.textContent === words) return;
      setText(lines, words);
      lines.scrollTop = lines.scrollHeight;
    },
  };
}

export function head(run, controls) {
  const state = stateSign();
  const title = h("h1", { "data-testid": "run-name" });
  const line = h("p", { class: "run-about muted" });
  const bar = progressBar("Progress");
  const share = h("span", { class: "run-share", "data-testid": "share" });
  const since = h("span", { class: "run-since muted" });
  const why = trouble();
  const facts = {
    step: fact("Step", "step"),
    eta: fact("Time left", "eta"),
    elapsed: fact("Elapsed", "elapsed"),
    pace: fact("Per step", "pace"),
    loss: fact("Loss", "loss"),
    validation: fact("Validation", "validation"),
    wait: fact("Waiting for data", "data-wait"),
  };
  const element = h(
    "section",
    { class: "run-head", "aria-label": "State of the run" },
    h("div", { class: "run-top" }, h("div", { class: "run-name" }, title, state.element, since), controls.acts),
    h("div", { class: "run-under" }, line, controls.line),
    why.element,
    h("div", { class: "run-progress" }, bar.element, share),
    h(
      "dl",
      { class: "facts" },
      Object.values(facts).map((one) => one.element),
    ),
  );

  // `asOf`: when the page last heard of the run, where the server is gone; nothing ticks on from there.
  function update(next, now, asOf = null) {
    state.update(next.state);
    setText(title, next.name);
    setText(line, [...about(next), ...place(next)].join(" · "));
    setText(since, asOf === null ? sinceText(next, now) : `as of ${clock(asOf, true)}`);
    why.update(next);
    const done = progressOf(next);
    bar.update(done, next.state, stepsText(next));
    setText(share, done === null ? "" : percent(done));
    drawFacts(facts, next, asOf ?? now);
  }

  update(run, run.updated_at ?? 0);
  return { element, update };
}

// What it is busy with, or since when it is as it is.
function sinceText(run, now) {
  if (run.note && MOVING.has(run.state)) return run.note;
  if (!run.since) return "";
  return ALIVE.has(run.state) ? `for ${duration(now - run.since)}` : ago(now - run.since);
}

function drawFacts(facts, run, now) {
  const caching = ["starting", "caching"].includes(run.state) && run.total > 0;
  const step = typeof run.step === "number" ? integer(run.step) : NONE;
  facts.step.set(
    caching ? stepsText(run) : step,
    caching ? (run.phase ?? run.state) : run.total_steps ? `of ${integer(run.total_steps)}` : "length not known yet",
  );
  facts.eta.set(
    leftText(run),
    typeof run.eta === "number" ? `done ${clock(now + run.eta)}` : "",
    typeof run.eta === "number" ? "" : noEta(run),
  );
  facts.elapsed.set(
    duration(elapsed(run, now)),
    run.resumes?.length ? `resumed ${run.resumes.length}×` : "since the start",
  );
  facts.pace.set(pace(run.seconds_per_step), run.seconds_per_step ? `${rateText(run.seconds_per_step)}` : "");
  facts.loss.set(...lossOf(run));
  const learned = learning(run.validation);
  facts.validation.set(
    learned.value,
    learned.note,
    run.validation?.baseline != null ? `Base model (adapter off): ${number(run.validation.baseline)}` : "",
  );
  facts.validation.element.dataset.good =
    learned.share === null ? "" : learned.share < -0.0005 ? "yes" : learned.share > 0.0005 ? "no" : "";
  const waits = (run.gpus ?? []).map((gpu) => gpu.data_wait).filter((wait) => typeof wait === "number");
  const wait = waits.length > 0 ? Math.max(...waits) : null;
  facts.wait.set(
    percent(wait, wait !== null && wait < 0.1 ? 1 : 0),
    wait === null ? "" : wait > 0.1 ? "the loader is slow" : "of the time",
  );
}

function rateText(seconds) {
  const hourly = 3600 / seconds;
  return hourly >= 7200 ? `${number(1 / seconds, 3)} steps a second` : `${integer(hourly)} steps an hour`;
}
