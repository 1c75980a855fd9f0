// A chart: uPlot on a canvas, with what a canvas lacks: a sentence, a read-out line, arrow keys, and a table.

import { clock, day, fill, of } from "./text.js";

const HEIGHT = 196;
const live = new Set();
const scheme = matchMedia("(prefers-color-scheme: dark)");
scheme.addEventListener("change", () => { for (const chart of live) chart.build(); });

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/**
 * One chart. `lines`: [{ label, colour: "--accent", dash, width, isHidden }], the same order as the data;
 * `bands`: [{ series: [upper, lower], fill: "--band" }] by places of lines from 1.
 */
export class Chart {
  constructor({ lines, bands = [], write, tick = write, limit, ceiling, sync, label }) {
    Object.assign(this, { lines, bands, write, tick, limit, ceiling, sync });
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

  build() {
    this.plot?.destroy();
    const width = this.holder.clientWidth;
    if (!width) return;
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    this.plot = new uPlot({
      width, height: HEIGHT, tzDate: (seconds) => new Date(seconds * 1000),
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 6 }, ...(this.sync ? { sync: { key: this.sync } } : {}) },
      scales: {
        x: { range: (_plot, low, high) => this.span ?? [low, high] },
        y: { range: (_plot, low, high) => this.heights(low, high) },
      },
      axes: [
        { ...axis, size: 32, values: (_plot, ticks, _axis, _space, step) => ticks.map((tick) => (step >= 86400 || new Date(tick * 1000).getHours() + new Date(tick * 1000).getMinutes() === 0 ? day(tick).replace(/[, ]*00:00$/, "") : clock(tick))) },
        { ...axis, size: 56, values: (_plot, ticks) => ticks.map((tick) => this.tick(tick)) },
      ],
      series: [{}, ...this.lines.map((line) => ({
        stroke: line.isHidden ? "transparent" : colour(line.colour), width: line.width ?? 1.5, dash: line.dash, points: { show: false }, spanGaps: false,
      }))],
      bands: this.bands.map((band) => ({ series: band.series, fill: colour(band.fill) })),
      hooks: { drawClear: [(plot) => this.paintFuture(plot)], draw: [(plot) => this.paintLimit(plot)], setCursor: [(plot) => this.read(plot.cursor.idx)] },
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
    plot.ctx.strokeStyle = colour("--stale");
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

  press(event) {
    const count = this.data[0].length, steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 12, PageUp: -12 };
    if (!this.plot || !count || !(event.key in steps)) return;
    event.preventDefault();
    const from = this.plot.cursor.idx ?? Math.max(0, this.data[0].findIndex((time) => this.now !== null && time >= this.now));
    const place = Math.min(count - 1, Math.max(0, from + steps[event.key]));
    this.plot.setCursor({ left: this.plot.valToPos(this.data[0][place], "x"), top: 10 });
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
