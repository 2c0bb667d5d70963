// First view: the table of models and tasks, and coupling against score.

const AXES = {
  coupling: "coupling",
  excess: "coupling above chance",
  difference: "coupling, trained less untrained",
  ...Object.fromEntries(DATA.readings.map((reading) => [reading.name, reading.label])),
};
const scoreName = (row) => state.score || row.main;
const scoreOf = (row) => row.scores[scoreName(row)] || [null, null];
const couplingOf = (row) => row.coupling[state.rank] || {};
const READING = Object.fromEntries(DATA.readings.map((reading) => [reading.name, reading]));
const axisOf = (row) =>
  state.axis === "coupling"
    ? [couplingOf(row).mean, couplingOf(row).stderr]
    : state.axis === "excess"
      ? [couplingOf(row).excess, couplingOf(row).stderr]
      : state.axis === "difference"
        ? differenceOf(row, state.rank)
        : readingOf(row, READING[state.axis]);
const metric = (name) => name.replace(/,none$/, "");

function shownRows() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter(
    (row) =>
      (state.level === "all" || (state.level === "top" ? !row.member : !row.group)) &&
      words.every((word) => `${row.model} ${row.label} ${row.task} ${row.alias}`.toLowerCase().includes(word)),
  );
}

const MOST_NAMES = 12; // points with a name; more names are shown on hover only
const MOST_SERIES = 20; // entries of a legend
const NARROW = ["Model", "Task", "Coupling", "Score"]; // columns that 390 pixels have room for
/** Return every column; `shown` marks those that 1,300 pixels have room for. */
function overviewColumns() {
  const measured = (name, of, digits, more = {}) => ({
    name,
    numeric: true,
    value: (row) => of(row)[0],
    error: (row) => of(row)[1],
    cell: (row) => withError(of(row)[0], of(row)[1], digits),
    ...more,
  });
  const twins = rows.some((row) => known(differenceOf(row, state.rank)[0]));
  // Without the number of examples, which has a column of its own.
  const prompting = (row) => row.prompting.split(", ").slice(1).join(", ");
  const several = new Set(rows.filter((row) => row.measured).map(prompting)).size > 1;
  return [
    { name: "Model", shown: true, value: (row) => row.label, cell: (row) => breakable(row.label) },
    { name: "Task", shown: true, value: (row) => row.task, cell: (row) => breakable(row.task) },
    { name: "Parameters", numeric: true, value: (row) => row.n_params, cell: (row) => size(row.n_params) },
    measured("Coupling", (row) => [couplingOf(row).mean, couplingOf(row).stderr], 4, { shown: true }),
    { name: "Chance", numeric: true, value: (row) => couplingOf(row).chance, cell: (row) => fixed(couplingOf(row).chance) },
    {
      name: "Excess",
      shown: true,
      numeric: true,
      value: (row) => couplingOf(row).excess,
      cell: (row) => signed(couplingOf(row).excess),
      title: "coupling above chance",
    },
    measured("Less untrained", (row) => differenceOf(row, state.rank), 4, {
      shown: twins,
      title: "coupling of the trained weights less that of the untrained ones, over the documents of both",
    }),
    measured("Score", scoreOf, 4, { shown: true }),
    { name: "Metric", shown: true, value: (row) => (known(scoreOf(row)[0]) ? metric(scoreName(row)) : null) },
    ...DATA.readings.map((reading) => measured(sentence(reading.label), (row) => readingOf(row, reading), 3, { title: reading.doc })),
    { name: "Shots", shown: true, numeric: true, value: (row) => row.n_fewshot },
    { name: "Prompts", shown: several, text: true, value: (row) => prompting(row) || null, title: "how the prompts were made" },
    { name: "Scored", numeric: true, value: (row) => row.n_samples, title: "documents behind the score" },
    { name: "Measured", shown: true, numeric: true, value: (row) => row.measured, title: "documents with coupling or any other number" },
    { name: "Failed", numeric: true, value: (row) => row.failed, title: "documents that could not be measured" },
    {
      name: "Worst error",
      shown: true,
      numeric: true,
      value: worstOf,
      title: "largest relative error of a block's Jacobian on this task against the model's own derivative",
    },
  ];
}
const sentence = (text) => (/^[a-z-]+([ ,]|$)/.test(text) ? text[0].toUpperCase() + text.slice(1) : text); // cos(x) stays

