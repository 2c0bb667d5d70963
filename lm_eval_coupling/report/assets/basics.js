// Making elements, writing numbers. Other people's texts reach the page through element() as text nodes only.

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
  const there = values.filter((value) => Number.isFinite(value));
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : NaN;
};
/** Plotly reads a little HTML in names and hover texts. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const withError = (value, error, digits = 4) => {
  const cell = element("span", {}, fixed(value, digits));
  if (known(value) && known(error)) cell.append(" ", element("span", { class: "error" }, "± " + fixed(error, digits)));
  return cell;
};
const ending = (text) => (text.length > 120 ? "… " + text.slice(-120).replace(/^\S*\s/, "") : text);
const size = (count) =>
  !known(count)
    ? "–"
    : count >= 1e9
      ? (count / 1e9).toPrecision(3) + "B"
      : count >= 1e6
        ? (count / 1e6).toPrecision(3) + "M"
        : String(count);
