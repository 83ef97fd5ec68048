// Puts the page together from the data in it.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const x = data.steps.version ?? [];
const metric = (name) => data.steps[name];
const line = (name, of, more = {}) => ({ name, y: metric(of), ...more });
const config = Object.fromEntries(data.config.map(({ key, value }) => [key, value]));
const last = (name) => metric(name)?.filter(isNumber).at(-1);
const mean = (name) => {
  const values = metric(name)?.filter(isNumber) ?? [];
  return values.length ? values.reduce((a, b) => a + b) / values.length : NaN;
};

function header() {
  const step = x.at(-1) ?? 0, total = config.num_steps, wall = metric("wait/window_s")?.reduce((a, b) => a + (b ?? 0), 0);
  at("name").textContent = data.name;
  const state = step >= total ? "finished" : step ? `step ${step} of ${total}` : "starting";
  at("about").append(make("span", { class: "pill", style: `color:var(${step >= total ? "--good" : "--c1"})` }, state),
    `  ${config["env.path"]} · ${config["model.path"]} · ${config["algorithm.preset"]}`,
    data.origin.commit ? ` · commit ${data.origin.commit.slice(0, 10)}` : "");
  const baseline = Object.entries(data.origin.no_skill ?? {}).sort((a, b) => b[1] - a[1])[0];
  const accuracy = data.evals["eval/accuracy"]?.at(-1);
  const tiles = [
    [isNumber(accuracy) ? accuracy.toFixed(2) : "–", baseline ? `held-out reward; no skill ${show(baseline[1])}` : "held-out reward"],
    [isNumber(last("reward/mean")) ? last("reward/mean").toFixed(2) : "–", "training reward, last step"],
    [`${step} / ${total}`, `steps in ${duration(isNumber(wall) && wall > 0 ? wall * (data.num_rows / Math.max(x.length, 1)) : NaN)}`],
    [show(mean("rollout/tokens_per_s")), "tokens generated a second, mean"],
    [show(mean("lag/mean")), `mean lag; staleness target ${config["buffer.max_staleness"]}`],
    [show(mean("ess/token"), "%"), "effective sample size of tokens, mean"],
  ];
  at("tiles").append(...tiles.map(([value, text]) => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, text))));
  if (data.blame) {
    at("verdict").hidden = false;
    const said = data.blame.sentence;
    at("verdict").textContent = `${said[0].toUpperCase()}${said.slice(1)}.`;
  }
  return baseline;
}

function learning(baseline) {
  at("learning").append(
    lineChart("Reward", "training batches (made by lagged policies) and held-out prompts, with 95 % intervals", [
      line("training", "reward/mean", { smooth: true }),
      { name: "held-out", x: data.evals.version, y: data.evals["eval/accuracy"], low: data.evals["eval/low"], high: data.evals["eval/high"], dots: true },
    ], { x, min: 0, wide: true, rule: baseline && { y: baseline[1], name: `no skill: ${baseline[0]}` } }),
    lineChart("Policy entropy", "nats, mean over tokens", [line("entropy", "policy/entropy", { smooth: true })], { x, min: 0 }),
    lineChart("Gradient norm", "before clipping", [line("norm", "gradient/norm", { smooth: true, color: COLORS[3] })], { x, min: 0 }),
    lineChart("Groups without variance", "share of groups whose rewards are all equal: they teach nothing",
      [line("zero variance", "reward/zero_variance", { smooth: true, color: COLORS[5] })], { x, min: 0, max: 1, unit: "%" }),
    lineChart("Throughput", "tokens generated a second, all actors", [line("tokens / s", "rollout/tokens_per_s", { color: COLORS[2], smooth: true })], { x, min: 0 }));
}

