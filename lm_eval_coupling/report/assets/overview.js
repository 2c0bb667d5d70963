// First view: the table of models and tasks, and coupling against score.

const AXES = {
  coupling: "coupling",
  excess: "coupling above chance",
  line_shape_score: "line-shape score",
  expodistance: "expodistance",
};
const scoreName = (row) => state.score || row.main;
const scoreOf = (row) => row.scores[scoreName(row)] || [null, null];
const couplingOf = (row) => row.coupling[state.rank] || {};
const axisOf = (row) =>
  state.axis === "coupling"
    ? [couplingOf(row).mean, couplingOf(row).stderr]
    : state.axis === "excess"
      ? [couplingOf(row).excess, couplingOf(row).stderr]
      : row.regularity[state.axis];

function shownRows() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter(
    (row) =>
      (state.level === "all" || (state.level === "top" ? !row.member : !row.group)) &&
      words.every((word) => `${row.model} ${row.label} ${row.task} ${row.alias}`.toLowerCase().includes(word)),
  );
}

function renderOverview() {
  const shown = shownRows();
  sortable(
    at("rows"),
    [
      { name: "Model", value: (row) => row.label },
      { name: "Task", value: (row) => row.task },
      { name: "Parameters", numeric: true, value: (row) => row.n_params, cell: (row) => size(row.n_params) },
      { name: "Score", numeric: true, value: (row) => scoreOf(row)[0], cell: (row) => withError(...scoreOf(row)) },
      { name: "Metric", value: (row) => (known(scoreOf(row)[0]) ? scoreName(row).replace(/,none$/, "") : null) },
      {
        name: "Coupling",
        numeric: true,
        value: (row) => couplingOf(row).mean,
        cell: (row) => withError(couplingOf(row).mean, couplingOf(row).stderr),
      },
      {
        name: "Chance",
        numeric: true,
        value: (row) => couplingOf(row).chance,
        cell: (row) => fixed(couplingOf(row).chance),
      },
      {
        name: "Excess",
        numeric: true,
        value: (row) => couplingOf(row).excess,
        cell: (row) => signed(couplingOf(row).excess),
        title: "coupling above chance",
      },
      {
        name: "Line shape",
        numeric: true,
        value: (row) => row.regularity.line_shape_score[0],
        cell: (row) => withError(...row.regularity.line_shape_score, 3),
        title: "line-shape score: 1 for a straight trajectory",
      },
      {
        name: "Expodistance",
        numeric: true,
        value: (row) => row.regularity.expodistance[0],
        cell: (row) => withError(...row.regularity.expodistance, 3),
        title: "0 for exactly exponential growth of the norm",
      },
      { name: "Shots", numeric: true, value: (row) => row.n_fewshot },
      { name: "Scored", numeric: true, value: (row) => row.n_samples, title: "documents behind the score" },
      { name: "Measured", numeric: true, value: (row) => row.measured, title: "documents behind the coupling" },
      { name: "Failed", numeric: true, value: (row) => row.failed, title: "documents that could not be measured" },
      {
        name: "Worst error",
        numeric: true,
        value: (row) => row.worst_certificate,
        title: "largest relative error of a block's Jacobian against the model's own derivative",
      },
    ],
    shown,
    { current: (row) => rows.indexOf(row) === state.row, open: (row) => openRow(rows.indexOf(row)) },
  );
  renderScatter(shown);
}

function renderScatter(shown) {
  const points = shown.filter((row) => known(scoreOf(row)[0]) && known((axisOf(row) || [])[0]));
  if (!points.length) return clear(at("scatter"), "No row has both this score and a coupling at this K.");
  const tasks = [...new Set(points.map((row) => row.task))];
  const traces = tasks.map((task, i) => {
    const members = points.filter((row) => row.task === task);
    const bar = (values) => ({ type: "data", array: values.map((value) => value ?? 0), thickness: 1, width: 3 });
    return {
      type: "scatter",
      mode: points.length <= 16 ? "markers+text" : "markers",
      name: plain(task),
      customdata: members.map((row) => rows.indexOf(row)),
      x: members.map((row) => axisOf(row)[0]),
      y: members.map((row) => scoreOf(row)[0]),
      error_x: bar(members.map((row) => axisOf(row)[1])),
      error_y: bar(members.map((row) => scoreOf(row)[1])),
      text: members.map((row) => plain(row.label)),
      textposition: "top right",
      textfont: { size: 11 },
      cliponaxis: false,
      hoverinfo: "text",
      hovertext: members.map((row) =>
        [
          `<b>${plain(row.label)}</b>`,
          plain(row.task),
          `${AXES[state.axis]} ${fixed(axisOf(row)[0])} ± ${fixed(axisOf(row)[1])}`,
          `${plain(scoreName(row))} ${fixed(scoreOf(row)[0])} ± ${fixed(scoreOf(row)[1])}`,
        ].join("<br>"),
      ),
      marker: { size: 10, color: COLOURS[i % COLOURS.length], symbol: SYMBOLS[i % SYMBOLS.length] },
    };
  });
  const chance = { coupling: chanceOf(state.rank).coupling, excess: 0 }[state.axis];
  const names = new Set(points.map(scoreName));
  if (known(chance)) {
    // plots are not scaled to the lines drawn over them
    traces.push({
      type: "scatter",
      mode: "markers",
      x: [chance],
      y: [scoreOf(points[0])[0]],
      hoverinfo: "skip",
      showlegend: false,
      marker: { opacity: 0 },
    });
  }
  const marks = known(chance)
    ? {
        shapes: [
          {
            type: "line",
            x0: chance,
            x1: chance,
            yref: "paper",
            y0: 0,
            y1: 1,
            line: { dash: "dot", width: 2, color: "#8c8c8c" },
          },
        ],
        annotations: [
          { x: chance, y: 1, yref: "paper", text: "chance", showarrow: false, xanchor: "left", yanchor: "top" },
        ],
      }
    : {};
  const unit = state.axis === "coupling" || state.axis === "excess" ? `, K = ${state.rank}` : "";
  draw(
    at("scatter"),
    traces,
    {
      height: 460,
      ...marks,
      showlegend: true,
      xaxis: { title: { text: AXES[state.axis] + unit } },
      yaxis: { title: { text: names.size === 1 ? plain([...names][0]) : "score" } },
    },
    `Scatter plot of ${points.length} points, score against ${AXES[state.axis]}; the numbers are in the table above.`,
  ).then((plot) => {
    plot.removeAllListeners("plotly_click");
    plot.on("plotly_click", (event) => openRow(event.points[0].customdata));
  });
}

function openRow(number) {
  state.row = number;
  state.document = null;
  show("layers");
  at("tab-layers").focus();
}
