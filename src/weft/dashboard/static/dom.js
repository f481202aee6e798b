// Building and changing elements: text always goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
  else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
  else if (name === "value" || name === "checked" || name === "indeterminate") element[name] = value;
  else element.setAttribute(name, value === true ? "" : String(value));
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) setAttribute(element, name, value);
  for (const child of children.flat(Infinity))
    if (child !== null && child !== undefined && child !== false) element.append(child);
  return element;
}

// An element; attributes may be null. `onclick: f` listens, `style: {"--x": "1px"}` goes through the CSSOM, for the CSP
// forbids inline styles.
export function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

export function replace(element, ...children) {
  element.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
}

// Setters that touch the document only when something changed, so that a live page does not lay out anew each second.
export function setText(element, text) {
  const words = text === null || text === undefined ? "" : String(text);
  if (element.textContent !== words) element.textContent = words;
}

export function setTitle(element, text) {
  if (!text) element.removeAttribute("title");
  else if (element.title !== text) element.title = text;
}

export function show(element, wanted) {
  if (element.hidden === wanted) element.hidden = !wanted;
}

// 16 x 16 line drawings; a state is told by its drawing and its word, the colour only adds.
const ICONS = {
  starting:
    "M8 2a6 6 0 0 1 6 6M14 8a6 6 0 0 1-.5 2.4M11.5 12.9A6 6 0 0 1 8 14M4.5 12.9a6 6 0 0 1-2-2.5M2 8a6 6 0 0 1 1.5-4",
  caching: "M2.5 4.5h11M2.5 8h11M2.5 11.5h6",
  training: "M1.5 9h3l2-5 3 8 2-3h3",
  validating: "M3 8.5l3.2 3.2L13 5M2 14h12",
  sampling: "M2.5 3.5h11v9h-11zM6.8 6v4l3.4-2z",
  saving: "M8 2v8M4.8 7L8 10.2 11.2 7M2.5 13.5h11",
  paused: "M5.5 3v10M10.5 3v10",
  stalled: "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2M8 4.8V8l2.4 1.6",
  finished: "M3 8.5l3.2 3.2L13 5",
  stopped: "M4 4h8v8H4z",
  crashed: "M4 4l8 8M12 4l-8 8",
  active: "M1.5 9h3l2-5 3 8 2-3h3",
  play: "M5 3l8 5-8 5z",
  stop: "M4 4h8v8H4z",
  rate: "M2 12.5c4 0 4-9 7-9 2 0 2 4 5 4",
  info: "M8 7v4.5M8 4.3v.4",
  warn: "M8 2.5L14.2 13H1.8zM8 6.5v3M8 11v.3",
  bad: "M4 4l8 8M12 4l-8 8",
  search: "M7 2.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9M10.3 10.3L14 14",
  keys: "M1.5 4h13v8h-13zM4 7h.1M7 7h.1M10 7h.1M12.5 7h.1M5 9.8h6",
  auto: "M8 2a6 6 0 1 0 0 12zM8 2a6 6 0 0 1 0 12",
  light:
    "M8 5.2a2.8 2.8 0 1 0 0 5.6 2.8 2.8 0 0 0 0-5.6M8 1.2v1.6M8 13.2v1.6M1.2 8h1.6M13.2 8h1.6M3.2 3.2l1.1 1.1M11.7 11.7l1.1 1.1M3.2 12.8l1.1-1.1M11.7 4.3l1.1-1.1",
  dark: "M13.5 9.6A6 6 0 0 1 6.4 2.5a6 6 0 1 0 7.1 7.1z",
  close: "M4 4l8 8M12 4l-8 8",
  download: "M8 2v8M4.8 7L8 10.2 11.2 7M2.5 13.5h11",
};

export function icon(name) {
  const path = svg("path", { d: ICONS[name] ?? ICONS.info });
  return svg(
    "svg",
    { class: `icon icon-${name}`, viewBox: "0 0 16 16", "aria-hidden": "true", focusable: "false" },
    path,
  );
}

export function setIcon(element, name) {
  if (element.dataset.icon === name) return;
  element.dataset.icon = name;
  replace(element, icon(name));
}

// Says something once to screen readers.
export function announce(text) {
  setText(document.getElementById("announce"), text);
}
