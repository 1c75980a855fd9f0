// One server: what was in the time that is chosen, the fan of the next 8 hours, what was said before, and how good that was.

import { get, Refused } from "./ask.js";
import { Chart } from "./chart.js";
import { Range, iso } from "./range.js";
import { amount, clock, difference, facts, fill, isPercent, isQuiet, moment, number, of, percent, silence, span, state, tick } from "./text.js";

const MOST_HOURS = 168; // that one answer about a server holds; /history knows what is older
const USUAL_LEAD = "12"; // bins ahead
const STEP_MS = 1000;
const FEWEST = 12; // forecasts that came due, before a figure says how good they are; as /accuracy asks of its worst
const SOURCES = { model: "the model, mixed with the experts", fallback: "the naive forecast, mixed with the experts", warming_up: "none yet: the first bin has to close", not_forecast: "none", gone: "none: this server is gone. What is stored of it is below" };

export function server(view, title, fields, again) {
  const name = fields.get("name") ?? "";
  title.textContent = name || "No server is named in this address";
  let lead = fields.get("said") ?? USUAL_LEAD;
  const standing = of("p");
  const about = of("section", { class: "card", "aria-label": "About this server" });
  const cards = new Map(); // by metric
  const grid = of("div", { class: "grid" });
  const choice = of("fieldset", {}, of("legend", {}, "Compare with"));
  const range = new Range(fields, () => {
    keep();
    if (range.known) for (const card of cards.values()) card.chart.aim(range.shown); // the next key builds on it
    again();
  });
  const zoom = (from, to) => range.zoom(from, to);
  const older = { key: "", past: null };
  let found = null, keptAt = -STEP_MS;

  /** Keep the choice in the address, as a step that Back undoes; quick keys are one step. */
  function keep() {
    const isStep = performance.now() - keptAt >= STEP_MS;
    keptAt = performance.now();
    history[isStep ? "pushState" : "replaceState"](null, "", `#/server?${new URLSearchParams({ name, said: lead, ...range.fields })}`);
  }

  function choose(value) {
    lead = value;
    keep();
    draw();
  }

  function draw() {
    for (const [metric, card] of cards) card.show(found, metric, lead, range);
  }

  /** The past that is shown: that of the answer, or of /history where it begins before. */
  async function pastOf(answer) {
    const [from, to] = range.shown, end = Math.min(to, range.known.end);
    if (from >= Date.parse(answer.past.start) / 1000 || end <= from) return answer.past;
    const key = `${from} ${end}`;
    if (older.key !== key) Object.assign(older, { key, past: await historyOf(answer.past, from, end) });
    return older.past;
  }

  /** The stored past; of a time that holds nothing of a server that is gone, the answer without a value. */
  async function historyOf(past, from, end) {
    try {
      return await get("../history", { server: name, start: iso(from), end: iso(end) });
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 404) throw error;
      const actual = new Array(Math.ceil((end - from) / past.bin_s)).fill(null);
      return { ...past, start: iso(from), end: iso(end), metrics: Object.fromEntries(Object.keys(past.metrics).map((metric) => [metric, { actual, said: {}, accuracy: {} }])) };
    }
  }

  view.replaceChildren(of("div", { class: "head" }, of("a", { href: "#/" }, "← Fleet"), title, standing), about,
    of("div", { class: "tools" }, range.spans, range.buttons, range.says), of("div", { class: "tools" }, choice), grid);
  return {
    async refresh() {
      if (!name) throw new Refused(404, "the table of the fleet links to each server");
      const answer = await get("server", { name, hours: Math.min(range.hours, MOST_HOURS) });
      range.learn(answer.past, answer.timestamps.length ? Date.parse(answer.timestamps.at(-1)) / 1000 : null, answer.oldest, answer.state === "gone");
      found = { ...answer, past: await pastOf(answer) };
      fill(standing, state(found.state, found.seen, found.now));
      fill(about, aboutOf(found));
      const bin = found.past.bin_s, leads = [...new Set(Object.values(found.past.metrics).flatMap((past) => Object.keys(past.said)))].filter((bins) => bins > 1);
      if (leads.length && ![...leads, ""].includes(lead)) lead = leads.includes(USUAL_LEAD) ? USUAL_LEAD : leads[0];
      fill(choice, of("legend", {}, "In the past, show also"), [...leads.sort((a, b) => a - b).map((bins) => [bins, `what was forecast ${span(bins * bin)} before`]), ["", "nothing else"]].map(([value, word]) =>
        of("label", {}, of("input", { type: "radio", name: "lead", value, checked: lead === value, "data-focus": `lead ${value}`, onchange: () => choose(value) }), ` ${word}`)));
      choice.hidden = leads.length === 0;
      for (const metric of Object.keys(found.past.metrics)) {
        const isKnown = found.past.metrics[metric].actual.some((value) => value !== null) || Object.hasOwn(found.forecast, metric);
        if (isKnown && !cards.has(metric)) {
          const card = new Card(metric, zoom);
          cards.set(metric, card);
          grid.append(card.element);
        }
      }
      draw();
    },
    end: () => { for (const card of cards.values()) card.chart.end(); },
  };
}

