// The config as it was written, resolved, and against another run's; where it was trained, and how to do it again.

import { getJson, runPath } from "./api.js";
import { h, replace, setText, show } from "./dom.js";
import { copyText } from "./log.js";
import { check, dataTable, empty, field, part, partHead, region, select, told } from "./parts.js";

const TOKEN = /(?<string>"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')|(?<comment>(?<=^|\s)#.*$)|(?<key>[\w./-]+(?=:(?:\s|$)))|(?<number>(?<![\w./-])-?\d[\d_.]*(?:e[-+]?\d+)?(?![\w./-]))/gim;
const LONG = 160; // letters after which a value is folded

// YAML as spans: for the eye only, so a regular expression is exact enough; nothing is lost or added.
export function coloured(text) {
  const pieces = [];
  let from = 0;
  for (const found of text.matchAll(TOKEN)) {
    pieces.push(text.slice(from, found.index));
    const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
    pieces.push(h("span", { class: `yaml-${kind}` }, found[0]));
    from = found.index + found[0].length;
  }
  return [...pieces, text.slice(from)];
}

// A resolved value as one line of YAML's flow style, near enough for reading: null, 0.0003, clips, [64, 64].
export function written(value) {
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return `[${value.map(written).join(", ")}]`;
  if (value !== null && typeof value === "object") return `{${Object.entries(value).map(([key, one]) => `${key}: ${written(one)}`).join(", ")}}`;
  return value === undefined ? "" : String(value);
}

export function folded(text) {
  if (text.length <= LONG) return text;
  return h("details", { class: "long" }, h("summary", null, h("span", { class: "start" }, `${text.slice(0, LONG - 20)}…`)), text);
}

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function command(environment) {
  const argv = environment?.argv ?? [];
  return argv.length > 0 ? [argv[0].split("/").at(-1), ...argv.slice(1)].map(quoted).join(" ") : null;
}

function environmentList(environment) {
  const { versions = {}, argv, ...others } = environment;
  const flat = Object.entries(others).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? Object.entries(value).map(([inner, one]) => [`${key} ${inner}`, one]) : [[key, value]]);
  const rows = [...flat, ...Object.entries(versions)].filter(([, value]) => value !== null);
  return h("dl", { class: "environment" }, rows.map(([key, value]) => h("div", null, h("dt", null, key), h("dd", { class: "mono" }, written(value)))));
}

function inputPart(text) {
  const copy = h("button", { type: "button", "data-testid": "config-copy", onclick: () => copyText(copy, text) }, "Copy");
  const body = text ? h("pre", { class: "yaml", tabindex: "0", "data-testid": "config-input", "aria-label": "The config as it was written" }, coloured(text)) : empty("The file that the run was started with is not kept in its folder.");
  return part(null, null, partHead("As written", text && copy), body);
}

function againPart(environment) {
  const line = command(environment);
  const copy = h("button", { type: "button", onclick: () => copyText(copy, line) }, "Copy");
  const again = line && [partHead("The command", copy), h("pre", { class: "yaml command", tabindex: "0", "data-testid": "config-command", "aria-label": "The command" }, line)];
  const known = environment && Object.keys(environment).length > 0;
  return part(null, null, again, h("h2", null, "Where it was trained"), known ? environmentList(environment) : empty("No environment.json in the run's folder."));
}

function resolvedPart(resolved, context) {
  const view = { other: null, name: "", word: "", only: true };
  const search = h("input", { type: "search", placeholder: "Find a key or a value", "aria-label": "Find a key or a value", "data-testid": "config-search", oninput: (event) => set({ word: event.target.value }) });
  const against = select([["", "no other run"]], choose, "config-against");
  const only = check("only what differs", true, (on) => set({ only: on }), "config-only");
  show(only, false);
  const count = h("span", { class: "muted", role: "status" });
  const place = region("Resolved config");
  const tools = h("div", { class: "tools" }, search, field("Against", against), only, count);

  function set(changes) {
    Object.assign(view, changes);
    draw();
  }

  async function choose(id) {
    show(only, id !== "");
    if (id === "") return set({ other: null });
    try {
      set({ other: (await getJson(runPath(id, "/config"))).resolved, name: id });
    } catch (error) {
      setText(count, told(error));
    }
  }

  function draw() {
    const keys = [...new Set([...Object.keys(resolved), ...Object.keys(view.other ?? {})])].sort();
    const word = view.word.trim().toLowerCase();
    const rows = keys.map((key) => ({ key, mine: written(resolved[key]), theirs: view.other ? written(view.other[key]) : null }));
    const differ = (row) => view.other !== null && row.mine !== row.theirs;
    const held = rows.filter((row) => (!view.other || !view.only || differ(row)) && `${row.key} ${row.mine} ${row.theirs ?? ""}`.toLowerCase().includes(word));
    const heads = ["Key", context.run?.name ?? context.id, view.other && view.name].filter((text) => text !== null);
    const absent = (source, key, text) => (key in source ? folded(text) : h("span", { class: "muted" }, "—"));
    const cells = held.map((row) => [row.key, absent(resolved, row.key, row.mine), ...(view.other ? [absent(view.other, row.key, row.theirs)] : [])]);
    const table = cells.map((row, i) => ({ cells: row, class: differ(held[i]) ? "differs" : null }));
    replace(place, dataTable({ caption: "Resolved config", visible: false, columns: heads.map((text) => [text, "mono"]), rows: table, testid: "config-resolved", look: "config" }));
    const differing = rows.filter(differ).length;
    setText(count, view.other ? `${differing} differ, ${rows.length - differing} are the same` : `${held.length} of ${rows.length}`);
  }

  getJson("/api/runs").then(({ runs }) => against.append(...runs.filter((run) => run.id !== context.id).map((run) => h("option", { value: run.id }, run.id))))
    .catch((error) => setText(count, told(error)));
  draw();
  return part("Resolved", null, tools, place);
}

export function mount(element, context) {
  const view = { gone: false, read: false };
  const words = empty("Reading …");
  replace(element, words);

  async function load() {
    try {
      const { input, resolved, environment } = await getJson(runPath(context.id, "/config"));
      if (view.gone || view.read) return;
      view.read = true;
      replace(element, h("div", { class: "halves" }, inputPart(input), againPart(environment)), resolvedPart(resolved ?? {}, context));
    } catch (error) {
      setText(words, told(error));
    }
  }

  load();
  return {
    update() {
      if (!view.read) load();
    },
    destroy() {
      view.gone = true;
    },
  };
}
