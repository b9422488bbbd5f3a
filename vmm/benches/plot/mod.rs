//! The picture of docs/density.svg.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

/// What was measured when so many machines ran.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// How many machines ran.
    pub number: usize,
    /// KiB of anonymous memory of each monitor, guest included: what it alone has. The mean of all.
    pub own_kib: f64,
    /// KiB of each with its share of what several map.
    pub pss_kib: f64,
    /// How long the last of them took to start.
    pub start_ms: f64,
}

/// Reads lines `density NUMBER OWN_KIB PSS_KIB START_MS` among others.
pub fn read(text: &str) -> Vec<Point> {
    let line = |line: &str| {
        let numbers = line.trim().strip_prefix("density ")?;
        let numbers: Vec<f64> = numbers.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        let [number, own_kib, pss_kib, start_ms] = numbers[..] else { return None };
        Some(Point { number: number as usize, own_kib, pss_kib, start_ms })
    };
    text.lines().filter_map(line).collect()
}

/// Draws tiny guests on the left, Linux on the right; memory above, start below.
pub fn draw(path: &Path, tiny: &[Point], linux: &[Point]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (960, 640)).into_drawing_area();
    root.fill(&WHITE)?;
    let panes = root.split_evenly((2, 2));
    let mib = |kib: f64| kib / 1024.0;
    let own = |points: &[Point]| points.iter().map(|p| (p.number, mib(p.own_kib))).collect();
    let shared = |points: &[Point]| points.iter().map(|p| (p.number, mib(p.pss_kib))).collect();
    let start = |points: &[Point]| points.iter().map(|p| (p.number, p.start_ms)).collect();
    for (pane, points, caption) in [
        (0, tiny, "memory of each monitor, MiB (tiny guest, natively)"),
        (1, linux, "memory of each monitor, MiB (busybox, emulated host)"),
    ] {
        let lines = [("its own", RED, own(points)), ("PSS", BLUE, shared(points))];
        chart(&panes[pane], caption, &lines)?;
    }
    chart(&panes[2], "exec to first KVM_RUN, ms", &[("the last one's", BLACK, start(tiny))])?;
    chart(&panes[3], "bulkhead run -d, ms of the host's time", &[("the last one's", BLACK, start(linux))])?;
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Line = (&'static str, RGBColor, Vec<(usize, f64)>);

fn chart(area: &Area<'_>, caption: &str, lines: &[Line]) -> Result<(), Box<dyn Error>> {
    let points = || lines.iter().flat_map(|(_, _, points)| points);
    let right = points().map(|(number, _)| *number).max().unwrap_or(1);
    let top = points().map(|(_, value)| *value).fold(0.0, f64::max) * 1.2;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(caption, ("sans-serif", 15))
        .x_label_area_size(34)
        .y_label_area_size(44)
        .build_cartesian_2d(0..right, 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("machines that run")
        .max_light_lines(1)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (name, colour, points) in lines {
        let colour = *colour;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    chart.configure_series_labels().position(SeriesLabelPosition::LowerRight).border_style(BLACK).draw()?;
    Ok(())
}
