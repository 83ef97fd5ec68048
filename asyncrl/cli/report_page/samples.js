// The samples browser: trajectories of one step, their tokens coloured by what is chosen.

const SAMPLE_COLORS = {
  advantage: { note: "green was reinforced, red discouraged; stronger is a larger advantage", of: (row) => {
    const strength = Math.min(1, Math.abs(row.advantage) / 2);
    return row.mask.map((own) => own && strength ? mix(row.advantage > 0 ? "--good" : "--bad", 0.16 + 0.5 * strength) : "");
  } },
  "weight version": { note: "one colour a version of the weights that made the token", of: (row) =>
    row.mask.map((own, at) => own ? mix(["--c0", "--c1", "--c2", "--c3", "--c4"][row.versions[at] % 5], 0.38) : "") },
  "log-probability": { note: "the more surprising a token was to the policy that made it, the stronger", of: (row) =>
    row.mask.map((own, at) => own ? mix("--c1", Math.min(0.75, -row.logprobs[at] / 4)) : "") },
};
const mix = (name, share) => `color-mix(in srgb, var(${name}) ${Math.round(100 * share)}%, transparent)`;

function showSamples(rows, place) {
  if (!rows.length) {
    place.append(card("No samples", "", make("p", { class: "empty" }, "none were saved (metrics.sample_trajectories is 0, or no step ended yet)")));
    return;
  }
  const versions = [...new Set(rows.map((row) => row.version))];
  const list = make("div"), title = make("b"), note = make("p", { class: "note" });
  // Begin where there is something to see: the last step whose trajectories were not all equally good.
  const telling = versions.findLastIndex((version) => rows.some((row) => row.version === version && row.advantage !== 0));
  let at = telling < 0 ? versions.length - 1 : telling, coloring = "advantage";
  const slider = make("input", { type: "range", min: 0, max: versions.length - 1, value: at, "aria-label": "step",
    oninput: () => { at = Number(slider.value); fill(); } });
  const move = (by) => { at = Math.max(0, Math.min(versions.length - 1, at + by)); slider.value = at; fill(); };
  const choices = Object.keys(SAMPLE_COLORS).map((name) => make("button", { type: "button", onclick: () => { coloring = name; fill(); } }, name));
  function fill() {
    title.textContent = `step ${versions[at]}`;
    note.textContent = SAMPLE_COLORS[coloring].note;
    choices.forEach((button) => button.setAttribute("aria-pressed", button.textContent === coloring));
    list.replaceChildren(...rows.filter((row) => row.version === versions[at]).map((row) => sample(row, coloring)));
  }
  place.append(make("div", { class: "card" },
    make("div", { class: "row controls" }, make("button", { type: "button", onclick: () => move(-1), "aria-label": "step before" }, "‹"),
      slider, make("button", { type: "button", onclick: () => move(1), "aria-label": "next step" }, "›"), title, ...choices),
    note, list));
  fill();
}

function sample(row, coloring) {
  const colors = SAMPLE_COLORS[coloring].of(row);
  const tokens = row.tokens.map((token, at) => make("span", {
    class: row.mask[at] ? "own" : "prompt", style: colors[at] ? `background:${colors[at]}` : undefined,
    title: row.mask[at] ? `version ${row.versions[at]}, log-probability ${row.logprobs[at]}` : "prompt or tool output",
  }, token));
  const own = row.versions.filter((_, at) => row.mask[at]), [low, high] = [Math.min(...own), Math.max(...own)];
  const fact = (name, value) => make("span", {}, `${name} `, make("b", {}, value));
  return make("div", { class: "sample" },
    make("div", { class: "facts" }, fact("prompt", String(row.prompt_id)), fact("reward", show(row.reward)),
      fact("advantage", (row.advantage > 0 ? "+" : "") + show(row.advantage)), fact("tokens", String(own.length)),
      fact("weights", low === high ? String(low) : `${low}–${high}`), fact("end", row.finish), row.target ? fact("target", row.target) : null),
    make("div", { class: "text" }, ...tokens));
}
