// The page of training runs: asks for their numbers every two seconds while it is looked at.

import { loadPicture } from "./charts.js";
import { el } from "./dom.js";
import { Plot } from "./plots.js";
import { bindTheme } from "./shell.js";

const $ = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds
const COLOURS = 8;
// What has a name of its own; any other number in the log gets a picture under the name it has there.
const TITLES = {
  loss: "Loss", held_out_loss: "Loss of held-out rows", held_out_accuracy: "Share of held-out answers judged rightly", text_loss: "Loss of text", vision_loss: "Loss beside images", mtp_loss: "Loss two tokens ahead", margin: "Margin of the chosen answer",
  accuracy: "Pairs that are right", rate: "Learning rate", norm: "Gradient norm", tokens_per_second: "Tokens a second", mfu: "Model FLOPs utilisation", hfu: "Hardware FLOPs utilisation", balance_loss: "Router: load balance",
  orthogonal_loss: "Router: orthogonal", z_loss: "Router: z", vision_tokens: "Tokens of vision experts",
  vision_balance_loss: "Router of vision: load balance", vision_orthogonal_loss: "Router of vision: orthogonal", vision_z_loss: "Router of vision: z", "load.max": "Busiest expert, times an even share",
};
const NOT_DRAWN = new Set(["step", "tokens", "seconds", "loss.low", "loss.high"]);
const hidden = new Set();
const colours = new Map();
const plots = new Map();
let runs = [];
let shownLoad = "";

const has = (value) => typeof value === "number" && Number.isFinite(value);

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${trim(value / 1e9)}G`;
  if (size >= 1e6) return `${trim(value / 1e6)}M`;
  if (size >= 1e4) return `${trim(value / 1e3)}k`;
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : trim(value);
}
const trim = (value) => String(Number(value.toPrecision(4)));

function duration(value) {
  if (value < 100) return `${trim(Number(value.toPrecision(3)))} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${trim(Number((value / 3600).toPrecision(3)))} h`;
}

const AXES = { step: { describe: (value) => short(value) }, tokens: { describe: short }, seconds: { describe: duration } };

function kind(run) {
  if (!colours.has(run.name)) colours.set(run.name, colours.size % COLOURS);
  return `run-${colours.get(run.name)}`;
}

function draw() {
  const learning = runs.filter((run) => run.state === "running").length;
  $("state").textContent = runs.length ? `${runs.length} run${runs.length === 1 ? "" : "s"}, ${learning || "none"} learning now` : "No run has begun yet";
  $("state").className = learning ? "running" : "";
  drawRuns();
  drawCurves();
  drawExperts();
  drawSamples();
  drawSettings();
}

function drawRuns() {
  const row = (run) => {
    const box = el("input", { type: "checkbox", checked: !hidden.has(run.name), on: { change: (event) => { if (event.target.checked) hidden.delete(run.name); else hidden.add(run.name); draw(); } } });
    const { total, left } = outlook(run);
    const done = total ? el("span", {}, el("progress", { max: total, value: run.last.step + 1, "aria-label": `progress of ${run.name}` }), ` ${short(run.last.step + 1)} of ${short(total)}`) : `${has(run.last.step) ? short(run.last.step + 1) : 0}`;
    const cell = (value, describe = short) => el("td", { text: has(value) ? describe(value) : "–" });
    return el("tr", {}, el("th", { scope: "row" }, el("label", { class: kind(run) }, box, el("i", { class: "swatch" }), run.name)), el("td", { text: run.state }), el("td", {}, done),
      cell(run.last.loss), cell(run.last.rate), cell(run.last.norm), cell(run.last.tokens_per_second), el("td", { text: left ? duration(left) : "–" }), cell(run.skipped), memory(run));
  };
  const names = ["Run", "State", "Steps", "Loss", "Rate", "Norm", "Tokens/s", "Left", "Refused steps", "Memory"];
  $("runs").replaceChildren(el("thead", {}, el("tr", {}, ...names.map((text) => el("th", { scope: "col", text })))), el("tbody", {}, ...runs.map(row)));
}

/** The largest the process was, and by pointing at it what took how much. */
function memory(run) {
  const kinds = Object.entries(run.memory ?? {}).filter(([, bytes]) => has(bytes));
  return el("td", { text: has(run.memory?.process) ? `${short(run.memory.process)}B` : "–", title: kinds.map(([name, bytes]) => `${name} ${short(bytes)}B`).join("\n") });
}

/** How many steps a run will have, where that is known, and how many seconds are left. */
function outlook(run) {
  const total = run.planned;
  if (!has(total) || !has(run.last.step)) return {};
  const seconds = run.curves.seconds?.at(-1);
  const each = has(seconds) && run.steps ? seconds / run.steps : null;
  return { total, left: run.state === "running" && each ? (total - run.last.step - 1) * each : 0 };
}

function drawCurves() {
  const shown = runs.filter((run) => !hidden.has(run.name) && run.curves.step?.length);
  const names = Object.keys(TITLES).filter((name) => shown.some((run) => run.curves[name]));
  for (const run of shown) for (const name of Object.keys(run.curves)) if (!names.includes(name) && !NOT_DRAWN.has(name)) names.push(name);
  const axis = $("axis").value;
  const options = { smooth: Number($("smooth").value), log: $("log").checked };
  for (const name of plots.keys()) if (!names.includes(name)) plots.delete(name);
  for (const name of names) {
    if (!plots.has(name)) plots.set(name, new Plot(TITLES[name] ?? name.replaceAll("_", " "), short, name === names[0]));
    const series = shown.filter((run) => run.curves[name]).map((run) => ({
      name: run.name, kind: kind(run), x: run.curves[axis], y: run.curves[name], low: run.curves[`${name}.low`], high: run.curves[`${name}.high`],
    }));
    plots.get(name).draw(series, AXES[axis], options);
  }
  const nodes = names.map((name) => plots.get(name).node);
  const now = [...$("plots").children];
  if (nodes.length !== now.length || nodes.some((node, i) => node !== now[i])) $("plots").replaceChildren(...nodes);
}

function options(select, values, words) {
  const before = select.value;
  if ([...select.options].map((one) => one.value).join("\n") === values.join("\n")) return;
  select.replaceChildren(...values.map((value, i) => el("option", { value, text: words[i] })));
  if (values.includes(before)) select.value = before;
}

async function drawExperts() {
  const able = runs.filter((run) => run.load?.length);
  $("experts-section").hidden = !able.length;
  if (!able.length) return;
  options($("experts-run"), able.map((run) => run.name), able.map((run) => run.name));
  const run = able.find((one) => one.name === $("experts-run").value) ?? able[0];
  // layers of vision experts are counted on behind those of text experts
  const layers = [...run.load.map((load, i) => ({ layer: i + 1, load })), ...(run.vision_load ?? []).map((load, i) => ({ layer: i + 1, bank: "vision", load }))];
  options($("experts-layer"), layers.map((_, i) => String(i)), layers.map(({ layer, bank }) => (bank ? `${layer} (vision)` : String(layer))));
  const layer = $("experts-layer").value || "0";
  $("load").replaceChildren(loadPicture(layers, Math.max(...layers.map(({ load }) => load.length))));
  const wanted = `${run.name}\n${layer}\n${run.last.step}`;
  if (wanted === shownLoad) return;
  shownLoad = wanted;
  try {
    const answer = await fetch(`load.json?${new URLSearchParams({ run: run.name, layer })}`);
    if (answer.ok && shownLoad === wanted) heat(await answer.json());
  } catch {
    shownLoad = ""; // the next look tries again; that the server is gone is said there
  }
}

/** Time from left to right, an expert a row; the more a cell stands out from the page the busier, the middle tone is an even share. */
function heat({ steps, loads }) {
  const canvas = $("heat");
  const experts = loads[0]?.length ?? 0;
  if (!experts) return;
  [canvas.width, canvas.height] = [loads.length, experts];
  const pen = canvas.getContext("2d");
  const picture = pen.createImageData(loads.length, experts);
  const tones = getComputedStyle(document.body);
  const [ground, ink] = [tones.backgroundColor, tones.color].map((tone) => tone.match(/[\d.]+/g).slice(0, 3).map(Number));
  loads.forEach((column, x) => column.forEach((share, y) => {
    const tone = Math.min(1, Math.max(0, 0.5 + Math.log2(Math.max(share, 1 / 16)) / 4)); // 0 at a quarter of an even share, 1 at four times it
    const at = (y * loads.length + x) * 4;
    for (let c = 0; c < 3; c += 1) picture.data[at + c] = ground[c] + (ink[c] - ground[c]) * tone;
    picture.data[at + 3] = 255;
  }));
  pen.putImageData(picture, 0, 0);
  const last = loads.at(-1);
  const busiest = last.indexOf(Math.max(...last));
  $("heat-words").textContent = `${experts} experts, steps ${steps[0]} to ${steps.at(-1)}, the newest on the right; what stands out from the page is busy. Busiest now: expert ${busiest} with ${last[busiest].toFixed(2)} times an even share; idlest: ${Math.min(...last).toFixed(2)} times.`;
}

function drawSamples() {
  const all = runs.filter((run) => !hidden.has(run.name)).flatMap((run) => (run.samples ?? []).map((sample) => ({ ...sample, run })));
  all.sort((a, b) => (b.step ?? 0) - (a.step ?? 0));
  $("samples-section").hidden = !all.length;
  const nodes = all.slice(0, 30).map(({ run, step, prompt, text }) => el("div", { class: `sample ${kind(run)}` },
    el("p", { class: "hint", text: `${run.name}, after step ${step}` }), el("p", { class: "prompt", text: prompt }), el("p", { text })));
  $("samples").replaceChildren(...nodes);
}

function flat(settings, prefix = "") {
  return Object.entries(settings ?? {}).flatMap(([name, value]) => (value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${name}.`) : [[prefix + name, typeof value === "string" ? value : JSON.stringify(value)]]));
}

