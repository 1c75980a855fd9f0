// Health: what is wrong, in words, and what the daemon says about itself.

import { get } from "./ask.js";
import { count, facts, fill, moment, number, of } from "./text.js";

const MOST_ALERTS = 50;

export function health(view, title) {
  title.textContent = "Health";
  const problems = of("section", { class: "card", "aria-label": "Problems" });
  const alerts = of("section", { class: "card", "aria-label": "Alerts" });
  const parts = of("div", { class: "grid" });
  view.replaceChildren(of("div", { class: "head" }, title), problems, alerts, parts);
  return {
    refreshEvery: 15000,
    async refresh() {
      const found = await get("health"), status = found.status;
      fill(problems, of("h2", {}, found.problems.length ? "Problems" : "No problems"),
        found.problems.length ? of("ul", { class: "log" }, found.problems.map((problem) => of("li", {}, of("span", { class: `shape ${problem.severity}`, "aria-hidden": "true" }, problem.severity === "error" ? "■" : "▲"), of("span", { class: "hidden" }, `${problem.severity}: `), problem.text)))
          : of("p", { class: "muted" }, "The daemon takes records, closes bins and forecasts."));
      fill(alerts, ...alertsOf(found.alerts));
      fill(parts, [
        ["The daemon", daemonOf(status)], ["Forecasts", forecastsOf(status)], ["The buffer", bufferOf(status.buffer)],
      ].map(([word, pairs]) => of("section", { class: "card" }, of("h2", {}, word), facts(pairs))));
    },
  };
}

function alertsOf(alerts) {
  if (!alerts) return [of("h2", {}, "Alerts"), of("p", { class: "muted" }, "None are sent: no channel is set, or the retraining daemon works in another folder.")];
  const { firing, channels, silences } = alerts;
  const items = firing.slice(0, MOST_ALERTS).map(({ rule, severity, about, since, sentence, silent }) => of("li", {},
    of("span", { class: `shape ${severity === "critical" ? "error" : "warning"}`, "aria-hidden": "true" }, severity === "critical" ? "■" : "▲"),
    of("span", { class: "hidden" }, `${severity}: `), of("strong", {}, rule), `${about ? ` ${about}` : ""}: ${sentence}, since `, moment(since), silent ? " (silent)" : ""));
  const quiet = silences.map(({ rule, server, until, by, why }) => of("li", {}, `Silent: ${rule}${server ? ` of ${server}` : ""} until `, moment(until), ` by ${by}: ${why}`));
  const told = Object.entries(channels).map(([name, { last_ok: at, failures, last_error: error }]) => [
    name, failures ? `takes nothing, ${failures} times in a row: ${error}` : at ? ["took a message ", moment(at)] : "nothing was sent yet",
  ]);
  return [
    of("h2", {}, firing.length === 1 ? "1 alert fires" : firing.length ? `${count(firing.length)} alerts fire` : "No alert fires"),
    items.length + quiet.length ? of("ul", { class: "log" }, [...items, ...quiet]) : "",
    firing.length > MOST_ALERTS && of("p", { class: "muted" }, `${count(firing.length - MOST_ALERTS)} more: fleetcast alerts list`),
    facts(told),
  ];
}

function daemonOf(status) {
  return [
    ["State", status.status],
    ["Version", status.program],
    ["Running since", moment(status.started_at)],
    ["Newest record", moment(status.newest_record_time)],
    ["Clock", status.clock.mode === "data" ? "the records' own time" : "the system's"],
    ["Servers", `${count(status.servers)} of at most ${count(status.limits.server_names.limit)} names`],
    ["Metrics", `${count(status.limits.metric_names.used)} of at most ${count(status.limits.metric_names.limit)} names`],
  ];
}

function forecastsOf(status) {
  const { model, ledger, sweep, bins } = status;
  return [
    ["Model", model.version ? `${model.version}${model.base ? " (the one shipped with the program)" : ""}` : model.loading ? "is being loaded" : "none: the naive forecast serves"],
    model.trained_at && ["Trained", moment(model.trained_at)],
    ["Training now", status.training.running ? "yes" : "no"],
    ["Newest sweep", sweep.seconds === null ? "none yet" : [moment(sweep.origin), ` in ${number(sweep.seconds)} s`]],
    ["Bins that wait", count(status.backlog)],
    ["Bins skipped", count(bins.skipped)],
    ["Late records", count(bins.late_records)],
    ["Forecasts settled", `${count(ledger.settled)} of ${count(ledger.opened)}; ${count(ledger.expired)} never met a value, ${count(ledger.open)} are open`],
  ];
}

function bufferOf(buffer) {
  const range = buffer.date_range;
  return [
    ["Folder", buffer.folder],
    ["Records", count(buffer.total_records)],
    ["Days", range?.start ? `${range.start} to ${range.end}` : "none"],
    ["On disk", buffer.disk_usage_mb === undefined ? "–" : `${number(buffer.disk_usage_mb)} MB`],
    buffer.predictions && ["Settled forecasts", `${count(buffer.predictions.total_records)} rows, ${number(buffer.predictions.disk_usage_mb)} MB`],
  ];
}
