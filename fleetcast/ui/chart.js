// A chart: uPlot on a canvas, with what a canvas lacks: a sentence, a read-out line, arrow keys, and a table.

import { clock, day, fill, of } from "./text.js";

const HEIGHT = 196;
const FOLLOWED = ["mousemove", "mouseleave"]; // what charts in step tell each other: a drag is told once
const ZOOM_KEYS = ["+", "=", "-", "Escape"];
const FONT = "12px system-ui, sans-serif";
const NARROWEST = 56; // of the axis of values: charts of percentages stand in line
const pen = document.createElement("canvas").getContext("2d");
const live = new Set();
const scheme = matchMedia("(prefers-color-scheme: dark)");
scheme.addEventListener("change", () => { for (const chart of live) chart.build(); });

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The width that an axis of values needs beside its ticks, so that no label is cut off. */
function roomFor(labels) {
  pen.font = FONT;
  return Math.max(NARROWEST, ...(labels ?? []).map((label) => Math.ceil(pen.measureText(label).width) + 20));
}

/**
 * One chart. `lines`: [{ label, colour: "--accent", dash, width, isHidden }], the same order as the data;
 * `bands`: [{ series: [upper, lower], fill: "--band" }] by places of lines from 1; `zoom(from, to)`, in seconds,
 * is told what the reader drags over or zooms to, and null to see everything again.
 */
export class Chart {
  constructor({ lines, bands = [], write, tick = write, limit, ceiling, sync, label, zoom }) {
    Object.assign(this, { lines, bands, write, tick, limit, ceiling, sync, zoom });
    this.data = [[], ...lines.map(() => [])];
    this.now = null;
    this.plot = null;
    this.holder = of("div", { class: "plot", tabindex: "0", role: "img", "aria-label": label });
    this.reads = of("p", { class: "reads", "aria-live": "polite" });
    this.caption = of("figcaption");
    this.table = of("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `${label}, as a table`, hidden: true });
    this.toggle = of("button", { type: "button", class: "plain", "aria-expanded": "false", onclick: () => this.toggleTable() }, "Show as table");
    this.holder.addEventListener("keydown", (event) => this.press(event));
    this.resizes = new ResizeObserver(() => this.resize());
    this.resizes.observe(this.holder);
    live.add(this);
  }

  end() {
    live.delete(this);
    this.resizes.disconnect();
    this.plot?.destroy();
  }

  /** Draw `data` ([times, ...values], one array per line); `now` is where the future begins. */
  show(data, now = null, span = undefined) {
    this.data = data;
    this.now = now;
    this.span = span;
    if (this.plot) this.plot.setData(data);
    else this.build();
    this.holder.dataset.points = data[0].length;
    this.read(null);
    if (!this.table.hidden) this.fillTable();
  }

  /** Show another stretch of the same data, until there is more. */
  aim(span) {
    this.span = span;
    this.plot?.setData(this.data);
  }

  build() {
    this.plot?.destroy();
    const width = this.holder.clientWidth;
    if (!width) return;
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: FONT };
    this.plot = new uPlot({
      width, height: HEIGHT, tzDate: (seconds) => new Date(seconds * 1000),
      legend: { show: false },
      cursor: {
        drag: { x: Boolean(this.zoom), y: false, setScale: false, dist: 6 }, points: { size: 6 },
        bind: { dblclick: () => () => this.zoom?.(null) },
        ...(this.sync ? { sync: { key: this.sync, filters: { pub: (type) => FOLLOWED.includes(type) } } } : {}),
      },
      scales: {
        x: { range: (_plot, low, high) => this.span ?? [low, high] },
        y: { range: (_plot, low, high) => this.heights(low, high) },
      },
      axes: [
        { ...axis, size: 32, values: (_plot, ticks, _axis, _space, step) => ticks.map((tick) => (step >= 86400 || new Date(tick * 1000).getHours() + new Date(tick * 1000).getMinutes() === 0 ? day(tick, false).replace(/[, ]*00:00$/, "") : clock(tick))) },
        { ...axis, size: (_plot, labels) => roomFor(labels), values: (_plot, ticks) => ticks.map((tick) => this.tick(tick)) },
      ],
      series: [{}, ...this.lines.map((line) => ({
        stroke: line.isHidden ? "transparent" : colour(line.colour), width: line.width ?? 1.5, dash: line.dash, points: { show: false }, spanGaps: false,
      }))],
      bands: this.bands.map((band) => ({ series: band.series, fill: colour(band.fill) })),
      hooks: { drawClear: [(plot) => this.paintFuture(plot)], draw: [(plot) => this.paintLimit(plot)], setSelect: [(plot) => this.choose(plot)], setCursor: [(plot) => this.read(plot.cursor.idx)] },
    }, this.data, this.holder);
  }

