// Server-sent events that come back by themselves: closed while the tab is hidden, taken up where they ended.

const WAITS = [0.5, 1, 2, 3, 5]; // seconds before each new attempt; the last for all further ones

// Follows one run (`run`: its id) or the list of runs (none). `after`: position of the last record that is known.
// hear: {runs, run, points, entry, reset, state}; state({word, until, seen, attempt}), word: live, connecting, waiting
// hidden, gone (the server answers, and has no such run) or locked (it has another token now).
export function live({ run, after, hear }) {
  const at = { position: after ?? null, attempt: 0, seen: null, source: null, timer: 0, closed: false, refused: null };

  const tell = (word, until = null) => hear.state?.({ word, until, seen: at.seen, attempt: at.attempt });

  function address() {
    const query = new URLSearchParams();
    if (run !== undefined) query.set("run", run);
    if (at.position !== null) query.set("after", String(at.position));
    const text = query.toString();
    return text ? `/api/live?${text}` : "/api/live";
  }

  function heard(event) {
    at.seen = Date.now();
    if (event.lastEventId !== "" && event.type === "points") at.position = event.lastEventId;
    hear[event.type]?.(JSON.parse(event.data));
  }

  function open() {
    clearTimeout(at.timer);
    if (at.closed || document.hidden || at.source) return;
    tell(at.refused ?? "connecting");
    const source = new EventSource(address());
    at.source = source;
    source.onopen = () => {
      at.attempt = 0;
      at.refused = null;
      at.seen = Date.now();
      tell("live");
    };
    source.onerror = () => again(source);
    for (const name of ["runs", "run", "points", "entry", "reset"]) source.addEventListener(name, heard);
  }

  function drop() {
    at.source?.close();
    at.source = null;
  }

  function again(source) {
    if (source !== at.source) return;
    drop();
    const wait = WAITS[Math.min(at.attempt, WAITS.length - 1)] * 1000;
    at.attempt += 1;
    at.timer = setTimeout(open, wait);
    const until = Date.now() + wait;
    tell(at.refused ?? "waiting", until);
    refusal().then((word) => {
      at.refused = word;
      if (word && !at.closed && !at.source && !document.hidden) tell(word, until);
    });
  }

  // Why the server, if it is there, does not let the page follow.
  async function refusal() {
    try {
      const { status } = await fetch(run === undefined ? "/api/runs" : `/api/runs/${encodeURIComponent(run)}`);
      return { 401: "locked", 404: "gone" }[status] ?? null;
    } catch {
      return null;
    }
  }

  function turned() {
    if (document.hidden) {
      clearTimeout(at.timer);
      drop();
      tell("hidden");
    } else open();
  }

  document.addEventListener("visibilitychange", turned);
  window.addEventListener("online", open);
  open();
  return {
    close() {
      at.closed = true;
      clearTimeout(at.timer);
      drop();
      document.removeEventListener("visibilitychange", turned);
      window.removeEventListener("online", open);
    },
    // Goes on after another position: everything was loaded again.
    moveTo(position) {
      at.position = position;
      drop();
      open();
    },
  };
}
