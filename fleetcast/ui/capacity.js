// Capacity: who passes a limit within the horizon, how sure and how good such answers were; which disks are full by when.

import { get, Refused } from "./ask.js";
import { amount, blocks, count, fill, lateness, moment, number, of, percent, serverLink, silence, span } from "./text.js";

const LIMITS = [70, 80, 90, 95];
const USUAL = 90;
const ROWS = 100;
const SOURCES = { forecast: "the forecast", trend: "the line through the last six hours", history: "the server's own past" };
const DAY = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", timeZone: "UTC" }); // a whole day is one of UTC
const LOOKS = { over: ["▲", "is-high"], "may pass": ["◆", "drifts"], "not known yet": ["○", "warming-up"] };

export function capacity(view, title, fields, again) {
  title.textContent = "Capacity";
  let limit = LIMITS.includes(Number(fields.get("limit"))) ? Number(fields.get("limit")) : USUAL;
  let metric = fields.get("metric") ?? ""; // of the dates; without one: how full the disks are
  const keep = () => {
    const query = new URLSearchParams({ ...(limit === USUAL ? {} : { limit }), ...(metric ? { metric } : {}) });
    history.replaceState(null, "", `#/capacity${query.size ? `?${query}` : ""}`);
    return again();
  };
  const choice = of("select", { id: "limit", onchange: () => { limit = Number(choice.value); keep(); } }, LIMITS.map((value) => of("option", { value, selected: value === limit }, `${value} %`)));
  const soon = of("section", { class: "card", "aria-label": "Within hours" }), proof = of("section", { class: "card" }), later = of("section", { class: "card", "aria-label": "Days and weeks" });
  view.replaceChildren(of("div", { class: "head" }, title, of("p", {}, of("label", { for: "limit" }, "Limit "), choice)), soon, later, proof);
  const datesOf = (name) => get("capacity/dates", { metric: name, rows: ROWS });
  /** Ask for dates; of those of disks where the address names no metric that has or may have some. */
  async function askForDates() {
    const isRefused = (error) => error instanceof Refused && error.status === 422 && metric;
    const dates = await datesOf(metric).catch((error) => (isRefused(error) ? null : Promise.reject(error)));
    if (dates && (!metric || !dates.waits || dates.waits.is_sent)) return dates;
    if (!dates?.waits.is_reading) metric = "";
    return datesOf("");
  }
  const choose = (name) => { metric = name; keep(); };
  return {
    async refresh() {
      const [found, dates] = await Promise.all([get("capacity", { limit, rows: ROWS }), askForDates()]);
      fill(soon, soonOf(found));
      fill(later, laterOf(dates, choose));
      proof.hidden = !found.origin;
      fill(proof, of("h2", {}, "How good the answers within hours were"), of("ul", { class: "log" }, Object.entries(found.metrics).filter(([metric]) => !found.not_sent.includes(metric)).map(([metric, record]) => of("li", {}, of("b", {}, metric), ": ", recordOf(record)))));
    },
  };
}

function soonOf(found) {
  const head = of("h2", {}, `${found.limit} % within ${span(found.horizon_s)}`);
  if (!found.origin) return [head, of("p", { class: "empty" }, "No forecast yet.")];
  if (!found.rows.length) return [head, lateness(found), of("p", { class: "empty" }, `No server is over ${found.limit} %, and none may pass it with a probability of 10 % or more.`)];
  const silent = found.silent ? ` ${count(found.silent)} of these ${found.silent === 1 ? "is of a server that is" : "are of servers that are"} silent; they stand last.` : "";
  const words = ["Server", "Metric", "Now", "Passes it", "Possible from", "Likely", "Over since"];
  return [
    head,
    lateness(found),
    of("p", { class: "muted" }, `${count(found.matching)} series of ${count(found.servers)} ${found.servers === 1 ? "server" : "servers"}${found.matching > found.rows.length ? `, the first ${found.rows.length} are shown` : ""}.${silent} Possible from: the p90 gets there; likely: the p50 does.`),
    blocks("Servers that are over the limit or may pass it", words, [2], found.rows.map(rowOf)),
  ];
}

