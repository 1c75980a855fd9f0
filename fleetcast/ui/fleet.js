// The fleet: counts, a strip with a cell per server, and a table that the daemon sorts and pages.

import { get, Refused } from "./ask.js";
import { STATES, amount, clock, count, fill, isPercent, lateness, moment, of, percent, serverLink, span, state } from "./text.js";

const ROWS = 100;
const LONGEST = 128; // of a server's name
const MOST = 10_000_000; // servers that a question may pass over
const WORST_FIRST = Object.keys(STATES);
const USUAL = { sort: "state", order: "desc" }; // who needs attention first, then by name

/** What an address asks for; what makes no sense in it counts as not there. */
function askedIn(fields) {
  const offset = Number(fields.get("offset")), order = fields.get("order"), state = fields.get("state");
  return {
    sort: fields.get("sort") || USUAL.sort,
    order: ["asc", "desc"].includes(order) ? order : USUAL.order,
    filter: [...(fields.get("filter") ?? "")].slice(0, LONGEST).join(""),
    state: Object.hasOwn(STATES, state) ? state : "",
    offset: Number.isSafeInteger(offset) && offset > 0 && offset <= MOST ? Math.floor(offset / ROWS) * ROWS : 0,
    limit: ROWS,
  };
}

export function fleet(view, title, fields, again) {
  title.textContent = "Fleet";
  const asked = askedIn(fields);
  const total = of("p", { class: "muted" }), late = of("div", { role: "status" });
  const tiles = of("div", { class: "tiles" });
  const strip = new Strip();
  const found = of("p", { class: "muted", role: "status" });
  const search = of("input", { type: "search", "aria-label": "Part of a server's name", placeholder: "Find a server", value: asked.filter, maxlength: LONGEST });
  const table = of("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of servers" });
  const pager = of("div", { class: "tools" });
  const leftOut = of("section", { class: "card", "aria-label": "Servers that are left out", hidden: true });
  let timer = 0;

  function ask(change) {
    choose(change);
    return again();
  }

  function choose(change) {
    Object.assign(asked, { offset: 0 }, change);
    const query = new URLSearchParams(Object.entries(asked).filter(([name, value]) => value !== "" && value !== 0 && name !== "limit" && (!Object.hasOwn(USUAL, name) || asked.sort !== USUAL.sort || asked.order !== USUAL.order)));
    history.replaceState(null, "", `#/${query.size ? `?${query}` : ""}`);
  }
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => ask({ filter: search.value }), 250);
  });

  async function rows() {
    let answer;
    try {
      answer = await get("fleet", asked);
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 422 || asked.sort === USUAL.sort) throw error;
      choose(USUAL); // no column of this fleet
      return rows();
    }
    if (!answer.rows.length && answer.matching) { // beyond the last page
      choose({ offset: Math.floor((answer.matching - 1) / ROWS) * ROWS });
      return rows();
    }
    fill(late, lateness(answer));
    fill(table, tableOf(answer, asked, ask));
    const last = answer.offset + answer.rows.length;
    found.textContent = answer.matching === 0 ? (answer.servers ? "No server matches." : "") : `${count(answer.offset + 1)} to ${count(last)} of ${count(answer.matching)}`;
    fill(pager,
      of("button", { type: "button", disabled: answer.offset === 0, "data-focus": "before", onclick: () => ask({ offset: Math.max(0, answer.offset - ROWS) }) }, "Previous page"),
      of("button", { type: "button", disabled: last >= answer.matching, "data-focus": "after", onclick: () => ask({ offset: answer.offset + ROWS }) }, "Next page"));
    pager.hidden = answer.matching <= ROWS;
  }

  view.replaceChildren(
    of("div", { class: "head" }, title, total), late, tiles, strip.card,
    of("section", { class: "card", "aria-label": "Servers" }, of("div", { class: "tools" }, search, found), table, pager), leftOut);

  return {
    refreshEvery: 10000,
    async refresh() {
      const [seen] = await Promise.all([get("strip"), rows()]);
      total.textContent = seen.servers === 1 ? "1 server" : `${seen.servers.toLocaleString("en-US")} servers`;
      fill(tiles, WORST_FIRST.filter((name) => name !== "not-forecast" || seen.counts[name] || asked.state === name).map((name) => tileOf(name, seen, asked, ask)));
      strip.show(seen);
      showLeftOut(leftOut, seen.left_out);
    },
    end: () => strip.end(),
  };
}

const LEFT_OUT = [["excluded", "Excluded", "Stored, and nothing is made of it. fleetcast servers include brings one back."],
  ["being_forgotten", "Being forgotten", "Everything stored of it is removed, day by day; then its name is free."]];

function showLeftOut(card, leftOut) {
  const some = LEFT_OUT.filter(([name]) => leftOut[name].servers);
  card.hidden = !some.length;
  fill(card, some.flatMap(([name, word, says]) => {
    const { servers, names } = leftOut[name], rest = servers - names.length;
    return [of("h2", {}, `${word}: ${count(servers)}`), of("p", { class: "names" }, names.join(", ") + (rest ? ` and ${count(rest)} more` : "")), of("p", { class: "muted" }, says)];
  }));
}

