// One sample large, beside, over or in turn with another of the same prompt.

import { h, icon, replace, setText, show } from "./dom.js";
import { chip, field, select } from "./parts.js";
import { makeLoader, makeTransport, still, tile } from "./tiles.js";

const MODES = [["one", "One"], ["beside", "Side by side"], ["wipe", "Wipe"]];

// rows: [{key, prompt, seed}], columns: [{key, label}], cellOf(row, column) -> sample or undefined; `reference`: key of the column to compare with.
export function openViewer({ rows, columns, cellOf, row, column, reference }) {
  const at = { row, column, mode: "one", reference };
  const transport = makeTransport();
  const clock = transport.clock;
  const title = h("h2", { id: "viewer-title", class: "prompt" });
  const place = h("p", { class: "muted num", role: "status", "data-testid": "viewer-place" });
  const [first, second] = [0, 1].map(() => h("figure", null, h("div", { class: "shot" }), h("figcaption", null)));
  const stage = h("div", { class: "stage", "data-testid": "viewer-stage", onpointerdown: grabbed, onpointermove: dragged }, first, second);
  const wipe = h("input", { type: "range", min: "0", max: "100", value: "50", "aria-label": "Place of the edge", "data-testid": "wipe", oninput: drawWipe });
  const hold = h("button", { type: "button", "data-testid": "hold", title: "b", onpointerdown: () => held(true), onpointerup: () => held(false), onpointerleave: () => held(false), onblur: () => held(false) });
  const modes = h("div", { class: "chips", role: "group", "aria-label": "How to compare" },
    MODES.map(([mode, text]) => chip(text, () => set({ mode }), { "data-mode": mode })));
  const against = select(columns.map((one) => [one.key, one.label]), (value) => set({ reference: value }), "viewer-against", "Compare with");
  const go = (name, label, move) => h("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick: move }, name);
  const close = h("button", { class: "quiet", type: "button", "aria-label": "Close", "data-testid": "viewer-close", onclick: () => dialog.close() }, icon("close"));
  const steps = h("div", { class: "chips" }, go("←", "Column before", () => move(0, -1)), go("→", "Column after", () => move(0, 1)), go("↑", "Prompt before", () => move(-1, 0)), go("↓", "Prompt after", () => move(1, 0)));
  const tools = h("div", { class: "tools" }, steps, modes, field("with", against), hold, wipe);
  const head = h("header", null, h("div", null, title, place), close);
  const dialog = h("dialog", { class: "viewer", "aria-labelledby": "viewer-title", "data-testid": "viewer", onkeydown: pressed, onkeyup: released }, head, stage, transport.element, tools);
  let loader = null;

  function set(changes) {
    Object.assign(at, changes);
    draw();
  }

  function move(down, right) {
    const next = { row: Math.min(rows.length - 1, Math.max(0, at.row + down)), column: Math.min(columns.length - 1, Math.max(0, at.column + right)) };
    if (next.row !== at.row || next.column !== at.column) set(next);
  }

  function fill(figure, sample, text, other) {
    replace(figure.firstElementChild, tile(sample, loader, other?.kind === "text" ? other.text : null));
    setText(figure.lastElementChild, text);
  }

  function draw() {
    const playing = clock.playing;
    loader?.close();
    for (const video of stage.querySelectorAll("video")) loader.forget(video);
    loader = makeLoader(clock);
    const line = rows[at.row];
    const mine = cellOf(line, columns[at.column]);
    const with_ = columns.find((one) => one.key === at.reference) ?? columns[0];
    const theirs = cellOf(line, with_);
    const text = (mine ?? theirs)?.kind === "text";
    setText(title, line.prompt);
    setText(place, `${columns[at.column].label} · seed ${line.seed} · ${at.column + 1} of ${columns.length} · prompt ${at.row + 1} of ${rows.length}`);
    fill(first, theirs, with_.label, null);
    fill(second, mine, columns[at.column].label, theirs);
    against.value = with_.key;
    setText(hold, `Hold for ${with_.label}`);
    dialog.dataset.mode = text && at.mode === "wipe" ? "beside" : at.mode;
    dialog.dataset.kind = (mine ?? theirs)?.kind ?? "video";
    show(transport.element, stage.querySelector("video") !== null);
    for (const button of modes.children) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === dialog.dataset.mode));
      button.disabled = text && button.dataset.mode === "wipe";
    }
    drawWipe();
    if (playing) clock.play();
  }

  function drawWipe() {
    stage.style.setProperty("--edge-at", `${wipe.value}%`);
  }

  function held(on) {
    dialog.toggleAttribute("data-held", on);
  }

  function grabbed(event) {
    if (dialog.dataset.mode !== "wipe") return;
    stage.setPointerCapture(event.pointerId);
    dragged(event);
  }

  function dragged(event) {
    if (dialog.dataset.mode !== "wipe" || !stage.hasPointerCapture(event.pointerId)) return;
    const edge = second.getBoundingClientRect();
    wipe.value = (100 * (event.clientX - edge.left)) / edge.width;
    drawWipe();
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const inField = event.target.matches("input, select");
    if (moves[event.key] && !inField) move(...moves[event.key]);
    else if (event.key === "b") held(true);
    else if (event.key === " " && !event.target.matches("button, input, select")) (clock.playing ? clock.pause : clock.play)();
    else return;
    event.preventDefault();
  }

  function released(event) {
    if (event.key === "b") held(false);
  }

  dialog.addEventListener("close", () => {
    for (const video of stage.querySelectorAll("video")) loader.forget(video);
    loader.close();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  draw();
  if (!still()) clock.play();
  return dialog;
}
