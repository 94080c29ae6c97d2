// Follows a cell: one stream of events in, the page out. Nothing is ever sent.

import { clock, duration, mark, say } from "/format.js";
import { legend, Strips } from "/strip.js";
import { errors, LayerTable, memory, processes, requests, Tiles } from "/tables.js";

const RETRY_MS = 3000;
const find = (id) => document.getElementById(id);

const strips = new Strips(find("strips"), find("detail"));
const table = new LayerTable(find("table"));
let tiles = new Tiles(find("tiles"));
let about = null;
let paused = false;
let lastTime = null;

function begin(cell) {
  about = cell;
  lastTime = null;
  document.title = `${cell.model} · Braid`;
  say(find("model"), cell.model);
  const layers = cell.roles[0].layers;
  const kinds = ["full", "linear", "parallel", "none"].map((kind) => [kind, layers.filter((layer) => layer.kind === kind).length]);
  const counted = kinds.filter(([, many]) => many > 0).map(([kind, many]) => `${many} ${kind}`);
  const draft = cell.roles.length > 1 ? `, a draft of ${cell.roles[1].layers.length}` : "";
  say(find("facts"), `${cell.family} · ${layers.length} layers: ${counted.join(", ")}${draft}`);
  tiles = new Tiles(find("tiles"));
  strips.begin(cell.roles);
  table.begin(cell.roles);
  legend(find("legend"), strips.scale);
}

function take(frame) {
  if (about === null || paused) return;
  lastTime = frame.time;
  banner("");
  state(frame.state);
  tiles.take(frame);
  strips.take(frame.layers);
  legend(find("legend"), strips.scale);
  table.take([...strips.last.values()], frame.elapsed);
  memory(find("pools"), frame);
  processes(find("services"), frame, about);
  requests(find("requests"), frame);
  errors(find("errors"), frame);
  say(find("about"), `Braid ${about.version} · up ${duration(frame.uptime)} · ${about.dtype}, states ${about.state_dtype} · dispatch ${about.dispatch} · as of ${clock(frame.time)}`);
}

function state(name) {
  const node = find("state");
  if (node.dataset.state !== name) {
    mark(node, "data-state", name);
    say(node, name);
    say(find("spoken"), `The cell is ${name}.`);
  }
}

function banner(text) {
  const node = find("banner");
  say(node, text);
  node.hidden = text === "";
}

function connect() {
  const source = new EventSource("/events");
  source.addEventListener("cell", (event) => begin(JSON.parse(event.data)));
  source.addEventListener("frame", (event) => take(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    // Refused connections are not tried again by the browser itself.
    source.close();
    state("lost");
    const since = lastTime === null ? "" : ` since ${clock(lastTime)}`;
    banner(`The cell does not answer${since}. Trying again.`);
    setTimeout(connect, RETRY_MS);
  });
}

const THEMES = ["auto", "light", "dark"];

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  say(find("theme"), `Theme: ${name}`);
  find("theme").dataset.theme = name;
}

function remembered() {
  const name = localStorage.getItem("braid-theme");
  return THEMES.includes(name) ? name : "auto";
}

find("theme").addEventListener("click", (event) => {
  const next = THEMES[(THEMES.indexOf(event.currentTarget.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("braid-theme", next);
  theme(next);
});

find("pause").addEventListener("click", (event) => {
  paused = !paused;
  mark(event.currentTarget, "aria-pressed", String(paused));
  say(event.currentTarget, paused ? "Resume" : "Pause");
  document.body.toggleAttribute("data-paused", paused);
});

theme(remembered());
connect();

