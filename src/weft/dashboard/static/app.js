// The shell: header, router on location.hash, theme, connection sign. Views are modules with mount(element, context).

import * as api from "./api.js";
import { announce, h, icon, replace, setIcon, setText, show, setTitle } from "./dom.js";
import { clock } from "./format.js";
import * as keys from "./keys.js";

const THEMES = ["auto", "light", "dark"];
const main = document.getElementById("main");
const crumbs = h("ol", { class: "crumbs" });
const sign = { mark: h("span", { class: "sign-mark" }), word: h("span", { class: "sign-word" }) };
const connection = h(
  "span",
  { class: "sign", "data-testid": "connection", "data-state": "connecting" },
  sign.mark,
  sign.word,
);
const themeButton = h("button", { class: "quiet", type: "button", "data-testid": "theme", onclick: turnTheme });

let shown = { name: null, key: null, view: null };
let turn = 0;
let countdown = 0;

// "#/run/a%2Fb/samples?step=3" -> {name, id, tab, query}
function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").filter(Boolean).map(decoded);
  const given = { query: new URLSearchParams(query), id: undefined, tab: undefined };
  if (parts.length === 0) return { ...given, name: "list" };
  if (parts[0] === "compare") return { ...given, name: "compare" };
  if (parts[0] === "run" && parts[1]) return { ...given, name: "run", id: parts[1], tab: parts[2] ?? "overview" };
  return { ...given, name: "lost" };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a lone % that somebody typed
  }
}

export function runHash(id, tab = "overview") {
  return `#/run/${encodeURIComponent(id)}${tab === "overview" ? "" : `/${tab}`}`;
}

function navigate(hash) {
  if (location.hash === hash) draw();
  else location.hash = hash;
}

const VIEWS = { list: () => import("./list.js"), run: () => import("./run.js"), compare: () => import("./compare.js") };

async function draw() {
  const here = route();
  const key = `${here.name} ${here.id ?? ""}`;
  if (shown.key === key && shown.view?.go) {
    shown.view.go(here);
    drawCrumbs(here);
    return;
  }
  turn += 1;
  const mine = turn;
  shown.view?.destroy();
  const first = shown.key === null;
  shown = { name: here.name, key, view: null };
  connected({ word: "connecting" });
  drawCrumbs(here);
  document.title = "Weft";
  if (here.name === "lost") return void drawWords("There is no such page.", "The list of runs is one step back.");
  try {
    const module = await VIEWS[here.name]();
    if (mine !== turn) return;
    const place = h("div", { class: `view view-${here.name}` });
    replace(main, place);
    shown.view = module.mount(place, contextOf(here));
  } catch (error) {
    if (mine !== turn) return;
    drawWords("This page could not be loaded.", error.message);
    throw error;
  }
  window.scrollTo(0, 0);
  if (!first) main.focus({ preventScroll: true });
}

function contextOf(here) {
  const name = (text, title) => {
    document.title = title ?? `${text} · Weft`;
  };
  return {
    ...here,
    run: null,
    api,
    navigate,
    connected,
    title: name,
    crumb: (text) => drawCrumbs(route(), text),
    words: drawWords,
  };
}

function drawWords(title, text) {
  const back = h("p", null, h("a", { href: "#/" }, "All runs"));
  replace(main, h("div", { class: "words", "data-testid": "words" }, h("h1", null, title), h("p", null, text), back));
}

const TAB_NAMES = { samples: "Samples", config: "Config", adapter: "Adapter", log: "Log" };

function drawCrumbs(here, runName) {
  const items = [h("a", { href: "#/", "aria-current": here.name === "list" ? "page" : null }, "Runs")];
  if (here.name === "run") {
    const inner = here.tab in TAB_NAMES;
    items.push(h("a", { href: runHash(here.id), "aria-current": inner ? null : "page" }, runName ?? here.id));
    if (inner) items.push(h("span", { "aria-current": "page" }, TAB_NAMES[here.tab]));
  }
  if (here.name === "compare") items.push(h("span", { "aria-current": "page" }, "Compare"));
  replace(
    crumbs,
    items.map((item) => h("li", null, item)),
  );
}

