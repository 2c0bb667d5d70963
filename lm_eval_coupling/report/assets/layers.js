// Second view: one model on one task, layer by layer.

function renderLayers() {
  const row = rows[state.row];
  const joined = contents(row, state.rank);
  at("layers-missing").textContent = row.tables.length
    ? ""
    : "This run has no coupling table, hence no layers: it was only scored, or its tables are in another folder.";
  const rivals = state.compare ? rows.filter((other) => other.task === row.task && other.tables.length) : [row];
  at("heat-caption").textContent =
    `${sentence(quantity())} of every pair of layers, mean over ${joined.documentsMeasured} documents`;
  if (joined.matrix) heatMap(at("heat"), joined.matrix, state.rank);
  else clear(at("heat"), "No layer-by-layer matrix was measured.");
  renderProfile(row, rivals);
  renderNorms(row, rivals, joined);
  renderResponses(row);
  const [difference, error, n] = differenceOf(row, state.rank);
  at("untrained").textContent = known(difference)
    ? `Coupling of trained less untrained weights, over the ${n} documents of both: ${signed(difference)} ± ${fixed(error)}.`
    : "";
  renderOtherNumbers(row);
  renderLayerNumbers(joined);
}

/** List the numbers of a task other than coupling, each with what it says. */
function renderOtherNumbers(row) {
  const measured = DATA.readings.filter((reading) => known(readingOf(row, reading)[0]));
  at("regularity").closest("details").hidden = !measured.length;
  const of = (reading) => readingOf(row, reading);
  const mean = { name: "Mean", numeric: true, value: (reading) => of(reading)[0], error: (reading) => of(reading)[1], cell: (reading) => withError(...of(reading)) };
  const columns = [
    { name: "Number of a prompt", value: (reading) => sentence(reading.label) + (reading.of_rank ? `, K = ${state.rank}` : "") },
    mean,
    { name: "What it says", text: true, value: (reading) => reading.doc || null },
  ];
  sortable(at("regularity"), columns, measured, {});
}

const SIDES = { jacobian: "its Jacobian, others' bases", basis: "its basis, others' Jacobians" };

function renderProfile(row, rivals) {
  const traces = [];
  let number = 0;
  const add = (profile, of, name, dash) => {
    const values = profile[of];
    const x = state.compare ? depths(values.length) : values.map((_, i) => i + 1);
    traces.push(...band(values, profile[of + "_stderr"], number, x));
    const curve = line(values, name, number++, { x });
    traces.push(dash ? { ...curve, line: { ...curve.line, dash } } : curve);
  };
  for (const rival of rivals) {
    const { profile, untrained } = contents(rival, state.rank);
    if (!profile) continue;
    if (state.compare) {
      add(profile, "jacobian", rival.label);
      continue;
    }
    for (const [of, name] of Object.entries(SIDES)) add(profile, of, name);
    number = 0; // the colors of the trained weights, dashed
    if (untrained) for (const [of, name] of Object.entries(SIDES)) add(untrained, of, `untrained: ${name}`, "dash");
  }
  const dashed = traces.some((trace) => trace.line.dash === "dash");
  at("profile-caption").textContent =
    `Mean ${quantity()} of each layer with the others (bands: one standard error${dashed ? "; dashed: untrained weights" : ""})`;
  if (!traces.length) return clear(at("profile"), "No layer was measured.");
  const chance = chanceShown(state.rank);
  const ends = traces.flatMap((trace) => trace.x);
  traces.push(levelLine(`chance ${chance.toFixed(3)}`, [Math.min(...ends), Math.max(...ends)], [chance, chance]));
  draw(
    at("profile"),
    traces,
    {
      height: 440,
      showlegend: true,
      xaxis: { title: { text: state.compare ? "relative depth" : "layer" } },
      yaxis: { title: { text: `mean ${quantity()}, K = ${state.rank}` } },
    },
    `Mean ${quantity()} of each layer with the others, ${row.label} on ${row.task}; bands are one standard error.`,
  );
}

function renderNorms(row, rivals, joined) {
  const traces = [];
  if (!state.compare) {
    for (const document of joined.documents.filter(({ norms }) => norms).slice(0, 30)) {
      traces.push({
        type: "scatter",
        mode: "lines",
        y: document.norms,
        hoverinfo: "skip",
        showlegend: false,
        line: { width: 1, color: "rgba(128,128,128,0.35)" },
      });
    }
  }
  rivals.forEach((rival, i) => {
    const norms = rival === row ? joined.norms : contents(rival, state.rank).norms;
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
      yaxis: { title: { text: "norm" }, type: "log", ...logTicks(traces.flatMap((trace) => trace.y)) },
    },
    `Norm of the residual stream over depth, ${row.label} on ${row.task}.`,
  );
}

/** Draw coupling along what the model wrote, if tokens of responses were measured. */
function renderResponses(row) {
  const of = row.tables.length === 1 ? DATA.tables[row.tables[0]].responses : [];
  const curves = of.filter((curve) => curve.rank === state.rank);
  at("responses").closest("figure").hidden = !curves.length;
  if (!curves.length) return;
  const shown = (values) => values.map((value) => (known(value) ? asShown(1 - value) : null));
  const traces = curves.flatMap((curve, i) => {
    const values = shown(curve.mean);
    const part = new Set(curves.map(({ kind }) => kind)).size > 1 ? `${curve.kind}, ` : "";
    const name = `${part}${curve.answer} (${Math.max(...curve.n)} documents)`;
    return [...band(values, curve.stderr, i, curve.share), line(values, name, i, { x: curve.share })];
  });
  const chance = chanceShown(state.rank);
  traces.push(levelLine(`chance ${chance.toFixed(3)}`, [0, 1], [chance, chance]));
  at("responses-caption").textContent =
    `Mean ${quantity()} along the response, by whether the answer was right (bands: one standard error over documents)`;
  draw(
    at("responses"),
    traces,
    {
      height: 440,
      showlegend: true,
      xaxis: { title: { text: "position in the response, 0 first token, 1 last" } },
      yaxis: { title: { text: `mean ${quantity()}, K = ${state.rank}` } },
    },
    `Mean ${quantity()} along the response, ${row.label} on ${row.task}; bands are one standard error.`,
  );
}

function renderLayerNumbers({ profile, untrained, norms }) {
  if (!profile) return at("layer-numbers").replaceChildren();
  const lines = profile.jacobian.map((_, i) => ({ layer: i + 1, i }));
  const column = (name, values, of) => ({
    name,
    numeric: true,
    value: (line) => values[of][line.i],
    error: (line) => values[of + "_stderr"][line.i],
    cell: (line) => withError(values[of][line.i], values[of + "_stderr"][line.i]),
  });
  sortable(
    at("layer-numbers"),
    [
      { name: "Layer", numeric: true, value: (line) => line.layer },
      ...Object.entries(SIDES).map(([of, name]) => column(name[0].toUpperCase() + name.slice(1), profile, of)),
      ...(untrained ? Object.entries(SIDES).map(([of, name]) => column(`Untrained: ${name}`, untrained, of)) : []),
      { name: "Norm after it", numeric: true, value: (line) => norms && norms[line.i + 1] },
    ],
    lines,
    {},
  );
}
