// The timeline: one lane a part of the run, on a canvas, with zoom and pan. Groups of one actor are packed into rows.

const KIND_COLORS = {
  step: "--c0", "wait for groups": "--c1", "update weights": "--c3", "wait for weights": "--c3", checkpoint: "--c4", evaluation: "--c4", update: "--c3", group: "--c2",
};
const VERSION_COLORS = ["--c2", "--c0", "--c4", "--c3", "--c1"];
const GUTTER = 92, AXIS = 34, GAP = 9;

class Gantt {
  constructor(data, place) {
    this.data = data;
    this.canvas = make("canvas", { tabindex: 0, "aria-label": "timeline of the run" });
    this.lanes = this.layOut();
    this.height = AXIS + this.lanes.reduce((sum, lane) => sum + lane.height + GAP, 0) + 4;
    const ends = data.spans.map((span) => span[2] + span[3]);
    this.all = [Math.min(...data.spans.map((span) => span[2])), Math.max(...ends)];
    this.shown = this.middle();
    this.view = this.steps(...this.shown);
    this.color = "version";
    place.append(make("div", { class: "card" }, this.controls(), this.canvas, this.legend()));
    this.listen();
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(place);
  }

  /** Lanes with their spans in rows: a span goes to the first row that is free when it begins. */
  layOut() {
    const lanes = this.data.lanes.map((name) => ({ name, spans: [], rows: [] }));
    for (const span of this.data.spans) lanes[span[0]].spans.push(span);
    for (const lane of lanes) {
      lane.spans.sort((a, b) => a[2] - b[2]);
      for (const span of lane.spans) {
        if (span[1] !== "group") { span.row = -1; continue; }
        let row = lane.rows.findIndex((end) => end <= span[2]);
        if (row < 0) row = lane.rows.push(0) - 1;
        lane.rows[row] = span[2] + span[3];
        span.row = row;
      }
      lane.rowHeight = lane.rows.length ? Math.max(2, Math.min(11, 110 / lane.rows.length)) : 0;
      lane.head = lane.spans.some((span) => span.row < 0) ? 17 : 0;
      lane.height = lane.head + lane.rows.length * lane.rowHeight;
    }
    const place = lanes.findLastIndex((lane) => ["learner", "weight sync"].includes(lane.name)) + 1;
    if (this.data.counts.length) lanes.splice(place, 0, { name: "buffer, ready", spans: [], counts: true, height: 40 });
    return lanes;
  }

  /** The steps to begin with: seven of them, with an evaluation among them if there was one in the later half. */
  middle() {
    const steps = this.data.steps;
    if (!steps.length) return [0, 0];
    const lane = this.data.lanes.indexOf("evaluation"), wanted = steps[Math.floor(steps.length * 0.6)][1];
    const found = this.data.spans.find((span) => span[0] === lane && span[2] >= wanted);
    const at = Math.max(0, steps.findLastIndex(([, begin]) => begin <= (found ? found[2] : wanted)));
    return [steps[Math.max(0, at - 3)][0], steps[Math.min(steps.length - 1, at + 3)][0]];
  }

  /** The window of time that holds these steps. */
  steps(first, last) {
    const inside = this.data.steps.filter(([version]) => version >= first && version <= last);
    if (!inside.length) return [...this.all];
    const [begin, end] = [inside[0][1], inside.at(-1)[2]], edge = (end - begin) * 0.04 + 1;
    return [begin - edge, end + edge];
  }

  controls() {
    const [low, high] = [this.data.steps[0]?.[0] ?? 0, this.data.steps.at(-1)?.[0] ?? 0];
    const [from, to] = this.shown;
    const input = (value) => make("input", { type: "number", min: low, max: high, value, onchange: () => choose() });
    const first = input(from), last = input(to);
    const choose = () => { this.view = this.steps(Number(first.value), Number(last.value)); this.draw(); };
    const button = (text, label, act) => make("button", { type: "button", "aria-label": label, onclick: () => { act(); this.draw(); } }, text);
    const color = make("select", { onchange: () => { this.color = color.value; this.draw(); } },
      ...["version", "reward"].map((name) => make("option", { value: name }, `groups by ${name}`)));
    return make("div", { class: "row controls", style: "margin-bottom:10px" },
      make("label", {}, "steps ", first, " to ", last),
      button("+", "zoom in", () => this.zoom(0.5)), button("−", "zoom out", () => this.zoom(2)),
      button("everything", "show everything", () => { this.view = [...this.all]; }), color,
      make("span", { class: "quiet" }, "drag to move, Ctrl + wheel to zoom"));
  }