// What the sign says, and more at length, where the server is there and refuses.
const REFUSED = {
  gone: ["No such run any more", "The run's folder was deleted or renamed; what is drawn was the last of it."],
  locked: ["Token changed", "The dashboard has another token now: open the page by the URL that it printed."],
};

// The connection sign: live, reconnecting in n s, server gone: last seen ...; told aloud when it changes.
function connected(state) {
  clearInterval(countdown);
  const gone = state.word === "waiting" && state.attempt > 4;
  const words = () => {
    if (state.word === "live") return "Live";
    if (state.word === "hidden") return "Paused while hidden";
    if (state.word === "connecting" && !(state.attempt > 0)) return "Connecting";
    if (state.word === "over") return "Not live";
    if (state.word in REFUSED) return REFUSED[state.word][0];
    const seen = gone && state.seen ? `Server gone, last seen ${clock(state.seen / 1000, true)}` : "No server";
    if (state.word === "connecting") return `${seen}, trying`;
    return `${gone ? seen : "Reconnecting"} in ${Math.max(0, Math.ceil((state.until - Date.now()) / 1000))} s`.replace(
      /^(Server gone.*) in (\d+ s)$/,
      "$1, next try in $2",
    );
  };
  const look = state.word === "live" ? "live" : state.attempt > 0 ? "away" : "connecting";
  const refused = REFUSED[state.word] !== undefined && connection.dataset.word !== state.word;
  if ((connection.dataset.state !== look && look !== "connecting") || refused)
    announce(look === "live" ? "Live" : (REFUSED[state.word]?.[1] ?? "The server does not answer."));
  connection.dataset.state = look;
  connection.dataset.word = state.word;
  document.body.toggleAttribute("data-stale", look === "away"); // what is shown may be so no more
  setTitle(
    connection,
    look === "live"
      ? "The page hears of each step as it ends."
      : (REFUSED[state.word]?.[1] ?? "What is drawn stays; the page goes on by itself when the server answers."),
  );
  setText(sign.word, words());
  if (state.word === "waiting") countdown = setInterval(() => setText(sign.word, words()), 500);
}

function theme() {
  return document.documentElement.dataset.theme ?? "auto";
}

function turnTheme() {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  remember(next);
  drawTheme();
  document.dispatchEvent(new CustomEvent("theme"));
}

function remember(next) {
  try {
    localStorage.setItem("weft-theme", next);
  } catch {
    announce("The browser keeps no settings for this page.");
  }
}

function drawTheme() {
  setIcon(themeButton, theme());
  themeButton.setAttribute("aria-label", `Theme: ${theme()}`);
  themeButton.title = `Theme: ${theme() === "auto" ? "as the system has it" : theme()}`;
}

function drawTop() {
  const mark = h(
    "a",
    { class: "mark", href: "#/", "aria-label": "Weft, all runs" },
    h("span", { class: "mark-sign", "aria-hidden": "true" }),
    "Weft",
  );
  const help = h(
    "button",
    { class: "quiet", type: "button", "aria-label": "Keys", title: "Keys (?)", onclick: keys.showKeys },
    icon("keys"),
  );
  const nav = h("nav", { "aria-label": "Where you are" }, crumbs);
  replace(document.getElementById("top"), mark, nav, h("span", { class: "top-end" }, connection, help, themeButton));
  drawTheme();
}

function refused() {
  const box = h("div", { class: "banner", role: "alert", "data-testid": "refused" });
  replace(box, "This page has lost its key. Open the address with the token that “weft dashboard” printed.");
  if (!document.querySelector(".banner")) document.body.prepend(box);
}

function begin() {
  drawTop();
  keys.listen();
  keys.register("Everywhere", [
    ["?", "these keys", keys.showKeys],
    ["g l", "list of runs", () => navigate("#/")],
    ["t", "theme: auto, light, dark", turnTheme],
  ]);
  window.addEventListener("hashchange", draw);
  document.addEventListener("unauthorised", refused);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    document.dispatchEvent(new CustomEvent("theme")),
  );
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the hash belongs to the router
    main.focus();
  });
  show(main, true);
  draw();
}

begin();
