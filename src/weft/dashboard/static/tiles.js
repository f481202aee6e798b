// Samples as tiles, and one clock that plays all videos in sight together.

import { h, icon, setIcon, setText } from "./dom.js";
import { check, select } from "./parts.js";

const FRAME = 1 / 16; // s; one frame of the slowest usual video
const SPEEDS = [0.25, 0.5, 1, 2];

export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Makes `wanted` the children of `parent` without moving those that stay: a video that is moved stops.
export function keep(parent, wanted) {
  const staying = new Set(wanted);
  for (const child of [...parent.children]) if (!staying.has(child)) child.remove();
  wanted.forEach((child, i) => parent.children[i] !== child && parent.insertBefore(child, parent.children[i] ?? null));
}

function started(video, refused) {
  video.play().catch((error) => {
    if (error.name === "NotAllowedError") refused();
    else if (error.name !== "AbortError" && error.name !== "NotSupportedError") throw error; // paused or unloaded again; a broken file tells by "error"
  });
}

// One time for many videos. A small drift is taken back by a slightly other rate, a large one by a jump; each loop begins anew.
export function makeClock(tell) {
  const clock = { time: 0, length: 0, speed: 1, loop: true, playing: false, videos: new Set() };
  let last = 0;
  let frame = 0;

  const end = (video) => (Number.isFinite(video.duration) ? video.duration : 0);
  const place = (video, time) => {
    video.currentTime = Math.min(time, Math.max(0, end(video) - FRAME / 2));
  };

  function measured() {
    clock.length = Math.max(0, ...[...clock.videos].map(end));
    tell(clock);
  }

  function follow(video) {
    if (video.readyState < 2 || video.seeking) return;
    if (clock.time >= end(video)) return;
    const drift = clock.time - video.currentTime;
    if (Math.abs(drift) > 4 * FRAME) place(video, clock.time);
    video.playbackRate = clock.speed * (1 + Math.min(0.15, Math.max(-0.15, Math.abs(drift) > 0.01 ? 2 * drift : 0)));
    if (video.paused) started(video, pause);
  }

  function tick(now) {
    if (!clock.playing) return;
    if (clock.length > 0) clock.time += Math.min(0.1, (now - last) / 1000) * clock.speed;
    last = now;
    if (clock.time >= clock.length) turn();
    for (const video of clock.videos) follow(video);
    tell(clock);
    if (clock.playing) frame = requestAnimationFrame(tick);
  }

  function turn() {
    if (!clock.loop && clock.length > 0) {
      clock.time = clock.length;
      pause();
      return;
    }
    clock.time = 0;
    for (const video of clock.videos) place(video, 0);
  }

  function play() {
    if (clock.playing) return;
    if (clock.length > 0 && clock.time >= clock.length) seek(0);
    clock.playing = true;
    last = performance.now();
    frame = requestAnimationFrame(tick);
    tell(clock);
  }

  function pause() {
    clock.playing = false;
    cancelAnimationFrame(frame);
    for (const video of clock.videos) {
      video.pause();
      if (video.readyState > 0) place(video, clock.time);
    }
    tell(clock);
  }

  function seek(time) {
    clock.time = Math.max(0, Math.min(time, clock.length));
    for (const video of clock.videos) if (video.readyState > 0) place(video, clock.time);
    tell(clock);
  }

  function add(video) {
    clock.videos.add(video);
    if (video.readyState > 0) measured();
  }

  function remove(video) {
    video.pause();
    clock.videos.delete(video);
    measured();
  }

  function joined(video) {
    if (!clock.videos.has(video)) return;
    measured();
    place(video, clock.time);
  }
  return Object.assign(clock, { play, pause, seek, add, remove, joined });
}

