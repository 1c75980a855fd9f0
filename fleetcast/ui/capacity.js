// Capacity: who passes a limit within the horizon, how sure and how good such answers were; which disks are full by when.

import { get, Refused } from "./ask.js";
import { amount, fill, moment, number, of, percent, serverLink, span } from "./text.js";

const LIMITS = [70, 80, 90, 95];
const ROWS = 100;
const SOURCES = { forecast: "the forecast", trend: "the line through the last six hours", history: "the server's own past" };
const LOOKS = { over: ["▲", "error"], "may pass": ["◆", "drift"], "not known yet": ["○", "warming_up"] };

export function capacity(view, title) {
  title.textContent = "Capacity";
  let limit = 90;
  const choice = of("select", { id: "limit", onchange: () => { limit = Number(choice.value); page.refresh(); } }, LIMITS.map((value) => of("option", { value, selected: value === limit }, `${value} %`)));
  const soon = of("section", { class: "card", "aria-label": "Within hours" }), proof = of("section", { class: "card" }), later = of("section", { class: "card", "aria-label": "Days and weeks" });
  view.replaceChildren(of("div", { class: "head" }, title, of("p", {}, of("label", { for: "limit" }, "Limit "), choice)), soon, later, proof);
  const page = {
    async refresh() {
      const [found, dates] = await Promise.all([get("capacity", { limit, rows: ROWS }), datesOrReason()]);
      fill(soon, soonOf(found));
      fill(later, laterOf(dates));
      proof.hidden = !found.origin;
      fill(proof, of("h2", {}, "How good the answers within hours were"), of("ul", { class: "log" }, Object.entries(found.metrics).map(([metric, record]) => of("li", {}, of("b", {}, metric), ": ", recordOf(record)))));
    },
  };
  return page;
}

/** The daemon refuses where no day is known yet; its words say so. */
async function datesOrReason() {
  try {
    return await get("capacity/dates", { rows: ROWS });
  } catch (error) {
    if (error instanceof Refused && error.status === 422) return { why: error.message };
    throw error;
  }
}

function soonOf(found) {
  const head = of("h2", {}, `${found.limit} % within ${span(found.horizon_s)}`);
  if (!found.origin) return [head, of("p", { class: "empty" }, "No forecast yet.")];
  if (!found.rows.length) return [head, of("p", { class: "empty" }, `No server is over ${found.limit} %, and none may pass it with a probability of 10 % or more.`)];
  const words = ["Server", "Metric", "Now", "Passes it", "Possible from", "Likely", "Over since"];
  return [
    head,
    of("p", { class: "muted" }, `${found.matching} of ${found.servers} servers${found.matching > found.rows.length ? `, the first ${found.rows.length} are shown` : ""}. Possible from: the p90 gets there; likely: the p50 does.`),
    of("div", { class: "scroll" }, of("table", {}, of("thead", {}, of("tr", {}, words.map((word, place) => of("th", { scope: "col", class: place === 2 ? "number" : null }, word)))),
      of("tbody", {}, found.rows.map(rowOf)))),
  ];
}

function rowOf(row) {
  const [shape, look] = LOOKS[row.state] ?? ["?", ""];
  const word = row.state === "may pass" ? percent(row.p) : row.state === "over" ? "is over" : row.state;
  return of("tr", {}, of("th", { scope: "row" }, serverLink(row.server)), of("td", {}, row.metric), of("td", { class: "number" }, amount(row.metric, row.now)),
    of("td", {}, of("span", { class: `state ${look}` }, of("span", { class: "shape", "aria-hidden": "true" }, shape), word)),
    of("td", {}, row.state === "over" ? "–" : moment(row.first_possible)), of("td", {}, row.state === "over" ? "–" : moment(row.likely)), of("td", {}, moment(row.since)));
}

function recordOf(record) {
  const by = `said by ${SOURCES[record.by] ?? record.by}`;
  if (!record.brier) return `${by}; nothing has settled yet, so no answer was checked.`;
  const scores = Object.entries(record.brier).map(([name, score]) => `${name} ${score.toFixed(4)}`).join(", ");
  return `${by}. Mean squared error (Brier score) of ${record.windows.toLocaleString("en-US")} settled answers: ${scores}.`;
}

function laterOf(dates) {
  if (dates.why) return [of("h2", {}, "Days and weeks"), of("p", { class: "empty" }, `No date yet: ${dates.why}.`)];
  const words = ["Server", "Now", "A day", "Full between", "Probability", "Why there is no date"];
  return [
    of("h2", {}, `${dates.metric} at ${dates.limit} %`),
    of("p", { class: "muted" }, `${dates.with_date} of ${dates.matching} servers have a date, of ${dates.days} days up to ${dates.newest_day.slice(0, 10)} and ${dates.comparisons.toLocaleString("en-US")} comparisons of earlier climbs with what came. A date holds unless room is made.`),
    of("div", { class: "scroll" }, of("table", {}, of("thead", {}, of("tr", {}, words.map((word, place) => of("th", { scope: "col", class: [1, 2, 4].includes(place) ? "number" : null }, word)))),
      of("tbody", {}, dates.rows.map((row) => of("tr", {}, of("th", { scope: "row" }, serverLink(row.server)), of("td", { class: "number" }, amount(dates.metric, row.now)), of("td", { class: "number" }, row.per_day === null ? "–" : `${row.per_day > 0 ? "+" : ""}${number(row.per_day)}`),
        of("td", {}, row.full_between ? row.full_between.join(" to ") : "–"), of("td", { class: "number" }, row.p_within === null ? "–" : `${percent(row.p_within)} in ${row.within_days} days`), of("td", { class: "wide" }, row.why_no_date ?? "")))))),
  ];
}
