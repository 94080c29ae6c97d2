// Numbers for people, and a few words about nodes: text is only ever set as text.

const thousands = new Intl.NumberFormat("en");

export function count(value) {
  return thousands.format(Math.round(value));
}

export function rate(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 100) return count(value);
  return value.toFixed(value >= 10 ? 0 : 1);
}

export function micros(value) {
  if (value >= 100) return count(value);
  return value >= 10 ? value.toFixed(0) : value.toFixed(1);
}

export function short(value) {
  if (value >= 9950) return `${(value / 1000).toFixed(0)}k`;
  if (value >= 1000) return `${(value / 1000).toFixed(1)}k`;
  return micros(value);
}

export function latency(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 1e-2 ? 1 : 0)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
}

export function duration(seconds) {
  const whole = Math.floor(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

export function clock(unix) {
  return new Date(unix * 1000).toLocaleTimeString("en-GB");
}

export function percent(share) {
  return `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
}

const SVG = "http://www.w3.org/2000/svg";

export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Nothing is touched that stays the same: a screen reader and a selection are not disturbed.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// Rows of a table or list that follow the data: one for each key, in the data's order.
export function follow(parent, data, key, create, update) {
  const known = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  data.forEach((item, place) => {
    const name = String(key(item));
    let node = known.get(name);
    known.delete(name);
    if (node === undefined) {
      node = create(item);
      node.dataset.key = name;
    }
    if (parent.children[place] !== node) parent.insertBefore(node, parent.children[place] ?? null);
    update(node, item);
  });
  for (const node of known.values()) node.remove();
}

export function sparkline(width, height) {
  const line = draw("polyline", { class: "spark-line", "vector-effect": "non-scaling-stroke" });
  const area = draw("polygon", { class: "spark-area" });
  const svg = draw(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    area,
    line,
  );
  const show = (values, room) => {
    const top = Math.max(...values, 1e-9) * 1.1;
    const points = values.map((value, place) => {
      const x = width - ((values.length - 1 - place) * width) / Math.max(room - 1, 1);
      return `${x.toFixed(1)},${(height - (value / top) * (height - 1)).toFixed(1)}`;
    });
    if (points.length < 2) return;
    const first = points[0].split(",")[0];
    line.setAttribute("points", points.join(" "));
    area.setAttribute("points", `${first},${height} ${points.join(" ")} ${width},${height}`);
  };
  return { node: svg, show };
}
