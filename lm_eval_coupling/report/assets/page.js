// Tabs and controls. Whatever is chosen, the view in sight is drawn again.

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
};
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
    rows.map((other) => [other.model + "\n" + other.revision, other.label]),
    row.model + "\n" + row.revision,
  );
  fill(
    at("task"),
    rows
      .filter((other) => other.model === row.model && other.revision === row.revision)
      .map((other) => [other.task, other.task]),
    row.task,
  );
  RENDER[name]();
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
  const models = new Set(rows.map((row) => row.model + "\n" + row.revision)).size;
  const tasks = new Set(rows.map((row) => row.task)).size;
  const prompts = DATA.tables.reduce((sum, table) => sum + table.total, 0);
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  at("summary").textContent = [plural(models, "model"), plural(tasks, "task"), plural(prompts, "measured prompt")].join(
    ", ",
  );
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
    const [model, revision] = control.value.split("\n");
    const task = rows[state.row].task;
    const own = rows.filter((row) => row.model === model && row.revision === revision);
    state.row = rows.indexOf(own.find((row) => row.task === task) || own[0]);
    state.document = null;
  });
  choose("task", (control) => {
    const { model, revision } = rows[state.row];
    state.row = rows.findIndex((row) => row.model === model && row.revision === revision && row.task === control.value);
    state.document = null;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(state.tab));
  show(state.tab);
}

start();
