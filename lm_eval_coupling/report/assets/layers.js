// Second view: one model on one task, layer by layer.

function renderLayers() {
  const row = rows[state.row];
  const found = contents(row, state.rank);
  at("layers-missing").textContent = row.tables.length
    ? ""
    : "No coupling table of this run was found, hence no layers: it was scored only, or its tables lie in another folder.";
  const rivals = state.compare ? rows.filter((other) => other.task === row.task && other.tables.length) : [row];
  at("heat-caption").textContent =
    `Miscoupling of every pair of layers, mean over ${found.documentsMeasured} documents`;
  if (found.matrix) heatMap(at("heat"), found.matrix, state.rank);
  else clear(at("heat"), "No layer-by-layer matrix was measured.");
  renderProfile(row, rivals);
  renderNorms(row, rivals, found);
  const [shape, distance] = [row.regularity.line_shape_score, row.regularity.expodistance];
  at("regularity").textContent = known(shape[0])
    ? `Line-shape score ${fixed(shape[0], 3)} ± ${fixed(shape[1], 3)} (1: a straight trajectory); expodistance ` +
      `${fixed(distance[0], 3)} ± ${fixed(distance[1], 3)} (0: exactly exponential growth).`
    : "";
  renderLayerNumbers(found);
}

const byJacobian = (matrix) => matrix.map(mean);
const byBasis = (matrix) => matrix.map((_, i) => mean(matrix.map((row) => row[i])));

function renderProfile(row, rivals) {
  const traces = [];
  for (const rival of rivals) {
    const matrix = contents(rival, state.rank).matrix;
    if (!matrix) continue;
    const x = state.compare ? depths(matrix.length) : matrix.map((_, i) => i + 1);
    if (state.compare) traces.push(line(byJacobian(matrix), rival.label, traces.length, { x }));
    else
      traces.push(
        line(byJacobian(matrix), "its Jacobian, others' bases", 0, { x }),
        line(byBasis(matrix), "its basis, others' Jacobians", 1, { x }),
      );
  }
  if (!traces.length) return clear(at("profile"), "No layer was measured.");
  const chance = chanceOf(state.rank).miscoupling;
  draw(
    at("profile"),
    traces,
    {
      height: 420,
      showlegend: true,
      shapes: [
        {
          type: "line",
          xref: "paper",
          x0: 0,
          x1: 1,
          y0: chance,
          y1: chance,
          line: { dash: "dot", width: 2, color: "#8c8c8c" },
        },
      ],
      annotations: [
        {
          xref: "paper",
          x: 1,
          y: chance,
          text: `chance ${chance.toFixed(3)}`,
          showarrow: false,
          yanchor: "bottom",
          xanchor: "right",
        },
      ],
      xaxis: { title: { text: state.compare ? "relative depth" : "layer" } },
      yaxis: { title: { text: `mean miscoupling, K = ${state.rank}` } },
    },
    `Mean miscoupling of each layer with the others, ${row.label} on ${row.task}.`,
  );
}

function renderNorms(row, rivals, found) {
  const traces = [];
  if (!state.compare) {
    for (const one of found.documents.filter((document) => document.norms).slice(0, 30)) {
      traces.push({
        type: "scatter",
        mode: "lines",
        y: one.norms,
        hoverinfo: "skip",
        showlegend: false,
        line: { width: 1, color: "rgba(128,128,128,0.35)" },
      });
    }
  }
  rivals.forEach((rival, i) => {
    const norms = rival === row ? found.norms : contents(rival, state.rank).norms;
    if (norms)
      traces.push(
        line(norms, state.compare ? rival.label : "mean", i, state.compare ? { x: depths(norms.length) } : {}),
      );
  });
  if (!traces.length) return clear(at("norms"), "No norms were measured.");
  draw(
    at("norms"),
    traces,
    {
      height: 420,
      showlegend: state.compare,
      xaxis: { title: { text: state.compare ? "relative depth" : "after block (0: embedding)" } },
      yaxis: { title: { text: "norm" }, type: "log" },
    },
    `Norm of the residual stream over depth, ${row.label} on ${row.task}.`,
  );
}

function renderLayerNumbers(found) {
  if (!found.matrix) return at("layer-numbers").replaceChildren();
  const own = byJacobian(found.matrix);
  const others = byBasis(found.matrix);
  const lines = own.map((value, i) => ({
    layer: i + 1,
    own: value,
    others: others[i],
    norm: found.norms && found.norms[i + 1],
  }));
  sortable(
    at("layer-numbers"),
    [
      { name: "Layer", numeric: true, value: (one) => one.layer },
      { name: "Its Jacobian, others' bases", numeric: true, value: (one) => one.own, cell: (one) => fixed(one.own) },
      {
        name: "Its basis, others' Jacobians",
        numeric: true,
        value: (one) => one.others,
        cell: (one) => fixed(one.others),
      },
      { name: "Norm after it", numeric: true, value: (one) => one.norm },
    ],
    lines,
    {},
  );
}