  legend() {
    const items = [["step", "--c0"], ["learner waits for groups", "--c1"], ["weight update, and waiting for it", "--c3"], ["checkpoint, evaluation", "--c4"]];
    return make("div", { class: "legend" }, ...items.map(([name, color]) => make("span", {}, make("i", { style: `background:var(${color})` }), name)),
      make("span", {}, "a thin bar on an actor's lane is a group, from prompt to reward; blank is idle; a red mark in the buffer is a dropped group"));
  }

  zoom(factor, at = (this.view[0] + this.view[1]) / 2) {
    const [low, high] = this.view;
    const width = Math.min(Math.max((high - low) * factor, 2), (this.all[1] - this.all[0]) * 1.1);
    const share = (at - low) / (high - low);
    this.view = [at - share * width, at + (1 - share) * width];
  }

  x(time) { return GUTTER + ((time - this.view[0]) / (this.view[1] - this.view[0])) * (this.width - GUTTER); }
  time(x) { return this.view[0] + ((x - GUTTER) / (this.width - GUTTER)) * (this.view[1] - this.view[0]); }

  listen() {
    const canvas = this.canvas;
    let from = null;
    canvas.addEventListener("pointerdown", (event) => {
      from = { x: event.offsetX, view: [...this.view] };
      canvas.setPointerCapture(event.pointerId);
      canvas.classList.add("dragging");
    });
    canvas.addEventListener("pointerup", () => { from = null; canvas.classList.remove("dragging"); });
    canvas.addEventListener("pointerleave", hideTip);
    canvas.addEventListener("pointermove", (event) => {
      if (!from) { this.point(event); return; }
      const shift = ((from.x - event.offsetX) / (this.width - GUTTER)) * (from.view[1] - from.view[0]);
      this.view = from.view.map((edge) => edge + shift);
      this.draw();
    });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.time(event.offsetX));
      this.draw();
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = (this.view[1] - this.view[0]) * 0.15;
      const moves = { ArrowLeft: -step, ArrowRight: step };
      if (event.key in moves) this.view = this.view.map((edge) => edge + moves[event.key]);
      else if (event.key === "+") this.zoom(0.7);
      else if (event.key === "-") this.zoom(1.4);
      else return;
      event.preventDefault();
      this.draw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  point(event) {
    const time = this.time(event.offsetX);
    let top = AXIS;
    for (const lane of this.lanes) {
      const y = event.offsetY - top;
      top += lane.height + GAP;
      if (y < 0 || y > lane.height) continue;
      const row = lane.head && y < lane.head ? -1 : Math.floor((y - (lane.head || 0)) / lane.rowHeight);
      const slack = (this.view[1] - this.view[0]) / this.width * 2;
      const span = lane.spans.find((one) => one.row === row && one[2] - slack <= time && time <= one[2] + one[3] + slack);
      if (!span) continue;
      const facts = Object.entries(span[4]).map(([name, value]) => `${name.replace(/_/g, " ")}: ${Array.isArray(value) ? value.join(" ") : isNumber(value) ? show(value) : value}`);
      showTip(event, [`${lane.name}: ${span[1]}`, duration(span[3] / 1000), ...facts].join("\n"));
      return;
    }
    hideTip();
  }

  draw() {
    const ratio = devicePixelRatio || 1, canvas = this.canvas;
    this.width = canvas.clientWidth;
    canvas.style.height = `${this.height}px`;
    canvas.width = this.width * ratio;
    canvas.height = this.height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const css = getComputedStyle(document.body), probe = make("i", { style: "display:none" });
    document.body.append(probe);
    const shade = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
    this.shades = Object.fromEntries(["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--line", "--text", "--quiet", "--bad", "--card"].map((name) => [name, shade(name)]));
    probe.remove();
    pen.font = `11px ${css.fontFamily || "sans-serif"}`;
    this.drawAxis(pen);
    let top = AXIS;
    for (const lane of this.lanes) {
      if (lane.counts) this.drawCounts(pen, top, lane.height); else this.drawLane(pen, lane, top);
      top += lane.height + GAP;
    }
    pen.fillStyle = this.shades["--card"];
    pen.fillRect(0, AXIS - 2, GUTTER - 4, this.height);
    pen.fillStyle = this.shades["--text"];
    top = AXIS;
    for (const lane of this.lanes) {
      pen.fillText(lane.name, 0, top + Math.min(12, lane.height / 2 + 4));
      top += lane.height + GAP;
    }
  }

