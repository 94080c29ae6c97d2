// The strip: one column for each layer. What full attention does stands above the ids, what linear
// attention does hangs below them; height, shade and number say how long the layer takes.

import { latency, make, mark, micros, say, short, sparkline, count } from "/format.js";

export const LEVELS = 6;
const HISTORY = 60;
const LETTERS = { full: "F", linear: "L", parallel: "P", none: "·" };
const NARROW = 28;
const ROOMY = 46;
const WIDEST = 120;

export const pointKey = (role, id, side) => `${role}/${id}/${side}`;

export function total(layer) {
  return layer.compute + layer.hop;
}

// Rounded outward to 1, 2 or 5 times a power of ten, so that the scale does not move with every frame.
function ladder(value, up) {
  const power = 10 ** Math.floor(Math.log10(value));
  const steps = [1, 2, 5, 10].map((step) => step * power);
  return up ? steps.find((step) => step >= value * 0.999) : steps.findLast((step) => step <= value * 1.001);
}

export class Scale {
  constructor() {
    this.low = 10;
    this.high = 100;
  }

  fit(values) {
    if (!values.length) return;
    this.low = ladder(Math.max(Math.min(...values), 0.1), false);
    this.high = Math.max(ladder(Math.max(...values), true), this.low * 4);
  }

  share(value) {
    const place = Math.log(Math.max(value, 1e-3) / this.low) / Math.log(this.high / this.low);
    return Math.min(Math.max(place, 0), 1);
  }

  level(value) {
    return Math.min(Math.floor(this.share(value) * LEVELS), LEVELS - 1);
  }

  bound(level) {
    return this.low * (this.high / this.low) ** (level / LEVELS);
  }
}

// The shortest length after which nearly every kind comes again; a layer or two may be out of line.
function period(kinds) {
  for (let length = 1; length <= kinds.length / 2; length += 1) {
    const again = kinds.filter((kind, place) => kind === kinds[place + length]).length;
    if (again >= 0.9 * (kinds.length - length)) return length;
  }
  return 1;
}

class Strip {
  constructor(role, layers, select) {
    this.role = role;
    this.layers = layers;
    this.columns = layers.map((layer) => this.column(layer));
    this.period = period(layers.map((layer) => layer.kind));
    this.grid = make("div", { class: "strip", role: "group", "aria-label": `${role} layers; arrow keys move` });
    this.grid.dataset.role = role;
    const sides = new Set(layers.flatMap((layer) => layer.sides.map(({ side }) => side)));
    this.grid.dataset.sides = sides.size === 1 ? [...sides][0] : "both";
    this.grid.append(...this.columns.map((column) => column.button));
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.columns.forEach((column, place) => {
      column.button.addEventListener("focus", () => this.choose(place, select));
      column.button.addEventListener("click", () => column.button.focus());
    });
    new ResizeObserver(() => this.arrange()).observe(this.grid);
  }

  column(layer) {
    const above = make("span", { class: "half above" });
    const below = make("span", { class: "half below" });
    const bars = {};
    for (const { side } of layer.sides) {
      const number = make("span", { class: "value" });
      const bar = make("span", { class: "bar", "data-side": side }, make("span", { class: "letter" }, LETTERS[side]));
      (side === "full" ? above : below).append(...(side === "full" ? [number, bar] : [bar, number]));
      bars[side] = { bar, number };
    }
    const id = make("span", { class: "axis" }, make("span", { class: "id" }, String(layer.id)));
    const button = make("button", { type: "button", class: "layer", tabindex: "-1", "data-kind": layer.kind }, above, id, below);
    button.dataset.layer = String(layer.id);
    return { button, bars, layer };
  }

  // As many columns in a row as fit, in whole periods of the plan, so that what repeats stands in line.
  arrange() {
    const width = this.grid.clientWidth;
    const wanted = this.layers.length * ROOMY <= width ? ROOMY : NARROW;
    const most = Math.max(Math.min(Math.floor(width / wanted), this.layers.length), 1);
    const rows = Math.ceil(this.layers.length / most);
    const even = Math.ceil(this.layers.length / rows / this.period) * this.period;
    const fit = rows > 1 && even <= most ? even : most;
    this.perRow = fit;
    this.grid.style.setProperty("--columns", String(fit));
    this.grid.style.setProperty("--widest", `${fit * WIDEST}px`);
    this.grid.toggleAttribute("data-narrow", width / fit < 38);
  }

