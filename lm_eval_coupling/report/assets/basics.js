// Elements and numbers as text. Texts of others reach the page through element(), as text nodes only.

const at = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const known = (value) => value !== null && value !== undefined;
const fixed = (value, digits = 4) => (known(value) ? value.toFixed(digits) : "–");
const signed = (value) => (known(value) ? (value > 0 ? "+" : "") + value.toFixed(4) : "–");
const short = (value) =>
  !known(value)
    ? "–"
    : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
      ? value.toExponential(1)
      : String(+value.toPrecision(4));
const mean = (values) => {
  const finite = values.filter((value) => Number.isFinite(value));
  return finite.length ? finite.reduce((sum, value) => sum + value, 0) / finite.length : NaN;
};
/** Escape text for Plotly, which reads some HTML in names and hover texts. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const withError = (value, error, digits = 4) => {
  const cell = element("span", {}, fixed(value, digits));
  if (known(value) && known(error)) cell.append(" ", element("span", { class: "error" }, "± " + errorText(error, digits)));
  return cell;
};
/** Return an error as text, never rounded to zero. */
const errorText = (error, digits) => (error && error < 0.5 * 10 ** -digits ? error.toExponential(0) : fixed(error, digits));
/** Let a name break after _ - / and . where its column is narrow. */
const breakable = (name) =>
  element("span", {}, ...String(name).split(/(?<=[_\-/.])/).flatMap((part) => [part, element("wbr")]));
const ending = (text) => (text.length > 120 ? "… " + text.slice(-120).replace(/^\S*\s/, "") : text);
const size = (count) =>
  !known(count)
    ? "–"
    : count >= 1e9
      ? (count / 1e9).toPrecision(3) + "B"
      : count >= 1e6
        ? (count / 1e6).toPrecision(3) + "M"
        : String(count);

/** Return a table as CSV. A cell that a spreadsheet would take for a formula is marked as text. */
function csvOf(columns, items) {
  const cell = (value) => {
    const text = known(value) ? String(value) : "";
    const safe = typeof value !== "number" && /^[=+\-@\t]/.test(text) ? "'" + text : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  const lines = [columns.flatMap((column) => [column.name, ...(column.error ? [column.name + " stderr"] : [])])];
  for (const item of items)
    lines.push(
      columns.flatMap((column) => [column.value(item), ...(column.error ? [column.error(item)] : [])]),
    );
  return lines.map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
}
function download(name, text) {
  const link = element("a", {
    href: URL.createObjectURL(new Blob(["\ufeff" + text], { type: "text/csv" })),
    download: name.replace(/[^\w.@-]+/g, "_"),
  });
  document.body.append(link);
  link.click();
  link.remove();
}