  /** From zero, unless something lies below it, to a little over the highest; a percentage ends near 100. */
  heights(low, high) {
    const top = Math.max(high ?? 0, this.limit ?? 0);
    const most = this.ceiling !== undefined && top <= this.ceiling ? Math.min(top * 1.1, this.ceiling * 1.03) : top * 1.1;
    return [Math.min(0, (low ?? 0) * 1.1), most > 0 ? most : 1];
  }

  paintFuture(plot) {
    if (this.now === null) return;
    const { left, top, width, height } = plot.bbox;
    const at = Math.max(left, plot.valToPos(this.now, "x", true));
    if (at >= left + width) return;
    plot.ctx.save();
    plot.ctx.fillStyle = colour("--future");
    plot.ctx.fillRect(at, top, left + width - at, height);
    plot.ctx.strokeStyle = colour("--muted");
    plot.ctx.setLineDash([3, 3]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(at, top);
    plot.ctx.lineTo(at, top + height);
    plot.ctx.stroke();
    plot.ctx.restore();
  }

  paintLimit(plot) {
    if (this.limit === undefined) return;
    const { left, width } = plot.bbox, at = plot.valToPos(this.limit, "y", true);
    plot.ctx.save();
    plot.ctx.strokeStyle = colour("--silent");
    plot.ctx.lineWidth = 1.5;
    plot.ctx.setLineDash([6, 4]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(left, at);
    plot.ctx.lineTo(left + width, at);
    plot.ctx.stroke();
    plot.ctx.restore();
  }

  /** Write what the lines are at one point; without one, what each line is. */
  read(place) {
    const words = this.lines.map((line, index) => {
      const value = place === null || place === undefined ? undefined : this.data[index + 1][place];
      if (place !== null && place !== undefined && (value === null || value === undefined)) return null;
      return line.label && of("span", { class: "key" },
        of("span", { class: `swatch ${line.swatch ?? ""}`, "aria-hidden": "true" }), line.label,
        value === undefined ? null : of("b", {}, ` ${line.reads ? line.reads(this.data, place) : this.write(value)}`));
    });
    const when = place === null || place === undefined ? null : of("span", { class: "key" }, of("b", {}, day(this.data[0][place])));
    fill(this.reads, when, words);
  }

  /** Tell what was dragged over, and let go of it. */
  choose(plot) {
    const { left, width } = plot.select;
    if (!width || !this.zoom) return;
    const ends = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.zoom(...ends);
  }

  /** Plus and minus zoom about what is read, which stays where it is, or about the middle; Escape shows everything. */
  zoomBy(key) {
    if (key === "Escape") return this.zoom(null);
    const [from, to] = this.span, read = this.data[0][this.plot.cursor.idx ?? -1];
    const at = read >= from && read <= to ? read : (from + to) / 2, factor = key === "-" ? 2 : 0.5;
    this.zoom(at - (at - from) * factor, at + (to - at) * factor);
  }

  press(event) {
    if (this.plot && this.zoom && ZOOM_KEYS.includes(event.key)) {
      event.preventDefault();
      return this.zoomBy(event.key === "=" ? "+" : event.key);
    }
    const count = this.data[0].length, steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 12, PageUp: -12 };
    if (!this.plot || !count || !Object.hasOwn(steps, event.key)) return;
    event.preventDefault();
    const times = this.data[0], [from, to] = this.span ?? [times[0], times.at(-1)];
    const start = this.now >= from && this.now <= to ? this.now : from; // without a now (null): from
    const place = (this.plot.cursor.idx ?? times.findIndex((time) => time >= start)) + steps[event.key];
    const within = Math.max(times.findIndex((time) => time >= from), Math.min(times.findLastIndex((time) => time <= to), place));
    this.plot.setCursor({ left: this.plot.valToPos(times[within], "x"), top: 10 });
  }

  resize() {
    const width = this.holder.clientWidth;
    if (this.plot && width && this.plot.width !== width) this.plot.setSize({ width, height: HEIGHT });
    else if (!this.plot && width && this.data[0].length) this.build();
  }

  toggleTable() {
    this.table.hidden = !this.table.hidden;
    this.toggle.setAttribute("aria-expanded", String(!this.table.hidden));
    this.toggle.textContent = this.table.hidden ? "Show as table" : "Hide the table";
    if (!this.table.hidden) this.fillTable();
  }

  fillTable() {
    const named = this.lines.map((line, index) => [line.tableLabel ?? line.label, index + 1]).filter(([label]) => label);
    const rows = this.data[0].map((time, place) => of("tr", {}, of("th", { scope: "row" }, day(time)),
      named.map(([, index]) => of("td", { class: "number" }, this.data[index][place] === null || this.data[index][place] === undefined ? "–" : this.write(this.data[index][place])))));
    fill(this.table, of("table", { class: "small" }, of("thead", {}, of("tr", {}, of("th", { scope: "col" }, "Time"), named.map(([label]) => of("th", { scope: "col", class: "number" }, label)))), of("tbody", {}, rows.reverse())));
  }
}