  key(event) {
    const at = this.columns.findIndex((column) => column.button === document.activeElement);
    const last = this.columns.length - 1;
    const places = {
      ArrowRight: at + 1,
      ArrowLeft: at - 1,
      ArrowDown: at + this.perRow,
      ArrowUp: at - this.perRow,
      Home: 0,
      End: last,
    };
    const place = places[event.key];
    if (at < 0 || place === undefined) return;
    event.preventDefault();
    if (place >= 0 && place <= last) this.columns[place].button.focus();
  }

  choose(place, select) {
    select(this.role, this.layers[place]);
  }

  show(found, scale, selected) {
    for (const { button, bars, layer } of this.columns) {
      const words = [];
      for (const { side, mechanism } of layer.sides) {
        const point = found.get(pointKey(this.role, layer.id, side));
        const { bar, number } = bars[side];
        if (point === undefined || point.ever === false) {
          mark(bar, "data-level", "idle");
          bar.style.setProperty("--height", "0");
          words.push(`${side}, ${mechanism}, has not run`);
          continue;
        }
        mark(bar, "data-level", String(scale.level(total(point))));
        mark(bar, "data-idle", String(point.count === 0));
        bar.style.setProperty("--height", scale.share(total(point)).toFixed(3));
        say(number, short(total(point)));
        words.push(`${side}, ${mechanism}, ${micros(total(point))} microseconds`);
      }
      const what = words.length ? words.join("; ") : "no attention";
      mark(button, "aria-label", `${this.role} layer ${layer.id}: ${what}`);
      const chosen = selected?.role === this.role && selected?.id === layer.id;
      mark(button, "aria-pressed", String(chosen));
    }
  }
}

export class Strips {
  constructor(parent, detail) {
    this.parent = parent;
    this.detail = detail;
    this.strips = [];
    this.scale = new Scale();
    this.history = new Map();
    this.last = new Map();
    this.selected = null;
  }

  begin(roles) {
    this.history.clear();
    this.last.clear();
    this.selected = null;
    this.strips = roles.map(({ role, layers }) => new Strip(role, layers, (...chosen) => this.select(...chosen)));
    this.parent.replaceChildren(
      ...this.strips.flatMap((strip) => {
        const heading = make("h3", { class: "role" }, strip.role, make("small", {}, strip.layers.length === 1 ? "1 layer" : `${strip.layers.length} layers`));
        const part = make("div", { class: "part" }, ...(roles.length > 1 ? [heading] : []), strip.grid);
        part.style.setProperty("--share", String(strip.layers.length));
        return [part];
      }),
    );
    for (const strip of this.strips) strip.arrange();
    const first = this.strips[0]?.columns[0];
    if (first) {
      first.button.tabIndex = 0;
      this.select(this.strips[0].role, first.layer);
    }
  }

  select(role, layer) {
    this.selected = { role, id: layer.id, layer };
    for (const strip of this.strips) {
      for (const column of strip.columns) {
        const chosen = strip.role === role && column.layer.id === layer.id;
        // One stop of the tab key for each strip: the chosen layer, else the first.
        column.button.tabIndex = chosen || (strip.role !== role && column === strip.columns[0]) ? 0 : -1;
      }
    }
    this.describe();
    this.paint();
  }

  // Layers that did not run since the last frame keep what they took when they last did.
  take(points) {
    for (const point of points) {
      const key = pointKey(point.role, point.id, point.side);
      const before = this.last.get(key);
      const ever = Object.values(point.modes).some((value) => value > 0);
      const shown = point.count > 0 || before === undefined ? { ...point, ever } : { ...before, ...times(before), modes: point.modes, count: 0 };
      this.last.set(key, shown);
      const past = this.history.get(key) ?? [];
      past.push(ever ? total(shown) : 0);
      if (past.length > HISTORY) past.shift();
      this.history.set(key, past);
    }
    this.scale.fit([...this.last.values()].filter((point) => point.ever).map(total));
    this.paint();
    this.tell();
  }