function aboutOf(found) {
  const others = Object.keys(found.values).filter((metric) => !Object.hasOwn(found.past.metrics, metric));
  const unlike = Object.keys(found.sources).filter((metric) => found.sources[metric] !== found.source);
  const isOld = isQuiet(found.state);
  return [
    facts([
      ["Last record", moment(found.seen)],
      ["Forecast by", found.source === "model" && found.model ? `${SOURCES.model} (version ${found.model.version})` : SOURCES[found.source]],
      found.source === "not_forecast" && ["Why", `It sends none of the metrics that are forecast: ${Object.keys(found.past.metrics).join(", ")}. The setting bins.forecast_metrics names them.`],
      unlike.length > 0 && ["Except", `${unlike.join(" · ")}: ${SOURCES[found.sources[unlike[0]]]}`],
      ...found.drifting.map((item) => [`${item.metric} drifts`, of("span", { class: "drifts" }, `${item.sentence ?? item.says ?? "differs from its training data"}, since `, moment(item.since))]),
      others.length > 0 && ["Other metrics", of("span", { class: isOld ? "old" : null }, others.map((metric) => `${metric} ${amount(metric, found.values[metric])}`).join(" · "), isOld && silence(found.seen, found.now))],
      found.state === "silent" && ["Note", "Its values are the last ones that it sent, and its forecast rests on them."],
    ]),
  ];
}

