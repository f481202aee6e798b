// What one can tell the trainer: pause, save, sample, validate, rate, stop; each asked, then answered by an event.

import { announce, h, icon, replace, setText, setTitle } from "./dom.js";
import { ALIVE } from "./facts.js";
import { rate } from "./format.js";

const BUTTONS = [
  { command: "pause", label: "Pause", icon: "paused", hint: "After this step; the GPU's memory stays taken (p)" },
  { command: "save", label: "Save", icon: "saving", hint: "A checkpoint after this step" },
  { command: "sample", label: "Sample", icon: "sampling", hint: "Make samples after this step" },
  { command: "validate", label: "Validate", icon: "validating", hint: "Measure after this step" },
  { command: "rate", label: "Rate…", icon: "rate", hint: "Change the learning rate" },
  { command: "stop", label: "Stop…", icon: "stop", hint: "Save and end" },
];
const PATIENCE = 60; // seconds until the line says that the answer takes long

// Why a command cannot be given now; null when it can.
export function refusal(run, command) {
  if (!ALIVE.has(run.state)) return `Nobody trains here: the run is ${run.state}.`;
  if ((run.commands ?? []).includes(command)) return null;
  if (run.state === "starting" || run.state === "caching") return "The trainer hears this when the first step is done.";
  if (command === "sample") return "This run has no prompts to sample, or it does not listen now.";
  if (command === "validate") return "This run has no validation, or it does not listen now.";
  return "The run does not take this now.";
}

// The buttons and the line of answers stand apart: {acts, line} are elements of the head.
export function mount(context) {
  const at = { run: context.run, asked: [], seen: lastControl(context.run) };
  const line = h("p", { class: "asked", role: "status", "data-testid": "asked" });
  const buttons = new Map(BUTTONS.map((one) => [one.command, button(one, (command) => press(command))]));
  const acts = h(
    "div",
    { class: "acts", role: "group", "aria-label": "Tell the trainer" },
    [...buttons.values()].map((one) => one.element),
  );

  function press(command) {
    const refused = refusal(at.run, command);
    if (refused) return void say(refused);
    if (command === "stop") return void askStop(() => post("stop"));
    if (command === "rate") return void askRate(at.run, (given) => post("rate", given));
    post(command);
  }

  async function post(command, given = {}) {
    const asked = { command, at: context.api.now(), text: `Asked to ${phrase(command, given)} …` };
    at.asked.push(asked);
    say(asked.text);
    try {
      await context.api.control(context.id, command, given);
    } catch (error) {
      at.asked = at.asked.filter((one) => one !== asked);
      say(error.message, "bad");
    }
  }

  function say(text, level = "") {
    setText(line, text);
    line.dataset.level = level;
  }

  // Answers come as control entries, in the order in which they were asked.
  function answered(run) {
    for (const entry of (run.entries ?? []).filter((one) => one.kind === "control" && newer(one, at.seen))) {
      at.seen = entry;
      const mine = at.asked.find((one) => entry.text.toLowerCase().includes(one.command)) ?? at.asked[0];
      if (!mine) continue;
      at.asked = at.asked.filter((one) => one !== mine);
      say(entry.text, entry.level);
      announce(entry.text);
    }
    const oldest = at.asked[0];
    if (!oldest) return;
    if (!ALIVE.has(run.state)) {
      at.asked = [];
      say(`The run ended before it answered: ${oldest.text.replace(/ …$/, "")}.`, "warn");
    } else if (context.api.now() - oldest.at > PATIENCE)
      say(`${oldest.text} no answer yet; a step may take longer than that.`, "warn");
  }

  function update(run) {
    at.run = run;
    for (const [slot, one] of buttons) one.update(slot === "pause" && run.state === "paused" ? "resume" : slot, run);
    answered(run);
  }

  update(context.run);
  const unregister = context.keys.register("Control", [
    ["p", "pause or resume", () => press(at.run.state === "paused" ? "resume" : "pause")],
  ]);
  return { acts, line, update, destroy: unregister };
}

const newer = (entry, seen) =>
  seen === null || entry.time > seen.time || (entry.time === seen.time && entry.text !== seen.text);

