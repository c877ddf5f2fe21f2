// Curves, drawn by uPlot.

import { html, useEffect, useRef } from "./htm-preact.js";
import { short } from "./ui.js";

const COLOURS = ["--curve-1", "--curve-2", "--curve-3", "--curve-4", "--curve-5", "--curve-6"];
const HEIGHT = 190;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Curves of their own steps as uPlot wants them: all steps, and each curve's values at them.
function aligned(curves) {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const columns = curves.map((curve) => {
    const at = new Map(curve.steps.map((step, place) => [step, curve.values[place]]));
    return steps.map((step) => at.get(step));
  });
  return [steps, ...columns];
}

function options(curves, width) {
  const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  return {
    width,
    height: HEIGHT,
    scales: { x: { time: false } },
    axes: [{ ...axis, size: 28, label: "step", labelSize: 16, labelFont: "12px system-ui" }, { ...axis, size: 62, values: (_, ticks) => ticks.map(short) }],
    legend: { show: curves.length > 1 },
    cursor: { drag: { x: true, y: false } },
    series: [
      { label: "step" },
      ...curves.map((curve, place) => ({
        label: curve.label,
        stroke: colour(COLOURS[place % COLOURS.length]),
        width: 1.5,
        // Steps that only another curve has are no gaps of this one.
        spanGaps: true,
        value: (_, value) => short(value),
        points: { show: curve.steps.length < 2 },
      })),
    ],
  };
}

// `curves`: [{label, steps, values}]. A picture for those who see it, the last value in words for those who do not.
export function Chart({ title, curves }) {
  const place = useRef();
  const plot = useRef();
  const labels = curves.map((curve) => curve.label).join("\n");
  useEffect(() => {
    const width = () => Math.max(place.current.clientWidth, 120);
    plot.current = new uPlot(options(curves, width()), aligned(curves), place.current);
    const resized = new ResizeObserver(() => plot.current.setSize({ width: width(), height: HEIGHT }));
    resized.observe(place.current);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const recoloured = () => {
      const data = plot.current.data;
      plot.current.destroy();
      plot.current = new uPlot(options(curves, width()), data, place.current);
    };
    dark.addEventListener("change", recoloured);
    return () => {
      dark.removeEventListener("change", recoloured);
      resized.disconnect();
      plot.current.destroy();
    };
  }, [labels]);
  useEffect(() => plot.current.setData(aligned(curves)));
  const last = curves.map((curve) => `${curves.length > 1 ? curve.label + " " : ""}${short(curve.values.at(-1))}`);
  return html`<figure class="chart">
    <figcaption><span>${title}</span> <b>${curves.length > 1 ? "" : last[0]}</b></figcaption>
    <div ref=${place} role="img" aria-label=${`${title} over optimizer steps, last ${last.join(", ")}`}></div>
  </figure>`;
}

const FIRST = [
  "train/loss_mean",
  "optim/grad_norm",
  "optim/learning_rate",
  "train/advantage_mean",
  "train/kl_sampler_trainer",
  "train/sampler_logprob_gap",
  "train/tokens_per_s",
];

const isPlain = (name) => /(_s|tokens|loss_sum|pairs)$/.test(name) && !name.endsWith("per_s");

// Names in the order in which people look for them; without `all`, those of amounts and times are left out.
export function ordered(names, all) {
  const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return [...names].filter((name) => all || !isPlain(name)).sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
}
