// Which page is shown, and when it asks again: a pulse every five seconds, the rest when it changed.

import { get, Refused } from "./ask.js";
import { capacity } from "./capacity.js";
import { drift } from "./drift.js";
import { fleet } from "./fleet.js";
import { health } from "./health.js";
import { server } from "./server.js";
import { fill, moment, of } from "./text.js";
import { trainings } from "./trainings.js";

const PULSE_MS = 5000;
const PAGES = { "": fleet, server, capacity, drift, trainings, health };
const NAMES = { "": "fleet", server: "fleet" };
const view = document.getElementById("view");
const pulse = { tag: undefined, last: null, failures: 0 };
let shown = null; // { refresh, refreshEvery, end }
let generation = 0;

function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?", 2);
  return { path: Object.hasOwn(PAGES, path) ? path : "", fields: new URLSearchParams(query ?? "") };
}

async function show() {
  const mine = ++generation;
  const { path, fields } = place();
  const before = shown;
  shown = null;
  const name = NAMES[path] ?? path;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const title = of("h1", { tabindex: "-1" });
  view.classList.add("unknown"); // until something is known of it: empty cards say nothing
  try {
    before?.end?.();
    const page = PAGES[path](view, title, fields, () => again(page));
    shown = page;
  } catch (error) {
    view.replaceChildren(title); // the pulse goes on, and another view may do
    view.classList.remove("unknown");
    return complain(explain(error));
  }
  await refresh(shown);
  if (mine !== generation) return;
  document.title = `${title.textContent || "fleetcast"} · fleetcast`;
  if (pulse.moved) title.focus({ preventScroll: true });
  pulse.moved = true;
}

async function refresh(page) {
  if (!page || page.isBusy) return;
  page.isBusy = true;
  if (shown === page && !page.refreshedAt) view.setAttribute("aria-busy", "true");
  try {
    await page.refresh();
    page.refreshedAt = performance.now();
    page.isOwed = false;
    if (shown === page) view.classList.remove("unknown");
    complain("");
  } catch (error) {
    if (shown === page) {
      page.isOwed = !(error instanceof Refused) || error.status >= 500; // the same question may be answered later
      view.classList.toggle("unknown", !page.refreshedAt || error.status === 404); // empty cards say nothing
      complain(explain(error));
    }
  } finally {
    page.isBusy = false;
    if (shown === page) view.removeAttribute("aria-busy");
  }
  if (page.isAsked) return again(page);
}

/** Ask anew because the reader chose something else: right away, or after the answer on its way. */
function again(page) {
  page.isAsked = page.isBusy;
  return refresh(page);
}

function explain(error) {
  if (error instanceof Refused) return error.status === 404 ? `Not found: ${error.message}` : error.message;
  if (error instanceof TypeError && /fetch|network/i.test(error.message)) {
    return `The daemon does not answer. ${shown?.refreshedAt ? "This page shows what it said last and" : "Nothing was received for this view yet; the page"} goes on asking.`;
  }
  return `The page failed: ${error.message}`;
}

function complain(text) {
  const alert = document.getElementById("alert");
  if (alert.textContent !== text) alert.textContent = text;
  alert.hidden = text === "";
}

async function beat() {
  if (document.hidden) return;
  try {
    const found = await get("pulse", {}, pulse);
    if (found) {
      const before = pulse.last;
      pulse.last = found;
      tell(found);
      if (before && ["origin", "check", "trainings", "model", "problems", "bins_waiting"].some((name) => before[name] !== found[name])) {
        return refresh(shown);
      }
    }
    const isDue = shown?.refreshEvery && performance.now() - (shown.refreshedAt ?? 0) > shown.refreshEvery;
    if (pulse.failures || shown?.isOwed || isDue) await refresh(shown);
    pulse.failures = 0;
  } catch (error) {
    pulse.failures += 1;
    complain(explain(error));
  }
}

function tell(found) {
  const badge = document.getElementById("problems");
  badge.textContent = found.problems;
  badge.hidden = !found.problems;
  badge.setAttribute("aria-label", `${found.problems} problems`);
  fill(document.getElementById("pulse"),
    found.origin ? of("span", {}, "Forecast of ", moment(found.origin)) : "No forecast yet",
    found.bins_waiting ? of("span", { class: "warning" }, ` · ${found.bins_waiting} newer ${found.bins_waiting === 1 ? "bin waits" : "bins wait"}`) : "",
    of("span", {}, found.model ? ` · model ${found.model}` : " · no model yet, the naive forecast serves"));
}

window.addEventListener("hashchange", show);
document.addEventListener("visibilitychange", beat);
setInterval(beat, PULSE_MS); // whatever becomes of the first view
await show();
await beat();