function renderOverview() {
  const shown = shownRows();
  const columns = overviewColumns();
  const byWidth = matchMedia("(max-width: 40rem)").matches
    ? NARROW
    : columns.filter((column) => column.shown).map((column) => column.name);
  const chosen = state.columns ?? byWidth;
  at("columns").replaceChildren(
    ...columns.map((column) =>
      element(
        "label",
        {},
        element("input", {
          type: "checkbox",
          checked: chosen.includes(column.name) ? "" : null,
          onchange: (event) => {
            const names = event.target.checked
              ? [...chosen, column.name]
              : chosen.filter((name) => name !== column.name);
            state.columns = columns.map(({ name }) => name).filter((name) => names.includes(name));
            show("overview");
          },
        }),
        column.name,
      ),
    ),
  );
  sortable(
    at("rows"),
    columns.filter((column) => chosen.includes(column.name)),
    shown,
    { current: (row) => row.number === state.row, open: (row) => openRow(row.number) },
  );
  renderScatter(shown);
}

/** Return the chosen metric, or the one that most rows list first: perplexity and accuracy share no axis. */
function drawnMetric(points) {
  if (state.score) return state.score;
  const counts = new Map();
  for (const row of points) counts.set(row.main, (counts.get(row.main) || 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0];
}

function renderScatter(shown) {
  const of = (row) => row.scores[name] || [null, null];
  const drawable = shown.filter((row) => known(scoreOf(row)[0]) && known((axisOf(row) || [])[0]));
  const name = drawnMetric(drawable);
  const choices = [...new Set(drawable.map((row) => row.task))];
  fill(at("scatter-task"), [["", "all tasks"], ...choices.map((task) => [task, task])], state.scatterTask);
  const points = drawable.filter(
    (row) => known(of(row)[0]) && (state.score || row.main === name) && (!state.scatterTask || row.task === state.scatterTask),
  );
  const others = drawable.length - drawable.filter((row) => known(of(row)[0]) && (state.score || row.main === name)).length;
  at("scatter-note").textContent = others
    ? `The plot shows ${metric(name)}, not the ${others} rows of other metrics: choose a score above.`
    : "";
  if (!points.length) return clear(at("scatter"), "No row has both this score and a coupling at this K.");
  const chance = { coupling: DATA.chance[state.rank], excess: 0 }[state.axis];
  const parts = (part, i) => points.map((row) => part(row)[i]);
  const across = span(parts(axisOf, 0), parts(axisOf, 1), [chance]);
  const up = span(parts(of, 0), parts(of, 1));
  const room = [(at("scatter").clientWidth || 600) - 75, 300]; // pixels within the axes
  const named = points.length <= MOST_NAMES;
  const places = labelPlaces(
    (named ? points : []).map((row) => ({
      x: ((axisOf(row)[0] - across[0]) / (across[1] - across[0])) * room[0],
      y: ((up[1] - of(row)[0]) / (up[1] - up[0])) * room[1],
      right: ((axisOf(row)[1] ?? 0) / (across[1] - across[0])) * room[0],
      up: ((of(row)[1] ?? 0) / (up[1] - up[0])) * room[1],
      text: row.label,
    })),
    room[0],
  );
  const place = new Map(points.map((row, i) => [row, places[i]]));
  const traces = [...seriesOf(points)].map(([series, members], i) => {
    const bar = (values) => ({ type: "data", array: values.map((value) => value ?? 0), thickness: 1, width: 3 });
    return {
      type: "scatter",
      mode: named ? "markers+text" : "markers",
      name: plain(series),
      customdata: members.map((row) => row.number),
      x: members.map((row) => axisOf(row)[0]),
      y: members.map((row) => of(row)[0]),
      error_x: bar(members.map((row) => axisOf(row)[1])),
      error_y: bar(members.map((row) => of(row)[1])),
      text: members.map((row) => (place.get(row) ? plain(row.label) : "")),
      textposition: members.map((row) => place.get(row) ?? "top right"),
      textfont: { size: 11 },
      cliponaxis: false,
      hoverinfo: "text",
      hovertext: members.map((row) =>
        [
          `<b>${plain(row.label)}</b>`,
          plain(row.task),
          `${plain(AXES[state.axis])} ${fixed(axisOf(row)[0])} ± ${fixed(axisOf(row)[1])}`,
          `${plain(name)} ${fixed(of(row)[0])} ± ${fixed(of(row)[1])}`,
        ].join("<br>"),
      ),
      marker: { size: 10, color: COLORS[i % COLORS.length], symbol: SYMBOLS[i % SYMBOLS.length] },
    };
  });
  if (known(chance)) traces.push({ ...levelLine(`chance ${chance.toFixed(3)}`, [chance, chance], up), chance: true });
  const unit = state.axis in { coupling: 1, excess: 1, difference: 1 } || READING[state.axis]?.of_rank ? `, K = ${state.rank}` : "";
  draw(
    at("scatter"),
    traces,
    {
      height: 480,
      showlegend: true,
      xaxis: { title: { text: plain(AXES[state.axis]) + unit }, range: across },
      yaxis: { title: { text: plain(metric(name)) }, range: up },
    },
    `Scatter plot of ${points.length} points, ${metric(name)} against ${AXES[state.axis]}; the numbers are in the table above.`,
  ).then((plot) => {
    plot.removeAllListeners("plotly_click");
    plot.on("plotly_click", (event) => {
      const number = event.points[0].customdata;
      if (number !== undefined) openRow(number);
    });
  });
}

/** Group points by task, or, where there are many tasks, by model, or not at all. */
function seriesOf(points) {
  const keys = [(row) => row.task, (row) => row.label, () => "all models and tasks"];
  for (const key of keys) {
    const series = new Map();
    for (const row of points) {
      if (!series.has(key(row))) series.set(key(row), []);
      series.get(key(row)).push(row);
    }
    if (series.size <= MOST_SERIES) return series;
  }
}

/** Return the ends of an axis that shows all values with their bars and some margin. */
function span(values, errors, more = []) {
  const ends = [...values.flatMap((value, i) => [value - (errors[i] ?? 0), value + (errors[i] ?? 0)]), ...more.filter(known)];
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

const LETTER = 6.2, LINE = 13, AWAY = 7; // of a label, in pixels
/**
 * Choose a place for each label: the one of four that crosses fewest bars, or null where all of them cover another label
 * or leave the picture; such a label is shown on hover only.
 * `points` are {x, y, right, up, text} in pixels, y from the top; `right` and `up` are half the lengths of their bars.
 */
function labelPlaces(points, width) {
  const boxes = [];
  const within = (value, low, high) => value > low && value < high;
  return points.map((point) => {
    const long = point.text.length * LETTER;
    const places = [["top right", 1, -1], ["bottom right", 1, 1], ["top left", -1, -1], ["bottom left", -1, 1]].map(
      ([side, across, down]) => {
        const left = point.x + across * AWAY - (across < 0 ? long : 0);
        const top = point.y + down * AWAY - (down < 0 ? LINE : 0);
        const [right, bottom] = [left + long, top + LINE];
        const covers = boxes.some((box) => left < box[2] && right > box[0] && top < box[3] && bottom > box[1]);
        let cost = 0;
        for (const other of points) {
          if (other === point) continue;
          if (within(other.x, left - 6, right + 6) && other.y + other.up > top && other.y - other.up < bottom) cost += 3;
          if (within(other.y, top - 6, bottom + 6) && other.x + other.right > left && other.x - other.right < right) cost += 3;
        }
        return { side, cost, box: [left, top, right, bottom], out: covers || left < 0 || right > width };
      },
    );
    const best = places.filter((place) => !place.out).sort((a, b) => a.cost - b.cost)[0];
    if (best) boxes.push(best.box);
    return best ? best.side : null;
  });
}

function openRow(number) {
  state.row = number;
  state.document = null;
  show("layers");
  at("tab-layers").focus();
}
