// Building elements and writing numbers, times and states. Text only ever becomes a text node.

export const STATES = {
  silent: { shape: "■", word: "silent" },
  "is-high": { shape: "▲", word: "is high" },
  drifts: { shape: "◆", word: "drifts" },
  "gets-high": { shape: "△", word: "gets high" },
  "warming-up": { shape: "○", word: "warming up" },
  "not-forecast": { shape: "–", word: "not forecast" },
  calm: { shape: "●", word: "calm" },
};
const GONE = { shape: "■", word: "gone" }; // of a server's own page alone
const UNITS = [["_pct", " %", "%"], ["_mb_s", " MB/s", "MB/s"], ["_gb", " GB", "GB"], ["_ms", " ms", "ms"], ["_s", " s", "s"]];

/** Make an element: `of("p", { class: "muted" }, "text", another)`. Strings become text nodes. */
export function of(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function unit(metric) {
  return UNITS.find(([ending]) => metric.endsWith(ending)) ?? ["", "", ""];
}

export function isPercent(metric) {
  return metric.endsWith("_pct");
}

/** A number with about three digits; a dash where there is none. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size > 0 && size < 0.1) return size < 1e-6 ? value.toExponential(1) : String(+value.toPrecision(2)); // 0.0042, not 0.00
  const written = +size.toPrecision(3); // 99.97 is written as 100 is
  return written >= 1000 ? Math.round(value).toLocaleString("en-US") : value.toFixed(written >= 100 || size === 0 ? 0 : written >= 10 ? 1 : 2);
}

/** A count or a limit: whole numbers stay whole. */
export function count(value) {
  return Number.isInteger(value) ? value.toLocaleString("en-US") : number(value);
}

export function amount(metric, value) {
  const written = number(value);
  return written === "–" ? written : written + unit(metric)[1];
}

/** The same on an axis, where whole numbers need no digits behind the point. */
export function tick(metric, value) {
  return (Math.abs(value) >= 1e6 ? value.toExponential(1) : String(+value.toPrecision(4))) + unit(metric)[1];
}

/** What a difference of two values is measured in. */
export function difference(metric) {
  return isPercent(metric) ? "points" : unit(metric)[2];
}

export function percent(share, digits = 0) {
  return share === null || share === undefined ? "–" : `${(share * 100).toFixed(digits)}\u00a0%`;
}

const DAY = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const YEAR = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

/** A moment in the reader's own time zone; the element tells UTC as its title. */
export function moment(iso) {
  if (!iso) return "–";
  return of("time", { datetime: iso, title: iso }, dated(new Date(iso)));
}

export function clock(seconds) {
  return CLOCK.format(new Date(seconds * 1000));
}

export function day(seconds, hasYear = true) {
  return hasYear ? dated(new Date(seconds * 1000)) : DAY.format(new Date(seconds * 1000));
}

/** A date and time, with the year where it is not this one. */
function dated(date) {
  return (date.getFullYear() === new Date().getFullYear() ? DAY : YEAR).format(date);
}

/** "5 min", "8 h", "2 days". */
export function span(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${+(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** A state in words; of a silent or gone server since when, with the day where `now` is of another one. */
export function state(name, seen, now) {
  const { shape, word } = STATES[name] ?? (name === "gone" ? GONE : { shape: "?", word: name });
  return of("span", { class: `state ${name === "gone" ? "silent" : name}` }, of("span", { class: "shape", "aria-hidden": "true" }, shape), word,
    isQuiet(name) && seen ? [" since ", since(seen, now)] : null);
}

/** Whether a server of this state sends nothing: its values are old. */
export function isQuiet(name) {
  return ["silent", "gone"].includes(name);
}

/** A time of the day of `now` (about), else with its date. */
export function since(iso, now) {
  const hasDay = !now || Math.abs(Date.parse(now) - Date.parse(iso)) > 20 * 3600e3;
  return of("time", { datetime: iso, title: iso }, hasDay ? dated(new Date(iso)) : CLOCK.format(new Date(iso)));
}

/** What stands beside a value that is old: since when its server is silent. */
export function silence(iso, now) {
  return of("span", { class: "silence" }, " silent since ", since(iso, now));
}

/** A link to a server; its name may break behind a sign that parts it, not within a word. */
export function serverLink(name) {
  const parts = name.split(/(?<=[._/:@-])/u).flatMap((part) => [of("wbr"), part]).slice(1);
  return of("a", { href: `#/server?name=${encodeURIComponent(name)}`, "data-focus": `server ${name}` }, parts);
}

/** What stands beside values where closed bins wait: of when the forecast is. */
export function lateness({ origin, bins_waiting: waiting }) {
  if (!waiting || !origin) return null;
  return of("p", { class: "warning" }, "▲ What is forecast is as of ", moment(origin), `: ${count(waiting)} newer ${waiting === 1 ? "bin waits" : "bins wait"} for a forecast, the values now are newer.`);
}

/** Replace what stands in `parent`; keep the focus on what has the same `data-focus`. */
export function fill(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
  parent.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  if (focused === undefined) return;
  for (const element of parent.querySelectorAll("[data-focus]")) {
    if (element.dataset.focus === focused) return element.focus({ preventScroll: true });
  }
}

/** A table that scrolls; on a narrow page its rows become blocks, in which each cell names its column. `numbers`: places of columns. */
export function blocks(label, words, numbers, rows) {
  for (const [place, cell] of rows.flatMap((row) => [...row.cells].map((cell, place) => [place, cell]))) {
    if (place) cell.dataset.label = words[place];
    cell.classList.toggle("none", ["", "–"].includes(cell.textContent));
  }
  const heads = words.map((word, place) => of("th", { scope: "col", class: numbers.includes(place) ? "number" : null }, word));
  return of("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, of("table", { class: "blocks" }, of("thead", {}, of("tr", {}, heads)), of("tbody", {}, rows)));
}

export function facts(pairs) {
  return of("dl", { class: "facts" }, pairs.filter(Boolean).flatMap(([name, value]) => [of("dt", {}, name), of("dd", {}, value)]));
}
