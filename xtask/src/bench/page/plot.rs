//! One plot for each workload: its most telling figures beside each other, the modes below each other, a whisker from the least round to the
//! greatest. Drawn by plotters as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::super::{
    bed::Mode,
    report::{Row, number},
    stats::{Compared, Verdict},
};

/// Which figures, and in which order, if a workload has them.
const TELLING: [&str; 12] = [
    "throughput",
    "rate",
    "handshakes per core-second of the proxies",
    "memory of the proxies for each",
    "memory of all proxies",
    "p50",
    "p99",
    "p99.9",
    "instructions, all",
    "instructions, proxies alone",
    "CPU, pods and proxies",
    "CPU, proxies alone",
];
const MOST: usize = 4;

const WIDTH: u32 = 1120;
const ROW: u32 = 40;
/// Above the rows and below them.
const FRAME: u32 = 70;

/// Of the rows of one workload. Nothing if none of its figures is telling.
pub(super) fn plot(rows: &[Row]) -> Result<String> {
    let figures: Vec<Vec<&Row>> = TELLING
        .iter()
        .map(|name| rows.iter().filter(|row| row.figure.name == *name).collect::<Vec<_>>())
        .filter(|rows| !rows.is_empty())
        .take(MOST)
        .collect();
    if figures.is_empty() {
        return Ok(String::new());
    }
    let most = figures.iter().map(Vec::len).max().unwrap_or_default();
    let height = FRAME + ROW * u32::try_from(most)?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let panels = area.split_evenly((1, figures.len()));
        for (panel, rows) in panels.iter().zip(&figures) {
            draw(panel, rows, most).map_err(|error| anyhow!("cannot draw a plot: {error}"))?;
        }
        area.present().map_err(|error| anyhow!("cannot draw a plot: {error}"))?;
    }
    Ok(svg + "\n")
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Error<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

/// One figure. All panels have as many rows, so that their bars are of one height.
fn draw<'a>(panel: &Area<'a>, rows: &[&Row], most: usize) -> Result<(), Error<'a>> {
    let Some(first) = rows.first() else { return Ok(()) };
    let better = if first.figure.more_is_better() { "more is better" } else { "less is better" };
    let greatest = rows.iter().map(|row| row.series.max).fold(0.0, f64::max);
    let end = if greatest > 0.0 { greatest * 1.08 } else { 1.0 };
    let title = format!("{}, {}", first.figure.name, first.figure.unit);
    let size = if title.len() > 34 { 12 } else { 15 };
    let mut chart = ChartBuilder::on(panel)
        .margin(8)
        .margin_left(20)
        .margin_right(16)
        .caption(title, ("sans-serif", size))
        .x_label_area_size(34)
        .build_cartesian_2d(0.0..end, most as f64..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .x_labels(4)
        .x_label_formatter(&|value| number(*value))
        .x_desc(better)
        .label_style(("sans-serif", 11))
        .draw()?;
    for (index, row) in rows.iter().enumerate() {
        let (top, series) = (index as f64, &row.series);
        let colour = colour(row.mode);
        chart.draw_series([Rectangle::new(
            [(0.0, top + 0.48), (series.median.max(0.0), top + 0.88)],
            colour.filled(),
        )])?;
        if series.values.len() > 1 {
            let whisker =
                ErrorBar::new_horizontal(top + 0.68, series.min, series.median, series.max, BLACK.stroke_width(1), 8);
            chart.draw_series([whisker])?;
        }
        let text = format!("{} {}{}", row.label, number(series.median), beside(row.to_none));
        chart.draw_series([Text::new(text, (end * 0.005, top + 0.12), ("sans-serif", 12))])?;
    }
    Ok(())
}

/// Only what is a difference is called one.
fn beside(to_none: Option<Compared>) -> String {
    match to_none.map(|compared| (compared.verdict, compared.ratio)) {
        None => String::new(),
        Some((Verdict::Differs, ratio)) => format!(" ({ratio:.2} x none)"),
        Some((Verdict::NoDifference, _)) => " (no difference from none)".to_owned(),
        Some((Verdict::TooFewRounds, _)) => " (too few rounds to tell)".to_owned(),
    }
}

/// Of colours that also those can tell apart who see few; what does not encrypt is pale.
fn colour(mode: Mode) -> RGBColor {
    match mode {
        Mode::None => RGBColor(153, 153, 153),
        Mode::Proxied => RGBColor(0, 114, 178),
        Mode::Userspace => RGBColor(86, 180, 233),
        Mode::Direct => RGBColor(0, 158, 115),
        Mode::ProxiedWithoutRecords => RGBColor(190, 214, 232),
        Mode::DirectWithoutRecords => RGBColor(179, 222, 208),
        Mode::Sidecar => RGBColor(213, 94, 0),
        Mode::SidecarHttp => RGBColor(230, 159, 0),
        Mode::External => RGBColor(204, 121, 167),
    }
}
