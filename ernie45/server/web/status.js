// The page of the server's state: asks for status.json every two seconds while it is looked at. Every field may be missing.

import { ask } from "./api.js";
import { lineChart, loadPicture, rangeRows, stackedBar } from "./charts.js";
import { el } from "./dom.js";
import { bindTheme, closeButtons } from "./shell.js";
import { apiKey } from "./store.js";

const $ = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds
const KEPT = 90; // readings: three minutes
const PERCENTILES = ["p50", "p90", "p95", "p99"];
const openSettings = new Set(); // names of models
const history = { generated: [], prompt: [] }; // what this page saw, for servers that report none

const has = (value) => typeof value === "number" && Number.isFinite(value);
const whole = (value) => Math.round(value).toLocaleString("en");
const reading = (value) => (has(value) ? Math.max(0, value) : null);
const rate = (value) => `${value < 10 ? value.toFixed(1) : whole(value)} tokens/s`;

function duration(value) {
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 100) return `${value.toFixed(1)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 172_800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86_400)} days`;
}

const millions = (value) => `${(value / 1e6).toLocaleString("en", { maximumFractionDigits: value < 1e7 ? 2 : 0 })} M`;

function bytes(value) {
  const step = Math.min(4, Math.max(0, Math.floor(Math.log(Math.max(value, 1)) / Math.log(1024))));
  return `${(value / 1024 ** step).toFixed(step && value / 1024 ** step < 10 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][step]}`;
}

function missing(place, what) {
  place.replaceChildren(el("p", { class: "hint", text: `${what} is not reported by this server.` }));
}

function draw(data) {
  const parts = [data.draining ? "Finishing what runs, taking nothing new" : "Running"];
  if (has(data.uptime_seconds)) parts.push(`for ${duration(data.uptime_seconds)}`);
  if (typeof data.version === "string") parts.push(`version ${data.version}`);
  $("state").textContent = parts.join(" · ");
  $("state").className = data.draining ? "draining" : "running";
  drawTiles(data);
  drawCharts(data.history ?? {});
  drawLatency(data.latency ?? {});
  drawCache(data.cache ?? {}, data.memory ?? {});
  drawExperts(data.experts);
  drawModels(Array.isArray(data.models) ? data.models : []);
  drawTotals(data.totals ?? {});
}

function drawTiles({ queue = {}, throughput = {}, cache = {}, latency = {} }) {
  const tile = (name, value, note) => el("div", { class: "tile" }, el("h3", { text: name }), el("p", { class: "value", text: value ?? "–" }), el("p", { class: "hint", text: note ?? "" }));
  const used = has(cache.pages_used) && cache.pages_total > 0 ? cache.pages_used / cache.pages_total : null;
  $("tiles").replaceChildren(
    tile("Running", has(queue.running) ? whole(queue.running) : null, has(queue.max_running) ? `of ${whole(queue.max_running)} at once` : ""),
    tile("Waiting", has(queue.waiting) ? whole(queue.waiting) : null, has(queue.max_waiting) ? `room for ${whole(queue.max_waiting)}` : ""),
    tile("Writing", has(throughput.generated_tokens_per_second) ? throughput.generated_tokens_per_second.toFixed(1) : null, "tokens a second"),
    tile("Cache", used === null ? null : `${Math.round(used * 100)} %`, "in use"),
    tile("First token", has(latency.ttft?.p50) ? duration(latency.ttft.p50) : null, "half of the answers begin sooner"));
}

function drawCharts(reported) {
  const points = (name, seen) => (Array.isArray(reported[name]) && reported[name].length ? reported[name].map(reading) : seen);
  $("charts").replaceChildren(lineChart("Written", points("generated_tokens_per_second", history.generated), rate), lineChart("Read", points("prompt_tokens_per_second", history.prompt), rate));
}

function drawLatency(latency) {
  const names = { ttft: "To the first token", tpot: "Each further token, by answer", itl: "Between tokens", e2e: "Whole answer", queue: "In the queue" };
  const rows = Object.keys(names).filter((key) => PERCENTILES.some((p) => has(latency[key]?.[p]))).map((key) => [names[key], latency[key]]);
  if (!rows.length) return missing($("latency"), "Latency");
  const note = has(latency.window_seconds) ? el("p", { class: "hint", text: `Over the last ${duration(latency.window_seconds)}. So many answers in a hundred were at least this quick; the scale of the picture is logarithmic.` }) : null;
  $("latency").replaceChildren(...[el("div", { class: "frame" }, rangeRows(rows, PERCENTILES, duration)), note].filter(Boolean));
}

function drawCache(cache, memory) {
  if (!(cache.pages_total > 0)) return missing($("cache"), "The cache");
  const [used, reusable] = [cache.pages_used ?? 0, cache.pages_reusable ?? 0];
  const free = Math.max(0, cache.pages_total - used - reusable);
  const share = (pages) => pages / cache.pages_total;
  const tokens = (pages) => (has(cache.page_size) ? `${whole(pages * cache.page_size)} tokens` : `${whole(pages)} pages`);
  const facts = [];
  if (has(cache.prefix_hit_rate)) facts.push(["Prompt tokens found in the cache", `${Math.round(cache.prefix_hit_rate * 100)} %`]);
  for (const [key, name] of [["weights_bytes", "Weights"], ["cache_bytes", "Cache"], ["resident_bytes", "Process"]]) if (has(memory[key])) facts.push([name, bytes(memory[key])]);
  $("cache").replaceChildren(stackedBar("Cache", [["used", share(used), `${tokens(used)} in use`], ["kept", share(reusable), `${tokens(reusable)} kept for reuse`], ["free", share(free), `${tokens(free)} free`]]),
    el("dl", {}, ...facts.flatMap(pair)));
}

