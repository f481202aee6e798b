// Validation by noise level: the last measurement beside the base model's, as a table with bars.

import { h, replace, show } from "./dom.js";
import { change, integer, number } from "./format.js";

function row([time, loss], baseline, most) {
  const base = baseline?.[time] ?? null;
  const width = (value) => `${most > 0 && value !== null ? ((value / most) * 100).toFixed(1) : 0}%`;
  const bar = h(
    "span",
    { class: "level-bar", "aria-hidden": "true" },
    h("span", { class: "level-loss", style: { width: width(loss) } }),
    base === null ? null : h("span", { class: "level-base", style: { left: width(base) } }),
  );
  const share = base ? loss / base - 1 : null;
  return h(
    "tr",
    null,
    h("th", { scope: "row" }, time),
    h("td", { class: "level-cell" }, bar),
    h("td", null, number(loss, 3)),
    h("td", { class: "muted" }, number(base, 3)),
    h("td", { class: share !== null && share > 0.0005 ? "worse" : "" }, share === null ? "" : change(share)),
  );
}

export function mount(element) {
  const body = h("tbody");
  const step = h("span", { class: "muted" });
  const heads = [
    h("th", { scope: "col" }, "Noise"),
    h("th", { scope: "col" }, h("span", { class: "visually-hidden" }, "Loss as a bar")),
    h("th", { scope: "col" }, "Loss"),
    h("th", { scope: "col" }, "Base"),
    h("th", { scope: "col" }, "Change"),
  ];
  const table = h("table", { class: "levels" }, h("thead", null, h("tr", null, heads)), body);
  const section = h(
    "section",
    { class: "panel", hidden: true, "data-testid": "by-time", "aria-label": "Validation by noise level" },
    h("div", { class: "panel-head" }, h("h2", null, "Validation by noise level"), step),
    h(
      "div",
      { class: "scroll-x", tabindex: "0", role: "group", "aria-label": "Table of validation by noise level" },
      table,
    ),
  );
  element.append(section);
  let drawn = null;
  return {
    update(run) {
      const last = (run.evaluations ?? []).findLast((one) => Object.keys(one.by_time ?? {}).length > 0);
      show(section, Boolean(last));
      if (!last || drawn === `${last.step} ${last.time}`) return;
      drawn = `${last.step} ${last.time}`;
      const base = last.baseline_by_time ?? {};
      const most = Math.max(...Object.values(last.by_time), ...Object.values(base));
      replace(
        body,
        Object.entries(last.by_time).map((entry) => row(entry, base, most)),
      );
      step.textContent = `step ${integer(last.step)}, ${integer(last.items)} items${last.failed ? `, ${last.failed} failed` : ""}`;
    },
    destroy() {
      section.remove();
    },
  };
}
