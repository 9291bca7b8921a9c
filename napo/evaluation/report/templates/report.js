"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = window.matchMedia("(max-width: 600px)");
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// What the figures share: colours of the page, and less of everything on a phone.
function themed(layout) {
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line") };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--text"), size: narrow.matches ? 11 : 13, family: "system-ui, Helvetica, Arial, sans-serif" },
    hoverlabel: { align: "left" },
    margin: { l: 10, r: 16, t: 24, b: 48 },
    dragmode: narrow.matches ? false : "zoom",
    xaxis: { ...layout.xaxis, ...axis, automargin: true },
    yaxis: { ...layout.yaxis, ...axis, automargin: true },
    shapes: (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: colour("--soft") } })),
  };
}

function draw(figure) {
  const place = document.getElementById(figure.id);
  const choice = figure.choices[figure.chosen];
  const layout = choice
    ? { ...figure.layout, xaxis: { ...figure.layout.xaxis, title: { text: choice.x } } }
    : figure.layout;
  if (choice) place.setAttribute("aria-label", choice.alt);
  const options = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };
  return Plotly.react(place, choice ? choice.data : figure.data, themed(layout), options);
}

function drawAll() {
  figures.forEach(draw);
}

for (const select of document.querySelectorAll("select[data-figure]")) {
  const figure = figures.find((one) => one.id === select.dataset.figure);
  select.addEventListener("change", () => {
    figure.chosen = select.value;
    draw(figure);
  });
}

for (const section of document.querySelectorAll("section.examples")) {
  const form = section.querySelector("form");
  const examples = [...section.querySelectorAll("details.example")];
  const filter = () => {
    const { right, wrong, text } = form.elements;
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const example of examples) {
      const who = example.dataset.right.split(" ");
      const fits =
        (!right.value || who.includes(right.value)) &&
        (!wrong.value || !who.includes(wrong.value)) &&
        (!wanted || example.textContent.toLowerCase().includes(wanted));
      example.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    form.querySelector("output").textContent = `${shown} of ${examples.length}`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
}

dark.addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
drawAll();