function drawSettings() {
  const shown = runs.filter((run) => !hidden.has(run.name));
  const tables = shown.map((run) => new Map(flat(run.settings)));
  const names = [...new Set(tables.flatMap((table) => [...table.keys()]))];
  const differs = (name) => new Set(tables.map((table) => table.get(name))).size > 1;
  const wanted = shown.length > 1 && $("only-different").checked ? names.filter(differs) : names;
  $("settings-section").hidden = !names.length;
  const row = (name) => el("tr", { class: differs(name) ? "differs" : null }, el("th", { scope: "row", text: name }), ...tables.map((table) => el("td", { text: table.get(name) ?? "–" })));
  $("settings").replaceChildren(el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "Setting" }), ...shown.map((run) => el("th", { scope: "col", class: kind(run), text: run.name })))), el("tbody", {}, ...wanted.map(row)));
}

async function look() {
  try {
    const answer = await fetch("runs.json");
    if (!answer.ok) throw new Error(`The page's own server answered ${answer.status}.`);
    ({ runs } = await answer.json());
    $("problem").hidden = true;
    draw();
  } catch (error) {
    $("problem").textContent = error instanceof TypeError ? "ernie watch has ended; what is shown is its last report." : error.message;
    $("problem").hidden = false;
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => { setTimeout(resolve, EVERY); });
  }
}

bindTheme($("theme"));
for (const id of ["axis", "log", "smooth", "experts-run", "experts-layer", "only-different"]) $(id).addEventListener("input", draw);
run();