function offPolicy() {
  const bins = ["0", "1", "2", "3", "4", "more"], shares = bins.map((bin) => mean(`lag/share_${bin}`));
  const held = shares.findLastIndex((share) => share > 0) + 1;
  at("off-policy").append(
    x.length ? barChart("Lag of trained tokens", "learner version minus token version, whole run", bins.slice(0, Math.max(held, 2)).map((bin) => bin === "more" ? "5 +" : bin),
      [{ name: "lag", y: shares.slice(0, Math.max(held, 2)) }]) : card("Lag of trained tokens", "", make("p", { class: "empty" }, "nothing measured yet")),
    lineChart("Lag over steps", "", [line("mean", "lag/mean"), line("95th percentile", "lag/p95"), line("maximum", "lag/max", { color: COLORS[5] })], { x, min: 0 }),
    lineChart("Effective sample size", "of the importance ratios, as a share", [line("tokens", "ess/token"), line("trajectories", "ess/sequence"), line("tokens, capped", "ess/token_capped")],
      { x, max: 1, unit: "%" }),
    lineChart("Mismatch of behavior and current policy", "k3 estimate of the divergence, a token", [line("all tokens", "mismatch/k3"), line("of trajectories at lag 0", "mismatch/k3_fresh"), line("of lag 1 or more", "mismatch/k3_stale")], { x, min: 0 }),
    lineChart("What the loss clipped and masked", "share of all tokens; removed: of the gradient", [
      line("capped, advantage > 0", "clip/capped_positive"), line("capped, advantage < 0", "clip/capped_negative"),
      line("masked, advantage > 0", "clip/trust_positive"), line("masked, advantage < 0", "clip/trust_negative"),
      line("removed", "clip/removed_share", { color: COLORS[5] }),
    ], { x, min: 0, unit: "%", wide: true, zero: "nothing at any step: no token's importance ratio went beyond what the loss allows" }));
}

function waits() {
  const shares = data.blame?.shares ?? {}, out = shares["wait/outage_s"] ?? 0, share = (name) => (1 - out) * (shares[`wait/${name}_s`] ?? 0);  // the others are of the time without it
  const part = (name, value, color) => ({ name, value: Math.max(0, value), color });
  const learner = [part("waits for groups", share("learner_for_groups"), "--c1"), part("in an outage of the rollout actors", out, "--bad"), part("waits for weights", share("learner_for_weights"), "--c3"), part("checkpoint", share("learner_for_checkpoint"), "--c4"), part("sends weights to evaluators", share("learner_for_evaluation"), "--c5")];
  const rollout = [part("none is alive", out, "--bad"), part("no prompt to play: waits for slots", share("rollout_for_slots"), "--c1"), part("paused for weights", share("rollout_for_weights"), "--c3")];
  learner.unshift(part("trains", 1 - learner.reduce((sum, one) => sum + one.value, 0), "--c0"));
  rollout.unshift(part("plays prompts", 1 - rollout.reduce((sum, one) => sum + one.value, 0), "--c2"));
  const busy = (name) => metric(name)?.map((idle) => isNumber(idle) ? Math.max(0, 1 - idle) : null);
  if (data.blame) {
    const advice = `Measured: ${data.blame.num_actors} rollout actors to 1 learner. Balanced, if throughput grew with their number: ${data.blame.balanced_actors} to 1. Reached: ${data.blame.bound}.`;
    const utilisation = lineChart("Utilisation", "share of the time with work", [{ name: "learner", y: busy("learner/idle"), smooth: true }, { name: "engines", y: busy("rollout/idle"), smooth: true, color: COLORS[2] }],
      { x, min: 0, max: 1, unit: "%" });
    const went = card("Where the time went", "whole run, share of wall time", make("div", { class: "bars" }, ...bar("learner", learner), ...bar("rollout actors, mean", rollout)), make("p", { class: "quiet", style: "margin-top:10px" }, advice));
    went.classList.add("wide");
    at("waits").append(went, utilisation);
  }
  const learnerTimes = [line("trains", "time/step_s", { color: COLORS[0] }), line("waits for groups", "wait/learner_for_groups_s", { color: COLORS[1] }),
    line("waits for weights", "wait/learner_for_weights_s", { color: COLORS[3] }), line("checkpoint", "wait/learner_for_checkpoint_s", { color: COLORS[4] }), line("sends weights to evaluators", "wait/learner_for_evaluation_s", { color: COLORS[5] })];
  const rolloutTimes = [line("waits for slots", "wait/rollout_for_slots_s", { color: COLORS[1] }), line("paused for weights", "wait/rollout_for_weights_s", { color: COLORS[3] }),
    line("with evaluations in the engine", "wait/rollout_for_evaluation_s", { color: COLORS[4] })];
  at("waits").append(
    stackChart("Learner, each step", "seconds", learnerTimes, { x, unit: "s" }),
    stackChart("Rollout actors, each step", "seconds, mean over actors", rolloutTimes, { x, unit: "s" }),
    lineChart("Weight update", "", [line("whole update", "sync/total_s", { color: COLORS[3], smooth: true }), line("generation paused", "sync/pause_s", { color: COLORS[1], smooth: true })], { x, min: 0, unit: "s" }));
}