function lastControl(run) {
  return (run.entries ?? []).findLast((entry) => entry.kind === "control") ?? null;
}

function phrase(command, given) {
  if (command !== "rate") return command;
  return `set the rate to ${rate(given.lr)}${given.optimizer ? ` for ${given.optimizer}` : ""}`;
}

function button({ command: slot, label, icon: drawing, hint }, press) {
  let command = slot;
  const word = h("span", null, label);
  const mark = h("span", { class: "act-mark" }, icon(drawing));
  const element = h(
    "button",
    {
      type: "button",
      class: slot === "stop" ? "danger" : "",
      "data-testid": `control-${slot}`,
      onclick: () => press(command),
    },
    mark,
    word,
  );
  return {
    element,
    update(next, run) {
      if (next !== command) {
        command = next;
        setText(word, command === "resume" ? "Resume" : label);
        replace(mark, icon(command === "resume" ? "play" : drawing));
      }
      const refused = refusal(run, command);
      element.setAttribute("aria-disabled", String(refused !== null));
      setTitle(element, refused ?? (command === "resume" ? "Go on training (p)" : hint));
    },
  };
}

function dialogOf(title, testid, ...content) {
  const dialog = h(
    "dialog",
    { "aria-labelledby": `${testid}-title`, "data-testid": testid },
    h("header", null, h("h2", { id: `${testid}-title` }, title)),
    content,
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

function askStop(act) {
  const keep = h("button", { type: "button", onclick: () => dialog.close() }, "Keep training");
  const stop = h(
    "button",
    {
      type: "button",
      class: "danger",
      "data-testid": "stop-sure",
      onclick: () => {
        dialog.close();
        act();
      },
    },
    icon("stop"),
    "Save and stop",
  );
  const dialog = dialogOf(
    "Stop this run?",
    "stop-dialog",
    h("p", null, "It ends after the step that is running, with a checkpoint. It can be resumed from there."),
    h("div", { class: "acts" }, keep, stop),
  );
  keep.focus();
}

function askRate(run, act) {
  const rates = Object.entries(run.rates ?? {});
  const several = rates.length > 1;
  const select = h(
    "select",
    { id: "rate-optimizer" },
    several ? h("option", { value: "" }, "all optimizers") : null,
    rates.map(([name]) => h("option", { value: several ? name : "" }, name)),
  );
  const present = () => rates.find(([name]) => name === select.value)?.[1] ?? rates[0]?.[1] ?? null;
  const field = h("input", {
    id: "rate-value",
    type: "text",
    inputmode: "decimal",
    autocomplete: "off",
    spellcheck: "false",
    "aria-describedby": "rate-now rate-wrong",
    value: rate(present()),
  });
  const wrong = h("p", { id: "rate-wrong", class: "wrong", role: "alert" });
  const now = h(
    "p",
    { id: "rate-now", class: "muted" },
    `Now ${rates.map(([name, value]) => `${several ? `${name} ` : ""}${rate(value)}`).join(", ") || "not known"}, at the top of the schedule. Warm-up and decay stay as they are.`,
  );
  const scale = (factor, label) =>
    h(
      "button",
      {
        type: "button",
        onclick: () => {
          field.value = rate(factor * (Number(field.value) || present() || 0));
        },
      },
      label,
    );
  const send = (event) => {
    event.preventDefault();
    const lr = Number(field.value);
    if (!(lr > 0) || !Number.isFinite(lr)) return void setText(wrong, `A rate is a number above 0, like 1e-4.`);
    dialog.close();
    act({ lr, optimizer: select.value || null });
  };
  const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
  const form = h(
    "form",
    { class: "rate-form", onsubmit: send, novalidate: true },
    several ? h("label", { for: "rate-optimizer" }, "Optimizer", select) : null,
    h(
      "label",
      { for: "rate-value" },
      "Learning rate",
      h("span", { class: "rate-row" }, field, scale(0.5, "half"), scale(2, "double")),
    ),
    now,
    wrong,
    h(
      "div",
      { class: "acts" },
      cancel,
      h("button", { type: "submit", class: "primary", "data-testid": "rate-send" }, "Set rate"),
    ),
  );
  const dialog = dialogOf("Learning rate", "rate-dialog", form);
  field.select();
}