// Play, speed, loop and place for a clock; `element` is the bar, `tell` what the clock calls.
export function makeTransport() {
  const button = h("button", { type: "button", class: "play", "data-testid": "play", onclick: () => (clock.playing ? clock.pause() : clock.play()) });
  const place = h("input", { type: "range", min: "0", max: "1", step: "0.001", value: "0", "aria-label": "Place in the videos", "data-testid": "scrubber", oninput: moved });
  const time = h("output", { class: "num muted" }, "0.0 / 0.0 s");
  const speed = select(SPEEDS.map((one) => [one, `${one}×`]), (value) => (clock.speed = Number(value)), "speed", "Speed");
  const loop = check("loop", true, (on) => (clock.loop = on), "loop");
  const clock = makeClock(tell);
  speed.value = "1";

  function moved() {
    const wanted = Number(place.value); // a pause tells the clock's own time
    clock.pause();
    clock.seek(wanted);
  }

  function tell(now) {
    setIcon(button, now.playing ? "paused" : "play");
    if (button.getAttribute("aria-label") !== (now.playing ? "Pause" : "Play")) button.setAttribute("aria-label", now.playing ? "Pause" : "Play");
    if (place.max !== String(now.length)) place.max = String(now.length);
    place.step = String(FRAME);
    place.value = now.time;
    setText(time, `${now.time.toFixed(1)} / ${now.length.toFixed(1)} s`);
  }
  tell(clock);
  return { element: h("div", { class: "transport", role: "group", "aria-label": "All videos" }, button, place, time, speed, loop), clock };
}

// Loads videos only while they are in sight; `root` is the box that scrolls, or null for the page.
export function makeLoader(clock, root = null) {
  const addresses = new WeakMap();
  const seen = new IntersectionObserver(
    (changes) => {
      for (const { target, isIntersecting } of changes) {
        if (isIntersecting && !target.hasAttribute("src")) {
          target.src = addresses.get(target);
          clock.add(target);
        } else if (!isIntersecting && target.hasAttribute("src")) {
          clock.remove(target);
          target.removeAttribute("src");
          target.load();
        }
      }
    },
    { root, rootMargin: "160px" },
  );
  return {
    watch(video, address) {
      addresses.set(video, address);
      video.addEventListener("loadedmetadata", () => clock.joined(video));
      seen.observe(video);
    },
    forget(video) {
      seen.unobserve(video);
      clock.remove(video);
    },
    close() {
      seen.disconnect();
      clock.pause();
    },
  };
}

const missing = (text) => h("span", { class: "missing", "data-testid": "missing" }, icon("info"), text);

// A sample as an element: a video, an image, a quoted text, or a word where it is gone. `beside`: the text to compare with.
export function tile(sample, loader, beside = null) {
  if (!sample) return missing("not made");
  if (sample.kind === "text") return sample.text === null ? missing("file is gone") : h("blockquote", { class: "reply" }, beside === null ? sample.text : marked(sample.text, beside));
  if (sample.media === null) return missing("file is gone");
  const label = `${sample.prompt}, ${sample.adapter ? `step ${sample.step}` : "without the adapter"}`;
  if (sample.kind === "image") return h("img", { src: sample.media, alt: label, loading: "lazy", onerror: (event) => event.target.replaceWith(missing("file is gone")) });
  const video = h("video", { preload: "metadata", playsinline: true, muted: true, "aria-label": label });
  video.muted = true;
  video.disablePictureInPicture = true;
  video.addEventListener("error", () => {
    if (!video.hasAttribute("src")) return; // unloaded on purpose
    loader.forget(video);
    video.replaceWith(missing("file is gone or broken"));
  });
  loader.watch(video, sample.media);
  return video;
}

// A tile as the content of a button: an image or a video has a name of its own, the others are told where they stand.
export function named(inside, label) {
  return inside.matches("video, img") ? inside : [h("span", { class: "visually-hidden" }, `${label}: `), inside];
}

// The words of a text; those that are not in the other (a longest common subsequence) are marked softly.
function marked(text, other) {
  const words = text.split(/(?<=\s)/);
  const same = common(words, other.split(/(?<=\s)/));
  return words.map((word, i) => (same.has(i) || !word.trim() ? word : h("mark", null, word)));
}

function common(mine, theirs) {
  if (mine.length * theirs.length > 4e6) return new Set(mine.keys()); // too long to compare: nothing is marked
  const equal = (i, j) => mine[i].trim() === theirs[j].trim();
  const lengths = Array.from({ length: mine.length + 1 }, () => new Uint16Array(theirs.length + 1));
  for (let i = mine.length - 1; i >= 0; i -= 1) {
    for (let j = theirs.length - 1; j >= 0; j -= 1) lengths[i][j] = equal(i, j) ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  }
  const same = new Set();
  for (let i = 0, j = 0; i < mine.length && j < theirs.length; ) {
    if (equal(i, j)) {
      same.add(i);
      i += 1;
      j += 1;
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i += 1;
    else j += 1;
  }
  return same;
}