function rowOf(row) {
  const [shape, look] = LOOKS[row.state] ?? ["?", ""];
  const word = row.state === "may pass" ? percent(row.p) : row.state === "over" ? "is over" : row.state;
  return of("tr", { class: row.silent_since ? "old" : null }, of("th", { scope: "row" }, serverLink(row.server)), of("td", {}, row.metric), of("td", { class: `number${row.silent_since ? " old" : ""}` }, amount(row.metric, row.now), row.silent_since && silence(row.silent_since)),
    of("td", {}, of("span", { class: `state ${look}` }, of("span", { class: "shape", "aria-hidden": "true" }, shape), word)),
    of("td", {}, moment(row.first_possible)), of("td", {}, moment(row.likely)), of("td", {}, moment(row.since), row.since_or_before && row.since && " or before"));
}

function recordOf(record) {
  const by = `said by ${SOURCES[record.by] ?? record.by}`;
  if (!record.brier) return `${by}; nothing has settled yet, so no answer was checked.`;
  const scores = Object.entries(record.brier).map(([name, score]) => `${name} ${score.toFixed(4)}`).join(", ");
  return `${by}: ${record.why}. Mean squared error (Brier score) of ${record.windows.toLocaleString("en-US")} settled answers: ${scores}.`;
}

/** What dates wait for, and from when on there are some. */
function waitOf({ metric, known, waits }) {
  if (waits.is_reading && !known.length) return "The stored days are being read. Dates come within a minute.";
  if (waits.is_sent) return [`A date needs whole days of ${metric}, and none has passed yet. The first one counts from `, moment(waits.first), " on; a climb is judged from the seventh day on."];
  const others = known.length ? "Dates of another metric are a choice above." : "";
  return `No server sends ${metric}, so no disk has a date. Dates begin with the first whole day of it. ${others}`;
}

function dateOf(row, metric) {
  return of("tr", {}, of("th", { scope: "row" }, serverLink(row.server)),
    of("td", { class: `number${row.silent_since ? " old" : ""}` }, amount(metric, row.now), row.silent_since && silence(row.silent_since)),
    of("td", { class: "number" }, row.per_day === null ? "–" : `${row.per_day > 0 ? "+" : ""}${number(row.per_day)}`),
    of("td", {}, row.full_between ? row.full_between.join(" to ") : "–"),
    of("td", { class: "number" }, row.p_within === null ? "–" : `${percent(row.p_within)} in ${row.within_days} days`),
    of("td", { class: "wide" }, row.why_no_date ?? ""));
}

function laterOf(dates, choose) {
  const names = [...new Set([dates.metric, ...dates.known])];
  const choice = names.length > 1 && of("p", {}, of("label", { for: "metric" }, "Metric "),
    of("select", { id: "metric", "data-focus": "metric", onchange: (event) => choose(event.target.value) }, names.map((name) => of("option", { value: name, selected: name === dates.metric }, name))));
  if (dates.waits) return [of("h2", {}, "Days and weeks"), choice, of("p", { class: "empty" }, waitOf(dates))];
  const words = ["Server", `Highest on ${DAY.format(new Date(dates.newest_day))}`, "A day", "Full between", "Probability", "Why there is no date"];
  return [
    of("h2", {}, `${dates.metric} at ${dates.limit} %`), choice,
    of("p", { class: "muted" }, `${dates.with_date} of ${dates.matching} servers have a date, of ${dates.days} days up to ${dates.newest_day.slice(0, 10)} and ${dates.comparisons.toLocaleString("en-US")} comparisons of earlier climbs with what came. A date holds unless room is made.`),
    blocks("By when the limit is reached", words, [1, 2, 4], dates.rows.map((row) => dateOf(row, dates.metric))),
  ];
}