function bar(name, parts) {
  const strip = make("div", { class: "bar" }, ...parts.map((one) => make("i", {
    style: `width:${100 * one.value}%;background:var(${one.color})`, onpointermove: (event) => showTip(event, `${one.name}: ${show(one.value, "%")}`), onpointerleave: hideTip,
  })));
  const items = parts.filter((one) => one.value > 0.0005).map((one) => make("span", {}, make("i", { style: `background:var(${one.color})` }), `${one.name} `, make("b", {}, show(one.value, "%"))));
  return [make("div", {}, make("b", {}, name), strip, make("div", { class: "legend" }, ...items))];
}

function drops() {
  const { reasons, made, dropped } = data.drops, names = Object.keys(reasons);
  at("drops").append(lineChart("Completion length", "sampled tokens a trajectory", [line("mean", "completion/mean_length"), line("maximum", "completion/max_length", { color: COLORS[5] })], { x, min: 0 }));
  if (made.edges.length) at("drops").append(barChart("Lengths of all completions", "share of trajectories by sampled tokens", bins(made.edges), [{ name: "finished", y: made.shares, color: COLORS[2] }]));
  if (dropped.edges.length) at("drops").append(barChart("Lengths of dropped completions", "compare with all: a difference is a bias", bins(dropped.edges), [{ name: "dropped", y: dropped.shares, color: "var(--bad)" }]));
  at("drops").append(names.length ? barChart("Dropped groups and failed rollouts", "by reason", names, [{ name: "count", y: names.map((name) => reasons[name]), color: "var(--bad)" }], { unit: "" })
    : card("Dropped groups and failed rollouts", "by reason", make("p", { class: "empty" }, "none: every prompt that was admitted was trained, or is still in flight")));
}

const bins = (edges) => edges.slice(1).map((edge, k) => edge - edges[k] === 1 ? String(edges[k]) : `${edges[k]}–${edge - 1}`);

function everyMetric() {
  const place = at("all").querySelector(".grid");
  at("all").addEventListener("toggle", () => {
    if (place.childElementCount) return;
    for (const table of [data.steps, data.evals]) {
      for (const name of Object.keys(table)) {
        if (["version", "time", "timestamp"].includes(name)) continue;
        place.append(lineChart(name, data.meanings[name] ?? "reported by the environment", [{ name: "last", y: table[name] }], { x: table.version, height: 210 }));
      }
    }
  });
}

function events() {
  const rows = data.events.map((one) => make("tr", { class: one.alarm ? "changed" : "" }, make("td", {}, duration(one.run_s)),
    make("td", {}, new Date(1000 * one.at).toLocaleString()), make("td", {}, one.kind), make("td", {}, one.message)));
  at("events").querySelector("div").append(rows.length ? make("div", { class: "card" }, make("table", {}, make("tbody", {}, ...rows)))
    : make("p", { class: "empty" }, "none are recorded"));
}

function configuration() {
  const rows = data.config.map(({ key, value, default: usual }) => make("tr", { class: String(value) === String(usual) ? "" : "changed" }, make("td", {}, key), make("td", {}, String(value))));
  const command = (data.origin.command ?? []).join(" ");
  at("config").querySelector("div").append(make("div", { class: "card" }, make("p", { class: "quiet" }, "values in bold differ from the defaults"),
    command ? make("p", { class: "quiet" }, `command: ${command}`) : null, make("table", {}, make("tbody", {}, ...rows))));
}

at("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  dispatchEvent(new Event("themechange"));
});
addEventListener("beforeprint", () => document.querySelectorAll("details#config").forEach((element) => { element.open = true; }));

learning(header());
offPolicy();
waits();
showTimeline(data.timeline, at("timeline"));
showSamples(data.samples, at("samples"));
drops();
everyMetric();
events();
configuration();
