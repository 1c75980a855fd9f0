// Which model serves: the one beside it, what people hold or pause, their orders, and what happened.

import { get, give } from "./ask.js";
import { count, facts, fill, moment, number, of } from "./text.js";

const MOST_LINES = 12;
const ORDERS = {
  approve: ["Approve", "puts it into service now"],
  veto: ["Veto", "it never goes into service by itself"],
  rollback: ["Roll back", "puts the version before back into service"],
  hold: ["Hold", "no training puts a model into service until you resume"],
  resume: ["Resume", "ends a hold and a pause; a version that waits goes into service"],
};

/** A card that shows all of it; `refresh` asks again. */
export function promotion() {
  const card = of("section", { class: "card", "aria-label": "Which model serves" });
  const says = of("p", { role: "status" });
  const refresh = async () => {
    const [{ aliases }, found] = await Promise.all([get("../../models"), get("../../promotion")]);
    fill(card, of("h2", {}, "Which model serves"), facts(factsOf(aliases, found)), comparedOf(found),
      of("p", { class: "tools" }, buttonsOf(aliases, found).map((given) => button(given, found.no_orders, says, refresh)), of("span", { class: "muted" }, found.no_orders ?? "")), says, logOf(found.history));
  };
  return { card, refresh };
}

function factsOf(aliases, { held, paused, waiting, cooldown }) {
  return [
    ["In service", aliases.champion ?? "no trained model of this fleet: the base model or the naive forecast"],
    aliases.previous && ["Before it", aliases.previous],
    waiting && ["Waits", [`${waiting.version}, since `, moment(waiting.since), `: ${waiting.why}`]],
    held && ["Held", ["since ", moment(held.since), ` by ${held.by}: ${held.why}`]],
    paused && ["Trainings paused", ["until ", moment(paused.until), ` by ${paused.by}: ${paused.why}`]],
    cooldown && ["Cooldown", ["until ", moment(cooldown.until), ", since a model was taken back"]],
  ];
}

/** The bake or the race that goes on: hours, what clients get of either, and how much is proven. */
function comparedOf({ bake, race }) {
  const compared = bake ?? race;
  if (!compared) return null;
  const { figures } = compared, gain = figures.loss_ratio_served;
  const [found, needed] = race ? [figures.log10_e_better, figures.log10_e_better_needed] : [figures.log10_e_worse, figures.log10_e_needed];
  const share = Math.min(1, Math.max(0, found / needed)), filled = of("span", {});
  filled.style.width = `${100 * share}%`;
  return of("div", {},
    of("p", {}, bake ? `It is watched beside ${compared.against}, which takes over again if it is proven worse: ` : `${compared.version} waits, and is compared with it: `, compared.why, "."),
    facts([
      ["Hours compared", `${count(figures.hours)} of ${count(figures.hours_needed)}${figures.hours_void ? `, ${count(figures.hours_void)} more do not count` : ""}`],
      gain !== null && ["Clients", `${number(100 * Math.abs(1 - gain))} % ${gain > 1 ? "further off" : "closer"} with ${compared.version}`],
      [race ? "Proof that it is better" : "Proof that it is worse", [`${Math.round(100 * share)} % of what is needed `, of("span", { class: "bar", "aria-hidden": "true" }, filled)]],
    ]));
}

function buttonsOf(aliases, { held, paused, waiting }) {
  return [
    ...(waiting ? [{ kind: "approve", version: waiting.version }, { kind: "veto", version: waiting.version }] : []),
    ...(aliases.previous ? [{ kind: "rollback", version: aliases.champion, about: aliases.previous }] : []),
    { kind: held || paused ? "resume" : "hold" },
  ];
}

function button({ kind, version, about }, whyNot, says, refresh) {
  const [word, effect] = ORDERS[kind];
  const ordered = async () => {
    const reason = await askForReason(`${word}${about ?? version ? ` ${about ?? version}` : ""}`, effect);
    if (reason === null) return;
    try {
      await give(`../../promotion/${kind}`, { reason, ...(version ? { version } : {}) });
      says.textContent = "Written down. The retraining daemon carries it out within seconds.";
      setTimeout(() => refresh().catch(() => {}), 2500);
    } catch (error) {
      says.textContent = `Nothing was ordered: ${error.message}`;
    }
  };
  return of("button", { type: "button", onclick: ordered, disabled: Boolean(whyNot), title: whyNot ?? effect, "data-focus": `order ${kind}` }, `${word} …`);
}

/** Ask why; null where the person thinks better of it. */
function askForReason(title, effect) {
  const field = of("input", { type: "text", id: "reason", required: true, maxlength: 500, autocomplete: "off" });
  const dialog = of("dialog", { "aria-labelledby": "order-title" }, of("form", { method: "dialog" },
    of("h2", { id: "order-title" }, title), of("p", {}, `This ${effect}. The audit keeps your reason.`),
    of("p", {}, of("label", { for: "reason" }, "Reason"), " ", field),
    of("p", { class: "buttons" }, of("button", { type: "button", onclick: () => dialog.close("") }, "Cancel"), " ", of("button", { class: "main", type: "submit", value: "yes" }, title))));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    dialog.remove();
    resolve(dialog.returnValue === "yes" ? field.value : null);
  }, { once: true }));
}

function logOf(history) {
  const told = history.filter(({ phase }) => phase !== "intent").slice(-MOST_LINES).reverse();
  if (!told.length) return of("p", { class: "muted" }, "Nothing has happened yet.");
  return of("details", {}, of("summary", {}, "What happened"), of("ol", { class: "log" }, told.map(({ at, sentence }) =>
    of("li", {}, of("p", {}, moment(at), ` ${sentence.slice(21)}`)))));
}