  paint() {
    for (const strip of this.strips) strip.show(this.last, this.scale, this.selected);
  }

  // What is known of the chosen layer, side by side where it has two.
  describe() {
    const { role, layer } = this.selected;
    this.sides = layer.sides.map(({ side, mechanism, shape }) => {
      const spark = sparkline(240, 40);
      const facts = make("dl", { class: "facts" });
      const parts = stacked();
      const title = make("h3", {}, `${role} layer ${layer.id} `, chip(side), ` ${mechanism}`);
      const node = make("article", { class: "side" }, title, make("p", { class: "hint" }, shape), spark.node, parts.node, facts);
      return { side, spark, facts, parts, node };
    });
    const nodes = this.sides.map((side) => side.node);
    if (!nodes.length) nodes.push(make("p", { class: "none" }, `${role} layer ${layer.id} has no attention; no service runs it.`));
    this.detail.replaceChildren(...nodes);
    this.tell();
  }

  tell() {
    if (!this.selected) return;
    const { role, id } = this.selected;
    for (const { side, spark, facts, parts } of this.sides) {
      const key = pointKey(role, id, side);
      const point = this.last.get(key);
      if (point === undefined) continue;
      spark.show(this.history.get(key) ?? [], HISTORY);
      parts.show(point);
      const modes = Object.entries(point.modes).filter(([, value]) => value > 0);
      const said = [
        ["compute", latency(point.compute * 1e-6)],
        ["hop", latency(point.hop * 1e-6)],
        ["of it queue", latency(point.queue * 1e-6)],
        ["dispatches", modes.length ? modes.map(([mode, value]) => `${mode} ${count(value)}`).join(" · ") : "none yet"],
      ];
      if (facts.children.length === 0) {
        for (const [name] of said) facts.append(make("div", {}, make("dt", {}, name), make("dd")));
      }
      said.forEach(([, value], place) => say(facts.children[place].lastChild, value));
    }
  }
}

function times(point) {
  return { compute: point.compute, hop: point.hop, queue: point.queue };
}

export function chip(kind) {
  return make("span", { class: "chip", "data-side": kind }, make("span", { class: "letter", "aria-hidden": "true" }, LETTERS[kind]), kind);
}

// Compute, queue and the rest of the hop as lengths; each with a pattern of its own.
export function stacked() {
  const names = ["compute", "queue", "rest"];
  const pieces = names.map((name) => make("span", { class: `piece ${name}` }));
  const node = make("span", { class: "stacked", "aria-hidden": "true" }, ...pieces);
  const show = (point, most = 0) => {
    const queue = Math.min(point.queue, point.hop);
    const values = [point.compute, queue, point.hop - queue];
    const whole = Math.max(most, values[0] + values[1] + values[2], 1e-9);
    pieces.forEach((piece, place) => piece.style.setProperty("--share", `${((values[place] / whole) * 100).toFixed(1)}%`));
  };
  return { node, show };
}

export function legend(parent, scale) {
  if (!parent.children.length) {
    const swatches = (side) =>
      Array.from({ length: LEVELS }, (_, level) => make("span", { class: "swatch bar", "data-side": side, "data-level": String(level) }));
    parent.append(
      make("li", {}, chip("full"), " above"),
      make("li", {}, chip("linear"), " below"),
      make("li", { class: "ramp" }, make("span", { class: "low" }), ...swatches("full"), ...swatches("linear"), make("span", { class: "high" })),
      make("li", {}, "numbers: µs"),
    );
    for (const [name, text] of [["compute", "compute"], ["queue", "queue"], ["rest", "rest of hop"]]) {
      parent.append(make("li", {}, make("span", { class: `piece ${name} sample`, "aria-hidden": "true" }), text));
    }
  }
  say(parent.querySelector(".low"), latency(scale.low * 1e-6));
  say(parent.querySelector(".high"), latency(scale.high * 1e-6));
}
