// Everything beside the strip: tiles, memory, processes, requests, errors, and the table of layers.

import { bytes, clock, count, duration, follow, latency, make, mark, micros, percent, rate, say, sparkline } from "/format.js";
import { chip, pointKey, stacked, total } from "/strip.js";

const HISTORY = 60;
const cell = (text, name = "") => make("td", name ? { class: name } : {}, text);
const number = () => cell("", "number");

export class Tiles {
  constructor(parent) {
    this.history = { tokens: [], steps: [] };
    this.parent = parent;
    parent.replaceChildren();
    this.tiles = {};
    this.add("tokens", "Tokens per second", true);
    this.add("steps", "Steps per second", true);
    this.add("first", "First token");
    this.add("between", "Between tokens");
    this.add("load", "Requests");
    this.add("epoch", "Epoch");
  }

  add(name, title, graph = false) {
    const big = make("span", { class: "big" });
    const small = make("span", { class: "small" });
    const tile = make("div", { class: "tile", id: `tile-${name}` }, make("dt", {}, title), make("dd", {}, big, small));
    const spark = graph ? sparkline(120, 28) : null;
    if (spark) tile.lastChild.append(spark.node);
    this.parent.append(tile);
    this.tiles[name] = { big, small, spark };
  }

  tell(name, big, small) {
    say(this.tiles[name].big, big);
    say(this.tiles[name].small, small);
  }

  take(frame) {
    const { totals, rates } = frame;
    if (rates) {
      for (const [name, value] of [["tokens", rates.generated_tokens], ["steps", rates.steps]]) {
        const past = this.history[name];
        past.push(value);
        if (past.length > HISTORY) past.shift();
        this.tiles[name].spark.show(past, HISTORY);
      }
    }
    this.tell("tokens", rate(rates?.generated_tokens), `${count(totals.generated_tokens)} made, ${count(totals.prompt_tokens)} read`);
    this.tell("steps", rate(rates?.steps), `${count(totals.steps)} in all`);
    for (const [name, source] of [["first", "first_token"], ["between", "inter_token"]]) {
      const [half, most] = frame.latency[source];
      this.tell(name, latency(half), `median; 95 %: ${latency(most)}`);
    }
    const gone = frame.preemptions ? `, ${count(frame.preemptions)} gave way` : "";
    this.tell("load", `${frame.running} running`, `${count(frame.waiting)} waiting, ${count(totals.finished)} ended${gone}`);
    this.tell("epoch", count(frame.epoch), frame.replays === 1 ? "1 step replayed" : `${count(frame.replays)} steps replayed`);
  }
}

function meter(name) {
  const held = make("span", { class: "held" });
  const kept = make("span", { class: "kept" });
  const bar = make("span", { class: "meter", role: "meter", "aria-valuemin": "0", "aria-label": name }, held, kept);
  const text = make("span", { class: "meter-text" });
  return make("div", { class: "pool" }, make("span", { class: "meter-name" }, name), bar, text);
}

export function memory(parent, frame) {
  const several = new Set(frame.pools.map((pool) => pool.role)).size > 1;
  const rows = frame.pools.map((pool) => ({ ...pool, title: several ? `${pool.role} ${pool.name}` : pool.name }));
  let list = parent.querySelector(".pools");
  if (!list) {
    list = make("div", { class: "pools" });
    parent.append(list, make("dl", { class: "facts reuse" }));
  }
  follow(list, rows, (pool) => pool.title, (pool) => meter(pool.title), (node, pool) => {
    const [, bar, text] = node.children;
    const said = `${count(pool.used)} held, ${count(pool.cached)} kept for later, ${count(pool.total)} in all (${bytes(pool.total * pool.unit_bytes)})`;
    bar.children[0].style.setProperty("--share", `${(pool.used / pool.total) * 100}%`);
    bar.children[1].style.setProperty("--share", `${(pool.cached / pool.total) * 100}%`);
    mark(bar, "aria-valuemax", String(pool.total));
    mark(bar, "aria-valuenow", String(pool.used));
    mark(bar, "aria-valuetext", said);
    mark(bar, "data-pressed", String(pool.used / pool.total > 0.9));
    say(text, said);
  });
  reuse(parent.querySelector(".reuse"), frame);
}

function reuse(list, { prefix, drafts }) {
  const rows = [];
  if (prefix) {
    const asked = prefix.hits + prefix.misses;
    const share = asked ? percent(prefix.hits / asked) : "–";
    rows.push(["prefix cache", `${share} of ${count(asked)} requests hit, ${count(prefix.hit_tokens)} tokens not computed again`]);
    rows.push(["evicted", `${count(prefix.evicted_pages)} pages, ${count(prefix.evicted_states)} states`]);
  } else {
    rows.push(["prefix cache", "off"]);
  }
  if (drafts) {
    const guessed = drafts.accepted + drafts.rejected;
    rows.push(["drafts", `${guessed ? percent(drafts.accepted / guessed) : "–"} of ${count(guessed)} guesses accepted`]);
  }
  follow(list, rows, ([name]) => name, ([name]) => make("div", {}, make("dt", {}, name), make("dd")), (node, [, text]) => say(node.lastChild, text));
}

