// Which stretch of time a server's page shows: a span up to now, or one that the reader chose. The URL keeps it.

import { day, fill, of, span } from "./text.js";

const SPANS = { "6h": 6, "24h": 24, "48h": 48, "7d": 168, "30d": 720 }; // hours
const USUAL = "48h";
const WORDS = { "6h": "6 h", "24h": "24 h", "48h": "48 h", "7d": "7 days", "30d": "30 days" };
const FEWEST_BINS = 6;
const MOST_S = 30 * 86400; // one question to /history is about 31 days
const NO_STRETCH = "The address names no stretch of time (from, to), so this is up to now.";

/** The times that are shown, with the buttons that choose them; `changed()` is told of each choice. */
export class Range {
  constructor(fields, changed) {
    this.changed = changed;
    this.span = Object.hasOwn(SPANS, fields.get("span")) ? fields.get("span") : USUAL;
    this.wanted = stretchIn(fields); // as the address has it, until it is known what there is
    this.chosen = null; // [from, to] in seconds on whole bins, or null: up to now
    this.note = this.wanted || !(fields.has("from") || fields.has("to")) ? "" : NO_STRETCH;
    this.known = null; // { start, end, first, last, bin, isGone }: what follows now (of a gone server its newest record), as it was answered
    this.spans = of("fieldset", { class: "segments" }, of("legend", {}, "Time"), Object.keys(SPANS).map((name) =>
      of("label", {}, of("input", { type: "radio", name: "span", value: name, checked: name === this.span, onchange: () => this.set(name, null) }), of("span", {}, WORDS[name]))));
    this.buttons = of("div", { class: "moves" });
    this.says = of("p", { class: "muted range", role: "status" });
  }

  /** What the URL keeps of it: nothing that is usual. */
  get fields() {
    const stretch = this.chosen ? { from: iso(this.chosen[0]), to: iso(this.chosen[1]) } : {};
    return { ...(this.span === USUAL ? {} : { span: this.span }), ...stretch };
  }

  get hours() {
    return SPANS[this.span];
  }

  /** Learn what the daemon knows: `past` up to now, the last time it forecasts, when its oldest record is of, and whether it ends. */
  learn(past, last, oldest, isGone) {
    const end = Date.parse(past.end) / 1000, bin = past.bin_s;
    const first = oldest ? Math.floor(Date.parse(oldest) / 1000 / bin) * bin : 0;
    this.known = { start: end - this.hours * 3600, end, first, last: last ?? end, bin, isGone };
    if (this.wanted) this.take(...this.wanted);
    this.wanted = null;
    this.tell();
  }

  /** Show what the address asks for; of a longer stretch its end. */
  take(from, to) {
    const until = Math.min(to, this.known.last);
    [this.chosen, this.note] = this.fit(from, to);
    if (to - from > MOST_S) [this.chosen] = this.fit(until - MOST_S, until);
  }

  tell() {
    const [from, to] = this.shown;
    fill(this.buttons,
      of("button", { type: "button", "data-focus": "earlier", disabled: from <= this.known.first, onclick: () => this.move(-0.5) }, "← Earlier"),
      of("button", { type: "button", "data-focus": "later", disabled: !this.chosen || to >= this.known.last, onclick: () => this.move(0.5) }, "Later →"),
      of("button", { type: "button", "data-focus": "to now", disabled: !this.chosen, onclick: () => this.set(this.span, null) }, this.known.isGone ? "Back to its newest record" : "Back to now"));
    const shown = this.chosen ? `${day(from)} to ${day(to)}, ${span(to - from)}.` : this.note ? "" : "Drag over a chart to zoom.";
    this.says.textContent = `${shown} ${this.note}`.trim();
  }

  /** [from, to] of the charts. */
  get shown() {
    return this.chosen ?? [this.known.start, this.known.last];
  }

  /** Zoom to a stretch; null shows everything up to now again. */
  zoom(from, to) {
    if (from === null) return this.chosen && this.set(this.span, null);
    const [chosen, note] = this.fit(from, to), [start, end] = this.shown;
    const isAtBound = note && chosen[1] - chosen[0] === end - start; // it would only slide
    this.set(this.span, isAtBound ? this.chosen : chosen, note);
  }

  /** The nearest stretch that can be shown: whole bins, not too few or many, of times that have something. */
  fit(from, to) {
    const { bin, first, last } = this.known, least = FEWEST_BINS * bin, length = Math.ceil((to - from) / bin) * bin;
    const taken = Math.min(MOST_S, Math.max(least, length));
    const start = Math.round(((from + to - taken) / 2) / bin) * bin;
    const placed = Math.max(first, Math.min(start, last - taken));
    const note = length > MOST_S ? `At most ${span(MOST_S)} are shown at once.` : length < least ? `At least ${span(least)} are shown.`
      : from >= last ? "There is nothing later." : to <= first ? "There is no older record." : "";
    return [[placed, placed + taken], note];
  }

  move(share) {
    const [from, to] = this.chosen ?? [this.known.start, this.known.end];
    const [chosen] = this.fit(from + (to - from) * share, to + (to - from) * share);
    this.set(this.span, chosen);
  }

  set(name, chosen, note = "") {
    Object.assign(this, { span: name, chosen, note, wanted: null });
    for (const input of this.spans.querySelectorAll("input")) input.checked = input.value === name;
    if (this.known) {
      this.known.start = this.known.end - this.hours * 3600;
      this.tell();
    }
    this.changed();
  }
}

function stretchIn(fields) {
  const [from, to] = ["from", "to"].map((name) => Date.parse(fields.get(name) ?? "") / 1000);
  return to > from ? [from, to] : null;
}

/** A moment as a URL and a question to the daemon have it. */
export function iso(seconds) {
  return new Date(seconds * 1000).toISOString().replace(".000Z", "Z");
}
