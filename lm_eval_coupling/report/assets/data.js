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
  level: "top",
  filter: "",
  search: "",
  answer: "all",
  compare: false,
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
  const documents = tables.flatMap((table) => table.documents.map((found) => ({ ...found, table })));
  const prompts = tables.reduce((sum, table) => sum + table.total, 0);
  return { matrix: matrix && offDiagonal(matrix), norms, documents, prompts, documentsMeasured };
}
const chanceOf = (rank) => DATA.chance[rank] || { coupling: null, miscoupling: null };
