// Drift: the scores beside their limits, a week of them, and the series in alarm.

import { get } from "./ask.js";
import { Chart } from "./chart.js";
import { blocks, fill, moment, number, of, percent, serverLink, silence, span } from "./text.js";

const SCORES = [
  ["per", "Prediction error"], ["dss", "Distribution shift"], ["fds", "Feature drift"], ["anomaly_rate", "Anomaly rate"], ["combined_score", "Combined"],
];
const COLOURS = ["--s1", "--s2", "--s3", "--s4", "--text"];
const SWATCHES = ["s1", "s2", "s3", "s4", "c-text"];
const DAYS = 7;

export function drift(view, title) {
  title.textContent = "Drift";
  const verdict = of("p"), tiles = of("div", { class: "tiles" }), named = of("section", { class: "card" }), quality = of("section", { class: "card" });
  const chart = new Chart({
    label: `Drift scores of the last ${DAYS} days, as multiples of their limits`, limit: 1,
    write: (value) => `${number(value)} ×`, tick: (value) => `${+value.toPrecision(3)} ×`,
    lines: SCORES.map(([, word], place) => ({ label: word, colour: COLOURS[place], swatch: SWATCHES[place], width: place === 4 ? 2.5 : 1.4 })),
  });
  const figure = of("section", { class: "card" }, of("figure", {}, of("h2", {}, `The last ${DAYS} days, as multiples of the limits`), chart.holder, chart.reads, chart.caption), chart.toggle, chart.table);
  view.replaceChildren(of("div", { class: "head" }, title, verdict), tiles, figure, named, quality);
  return {
    async refresh() {
      const found = await get("drift", { days: DAYS });
      fill(verdict, verdictOf(found));
      fill(tiles, SCORES.map(([name, word]) => tileOf(name, word, found)));
      const limits = found.thresholds ?? {};
      const times = found.points.map((point) => Date.parse(point.at) / 1000);
      chart.show([times, ...SCORES.map(([name]) => found.points.map((point) => (point[name] === null || !limits[name] ? null : point[name] / limits[name])))]);
      chart.caption.textContent = times.length ? `${times.length} points over ${span(times.at(-1) - times[0])}. The dashed line is the limit.` : "";
      figure.hidden = times.length === 0;
      fill(named, namedOf(found));
      const events = found.calibrated?.data_quality ?? [];
      quality.hidden = events.length === 0;
      fill(quality, of("h2", {}, "Sensors that look broken"), of("ul", { class: "log" }, events.map((event) => of("li", {}, of("span", { class: "shape warning", "aria-hidden": "true" }, "▲"), event.server ? serverLink(event.server) : null, ` ${event.metric ?? "all metrics"}: ${event.kind} since `, moment(event.since)))));
    },
    end: () => chart.end(),
  };
}

function verdictOf(found) {
  if (!found.status) return "No drift check yet. The retraining daemon makes one every five minutes; is it running in this folder?";
  const says = found.recommendation === "RETRAIN NOW" ? of("b", { class: "drifts" }, "The fleet has drifted: retrain.") : found.recommendation === "OK" ? of("b", { class: "calm" }, "No drift.") : of("b", {}, `No verdict yet: ${found.status_reason || found.status}.`);
  return [says, " Checked ", moment(found.made_at), found.calibrated?.compared_series ? `, ${found.calibrated.series_in_alarm ?? 0} of ${found.calibrated.compared_series} series in alarm.` : ".", waitingOf(found)];
}

function waitingOf(found) {
  const waiting = found.calibrated?.enough_days;
  return waiting ? ` ${waiting.series} series are not compared ${waiting.says}: too few days are known of them.` : "";
}

function tileOf(name, word, found) {
  const value = found.current_metrics?.[name], limit = found.thresholds?.[name];
  const isOver = value !== null && value !== undefined && value > limit;
  const share = Math.min(1, (value ?? 0) / (limit || 1) / 2); // the limit stands in the middle of the bar
  const bar = of("span", { class: `bar${isOver ? " over" : ""}`, "aria-hidden": "true" }, of("span"));
  bar.firstChild.style.width = `${share * 100}%`;
  const trend = found.trends?.[name];
  const written = (score) => (name === "combined_score" ? number(score) : percent(score, 1));
  return of("div", { class: "tile" }, word, of("span", { class: "value" }, value === null || value === undefined ? "not yet" : written(value)),
    of("span", { class: isOver ? "error" : "of" }, limit === undefined ? "" : `${isOver ? "over the limit of" : "limit"} ${written(limit)}${trend ? `, ${trend}` : ""}`), bar);
}

function namedOf(found) {
  if (!found.drifting.length) return [of("h2", {}, "Series in alarm"), of("p", { class: "muted" }, found.status ? "None." : "Nothing is known yet.")];
  const all = found.calibrated?.series_in_alarm;
  return [
    of("h2", {}, all > found.drifting.length ? `Series in alarm: the worst ${found.drifting.length} of ${all}` : "Series in alarm"),
    blocks("Series in alarm", ["Server", "Metric", "What happened", "Changed", "In alarm since", "Times its limit"], [5], found.drifting.map((item) => of("tr", {}, of("th", { scope: "row" }, serverLink(item.server)), of("td", {}, item.metric),
      of("td", { class: `wide${item.silent_since ? " old" : ""}` }, item.sentence, item.silent_since && silence(item.silent_since)), of("td", {}, moment(item.since)), of("td", {}, moment(item.in_alarm_since)), of("td", { class: "number" }, number(item.score))))),
  ];
}
