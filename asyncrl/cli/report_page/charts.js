// Charts by hand: SVG with a cursor that reads the values. Colours are CSS variables, so they follow the theme.

const COLORS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
const NARROW = 400, WIDE = 830, LEFT = 46, RIGHT = 10, TOP = 12, BOTTOM = 22;

/** An element from its tag, attributes and children; text is never parsed as HTML. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "rect", "circle", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A number in as few characters as a person needs. */
function show(value, unit = "") {
  if (!isNumber(value)) return "–";
  if (unit === "%") return `${(100 * value).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 1 : 0)} %`;
  const size = Math.abs(value);
  let text;
  if (size >= 1e6) text = `${(value / 1e6).toFixed(1)}M`;
  else if (size >= 1e4) text = `${(value / 1e3).toFixed(0)}k`;
  else if (size >= 1e3) text = `${(value / 1e3).toFixed(1)}k`;
  else if (size >= 100 || Number.isInteger(value)) text = value.toFixed(0);
  else if (size >= 0.01) text = String(Number(value.toPrecision(3)));
  else text = value.toExponential(1);
  return unit ? `${text} ${unit}` : text;
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** Round numbers that span [low, high]. */
function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-6; k++) found.push(k * step);
  return found;
}

function rolling(values, width) {
  return values.map((_, at) => {
    const near = values.slice(Math.max(0, at - width), at + width + 1).filter(isNumber);
    return near.length ? near.reduce((a, b) => a + b) / near.length : null;
  });
}

function card(title, note, ...children) {
  const wide = children.some((child) => child?.viewBox?.baseVal.width === WIDE);
  return make("div", { class: wide ? "card wide" : "card" }, make("h3", {}, title), note ? make("p", { class: "note" }, note) : null, ...children);
}

const tip = make("div", { class: "tip", hidden: true });
document.body.append(tip);
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const right = event.clientX + tip.offsetWidth + 24 > innerWidth;
  tip.style.left = `${event.clientX + (right ? -tip.offsetWidth - 12 : 14)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6)}px`;
}
const hideTip = () => { tip.hidden = true; };

