// Small charts and figures, drawn without a library.

const SVG = "http://www.w3.org/2000/svg";

/** Makes an element with a class, text and children. */
export function element(tag, className = "", text = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

/** Draws values over time; gaps (null) break the line. */
export function sparkline(values, limit = 0) {
  const width = 100;
  const height = 30;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const known = values.filter((value) => value !== null && value !== undefined);
  if (known.length < 2) return svg;
  const top = Math.max(limit, ...known) || 1;
  const x = (index) => (index / (values.length - 1)) * width;
  const y = (value) => height - 1 - (value / top) * (height - 3);
  let line = "";
  let area = "";
  let begun = -1;
  values.forEach((value, index) => {
    const given = value !== null && value !== undefined;
    if (given) {
      line += `${begun < 0 ? "M" : "L"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
      area += begun < 0 ? `M${x(index).toFixed(1)} ${height}` : "";
      area += `L${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
      if (begun < 0) begun = index;
    }
    if (begun >= 0 && (!given || index === values.length - 1)) {
      area += `L${x(given ? index : index - 1).toFixed(1)} ${height}Z`;
      begun = -1;
    }
  });
  for (const [name, d] of [["area", area], ["line", line]]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

/** A labelled bar; `share` from 0 to 1, an alarm above `limit`. */
export function meter(name, share, text, limit = Infinity) {
  const level = element("div", share > limit ? "level full" : "level");
  level.style.width = `${Math.min(1, Math.max(0, share)) * 100}%`;
  return element("div", "meter", "", element("span", "", name), element("div", "track", "", level), element("span", "number", text));
}

/** Seconds as people read them. */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
}

/** Counts and rates as people read them. */
export function count(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(value >= 100000 ? 0 : 1)}k`;
  return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1);
}

/** Shares as people read them. */
export function percent(value, digits = 0) {
  return value === null || value === undefined ? "–" : `${(value * 100).toFixed(digits)} %`;
}

/** A time of the day. */
export function clock(unixSeconds) {
  return unixSeconds ? new Date(unixSeconds * 1000).toLocaleTimeString([], { hour12: false }) : "–";
}

/** Bytes in GiB. */
export function gibibytes(value) {
  return value === null || value === undefined ? "–" : (value / 2 ** 30).toFixed(1);
}
