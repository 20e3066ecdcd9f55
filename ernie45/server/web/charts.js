// Pictures of numbers, drawn as SVG.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [600, 120];

/** A line over time. `values`: one a reading, null where there was none; `describe(value)` puts a number into words. */
export function lineChart(title, values, describe) {
  const known = values.filter((value) => value !== null);
  const top = niceTop(Math.max(...known, 0));
  const x = (i) => WIDTH - (values.length - 1 - i) * (WIDTH / 89);
  const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 12);
  const runs = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (i === 0 || values[i - 1] === null) runs.push([]);
    runs.at(-1).push(`${x(i).toFixed(1)},${y(value).toFixed(1)}`);
  });
  const lines = runs.flatMap((run) => {
    const ends = [run[0].split(",")[0], run.at(-1).split(",")[0]];
    return [svg("polygon", { class: "area", points: `${ends[0]},${HEIGHT} ${run.join(" ")} ${ends[1]},${HEIGHT}` }), svg("polyline", { class: "line", points: run.join(" ") })];
  });
  const now = known.length && values.at(-1) !== null ? describe(values.at(-1)) : "not reported";
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${now}, at most ${describe(Math.max(...known, 0))}` },
    svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: y(top), y2: y(top) }), svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 }), ...lines);
  return el("figure", {}, el("figcaption", {}, el("span", { text: title }), el("strong", { text: now })), el("div", { class: "plot" }, el("span", { class: "top", text: describe(top) }), picture));
}

/** The least of 1, 2, 5, 10 ... that is not below `value`. */
function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

/** A bar in parts: `parts` are [class, share of one, words]. */
export function stackedBar(label, parts) {
  let from = 0;
  const rects = parts.map(([kind, share]) => {
    const rect = svg("rect", { class: kind, x: from * 1000, width: Math.max(0, share) * 1000, y: 0, height: 20 });
    from += Math.max(0, share);
    return rect;
  });
  const words = parts.map(([, , text]) => text).join(", ");
  return el("div", { class: "stack" }, svg("svg", { viewBox: "0 0 1000 20", preserveAspectRatio: "none", role: "img", "aria-label": `${label}: ${words}` }, ...rects),
    el("ul", { class: "legend" }, ...parts.map(([kind, , text]) => el("li", {}, el("i", { class: kind }), text))));
}

/** Percentiles as ranges on one scale: `rows` are [name, {p50, p90, p95, p99}], in seconds. */
export function rangeRows(rows, percentiles, describe) {
  const all = rows.flatMap(([, values]) => percentiles.map((name) => values[name])).filter(Number.isFinite);
  const [low, high] = [Math.max(Math.min(...all) * 0.8, 1e-4), Math.max(...all) * 1.1];
  const place = (value) => (high > low ? (Math.log(Math.max(value, low) / low) / Math.log(high / low)) * 1000 : 500);
  const table = el("table", { class: "percentiles" }, el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "" }), ...percentiles.map((name) => el("th", { scope: "col", text: name.replace("p", "") + " %" })), el("th", { scope: "col", class: "picture-cell" }, el("span", { class: "offscreen", text: "Picture" })))));
  const body = table.appendChild(el("tbody"));
  for (const [name, values] of rows) {
    const spots = percentiles.map((p) => values[p]).filter(Number.isFinite).map(place);
    const picture = svg("svg", { viewBox: "0 0 1000 20", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("line", { class: "grid", x1: 0, x2: 1000, y1: 10, y2: 10 }),
      spots.length ? svg("line", { class: "range", x1: spots[0], x2: spots.at(-1), y1: 10, y2: 10 }) : null,
      ...spots.map((spot, i) => svg("rect", { class: i === 0 ? "median" : "mark", x: spot - 2, width: 4, y: i === 0 ? 2 : 5, height: i === 0 ? 16 : 10 })));
    body.append(el("tr", {}, el("th", { scope: "row", text: name }), ...percentiles.map((p) => el("td", { text: Number.isFinite(values[p]) ? describe(values[p]) : "–" })), el("td", { class: "picture-cell" }, picture)));
  }
  return table;
}

/** One cell for each expert of each layer; the colour says how far its load is from an even share. `layers`: [{layer, load: [...]}]. */
export function loadPicture(layers, experts) {
  const [cell, gap] = [10, 1];
  const rows = layers.map(({ load }, row) => {
    const total = load.reduce((sum, value) => sum + value, 0) || 1;
    return svg("g", { transform: `translate(0 ${row * (cell + gap)})` }, ...load.map((value, i) => {
      const share = (value / total) * load.length; // 1: an even share
      return svg("rect", { x: i * (cell + gap), width: cell, height: cell, class: share > 1 ? "above" : "below", "fill-opacity": strength(share).toFixed(3) });
    }));
  });
  const worst = layers.map(({ layer, bank, load }) => ({ layer: bank === "vision" ? `${layer} (vision)` : layer, ratio: (Math.max(...load) / (load.reduce((sum, value) => sum + value, 0) || 1)) * load.length }))
    .reduce((a, b) => (b.ratio > a.ratio ? b : a), { layer: 0, ratio: 0 });
  const words = `${layers.length} ${layers.some((one) => one.bank) ? "banks, one a row, those of pictures below those of text," : "layers"} by ${experts} experts. The busiest expert stands in layer ${worst.layer}, with ${worst.ratio.toFixed(1)} times an even share.`;
  return el("div", {}, svg("svg", { class: "load", viewBox: `0 0 ${experts * (cell + gap) - gap} ${layers.length * (cell + gap) - gap}`, role: "img", "aria-label": words }, ...rows),
    el("p", { class: "hint", text: words }),
    el("ul", { class: "legend" }, el("li", {}, el("i", { class: "above" }), "more than an even share"), el("li", {}, el("i", { class: "below" }), "less")));
}

/** 0 at an even share, 1 at four times or a quarter of it. */
function strength(share) {
  return Math.min(1, Math.abs(Math.log2(Math.max(share, 1 / 16))) / 2) * 0.92 + 0.08;
}