/** The frame of a chart: axes, scales and a cursor that calls `read(index)` for its text. */
function frame({ x, low, high, width, height, unit, read }) {
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const first = x[0], last = x[x.length - 1];
  const px = (value) => LEFT + ((value - first) / (last - first || 1)) * (width - LEFT - RIGHT);
  const py = (value) => height - BOTTOM - ((value - low) / (high - low || 1)) * (height - TOP - BOTTOM);
  for (const value of ticks(low, high)) {
    svg.append(make("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: py(value), y2: py(value) }));
    svg.append(make("text", { x: LEFT - 7, y: py(value) + 4, "text-anchor": "end" }, show(value, unit)));
  }
  for (const value of ticks(first, last, 6)) {
    if (Number.isInteger(value)) svg.append(make("text", { x: px(value), y: height - 5, "text-anchor": "middle" }, show(value)));
  }
  const cursor = make("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = first + (((event.clientX - box.left) / box.width) * width - LEFT) / (width - LEFT - RIGHT) * (last - first);
    let best = 0;
    x.forEach((value, at) => { if (Math.abs(value - wanted) < Math.abs(x[best] - wanted)) best = at; });
    cursor.setAttribute("x1", px(x[best]));
    cursor.setAttribute("x2", px(x[best]));
    cursor.setAttribute("visibility", "visible");
    showTip(event, read(best));
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
  return { svg, px, py };
}

function legend(series, unit) {
  return make("div", { class: "legend" }, ...series.map((one) => make("span", {},
    make("i", { style: `background:${one.color}` }), `${one.name} `,
    make("b", {}, show(one.y.filter(isNumber).at(-1), unit)))));
}

const path = (points) => points.map(([x, y], at) => `${at && points[at - 1] ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** Lines over steps. Each series: name, y, and optionally x, dots, smooth (a faint line under its rolling mean), low and high. `zero` is said instead where every value is 0. */
function lineChart(title, note, series, { x, min, max, unit = "", wide = false, height = 190, rule, zero } = {}) {
  series = series.map((one, at) => ({ color: COLORS[at % COLORS.length], x, ...one }))
    .filter((one) => one.y && one.y.some(isNumber));
  if (!series.length) return card(title, note, make("p", { class: "empty" }, "nothing measured yet"));
  const chartWidth = wide ? WIDE : NARROW;
  if (zero && series.every((one) => one.y.every((value) => !value))) {
    const empty = card(title, note, make("p", { class: "empty" }, zero));
    if (wide) empty.classList.add("wide");
    return empty;
  }
  const values = series.flatMap((one) => one.y).filter(isNumber).concat(rule ? [rule.y] : []);
  let low = Math.min(...values), high = Math.max(...values);
  if (min !== undefined) low = Math.min(min, low);
  if (max !== undefined) high = Math.max(max, high);
  if (low === high) {
    if (min === undefined) low -= Math.abs(low) * 0.1 || 0.5;
    high += Math.abs(high) * 0.1 || (unit === "%" ? 0.01 : 0.5);
  }
  const domain = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const read = (at) => [`step ${domain[at]}`, ...series.map((one) => {
    const found = one.x.indexOf(domain[at]);
    return found < 0 ? null : `${one.name}: ${show(one.y[found], unit)}`;
  }).filter(Boolean)].join("\n");
  const { svg, px, py } = frame({ x: domain, low, high, width: chartWidth, height, unit, read });
  if (rule) {
    svg.append(make("line", { x1: LEFT, x2: chartWidth - RIGHT, y1: py(rule.y), y2: py(rule.y), stroke: "var(--quiet)", "stroke-dasharray": "2 4" }));
    svg.append(make("text", { x: chartWidth - RIGHT, y: py(rule.y) - 5, "text-anchor": "end" }, rule.name));
  }
  for (const one of series) {
    const line = (y, opacity, width) => {
      const parts = [[]];
      y.forEach((value, at) => isNumber(value) ? parts.at(-1).push([px(one.x[at]), py(value)]) : parts.push([]));
      const d = parts.filter((part) => part.length).map(path).join("");
      svg.append(make("path", { d, fill: "none", stroke: one.color, "stroke-width": width, opacity, "stroke-linejoin": "round" }));
    };
    const width = Math.ceil(one.y.length / 60);
    if (one.smooth && one.y.length > 30) { line(one.y, 0.28, 1); line(rolling(one.y, width), 1, 2); } else line(one.y, 1, 1.7);
    if (one.dots || one.y.filter(isNumber).length === 1) {
      one.y.forEach((value, at) => isNumber(value) && svg.append(
        make("circle", { cx: px(one.x[at]), cy: py(value), r: 3, fill: one.color })));
    }
    one.low?.forEach((value, at) => isNumber(value) && isNumber(one.high[at]) && svg.append(
      make("line", { x1: px(one.x[at]), x2: px(one.x[at]), y1: py(value), y2: py(one.high[at]), stroke: one.color, "stroke-width": 1.2 })));
  }
  return card(title, note, svg, series.length > 1 || unit ? legend(series, unit) : legend(series));
}

/** Areas on top of each other over steps. */
function stackChart(title, note, series, { x, max, unit = "", height = 190 }) {
  series = series.map((one, at) => ({ color: COLORS[at % COLORS.length], ...one })).filter((one) => one.y?.some((v) => v > 0));
  if (!series.length) return card(title, note, make("p", { class: "empty" }, "nothing measured yet"));
  const sums = x.map(() => 0);
  const layers = series.map((one) => {
    const below = [...sums];
    one.y.forEach((value, at) => { sums[at] += isNumber(value) ? value : 0; });
    return { one, below, above: [...sums] };
  });
  const read = (at) => [`step ${x[at]}`, ...series.map((one) => `${one.name}: ${show(one.y[at], unit)}`)].join("\n");
  const sorted = [...sums].sort((a, b) => a - b);
  const high = max ?? (Math.max(sorted[Math.floor(sorted.length * 0.99)], sorted.at(-1) * 0.4) || 1);
  const { svg, px, py } = frame({ x, low: 0, high, width: NARROW, height, unit, read });
  const cut = (value) => py(Math.min(value, high));
  for (const { one, below, above } of layers) {
    const there = x.map((value, at) => [px(value), cut(above[at])]);
    const back = x.map((value, at) => [px(value), cut(below[at])]).reverse();
    svg.append(make("path", { d: `${path([...there, ...back])}Z`, fill: one.color, opacity: 0.86 }));
  }
  return card(title, note, svg, legend(series, unit));
}

/** Upright bars. `values` may hold several series of the same length. */
function barChart(title, note, labels, series, { unit = "%", height = 190 } = {}) {
  series = series.map((one, at) => ({ color: COLORS[at % COLORS.length], ...one }));
  const high = Math.max(...series.flatMap((one) => one.y).filter(isNumber), 1e-9);
  const svg = make("svg", { viewBox: `0 0 ${NARROW} ${height}`, role: "img" });
  const py = (value) => height - BOTTOM - (value / high) * (height - TOP - BOTTOM - 6);
  const slot = (NARROW - LEFT - RIGHT) / labels.length, width = Math.min(54, (slot * 0.8) / series.length);
  for (const value of ticks(0, high)) {
    svg.append(make("line", { class: "rule", x1: LEFT, x2: NARROW - RIGHT, y1: py(value), y2: py(value) }));
    svg.append(make("text", { x: LEFT - 7, y: py(value) + 4, "text-anchor": "end" }, show(value, unit)));
  }
  const every = Math.ceil(labels.length / 12);
  labels.forEach((label, at) => {
    const middle = LEFT + slot * (at + 0.5);
    series.forEach((one, k) => {
      const value = one.y[at] ?? 0;
      svg.append(make("rect", {
        x: middle - (width * series.length) / 2 + width * k, width: Math.max(1, width - 1.5), y: py(value), height: height - BOTTOM - py(value),
        rx: 2.5, fill: one.color, onpointermove: (event) => showTip(event, `${one.name}, ${label}: ${show(value, unit)}`), onpointerleave: hideTip,
      }));
    });
    if (at % every === 0) svg.append(make("text", { x: middle, y: height - 5, "text-anchor": "middle" }, label));
  });
  const names = series.length > 1 ? legend(series.map((one) => ({ ...one, y: [] }))) : null;
  names?.querySelectorAll("b").forEach((element) => element.remove());
  return card(title, note, svg, names);
}