function drawExperts(experts) {
  const layers = Array.isArray(experts?.layers) ? experts.layers.filter((one) => Array.isArray(one?.load) && one.load.length && one.load.every((value) => has(value) && value >= 0)) : [];
  $("experts-section").hidden = !layers.length;
  if (!layers.length) return;
  if (layers.every(({ load }) => load.every((value) => value === 0))) return $("experts").replaceChildren(el("p", { class: "hint", text: "No choice of an expert has been counted yet." }));
  $("experts").replaceChildren(loadPicture(layers, Math.max(...layers.map((one) => one.load.length))));
}

const COLUMNS = [
  ["State", (model) => model.state ?? null],
  ["Parameters", (model) => (model.parameters > 0 ? millions(model.parameters) : null)],
  ["Active", (model) => (model.active_parameters > 0 && model.active_parameters < model.parameters ? millions(model.active_parameters) : null)],
  ["Type", (model) => model.dtype ?? null],
  ["Threads", (model) => (model.threads > 0 ? whole(model.threads) + (model.cores?.length ? ` on core${model.cores.length > 1 ? "s" : ""} ${model.cores.join(", ")}` : "") : null)],
  ["Memory", (model) => (has(model.memory) ? bytes(model.memory) : null)],
  ["Context", (model) => (has(model.context) ? `${whole(model.context)} tokens` : null)],
];

/** A column that no model has anything to say for is left out. */
function drawModels(given) {
  const models = given.map((model) => model ?? {});
  if (!models.length) return missing($("models"), "The list of models");
  const columns = COLUMNS.filter(([, value]) => models.some((model) => value(model) !== null));
  const row = (model) => el("tr", {}, el("th", { scope: "row", text: String(model.id ?? "") }), ...columns.map(([, value]) => el("td", { text: String(value(model) ?? "–") })));
  $("models").replaceChildren(
    el("div", { class: "frame" }, el("table", {}, el("thead", {}, el("tr", {}, ...["Name", ...columns.map(([name]) => name)].map((text) => el("th", { scope: "col", text })))), el("tbody", {}, ...models.map(row)))),
    ...models.map(settingsOf).filter(Boolean));
}

/** What was resolved when a model was loaded: threads, memory, cache. Whoever opened it keeps it open. */
function settingsOf(model) {
  const facts = typeof model?.settings === "object" && model.settings !== null ? Object.entries(model.settings).filter(([, value]) => typeof value === "string") : [];
  if (!facts.length) return null;
  const name = String(model.id ?? "");
  const part = el("details", { class: "settings", open: openSettings.has(name) }, el("summary", { text: `How ${name} was loaded` }), el("dl", {}, ...facts.flatMap(pair)));
  part.addEventListener("toggle", () => (part.open ? openSettings.add(name) : openSettings.delete(name)));
  return part;
}

function drawTotals(totals) {
  const names = { requests: "Requests", errors: "Errors", cancelled: "Cancelled", prompt_tokens: "Tokens read", generated_tokens: "Tokens written", preemptions: "Preemptions" };
  const facts = Object.entries(names).filter(([key]) => has(totals[key])).map(([key, name]) => [name, whole(totals[key])]);
  if (facts.length) $("totals").replaceChildren(...facts.flatMap(pair));
  else missing($("totals"), "This");
}

const pair = ([name, value]) => [el("dt", { text: name }), el("dd", { text: value })];

function remember(data) {
  history.generated.push(reading(data?.throughput?.generated_tokens_per_second));
  history.prompt.push(reading(data?.throughput?.prompt_tokens_per_second));
  for (const list of Object.values(history)) while (list.length > KEPT) list.shift();
}

async function look() {
  try {
    const data = await (await ask("status.json")).json();
    remember(data);
    draw(typeof data === "object" && data !== null ? data : {});
    $("problem").hidden = true;
  } catch (error) {
    remember(null);
    drawCharts({});
    if (error.status === 401 || error.status === 403) askKey();
    $("problem").textContent = error.status === 404 ? "This server does not report its state." : error instanceof SyntaxError ? "The server's report cannot be read." : error.message;
    $("problem").hidden = false;
    $("state").textContent = "No news";
    $("state").className = "";
  }
}

function askKey() {
  const dialog = $("key-dialog");
  if (dialog.open || dialog.dataset.refused) return;
  dialog.showModal();
}

async function run() {
  for (;;) {
    if (!document.hidden && !$("key-dialog").open) await look();
    await new Promise((resolve) => { setTimeout(resolve, EVERY); });
  }
}

bindTheme($("theme"));
closeButtons();
$("key-dialog").addEventListener("close", () => { $("key-dialog").dataset.refused = "yes"; });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.write($("key").value.trim(), $("remember").checked);
  $("key-dialog").close();
  look();
});
run();