/** The chart of one metric with its sentence and its accuracy. */
class Card {
  constructor(metric, zoom) {
    this.metric = metric;
    this.chart = new Chart({
      label: `${metric}: what was measured, and the forecast. Arrow keys read it, plus and minus zoom, Escape shows everything.`,
      zoom,
      sync: "server",
      ceiling: isPercent(metric) ? 100 : undefined,
      write: (value) => amount(metric, value),
      tick: (value) => tick(metric, value),
      lines: [
        { label: "measured", colour: "--text", swatch: "c-text", width: 1.4 },
        { label: "forecast, p50", colour: "--accent", swatch: "c-accent", width: 2 },
        { label: "p10 to p90", tableLabel: "forecast, p10", colour: "--accent", swatch: "fill b-band", isHidden: true, reads: (data, place) => `${amount(metric, data[3][place])} to ${amount(metric, data[4][place])}` },
        { tableLabel: "forecast, p90", colour: "--accent", isHidden: true },
        { label: "said before", tableLabel: "said before, p50", colour: "--said", swatch: "dash c-said", width: 1.2, dash: [4, 3] },
        { label: "p10 to p90", tableLabel: "said before, p10", colour: "--said", swatch: "fill b-said", isHidden: true, reads: (data, place) => `${amount(metric, data[6][place])} to ${amount(metric, data[7][place])}` },
        { tableLabel: "said before, p90", colour: "--said", isHidden: true },
      ],
      bands: [{ series: [4, 3], fill: "--band" }, { series: [7, 6], fill: "--said-band" }],
    });
    this.newest = of("span", { class: "number" });
    this.accuracy = of("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `How good forecasts of ${metric} were` });
    this.element = of("section", { class: "card", "aria-label": metric },
      of("figure", {}, of("h2", {}, metric, this.newest), this.chart.holder, this.chart.reads, this.chart.caption), this.accuracy, this.chart.toggle, this.chart.table);
  }

  show(found, metric, lead, range) {
    const [from, to] = range.shown, isAhead = to > range.known.end;
    const past = found.past.metrics[metric], fan = isAhead && Object.hasOwn(found.forecast, metric) ? found.forecast[metric] : undefined;
    const start = Date.parse(found.past.start) / 1000, bin = found.past.bin_s, count = past.actual.length;
    const ahead = fan ? found.timestamps.map((iso) => Date.parse(iso) / 1000) : [];
    const times = [...Array.from({ length: count }, (_, place) => start + place * bin), ...ahead];
    const empty = (length) => new Array(length).fill(null);
    const future = (values) => [...empty(count), ...(fan ? values : [])];
    const said = Object.hasOwn(past.said, lead) ? past.said[lead] : undefined;
    const before = (values) => [...(values ?? empty(count)), ...empty(ahead.length)];
    const isOld = isQuiet(found.state);
    this.newest.classList.toggle("old", isOld);
    fill(this.newest, amount(metric, found.current[metric]), isOld && silence(found.seen, found.now));
    this.chart.show([times, [...past.actual, ...empty(ahead.length)], future(fan?.p50), future(fan?.p10), future(fan?.p90), before(said?.p50), before(said?.p10), before(said?.p90)], range.known.end, [from, to]);
    const seen = past.actual.filter((value, place) => value !== null && times[place] >= from && times[place] <= to);
    this.chart.caption.textContent = sentence(metric, seen, fan, ahead, bin) + (isAhead && !fan && found.state !== "gone" ? "No forecast yet." : "");
    const isKnown = (value) => value !== null;
    fill(this.accuracy, accuracyOf(past.accuracy, metric, bin, (past.actual.findLastIndex(isKnown) - past.actual.findIndex(isKnown) + 1) * bin));
  }
}

function sentence(metric, known, fan, ahead, bin) {
  const was = known.length ? `Measured between ${amount(metric, Math.min(...known))} and ${amount(metric, Math.max(...known))}. ` : "Nothing measured in this time. ";
  if (!fan) return was;
  const highest = Math.max(...fan.p50), at = ahead[fan.p50.indexOf(highest)];
  return `${was}Next ${span(ahead.length * bin)}: p50 highest at ${clock(at)} with ${amount(metric, highest)}; p10 to p90 from ${amount(metric, Math.min(...fan.p10))} to ${amount(metric, Math.max(...fan.p90))}.`;
}

function accuracyOf(accuracy, metric, bin, length) {
  const rows = Object.entries(accuracy).filter(([, found]) => found.bins > 0);
  if (!rows.length) return of("p", { class: "muted" }, "No forecast came due in this time, so there is no accuracy to show.");
  return of("table", { class: "small" }, of("caption", {}, `How far forecasts were off in ${span(length)}`, of("span", { class: "hidden" }, `: ${metric}, beside repeating the last value`)),
    of("thead", {}, of("tr", {}, ["Ahead", "Forecast is", `Its error, ${difference(metric)}`, "Last value's error", "In p10 to p90"].map((word, place) => of("th", { scope: "col", class: place ? "number" : null }, word)))),
    of("tbody", {}, rows.map(([bins, found]) => of("tr", { title: `${found.bins} bins` }, of("th", { scope: "row" }, span(bins * bin)),
      of("td", { class: "number" }, verdict(found.ratio, found.bins)), of("td", { class: "number" }, number(found.error)), of("td", { class: "number" }, number(found.last_value_error)),
      of("td", { class: "number" }, percent(found.inside))))));
}

function verdict(ratio, bins) {
  if (ratio === null) return "–";
  if (bins < FEWEST) return of("span", { class: "muted" }, `too few yet (${bins})`);
  const gain = Math.round(Math.abs(1 - ratio) * 100);
  if (gain < 2) return of("span", { class: "muted" }, "about equal");
  return of("span", { class: ratio < 1 ? "better" : "worse" }, `${gain} % ${ratio < 1 ? "better" : "worse"}`);
}