function tileOf(name, seen, asked, ask) {
  const isChosen = asked.state === name;
  return of("button", { type: "button", class: "tile", "aria-pressed": isChosen, "data-focus": `tile ${name}`, title: isChosen ? "Show all servers again" : "Show only these",
    onclick: (event) => {
      for (const tile of event.currentTarget.parentNode.children) tile.setAttribute("aria-pressed", "false");
      event.currentTarget.setAttribute("aria-pressed", String(asked.state !== name));
      ask({ state: asked.state === name ? "" : name });
    } },
  state(name), of("span", { class: "value" }, seen.counts[name].toLocaleString("en-US")));
}

function tableOf(answer, asked, ask) {
  const metrics = answer.metrics.filter((metric) => !answer.unsent.includes(metric)), ahead = span(answer.horizon_s);
  const hints = { state: "what needs attention first", limit: `the probability that a metric in percent passes ${answer.limit} % within ${ahead}`, error: "how far forecasts were off in a day, beside repeating the last value", seen: "the newest record" };
  const sorter = (name, word, hint) => {
    const isSorted = asked.sort === name, next = isSorted ? (asked.order === "desc" ? "asc" : "desc") : name === "name" ? "asc" : "desc";
    return of("button", { type: "button", class: isSorted ? "sorted" : null, title: `Sort by ${hint}`, "data-focus": `sort ${name}`, onclick: () => ask({ sort: name, order: next }) },
      word, isSorted && of("span", { "aria-hidden": "true" }, asked.order === "desc" ? " ↓" : " ↑"));
  };
  const head = (names, look, ...children) => of("th", { scope: "col", class: look, "aria-sort": names.includes(asked.sort) ? (asked.order === "desc" ? "descending" : "ascending") : null }, children);
  const plain = (name, word, look = null) => head([name], look, sorter(name, word, hints[name] ?? name));
  const heads = [plain("name", "Server"), plain("state", "State"), plain("limit", `Passes ${answer.limit} %`),
    ...metrics.map((metric) => head([metric, `${metric}.peak`], "number", sorter(metric, metric, metric), sorter(`${metric}.peak`, `peak in ${ahead}`, `the highest p90 of ${metric} ahead`))),
    plain("error", "Forecast is"), plain("seen", "Last seen", "last")];
  const body = answer.rows.map((row) => of("tr", { class: row.state === "silent" ? "old" : null },
    of("th", { scope: "row" }, serverLink(row.server)),
    of("td", {}, state(row.state, row.seen, answer.now)),
    of("td", { class: "nowrap", "data-label": `Passes ${answer.limit} %` }, passesOf(row.limit)),
    metrics.map((metric) => cellOf(metric, row)),
    of("td", { class: "nowrap", "data-label": "Forecast is" }, errorOf(row.error)),
    of("td", { class: "last", "data-label": "Last seen" }, moment(row.seen))));
  if (!body.length) body.push(of("tr", {}, of("td", { class: "empty", colspan: heads.length }, answer.servers ? "No server matches." : "No server has sent anything yet. docs/ingest.md shows how to send the first record.")));
  return of("table", { class: "fleet blocks" }, of("caption", { class: "hidden" }, "Servers, their newest values, and the highest p90 ahead"), of("thead", {}, of("tr", {}, heads)), of("tbody", {}, body));
}

/** Whether a limit is passed within the horizon: how likely, and from when on. */
function passesOf({ is_over: isOver, p, at }) {
  if (isOver) return of("span", { class: "state is-high" }, "is over");
  if (p === null) return of("span", { class: "muted" }, "–");
  const written = p < 0.01 ? "under 1 %" : percent(p);
  if (p < 0.1) return of("span", { class: "muted" }, written);
  return [of("b", { class: p >= 0.5 ? "gets-high" : null }, written), at && of("span", { class: "muted" }, ` from `, of("time", { datetime: at, title: at }, clock(Date.parse(at) / 1000)))];
}

function errorOf(ratio) {
  if (ratio === null) return of("span", { class: "muted", title: "too few forecasts came due" }, "–");
  const gain = Math.round(Math.abs(1 - ratio) * 100);
  if (gain < 2) return of("span", { class: "muted" }, "about equal");
  return of("span", { class: ratio < 1 ? "better" : "worse" }, `${gain} % ${ratio < 1 ? "better" : "worse"}`);
}

/** A metric's newest value, and below it the highest p90 ahead. */
function cellOf(metric, row) {
  const now = row.current[metric], peak = row.peak[metric];
  const value = of("span", { class: "now" }, amount(metric, now));
  if (isPercent(metric) && now !== null) {
    const meter = of("span", { class: `meter${peak >= 90 ? " hot" : ""}`, "aria-hidden": "true" }, of("i"), of("b"));
    meter.firstChild.style.width = `${Math.min(100, peak ?? 0)}%`; // through the DOM: the policy allows no style in the text
    meter.lastChild.style.width = `${Math.min(100, now)}%`;
    value.append(meter);
  }
  const look = now === null && peak === null ? "number none" : "number";
  return of("td", { class: look, "data-label": metric }, value, " ", of("span", { class: peak === null ? "peak none" : "peak" }, amount(metric, peak)));
}

