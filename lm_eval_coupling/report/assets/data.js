// The numbers that the page carries, and what has been chosen of them.

const DATA = JSON.parse(at("data").textContent);
const rows = DATA.rows;
const ranks = [...new Set(rows.flatMap((row) => Object.keys(row.coupling)))].sort((a, b) => a - b);
const state = {
  tab: "overview",
  row: Math.max(
    rows.findIndex((row) => row.tables.length),
    0,
  ),
  document: null,
  rank: String((rows.find((row) => row.coupling_rank !== null) || {}).coupling_rank ?? ranks[0] ?? ""),
  score: "",
  axis: "coupling",
  // A group alone says nothing of scores where it has none of its own: then its tasks are seen beside it.
  level: rows.some((row) => row.group && !known((row.scores[row.main] || [null])[0])) ? "all" : "top",
  filter: "",
  search: "",
  answer: "all",
  compare: false,
  scatterTask: "",
  columns: null,
};

/** Inverse of Python's pack(): rows of a square matrix, NaN where undefined. */
function unpack(packed) {
  const bytes = atob(packed);
  const values = Array.from({ length: bytes.length / 2 }, (_, i) => {
    const whole = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
    return whole === 0xffff ? NaN : whole / 10000;
  });
  const layers = Math.round(Math.sqrt(values.length));
  return Array.from({ length: layers }, (_, row) => values.slice(row * layers, (row + 1) * layers));
}
const offDiagonal = (matrix) => matrix.map((row, i) => row.map((value, j) => (i === j ? NaN : value)));

/** Mean of [matrix, weight] pairs, entry by entry over what is defined. */
function weightedMean(parts) {
  return parts[0][0].map((line, i) =>
    line.map((_, j) => {
      const there = parts.filter(([matrix]) => Number.isFinite(matrix[i][j]));
      const total = there.reduce((sum, [, weight]) => sum + weight, 0);
      return there.reduce((sum, [matrix, weight]) => sum + (matrix[i][j] * weight) / total, there.length ? 0 : NaN);
    }),
  );
}

/** Profiles of several tables as one, with the errors of independent samples of documents; null of none. */
function pooledProfile(parts) {
  if (!parts.length) return null;
  const total = parts.reduce((sum, [, weight]) => sum + weight, 0);
  const pooled = {};
  for (const of of ["jacobian", "basis"]) {
    pooled[of] = parts[0][0][of].map((_, i) =>
      parts.every(([profile]) => known(profile[of][i]))
        ? parts.reduce((sum, [profile, weight]) => sum + (profile[of][i] * weight) / total, 0)
        : null,
    );
    pooled[of + "_stderr"] = parts[0][0][of].map((_, i) =>
      parts.every(([profile]) => known(profile[of + "_stderr"][i]))
        ? Math.sqrt(parts.reduce((sum, [profile, weight]) => sum + ((profile[of + "_stderr"][i] * weight) / total) ** 2, 0))
        : null,
    );
  }
  return pooled;
}

/** Trained less untrained over the same documents of a row's tables: mean, error and number. */
function differenceOf(row, rank) {
  const parts = row.tables
    .map((number) => DATA.tables[number].untrained?.difference[rank])
    .filter((found) => found && known(found.difference));
  const n = parts.reduce((sum, found) => sum + found.paired, 0);
  if (!n) return [null, null, 0];
  const weighted = (of) => parts.reduce((sum, found) => sum + of(found) * (found.paired / n), 0);
  const error = parts.every((found) => known(found.difference_stderr))
    ? Math.sqrt(parts.reduce((sum, found) => sum + ((found.difference_stderr * found.paired) / n) ** 2, 0))
    : null;
  return [weighted((found) => found.difference), error, n];
}
const worstOf = (row) => {
  const worst = row.tables.map((number) => DATA.tables[number].worst_certificate).filter(known);
  return worst.length ? Math.max(...worst) : null;
};
/** Mean and error of a reading of the registry at the rank in sight. */
const readingOf = (row, reading) => row.readings[reading.name]?.[reading.of_rank ? state.rank : ""] || [null, null];

/** A row's tables as one: a group's mean weighs each task by its measured documents. */
function contents(row, rank) {
  const tables = row.tables.map((number) => DATA.tables[number]);
  const measured = tables.filter((table) => table.mean[rank]);
  const documentsMeasured = measured.reduce((sum, table) => sum + table.measured, 0);
  const matrix = measured.length
    ? weightedMean(measured.map((table) => [unpack(table.mean[rank]), table.measured]))
    : null;
  const withNorms = tables.filter((table) => table.norms);
  const count = withNorms.reduce((sum, table) => sum + table.total, 0);
  const norms = withNorms.length
    ? withNorms[0].norms.map((_, i) =>
        withNorms.reduce((sum, table) => sum + (table.norms[i] * table.total) / count, 0),
      )
    : null;
  const profile = pooledProfile(measured.map((table) => [table.profile[rank], table.measured]));
  const twins = tables.filter((table) => table.untrained && table.untrained.profile[rank]);
  const untrained = pooledProfile(twins.map((table) => [table.untrained.profile[rank], table.untrained.coupling[rank][2]]));
  const documents = tables.flatMap((table) => table.documents.map((found) => ({ ...found, table })));
  const prompts = tables.reduce((sum, table) => sum + table.total, 0);
  return { matrix: matrix && offDiagonal(matrix), profile, untrained, norms, documents, prompts, documentsMeasured };
}
const chanceOf = (rank) => DATA.chance[rank] || { coupling: null, miscoupling: null };
