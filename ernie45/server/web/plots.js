// Curves with axes, several laid over one another; the pointer reads them off.

import { el, svg } from "./dom.js";

const SIZES = { wide: [1180, 300], narrow: [560, 210] };
const EDGE = { left: 52, right: 12, top: 10, bottom: 24 };

/** A picture of curves that can be drawn again. `describe(value)` puts a number into words. */
export class Plot {
  constructor(title, describe, wide = false) {
    this.describe = describe;
    [this.width, this.height] = wide ? SIZES.wide : SIZES.narrow;
    this.title = title;
    this.readout = el("span", { class: "readout" });
    this.picture = svg("svg", { class: "curve", viewBox: `0 0 ${this.width} ${this.height}`, role: "img" });
    this.picture.addEventListener("pointermove", (event) => this.read(event));
    this.picture.addEventListener("pointerleave", () => this.rest());
    this.node = el("figure", {}, el("figcaption", {}, el("span", { text: title }), this.readout), this.picture);
  }

  /** `series`: [{name, kind, x, y, low, high}], kind being the class of its colour; `axis`: {describe}; smooth: 0 to 1; log: the scale. */
  draw(series, axis, { smooth = 0, log = false } = {}) {
    this.axis = axis;
    const positive = log && series.every(({ y }) => y.every((value) => value === null || value > 0));
    this.series = series.map((one) => ({ ...one, shown: smoothed(one.y, smooth) }));
    const xs = series.flatMap(({ x }) => x);
    const ys = this.series.flatMap(({ y, shown, low, high }) => (smooth ? shown : [...y, ...(low ?? []), ...(high ?? [])])).filter((value) => value !== null);
    if (!xs.length || !ys.length) return this.picture.replaceChildren();
    [this.x0, this.x1] = [Math.min(...xs), Math.max(...xs)];
    const [low, high, ticks] = positive ? logTicks(Math.min(...ys), Math.max(...ys)) : linearTicks(Math.min(...ys), Math.max(...ys), 4);
    const scale = positive ? Math.log : (value) => value;
    const [from, to] = [scale(low), scale(high)];
    this.px = (x) => EDGE.left + ((x - this.x0) / (this.x1 - this.x0 || 1)) * (this.width - EDGE.left - EDGE.right);
    this.py = (y) => this.height - EDGE.bottom - ((scale(y) - from) / (to - from || 1)) * (this.height - EDGE.top - EDGE.bottom);
    const inside = (value) => Math.min(Math.max(value, low), high);
    const grid = ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: EDGE.left, x2: this.width - EDGE.right, y1: this.py(tick), y2: this.py(tick) }),
      svg("text", { x: EDGE.left - 8, y: this.py(tick) + 4, "text-anchor": "end", text: this.describe(tick) }),
    ]);
    const across = linearTicks(this.x0, this.x1, 5)[2].filter((tick) => tick >= this.x0 && tick <= this.x1);
    const below = across.map((tick) => svg("text", { x: this.px(tick), y: this.height - 7, "text-anchor": this.px(tick) > this.width - 40 ? "end" : "middle", text: axis.describe(tick) }));
    const curves = this.series.map(({ kind, x, y, low: least, high: most, shown }) => svg("g", { class: kind },
      least && most && !smooth ? svg("path", { class: "band", d: this.band(x, least.map((v) => (v === null ? v : inside(v))), most.map((v) => (v === null ? v : inside(v)))) }) : null,
      smooth ? svg("path", { class: "raw", d: this.path(x, y.map((v) => (v === null ? v : inside(v)))) }) : null,
      svg("path", { class: "path", d: this.path(x, shown) })));
    this.cross = svg("g", { visibility: "hidden" });
    this.picture.replaceChildren(...grid, ...below, ...curves, this.cross);
    this.rest();
  }

  path(x, y) {
    let d = "";
    let open = false;
    y.forEach((value, i) => {
      if (value === null) open = false;
      else {
        d += `${open ? "L" : "M"}${this.px(x[i]).toFixed(1)} ${this.py(value).toFixed(1)}`;
        open = true;
      }
    });
    return x.length === 1 && d ? `${d}h0.01` : d;
  }

  band(x, low, high) {
    const known = x.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
    if (known.length < 2) return "";
    const spot = (i, y) => `${this.px(x[i]).toFixed(1)} ${this.py(y).toFixed(1)}`;
    return `M${known.map((i) => spot(i, high[i])).join("L")}L${known.toReversed().map((i) => spot(i, low[i])).join("L")}Z`;
  }

  /** What the curves are at the pointer. */
  read(event) {
    if (!this.series?.length || !this.px) return;
    const box = this.picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.width;
    const wanted = this.x0 + ((at - EDGE.left) / (this.width - EDGE.left - EDGE.right)) * (this.x1 - this.x0);
    const found = this.series.map((one) => [one, nearest(one.x, wanted)]).filter(([one, i]) => i >= 0 && one.shown[i] !== null);
    if (!found.length) return;
    const x = found[0][0].x[found[0][1]];
    this.cross.setAttribute("visibility", "visible");
    this.cross.replaceChildren(svg("line", { class: "cross", x1: this.px(x), x2: this.px(x), y1: EDGE.top, y2: this.height - EDGE.bottom }),
      ...found.map(([one, i]) => svg("circle", { class: `spot ${one.kind}`, cx: this.px(one.x[i]), cy: this.py(one.shown[i]), r: 4 })));
    this.tell(this.axis.describe(x), found);
  }

  /** The newest values, when nobody points. */
  rest() {
    this.cross?.setAttribute("visibility", "hidden");
    const found = (this.series ?? []).map((one) => [one, one.shown.findLastIndex((value) => value !== null)]).filter(([, i]) => i >= 0);
    this.tell("", found);
    this.picture.setAttribute("aria-label", `${this.title}: ${found.map(([one, i]) => `${one.name} ${this.describe(one.shown[i])}`).join(", ")}`);
  }

  tell(where, found) {
    this.readout.replaceChildren(el("span", { text: where }), ...found.map(([one, i]) => el("b", { class: one.kind, text: this.describe(one.shown[i]) })));
  }
}

/** An exponential mean that does not lag at its beginning (its weights are made to add up to one). */
function smoothed(values, weight) {
  if (!weight) return values;
  let [sum, total] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * weight + value;
    total = total * weight + 1;
    return sum / total;
  });
}

/** The place in an ascending list that is nearest to a value; -1 in an empty one. */
function nearest(xs, wanted) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - xs[low - 1] < xs[low] - wanted ? low - 1 : Math.min(low, xs.length - 1);
}

/** [low, high, ticks] around a range: ticks are 1, 2 or 5 times a power of ten. */
export function linearTicks(low, high, count) {
  const span = high - low || Math.abs(high) * 0.1 || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => span / one <= count + 1);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return [first * step, Math.max(last, first + 1) * step, Array.from({ length: Math.max(last - first, 1) + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)))];
}

/** The same for a logarithmic scale: powers of ten, and what lies between where they are few. */
function logTicks(low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const all = [];
  const factors = last - first > 3 ? [1] : last - first > 1 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let power = first; power <= last; power += 1) for (const factor of factors) all.push(factor * 10 ** power);
  const inside = all.filter((tick) => tick >= low && tick <= high);
  return inside.length >= 2 ? [Math.min(low, inside[0]), Math.max(high, inside.at(-1)), inside] : [low, high * (high > low ? 1 : 1.1), [low, high]];
}