const STATES = { ready: "ready", unconfigured: "waits to be configured", lost: "lost", serving: "serving", recovering: "recovering", draining: "draining" };

export function processes(table, frame, about) {
  const own = { name: "orchestrator", state: frame.state, pid: about.pid, backend: "", why: "" };
  follow(table.tBodies[0], [own, ...frame.services], (service) => service.name, (service) => {
    const head = make("th", { scope: "row" }, service.name);
    return make("tr", {}, head, make("td", {}, make("span", { class: "state" })), number(), cell(""));
  }, (row, service) => {
    const state = row.cells[1].firstChild;
    mark(state, "data-state", service.state);
    mark(state, "title", service.why);
    say(state, STATES[service.state]);
    say(row.cells[2], service.pid ? String(service.pid) : "–");
    say(row.cells[3], service.backend || "–");
  });
}

export function requests(table, frame) {
  const { requests: found } = frame;
  document.getElementById("no-requests").hidden = found.length > 0;
  table.parentElement.hidden = found.length === 0;
  const inHand = frame.running + frame.waiting;
  say(document.getElementById("requests-count"), inHand > found.length ? `the oldest ${found.length} of ${count(inHand)}` : "");
  follow(table.tBodies[0], found, (request) => request.request_id, (request) => {
    const name = make("th", { scope: "row", title: request.request_id }, shortened(request.request_id));
    return make("tr", {}, name, cell("", "phase"), number(), number(), number(), number());
  }, (row, request) => {
    mark(row.cells[1], "data-phase", request.phase);
    say(row.cells[1], request.phase);
    say(row.cells[2], request.phase === "prefill" ? `${count(request.fed_tokens)} / ${count(request.prompt_tokens)}` : count(request.prompt_tokens));
    say(row.cells[3], count(request.cached_tokens));
    say(row.cells[4], `${count(request.made_tokens)} / ${count(request.max_tokens)}`);
    say(row.cells[5], request.age_s < 10 ? `${request.age_s.toFixed(1)} s` : duration(request.age_s));
  });
}

function shortened(name) {
  return name.length > 20 ? `${name.slice(0, 8)}…${name.slice(-6)}` : name;
}

export function errors(list, frame) {
  document.getElementById("no-errors").hidden = frame.errors.length > 0;
  const all = frame.errors.reduce((sum, error) => sum + error.count, 0);
  say(document.getElementById("errors-count"), all ? count(all) : "");
  follow(list, frame.errors, (error) => `${error.first}/${error.reason}`, (error) => {
    const head = make("p", { class: "error-head" }, make("code", {}, error.reason), make("span", { class: "times" }), make("time"));
    return make("li", {}, head, make("p", { class: "error-text" }, error.message));
  }, (node, error) => {
    const [, times, when] = node.firstChild.children;
    say(times, error.count > 1 ? `×${count(error.count)}` : "");
    mark(when, "datetime", new Date(error.last * 1000).toISOString());
    say(when, clock(error.last));
  });
}

export class LayerTable {
  constructor(table) {
    this.body = table.tBodies[0];
    this.table = table;
  }

  begin(roles) {
    this.shapes = new Map();
    for (const { role, layers } of roles) {
      for (const layer of layers) {
        for (const side of layer.sides) this.shapes.set(pointKey(role, layer.id, side.side), side);
      }
    }
    this.table.toggleAttribute("data-one-role", roles.length < 2);
    this.body.replaceChildren();
    this.bars = new Map();
  }

  take(points, seconds) {
    const ordered = [...points].sort((a, b) => b.role.localeCompare(a.role) || a.id - b.id);
    const most = Math.max(...ordered.map(total), 1);
    follow(this.body, ordered, (point) => pointKey(point.role, point.id, point.side), (point) => this.row(point), (row, point) => {
      const cells = row.cells;
      ["extend", "decode", "verify", "mixed"].forEach((mode, place) => say(cells[5 + place], count(point.modes[mode] ?? 0)));
      say(cells[9], seconds ? rate(point.count / seconds) : "–");
      say(cells[10], micros(point.compute));
      say(cells[11], micros(point.hop));
      say(cells[12], micros(point.queue));
      this.bars.get(row).show(point, most);
      mark(row, "data-idle", String(point.count === 0));
    });
  }

  row(point) {
    const { mechanism, shape } = this.shapes.get(pointKey(point.role, point.id, point.side));
    const bar = stacked();
    const row = make(
      "tr",
      {},
      make("th", { scope: "row", class: "number" }, String(point.id)),
      cell(point.role),
      make("td", {}, chip(point.side)),
      cell(mechanism),
      cell(shape, "shape"),
      ...Array.from({ length: 8 }, number),
      make("td", { class: "wide" }, bar.node),
    );
    this.bars.set(row, bar);
    return row;
  }
}
