// One server: 48 hours of what was, the fan of the next 8 hours, what was said before, and how good that was.

import { get } from "./ask.js";
import { Chart } from "./chart.js";
import { amount, clock, difference, facts, fill, isPercent, moment, number, of, percent, span, state, tick } from "./text.js";

const HOURS = 48;
const SOURCES = { model: "the model, mixed with the experts", fallback: "the naive forecast, mixed with the experts", warming_up: "none yet: the first bin has to close" };

export function server(view, title, fields) {
  const name = fields.get("name") ?? "";
  title.textContent = name;
  let lead = fields.get("said") ?? "12"; // bins ahead
  const standing = of("p");
  const about = of("section", { class: "card", "aria-label": "About this server" });
  const cards = new Map(); // by metric
  const grid = of("div", { class: "grid" });
  const choice = of("fieldset", {}, of("legend", {}, "Compare with"));
  let found = null;

  function choose(value) {
    lead = value;
    history.replaceState(null, "", `#/server?${new URLSearchParams({ name, said: lead })}`);
    draw();
  }

  function draw() {
    for (const [metric, card] of cards) card.show(found, metric, lead);
  }

  view.replaceChildren(of("div", { class: "head" }, of("a", { href: "#/" }, "← Fleet"), title, standing), about, of("div", { class: "tools" }, choice), grid);
  return {
    async refresh() {
      found = await get("server", { name, hours: HOURS });
      fill(standing, state(found.state));
      fill(about, aboutOf(found));
      const bin = found.past.bin_s, leads = [...new Set(Object.values(found.past.metrics).flatMap((past) => Object.keys(past.said)))].filter((bins) => bins > 1);
      fill(choice, of("legend", {}, "In the past, show also"), [...leads.sort((a, b) => a - b).map((bins) => [bins, `what was forecast ${span(bins * bin)} before`]), ["", "nothing else"]].map(([value, word]) =>
        of("label", {}, of("input", { type: "radio", name: "lead", value, checked: lead === value, "data-focus": `lead ${value}`, onchange: () => choose(value) }), ` ${word}`)));
      choice.hidden = leads.length === 0;
      for (const metric of Object.keys(found.past.metrics)) {
        const isKnown = found.past.metrics[metric].actual.some((value) => value !== null) || metric in found.forecast;
        if (isKnown && !cards.has(metric)) {
          const card = new Card(metric);
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
  const others = Object.keys(found.values).filter((metric) => !(metric in found.past.metrics));
  const unlike = Object.keys(found.sources).filter((metric) => found.sources[metric] !== found.source);
  return [
    facts([
      ["Last record", moment(found.seen)],
      ["Forecast by", found.source === "model" && found.model ? `${SOURCES.model} (version ${found.model.version})` : SOURCES[found.source]],
      unlike.length > 0 && ["Except", `${unlike.join(" · ")}: ${SOURCES[found.sources[unlike[0]]]}`],
      ...found.drifting.map((item) => [`${item.metric} drifts`, of("span", { class: "drift" }, `${item.sentence ?? item.says ?? "differs from its training data"}, since `, moment(item.since))]),
      others.length > 0 && ["Other metrics", others.map((metric) => `${metric} ${amount(metric, found.values[metric])}`).join(" · ")],
    ]),
  ];
}

/** The chart of one metric with its sentence and its accuracy. */
class Card {
  constructor(metric) {
    this.metric = metric;
    this.chart = new Chart({
      label: `${metric}: the last ${HOURS} hours and the forecast`,
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
    this.accuracy = of("div", { class: "scroll" });
    this.element = of("section", { class: "card", "aria-label": metric },
      of("figure", {}, of("h2", {}, metric, this.newest), this.chart.holder, this.chart.reads, this.chart.caption), this.accuracy, this.chart.toggle, this.chart.table);
  }

  show(found, metric, lead) {
    const past = found.past.metrics[metric], fan = found.forecast[metric];
    const start = Date.parse(found.past.start) / 1000, bin = found.past.bin_s, count = past.actual.length;
    const ahead = fan ? found.timestamps.map((iso) => Date.parse(iso) / 1000) : [];
    const times = [...Array.from({ length: count }, (_, place) => start + place * bin), ...ahead];
    const empty = (length) => new Array(length).fill(null);
    const future = (values) => [...empty(count), ...(fan ? values : [])];
    const said = past.said[lead];
    const before = (values) => [...(values ?? empty(count)), ...empty(ahead.length)];
    this.newest.textContent = amount(metric, found.current[metric]);
    const end = start + count * bin;
    this.chart.show([times, [...past.actual, ...empty(ahead.length)], future(fan?.p50), future(fan?.p10), future(fan?.p90), before(said?.p50), before(said?.p10), before(said?.p90)], end, [start, times.at(-1) ?? end]);
    this.chart.caption.textContent = sentence(metric, past, fan, ahead, bin);
    fill(this.accuracy, accuracyOf(past.accuracy, metric, bin));
  }
}

function sentence(metric, past, fan, ahead, bin) {
  const known = past.actual.filter((value) => value !== null);
  const was = known.length ? `Measured between ${amount(metric, Math.min(...known))} and ${amount(metric, Math.max(...known))}. ` : "Nothing measured in this time. ";
  if (!fan) return `${was}No forecast yet.`;
  const highest = Math.max(...fan.p50), at = ahead[fan.p50.indexOf(highest)];
  return `${was}Next ${span(ahead.length * bin)}: p50 highest at ${clock(at)} with ${amount(metric, highest)}; p10 to p90 from ${amount(metric, Math.min(...fan.p10))} to ${amount(metric, Math.max(...fan.p90))}.`;
}

function accuracyOf(accuracy, metric, bin) {
  const rows = Object.entries(accuracy).filter(([, found]) => found.bins > 0);
  if (!rows.length) return of("p", { class: "muted" }, "No forecast has come due yet, so there is no accuracy to show.");
  return of("table", { class: "small" }, of("caption", { class: "hidden" }, `How far forecasts of ${metric} were off, beside repeating the last value`),
    of("thead", {}, of("tr", {}, ["Ahead", "Forecast is", `Its error, ${difference(metric)}`, "Last value's error", "In p10 to p90"].map((word, place) => of("th", { scope: "col", class: place ? "number" : null }, word)))),
    of("tbody", {}, rows.map(([bins, found]) => of("tr", { title: `${found.bins} bins` }, of("th", { scope: "row" }, span(bins * bin)),
      of("td", { class: "number" }, verdict(found.ratio)), of("td", { class: "number" }, number(found.error)), of("td", { class: "number" }, number(found.last_value_error)),
      of("td", { class: "number" }, percent(found.inside))))));
}

function verdict(ratio) {
  if (ratio === null) return "–";
  const gain = Math.round(Math.abs(1 - ratio) * 100);
  if (gain < 2) return of("span", { class: "muted" }, "about equal");
  return of("span", { class: ratio < 1 ? "better" : "worse" }, `${gain} % ${ratio < 1 ? "better" : "worse"}`);
}
