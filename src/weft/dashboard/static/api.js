// Asking the server: JSON in and out, and one sentence when something is wrong.

import { live } from "./live.js";

export { live };

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: the server did not answer
  }
}

// Seconds by which the server's clock is ahead of this one; from the Date header, so good to a second.
let ahead = 0;

export function now() {
  return Date.now() / 1000 + ahead;
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The dashboard's server does not answer.", 0);
  }
  const date = Date.parse(response.headers.get("Date") ?? "");
  if (!Number.isNaN(date) && Math.abs(date - Date.now()) > 2000) ahead = (date - Date.now()) / 1000;
  const text = await response.text();
  const body = jsonOf(text);
  if (response.ok && body !== undefined) return body;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("unauthorised"));
  throw new ApiError(body?.error ?? `The server answered ${response.status}.`, response.status);
}

function jsonOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // an answer that is no JSON is told by its status
  }
}

export function getJson(path, signal) {
  return answer(path, { signal });
}

export function postJson(path, body) {
  return answer(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

// "/api/runs/group%2Fzorp" + rest; an id is one segment, whatever is in it.
export function runPath(id, rest = "") {
  return `/api/runs/${encodeURIComponent(id)}${rest}`;
}

// Curves: ask = {names, from?, to?, points?, smooth?, rank?}; from and to are steps.
export function getSeries(id, ask, signal) {
  const query = new URLSearchParams(ask.names.map((name) => ["names", name]));
  for (const key of ["from", "to", "points", "smooth", "rank"]) {
    if (ask[key] !== undefined && ask[key] !== null) query.set(key, String(ask[key]));
  }
  return getJson(runPath(id, `/series?${query}`), signal);
}

export function control(id, command, given = {}) {
  return postJson(runPath(id, "/control"), { command, arguments: given });
}