  drawAxis(pen) {
    pen.fillStyle = this.shades["--quiet"];
    for (const value of ticks(this.view[0] / 1000, this.view[1] / 1000, Math.max(2, Math.min(8, (this.width - GUTTER) / 80)))) {
      const x = this.x(1000 * value);
      if (x > GUTTER) pen.fillText(`${Number(value.toFixed(3))} s`, x + 3, 10);
    }
    let free = GUTTER;
    for (const [version, begin] of this.data.steps) {
      const x = this.x(begin);
      if (x < GUTTER || x > this.width) continue;
      pen.fillStyle = this.shades["--line"];
      pen.fillRect(x, 14, 1, this.height);
      if (x < free) continue;
      pen.fillStyle = this.shades["--text"];
      pen.fillText(`step ${version}`, x + 3, 25);
      free = x + 60;
    }
  }

  drawCounts(pen, top, height) {
    const counts = this.data.counts, high = Math.max(...counts.map(([, value]) => value), 1);
    pen.fillStyle = this.shades["--c5"];
    counts.forEach(([time, value], at) => {
      const x = Math.max(GUTTER, this.x(time)), next = this.x(counts[at + 1]?.[0] ?? this.all[1]);
      if (next < GUTTER || x > this.width) return;
      const tall = (value / high) * height;
      pen.fillRect(x, top + height - tall, Math.max(0.7, next - x), tall);
    });
    pen.fillStyle = this.shades["--bad"];
    for (const time of this.data.drops) if (this.x(time) >= GUTTER) pen.fillRect(this.x(time), top, 1.5, 9);
  }

  drawLane(pen, lane, top) {
    for (const span of lane.spans) {
      const x = this.x(span[2]), end = this.x(span[2] + span[3]);
      if (end < GUTTER || x > this.width) continue;
      const width = Math.max(end - x - (end - x > 4 ? 1 : 0), 0.8);
      pen.globalAlpha = span[1] === "evaluation" && lane.head && lane.rows.length ? 0.65 : 1;
      pen.fillStyle = this.paint(span);
      if (span.row < 0) {
        pen.fillRect(x, top, width, lane.head - 3);
        this.label(pen, span, x, width, top);
      } else pen.fillRect(x, top + lane.head + span.row * lane.rowHeight, width, Math.max(lane.rowHeight - 0.8, 1.2));
    }
    pen.globalAlpha = 1;
  }

  label(pen, span, x, width, top) {
    const text = span[4].version !== undefined && span[1] === "step" ? `step ${span[4].version}` : span[1];
    const from = Math.max(x, GUTTER);
    if (pen.measureText(text).width + 8 > x + width - from) return;
    pen.fillStyle = this.shades["--card"];
    pen.fillText(text, from + 4, top + 11);
  }

  paint(span) {
    if (span[4].error && span[4].error !== "CancelledError") return this.shades["--bad"];
    if (span[1] !== "group") return this.shades[KIND_COLORS[span[1]] ?? "--c5"];
    if (this.color === "version") return this.shades[span[4].oldest === undefined ? "--c5" : VERSION_COLORS[span[4].oldest % 5]];
    const reward = Math.max(0, Math.min(1, span[4].reward ?? 0));
    return `hsl(${Math.round(8 + 142 * reward)} 60% 48%)`;
  }
}

function showTimeline(data, place) {
  if (!data.spans.length) {
    place.append(card("No timeline", "", make("p", { class: "empty" }, "the run folder has no timeline.jsonl (metrics.timeline is off, or no step ended yet)")));
    return;
  }
  const gantt = new Gantt(data, place);
  addEventListener("themechange", () => gantt.draw());
}
