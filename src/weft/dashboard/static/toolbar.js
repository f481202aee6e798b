// How the curves are looked at: smoothing, log axis, outliers, steps or time; remembered in this browser.

import { h, setText, show } from "./dom.js";
import * as keys from "./keys.js";

const USUAL = { smooth: 0.9, log: false, clip: true, xKind: "step", more: false, rank: 0 };
const KEY = "weft-look";
const TOP = 100; // the slider's right end: 0.999

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// The slider is even in the logarithm of 1 - β: 0, 0.9 at a third, 0.99 at two thirds, 0.999.
export function smoothOf(position) {
  return position <= 0 ? 0 : Number((1 - 10 ** ((-3 * position) / TOP)).toFixed(3));
}

export function positionOf(smooth) {
  return smooth <= 0 ? 0 : Math.round((-Math.log10(1 - smooth) / 3) * TOP);
}

export function kept() {
  try {
    return { ...USUAL, ...JSON.parse(localStorage.getItem(KEY) ?? "{}"), rank: 0 };
  } catch {
    return { ...USUAL }; // storage is forbidden, or holds something else
  }
}

export function keep({ smooth, log, clip, xKind, more }) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ smooth, log, clip, xKind, more }));
  } catch {
    return; // storage is forbidden: the choice lasts as long as the page
  }
}

function toggle(label, title, testid, act) {
  return h(
    "button",
    { type: "button", class: "toggle", title, "aria-pressed": "false", "data-testid": testid, onclick: act },
    label,
  );
}

export function toolbar({ look, run, onLook, onSmooth, onReset }) {
  const at = { look, timer: 0 };
  const change = (part) => onLook({ ...at.look, ...part });
  const shown = h("output", { class: "smooth-value", for: "smooth" });
  const slider = h("input", {
    id: "smooth",
    type: "range",
    min: "0",
    max: String(TOP),
    step: "1",
    value: String(positionOf(look.smooth)),
    "data-testid": "smooth",
    oninput: slid,
  });
  const smoothing = h("label", { class: "smooth", for: "smooth" }, "Smoothing", slider, shown);
  const log = toggle("Log", "Logarithmic axis of the loss (l)", "log", () => change({ log: !at.look.log }));
  const clip = toggle("Clip outliers", "Leave the outer 1 % of the raw values outside the frame", "clip", () =>
    change({ clip: !at.look.clip }),
  );
  const step = toggle("Step", "By step (x)", "x-step", () => change({ xKind: "step" }));
  const clock = toggle("Time", "By time of day (x)", "x-time", () => change({ xKind: "clock" }));
  const more = toggle("More curves", "Every other metric that the run tells (m)", "more", () =>
    change({ more: !at.look.more }),
  );
  const reset = h(
    "button",
    {
      type: "button",
      class: "toggle",
      title: "Show all again (double click, 0)",
      "data-testid": "zoom-reset",
      onclick: onReset,
    },
    "Show all",
  );
  const rank = h("select", {
    id: "rank",
    "aria-label": "Rank whose seconds are drawn",
    title: "Seconds are a rank's own",
    onchange: () => change({ rank: Number(rank.value) }),
  });
  const element = h(
    "div",
    { class: "toolbar", role: "group", "aria-label": "How curves are drawn" },
    smoothing,
    h("span", { class: "toggles", role: "group", "aria-label": "Along" }, step, clock),
    log,
    clip,
    more,
    rank,
    reset,
  );
  const unregister = keys.register("Curves", [
    ["s", "smoothing (then arrows)", () => slider.focus()],
    ["l", "log axis of the loss", () => log.click()],
    ["x", "along steps or time", () => change({ xKind: at.look.xKind === "step" ? "clock" : "step" })],
    ["o", "clip outliers", () => clip.click()],
    ["m", "more curves", () => more.click()],
    ["0", "show all", onReset],
  ]);

  function slid() {
    const smooth = smoothOf(Number(slider.value));
    at.look.smooth = smooth;
    drawSmooth();
    clearTimeout(at.timer);
    at.timer = setTimeout(() => {
      keep(at.look);
      onSmooth();
    }, 120);
  }

  function drawSmooth() {
    const text = at.look.smooth === 0 ? "off" : String(at.look.smooth);
    setText(shown, text);
    slider.setAttribute("aria-valuetext", text);
  }

  function update(next, now) {
    at.look = next;
    drawSmooth();
    for (const [one, pressed] of [
      [log, next.log],
      [clip, next.clip],
      [step, next.xKind === "step"],
      [clock, next.xKind === "clock"],
      [more, next.more],
    ])
      one.setAttribute("aria-pressed", String(pressed));
    reset.disabled = next.range === null;
    const world = now.world ?? 1;
    show(rank, world > 1);
    if (rank.options.length !== world)
      rank.replaceChildren(
        ...Array.from({ length: world }, (_, index) => h("option", { value: String(index) }, `rank ${index}`)),
      );
    rank.value = String(next.rank);
  }

  update(look, run);
  return {
    element,
    update,
    destroy() {
      clearTimeout(at.timer);
      unregister();
    },
  };
}
