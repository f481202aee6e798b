// The strip of GPUs: one card each, its state, memory, speed and how long it waits for data.

import { h, replace, setText, setTitle, show } from "./dom.js";
import { stateSign } from "./facts.js";
import { bytes, bytesOf, NONE, number, pace, percent } from "./format.js";

// A GPU whose run is paused is not at work, though its process is as well as ever.
const stateOf = (gpu) => (gpu.state === "active" && gpu.activity === "paused" ? "paused" : gpu.state);

function card() {
  const state = stateSign();
  const kind = h("span", { class: "gpu-kind" });
  const count = h("span");
  const label = h("span", { class: "gpu-number" }, kind, " ", count);
  const name = h("span", { class: "gpu-name muted" });
  const used = h("span", { class: "mem-used" });
  const others = h("span", { class: "mem-others" });
  const peak = h("span", { class: "mem-peak" });
  const memory = h("span", { class: "gpu-memory-text" });
  const bar = h("div", { class: "mem", role: "img" }, others, used, peak);
  const speed = h("span", { class: "gpu-fact" });
  const wait = h("span", { class: "gpu-fact muted" });
  const error = h("p", { class: "gpu-error", hidden: true });
  const element = h(
    "li",
    { class: "gpu", "data-testid": "gpu" },
    h("div", { class: "gpu-top" }, label, state.element),
    name,
    bar,
    memory,
    h("div", { class: "gpu-foot" }, speed, wait),
    error,
  );

  function update(gpu) {
    setText(kind, gpu.name === "cpu" ? "CPU" : "GPU");
    setText(count, gpu.number);
    state.update(stateOf(gpu));
    setText(name, gpu.name || "no name");
    setTitle(name, [gpu.name, gpu.host, `rank ${gpu.rank}`].filter(Boolean).join(", "));
    const { used: mine, peak: most, used_by_all: all, total } = gpu.memory ?? {};
    const share = (value) => `${total > 0 && value ? Math.min(100, (value / total) * 100).toFixed(1) : 0}%`;
    used.style.setProperty("width", share(mine));
    others.style.setProperty("width", share(Math.max(all ?? 0, mine ?? 0)));
    peak.style.setProperty("left", share(most));
    show(peak, Boolean(most && total));
    setText(memory, bytesOf(mine, total));
    setTitle(bar, `used ${bytes(mine)}, peak ${bytes(most)}, by all processes ${bytes(all)}, of ${bytes(total)}`);
    bar.setAttribute("aria-label", `Memory: used ${bytes(mine)}, peak ${bytes(most)}, of ${bytes(total)}`);
    setText(speed, gpu.seconds_per_step ? `${pace(gpu.seconds_per_step)}/step` : NONE);
    setText(
      wait,
      typeof gpu.data_wait === "number" ? `${percent(gpu.data_wait, gpu.data_wait < 0.1 ? 1 : 0)} wait` : "",
    );
    setTitle(wait, "Share of the last 50 steps' time in which the loop waited for data.");
    show(error, Boolean(gpu.error));
    setText(error, gpu.error ? `Step ${gpu.error.step ?? NONE}: ${gpu.error.reason ?? gpu.error}` : "");
    element.setAttribute("aria-label", `GPU ${gpu.number}, ${stateOf(gpu)}, loss ${number(gpu.loss)}`);
  }

  return { element, update };
}

export function mount(element) {
  const list = h("ul", { class: "gpus" });
  const section = h(
    "section",
    { class: "gpu-strip", "aria-label": "Devices", hidden: true },
    h("h2", { class: "visually-hidden" }, "Devices"),
    list,
  );
  element.append(section);
  let cards = [];
  return {
    update(run) {
      const gpus = run.gpus ?? [];
      show(section, gpus.length > 0);
      if (cards.length !== gpus.length) {
        cards = gpus.map(card);
        replace(
          list,
          cards.map((one) => one.element),
        );
      }
      gpus.forEach((gpu, index) => cards[index].update(gpu));
    },
    destroy() {
      section.remove();
    },
  };
}
