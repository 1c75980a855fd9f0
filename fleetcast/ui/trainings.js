// Trainings: which model serves, what was tried, why, and the verdict in words.

import { get } from "./ask.js";
import { promotion } from "./promotion.js";
import { count, fill, moment, of, span } from "./text.js";

const SHAPES = { promoted: ["●", "calm"], rejected: ["■", "warming-up"], running: ["▶", "drifts"], failed: ["▲", "error"] };
const SAFEGUARDS = {
  min_hours_between_training: "Time since the last training",
  max_trainings_per_week: "Trainings in seven days",
  failure_backoff: "Pause after failures",
  max_days_without_training: "Longest time without one",
};

export function trainings(view, title) {
  title.textContent = "Trainings";
  const total = of("p", { class: "muted" }), decision = of("section", { class: "card" }), list = of("section", { class: "card", "aria-label": "Trainings" });
  const models = promotion();
  view.replaceChildren(of("div", { class: "head" }, title, total), models.card, decision, list);
  return {
    refreshEvery: 15000,
    async refresh() {
      const [found] = await Promise.all([get("trainings"), models.refresh()]);
      total.textContent = found.total_promoted === null ? "" : `${found.total_promoted} went into service so far`;
      decision.hidden = !found.decision;
      if (found.decision) fill(decision, decisionOf(found.decision));
      fill(list, found.trainings.length ? of("ol", { class: "log" }, found.trainings.map(trainingOf)) : of("p", { class: "empty" }, "No training yet. The first one needs 48 hours of data; the newest check says what else it waits for."));
    },
  };
}

function trainingOf(training) {
  const [shape, look] = SHAPES[training.outcome] ?? ["○", "warming-up"];
  const seconds = training.ended_at ? (Date.parse(training.ended_at) - Date.parse(training.started_at)) / 1000 : null;
  return of("li", {}, of("span", { class: `shape ${look}`, "aria-hidden": "true" }, shape),
    of("b", { class: look }, training.verdict),
    of("p", {}, training.cause, training.reason && !training.cause.startsWith("The first") ? `: ${training.reason}.` : "."),
    of("p", { class: "muted" }, "Began ", moment(training.started_at), seconds === null ? "" : `, took ${span(seconds)}`,
      training.version ? ` · version ${training.version}` : "", training.version_before ? `, before it ${training.version_before}` : ""));
}

function decisionOf(decision) {
  return [
    of("h2", {}, decision.should_retrain ? "The newest check asks for a training" : "The newest check asks for no training"),
    of("p", {}, `${decision.reason ?? ""} (`, moment(decision.at), ")"),
    decision.not_quiet ? of("p", {}, of("b", {}, "Why it is not quiet: "), `${decision.not_quiet}.`) : null,
    of("div", { class: "scroll" }, of("table", { class: "small" }, of("thead", {}, of("tr", {}, of("th", { scope: "col" }, "Safeguard"), of("th", { scope: "col", class: "number" }, "Now"), of("th", { scope: "col", class: "number" }, "Limit"), of("th", { scope: "col" }, "Says"))),
      of("tbody", {}, decision.safeguards.map((check) => of("tr", {}, of("th", { scope: "row" }, SAFEGUARDS[check.name] ?? check.name),
        of("td", { class: "number" }, check.value === null ? "none yet" : `${count(check.value)} ${check.unit}`), of("td", { class: "number" }, `${count(check.limit)} ${check.unit}`),
        of("td", { class: check.passed ? "calm" : "warning" }, check.passed ? "● allows it" : "■ reached")))))),
  ];
}