/** One cell per server, in order of names, on a canvas; the arrow keys move over it. */
class Strip {
  constructor() {
    this.canvas = of("canvas", { class: "strip", tabindex: "0", role: "img" });
    this.says = of("p", { class: "strip-says muted", "aria-live": "polite" }, "Point at a cell, or use the arrow keys; Enter opens the server.");
    this.card = of("section", { class: "card", "aria-label": "One cell per server" }, this.canvas, this.says);
    this.cells = new Uint8Array();
    this.chosen = -1;
    this.resizes = new ResizeObserver(() => this.draw());
    this.resizes.observe(this.canvas.parentNode);
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.recolour = () => this.draw();
    this.scheme.addEventListener("change", this.recolour);
    this.canvas.addEventListener("pointermove", (event) => this.choose(this.at(event)));
    this.canvas.addEventListener("click", (event) => { this.choose(this.at(event)); this.open(); });
    this.canvas.addEventListener("keydown", (event) => this.press(event));
  }

  end() {
    this.resizes.disconnect();
    this.scheme.removeEventListener("change", this.recolour);
  }

  show(seen) {
    this.states = seen.states;
    this.cells = Uint8Array.from(atob(seen.bytes), (letter) => letter.charCodeAt(0));
    this.card.hidden = this.cells.length === 0;
    const words = WORST_FIRST.filter((name) => seen.counts[name]).map((name) => `${seen.counts[name]} ${STATES[name].word}`);
    this.canvas.setAttribute("aria-label", `One cell per server, in order of names: ${words.join(", ")}. The table below says the same.`);
    this.draw();
  }

  draw() {
    const width = this.canvas.clientWidth, count = this.cells.length;
    if (!width || !count) return;
    let side = 22;
    while (side > 4 && Math.ceil(count / Math.floor(width / side)) * side > 132) side -= 1;
    this.side = side;
    this.columns = Math.max(1, Math.floor(width / side));
    const height = Math.ceil(count / this.columns) * side, scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const paint = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colours = this.states.map((name) => style.getPropertyValue(`--${name}`).trim());
    paint.scale(scale, scale);
    const gap = side > 8 ? 2 : 1;
    for (let cell = 0; cell < count; cell += 1) {
      paint.fillStyle = colours[this.cells[cell]] ?? "#888";
      paint.fillRect((cell % this.columns) * side, Math.floor(cell / this.columns) * side, side - gap, side - gap);
    }
    if (this.chosen >= 0 && this.chosen < count) {
      paint.strokeStyle = style.getPropertyValue("--text").trim();
      paint.lineWidth = 2;
      paint.strokeRect((this.chosen % this.columns) * side - 0.5, Math.floor(this.chosen / this.columns) * side - 0.5, side - gap + 1, side - gap + 1);
    }
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const cell = Math.floor((event.clientY - box.top) / this.side) * this.columns + Math.min(this.columns - 1, Math.floor((event.clientX - box.left) / this.side));
    return cell < this.cells.length ? cell : -1;
  }

  press(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns };
    if (event.key === "Enter") return this.open();
    let cell;
    if (Object.hasOwn(steps, event.key)) cell = Math.max(this.chosen, this.chosen < 0 ? 0 : this.chosen) + (this.chosen < 0 ? 0 : steps[event.key]);
    else if (event.key === "Home") cell = 0;
    else if (event.key === "End") cell = this.cells.length - 1;
    else return;
    event.preventDefault();
    this.choose(Math.min(this.cells.length - 1, Math.max(0, cell)));
  }

  async choose(cell) {
    if (cell < 0 || cell === this.chosen) return;
    this.chosen = cell;
    this.name = null;
    this.draw();
    const word = STATES[this.states[this.cells[cell]]].word;
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      const { rows, now } = await this.ask(cell);
      if (cell !== this.chosen || !rows.length) return;
      this.name = rows[0].server;
      const values = Object.entries(rows[0].current).map(([metric, value]) => `${metric} ${amount(metric, value)}`);
      const isOld = rows[0].state === "silent";
      fill(this.says, `${this.name}: `, isOld ? state("silent", rows[0].seen, now) : word, isOld ? ". Its last values: " : ". ", values.join(", "));
    }, 80);
  }

  /** The server of a cell; without an answer there is none, and the line below the strip says why. */
  async ask(cell) {
    try {
      return await get("fleet", { offset: cell, limit: 1 });
    } catch (error) {
      this.says.textContent = error instanceof Refused ? error.message : "The daemon does not answer, so this cell has no name.";
      return { rows: [] };
    }
  }

  async open() {
    if (this.chosen < 0) return;
    const name = this.name ?? (await this.ask(this.chosen)).rows[0]?.server;
    if (name !== undefined) location.hash = `#/server?name=${encodeURIComponent(name)}`;
  }
}
