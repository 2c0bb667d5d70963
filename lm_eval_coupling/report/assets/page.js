// Tabs and controls; every choice draws the current view again.

const RENDER = {
  overview: renderOverview,
  layers: renderLayers,
  documents: renderDocuments,
  provenance: renderProvenance,
};
const CONTROLS = {
  rank: "rank",
  score: "score",
  axis: "axis",
  level: "level",
  "row-filter": "filter",
  "document-filter": "search",
  answer: "answer",
  compare: "compare",
  miscoupling: "miscoupling",
  "scatter-task": "scatterTask",
};
// A link to a view holds the choices that differ from those of a fresh page.
const LINKED = ["tab", "rank", "score", "axis", "level", "filter", "search", "answer", "scatterTask", "document"];
const FRESH = { ...state };
const tabs = [...document.querySelectorAll("[role=tab]")];

function show(name) {
  state.tab = name;
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    at(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  for (const label of document.querySelectorAll("[data-tabs]"))
    label.hidden = !label.getAttribute("data-tabs").split(" ").includes(name);
  if (!rows.some((row) => row.group)) at("level-label").hidden = true;
  const row = rows[state.row];
  fill(
    at("model"),
    rows.map((other) => [other.label, other.label]),
    row.label,
  );
  fill(
    at("task"),
    rows
      .filter((other) => other.label === row.label)
      .map((other) => [other.task, other.task]),
    row.task,
  );
  RENDER[name]();
  remember();
}

function remember() {
  const link = new URLSearchParams();
  for (const name of LINKED) if (known(state[name]) && state[name] !== FRESH[name]) link.set(name, state[name]);
  if (state.compare) link.set("compare", "1");
  if (state.miscoupling) link.set("miscoupling", "1");
  if (state.columns) link.set("columns", state.columns.join("|"));
  if (state.row !== FRESH.row) {
    link.set("model", rows[state.row].label);
    link.set("task", rows[state.row].task);
  }
  history.replaceState(null, "", "#" + link);
}

/** Take the choices from the address; missing or invalid ones are as on a fresh page. */
function recall() {
  const link = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, FRESH);
  for (const name of LINKED) if (link.has(name)) state[name] = link.get(name);
  if (!(state.tab in RENDER)) state.tab = FRESH.tab;
  if (!ranks.includes(state.rank)) state.rank = FRESH.rank;
  if (!(state.axis in AXES)) state.axis = FRESH.axis;
  state.document = link.has("document") && /^\d+$/.test(link.get("document")) ? Number(link.get("document")) : null;
  state.compare = link.has("compare");
  state.miscoupling = link.has("miscoupling");
  state.columns = link.has("columns") ? link.get("columns").split("|") : null;
  const row = rows.findIndex((one) => one.label === link.get("model") && one.task === link.get("task"));
  if (row >= 0) state.row = row;
  for (const [id, name] of Object.entries(CONTROLS))
    if (at(id).type === "checkbox") at(id).checked = state[name];
    else at(id).value = state[name];
  at("level").value ||= state.level = FRESH.level;
  at("score").value = [...at("score").options].some((option) => option.value === state.score) ? state.score : (state.score = "");
}

function fill(select, options, chosen) {
  const distinct = [...new Map(options)];
  select.replaceChildren(...distinct.map(([value, name]) => element("option", { value }, name)));
  select.value = chosen;
}

function choose(id, change) {
  at(id).addEventListener(at(id).type === "search" ? "input" : "change", (event) => {
    change(event.target);
    show(state.tab);
  });
}

function start() {
  const models = new Set(rows.map((row) => [row.model, row.revision, row.variant].join(" "))).size;
  const tasks = new Set(rows.map((row) => row.task)).size;
  const prompts = DATA.tables.reduce((sum, table) => sum + table.total, 0);
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  at("summary").textContent = [plural(models, "model"), plural(tasks, "task"), plural(prompts, "measured prompt")].join(", ");
  fill(
    at("rank"),
    ranks.map((rank) => [rank, rank]),
    state.rank,
  );
  fill(
    at("score"),
    [
      ["", "each task's first metric"],
      ...rows
        .flatMap((row) => Object.keys(row.scores))
        .sort()
        .map((name) => [name, name.replace(/,none$/, "")]),
    ],
    "",
  );
  fill(at("axis"), Object.entries(AXES), state.axis);
  at("passed-over").textContent = DATA.passed_over.length ? `Passed over: ${DATA.passed_over.join("; ")}` : "";
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => show(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: i + 1, ArrowLeft: i - 1 + tabs.length, Home: 0, End: tabs.length - 1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const next = tabs[step % tabs.length];
      next.focus();
      show(next.getAttribute("aria-controls"));
    });
  });
  for (const [id, name] of Object.entries(CONTROLS)) {
    choose(id, (control) => {
      state[name] = control.type === "checkbox" ? control.checked : control.value;
    });
  }
  choose("model", (control) => {
    const task = rows[state.row].task;
    const own = rows.filter((row) => row.label === control.value);
    state.row = rows.indexOf(own.find((row) => row.task === task) || own[0]);
    state.document = null;
  });
  choose("task", (control) => {
    const { label } = rows[state.row];
    state.row = rows.findIndex((row) => row.label === label && row.task === control.value);
    state.document = null;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(state.tab));
  addEventListener("hashchange", () => {
    recall();
    show(state.tab);
  });
  recall();
  show(state.tab);
}

start();
