// The last lines that a run said, as they come; trouble stands out, and the end is followed until the reader scrolls away.

import { getJson, runPath } from "./api.js";
import { announce, h, replace, setText, show } from "./dom.js";
import { check, empty, field, part, select, told } from "./parts.js";

const AMOUNTS = [200, 1000, 5000];
const EVERY = 3000; // ms between two looks while the run lives
const OVER = ["finished", "stopped", "crashed"];

export function mount(element, context) {
  const view = { lines: [], amount: AMOUNTS[0], follow: true, gone: false, timer: 0, state: context.run?.state };
  const amount = select(AMOUNTS.map((many) => [many, `${many} lines`]), (value) => take(Number(value)), "log-amount");
  const follow = check("follow", true, turn, "log-follow");
  const copy = h("button", { type: "button", "data-testid": "log-copy", onclick: () => copyText(copy, view.lines.map((line) => line.text).join("\n")) }, "Copy");
  const trouble = h("button", { type: "button", class: "quiet", hidden: true, onclick: toTrouble });
  const words = empty("Reading …");
  const box = h("div", { class: "log mono", tabindex: "0", role: "log", "aria-live": "off", "aria-label": "Last lines of the run", "data-testid": "log", onscroll: scrolled });
  const tools = h("div", { class: "tools" }, field("Last", amount), follow, trouble, h("span", { class: "grow" }), copy);
  replace(element, part("Log", null, tools, words, box));

  function turn(on) {
    view.follow = on;
    follow.firstChild.checked = on;
    if (on) box.scrollTop = box.scrollHeight;
  }

  function scrolled() {
    const below = box.scrollHeight - box.scrollTop - box.clientHeight;
    if (below > 40 && view.follow) turn(false);
    else if (below < 2 && !view.follow) turn(true);
  }

  function take(many) {
    view.amount = many;
    load();
  }

  function toTrouble() {
    turn(false);
    const first = box.querySelector(".bad");
    if (first) box.scrollTop = first.offsetTop - box.offsetTop - 60;
  }

  // Only new lines are added where the old ones are still the beginning of what stands there.
  function draw(lines) {
    const kept = overlap(view.lines, lines);
    while (box.children.length > kept) box.firstElementChild.remove();
    box.append(...lines.slice(kept).map((line) => h("div", { class: line.level === "info" ? null : line.level }, line.text || " ")));
    view.lines = lines;
    const bad = lines.filter((line) => line.level === "bad").length;
    show(trouble, bad > 0);
    setText(trouble, `${bad} ${bad === 1 ? "line" : "lines"} of trouble`);
    show(words, lines.length === 0);
    show(box, lines.length > 0);
    setText(words, "The run has said nothing yet, or it was started by a Weft that kept no log.");
    if (view.follow) box.scrollTop = box.scrollHeight;
  }

  async function load() {
    clearTimeout(view.timer);
    try {
      const { lines } = await getJson(runPath(context.id, `/log?lines=${view.amount}`));
      if (view.gone) return;
      draw(lines);
    } catch (error) {
      if (view.gone) return;
      show(words, view.lines.length === 0);
      setText(words, told(error));
    }
    if (!OVER.includes(view.state)) view.timer = setTimeout(load, EVERY);
  }

  load();
  return {
    update(run) {
      if (run.state === view.state) return;
      view.state = run.state;
      load();
    },
    destroy() {
      view.gone = true;
      clearTimeout(view.timer);
    },
  };
}

// How many of the old lines, at their end, are the first of the new ones.
export function overlap(old, lines) {
  const same = (start) => {
    for (let i = start; i < old.length; i += 1) if (old[i].text !== lines[i - start]?.text) return false;
    return true;
  };
  for (let start = Math.max(0, old.length - lines.length); start < old.length; start += 1) if (same(start)) return old.length - start;
  return 0;
}

export async function copyText(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    setText(button, "Copied");
    announce("Copied");
  } catch {
    setText(button, "The browser forbids it");
  }
  setTimeout(() => setText(button, before), 1500);
}
