// Plots in the reader's color scheme; lines differ in symbols too, for readers without color vision.

const COLORS = DATA.palette;
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon"];
const DASHES = ["solid", "dash", "dot", "dashdot"];

function layout(more) {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--ink"), family: "system-ui, sans-serif" },
    margin: { l: 55, r: 15, t: 38, b: 50 }, // the toolbar is in the top margin
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--accent") },
    legend: { orientation: "h", y: -0.24, traceorder: "normal" },
    hovermode: "closest",
    hoverlabel: { font: { family: "system-ui, sans-serif" } },
    ...more,
    xaxis: { ...axis, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

function draw(holder, traces, more, label) {
  holder.setAttribute("aria-label", label);
  if (!holder.data) holder.replaceChildren(); // removes the note of clear()
  return Plotly.react(holder, traces, layout(more), CONFIG);
}
function clear(holder, why) {
  Plotly.purge(holder);
  holder.setAttribute("aria-label", why);
  holder.replaceChildren(element("p", { class: "note" }, why));
}

function heatMap(holder, matrix, rank) {
  const chance = chanceShown(rank);
  const values = matrix.flat().filter((value) => Number.isFinite(value));
  if (!values.length) return clear(holder, "No pair of layers has a value.");
  const low = Math.min(chance, ...values),
    high = Math.max(chance, ...values);
  const numbers = { tick0: 1, dtick: Math.ceil(matrix.length / 8) };
  const layers = matrix.map((_, i) => i + 1);
  const far = state.miscoupling ? low : high;
  // Labels need room: none within a third of the bar from that of chance.
  const others = [far, (far + chance) / 2].filter((value) => Math.abs(chance - value) > 0.3 * (high - low));
  const ticks = {
    tickvals: [...others, chance],
    ticktext: [...others.map((value) => value.toFixed(3)), `<b>chance ${chance.toFixed(3)}</b>`],
  };
  const trace = {
    type: "heatmap",
    z: matrix.map((row) => row.map((value) => (Number.isFinite(value) ? value : null))),
    x: layers,
    y: layers,
    zmin: low,
    zmax: high,
    colorscale: "Viridis",
    hoverongaps: false,
    hovertemplate:
      "Jacobian of layer %{y}<br>singular vectors of layer %{x}<br>" +
      `${quantity()} %{z:.4f}, chance ${chance.toFixed(4)}<extra></extra>`,
    colorbar: {
      orientation: "h",
      y: -0.2,
      yanchor: "top",
      len: 0.85,
      thickness: 14,
      tickmode: "array",
      ...ticks,
      ticklabeloverflow: "allow",
      title: { text: `${quantity()}, K = ${rank} (${state.miscoupling ? "dark" : "bright"}: coupled)`, side: "bottom" },
    },
  };
  const side = Math.min(holder.clientWidth || 480, 520);
  draw(
    holder,
    [trace],
    {
      height: side + 98,
      margin: { l: 50, r: 30, t: 38, b: 115 },
      xaxis: { title: { text: "singular vectors of layer" }, constrain: "domain", showgrid: false, ...numbers },
      yaxis: {
        title: { text: "Jacobian of layer" },
        autorange: "reversed",
        scaleanchor: "x",
        constrain: "domain",
        showgrid: false,
        ...numbers,
      },
    },
    `Heat map of ${layers.length} by ${layers.length} layers: mean ${quantity()} ${mean(values).toFixed(4)}, from ` +
      `${Math.min(...values).toFixed(4)} to ${Math.max(...values).toFixed(4)}; chance is ${chance.toFixed(4)}.`,
  );
}

function line(values, name, i, more = {}) {
  const color = COLORS[i % COLORS.length];
  return {
    type: "scatter",
    mode: "lines+markers",
    y: values,
    name: plain(name),
    line: { color, width: 2, dash: DASHES[Math.floor(i / COLORS.length) % DASHES.length] },
    marker: { size: 5, color, symbol: SYMBOLS[i % SYMBOLS.length] },
    ...more,
  };
}
const depths = (count) => Array.from({ length: count }, (_, i) => (count > 1 ? i / (count - 1) : 0));

/** Make a band of one standard error around a curve. Plotly fills from one line to the one before it. */
function band(values, errors, i, x) {
  const edge = (sign) =>
    values.map((value, at) => (known(value) && known(errors[at]) ? value + sign * errors[at] : null));
  const hidden = { type: "scatter", mode: "lines", x, hoverinfo: "skip", showlegend: false, line: { width: 0 } };
  const fill = COLORS[i % COLORS.length] + "33";
  return [{ ...hidden, y: edge(-1) }, { ...hidden, y: edge(1), fill: "tonexty", fillcolor: fill }];
}
/** Make a dotted line that the legend names. */
const levelLine = (name, x, y) => ({
  type: "scatter",
  mode: "lines",
  name,
  x,
  y,
  hoverinfo: "name",
  line: { dash: "dot", width: 2, color: "#8c8c8c" },
});

/** Place labels at round numbers of a logarithmic axis: 1, 2, 5 of each decade, or powers of ten of many decades. */
function logTicks(values) {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) return {};
  const [low, high] = [Math.min(...positive), Math.max(...positive)];
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const steps = last - first > 3 ? [1] : [1, 2, 5];
  const decades = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const tickvals = decades.flatMap((decade) => steps.map((step) => step * 10 ** decade));
  return { tickmode: "array", tickvals, ticktext: tickvals.map((value) => String(+value.toPrecision(1))) };
}
